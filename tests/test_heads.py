"""Whole modules as an adapter's own, heads for one: the laws, and the reference's checkpoints with them."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import inlay
from inlay.errors import FormatError, UsageError
from inlay.methods.head import ModulesToSave
from inlay.methods.table import METHODS
from test_laws import WISHES
from zoo import ENCODER, PAD_ONE, make, small

DISTIL = dict(
    vocab_size=48, dim=16, hidden_dim=24, n_layers=2, n_heads=4, max_position_embeddings=64, dropout=0.0,
    attention_dropout=0.0, seq_classif_dropout=0.0, pad_token_id=0,
)  # fmt: skip
GPT2 = dict(
    vocab_size=48, n_embd=16, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
SEQUENCES = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**ENCODER, num_labels=3)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**PAD_ONE, num_labels=3)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**DISTIL, num_labels=3)),
    "llama": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**small(), num_labels=3)),
    "gpt2": lambda: tf.GPT2ForSequenceClassification(tf.GPT2Config(**GPT2, num_labels=3)),
}
TOKENS = {
    "bert": lambda: tf.BertForTokenClassification(tf.BertConfig(**ENCODER, num_labels=3)),
    "roberta": lambda: tf.RobertaForTokenClassification(tf.RobertaConfig(**PAD_ONE, num_labels=3)),
    "distilbert": lambda: tf.DistilBertForTokenClassification(tf.DistilBertConfig(**DISTIL, num_labels=3)),
    "llama": lambda: tf.LlamaForTokenClassification(tf.LlamaConfig(**small(), num_labels=3)),
    "gpt2": lambda: tf.GPT2ForTokenClassification(tf.GPT2Config(**GPT2, num_labels=3)),
}
BASES = [(kind, name) for kind in ("sequences", "tokens") for name in SEQUENCES]
EXACT = {"rtol": 0, "atol": 1e-9}
LENGTHS = (6, 3, 5, 4, 2)
ROUTE = ["lora", None, "ia3", "prompt", "prefix"]


def model_of(kind, name):
    """A random model with a head, every norm and bias random too; its first ids mean nothing special."""
    torch.manual_seed(0)
    model = (SEQUENCES if kind == "sequences" else TOKENS)[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double()


def randomise(parameters):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.2)


def full_bank(model):
    """Adapters of five kinds, each with a head of its own but the last."""
    bank = inlay.attach(model)
    bank.add("lora", [inlay.LoRA(r=2), ModulesToSave()], seed=1)
    bank.add("ia3", [inlay.IA3(), ModulesToSave()], seed=2)
    bank.add("prompt", [inlay.PromptTuning(num_virtual_tokens=2), ModulesToSave()], seed=3)
    bank.add("prefix", inlay.PrefixTuning(num_virtual_tokens=2), seed=4)
    randomise(bank.parameters())
    return bank


def rows(model, left=False):
    pad = model.config.pad_token_id
    generator = torch.Generator().manual_seed(5)
    lists = [torch.randint(4, 48, (n,), generator=generator).tolist() for n in LENGTHS]
    longest = max(LENGTHS)
    filled = [[pad] * (longest - len(r)) + r if left else r + [pad] * (longest - len(r)) for r in lists]
    ids = torch.tensor(filled)
    return lists, ids, (ids != pad).long()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("kind", "name"), BASES)
def test_rows_with_heads_of_their_own_are_as_alone(kind, name, left):
    bank = full_bank(model_of(kind, name))
    lists, ids, mask = rows(bank.model, left)
    with bank.route(ROUTE):
        mixed = bank.model(input_ids=ids, attention_mask=mask).logits
    plain = model_of(kind, name)
    for n, (route, row) in enumerate(zip(ROUTE, lists, strict=True)):
        # Left padding moves a base's own positions where nobody gives it any: the comparison keeps the padding.
        own = (ids[n : n + 1], mask[n : n + 1]) if left else (torch.tensor([row]), torch.ones(1, len(row)).long())
        with bank.route([route]):
            alone = bank.model(input_ids=own[0], attention_mask=own[1]).logits[0]
        got = mixed[n] if kind == "sequences" else mixed[n][mask[n].bool()]
        alone = alone if kind == "sequences" else alone[own[1][0].bool()]
        torch.testing.assert_close(got, alone, **EXACT)
        if route is None:
            expected = plain(input_ids=own[0], attention_mask=own[1]).logits[0]
            expected = expected if kind == "sequences" else expected[own[1][0].bool()]
            torch.testing.assert_close(got, expected, **EXACT)
        else:
            assert (got - plain(input_ids=own[0], attention_mask=own[1]).logits[0][-1]).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "name"), BASES)
def test_gradients_are_those_of_each_row_alone_beside_nan(kind, name):
    bank = full_bank(model_of(kind, name))
    bank.add("bad", [inlay.LoRA(r=2), ModulesToSave()], seed=9)
    with torch.no_grad():
        for parameter in bank.parameters("bad"):
            parameter.fill_(float("nan"))
    lists, ids, mask = rows(bank.model)
    route = ["lora", "bad", "ia3", "prompt", "lora"]
    together: dict = {}
    with bank.route(route):
        logits = bank.model(input_ids=ids, attention_mask=mask).logits
    real = [row if kind == "sequences" else row[m.bool()] for row, m in zip(logits, mask, strict=True)]
    sum(own.square().sum() for own, r in zip(real, route, strict=True) if r != "bad").backward()
    for adapter in ("lora", "ia3", "prompt"):
        together[adapter] = [None if p.grad is None else p.grad.clone() for p in bank.parameters(adapter)]
        for p in bank.parameters(adapter):
            p.grad = None
    for adapter, found in together.items():
        for own, row in zip(route, lists, strict=True):
            if own == adapter:
                with bank.route([adapter]):
                    bank.model(input_ids=torch.tensor([row])).logits.square().sum().backward()
        names = [(path, key) for path, values in bank.adapters[adapter].params.items() for key in values]
        assert any(g is not None and g.abs().max() > 0 for g in found)
        for where, p, grad in zip(names, bank.parameters(adapter), found, strict=True):
            assert (p.grad is None) == (grad is None), where
            if grad is not None:
                torch.testing.assert_close(grad, p.grad, **EXACT)


def test_a_head_alone_is_an_adapter_and_starts_at_the_base():
    bank = inlay.attach(model_of("sequences", "roberta"))
    adapter = bank.add("head", ModulesToSave())
    assert [*adapter.sites] == ["classifier"] and len(adapter) == 16 * 16 + 16 + 3 * 16 + 3
    _, ids, mask = rows(bank.model)
    with bank.route(["head", None, "head", None, "head"]):
        mixed = bank.model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(mixed, bank.model(input_ids=ids, attention_mask=mask).logits, **EXACT)


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_weighted_heads_are_mixed_and_chained_ones_refused(name):
    bank = inlay.attach(model_of("sequences", name))
    for name in "ab":
        bank.add(name, ModulesToSave())
    randomise(bank.parameters())
    ids = torch.arange(4, 10)[None]
    said = {}
    for route in ("a", "b", None, {"a": 0.25, "b": 0.5}):
        with bank.route([route]):
            said[str(route)] = bank.model(input_ids=ids).logits
    base = said["None"]
    expected = base + 0.25 * (said["a"] - base) + 0.5 * (said["b"] - base)
    torch.testing.assert_close(said["{'a': 0.25, 'b': 0.5}"], expected, **EXACT)
    with bank.route([["a", "b"]]), pytest.raises(UsageError, match="cannot be chained"):
        bank.model(input_ids=ids)


def test_modules_inside_the_base_are_saved_too():
    """An embedding, a linear layer and a norm of a causal model; virtual tokens of the row stay the adapter's own."""
    names = ["embed_tokens", "layers.0.self_attn.q_proj", "model.norm", "lm_head"]
    bank = inlay.attach(make("llama"))
    bank.add("own", [inlay.PromptTuning(num_virtual_tokens=2), ModulesToSave(targets=names)], seed=1)
    randomise(bank.parameters())
    changed = make("llama")
    for path, values in bank.adapters["own"].parts[1].params.items():
        for key, value in values.items():
            changed.get_submodule(path).get_parameter(key).data.copy_(value)
    expected = inlay.attach(changed)
    expected.add("prompt", inlay.PromptTuning(num_virtual_tokens=2), seed=1)
    expected.adapters["prompt"].params[""]["prompt"].data.copy_(bank.adapters["own"].params[""]["prompt"])
    ids = torch.randint(4, 48, (2, 6))
    with bank.route(["own", None]):
        got = bank.model(input_ids=ids).logits
    with expected.route(["prompt"]):
        torch.testing.assert_close(got[:1], expected.model(input_ids=ids[:1]).logits, **EXACT)
    torch.testing.assert_close(got[1:], make("llama")(input_ids=ids[1:]).logits, **EXACT)


def test_tied_weights_are_copied_for_the_named_module_alone():
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**small(), tie_word_embeddings=True)).double().eval()
    bank = inlay.attach(model)
    bank.add("own", ModulesToSave(targets=["lm_head"]))
    randomise(bank.parameters())
    assert [*bank.adapters["own"].sites] == ["lm_head"]
    ids = torch.randint(4, 48, (1, 6))
    with bank.route(["own"]):
        got = bank.model(input_ids=ids).logits
    states = model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(got, states @ bank.adapters["own"].params["lm_head"]["weight"].T, **EXACT)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("base", "targets", "said"),
    [
        ("llama", ["elsewhere"], "no module elsewhere"),
        ("llama", ["layers.0"], "blocks"),
        ("llama", ["layers.1.self_attn"], "blocks"),
        ("bert", ["cls"], "two names"),
    ],
)
def test_modules_that_cannot_be_saved_are_refused(base, targets, said):
    bank = inlay.attach(make(base))
    with pytest.raises(UsageError, match=said):
        bank.add("own", ModulesToSave(targets=targets))
    assert not bank.adapters


def test_a_head_of_several_layers_refuses_packed_rows():
    bank = inlay.attach(make("bert"))
    bank.add("own", ModulesToSave(targets=["cls.predictions.transform"]))
    ids = torch.randint(4, 48, (1, 6))
    with bank.stream([("own", 4), (None, 2)]), pytest.raises(UsageError, match="whole rows"):
        bank.model(input_ids=ids)


# ---- checkpoints of the reference

MAKERS = {
    "lora": lambda task: peft.LoraConfig(task_type=task, r=2, target_modules="all-linear"),
    "ia3": lambda task: peft.IA3Config(task_type=task),
    "prompt": lambda task: peft.PromptTuningConfig(
        task_type=task, num_virtual_tokens=3, token_dim=16, num_layers=2, num_attention_heads=4
    ),
}
NAMED = {
    "lora": lambda task: peft.LoraConfig(
        task_type=task, r=2, target_modules=["q_lin", "v_lin", "query", "value", "q_proj", "v_proj", "c_attn"]
    ),
    "ia3": lambda task: peft.IA3Config(task_type=task, target_modules=["k_lin", "lin2"], feedforward_modules=["lin2"]),
}
"""For what the reference cannot choose itself: on DistilBERT, and all linear layers of a model that tags."""
CASES = [(kind, name, method) for kind, name in BASES for method in MAKERS]


def there(kind, name, config):
    """The reference's model, with random parameters."""
    model = peft.get_peft_model(model_of(kind, name), config)
    randomise(p for p in model.parameters() if p.requires_grad)
    return model.eval()


def theirs(model, kind, ids):
    """Logits (B, labels) or (B, tokens, labels); those of the reference's virtual tokens are left out."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits if kind == "sequences" else logits[:, -ids.shape[1] :]


@pytest.mark.parametrize(("kind", "name", "method"), CASES)
def test_checkpoints_with_heads_go_both_ways(kind, name, method, tmp_path):
    task = "SEQ_CLS" if kind == "sequences" else "TOKEN_CLS"
    named = (name == "distilbert" and method in NAMED) or (kind == "tokens" and method == "lora")
    reference = there(kind, name, (NAMED if named else MAKERS)[method](task))
    reference.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(4, 48, (3, 6), generator=torch.Generator().manual_seed(3))
    expected = theirs(reference, kind, ids)
    bank = inlay.attach(model_of(kind, name))
    bank.load("a", tmp_path / "theirs")
    assert any(isinstance(one, ModulesToSave) for one in bank.adapters["a"].methods)
    bank.set("a")
    ours = bank.model(input_ids=ids).logits
    torch.testing.assert_close(ours, expected, **EXACT)
    if (name, method) == ("distilbert", "prompt"):
        return  # the reference cannot find out how many heads it has
    bank.save("a", tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(model_of(kind, name), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(back, kind, ids), expected, **EXACT)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_prefixes_with_heads_keep_their_tensors(name, tmp_path):
    """The reference writes them, and cannot run them on models for sequences with this transformers."""
    config = peft.PrefixTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=2, token_dim=16 if name == "bert" else 8,
        num_attention_heads=4 if name == "bert" else 2,
    )  # fmt: skip
    there("sequences", name, config).save_pretrained(tmp_path / "theirs")
    bank = inlay.attach(model_of("sequences", name))
    bank.load("a", tmp_path / "theirs")
    with bank.route(["a", None]):
        logits = bank.model(input_ids=torch.arange(4, 10)[None].expand(2, -1)).logits
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    bank.save("a", tmp_path / "ours")
    stored, back = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("theirs", "ours"))
    assert stored.keys() == back.keys() and len(stored) >= 2
    for key, value in stored.items():
        torch.testing.assert_close(back[key].double(), value.double(), **EXACT)


def test_a_head_alone_goes_both_ways(tmp_path):
    bank = inlay.attach(model_of("sequences", "roberta"))
    bank.add("head", ModulesToSave())
    randomise(bank.parameters())
    bank.save("head", tmp_path / "a")
    bank.load("again", tmp_path / "a")
    ids = torch.randint(4, 48, (1, 6))
    with bank.route(["head"]):
        ours = bank.model(input_ids=ids).logits
    with bank.route(["again"]):
        torch.testing.assert_close(bank.model(input_ids=ids).logits, ours, **EXACT)
    back = peft.PeftModel.from_pretrained(model_of("sequences", "roberta"), tmp_path / "a").eval()
    torch.testing.assert_close(back(input_ids=ids).logits, ours, **EXACT)


def test_saved_embeddings_and_output_layers_go_both_ways(tmp_path):
    """With tied weights too: the reference unties the modules that it saves."""
    for tied in (False, True):
        torch.manual_seed(0)
        config = tf.LlamaConfig(**small(), tie_word_embeddings=tied)
        made = tf.LlamaForCausalLM(config).double().eval()
        start = {name: value.clone() for name, value in made.state_dict().items()}

        def fresh(config=config, start=start):
            model = tf.LlamaForCausalLM(config).double().eval()
            model.load_state_dict(start)
            return model

        own = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
        reference = peft.get_peft_model(fresh(), own)
        randomise(p for p in reference.parameters() if p.requires_grad)
        reference.eval().save_pretrained(tmp_path / f"theirs{tied}")
        ids = torch.randint(4, 48, (1, 6))
        bank = inlay.attach(fresh())
        bank.load("a", tmp_path / f"theirs{tied}")
        with bank.route(["a"]):
            ours = bank.model(input_ids=ids).logits
        torch.testing.assert_close(ours, reference(input_ids=ids).logits, **EXACT)
        bank.save("a", tmp_path / f"ours{tied}")
        back = peft.PeftModel.from_pretrained(fresh(), tmp_path / f"ours{tied}").eval()
        torch.testing.assert_close(back(input_ids=ids).logits, ours, **EXACT)


def test_a_head_on_a_base_without_one_is_refused(tmp_path):
    reference = there("sequences", "llama", MAKERS["lora"]("SEQ_CLS"))
    reference.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="no module score"):
        inlay.attach(make("llama")).load("a", tmp_path)
    torch.manual_seed(0)
    five = tf.LlamaForSequenceClassification(tf.LlamaConfig(**small(), num_labels=5)).double()
    with pytest.raises(FormatError, match=r"shape \(3, 16\), the base needs \(5, 16\)"):
        inlay.attach(five).load("a", tmp_path)


@pytest.mark.parametrize(("kind", "name"), [("sequences", "roberta"), ("sequences", "llama"), ("tokens", "bert")])
def test_heads_merge_with_what_stands_beside_them(kind, name):
    bank = inlay.attach(model_of(kind, name))
    bank.add("own", [inlay.LoRA(r=2), ModulesToSave()])
    randomise(bank.parameters())
    ids = torch.randint(4, 48, (2, 6))
    with bank.route(["own", "own"]):
        expected = bank.model(input_ids=ids).logits
    bank.merge("own")
    bank.detach()
    torch.testing.assert_close(bank.model(input_ids=ids).logits, expected, **EXACT)


def test_saved_modules_write_and_run_packed_as_alone():
    """Embedding, layer, norm and output layer of one adapter's own, while rows are generated and in a packed stream."""
    bank = inlay.attach(make("llama"))
    names = ["embed_tokens", "layers.0.self_attn.q_proj", "model.norm", "lm_head"]
    bank.add("own", [inlay.LoRA(r=2), ModulesToSave(targets=["embed_tokens", "model.norm", "lm_head"])], seed=1)
    bank.add("other", ModulesToSave(targets=names), seed=2)
    randomise(bank.parameters())
    lists = [list(range(4, 10)), list(range(8, 11)), list(range(20, 25))]
    ids = torch.tensor([[0] * (6 - len(row)) + row for row in lists])
    mask = torch.tensor([[0] * (6 - len(row)) + [1] * len(row) for row in lists])
    route = ["own", None, "other"]
    with bank.route(route):
        mixed = bank.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    alone = []
    for name, row in zip(route, lists, strict=True):
        with bank.route([name]):
            written = bank.model.generate(input_ids=torch.tensor([row]), max_new_tokens=5, do_sample=False)
            alone.append(bank.model(input_ids=torch.tensor([row])).logits[0])
        assert mixed[len(alone) - 1, 6:].tolist()[: written.shape[1] - len(row)] == written[0, len(row) :].tolist()
    with bank.stream([(name, len(row)) for name, row in zip(route, lists, strict=True)]):
        packed = bank.model(input_ids=torch.tensor([[token for row in lists for token in row]])).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), **EXACT)


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_gradients_of_heads_are_the_references(name, tmp_path):
    bank = inlay.attach(model_of("sequences", name))
    bank.add("own", [inlay.LoRA(r=2), ModulesToSave()], seed=1)
    randomise(bank.parameters())
    bank.save("own", tmp_path)
    ids, labels = torch.randint(4, 48, (4, 6)), torch.tensor([0, 2, 1, 2])
    with bank.route(["own"] * 4):
        bank.model(input_ids=ids, labels=labels).loss.backward()
    reference = peft.PeftModel.from_pretrained(model_of("sequences", name), tmp_path, is_trainable=True).eval()
    reference(input_ids=ids, labels=labels).loss.backward()
    theirs = {key.replace(".default", "").replace(".modules_to_save", ""): p for key, p in reference.named_parameters()}
    ends, compared = {"A": "lora_A.weight", "B": "lora_B.weight"}, 0
    for part in bank.adapters["own"].parts:
        for path, values in part.params.items():
            for key, value in values.items():
                other = theirs[f"base_model.model.{path}.{ends.get(key, key)}"]
                torch.testing.assert_close(value.grad, other.grad, **EXACT)
                compared += 1
    assert compared == sum(p.requires_grad for p in reference.parameters())


def test_a_head_with_running_means_is_no_adapters_own():
    config = tf.LevitConfig(
        image_size=32, hidden_sizes=[8, 8, 8], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[4, 4, 4],
        attention_ratio=[2, 2, 2], mlp_ratio=[2, 2, 2], num_labels=3,
    )  # fmt: skip
    bank = inlay.attach(tf.LevitForImageClassification(config).eval())
    assert "batch_norm.running_mean" in bank.model.classifier.state_dict()
    with pytest.raises(UsageError, match=r"classifier holds batch_norm\.num_batches_tracked, which is no parameter"):
        bank.add("head", inlay.ModulesToSave())
    bank.add("inside", inlay.ModulesToSave(targets=["classifier.linear"]))


ELSEWHERE = {"full", "head", "fusion"}
"""The first two train the head themselves; the third is over bottlenecks."""


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ELSEWHERE])
def test_a_head_beside_any_method_is_loaded_again(name, tmp_path):
    torch.manual_seed(0)
    model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**small(num_labels=3, pad_token_id=0))).eval().double()
    bank = inlay.attach(model)
    method = next((wish() for wish in WISHES.values() if type(wish()) is METHODS[name]), None) or METHODS[name]()
    bank.add("a", [method, ModulesToSave(["score"])], seed=1)
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    bank.save("a", tmp_path)
    bank.load("b", tmp_path)
    ids = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))
    with bank.route(["a", None]):
        ours = model(input_ids=ids).logits
    with bank.route(["b", None]):
        again = model(input_ids=ids).logits
    assert not torch.allclose(ours[0], ours[1])
    torch.testing.assert_close(again, ours, rtol=0, atol=1e-6)  # files hold float32
