"""Prefixes, prompts and LLaMA-Adapter beside HF PEFT: starts, checkpoints both ways, gradients, generation."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import inlay
from inlay.batch.noise import Noise
from inlay.errors import FormatError, UsageError
from inlay.runs.run import run
from inlay.runtime.memory import TokenBudget
from inlay.sites.keys import keys_and_values
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from test_crash import broken_off, content, reviews, settings  # noqa: F401
from test_training import examples, same
from zoo import make

pytestmark = pytest.mark.filterwarnings("ignore")
EXACT = {"rtol": 0, "atol": 1e-9}
SINGLE = {"rtol": 1e-4, "atol": 1e-4}  # the reference holds virtual tokens in float32
IDS = torch.randint(3, 48, (2, 7), generator=torch.Generator().manual_seed(1))
TEXT = [5, 9, 22, 31]
CAUSAL = ["llama", "qwen3", "gpt2"]
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def randomise(parameters, by=0.3):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * by)


def task_of(name):
    return {"t5": "SEQ_2_SEQ_LM", "bert": "FEATURE_EXTRACTION"}.get(name, "CAUSAL_LM")


def more_of(name):
    ids = torch.cat([torch.zeros(len(IDS), 1, dtype=torch.long), IDS.flip(1)[:, :4]], 1)
    return {"decoder_input_ids": ids} if name == "t5" else {}


def ours(bank, name, row="a"):
    with bank.route([row] * len(IDS)):
        return bank.model(input_ids=IDS, **more_of(name)).logits


def theirs(model, name, **more):
    out = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **more_of(name), **more).logits
    return out if name == "t5" else out[:, -IDS.shape[1] :]


# ---- prefixes that start as a text


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma3", "mistral", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "qwen3_moe"]
)
def test_a_prefix_that_starts_as_a_text_is_that_text_before_each_row(name):
    bank = inlay.attach(make(name).train())
    bank.add("a", inlay.PrefixTuning(len(TEXT), init_ids=TEXT), seed=1)
    bank.model.eval()
    whole = torch.cat([torch.tensor([TEXT] * len(IDS)), IDS], 1)
    expected = bank.model(input_ids=whole).logits[:, len(TEXT) :]
    assert (ours(bank, name) - ours(bank, name, None)).abs().max() > 1e-3
    torch.testing.assert_close(ours(bank, name), expected, rtol=1e-6, atol=1e-6)  # parameters are float64 here


def test_a_text_start_is_the_references():
    for name in ("llama", "gpt2"):
        reference = peft.get_peft_model(
            make(name), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        )
        cache = make(name)(input_ids=torch.tensor([TEXT]), use_cache=True).past_key_values
        expected = peft.initialize_kv_prefix_from_past_key_values(reference, past_key_values=cache)
        bank = inlay.attach(make(name))
        adapter = bank.add("a", inlay.PrefixTuning(3, init_ids=TEXT), seed=1)
        torch.testing.assert_close(adapter.params[""]["prefix"], expected, **EXACT)


def test_words_are_read_with_the_tokenizers_own_marks_and_repeated(tokenizer, base_folder):
    bank = inlay.attach(tf.AutoModelForCausalLM.from_pretrained(base_folder))
    method = inlay.PrefixTuning(6, init_text="good film").with_tokenizer(tokenizer)
    ids = tokenizer("good film")["input_ids"]
    assert method.init_ids == ids or list(method.init_ids) == ids
    words = bank.add("words", method, seed=1).params[""]["prefix"]
    again = bank.add("again", inlay.PrefixTuning(6, init_ids=(ids * 6)[:6]), seed=7).params[""]["prefix"]
    assert torch.equal(words, again)
    with pytest.raises(UsageError, match="init_ids"):
        bank.add("unprepared", inlay.PrefixTuning(6, init_text="good film"))


def test_starts_are_drawn_from_the_seed_and_differ():
    bank = inlay.attach(make("llama"))
    made = {}
    for init in ("random", "zero", "vocab"):
        made[init] = [
            bank.add(f"{init}{n}", inlay.PrefixTuning(4, init=init), seed=n).params[""]["prefix"] for n in (1, 2)
        ]
    assert not torch.equal(*made["random"]) and not torch.equal(*made["vocab"])
    assert all(float(start.abs().max()) == 0 for start in made["zero"])
    for method in (inlay.PrefixTuning(4, init="SAMPLE_VOCAB"), inlay.PrefixTuning(4)):
        again = bank.add(f"again {method.init}", method, seed=2)
        assert torch.equal(again.params[""]["prefix"], made["vocab"][1]) and again.method.init == "vocab"
    zero = bank.add("z", inlay.PrefixTuning(4, "zero", prefix_projection=True, encoder_hidden_size=3), seed=1)
    assert float(zero.method.derive(zero.params[""], None)["prefix"].abs().max()) == 0


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("t5", lambda: inlay.PrefixTuning(2, init="vocab"), "decoder"),
        ("gpt2", lambda: inlay.PrefixTuning(70, init="vocab"), "cannot read 70 tokens"),
        ("llama", lambda: inlay.PrefixTuning(2, init_ids=[999]), "init_ids holds 999"),
        ("llama", lambda: inlay.PrefixTuning(2, init_ids=[]), "no tokens"),
        ("llama", lambda: inlay.PrefixTuning(2, prefix_projection=True, init="vocab"), "network"),
        ("llama", lambda: inlay.PrefixTuning(2, init="text"), "no text"),
        ("llama", lambda: inlay.PrefixTuning(2, init="words"), "words"),
    ],
)  # fmt: skip
def test_starts_that_cannot_be_are_named(name, method, said):
    bank = inlay.attach(make(name))
    with pytest.raises(UsageError, match=said):
        bank.add("a", method(), seed=1)
    assert not bank.adapters


@pytest.mark.parametrize(
    ("name", "method", "start"),
    [
        ("llama", lambda **more: inlay.PrefixTuning(3, gated=True, **more), "vocab"),
        ("bert", lambda **more: inlay.PrefixTuning(3, **more), "vocab"),
        ("gpt_neox", lambda **more: inlay.UnmovedPrefix(3, **more), "vocab"),
        ("llama", lambda **more: inlay.GatedPrefix(3, prefix_projection=False, **more), "vocab"),
        ("llama", lambda **more: inlay.GatedPrefix(3, **more), "random"),
        ("llama", lambda **more: inlay.PrefixTuning(3, gated=True, prefix_projection=True, **more), "random"),
        ("gpt2", lambda **more: inlay.PrefixTuning(70, gated=True, **more), "random"),
        ("t5", lambda **more: inlay.PrefixTuning(3, **more), "random"),
    ],
)  # fmt: skip
def test_a_prefix_starts_as_tokens_where_it_can_and_says_which_start_it_took(name, method, start):
    base = make(name).train()
    before, random = {k: v.clone() for k, v in base.state_dict().items()}, torch.get_rng_state()
    bank = inlay.attach(base)
    made, named = bank.add("made", method(), seed=4), bank.add("named", method(init=start), seed=4)
    assert method().init == "auto" and made.method == named.method and made.method.init == start
    for path, own in named.params.items():
        assert all(torch.equal(made.params[path][key], value) for key, value in own.items())
    assert torch.equal(random, torch.get_rng_state()) and all(module.training for module in base.modules())
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


def test_a_base_without_a_table_of_tokens_has_a_prefix_at_random(monkeypatch):
    bank = inlay.attach(make("llama"))
    monkeypatch.setattr(bank.base.stacks[0], "get_input_embeddings", lambda: None)
    assert bank.add("a", inlay.PrefixTuning(2), seed=1).method.init == "random"


def test_a_base_that_wants_more_than_tokens_is_named_and_has_a_prefix_at_random(monkeypatch):
    bank = inlay.attach(make("llama"))
    forward = bank.base.stacks[-1].forward

    def choosy(*args, places=None, **kwargs):
        if places is None:
            raise ValueError("Give places too")
        return forward(*args, **kwargs)

    monkeypatch.setattr(bank.base.stacks[-1], "forward", choosy)
    with pytest.raises(UsageError, match="alone \\(Give places too\\)"):
        bank.add("a", inlay.PrefixTuning(2, init="vocab"), seed=1)
    assert bank.add("a", inlay.PrefixTuning(2), seed=1).method.init == "random"


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_gates_are_folded_away(name, tmp_path):
    bank = inlay.attach(make(name))
    adapter = bank.add("a", inlay.PrefixTuning(3, init="random", gated=True), seed=1)
    gate = adapter.params[""]["gate"]
    assert float(gate.abs().max()) == 0  # the reference's "zero" start, whatever the prefix is
    bank.set("a")
    bank.model(input_ids=IDS, **more_of(name)).logits.square().sum().backward()
    assert float(gate.grad.abs().max()) > 0
    randomise(bank.parameters())
    made = ours(bank, name)
    bank.save("a", tmp_path)
    assert set(load_file(tmp_path / FILE)) == {"prompt_embeddings"}
    back = peft.PeftModel.from_pretrained(make(name), tmp_path).eval().double()
    torch.testing.assert_close(theirs(back, name), made, **SINGLE)
    bank.load("b", tmp_path)
    torch.testing.assert_close(ours(bank, name, "b"), made, **EXACT)


def test_gates_of_a_text_start_open():
    bank = inlay.attach(make("llama"))
    for name, gated in (("plain", False), ("gated", True)):
        bank.add(name, inlay.PrefixTuning(len(TEXT), init_ids=TEXT, gated=gated), seed=1)
    torch.testing.assert_close(ours(bank, "llama", "gated"), ours(bank, "llama", "plain"), **EXACT)


def test_p_tuning_v2_is_a_prefix_in_every_layer(tmp_path):
    bank = inlay.attach(make("llama"))
    bank.add("a", inlay.PTuningV2(3), seed=1)
    bank.add("b", inlay.PrefixTuning(3), seed=1)
    torch.testing.assert_close(ours(bank, "llama", "a"), ours(bank, "llama", "b"), **EXACT)
    bank.save("a", tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "PREFIX_TUNING"


def test_starts_have_the_references_names_too(tmp_path):
    assert [inlay.PromptTuning(init=init).init for init in ("SAMPLE_VOCAB", "RANDOM")] == ["vocab", "random"]
    assert inlay.PromptTuning(init="TEXT", init_text="a film").init == "text"
    bank = inlay.attach(make("llama"))
    bank.add("a", inlay.PromptTuning(3, init="vocab"), seed=1)
    bank.save("a", tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["prompt_tuning_init"] == "SAMPLE_VOCAB"
    back = peft.PeftModel.from_pretrained(make("llama"), tmp_path).eval().double()
    torch.testing.assert_close(theirs(back, "llama"), ours(bank, "llama"), **SINGLE)


# ---- P-tuning

NETWORKS = {
    "mlp": dict(encoder_reparameterization_type="MLP", encoder_hidden_size=6),
    "lstm": dict(encoder_reparameterization_type="LSTM", encoder_hidden_size=5, encoder_num_layers=3),
    "one": dict(encoder_reparameterization_type="LSTM", encoder_num_layers=1),
}


def p_tuned(name, network, count=3, **more):
    config = peft.PromptEncoderConfig(num_virtual_tokens=count, task_type=task_of(name), **NETWORKS[network], **more)
    reference = peft.get_peft_model(make(name), config).double().eval()
    reference.config.use_cache = False
    return reference


def with_equal_values(bank, method, reference):
    """An adapter of `method` with random values, which the reference gets too; both with their names there."""
    adapter = bank.add("a", method, seed=1)
    randomise(adapter.parameters())
    named = {key.partition(".default.")[2]: p for key, p in reference.named_parameters() if p.requires_grad}
    named = {"embedding" if key == "embedding.weight" else key: p for key, p in named.items()}
    assert named.keys() == adapter.params[""].keys()
    with torch.no_grad():
        for key, value in adapter.params[""].items():
            assert named[key].shape == value.shape
            named[key].copy_(value)
    return adapter.params[""], named


@pytest.mark.parametrize(
    ("name", "network"),
    [("llama", "one"), *((name, n) for name in ("llama", "qwen3", "gpt2", "bert", "t5") for n in ("mlp", "lstm"))],
)
def test_p_tuning_is_the_references_with_its_gradients(name, network, tmp_path):
    reference, bank = p_tuned(name, network), inlay.attach(make(name))
    blocks = {"submodules": 2} if name == "t5" else {}
    params, named = with_equal_values(bank, inlay.PTuning(3, **NETWORKS[network], **blocks), reference)
    made, expected = ours(bank, name), theirs(reference, name)
    assert (made - ours(bank, name, None)).abs().max() > 1e-3
    torch.testing.assert_close(made, expected, **EXACT)
    made.square().sum().backward()
    expected.square().sum().backward()
    for key, value in params.items():
        torch.testing.assert_close(value.grad, named[key].grad, rtol=1e-7, atol=1e-7)
    assert all(float(p.grad.abs().max()) > 0 for p in params.values())

    reference.save_pretrained(tmp_path / "theirs")
    bank.load("b", tmp_path / "theirs")
    torch.testing.assert_close(ours(bank, name, "b"), made, **EXACT)
    for own in ("a", "b"):
        bank.save(own, tmp_path / own)
        assert set(load_file(tmp_path / own / FILE)) == {"prompt_embeddings"}
        back = peft.PeftModel.from_pretrained(make(name), tmp_path / own).eval().double()
        torch.testing.assert_close(theirs(back, name), made, **SINGLE)


def test_dropout_between_layers_belongs_to_the_step():
    bank = inlay.attach(make("llama"))
    bank.add("a", inlay.PTuning(4, encoder_reparameterization_type="LSTM", encoder_dropout=0.4), seed=1)
    randomise(bank.parameters())

    def trained(rows, step, route=("a",)):
        with bank.route(list(route) * len(rows), noise=Noise([step] * len(rows), rows)):
            return bank.model(input_ids=IDS[rows]).logits

    both = trained([0, 1], 3)
    assert (both - ours(bank, "llama")).abs().max() > 1e-4
    torch.testing.assert_close(trained([1], 3)[0], both[1], **EXACT)
    assert (trained([1], 4)[0] - both[1]).abs().max() > 1e-5
    with bank.stream([("a", 7), (None, 7)], noise=Noise([3, 3], [0, 0])):
        torch.testing.assert_close(bank.model(input_ids=IDS.view(1, -1)).logits[0, :7], both[0], **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(ours(bank, "llama"), ours(bank, "llama"), **EXACT)
    bank.model.train()  # anybody's own loop
    assert (ours(bank, "llama") - ours(bank, "llama")).abs().max() > 1e-5


# ---- multitask prompts


def multitask(name, tasks=3, ranks=2, **more):
    config = peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=4, num_tasks=tasks, num_ranks=ranks, task_type=task_of(name), num_transformer_submodules=1,
        **more,
    )  # fmt: skip
    reference = peft.get_peft_model(make(name), config).double().eval()
    randomise(p for p in reference.parameters() if p.requires_grad)
    return reference


def of_task(model, name, task):
    more = {"task_ids": torch.full((len(IDS),), task)}
    if name != "t5":
        return theirs(model, name, **more)
    more["labels"] = torch.cat([more_of(name)["decoder_input_ids"][:, 1:], IDS[:, :1]], 1)  # it takes no decoder's ids
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **more).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "t5"])
def test_each_task_of_a_multitask_prompt_is_an_adapter(name, tmp_path):
    reference, bank = multitask(name), inlay.attach(make(name))
    reference.save_pretrained(tmp_path / "theirs")
    with pytest.raises(FormatError, match=r"3 tasks share.*task=0"):
        bank.load("a", tmp_path / "theirs")
    for task in range(3):
        own = f"task{task}"
        bank.load(own, tmp_path / "theirs", task=task)
        made = ours(bank, name, own)
        torch.testing.assert_close(made, of_task(reference, name, task), **EXACT)
        bank.save(own, tmp_path / own)
        back = peft.PeftModel.from_pretrained(make(name), tmp_path / own).eval().double()
        torch.testing.assert_close(of_task(back, name, 0), made, **SINGLE)
        bank.load(own + "again", tmp_path / own)
        torch.testing.assert_close(ours(bank, name, own + "again"), made, **EXACT)
    assert (ours(bank, name, "task0") - ours(bank, name, "task1")).abs().max() > 1e-3
    for wrong in (3, -1):
        with pytest.raises(FormatError, match="task"):
            bank.load("wrong", tmp_path / "theirs", task=wrong)
    bank.add("lora", inlay.LoRA(r=2), seed=1)
    bank.save("lora", tmp_path / "lora")
    with pytest.raises(UsageError, match="task"):
        bank.load("wrong", tmp_path / "lora", task=0)


def test_a_multitask_prompt_has_the_references_gradients():
    reference, bank = multitask("llama"), inlay.attach(make("llama"))
    adapter = bank.add("a", inlay.MultitaskPromptTuning(4, num_tasks=3, num_ranks=2, task=1), seed=1)
    randomise(adapter.parameters())
    ends = {"P": "embedding.weight", "U": "prefix_task_cols", "V": "prefix_task_rows"}
    named = {key: p for key, p in reference.named_parameters() if p.requires_grad}
    pairs = [
        (value, next(p for k, p in named.items() if k.endswith(ends[n]))) for n, value in adapter.params[""].items()
    ]
    with torch.no_grad():
        for value, other in pairs:
            other.copy_(value)
    made, expected = ours(bank, "llama"), of_task(reference, "llama", 1)
    torch.testing.assert_close(made, expected, **EXACT)
    made.square().sum().backward()
    expected.square().sum().backward()
    for value, other in pairs:
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-7, atol=1e-7)


def test_multitask_prompts_that_cannot_be_are_named(tmp_path):
    for init in ("average_source_tasks", "EXACT_SOURCE_TASK", "only_source_shared"):
        with pytest.raises(UsageError, match=r"another adapter's file.*bank\.load"):
            inlay.MultitaskPromptTuning(init=init)
    with pytest.raises(UsageError, match="task is 2"):
        inlay.MultitaskPromptTuning(num_tasks=2, task=2)
    multitask("t5").save_pretrained(tmp_path)
    file = tmp_path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_transformer_submodules": 2}))
    with pytest.raises(FormatError, match="submodules"):
        inlay.attach(make("t5")).load("a", tmp_path, task=0)


# ---- LLaMA-Adapter


def adapted(name, **settings):
    reference = peft.get_peft_model(make(name), peft.AdaptionPromptConfig(task_type="CAUSAL_LM", **settings))
    reference.double().eval()
    randomise(p for p in reference.parameters() if p.requires_grad)
    return reference


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_llama_adapter_is_the_references_with_its_gradients(name, layers, tmp_path):
    reference = adapted(name, adapter_len=3, adapter_layers=layers)
    reference.save_pretrained(tmp_path / "theirs")
    bank = inlay.attach(make(name))
    adapter = bank.load("a", tmp_path / "theirs")
    made, expected = ours(bank, name), theirs(reference, name)
    assert (made - ours(bank, name, None)).abs().max() > 1e-3
    near = {"rtol": 1e-5, "atol": 1e-6}  # the reference's softmax is in float32
    torch.testing.assert_close(made, expected, **near)
    made.square().sum().backward()
    expected.square().sum().backward()
    named = {key: p for key, p in reference.named_parameters() if p.requires_grad}
    assert len(named) == 2 * len(adapter.params) == 2 * layers
    for path, params in adapter.params.items():
        for name_, end in (("P", "adaption_prompt"), ("g", "adaption_gate")):
            other = next(p for key, p in named.items() if key.endswith(f"{path}.{end}"))
            torch.testing.assert_close(params[name_].grad.view(other.shape), other.grad, rtol=1e-4, atol=1e-4)
            assert float(other.grad.abs().max()) > 0
    bank.save("a", tmp_path / "ours")
    assert {k: v.shape for k, v in load_file(tmp_path / "ours" / FILE).items()} == {
        k: v.shape for k, v in load_file(tmp_path / "theirs" / FILE).items()
    }
    back = peft.PeftModel.from_pretrained(make(name), tmp_path / "ours").eval().double()
    torch.testing.assert_close(theirs(back, name), made, **SINGLE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_llama_adapter_starts_as_the_base_and_writes_what_the_reference_writes(name, tmp_path):
    bank = inlay.attach(make(name))
    bank.add("fresh", inlay.LlamaAdapter(adapter_len=3), seed=1)
    torch.testing.assert_close(ours(bank, name, "fresh"), ours(bank, name, None), **EXACT)
    reference = adapted(name, adapter_len=3, adapter_layers=2)
    reference.save_pretrained(tmp_path)
    bank.load("a", tmp_path)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    greedy = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = reference.generate(input_ids=IDS, attention_mask=mask, **greedy)
    with bank.route(["a", "a"]):
        assert torch.equal(bank.model.generate(input_ids=IDS, attention_mask=mask, **greedy), expected)


def test_bases_whose_keys_cannot_be_told_are_named():
    for name, said in {"phi3": "each or in order", "bloom": "own attention", "mamba": "own attention"}.items():
        with pytest.raises(UsageError, match=said):
            inlay.attach(make(name)).add("a", inlay.LlamaAdapter())
    with pytest.raises(UsageError, match="adapter_layers is 3"):
        inlay.attach(make("llama")).add("a", inlay.LlamaAdapter(adapter_layers=3))


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "opt"])
def test_keys_of_prompts_are_normed_as_the_bases_own(name):
    """At position 0 nothing is rotated: a key of a prompt is what the base gives a token with that state."""
    bank = inlay.attach(make(name))
    adapter = bank.add("a", inlay.LlamaAdapter(adapter_len=1), seed=1)
    site = next(iter(adapter.sites.values()))
    states = []
    handle = site.module.register_forward_pre_hook(
        lambda module, args, kwargs: states.append(kwargs.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    with bank.alone():
        keys, values = keys_and_values(bank.base, IDS[0])[site.module]
    handle.remove()
    made = adapter.method.derive({"P": states[0][0, :1]}, site)
    torch.testing.assert_close(made["K"], keys[:, :1], **EXACT)
    torch.testing.assert_close(made["V"], values[:, :1], **EXACT)


# ---- training

PLANS = [
    Plan("vocab", inlay.PrefixTuning(3, init="vocab", gated=True), lr=1e-2, batch_size=3, steps=2, seed=1),
    Plan("mlp", inlay.PTuning(3, encoder_hidden_size=4), lr=1e-2, batch_size=4, steps=2, seed=2),
    Plan(
        "lstm", inlay.PTuning(2, encoder_reparameterization_type="LSTM", encoder_hidden_size=4, encoder_dropout=0.3),
        lr=1e-2, batch_size=2, steps=2, seed=3,
    ),
    Plan("multitask", inlay.MultitaskPromptTuning(3, init="vocab"), lr=1e-1, batch_size=4, steps=2, seed=4),
    Plan("adapter", inlay.LlamaAdapter(3), lr=1e-1, batch_size=3, steps=2, seed=5),
]  # fmt: skip


def test_learners_together_equal_their_solo_runs():
    bank = inlay.attach(make("llama"))
    for _ in train_steps(bank, add_learners(bank, PLANS, 24), examples(), TokenBudget(80)):
        pass
    for plan in PLANS:
        solo = inlay.attach(make("llama"))
        for _ in train_steps(solo, add_learners(solo, [plan], 24), examples(), TokenBudget(4096)):
            pass
        same(bank, solo, plan.name, 1e-8)
        fresh = solo.add("fresh", plan.method, seed=plan.seed)
        moved = zip(fresh.parameters(), solo.parameters(plan.name), strict=True)
        assert any(not torch.equal(start, end) for start, end in moved)


@pytest.mark.parametrize(
    ("method", "settings_of"),
    [
        ("prefix", {"init_text": "a good film", "num_virtual_tokens": 3, "gated": True}),
        ("ptuning", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 4, "encoder_dropout": 0.3}),
        ("multitask", {"init_text": "a good film", "num_ranks": 2}),
        ("llama_adapter", {"adapter_len": 3}),
    ],
)
def test_a_run_resumes_byte_for_byte(method, settings_of, base_folder, reviews, tmp_path):  # noqa: F811
    given = {"method": method, "set": settings_of, "steps": 4, "eval_every": 4}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run(settings(base_folder, reviews, tmp_path / "whole", **given), on_message=lambda line: None)
        broken_off(base_folder, reviews, tmp_path / "cut", after=2, **given)
        run(settings(base_folder, reviews, tmp_path / "cut", resume=True, **given), on_message=lambda line: None)
    finally:
        torch.set_num_threads(threads)
    assert content(tmp_path / "whole") == content(tmp_path / "cut")
