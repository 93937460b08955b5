"""Full fine-tuning as an adapter: the numbers of training the model itself, beside rows of other adapters."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import inlay
from inlay.errors import UsageError
from inlay.runs.run import run
from inlay.runtime.memory import TokenBudget
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from test_crash import broken_off, content, reviews, settings  # noqa: F401
from test_training import examples
from zoo import make, small

EXACT = {"rtol": 0, "atol": 1e-9}
IDS = torch.randint(3, 48, (3, 6), generator=torch.Generator().manual_seed(1))


def tied():
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**small(tie_word_embeddings=True))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter
    return model.double()


BASES = {"tied": tied, **{name: (lambda name=name: make(name)) for name in ("llama", "gpt2", "bert", "gemma3")}}


def loss_of(model, ids=IDS):
    logits = model(input_ids=ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("name", list(BASES))
def test_steps_are_those_of_training_the_model(name, tmp_path):
    theirs, bank = BASES[name](), inlay.attach(BASES[name]())
    adapter = bank.add("a", inlay.Full())
    assert len(adapter) == sum(p.numel() for p in theirs.parameters())
    bank.set("a")
    pairs = [
        (torch.optim.AdamW(bank.parameters("a"), lr=0.01, weight_decay=0), bank.model),
        (torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0), theirs),
    ]
    for _ in range(3):
        for optimizer, model in pairs:
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    trained = theirs(input_ids=IDS).logits
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, trained, rtol=0, atol=1e-5)
    bank.save("a", tmp_path)
    assert sum(value.numel() for value in load_file(tmp_path / "adapter_model.safetensors").values()) == len(adapter)
    other = inlay.attach(BASES[name]())
    other.load("a", tmp_path)
    other.merge("a")
    torch.testing.assert_close(other.model(input_ids=IDS).logits, trained, rtol=0, atol=1e-5)
    shared = [
        m.lm_head.weight is m.get_input_embeddings().weight for m in (other.model, theirs) if hasattr(m, "lm_head")
    ]
    assert len(set(shared)) <= 1  # what was tied is tied


def test_it_trains_in_the_one_loop_beside_others():
    def trained(names):
        bank = inlay.attach(make("llama"))
        made = {"full": inlay.Full(), "lora": inlay.LoRA(r=2)}
        plans = [Plan(name, made[name], lr=1e-3, batch_size=2, steps=3, seed=5) for name in names]
        learners = add_learners(bank, plans, len(examples()))
        for _ in train_steps(bank, learners, examples(), TokenBudget(64)):
            pass
        return {name: [p.detach().clone() for p in bank.parameters(name)] for name in names}

    together = trained(["full", "lora"])
    for name in together:
        for ours, alone in zip(together[name], trained([name])[name], strict=True):
            torch.testing.assert_close(ours, alone, **EXACT)
    assert all(float(p.abs().max()) > 0 for p in together["full"])


def test_some_modules_alone_and_what_cannot_be_trained():
    bank = inlay.attach(make("llama"))
    few = bank.add("few", inlay.Full(targets=["lm_head", "mlp", "norm"]))
    assert {path.rpartition(".")[2] for path in few.sites} == {"lm_head", "gate_proj", "up_proj", "down_proj", "norm"}
    with pytest.raises(UsageError, match="'legs' matches no module"):
        bank.add("a", inlay.Full(targets=["legs"]))
    other = inlay.attach(make("vit"))
    with pytest.raises(UsageError, match="cls_token"):
        other.add("a", inlay.Full())
    other.add("a", inlay.Full(targets="all-linear"))


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("full", {}),
        ("selective", {"select": "heads 0,1 of last 1; mlp of first 1; norms"}),
        ("trained_tokens", {"tokens": ["<|im_end|>", "a"]}),
    ],
)
def test_a_run_resumes_byte_for_byte(method, given, base_folder, reviews, tmp_path):  # noqa: F811
    more = {"method": method, "set": given, "steps": 4, "eval_every": 4}
    run(settings(base_folder, reviews, tmp_path / "whole", **more), on_message=lambda line: None)
    broken_off(base_folder, reviews, tmp_path / "cut", after=2, **more)
    run(settings(base_folder, reviews, tmp_path / "cut", resume=True, **more), on_message=lambda line: None)
    assert content(tmp_path / "whole") == content(tmp_path / "cut")


def test_steps_on_experts_are_those_of_training_them():
    theirs, bank = make("mixtral"), inlay.attach(make("mixtral"))
    adapter = bank.add("a", inlay.Full(targets=["gate_up_proj", "down_proj"]))
    own = {name: p for name, p in theirs.named_parameters() if "experts" in name}
    assert len(adapter) == sum(p.numel() for p in own.values())
    bank.set("a")
    pairs = [
        (torch.optim.AdamW(bank.parameters("a"), lr=0.01, weight_decay=0), bank.model),
        (torch.optim.AdamW(own.values(), lr=0.01, weight_decay=0), theirs),
    ]
    before = theirs(input_ids=IDS).logits
    for _ in range(2):
        for optimizer, model in pairs:
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    trained = theirs(input_ids=IDS).logits
    assert float((trained - before).detach().abs().max()) > 1e-2
    torch.testing.assert_close(bank.model(input_ids=IDS).logits, trained, rtol=0, atol=1e-6)
