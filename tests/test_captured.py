"""Captured steps: rows of any company write what they write alone. A tape stands in for a GPU's graphs here; what it
runs again knows no Python, as those do."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch

import inlay
from inlay.kernels import picked
from inlay.runtime import captured
from inlay.runtime.decode import Decoder
from tape import record
from test_decode import alone, written
from test_laws import bank_of
from zoo import make

NEW = 14
PLAIN = {
    **{f"r{r}": inlay.LoRA(r=r, targets="all-linear") for r in (2, 4, 8, 9, 16)}, "all": inlay.LoRA(r=4),
    "prompt": inlay.PromptTuning(num_virtual_tokens=3, init="random"),
    "prefix": inlay.PrefixTuning(num_virtual_tokens=5, init="random"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """Steps are captured on the CPU."""
    monkeypatch.setattr(picked, "PICKS", ["cpu"])
    monkeypatch.setattr(captured, "record", record)


def bank_with(name, methods, dtype=torch.float64):
    bank = inlay.attach(make(name, dtype=dtype))
    torch.manual_seed(4)
    for number, (adapter, method) in enumerate(methods.items()):
        bank.add(adapter, method, seed=number)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return bank


def counted(decoder):
    """How many steps were gone through, captured and refused, by kind."""
    found, own = Counter(), decoder._captured
    first, through = own._first, own._through

    def noted(key, *rest):
        found["all"] += 1
        return through(key, *rest)

    def begun(key, *rest):
        found["first"] += 1
        return first(key, *rest)

    own._through, own._first = noted, begun
    return found


def check(bank, rows, at_once, new=NEW, decoder=None):
    """`at_once` rows begin together and the others join them, one a step."""
    generator = torch.Generator().manual_seed(7)
    decoder = decoder or Decoder(bank, 2**22)
    found = counted(decoder)
    asked = [
        (row, torch.randint(6, 48, (3 + 4 * n % 11,), generator=generator).tolist(), new, 0, f"{n}")
        for n, row in enumerate(rows)
    ]
    for own in asked[:at_once]:
        decoder.add(*own)
    going = written(decoder, asked[at_once:], new)
    for (row, ids, *_), own in zip(asked, going, strict=True):
        assert own == alone(bank, row, ids, new=new), row
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral", "gpt2"])
def test_rows_in_tables_and_behind_virtual_tokens_come_and_go(name):
    bank = bank_with(name, PLAIN)
    found = check(bank, [*PLAIN, None, *reversed(PLAIN), "r2", "r2", None, "prefix", *PLAIN], 3)
    assert found["all"] > 3 * found["first"] > 0


def test_other_adapters_go_through_the_same_step():
    bank = bank_with("llama", {f"a{n}": inlay.LoRA(r=8) for n in range(12)})
    decoder = Decoder(bank, 2**22)
    check(bank, [f"a{n}" for n in range(12)], 12, decoder=decoder)
    # Sixteen rows are too many for four.
    assert check(bank, ["a3", "a9", "a9", None], 4, decoder=decoder)["first"] == 1
    for rows in (["a7", None, "a2"], ["a11"], [f"a{n}" for n in range(6)], [f"a{n}" for n in range(9)]):
        found = check(bank, rows, len(rows), decoder=decoder)
        assert found["all"] == NEW - 1 and not found["first"], rows


def test_long_rows_and_many():
    bank = bank_with("llama", {"a": inlay.LoRA(r=4), "b": inlay.LoRA(r=4)})
    bank.model.config.max_position_embeddings = 400
    found = check(bank, ["a", "b", None] * 7, 21, new=150)
    assert found["first"] == 2  # four blocks, then eight


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_methods_that_are_no_products_are_captured_for_their_rows(name):
    methods = {
        "lora": inlay.LoRA(r=4), "ia3": inlay.IA3(), "norm": inlay.NormTuning(), "dora": inlay.DoRA(r=3),
        "bitfit": inlay.BitFit(add_bias=True), "houlsby": inlay.Houlsby(reduction_factor=4),
        "prefix": inlay.PrefixTuning(num_virtual_tokens=5, init="random"), "vera": inlay.VeRA(r=8),
    }  # fmt: skip
    if name == "gemma3":  # its norms of a query's heads are found anew at each step
        del methods["norm"]
    bank = bank_with(name, methods)
    found = check(bank, [*methods, *methods, None], 2 * len(methods) + 1)
    assert found["first"] == 1 and found["all"] == NEW - 1 - captured.PATIENCE


def test_every_method():
    """What cannot be captured is not, and writes the same."""
    bank = bank_of("llama")
    names = [*bank.adapters, ["small", "dora"], {"small": 0.5, "ia3": 2.0}]
    for row in names:
        check(bank, [row, row, None], 3, new=8)


def test_a_base_that_asks_for_numbers_is_not_captured(caplog):
    bank = bank_with("qwen3_moe", {"a": inlay.LoRA(r=4)})
    with caplog.at_level(logging.INFO):
        found = check(bank, ["a", None, "a", "a"], 1)
    assert 0 < found["first"] <= captured.FAILURES and "not captured: operation not permitted" in caplog.text


def test_what_stands_still_in_a_step_is_found_out(caplog):
    """A base that counts its steps in Python gives other logits when it runs again."""
    bank = bank_with("llama", {"a": inlay.LoRA(r=4)})
    decoder = Decoder(bank, 2**22)
    rotary = bank.model.model.rotary_emb
    plain, steps = rotary.forward, [0]

    def forward(x, position_ids):
        cos, sin = plain(x, position_ids)
        steps[0] += 1
        return cos * (1 + 0.1 * steps[0]), sin

    rotary.forward = forward
    row = decoder.add("a", [5, 6, 7], 8)
    for _ in range(6):
        _, logits = decoder.step()
        decoder.write(row, int(logits[0].argmax()))
    decoder.end(row)
    assert not decoder._captured._steps and "gave other logits than the step itself" in caplog.text


def test_nothing_is_captured_where_others_look_on():
    bank = bank_with("llama", {"a": inlay.LoRA(r=4)})
    seen = []
    bank.model.model.layers[1].register_forward_hook(lambda module, args, out: seen.append(1))
    decoder = Decoder(bank, 2**22)
    check(bank, ["a", None], 2, decoder=decoder)
    assert not decoder._captured._steps and len(seen) > NEW


def test_new_values_and_adapters_that_are_gone():
    bank = bank_with("llama", {"a": inlay.LoRA(r=4), "b": inlay.LoRA(r=4), "ia3": inlay.IA3()})
    decoder = Decoder(bank, 2**22)
    check(bank, ["a", "b"], 2, decoder=decoder)
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.mul_(-2)
    check(bank, ["a", "b"], 2, decoder=decoder)
    check(bank, ["ia3", "b"], 2, decoder=decoder)
    bank.remove("ia3")
    bank.remove("b")
    decoder.forget()
    bank.add("b", inlay.LoRA(r=8, targets="all-linear"), seed=3)
    check(bank, ["a", "b", "b"], 2, decoder=decoder)


def test_tables_that_grow():
    bank = bank_with("llama", {f"a{n}": inlay.LoRA(r=8) for n in range(40)})
    decoder = Decoder(bank, 2**22)
    for first in range(0, 40, 8):
        check(bank, [f"a{first + n}" for n in range(8)], 8, new=5, decoder=decoder)
    check(bank, ["a0", "a39", "a17", None], 4, decoder=decoder)


def test_a_base_that_is_not_captured_writes_behind_prefixes_too():
    """What a forward behind a prefix fails by has words of its own."""
    bank = bank_with("qwen3_moe", {"prefix": inlay.PrefixTuning(num_virtual_tokens=3, init="random")})
    assert check(bank, ["prefix", None, "prefix"], 3)["first"]


def test_a_step_that_is_not_used_leaves_nothing_behind(monkeypatch):
    """Its keys and values least of all: later tokens would read them."""
    bank = bank_with("llama", {"a": inlay.LoRA(r=4)})
    layer = bank.model.model.layers[0].self_attn.k_proj

    def broken(run, pool):
        weight = layer.weight.data.clone()
        layer.weight.data.mul_(3)
        made = record(run, pool)
        layer.weight.data.copy_(weight)
        wrong = made[0]

        def replay():
            layer.weight.data.mul_(3)
            wrong()
            layer.weight.data.copy_(weight)

        return replay, made[1]

    monkeypatch.setattr(captured, "record", broken)
    decoder = Decoder(bank, 2**22)
    check(bank, ["a", "a", None], 3, decoder=decoder)
    assert not decoder._captured._steps


def test_hooks_of_all_modules_are_called():
    bank = bank_with("llama", {"a": inlay.LoRA(r=4)})
    decoder, seen = Decoder(bank, 2**22), []
    check(bank, ["a"], 1, decoder=decoder)
    assert decoder._captured._steps
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    row = decoder.add("a", [5, 6, 7], 8)
    try:
        for step in range(6):
            before = len(seen)
            decoder.write(row, int(decoder.step()[1][0].argmax()))
            assert len(seen) - before > 10, step
    finally:
        handle.remove()
        decoder.end(row)


def test_rows_that_are_no_numbers_do_not_end_it():
    bank = bank_with("llama", {"bad": inlay.LoRA(r=4), "good": inlay.LoRA(r=4)})
    for parameter in bank.parameters("bad"):
        parameter.data.fill_(float("nan"))
    decoder = Decoder(bank, 2**22)
    for count in (1, 2, 4, 8):
        rows = [decoder.add("bad", [5, 6, 7], 8, scope=str(n)) for n in range(count)]
        for _ in range(4):
            for row in decoder.step()[0]:
                decoder.write(row, 5)
        for row in rows:
            decoder.end(row)
    assert check(bank, ["good", "good"], 2, decoder=decoder)["all"] > NEW - 4
