"""The page of `inlay inspect`, and its pictures."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from inlay.reporting.inspect_charts import changes, heat
from inlay.reporting.inspect_page import inspect_page, write_inspect_page

VOID = {"meta", "br", "wbr"}


class Balanced(HTMLParser):
    """Reads a page; tags must close in the order in which they opened."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert parser.links == []
    return " ".join(" ".join(parser.text).split())


def change(difference, low, high, better=None):
    return {"loss": 0.5, "difference": difference, "interval": [low, high], "better": better}


FOUND = {
    "adapter": "runs/<b>x</b>/adapter", "base": "smollm2", "methods": ["LoRA", "Prefix tuning"], "parameters": 1234,
    "rows": 64, "scores": {"base": {"loss": 1.5}, "adapter": {"loss": 0.25}},
    "calibration": {"base": 0.4, "adapter": 0.125},
    "findings": [
        {"about": "rank", "words": "Rank 8 is <too> large.", "try": "--set r=2", "noise": False},
        {"about": "direction", "words": "No more than chance.", "try": "", "noise": True},
    ],
    "notes": ["No run.json beside it."],
    "ranks": [{"rank": 4, **change(0.0, -0.1, 0.1)}, {"rank": 1, **change(0.4, 0.2, 0.6, False)}],
    "layers": [{"layer": "0", **change(-0.2, -0.3, -0.1, True)}, {"layer": "1", **change(0.0, -0.1, 0.1)}],
    "modules": [
        {"path": "model.layers.0.q_proj", "layer": 0, "relative_norm": 0.5},
        {"path": "model.layers.1.q_proj", "layer": 1, "relative_norm": 0.25},
        {"path": "model.layers.1.v_proj", "layer": 1, "relative_norm": None},
        {"path": "lm_head", "layer": None, "relative_norm": 0.1},
    ],
    "virtual": [
        {
            "kind": "prefix", "method": "Prefix tuning", "count": 1, "similarity": None, "effective_number": 1.0,
            "no_words": "", "shuffled": [change(0.0, 0.0, 0.0)],
            "tokens": [
                {
                    "index": 0, "norm": 2.0, "moved": 0.5, "z": 6.5, "chance": 0.004,
                    "nearest": [{"word": " <film>", "id": 3, "cosine": 0.75}], "removed": change(0.1, 0.05, 0.2, False),
                }
            ],
        }
    ],
    "attention": {
        "tokens": [{"share": 0.375, "most": {"layer": 1, "head": 0, "share": 0.5}}], "all": 0.375, "even": 0.25,
        "layers": [{"layer": 0, "heads": [0.25, 0.375]}, {"layer": 1, "heads": [0.5, 0.375]}],
    },
    "writes_alone": "", "units": [{"path": "model.layers.0.mlp", "layer": 0, "units": 8, "dead": 3}],
    "moved_words": {"gained": [{"word": " good", "id": 1, "base": 0.125, "adapter": 0.75}], "lost": []},
    "changed_rows": {"improved": [{"row": 3, "text": "a <b>fine</b> film", "base": 2.0, "adapter": 0.5}]},
}  # fmt: skip


def test_a_page_tells_all_and_escapes_it(tmp_path):
    text = write_inspect_page(tmp_path / "page.html", FOUND).read_text(encoding="utf8")
    told = read(text)
    for words in (
        "What LoRA and Prefix tuning learned", "Rank 8 is <too> large.", "--set r=2", "direction, noise", "1,234",
        "No run.json beside it.", "' <film>'", "50.0%", "nothing, and ends.", "a <b>fine</b> film", "' good'",
        "calibration error", "Units of bottlenecks", "25.00%", "layer / head 0 1 0 25% 38% 1 50% 38%",
    ):  # fmt: skip
        assert words in told, words
    assert "<too>" not in text


def test_two_adapters_stand_below_what_they_are_beside_one_another():
    said = [{"about": "score", "words": "The first is better.", "try": "", "noise": False}]
    told = read(inspect_page({"adapters": [FOUND, {**FOUND, "methods": ["OFT"]}], "comparison": {"findings": said}}))
    places = [told.index(words) for words in ("The first is better.", "What LoRA and Prefix", "What OFT learned")]
    assert places == sorted(places)


@pytest.mark.parametrize("left_out", [*FOUND, None])
def test_every_field_may_be_missing(left_out):
    page = inspect_page({} if left_out is None else {key: own for key, own in FOUND.items() if key != left_out})
    assert "learned" in read(page)


def test_changes_stand_where_their_numbers_are():
    svg = changes("x", [("a", change(0.0, -0.1, 0.1)), ("b", change(0.2, 0.1, 0.3, False))])
    places = [float(x) for x in re.findall(r'cx="([\d.]+)"', svg)]
    ends = [(float(a), float(b)) for a, b in re.findall(r'class="interval \w+" x1="([\d.]+)" x2="([\d.]+)"', svg)]
    axis = float(re.search(r'class="axis" x1="([\d.]+)"', svg)[1])
    assert places[0] == axis < places[1]
    assert ends[0][0] < places[0] < ends[0][1]
    assert ends[0][1] == ends[1][0]  # both are 0.1
    assert ends[1][1] - axis == pytest.approx(3 * (ends[1][0] - axis), abs=0.3)
    assert 'class="dot costs"' in svg
    assert 'class="dot even"' in svg
    assert changes("x", []) == ""
    assert changes("x", [("a", {"difference": None, "interval": None})]) == ""
    assert 'class="dot' in changes("x", [("a", {"difference": 0.0, "interval": None})])


def test_heat_is_a_share_of_the_largest():
    found = heat(FOUND["modules"])
    assert found.columns == ["q_proj"]
    assert found.lines == [("0", [("50.00%", 1.0)]), ("1", [("25.00%", 0.5)])]
    assert heat([]) is None
