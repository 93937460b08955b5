"""Steps that go on from a cache: rows of many adapters give what each gives alone, and what one forward gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DynamicCache

import inlay
from inlay.bank import applying, slots
from inlay.kernels.bottlenecks import Bottlenecks
from inlay.kernels.rows import Rows
from inlay.methods.table import METHODS
from zoo import make

METHODS_BY_NAME = {
    "lora": lambda: inlay.LoRA(r=4),
    "lora of 13": lambda: inlay.LoRA(r=13, alpha=3),
    "lora of 20": lambda: inlay.LoRA(r=20, targets="mlp"),
    "ia3": lambda: inlay.IA3(),
    "dora": lambda: METHODS["dora"](r=3),
    "norm": lambda: inlay.NormTuning(),
    "norm again": lambda: inlay.NormTuning(),
    "houlsby": lambda: METHODS["houlsby"](reduction_factor=2),
    "pfeiffer": lambda: METHODS["pfeiffer"](reduction_factor=2, non_linearity="gelu"),
    "scaled": lambda: METHODS["scaled_parallel"](),
    "loreft": lambda: METHODS["loreft"](r=2),
    **{f"houlsby {r}": lambda r=r: METHODS["houlsby"](reduction_factor=r) for r in (1, 2, 4, 8)},
    **{f"lora {n}": lambda: inlay.LoRA(r=2) for n in range(5)},
}
KINDS = {
    "one": ["lora"] * 3,
    "a few": ["lora", "lora", "ia3", "norm", "norm", "houlsby", "houlsby", "pfeiffer", None, "lora of 13"],
    "in any order": ["norm", "lora", None, "norm again", "lora", "scaled", "norm", "houlsby", "ia3", "houlsby", "ia3"],
    "many": [*(f"houlsby {r}" for r in (1, 2, 4, 8)), "houlsby", *(f"lora {n}" for n in range(5)), "lora of 20"],
    "chained and weighted": [["lora", "norm"], {"houlsby": 0.5}, "dora", {"ia3": 0.5, "lora": 2.0}, "loreft", None],
}
STEPS = ((0, 4), (4, 5), (5, 7), (7, 8), (8, 9))


@pytest.fixture(scope="module", params=["llama", "gpt2", "bloom"])
def bank(request):
    bank = inlay.attach(make(request.param, dtype=torch.float64))
    for seed, (name, method) in enumerate(METHODS_BY_NAME.items()):
        bank.add(name, method(), seed=seed)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return bank


def written(bank, rows, ids):
    found, cache = [], DynamicCache(config=bank.model.config)
    with torch.no_grad(), bank.route(rows, prompts=[4] * len(rows)):
        for start, stop in STEPS:
            out = bank.model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
            found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_one_forward_gives_each(bank, kind, monkeypatch):
    made, asked = [], applying.step_of
    monkeypatch.setattr(applying, "step_of", lambda *args: made.append(asked(*args)) or made[-1])
    rows = KINDS[kind]
    ids = torch.randint(3, 40, (len(rows), 9), generator=torch.Generator().manual_seed(1))
    together = written(bank, rows, ids)
    assert any(step is not None and step.acts for step in made)
    near = 1e-7 if bank.model.config.model_type == "bloom" else 1e-8  # its softmax is float32's over a float64 base too
    for number, row in enumerate(rows):
        with torch.no_grad(), bank.route([row], prompts=[4]):
            alone = bank.model(input_ids=ids[number : number + 1], use_cache=False).logits
        torch.testing.assert_close(together[number : number + 1], alone, rtol=0, atol=near)


@pytest.mark.parametrize("sick", ["lora", "ia3", "norm", "houlsby", "pfeiffer", "houlsby 4", "lora 2"])
def test_a_diverged_neighbour_poisons_nobody(bank, sick):
    adapter = bank.adapters[sick]
    healthy = {name: value.detach().clone() for name, value in _values(adapter)}
    rows = [*KINDS["many"], *KINDS["a few"]]
    ids = torch.randint(3, 40, (len(rows), 9), generator=torch.Generator().manual_seed(2))
    before = written(bank, rows, ids)
    with torch.no_grad():
        for _, value in _values(adapter):
            value.fill_(float("nan"))
    try:
        after = written(bank, rows, ids)
    finally:
        with torch.no_grad():
            for name, value in _values(adapter):
                value.copy_(healthy[name])
    for number, row in enumerate(rows):
        if row == sick:
            assert after[number].isnan().all()
        else:
            torch.testing.assert_close(after[number], before[number], rtol=0, atol=1e-10)


def _values(adapter):
    return [((path, name), value) for path, own in adapter.params.items() for name, value in own.items()]


@pytest.mark.parametrize("one_by_one", [True, False])
def test_both_ways_of_computing_are_equal(bank, one_by_one, monkeypatch):
    monkeypatch.setattr(slots, "one_by_one", lambda shares, dtype: one_by_one or not shares)
    test_rows_are_what_one_forward_gives_each(bank, "in any order", monkeypatch)


def test_bottlenecks_together_are_each_alone():
    torch.manual_seed(0)
    own = [
        (torch.randn(r, 6), torch.randn(r), torch.randn(5, r), torch.randn(5), scale)
        for r, scale in ((3, 1.0), (8, 0.5), (17, torch.tensor([2.0])))
    ]
    counts, z = (2, 1, 3), torch.randn(6, 6)
    made = Bottlenecks.of(own, counts, torch.tanh)(z)
    owners = [one for one, count in zip(own, counts, strict=True) for _ in range(count)]
    for vector, (down, down_bias, up, up_bias, scale) in enumerate(owners):
        wanted = (torch.tanh(z[vector] @ down.t() + down_bias) @ up.t() + up_bias) * scale
        torch.testing.assert_close(made[vector], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spans", [[(0, 2), (2, 6)], [(1, 3), (3, 4)], [(4, 6), (0, 1)], [(0, 1), (2, 4), (4, 5)]])
def test_rows_read_and_write_their_own(spans):
    rows, tensor = Rows.of(spans, 6, torch.device("cpu")), torch.arange(12.0).view(6, 2)
    numbers = list(itertools.chain.from_iterable(range(*span) for span in spans))
    assert rows.count == len(numbers) and rows.whole == (len(numbers) == 6)
    assert torch.equal(rows.take(tensor), tensor[numbers])
    for change in (rows.put, rows.add):
        into, value = tensor.clone(), torch.rand(len(numbers), 2)
        change(into, value)
        wanted = tensor.clone()
        wanted[numbers] = value if change == rows.put else wanted[numbers] + value
        assert torch.equal(into, wanted)
