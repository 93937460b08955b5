"""Held-out rows are drawn by what rows say: equal ones stay together, labels have their share, order means nothing."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from inlay.data.split import HELDOUT_ROWS, Parts, content_key, equal_rows, halved, label_numbers, split_share
from inlay.errors import UsageError
from inlay.runs.dataset import load_dataset
from inlay.runs.settings import Settings


def keys_of(texts):
    return np.array([content_key(text) for text in texts], np.uint64)


def films(count):
    return keys_of(f"film number {n}" for n in range(count))


def sides(parts: Parts, count):
    """The side of each row, after a check that each has one."""
    side = np.full(count, "?")
    for name, index in (("t", parts.train), ("c", parts.choosing), ("f", parts.final), ("u", parts.unused)):
        assert (side[index] == "?").all() and (np.diff(index) > 0).all()
        side[index] = name
    assert (side != "?").all()
    return side


def test_spaces_and_case_mean_nothing_and_words_do():
    assert content_key("A  good\n film ") == content_key("a good FILM") != content_key("a goodfilm")
    assert content_key("STRASSE") == content_key("straße")
    assert content_key("\ud800") and content_key("") != 0
    assert equal_rows(keys_of(["a b", "A\tB", "c", "c "])) == 2


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5])
def test_each_label_has_its_share_within_one_row(share):
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 1500, p=[0.6, 0.3, 0.08, 0.02])
    parts = split_share(films(1500), share, labels)
    wanted = round(share * 1500)
    assert len(parts.choosing) + len(parts.final) == parts.wanted == wanted
    assert len(parts.final) - len(parts.choosing) in (0, 1)
    for label in range(4):
        exact = share * (labels == label).sum()
        held = [(labels[index] == label).sum() for index in (parts.choosing, parts.final)]
        assert abs(sum(held) - exact) <= 1
        assert all(abs(half - exact / 2) <= 1.5 for half in held)


def test_the_order_of_rows_means_nothing():
    rng = np.random.default_rng(1)
    keys, labels = films(300), rng.choice(3, 300)
    groups = np.concatenate([keys_of(f"g{n % 70}" for n in range(200)), np.zeros(100, np.uint64)])
    side = sides(split_share(keys, 0.2, labels, groups), 300)
    for _ in range(3):
        order = rng.permutation(300)
        assert (sides(split_share(keys[order], 0.2, labels[order], groups[order]), 300) == side[order]).all()


def test_equal_rows_stay_on_one_side():
    keys = np.concatenate([films(100), films(100), films(40)])
    parts = split_share(keys, 0.3, np.arange(240) % 2)
    side = sides(parts, 240)
    for key in np.unique(keys):
        assert len(set(side[keys == key])) == 1
    assert abs(len(parts.choosing) + len(parts.final) - 72) <= 3


def test_groups_stay_on_one_side_and_texts_join_them():
    keys = films(400)
    groups = keys_of(f"g{n % 90}" for n in range(400))
    keys[7] = keys[20]  # one text in the groups 7 and 20
    side = sides(split_share(keys, 0.2, None, groups), 400)
    for name in np.unique(groups):
        assert len(set(side[groups == name])) == 1
    assert len(set(side[(groups == groups[7]) | (groups == groups[20])])) == 1
    assert abs((side != "t").sum() - 80) <= 5


def test_groups_larger_than_the_share_are_held_out_whole_but_not_scored_whole():
    groups = keys_of("abc"[n % 3] for n in range(9000))
    parts = split_share(films(9000), 0.05, None, groups)
    assert len(parts.final) == HELDOUT_ROWS and len(parts.choosing) == 0 and len(parts.unused) == 2000
    assert parts.wanted == 450
    with pytest.raises(UsageError, match="no row is left"):
        split_share(films(30), 0.9, None, keys_of("a" * 30))


def test_a_share_holds_out_a_thousand_rows_at_most():
    parts = split_share(films(40_000), 0.5)
    assert (len(parts.train), len(parts.choosing), len(parts.final)) == (39_000, 500, 500)


@pytest.mark.parametrize("count", range(10))
def test_few_rows(count):
    choosing, final = halved(films(count))
    assert sorted([*choosing, *final]) == list(range(count))
    assert (len(choosing), len(final)) == (count // 2, count - count // 2)


def test_rows_that_must_not_be_parted_are_all_for_the_end():
    choosing, final = halved(films(5), None, keys_of("a" * 5))
    assert len(choosing) == 0 and len(final) == 5
    for sizes in ([1, 9], [9, 1], [4, 1, 1], [2, 2]):
        groups = keys_of(str(n) for n, size in enumerate(sizes) for _ in range(size))
        choosing, final = halved(films(sum(sizes)), None, groups)
        assert len(choosing) and len(final) and not set(groups[choosing]) & set(groups[final])


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(UsageError, match="held-out share"):
        split_share(films(10), share)


def test_labels_are_numbered_by_name():
    assert label_numbers(["b", "a", "b", "c"]).tolist() == [1, 0, 1, 2]


# ---- files


def table(path, rows, columns=("text", "label")):
    with open(path, "w", newline="", encoding="utf8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def material(data, tmp_path, **more):
    return load_dataset(Settings(data=[str(data)], out=str(tmp_path / "run"), **more))


def texts(rows):
    return [row.values["text"] for row in rows]


def test_equal_rows_of_a_file_are_counted_and_never_straddle(tmp_path):
    lines = [[f"a film, number {n}", n % 2] for n in range(60)]
    doubled = [[f"A  film, NUMBER {n}", n % 2] for n in range(20)]
    found = material(table(tmp_path / "d.csv", [*lines, *doubled, *lines[:5]]), tmp_path, heldout="0.3")
    assert found.equal == 25 and found.duplicates == 5
    three = [{" ".join(t.lower().split()) for t in texts(rows)} for rows in (found.rows, found.choosing, found.final)]
    assert all(three) and not (three[0] & three[1] or three[0] & three[2] or three[1] & three[2])
    assert sum(map(len, (found.rows, found.choosing, found.final))) == 85
    assert found.summary()["equal_rows"] == 25 and sum(found.labels.values()) == len(found.rows)


def test_a_heldout_file_is_halved_and_what_it_shares_is_said(tmp_path):
    data = table(tmp_path / "d.csv", [[f"film {n}", n % 2] for n in range(30)])
    held = table(tmp_path / "h.csv", [[f"FILM {n}", n % 2] for n in range(25, 46)])
    found = material(data, tmp_path, heldout=str(held))
    assert (len(found.rows), len(found.choosing), len(found.final), found.shared) == (30, 10, 11, 5)
    assert any("5 of the 21 held-out rows are trained on too" in line for line in found.notices)


def test_a_group_column_is_kept_together(tmp_path):
    rows = [[f"film {n}", n % 2, f"reviewer {n % 40}" if n % 5 else ""] for n in range(400)]
    found = material(table(tmp_path / "d.csv", rows, ("text", "label", "who")), tmp_path, heldout="0.2", group="who")
    names = [{row.values["who"] for row in part} - {""} for part in (found.rows, found.choosing, found.final)]
    assert all(names) and not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
    with pytest.raises(UsageError, match="no column 'whom' to group by"):
        material(tmp_path / "d.csv", tmp_path, group="whom")


def test_one_class_and_rare_labels_are_said(tmp_path):
    found = material(table(tmp_path / "d.csv", [[f"film {n}", 1] for n in range(30)]), tmp_path)
    assert any("every row has the label '1'" in line for line in found.notices)
    rows = [[f"film {n}", "rare" if n == 7 else "usual"] for n in range(300)]
    found = material(table(tmp_path / "e.csv", rows), tmp_path, heldout="0")
    assert any("label 'rare' has 1 of 300 rows" in line for line in found.notices)


def test_the_order_of_a_file_changes_neither_side(tmp_path):
    rows = [[f"film {n}", n % 3] for n in range(200)]
    one = material(table(tmp_path / "a.csv", rows), tmp_path, heldout="0.1")
    other = material(table(tmp_path / "b.csv", rows[::-1]), tmp_path, heldout="0.1")
    for part in ("rows", "choosing", "final"):
        assert texts(getattr(one, part)) == texts(getattr(other, part))


def test_text_and_conversations_are_split_too(tmp_path):
    path = tmp_path / "d.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = [{"messages": [turns[0], {**turns[1], "content": f"answer {n}"}]} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = material(path, tmp_path, heldout="0.1")
    assert (len(found.rows), len(found.choosing), len(found.final)) == (36, 2, 2)
