"""Broken and malicious adapters: an error that names them, or the values as they were; nothing runs, nothing is kept.

INLAY_ATTACKS=1000 tries so many; the kinds and their numbers are those of tests/attacks.py.
"""

from __future__ import annotations

import os

import peft
import pytest
import torch

import inlay
from attacks import MARK, attack
from inlay.errors import InlayError
from zoo import make

pytestmark = pytest.mark.filterwarnings("ignore")
COUNT = int(os.environ.get("INLAY_ATTACKS", "200"))
IDS = torch.tensor([[3, 9, 4, 7]])


@pytest.fixture(scope="module")
def bank():
    return inlay.attach(make("llama"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory, bank):
    """Files of a LoRA by Inlay and of one by HF PEFT with notes beside it, and their values."""
    found = []
    folder = tmp_path_factory.mktemp("ours")
    bank.add("a", inlay.LoRA(r=2, targets=["q_proj", "down_proj"]), seed=1)
    torch.nn.init.normal_(bank.adapters["a"].params["model.layers.0.self_attn.q_proj"]["B"])
    bank.save("a", folder)
    notes = (folder / "inlay.json").read_bytes()
    found.append(files(folder))
    bank.remove("a")
    folder = tmp_path_factory.mktemp("theirs")
    model = peft.get_peft_model(
        make("llama"), peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["norm"])
    )
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.v_proj.lora_B["default"].weight)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    found.append(files(folder) | {"inlay.json": notes})
    return found


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def logits(bank, name):
    with bank.route([name]):
        return bank.model(input_ids=IDS).logits


def tried(number, bank, sound, folder):
    """The kind of an attack, and whether it was an error, of no consequence, or other values than before."""
    for name, data in sound[number % len(sound)].items():
        (folder / name).write_bytes(data)
    bank.load("x", folder)
    base, whole = logits(bank, None), logits(bank, "x")
    bank.remove("x")
    kind = attack(number, folder)
    try:
        bank.load("x", folder)
    except InlayError as error:
        assert str(error) and "\n" not in str(error), (number, kind)
        result = "refused"
    else:
        result = "harmless" if torch.equal(logits(bank, "x"), whole) else "other values"
        bank.remove("x")
    assert not bank.adapters and MARK not in os.environ, (number, kind)
    assert torch.equal(logits(bank, None), base), (number, kind)
    return kind, result


def test_broken_and_malicious_adapters_are_errors_or_harmless(bank, sound, tmp_path):
    results = {}
    for number in range(COUNT):
        folder = tmp_path / str(number)
        folder.mkdir()
        kind, result = tried(number, bank, sound, folder)
        results[kind, result] = results.get((kind, result), 0) + 1
    print(*sorted(f"{kind}: {result} {n}" for (kind, result), n in results.items()), sep="\n")
    # A flip among the values, or another alpha, gives a sound adapter of other values, which nothing could tell.
    assert {kind for kind, result in results if result == "other values"} <= {"flipped", "misconfigured"}
    for kind in ("truncated", "poisoned", "retyped", "reshaped", "renamed", "enlarged", "pickled", "linked", "deep"):
        assert results.get((kind, "refused"), 0) > 0, kind
    assert sum(n for (_, result), n in results.items() if result == "refused") > COUNT / 2
