"""Every block of docs/from-peft.md runs, both sides of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from zoo import make

PAGE = Path(__file__).parent.parent / "docs" / "from-peft.md"
BLOCKS = re.findall(r"```python( peft)?\n(.*?)```", PAGE.read_text(encoding="utf8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_every_block_of_the_page_runs(tokenizer, tmp_path):
    ids = torch.tensor([[3, 9, 4, 7], [5, 6, 8, 2]])
    given = {
        "base": lambda: make("llama", dtype=torch.float32),
        "ids": ids,
        "mask": torch.ones_like(ids),
        "folder": tmp_path,
        "tokenizer": tokenizer,
    }
    theirs, ours = dict(given), dict(given)
    assert len(BLOCKS) >= 9
    for number, (peft, code) in enumerate(BLOCKS):
        exec(compile(code, f"{PAGE.name}, block {number + 1}", "exec"), theirs if peft else ours)
        if "mixed" in theirs and "mixed" in ours:
            torch.testing.assert_close(theirs["mixed"].logits, ours["mixed"].logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(theirs["plain"].logits, ours["plain"].logits, rtol=1e-4, atol=1e-5)
    assert ours["text"] and ours["text"] == ours["again"]
    assert torch.equal(ours["both"][0], ours["answer"])
    for name in ("ours", "theirs", "loop", "trained"):
        assert (tmp_path / name / "adapter_model.safetensors").exists()


def test_the_tables_name_settings_that_there_are():
    import dataclasses

    import inlay

    for name, listed in re.findall(r"\| `inlay\.(\w+)\(([^)]*)\)", PAGE.read_text(encoding="utf8")):
        fields = {f.name for f in dataclasses.fields(getattr(inlay, name))}
        for setting in filter(None, re.split(r", ?", listed)):
            assert setting.split("=")[0] in fields, (name, setting)
