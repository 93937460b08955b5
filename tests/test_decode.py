"""The decoder against the base's own `generate` with one adapter alone: the same tokens, whatever rows share a step."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

import inlay
from inlay.bank import applying, steps
from inlay.errors import UsageError
from inlay.runtime.decode import Decoder
from inlay.runtime.generating import Session, generate
from inlay.runtime.requests import Request
from inlay.runtime.sampling import Sampling
from inlay.runtime.token_bytes import token_bytes
from test_laws import WISHES, bank_of
from zoo import make

BASES = ("llama", "qwen3", "gemma3", "gpt2", "qwen3_moe", "mistral", "phi3")
NEW = 9


@pytest.fixture(scope="module", params=BASES)
def bank(request):
    return bank_of(request.param)


def prompts_for(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(len(rows)):
        ids = torch.randint(6, 48, (4 + 5 * number % 17,), generator=generator).tolist()
        found.append([*ids[:-2], 5, *ids[-2:]])  # 5 invokes aLoRA
    return found


def alone(bank, row, ids, place=0, new=NEW):
    given = torch.tensor([ids])
    with torch.no_grad(), bank.route([row], places=[place]):
        out = bank.model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    return out[0, 1 if bank.model.config.is_encoder_decoder else len(ids) :].tolist()


def written(decoder, later=(), new=NEW):
    """The `new` greedy tokens of each row; `later` are added one a step."""
    later, rows = list(later), [*decoder.waiting]
    while decoder.rows or decoder.waiting or later:
        if later:
            rows.append(decoder.add(*later.pop(0)))
        ready, logits = decoder.step()
        for row, own in zip(ready, [] if logits is None else logits, strict=True):
            decoder.write(row, int(own.argmax()))
            if len(row.written) == new:
                decoder.end(row)
    assert decoder.store.pages.free == decoder.store.pages.blocks
    return [row.written for row in rows]


def check_as_they_come(bank, rows, prompts, chunk, first):
    """The `first` rows begin together and others join them one a step: each writes what it does alone."""
    decoder = Decoder(bank, 2**24, chunk)
    asked = [(row, ids, NEW) for row, ids in zip(rows, prompts, strict=True)]
    for own in asked[:first]:
        decoder.add(*own)
    for row, ids, own in zip(rows, prompts, written(decoder, asked[first:]), strict=True):
        assert own == alone(bank, row, ids), row


def everyone(bank):
    names = list(bank.adapters)
    mixed = [["small", "dora"], {"small": 0.5, "ia3": 2.0}]
    return [None, *names, *mixed]


@pytest.mark.parametrize("chunk", [4, 64])
def test_mixed_rows_write_what_each_writes_alone(bank, chunk):
    rows = everyone(bank)
    prompts = prompts_for(rows)
    check_as_they_come(bank, rows, prompts, chunk, first=len(rows))


def greedy(bank, requests, **settings):
    """What `generate` writes: the ids of each answer of each request."""
    found = {}
    for token in generate(bank, requests, **settings):
        assert token.error is None
        found.setdefault((token.request, token.answer), []).append(token.id)
    return found


def asked(row, ids, **settings):
    return Request(row, ids, Sampling(max_new_tokens=NEW, ignore_eos=True, **settings))


def test_rows_that_come_later_and_virtual_tokens_in_places(bank):
    rows = ["prompt", None, "small", "prompt", "mlp", "short"]
    prompts, places = prompts_for(rows, 1), [3, 0, 0, 6, 2, 0]
    decoder = Decoder(bank, 2**24, 4)
    added = [(row, ids, NEW, place) for row, ids, place in zip(rows, prompts, places, strict=True)]
    for (row, ids, _, place), own in zip(added, written(decoder, added), strict=True):
        assert own == alone(bank, row, ids, place)


def test_rows_of_low_rank_adapters_come_and_go(monkeypatch):
    """Their products stay in tables, whoever else is there."""
    bank = inlay.attach(make("llama", dtype=torch.float64))
    kinds = {
        **{f"r{r}": inlay.LoRA(r=r, targets="all-linear") for r in (3, 4, 8, 9, 16)}, "dora": inlay.DoRA(r=3),
        "qv": inlay.LoRA(r=4, targets=["q_proj", "v_proj"]), "ia3": inlay.IA3(), "bias": inlay.LoRABias(r=2),
        "uneven": inlay.LoRA(r=4, targets="all-linear", rank_pattern={"k_proj": 9}), "other": inlay.LoRA(r=4),
    }  # fmt: skip
    torch.manual_seed(0)
    for name, method in kinds.items():
        bank.add(name, method)
        for parameter in bank.parameters(name):
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    answered, acts = [], steps.placed_acts

    def noted(*given):
        answered.append(acts(*given))
        return answered[-1]

    monkeypatch.setattr(steps, "placed_acts", noted)
    rows = [*kinds, None, *reversed(kinds), "r4", "r8", "r4", "r16", "r3"]
    check_as_they_come(bank, rows, prompts_for(rows, 3), chunk=16, first=2)
    assert sum(found is not None for found in answered) > 20


def test_adapters_of_some_of_the_layers_that_read_one_x_come_and_go(monkeypatch):
    """As PEFT's own LoRA at queries and values: keys, which nobody changes, do not keep the others' table from use."""
    bank = inlay.attach(make("llama", dtype=torch.float64))
    torch.manual_seed(3)
    for number in range(8):
        bank.add(f"qv{number}", inlay.LoRA(r=2 + number, targets=["q_proj", "v_proj"]))
    bank.add("all", inlay.LoRA(r=4, targets="all-linear"))
    for parameter in bank.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    paths, acts = [], steps.placed_acts

    def noted(scope, path, *rest):
        found = acts(scope, path, *rest)
        paths.extend([] if found is None else sorted(found))
        return found

    monkeypatch.setattr(steps, "placed_acts", noted)
    rows = [f"qv{number % 8}" for number in range(12)] + ["all", None, "qv3", "all", *(f"qv{n}" for n in range(8))]
    check_as_they_come(bank, rows, prompts_for(rows, 6), chunk=64, first=5)
    assert sum(path.endswith("v_proj") for path in paths) > 5


def test_chains_whose_adapters_act_on_different_layers_share_no_products():
    """A acts on queries, B and C on keys, which read the same x: each layer's products are other adapters'."""
    bank = inlay.attach(make("llama", dtype=torch.float64))
    torch.manual_seed(1)
    for name, target in (("a", "q_proj"), ("b", "k_proj"), ("c", "k_proj")):
        bank.add(name, inlay.LoRA(r=8, targets=[target]))
        for parameter in bank.parameters(name):
            parameter.data.copy_(torch.randn_like(parameter) * 0.5)
    rows = [["a", "b"], ["a", "c"], "a", "c"] * 4
    check_as_they_come(bank, rows, prompts_for(rows, 4), chunk=64, first=5)


def test_a_small_store_sends_rows_back_and_they_write_the_same(bank):
    rows = ["small", None, "long", "alora", "prompt", "small"]
    prompts = prompts_for(rows, 2)
    decoder = Decoder(bank, 4 * 32 * token_bytes(bank), 8)
    sent = []
    send = decoder._send_back
    decoder._send_back = lambda row: (sent.append(row), send(row))
    for row, ids in zip(rows, prompts, strict=True):
        decoder.add(row, ids, 30)
    while decoder.rows or decoder.waiting:
        ready, logits = decoder.step()
        for row, own in zip(ready, [] if logits is None else logits, strict=True):
            decoder.write(row, int(own.argmax()))
            if len(row.written) == 30:
                assert row.written == alone(bank, row.route, row.ids[: row.past.prompt], new=30)
                decoder.end(row)
    assert sent and decoder.store.pages.free == 4


def test_a_common_beginning_is_read_once(bank):
    generator = torch.Generator().manual_seed(5)
    common = torch.randint(6, 48, (40,), generator=generator).tolist()
    for row in (None, "small", "prompt"):
        prompts = [[*common, 7], [*common, 9, 8], [*common[:20], 11]]
        session = Session(bank, store=2**24)
        seen = {}
        for number, ids in enumerate(prompts):
            session.add(number, asked(row, ids))
            while session.busy:
                for token in session.step():
                    seen.setdefault(number, []).append(token)
        assert [tokens[0].cached > 0 for tokens in seen.values()] == [False, True, False]
        for number, ids in enumerate(prompts):
            assert [token.id for token in seen[number]] == alone(bank, row, ids)


def test_rows_of_other_adapters_or_scopes_share_nothing(bank):
    common = [*range(6, 46)]
    session = Session(bank, store=2**24)
    cases = [
        ("small", "a"),
        ("dora", "a"),
        ("small", "b"),
        (None, "a"),
        ("small", "a"),
        ("gated_lora", ""),
        ("loreft", ""),
    ]
    cached = []
    for number, (row, scope) in enumerate(cases):
        if row in (None, *bank.adapters):
            session.add(number, Request(row, [*common, 5], Sampling(max_new_tokens=2), scope=scope))
            cached.append(next(iter(session.step())).cached)
            while session.busy:
                session.step()
    assert [n > 0 for n in cached] == [False, False, False, False, True, *[False] * (len(cached) - 5)]


def test_several_answers_share_their_prompt(bank):
    (ids,) = prompts_for(["small"], 3)
    request = asked("small", ids, n=3, seed=4, temperature=1.0)
    together = greedy(bank, [request, asked(None, ids)])
    assert together[1, 0] == alone(bank, None, ids)
    assert len({tuple(together[0, n]) for n in range(3)}) > 1
    assert greedy(bank, [asked("ia3", ids), request])[1, 1] == together[0, 1]


def test_a_sick_neighbour_ends_alone(bank):
    adapter = bank.adapters["lora_bias"]
    before = [p.detach().clone() for p in adapter.parameters()]
    rows = ["lora_bias", "small", None]
    prompts = prompts_for(rows, 6)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(float("nan"))
    try:
        found = {}
        for token in generate(bank, [asked(r, ids) for r, ids in zip(rows, prompts, strict=True)]):
            found.setdefault(token.request, []).append(token)
    finally:
        with torch.no_grad():
            for parameter, value in zip(adapter.parameters(), before, strict=True):
                parameter.copy_(value)
    assert [token.finish_reason for token in found[0]] == ["error"]
    assert "NaN" in str(found[0][0].error)
    for number in (1, 2):
        assert [token.id for token in found[number]] == alone(bank, rows[number], prompts[number])


def test_adapters_of_rows_in_flight_stay(bank):
    session = Session(bank)
    session.add(0, asked("small", [6, 7, 8]))
    session.step()
    with pytest.raises(UsageError, match="1 row in flight"):
        bank.remove("small")
    session.cancel(0)
    assert not session.busy and not any(bank._lookup.routing.in_flight.values())


def test_what_cannot_fit_is_refused_before_it_begins(bank):
    with pytest.raises(UsageError, match="64 positions"):
        list(generate(bank, [asked(None, [6] * 60)]))
    with pytest.raises(UsageError, match="does not fit into a key-value store of 32"):
        list(generate(bank, [asked(None, [6] * 40)], store=32 * token_bytes(bank)))
    with pytest.raises(UsageError, match="no block"):
        Decoder(bank, 10)
    with pytest.raises(UsageError, match="no tokens"):
        list(generate(bank, [asked(None, [])]))
    assert not any(bank._lookup.routing.in_flight.values())


def test_a_hybrid_writes_every_method_in_padded_rows():
    bank = inlay.attach(make("jamba"))
    for name, method in WISHES.items():
        with suppress(UsageError):  # what has no place in a mixer of states
            bank.add(name, method(), seed=1)
    assert len(bank.adapters) > 35
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    rows = everyone(bank)
    prompts = prompts_for(rows)
    found = greedy(bank, [asked(row, ids) for row, ids in zip(rows, prompts, strict=True)])
    for number, (row, ids) in enumerate(zip(rows, prompts, strict=True)):
        assert found[number, 0] == alone(bank, row, ids), row


@pytest.mark.parametrize("name", ["bloom", "mamba", "t5", "jamba", "deepseek_v3", "gemma2", "gpt_neox", "opt"])
def test_other_bases_write_as_generate_does(name):
    bank = inlay.attach(make(name))
    for seed, (own, method) in enumerate(
        {"lora": inlay.LoRA(r=2), "ia3": inlay.IA3(), "dora": inlay.DoRA(r=2)}.items()
    ):
        bank.add(own, method, seed=seed)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    rows = [None, "lora", "ia3", "dora"]
    prompts = prompts_for(rows, 7)
    said = []
    found = greedy(bank, [asked(r, ids) for r, ids in zip(rows, prompts, strict=True)], on_message=said.append)
    assert bool(said) == (name in ("bloom", "mamba", "t5", "jamba"))
    for number, (row, ids) in enumerate(zip(rows, prompts, strict=True)):
        assert found[number, 0] == alone(bank, row, ids)


def test_in_float32_tokens_part_only_where_two_are_equally_good():
    """Up to the first place where the reference's two best logits are within 1e-4, the tokens are the same."""
    bank = bank_of("llama", dtype=torch.float32)
    rows = everyone(bank)
    prompts = prompts_for(rows, 8)
    found = greedy(bank, [asked(row, ids) for row, ids in zip(rows, prompts, strict=True)])
    ties = 0
    for number, (row, ids) in enumerate(zip(rows, prompts, strict=True)):
        given = torch.tensor([ids])
        with torch.no_grad(), bank.route([row]):
            out = bank.model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False,
                pad_token_id=0, eos_token_id=None, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        best = torch.cat(out.logits).topk(2).values
        near = (best[:, 0] - best[:, 1] < 1e-4).tolist()
        sure = near.index(True) if any(near) else NEW
        ties += sure < NEW
        assert found[number, 0][:sure] == out.sequences[0, len(ids) :].tolist()[:sure], row
    assert ties <= len(rows) // 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_row_takes_the_quick_ways(dtype, monkeypatch):
    from inlay.kernels.decode_linear import DecodeLinear

    monkeypatch.setattr("inlay.kernels.decode_linear.wide_vectors", lambda: True)
    bank = inlay.attach(make("llama", dtype=dtype))
    bank.add("lora", inlay.LoRA(r=2, targets="all-linear"), seed=0)
    seen, bags = [], DecodeLinear._bags
    monkeypatch.setattr(DecodeLinear, "_bags", lambda self, x, weight: seen.append(len(x)) or bags(self, x, weight))
    for row in (None, "lora"):
        (own,) = greedy(bank, [asked(row, [6, 7, 8, 9])]).values()
        assert own == alone(bank, row, [6, 7, 8, 9])
    assert seen and set(seen) == {1}
    before = len(seen)
    bank.model(input_ids=torch.tensor([[6]]))  # outside of a step nothing has changed
    assert len(seen) == before


def test_a_company_of_known_adapters_is_not_laid_out_again(monkeypatch):
    """Rows of adapters in tables leave and come back: no site is asked what it does, and each writes what it does
    alone."""
    bank = inlay.attach(make("llama", dtype=torch.float64))
    torch.manual_seed(5)
    for number in range(10):
        bank.add(f"a{number}", inlay.LoRA(r=3 + number, targets="all-linear"))
    bank.add("prompt", inlay.PromptTuning(num_virtual_tokens=3, init="vocab"))
    for parameter in bank.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    asked, step_of = [], steps.step_of
    monkeypatch.setattr(applying, "step_of", lambda *given: asked.append(given[1].site.path) or step_of(*given))
    decoder = Decoder(bank, 2**24)
    rows = [f"a{number % 10}" for number in range(14)] + ["prompt", None]
    prompts = prompts_for(rows, 8)
    for row, ids in zip(rows, prompts, strict=True):
        decoder.add(row, ids, NEW, scope=str(len(decoder.waiting)))
    first = [*decoder.waiting]
    for count in range(2 * NEW):
        before = len(asked)
        ready, logits = decoder.step()
        for row, own in zip(ready, logits, strict=True):
            decoder.write(row, int(own.argmax()))
            if len(row.written) == NEW - first.index(row) % 4:
                decoder.end(row)
        assert count < 2 or len(asked) == before
        if not decoder.rows:
            break
    for row in first:
        assert row.written == alone(bank, row.route, row.ids[: row.past.prompt], new=len(row.written))


def test_adapters_that_move_positions_count_as_tokens_do():
    bank = inlay.attach(make("gpt2", dtype=torch.float64))
    bank.add("prefix", inlay.PrefixTuning(num_virtual_tokens=11, init="random"))
    bank.add("prompt", inlay.PromptTuning(num_virtual_tokens=7, init="vocab"))
    for name, own in (("prefix", 11), ("prompt", 7)):
        decoder = Decoder(bank, 2**24)
        with pytest.raises(UsageError, match=f"takes 40, its adapters {own}, and 20 new tokens"):
            decoder.add(name, list(range(6, 46)), 20)
        row = decoder.add(name, list(range(6, 46 - own)), 24)
        while len(row.written) < 24:
            decoder.write(row, int(decoder.step()[1][0].argmax()))
        assert row.written == alone(bank, name, row.ids[: row.past.prompt], new=24)
