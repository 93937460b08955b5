"""Trained tokens against HF PEFT: rows of a table and of a tied head, alone and beside LoRA, checkpoints both ways."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import inlay
from inlay.errors import FormatError, UsageError
from zoo import make, small

pytestmark = pytest.mark.filterwarnings("ignore")
EXACT = {"rtol": 0, "atol": 1e-9}
TOKENS = [7, 40, 3]
IDS = torch.tensor([[5, 7, 40, 9, 3, 7], [3, 3, 11, 12, 40, 8]])


def tied(seed=0):
    torch.manual_seed(seed)
    config = tf.LlamaConfig(**small(tie_word_embeddings=True))
    model = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter
    return model.double()


def gemma():
    """Tied, and scaled when it looks up."""
    model = make("gemma3")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


BASES = {
    "llama": lambda: make("llama"),
    "tied": tied,
    "gemma3": gemma,
    "gpt2": lambda: make("gpt2"),
    "bert": lambda: make("bert"),
}


def theirs_of(model, beside):
    if beside:
        targets = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
        config = peft.LoraConfig(r=2, target_modules=targets, trainable_token_indices=TOKENS, init_lora_weights=False)
    else:
        config = peft.TrainableTokensConfig(token_indices=TOKENS)
    model = peft.get_peft_model(model, config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double())
    return model.eval()


def set_up(name, beside, folder):
    """The reference, and a bank that has loaded what it saved."""
    reference = theirs_of(BASES[name](), beside)
    reference.save_pretrained(folder / "theirs")
    bank = inlay.attach(BASES[name]())
    bank.load("a", folder / "theirs")
    bank.set("a")
    return reference, bank


def logits_of(reference):
    """HF PEFT leaves out the bias of a tied head, for whatever tokens."""
    logits = reference(input_ids=IDS).logits
    bias = getattr(reference.get_base_model().get_output_embeddings(), "bias", None)
    return logits if bias is None else logits + bias


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
@pytest.mark.parametrize("name", list(BASES))
def test_parity_both_ways_with_gradients(name, beside, tmp_path):
    if name == "bert" and beside:
        pytest.skip("its projections have other names; it is tried alone")
    reference, bank = set_up(name, beside, tmp_path)
    plain = BASES[name]()(input_ids=IDS).logits
    theirs, ours = logits_of(reference), bank.model(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs, **EXACT)
    assert float((ours - plain).abs().max()) > 1e-2
    theirs.square().mean().backward()
    ours.square().mean().backward()
    rows = next(p for n, p in reference.named_parameters() if "trainable_tokens_delta" in n)
    mine = [p for part in bank.adapters["a"].parts for p in part.params.get("", {}).values()]
    torch.testing.assert_close(mine[0].grad, rows.grad, rtol=1e-7, atol=1e-9)
    bank.save("a", tmp_path / "ours")
    stored, before = (load_file(tmp_path / of / "adapter_model.safetensors") for of in ("ours", "theirs"))
    twice = {key for key in before if ("lm_head" in key or "decoder" in key) and key.endswith("trainable_tokens_delta")}
    assert stored.keys() == before.keys() - twice  # tied heads hold what their table does
    again = peft.PeftModel.from_pretrained(BASES[name](), tmp_path / "ours").double().eval()
    torch.testing.assert_close(logits_of(again), theirs, **EXACT)


def test_rows_begin_as_the_base_and_leave_other_rows_alone():
    bank = inlay.attach(tied())
    bank.add("a", inlay.TrainableTokens(token_indices=TOKENS))
    bank.add("b", inlay.TrainableTokens(token_indices=[9]))
    plain = bank.model(input_ids=IDS).logits
    bank.set("a")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, plain, **EXACT)
    with torch.no_grad():
        next(bank.parameters("a")).fill_(float("nan"))
        next(bank.parameters("b")).add_(1)
    with bank.route([None, "b"]):
        clean = bank.model(input_ids=IDS).logits
    with bank.route(["a", "b", None]):
        mixed = bank.model(input_ids=IDS[[0, 1, 1]]).logits
    torch.testing.assert_close(mixed[1], clean[1], **EXACT)
    torch.testing.assert_close(mixed[2], plain[1], **EXACT)
    assert mixed[0].isnan().any()


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_it_merges_exactly_and_ties_stay(name):
    bank = inlay.attach(BASES[name]())
    bank.add("a", inlay.TrainableTokens(token_indices=TOKENS))
    with torch.no_grad():
        next(bank.parameters("a")).add_(0.5)
    bank.set("a")
    expected = bank.model(input_ids=IDS).logits
    bank.set(None)
    bank.merge("a")
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, expected, **EXACT)
    shared = bank.model.lm_head.weight is bank.model.get_input_embeddings().weight
    assert shared == (name == "tied") == bank.model.config.tie_word_embeddings


def test_new_tokens_of_a_grown_vocabulary(tokenizer, base_folder, tmp_path):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    model = tf.AutoModelForCausalLM.from_pretrained(base_folder)
    tokenizer.add_tokens(["<a>", "<b>"])
    model.resize_token_embeddings(len(tokenizer))
    bank = inlay.attach(model)
    bank.add("a", inlay.TrainableTokens(tokens=["<a>", "<b>"]).with_tokenizer(tokenizer))
    ids = tokenizer("<a> good <b>", return_tensors="pt")["input_ids"]
    bank.set("a")
    before = next(bank.parameters("a")).clone()
    bank.model(input_ids=ids, labels=ids).loss.backward()
    assert next(bank.parameters("a")).grad.abs().sum() > 0
    assert torch.equal(before, model.get_input_embeddings().weight[-2:])
    bank.save("a", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["token_indices"] == [len(tokenizer) - 2, len(tokenizer) - 1]


def test_what_is_wrong_is_said(tokenizer, tmp_path):
    bank = inlay.attach(make("llama"))
    wrong = {
        "Give token_indices": inlay.TrainableTokens(tokens=["<a>"]),
        "rows 0 to 47": inlay.TrainableTokens(token_indices=[48]),
        "twice": inlay.TrainableTokens(token_indices=[3, 4, 3]),
        "Tables: model.embed_tokens": inlay.TrainableTokens(token_indices=[3], targets="wte"),
    }
    for words, method in wrong.items():
        with pytest.raises(UsageError) as caught:
            bank.add("a", method)
        assert words in f"{caught.value.what} {caught.value.remedy}"
    with pytest.raises(UsageError, match="is split into"):
        inlay.TrainableTokens(tokens=["<nothing like it>"]).with_tokenizer(tokenizer)
    set_up("llama", True, tmp_path)
    path = tmp_path / "theirs" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}}))
    with pytest.raises(FormatError, match="other tokens for each table"):
        bank.load("a", tmp_path / "theirs")


def test_lora_and_tokens_on_one_table_have_a_folder_of_parts(tmp_path):
    bank = inlay.attach(tied())
    lora = inlay.LoRA(r=2, targets=["embed_tokens", "q_proj"])
    bank.add("a", [lora, inlay.TrainableTokens(token_indices=TOKENS)], seed=1)
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    bank.set("a")
    expected = bank.model(input_ids=IDS).logits
    bank.save("a", tmp_path)
    other = inlay.attach(tied())
    other.load("a", tmp_path)
    other.set("a")
    torch.testing.assert_close(other.model(input_ids=IDS).logits, expected, **EXACT)
