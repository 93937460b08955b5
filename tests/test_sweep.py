"""The sweep: its rules build models of many kinds, and its verdicts can fail."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from sweep.bases import Base, NotBuilt
from sweep.case import Case
from sweep.choose import LAW_NAMES, chosen_jobs
from sweep.laws import LAWS, cells_of
from sweep.laws_rows import padding_moves, widened
from sweep.report import matrix, sentences, summary, worse, write_page
from sweep.run import Job, run_all
from sweep.store import Store
from sweep.verdicts import LATE, BaseFails, Cell, Different, apart, verdict_of
from torch import nn

from inlay.errors import UsageError

BUILT = [
    "causal:llama", "causal:gemma3_text", "causal:deepseek_v3", "causal:qwen3_moe", "causal:mamba2", "causal:jamba",
    "masked:bert", "seq2seq:t5", "classify:roberta", "image:vit", "ctc:wav2vec2", "speech:whisper", "vision-text:llava",
    "vision-text:qwen2_vl",
]  # fmt: skip


@pytest.mark.parametrize("name", BUILT)
def test_rules_build_a_tiny_model_with_rows_that_it_runs(name):
    base = Base(*name.split(":"))
    rows = base.rows(3)
    outputs = base.run(base.make(), base.batch(rows))
    assert sum(p.numel() for p in base.original.parameters()) < 300_000
    assert len(outputs) == 3 and all(bool(out.isfinite().all()) for out in outputs)
    media = {"pixel_values", "input_values", "input_features"} & set(rows[0])
    assert bool(media) == (name.split(":")[0] in ("image", "ctc", "speech", "vision-text"))


def test_a_type_that_cannot_be_built_says_why():
    with pytest.raises(NotBuilt):
        _ = Base("image", "timm_wrapper").maker


@pytest.fixture(scope="module")
def cells():
    return list(cells_of("causal", "llama", ["lora", "prefix"], ["mixed", "merge"]))


def test_a_type_gives_a_cell_for_each_law_and_method(cells):
    found = {(c.law, c.method): c.status for c in cells}
    assert found == {
        ("build", ""): "right", ("mixed", "lora"): "right", ("mixed", "prefix"): "right", ("merge", "lora"): "right",
        ("merge", "prefix"): "refused",
    }  # fmt: skip


class Leaks(nn.Module):
    """Adds the batch's mean where a tensor has more than one row."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return y + 0.1 * y.mean(0, keepdim=True) if len(y) > 1 else y


def test_a_base_whose_rows_leak_is_told_from_an_adapter_that_does(monkeypatch):
    base = Base("causal", "llama")
    _ = base.maker
    leaking = base.make()
    leaking.model.layers[0].mlp.down_proj = Leaks(leaking.model.layers[0].mlp.down_proj)
    case = Case(base)
    _ = case.tolerance
    monkeypatch.setattr(base, "make", lambda dtype=None: leaking)
    with pytest.raises(BaseFails, match="depends on its neighbours"):
        case.expected(base.rows(3), "right")


def test_an_engine_that_mixes_rows_is_wrong(monkeypatch):
    case = Case(Base("causal", "llama"))
    assert LAWS["mixed"](case, ["lora"])["lora"].status == "right"
    run = Base.run

    def leaking(self, model, batch, **more):
        outputs = run(self, model, batch, **more)
        mixed = len(outputs) > 1 and hasattr(model, "planted")
        return [out + 0.01 * outputs[-1][:1] if i == 1 and mixed else out for i, out in enumerate(outputs)]

    made = Case.bank

    def planted(self, names, dtype=None):
        bank = made(self, names, dtype)
        bank.model.planted = True
        return bank

    monkeypatch.setattr(Base, "run", leaking)
    monkeypatch.setattr(Case, "bank", planted)
    case.banks.clear()
    verdict = LAWS["mixed"](case, ["lora"])["lora"]
    assert verdict.status == "wrong" and "apart" in verdict.note


@pytest.mark.skipif(not hasattr(transformers, "HYV4VLForConditionalGeneration"), reason="newer than this transformers")
def test_a_base_that_padding_moves_is_told_from_one_that_it_does_not():
    """HY-V4 reads the keys of the highest scores; among equal ones padding decides. Its rows are longer than that."""
    moving, still = Case(Base("vision-text", "hy_v4_vl")), Case(Base("causal", "llama"))
    assert any(padding_moves(moving, row) for row in moving.base.rows(3))
    assert not any(padding_moves(still, row) for row in still.base.rows(3))
    bank = still.shared(["lora", "prompt"])
    assert widened(bank, ["lora", "prompt"]) and not widened(bank, [None, "lora"])


def test_what_a_method_draws_at_random_is_drawn_alike_where_blocks_are_computed_again():
    assert LAWS["recompute"](Case(Base("causal", "llama")), ["pvera"])["pvera"].status == "right"


def test_verdicts_tell_errors_apart():
    def raising(error):
        def check():
            raise error

        return verdict_of(check)

    assert raising(UsageError("no", "Do so.")).status == "refused"
    assert raising(Different("0.1 apart")).status == "wrong"
    assert raising(BaseFails("it too")).status == "base"
    assert raising(KeyError("x")).status == "raw" and "test_sweep.py" in raising(KeyError("x")).note
    assert apart(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])) == float("inf")


def test_a_process_that_dies_is_a_cell_and_the_type_goes_on(tmp_path, monkeypatch):
    import os

    monkeypatch.setitem(LAWS, "mixed", lambda case, names: os._exit(3))
    store = Store(tmp_path / "cells.jsonl")
    jobs = [Job("causal", "llama", ("lora",), ("mixed", "merge"))]
    run_all(jobs, store, 1, 60, lambda job, waiting: None)
    assert store.cells["causal", "llama", "", "mixed"].status == "raw"
    assert store.cells["causal", "llama", "lora", "merge"].status == "right"
    again = Store(tmp_path / "cells.jsonl")
    assert again.cells == store.cells and again.missing("causal", "llama", ["lora"], ["mixed", "merge"]) == []
    assert again.missing("causal", "llama", ["lora"], ["nan"]) == ["nan"]


def test_no_type_starts_when_the_time_is_over(tmp_path):
    store = Store(tmp_path / "cells.jsonl")
    jobs = [Job("causal", name, ("lora",), ("merge",)) for name in ("llama", "gpt2")]
    assert run_all(jobs, store, 1, 60, lambda job, waiting: None, seconds=0) == 2
    assert store.cells == {}


def options(**more):
    plain = {"device": "cpu", "types": "", "use": "", "methods": "", "laws": "", "table": False, "part": ""}
    return SimpleNamespace(**{**plain, **more})


def test_parts_are_all_of_the_types():
    everything = {(j.use, j.type_name) for j in chosen_jobs(options())}
    parts = [{(j.use, j.type_name) for j in chosen_jobs(options(part=f"{k}/20"))} for k in range(1, 21)]
    assert len({name for _, name in everything}) >= 150
    assert set.union(*parts) == everything and sum(map(len, parts)) == len(everything)
    assert set(LAW_NAMES) == set(LAWS)
    with pytest.raises(SystemExit, match="unknown laws: mixt"):
        chosen_jobs(options(laws="mixt"))


def test_the_matrix_counts_methods_and_lists_sentences(cells, tmp_path):
    cells = [*cells, Cell("causal", "llama", "head", "mixed", "wrong", "values: 0.3 apart")]
    assert "| causal:llama | W1 ✓2 | R1 ✓1 |" in matrix(cells)
    assert [len(found) for found in sentences(cells, "refused").values()] == [1]
    write_page(tmp_path / "page.md", cells)
    sick = Cell("causal", "llama", "lora", "merge", "raw", "KeyError")
    assert worse(tmp_path / "page.md", [*cells, sick]) == [sick]
    assert worse(tmp_path / "page.md", [*cells, replace(sick, note=LATE), replace(sick, type_name="new")]) == []
    lost = [replace(c, status="refused") if c.status == "right" and c.law == "mixed" else c for c in cells]
    assert {(c.law, c.status) for c in worse(tmp_path / "page.md", lost)} == {("mixed", "refused")}
    assert summary(cells).startswith("1 model types in 1 uses (of 1 tried); 5 cells: 3 right")
