"""report.html tells the run: whole HTML, others' words as words, scores with what they are worth, no outside assets."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from inlay.reporting.charts import Line, bars, lines, thinned
from inlay.reporting.report import write_report
from inlay.reporting.rows import missed_rows
from inlay.runs.command import command_of, command_parts
from test_reporting import STORY, story_of

FULL = story_of(
    tokens=4000, seconds=20.0, tokens_per_second=200.0, peak_memory_mb=1400.0,
    memory={"estimate_mb": 1500, "limit_mb": 2000,
            "backed_off": [{"where": "step 3", "from": 4096, "to": 2048, "why": "out of memory"}]},
    confusion={"labels": ["0", "1"], "base": [[4, 1], [2, 3]], "adapter": [[5, 0], [1, 4]]},
    samples=[{"prompt": "Review: <script>alert(1)</script>", "answer": "差", "base": "שלום", "adapter": "好",
              "base_label": "0", "base_probability": 0.61, "adapter_label": "1", "adapter_probability": 0.93}],
    cost={"trainable_parameters": 1000, "base_parameters": 100000, "file_bytes": 4096}, versions={"torch": "2.13"},
    data={**STORY["data"], "lengths": {"edges": [0, 16, 32], "counts": [3, 87], "mean": 20.5, "longest": 31}},
)  # fmt: skip
VOID = ("meta", "link", "br", "wbr", "img", "input")


class Page(HTMLParser):
    """Fails where tags do not close in order; remembers what is referred to, and what is read."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.words, self.tags, self.rows = [], [], [], [], []
        self.feed(text)
        self.text = text
        self.said = " ".join("".join(self.words).split())
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]
        if tag == "li" and "data-place" in dict(attrs):
            self.rows.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data if self.open[-1:] != ["td"] else f" {data}")

    @property
    def charts(self):
        return re.findall(r"<h2>([^<]*)</h2>(<svg.*?</svg>)", self.text, re.DOTALL)


def page(folder, story, metrics, final=()):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if final:
        (folder / "final.jsonl").write_text("".join(json.dumps(line) + "\n" for line in final))
    found = Page(write_report(folder, story, command_parts(story)).read_text(encoding="utf8"))
    assert found.tags.count("script") == 1
    assert all(re.fullmatch(r"[\w.]+(/[\w.]*)?", link) for link in found.links), found.links
    own = found.text.split("</style>")[0] + found.text.split("<script>")[-1]
    assert not re.search(r"https?:|url\(|@import|//\w+\.\w|fetch\(|XMLHttp", own)
    for _, svg in found.charts:
        ElementTree.fromstring(svg)
    return found


def metrics_of(steps, **more):
    return [
        {"step": n, "loss": 2 / n, "tokens": 100 * n, "norm": 1.0, "lr": 1e-3, "seconds": 0.5 * n, "memory_mb": 900.0,
         "peak_memory_mb": 1000.0, **({"heldout": {"loss": 0.5, "accuracy": 0.8}} if n % 10 == 0 else {}), **more}
        for n in range(1, steps + 1)
    ]  # fmt: skip


def judged(n, label, p, base, **more):
    """A final row of label `label`, whose label "1" got the probability p from the adapter and `base` from the base."""
    return {"where": f"/x/a.csv, line {n}", "prompt": f"Review: {n}", "answer": "good", "label": label,
            "said": str(int(p > 0.5)), "probabilities": {"0": 1 - p, "1": p}, "base_said": str(int(base > 0.5)),
            "base_probabilities": {"0": 1 - base, "1": base}, **more}  # fmt: skip


# ---- the whole


def test_a_report_tells_the_run(tmp_path):
    (tmp_path / "adapter").mkdir()
    found = page(tmp_path, FULL, metrics_of(40))
    for wanted in (
        "LoRA on SmolLM2-135M-Instruct", "best at step 30 of 40", "HuggingFaceTB/SmolLM2-135M-Instruct", "a.csv",
        "Scores on 500 held-out rows", "0.700 0.66–0.74", "0.857 0.83–0.88", "0.300 0.28–0.33",
        "Better than the base beyond chance: accuracy +0.157 (95 % interval 0.11–0.20), over the same 500 rows.",
        "overfitting", "2,048 tokens at once", "held out, 200 choosing rows", "1 %", "rows dropped: nothing to learn",
        "1 (good), probability 0.930 (writes: 好)", "0 (bad), probability 0.610 (writes: שלום)", "差",
    ):  # fmt: skip
        assert wanted in found.said, wanted
    assert "&lt;script&gt;alert(1)" in found.text
    assert found.links == ["adapter/", "metrics.jsonl", "run.json"]
    assert re.search('<pre class="command" id="command">(.*?)</pre>', found.text) and command_of(FULL) in found.said


@pytest.mark.parametrize("steps", [0, 1, 2, 20_000])
def test_any_number_of_steps(steps, tmp_path):
    found = page(tmp_path, FULL, metrics_of(steps))
    assert len(found.text) < 400_000
    for title, svg in found.charts:
        along = re.findall(r'<text x="[^"]*" y="174" text-anchor="middle">([^<]*)</text>', svg)
        assert along and all(re.fullmatch(r"[\d,]+k?", each) for each in along), (title, along)
        if "by length" not in title and 0 < steps < 3:
            assert along == [str(n) for n in range(1, steps + 1)]


def test_little_is_enough_and_numbers_that_are_none_are_left_out(tmp_path):
    bare = {"status": "diverged at step 2", "config": {"base": "b"}}
    found = page(tmp_path, bare, metrics_of(12, loss=None, norm=float("nan"), lr=float("inf"), heldout={"loss": None}))
    assert "diverged at step 2" in found.said and "No held-out rows were scored" in found.said
    assert "Before and after" not in found.said and {title for title, _ in found.charts} == {"Speed", "Memory"}
    assert not re.search(r"\b(nan|inf|None)\b", found.said)
    (tmp_path / "metrics.jsonl").unlink()
    assert "nothing to draw" in write_report(tmp_path, {}).read_text()


def test_lines_that_a_crash_cut_short_are_passed_over(tmp_path):
    lines_ = [json.dumps(line) for line in metrics_of(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(["{", *lines_, "7", "{}", lines_[0][:30]]))
    (tmp_path / "final.jsonl").write_text('{"said": \n[]\n' + json.dumps(judged(1, "1", 0.2, 0.9)))
    text = write_report(tmp_path, FULL).read_text()
    assert "1 of 1 final rows" in text and text.count("<svg") == 6


def test_words_of_others_stay_words(tmp_path):
    odd = "</script><b>\ud800\x00 & 'x' \"y\""
    story = story_of(
        confusion={"labels": [odd, "x" * 300], "base": [[0, 0], [0, 0]], "adapter": [[0, 0], [0, 0]]}, notices=[odd],
        template={"kind": "label", "verbalizer": {odd: [odd]}}, method=odd, status=odd, versions={odd: odd},
        config={"base": odd, "data": [odd], "set": {odd: odd}}, data={"labels": {odd: 1}}, rows={odd: 1},
        samples=[{"prompt": odd, "answer": odd, "base": odd, "adapter": odd, "base_label": odd}],
    )  # fmt: skip
    row = judged(1, odd, 0.2, 0.9, where=odd, prompt=odd)
    found = page(tmp_path, story, metrics_of(9), [row])
    assert "b" not in found.tags[found.tags.index("body") :] or "</script><b>" not in found.text
    assert "\x00" not in found.text and found.text.count("&lt;/script&gt;&lt;b&gt;") > 12
    many = story_of(
        confusion={"labels": [str(n) for n in range(40)], "base": [[0] * 40] * 40, "adapter": [[1] * 40] * 40}
    )
    found = page(tmp_path, many, metrics_of(9))
    assert "Labels, base" not in found.said and "Scores by label" in found.said


# ---- charts


@pytest.mark.parametrize(
    ("template", "config", "one"),
    [
        ({"kind": "label"}, {}, False), ({"kind": "completion"}, {}, True), ({"kind": "messages"}, {}, True),
        ({"kind": "text"}, {}, True), ({"kind": "text"}, {"label_smoothing": 0.1}, False), ({}, {}, False),
    ],
)  # fmt: skip
def test_losses_share_a_plot_only_where_they_are_the_same(template, config, one, tmp_path):
    found = page(tmp_path, story_of(template=template, config={"base": "smollm2", **config}), metrics_of(20))
    losses = {title: svg for title, svg in found.charts if "oss" in title}
    assert len(losses) == (1 if one else 2)
    assert sum(svg.count("<polyline") for svg in losses.values()) == 3
    assert ("Held-out accuracy" in dict(found.charts)) == (template.get("kind") == "label")


def test_lines_are_thinned_to_means_and_keep_their_end():
    points = thinned([(float(n), float(n % 2)) for n in range(1001)], 100)
    assert len(points) <= 100 and points[-1][0] == 1000 and abs(points[3][1] - 0.5) < 0.1
    assert lines("t", [Line("a", [], "--blue")]) == "" and bars("t", [0, 1], [0], "x") == ""
    assert lines("t", [Line("a", [(1, 5.0), (2, 5.0)], "--blue")]).count("<polyline") == 1


def test_a_loss_that_explodes_leaves_the_others_to_be_seen():
    svg = lines("t", [Line("a", [(1, 2.0), (2, 1.0), (3, 1.5), (4, 3e9)], "--blue")])
    places = [float(place.split(",")[1]) for place in re.search('points="([^"]*)"', svg)[1].split()]
    assert "logarithmic scale" in svg and places[0] < places[2] < places[1]
    assert "logarithmic" not in lines("t", [Line("a", [(1, 2.0), (2, 1.0)], "--blue")])


# ---- scores


@pytest.mark.parametrize(
    ("told", "tone", "words"),
    [
        ({"metric": "loss", "difference": -0.2, "interval": [-0.3, -0.1], "better": True}, "good", "Better than"),
        ({"metric": "loss", "difference": 0.2, "interval": [0.1, 0.3], "better": False}, "bad", "Worse than"),
        ({"metric": "accuracy", "difference": 0.0, "interval": [-0.1, 0.1], "better": False}, "even", "No better than"),
        ({"metric": "accuracy", "difference": 0.0, "interval": [-0.1, 0.1], "better": None}, "even", "No better than"),
        ({"metric": "accuracy", "difference": 0.2, "interval": [0.1, 0.3], "better": None}, "even", "Too few rows"),
        ({"metric": "accuracy", "difference": 0.0, "interval": None, "better": None}, "even", "No better than"),
    ],
)  # fmt: skip
def test_the_comparison_is_said_in_words(told, tone, words, tmp_path):
    found = page(tmp_path, story_of(comparison={**told, "rows": 90}), metrics_of(9))
    assert f'<p class="notice {tone}">{words}' in found.text and "over the same 90 rows" in found.said
    for broken in ({}, {"difference": None, "better": None}, {"better": True}):
        assert "beyond chance" not in page(tmp_path, story_of(comparison=broken), metrics_of(9)).said


def test_each_label_has_scores_of_its_own(tmp_path):
    found = page(tmp_path, FULL, metrics_of(9))
    told = re.search(r'<table class="labels">.*?</table>', found.text, re.DOTALL)[0]
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall("<t[hd][^>]*>(.*?)</t[hd]>", told)[5:]]
    assert cells == [
        "0 (bad)", "5", "0.667 → 0.833", "0.800 → 1.000", "0.727 → 0.909",
        "1 (good)", "5", "0.750 → 1.000", "0.600 → 0.800", "0.667 → 0.889",
    ]  # fmt: skip


def test_memory_that_was_not_as_estimated_is_said_with_the_reason(tmp_path):
    told = {"estimate_mb": 1000, "why": "other programs took some"}
    said = page(tmp_path, story_of(memory=told, peak_memory_mb=1300.0), metrics_of(9)).said
    assert "1,300 MB, was 30 % above the estimate of 1,000 MB: other programs took some" in said
    assert "above the estimate" not in page(tmp_path, story_of(memory=told, peak_memory_mb=1100.0), metrics_of(9)).said


# ---- rows judged wrongly


def test_rows_judged_wrongly_can_be_looked_through(tmp_path):
    long = "Review: " + "so many words " * 200 + "\nSentiment:"
    final = [
        judged(1, "1", 0.9, 0.4),
        judged(2, "1", 0.3, 0.8),
        judged(3, "0", 0.95, 0.9, prompt=long),
        judged(4, "0", 0.1, 0.1),
    ]
    found = page(tmp_path, FULL, metrics_of(9), final)
    assert (
        "2 of 4 final rows; the adapter mends 1 that the base has wrong, and spoils 1 that it has right." in found.said
    )
    assert [(row["data-place"], row["data-base"]) for row in found.rows] == [("3", "wrong"), ("2", "right")]
    assert "1 (good) 0.950, the right one 0.050" in found.said and "a.csv, line 3" in found.said
    assert re.search(r'<p class="text">… [^<]{200,320}\nSentiment:</p>\n<details><summary>the whole prompt', found.text)
    assert long in found.text and "final.jsonl" in found.links
    assert 'id="find"' in found.text and 'getElementById("find")' in found.text and 'id="tools" hidden' in found.text


def test_rows_of_other_kinds_are_sorted_by_loss(tmp_path):
    final = [
        {"where": f"f, line {n}", "prompt": f"Q{n}", "answer": f"A{n}", "loss": loss, "base_loss": 1.0, "exact": n == 1}
        for n, loss in enumerate([0.5, 0.1, float("nan"), 2.0])
    ]
    found = page(tmp_path, story_of(template={"kind": "completion"}), metrics_of(9), final)
    assert [row["data-place"] for row in found.rows] == ["3", "4", "1"]
    assert "Rows whose answer is not exact" in found.said and "3 of 4 final rows" in found.said
    assert "highest loss first" in found.said and "by label" not in found.said


def test_the_page_holds_so_many_rows_and_no_more(tmp_path):
    final = [judged(n, "1", 0.4 - n / 10_000, 0.9) for n in range(700)]
    found = page(tmp_path, FULL, metrics_of(9), final)
    assert len(found.rows) == 500 and found.rows[0]["data-place"] == "700"
    assert "700 of 700 final rows" in found.said and "the 500 surest mistakes; all are in final.jsonl" in found.said
    right = page(tmp_path, FULL, metrics_of(9), [judged(1, "1", 0.9, 0.4)])
    assert "0 of 1 final rows" in right.said and not right.rows and 'id="find"' not in right.text
    assert missed_rows(tmp_path / "none.jsonl") is None
