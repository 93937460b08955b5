"""What `inlay inspect` measures, each against a truth that was planted, and the words that it makes of numbers."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
import torch

from inlay.bank.adapter import Adapter
from inlay.bank.bank import attach
from inlay.bank.variants import changed_part, variants
from inlay.data.encode import Example
from inlay.errors import UsageError
from inlay.evaluation.rows import RowScores
from inlay.evaluation.score import Items, score
from inlay.inspection import rows as rows_module
from inlay.inspection.altered import cut, keeping, watched
from inlay.inspection.altering import lower_ranks, shuffled, without_layers, without_tokens
from inlay.inspection.attention import attention_on_tokens
from inlay.inspection.effects import effects
from inlay.inspection.finding import cost_of
from inlay.inspection.inspect import inspect
from inlay.inspection.pairs import compared, cosine, overlap
from inlay.inspection.rows import calibration_error, most_moved, row_changes, token_calibration
from inlay.inspection.spectra import (
    cut_factors,
    decomposed,
    dense_spectra,
    effective_rank,
    held,
    share_along,
    spectra,
    top_directions,
)
from inlay.inspection.token_words import about_attention, about_tokens
from inlay.inspection.tokens import look_at_tokens, vectors_of
from inlay.inspection.units import Activity, dead_units
from inlay.inspection.words import (
    about_calibration,
    about_layers,
    about_norms,
    about_ranks,
    about_score,
    about_units,
)
from inlay.inspection.words_near import nearest, similarity, values_of_words
from inlay.methods.table import METHODS
from inlay.runtime.memory import TokenBudget
from inlay.sites.keys import keys_and_values
from zoo import ALONE, FITTING, make


@dataclass
class Words:
    """A tokenizer whose words are their numbers."""

    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    seen: list = field(default_factory=list)

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


def bank_with(method, noise=0.0, base="llama", **settings):
    bank = attach(make(base, dtype=torch.float64))
    adapter = bank.add("x", METHODS[method](**{**FITTING.get(method, {}), **settings}), seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * noise)
    return bank, adapter


def rows_of(count=12):
    generator = torch.Generator().manual_seed(3)
    ids = [tuple(torch.randint(3, 48, (8,), generator=generator).tolist()) for _ in range(count)]
    examples = [Example(own, (False,) * 5 + (True,) * 3, n) for n, own in enumerate(ids)]
    return Items(examples, (), Counter(rows=count))


def losses(bank, items, parts):
    """Nats of each row with the adapter x, and with copies of given parts."""
    with variants(bank, parts):
        found = score(bank, items, ["x", *parts], TokenBudget(4096))
    return {name: own.rows.nats for name, own in found.items()}


# ---- numbers of matrices


def test_the_effective_rank_of_known_values():
    assert effective_rank([2.0] * 5) == pytest.approx(5)
    assert effective_rank([7.0, 0, 0]) == pytest.approx(1)
    assert effective_rank([0.0, 0.0]) == 0
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert effective_rank([4.0, 2.0, 2.0]) == pytest.approx(math.exp(-float((p * p.log()).sum())))


def test_what_the_first_directions_hold():
    assert held([3.0, 4.0]) == pytest.approx([9 / 25, 1.0])
    assert held([0.0]) == []


def test_an_adapter_of_known_rank_is_seen_to_have_it():
    _bank, adapter = bank_with("lora", r=6, alpha=6)
    path = next(iter(adapter.sites))
    own = adapter.parts[0].params[path]
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(own["B"].shape[0], 2, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(own["A"].shape[1], 2, generator=generator, dtype=torch.float64))[0]
    with torch.no_grad():
        own["B"].zero_()
        own["A"].zero_()
        own["B"][:, :2], own["A"][:2] = left * 3, right.mT
    found = {one.path: one for one in spectra(adapter)}[path]
    assert found.rank == 6
    assert found.values == pytest.approx([3, 3, 0, 0, 0, 0], abs=1e-9)
    assert found.effective == pytest.approx(2)
    weight = adapter.sites[path].weight()
    assert found.relative == pytest.approx(math.sqrt(18) / float(weight.norm()))


def test_the_decomposition_gives_the_product_back_and_cuts_it_best():
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, 9), (7, 4)))
    u, s, vt = decomposed(down, up, 0.5)
    torch.testing.assert_close(u * s @ vt, up @ down * 0.5)
    low, high = cut_factors(u, s, vt, 2)
    apart = up @ down * 0.5 - high @ low
    assert float(apart.norm()) == pytest.approx(float(s[2:].norm()))


def test_updates_along_the_weights_own_directions_are_told_from_random_ones():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 60, generator=generator, dtype=torch.float64)
    u, _s, vt = torch.linalg.svd(weight, full_matrices=False)
    weight = u * 0.6 ** torch.arange(40) @ vt  # far enough apart to be found
    top = top_directions(weight, 4)
    torch.testing.assert_close(top.double() @ top.double().mT, u[:, :4] @ u[:, :4].mT, atol=1e-3, rtol=0)
    one = torch.ones(3, dtype=torch.float64)
    assert share_along(top, u[:, :3], one) == pytest.approx(1, abs=1e-3)
    assert share_along(top, u[:, 10:13], one) == pytest.approx(0, abs=1e-3)
    drawn = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))[0]
    assert share_along(top, drawn, torch.ones(40, dtype=torch.float64)) == pytest.approx(4 / 40)


def test_weights_without_a_form_are_seen_as_lora_sees_them():
    _bank, adapter = bank_with("lora", noise=0.3, r=2)
    forms, dense = ({one.path: one for one in made(adapter)} for made in (spectra, dense_spectra))
    for path, one in forms.items():
        assert dense[path].values[:2] == pytest.approx(one.values, rel=1e-6)
        assert dense[path].along == pytest.approx(one.along, rel=1e-4)
    assert spectra(bank_with("oft", noise=0.1)[1]) == []


# ---- words


def test_a_token_copied_from_a_word_is_near_it_and_a_random_one_is_not():
    table = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    copied = table[17] * 2
    random = torch.randn(32, generator=torch.Generator().manual_seed(5)) + 0.5
    found = nearest(torch.stack([copied, random]), table)
    assert found[0].words[0] == 17
    assert found[0].cosines[0] == pytest.approx(1)
    assert found[0].chance <= 0.01
    assert found[0].z > 4
    assert found[1].chance > 0.05
    # What is no word is as near to one as random vectors are, whichever token is asked about.
    assert found[0].usual == found[1].usual < 0.7
    assert found[1].usual == pytest.approx(found[1].cosines[0], abs=0.15)


def test_the_start_in_a_shared_direction_makes_nothing_near():
    """Words that all lie along one direction have large cosines with anything there: chance knows it."""
    table = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) + 5
    found = nearest(torch.full((1, 32), 5.0), table)[0]
    assert found.cosines[0] > 0.97
    assert found.z < 4


def test_similarity_of_equal_and_of_orthogonal_vectors():
    assert similarity(torch.ones(3, 4)) == pytest.approx(1)
    assert similarity(torch.eye(4)) == pytest.approx(0)
    assert similarity(torch.ones(1, 4)) is None


def test_values_of_words_are_those_that_a_text_has_there():
    bank, adapter = bank_with("prefix", num_virtual_tokens=3)
    site = next(iter(adapter.sites.values()))
    with bank.alone():
        values = values_of_words(bank.base, site, 48)
        text = keys_and_values(bank.base, torch.tensor([5, 9, 30]))[site.module][1]
    torch.testing.assert_close(values[[5, 9, 30]], text.transpose(0, 1).flatten(1).float())


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_tokens_that_start_as_words_are_found_and_have_not_moved(method):
    bank, adapter = bank_with(method, init_ids=[7, 30, 11], num_virtual_tokens=3)
    start = Adapter.fresh("start", adapter.methods, bank.base, 1)
    look = look_at_tokens(bank, adapter.parts[0], Words(), start)
    assert [token["nearest"][0]["id"] for token in look["tokens"]] == [7, 30, 11]
    assert [token["moved"] for token in look["tokens"]] == pytest.approx([0, 0, 0])
    assert [token["began"] for token in look["tokens"]] == [7, 30, 11]
    assert len({token["random_cosine"] for token in look["tokens"]}) == 1
    with torch.no_grad():
        next(iter(adapter.parameters()))[1] *= 1.5
    moved = [token["moved"] for token in look_at_tokens(bank, adapter.parts[0], Words(), start)["tokens"]]
    assert moved == pytest.approx([0, 0.5, 0])


@pytest.mark.parametrize("base", ["llama", "gpt2", "qwen3_moe", "mistral"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_attention_on_tokens_is_that_on_the_words_they_start_as(method, base):
    """Virtual tokens that start as words get what these get as a text before the row, which the base tells itself."""
    bank, adapter = bank_with(method, base=base, init_ids=[7, 30, 11], num_virtual_tokens=3)
    rows = rows_of(2).items
    found = attention_on_tokens(bank, "x", rows)
    bank.model.set_attn_implementation("eager")
    wanted = []
    for row in rows:
        with bank.alone():
            out = bank.model(input_ids=torch.tensor([[7, 30, 11, *row.ids]]), output_attentions=True)
        own = torch.stack([layer[0] for layer in out.attentions])  # (layers, heads, queries, keys)
        wanted.append(own[:, :, 3:, :3].mean(2))
    whole = torch.stack(wanted).mean(0)
    assert [token["share"] for token in found["tokens"]] == pytest.approx(whole.mean((0, 1)).tolist(), abs=1e-5)
    assert [own["heads"] for own in found["layers"]] == [pytest.approx(own.tolist(), abs=1e-5) for own in whole.sum(-1)]
    assert adapter.virtual_length + adapter.prefix_length == len(found["tokens"]) == 3


def test_attention_that_cannot_be_seen_is_refused():
    for base in ("bloom", "t5"):
        bank, _ = bank_with("prompt", base=base, num_virtual_tokens=2)
        with pytest.raises(UsageError, match="one stack"):
            attention_on_tokens(bank, "x", rows_of(1).items)


# ---- changed copies


@pytest.mark.parametrize("method", ["lora", "prefix", "houlsby", "ia3", "loreft", "prompt"])
def test_an_unchanged_copy_gives_the_same(method):
    bank, adapter = bank_with(method, noise=0.1)
    same = [changed_part(part) for part in adapter.parts]
    found = losses(bank, rows_of(), {"same": same})
    np.testing.assert_allclose(found["same"], found["x"], rtol=1e-9)
    assert list(bank.adapters) == ["x"]


def test_copies_leave_the_bank_even_where_something_fails():
    bank, adapter = bank_with("lora", noise=0.1)
    with pytest.raises(RuntimeError), variants(bank, {"y": [changed_part(adapter.parts[0])]}):
        raise RuntimeError
    with pytest.raises(UsageError, match="here already"), variants(bank, {"x": adapter.parts}):
        pass
    assert list(bank.adapters) == ["x"]
    assert bank.adapters["x"] is adapter


def test_leaving_out_a_dead_layer_changes_nothing_and_a_live_one_does():
    bank, adapter = bank_with("lora", noise=0.5)
    with torch.no_grad():
        for path, own in adapter.parts[0].params.items():
            if ".0." in path:
                own["B"].zero_()
    copies = without_layers(adapter)
    assert set(copies) == {"0", "1"}
    found = losses(bank, rows_of(), copies)
    np.testing.assert_allclose(found["0"], found["x"], rtol=1e-9)
    assert np.abs(found["1"] - found["x"]).max() > 1e-3
    base = score(bank, rows_of(), [None], TokenBudget(4096))[None].rows.nats
    np.testing.assert_allclose(found["1"], base, rtol=1e-9)  # what is left is the dead one


def test_an_adapter_of_rank_two_is_the_same_when_it_is_cut_to_two():
    bank, adapter = bank_with("lora", noise=0.5, r=8)
    with torch.no_grad():
        for own in adapter.parts[0].params.values():
            own["B"][:, 2:] = 0
    copies = lower_ranks(adapter)
    assert list(copies) == [4, 2, 1]
    found = losses(bank, rows_of(), {str(rank): parts for rank, parts in copies.items()})
    np.testing.assert_allclose(found["4"], found["x"], rtol=1e-9)
    np.testing.assert_allclose(found["2"], found["x"], rtol=1e-9)
    assert np.abs(found["1"] - found["x"]).max() > 1e-3


def test_a_cut_keeps_scales():
    _bank, adapter = bank_with("dora", noise=0.3, r=2)
    part = adapter.parts[0]
    path, _site = next(iter(part.sites.items()))
    form = part.form(path, None, {})
    down, up = form.factors()
    made = changed_part(part, cut(part.method, {path: (down, up * form.scale)})).form(path, None, {})
    torch.testing.assert_close(made.product(), form.product())
    assert torch.equal(made.out_scale, form.out_scale)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_without_a_token_is_as_if_it_had_never_been(method):
    bank, adapter = bank_with(method, noise=0.3, num_virtual_tokens=3)
    copies = without_tokens(adapter)
    assert set(copies) == {(0, 0), (0, 1), (0, 2)}
    name, values = next(iter(adapter.parts[0].params[""].items()))
    other = bank.add("fewer", METHODS[method](num_virtual_tokens=2), seed=1)
    with torch.no_grad():
        other.parts[0].params[""][name].copy_(values[[0, 2]])
    items = rows_of()
    found = losses(bank, items, {"copy": copies[0, 1]})
    fewer = score(bank, items, ["fewer"], TokenBudget(4096))["fewer"].rows.nats
    np.testing.assert_allclose(found["copy"], fewer, rtol=1e-9)
    assert np.abs(found["copy"] - found["x"]).max() > 1e-4


def test_the_order_of_a_prefix_is_nothing_and_that_of_a_prompt_is_something():
    for method, changes in (("prefix", False), ("prompt", True)):
        bank, adapter = bank_with(method, noise=0.5, num_virtual_tokens=4)
        copies = {str(turn): parts for turn, parts in shuffled(adapter).items()}
        found = losses(bank, rows_of(), copies)
        moved = max(np.abs(found[name] - found["x"]).max() for name in copies)
        assert (moved > 1e-4) == changes, method


def test_a_single_token_is_neither_shuffled_nor_left_out():
    adapter = bank_with("prompt", num_virtual_tokens=1)[1]
    assert without_tokens(adapter) == {}
    assert shuffled(adapter) == {}


def test_another_order_names_the_tokens_in_it():
    _bank, adapter = bank_with("prompt", num_virtual_tokens=3)
    part = changed_part(adapter.parts[0], keeping(adapter.parts[0].method, [2, 0]))
    assert part.method.virtual_length == 2
    torch.testing.assert_close(vectors_of(part), vectors_of(adapter.parts[0])[[2, 0]])


# ---- bottlenecks


def dead_in(bank, adapter, path, items):
    """The dead units at a site, how many there are, on how many tokens, and the losses with and without watching."""
    activity = Activity()
    part = adapter.parts[0]
    found = losses(bank, items, {"watched": [changed_part(part, watched(part.method, activity.hear))]})
    site = {site["path"]: site for site in activity.sites()}[path]
    return set(site["dead_units"]), site["units"], site["tokens"], found


def test_dead_units_are_found_and_watching_changes_nothing():
    bank, adapter = bank_with("houlsby", noise=0.5, reduction_factor=2, non_linearity="relu")
    path, items = next(iter(adapter.sites)), rows_of()
    own = adapter.parts[0].params[path]
    before, units, tokens, found = dead_in(bank, adapter, path, items)
    np.testing.assert_allclose(found["watched"], found["x"], rtol=1e-9)
    assert (units, tokens) == (8, sum(len(item.ids) for item in items.items))
    alive = sorted(set(range(units)) - before)[:3]
    assert len(alive) == 3
    with torch.no_grad():
        own["down"][alive[0]] = 0  # says the same of every token
        own["down_bias"][alive[1]] = -1e4  # never above zero
        own["up"][:, alive[2]] = 0  # heard by nobody
    assert dead_in(bank, adapter, path, items)[0] >= {*alive}
    assert dead_in(bank, adapter, path, items)[0] != set(range(units))


def test_dead_is_what_adds_a_hundredth_of_the_rest():
    up = torch.ones(4, 3, dtype=torch.float64)
    assert dead_units(torch.tensor([1.0, 0.005, 0.02]), up).tolist() == [False, True, False]


# ---- rows


def labelled(probabilities, right):
    return RowScores.of_labels(range(len(right)), right, np.log(np.array(probabilities)), ["a", "b"])


def test_calibration_error_of_known_rows():
    always = labelled([[0.8, 0.2]] * 10, [0] * 8 + [1] * 2)
    assert calibration_error(always) == pytest.approx(0)
    boasting = labelled([[0.95, 0.05]] * 10, [0] * 5 + [1] * 5)
    assert calibration_error(boasting) == pytest.approx(0.45)
    assert calibration_error(RowScores.of_tokens([0], [1.0], [1], [1])) is None


def test_calibration_of_tokens_that_boast(monkeypatch):
    """Answers that are 90 % sure of a token which is right every other time are off by 0.4; the base by nothing."""

    def logits_of(bank, segments):
        sure = {None: 0.5, "a": 0.9}
        rows = [torch.tensor([sure[s.route], 1 - sure[s.route]]).log().repeat(2, 1) for s in segments]
        return torch.cat(rows), torch.tensor([0, 1] * len(segments)), [2] * len(segments)

    monkeypatch.setattr(rows_module, "answer_logits", logits_of)
    items = [Example((5, 6, 7), (False, True, True), n) for n in range(80)]
    found, count = token_calibration(cast(Any, None), ["a", None], items, TokenBudget(4096))
    assert found == {"a": pytest.approx(0.4), None: pytest.approx(0.0)} and count == 128
    assert token_calibration(cast(Any, None), ["a"], [], TokenBudget(4096)) == ({}, 0)


def test_rows_and_words_that_moved_most():
    base = RowScores.of_tokens([4, 5, 6], [2.0, 2.0, 4.0], [1, 2, 2], [0, 0, 0])
    own = RowScores.of_tokens([4, 5, 6], [1.0, 2.0, 8.0], [1, 2, 2], [0, 0, 0])
    found = row_changes(base, own)
    assert found["improved"] == [{"row": 4, "base": 2.0, "adapter": 1.0}]
    assert found["worsened"] == [{"row": 6, "base": 2.0, "adapter": 4.0}]
    moved = most_moved(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.3, 0.6]))
    assert [word for word, *_ in moved["gained"]] == [2]
    assert [word for word, *_ in moved["lost"]] == [0]


def test_copies_are_scored_as_many_at_once_as_there_is_room_for():
    bank, adapter = bank_with("prompt", noise=0.3, num_virtual_tokens=6)
    items = rows_of(4)
    scored = {name: one.rows for name, one in score(bank, items, [None, "x"], TokenBudget(4096)).items()}
    copies = {str(key): parts for key, parts in without_tokens(adapter).items()}
    together, apart = (effects(bank, "x", items, copies, TokenBudget(size), scored) for size in (4096, 8))
    assert list(together) == list(apart) == list(copies)
    for name in copies:
        assert together[name]["loss"] == pytest.approx(apart[name]["loss"], rel=1e-9)
        assert together[name]["difference"] == pytest.approx(together[name]["loss"] - scored["x"].scores()["loss"])


# ---- two of them


def test_two_products_are_the_same_turned_or_apart():
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64))[0]

    down, up, whole = drawn(20, 3).mT, drawn(40, 3), drawn(40, 6)
    turn = drawn(3, 3)
    assert cosine((down, up), (turn.mT @ down * 5, up @ turn)) == pytest.approx(1)
    assert cosine((down, up), (-down, up)) == pytest.approx(-1)
    assert overlap((down, up), (drawn(20, 3).mT, up @ turn)) == pytest.approx((1, 3 / 40))
    assert overlap((down, whole[:, :3]), (down, whole[:, 3:])) == pytest.approx((0, 3 / 40), abs=1e-9)
    assert overlap((down, up * 0), (down, up)) == (0, 0)
    assert cosine((down, up * 0), (down, up)) == 0


def test_two_adapters_beside_one_another():
    bank, one = bank_with("lora", noise=0.2, r=2)
    other = bank.add("y", METHODS["lora"](r=2), seed=2)
    with torch.no_grad():
        for path, own in other.parts[0].params.items():
            own["A"].copy_(one.parts[0].params[path]["A"])
            own["B"].copy_(one.parts[0].params[path]["B"] * 2)
    items = rows_of()
    scored = {name: found.rows for name, found in score(bank, items, ["x", "y"], TokenBudget(4096)).items()}
    found = compared(one, other, scored["x"], scored["y"])
    assert found["cosine"] == pytest.approx(1)
    assert found["overlap"] == pytest.approx(1)
    apart = scored["x"].scores()["loss"] - scored["y"].scores()["loss"]
    assert found["score"]["difference"] == pytest.approx(apart)
    assert "same place" in found["findings"][-1]["words"]
    nothing = compared(one, bank_with("prompt")[1])
    assert "no module in common" in nothing["findings"][0]["words"]


# ---- all of it


@pytest.mark.parametrize("method", ALONE)
def test_every_kind_of_method_is_looked_at_and_the_base_stays(method, tmp_path):
    bank, adapter = bank_with(method, noise=0.1)
    ids = torch.arange(3, 11)[None]
    before = bank.model(input_ids=ids).logits
    found = inspect(bank, "x", tmp_path / "adapter", Words(), rows_of(), TokenBudget(2048)).to_dict()
    json.dumps(found)
    assert found["rows"] == 12
    assert found["findings"]
    assert list(bank.adapters) == ["x"]
    assert bank.adapters["x"] is adapter
    assert torch.equal(bank.model(input_ids=ids).logits, before)


def test_without_rows_a_method_that_only_rows_show_says_so(tmp_path):
    bank, _ = bank_with("loreft", noise=0.1)
    found = inspect(bank, "x", tmp_path / "adapter", Words()).to_dict()
    assert found["findings"] == []
    assert "give --data" in found["notes"][0]


# ---- rules


def change(difference, low, high, better=None):
    return {"difference": difference, "interval": None if low is None else [low, high], "better": better}


def test_what_a_change_costs():
    assert cost_of(change(0.0, -0.01, 0.02), gain=1) == "free"
    assert cost_of(change(0.2, 0.1, 0.3), gain=1) == "costs"
    assert cost_of(change(0.2, -0.1, 0.3), gain=1) == "unclear"
    assert cost_of(change(0.02, 0.01, 0.03), gain=1) == "free"  # for sure something, and next to nothing
    assert cost_of(change(0.0, None, None), gain=1) == "unclear"
    assert cost_of(change(0.0, -0.01, 0.02), gain=0) == "unclear"  # no gain, nothing to keep
    assert cost_of(change(0.2, 0.1, 0.3), gain=0) == "unclear"


def test_a_score_is_better_noise_or_worse():
    assert not about_score(change(-0.5, -0.6, -0.4, True), 50).noise
    assert about_score(change(-0.1, -0.4, 0.2), 50).noise
    assert not about_score(change(math.nan, None, None), 50).noise
    assert "too few" in about_score(change(-0.5, -0.6, -0.4), 8).words
    assert "third of the rate" in about_score(change(0.5, 0.4, 0.6, False), 50).then


def test_ranks_that_are_too_large_needed_or_not_told():
    summary = {"rank": 8, "effective_rank": 7.0}
    free, costs, unclear = change(0.0, -0.01, 0.01), change(0.5, 0.4, 0.6), change(0.2, -0.1, 0.5)
    settings = {"r": 8}
    assert about_ranks(summary, {4: free, 2: free, 1: costs}, 1, settings)[0].then == "--set r=2"
    assert about_ranks(summary, {4: free, 2: costs, 1: free}, 1, settings)[0].then == "--set r=4"
    assert about_ranks(summary, {4: costs, 2: costs, 1: costs}, 1, settings)[0].then == "--set r=16"
    assert about_ranks(summary, {4: unclear, 2: costs, 1: costs}, 1, settings)[0].noise
    assert about_ranks(summary, {4: free, 2: free, 1: free}, 1, {})[0].then == ""  # r is no setting of the method
    assert about_ranks(summary, {4: costs, 2: costs, 1: costs}, 0, settings)[0].noise
    assert about_ranks({}, {}, 1) == []


def test_layers_that_matter_and_chance():
    free, costs = change(0.0, -0.01, 0.01), change(0.5, 0.4, 0.6, False)
    found = about_layers({"0": free, "1": costs, "2": free}, 1, {"layers": None})
    assert "1 cost loss: 1" in found[0].words
    assert found[0].then.startswith("--set layers='1'")
    assert about_layers({"0": free, "1": costs, "2": free}, 1)[0].then == ""
    assert about_layers({"0": change(0.1, -1, 1)}, 1)[0].noise
    assert about_layers({"0": costs}, 0)[0].noise
    harmful = about_layers({"0": costs, "1": change(-0.3, -0.4, -0.2, True)}, 1)
    assert "without what it does in 1 " in harmful[1].words.lower()


def look(chance, kind="embeddings", alike=0.1, moved=0.5, count=4):
    near = [{"word": "film", "id": 3, "cosine": 0.9}]
    tokens = [{"index": n, "moved": moved, "nearest": near, "z": 9.0, "chance": chance} for n in range(count)]
    return {
        "kind": kind, "count": count, "similarity": alike, "effective_number": 1.2, "tokens": tokens, "no_words": "",
    }  # fmt: skip


def test_tokens_mean_words_or_noise():
    free, costs = change(0.0, -0.01, 0.01), change(0.5, 0.4, 0.6)
    settings = {"num_virtual_tokens": 4}
    by = {one.about: one for one in about_tokens(look(0.004), [free] * 3 + [costs], [costs], 1, settings)}
    assert "'film'" in by["words"].words
    assert not by["words"].noise
    same = about_tokens({**look(0.004), "tokens": [{**t, "began": 3} for t in look(0.004)["tokens"]]}, [], [], 1)
    assert same[0].noise
    assert "4 of them began as that word" in same[0].words
    assert by["length"].then == "--set num_virtual_tokens=3"
    assert by["order"].words.startswith("Their order matters")
    lone = look(0.5, count=20)
    lone["tokens"][3]["chance"] = 0.004  # of twenty, one is near at one in a hundred
    assert about_tokens(lone, [], [], 1)[0].noise
    noise = {one.about: one for one in about_tokens(look(0.5, alike=0.99, moved=0.001), [], [], 1, settings)}
    assert noise["words"].noise
    assert noise["similarity"].then == "--set num_virtual_tokens=2"
    assert noise["moved"].then
    tokens = [{"share": 0.1}] * 4
    lone = [{"share": 0.25}, *[{"share": 0.01}] * 3]
    assert "; number 0 alone gets 25%" in about_attention({"tokens": lone, "all": 0.28, "even": 0.05}).words
    assert "alone" not in about_attention({"tokens": tokens, "all": 0.4, "even": 0.1}).words
    assert "hardly looked at" in about_attention({"tokens": tokens, "all": 0.01, "even": 0.05}).words
    assert "hardly sees its own" in about_attention({"tokens": tokens, "all": 0.9, "even": 0.05}).words
    assert about_attention({"tokens": tokens, "all": 0.3, "even": 0.05}).then == ""
    prefix = about_tokens(look(0.5, "prefix"), [costs] * 4, [change(0.0, 0.0, 0.0)], 1)
    assert "has no order" in prefix[-1].words


def test_size_calibration_and_units_in_words():
    assert about_norms({"relative_norm": 1e-5}).then.startswith("A higher")
    assert about_norms({"relative_norm": 0.9}).then.startswith("A lower")
    assert about_norms({"relative_norm": 0.05}).then == ""
    assert about_norms({}) is None
    assert about_calibration(0.3, 0.02, 64).noise
    assert not about_calibration(0.05, 0.3, 640).noise
    assert "7 of 8 units are dead" in about_units([{"units": 8, "dead": 7}]).words
    assert about_units([{"units": 8, "dead": 0}]).words == "All 8 units are at work."
    assert about_units([]) is None
