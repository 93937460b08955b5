"""A file on disk is always whole."""

from __future__ import annotations

import json

import pytest

from inlay.errors import InlayError, UsageError
from inlay.files import write_json, written_beside


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": 1})
    write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 2}
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_beside(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.txt"]


def test_errors_name_the_thing_and_the_remedy_on_one_line():
    error = UsageError("no base 'smolm2'.", "Did you mean smollm2?")
    assert str(error) == "no base 'smolm2'. Did you mean smollm2?"
    assert (error.exit_code, InlayError("x").exit_code) == (2, 1)
