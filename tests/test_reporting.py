"""The report and the card hold what the run was, whatever odd words and numbers it had."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml

from inlay.reporting.card import model_card
from inlay.reporting.charts import Line, bars, lines, thinned
from inlay.reporting.report import write_report

BACKED_OFF = {"where": "step 3", "from": 4096, "to": 2048, "why": "out of memory"}
WORDS = {"0": ["bad"]}
STORY = {
    "status": "done", "method": "LoRA", "steps": 40, "tokens": 4000, "seconds": 20.0, "tokens_per_second": 200.0,
    "heldout": {"loss": 0.3, "accuracy": 0.86}, "heldout_base": {"loss": 0.6, "accuracy": 0.7}, "metric": "loss",
    "best_step": 30, "peak_memory_mb": 1400.0, "rows": {"rows": 100, "cut": 3, "dropped: nothing to learn": 2},
    "config": {"base": "smollm2", "data": ["a.csv"], "method": "lora", "set": {"r": 8}, "lr": 0.001},
    "data": {"rows": 90, "heldout_rows": 10, "duplicates": 1, "labels": {"0": 45, "1": 45},
             "lengths": {"edges": [0, 16, 32], "counts": [3, 87], "mean": 20.5, "longest": 31}},
    "memory": {"estimate_mb": 1500, "limit_mb": 2000, "backed_off": [BACKED_OFF]},
    "confusion": {"labels": ["0", "1"], "base": [[4, 1], [2, 3]], "adapter": [[5, 0], [1, 4]]},
    "samples": [{"prompt": "Review: <script>alert(1)</script>", "answer": "差", "base": "שלום", "adapter": "好"}],
    "cost": {"trainable_parameters": 1000, "base_parameters": 100000, "file_bytes": 4096, "virtual_tokens": 0},
    "notices": ["overfitting: held-out loss has risen"], "versions": {"torch": "2.13"},
    "template": {"kind": "label", "prompt": "Review: {text}\nSentiment:", "answer": "label", "verbalizer": WORDS},
}  # fmt: skip


class Strict(HTMLParser):
    """Fails where tags do not close in order, and remembers what refers to elsewhere."""

    VOID = ("meta", "link", "br", "img", "line", "circle", "polyline")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def page(folder, story, metrics):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    text = write_report(folder, story).read_text(encoding="utf8")
    parsed = Strict()
    parsed.feed(text)
    assert not parsed.open and not parsed.links and "script>" not in text.replace("&lt;", "").replace("script&gt;", "")
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    return text, " ".join(parsed.words)


def metrics_of(steps, **more):
    return [
        {"step": n, "loss": 2 / n, "tokens": 100 * n, "norm": 1.0, "lr": 1e-3, "seconds": 0.5 * n, "memory_mb": 900.0,
         "peak_memory_mb": 1000.0, **({"heldout": {"loss": 0.5, "accuracy": 0.8}} if n % 10 == 0 else {}), **more}
        for n in range(1, steps + 1)
    ]  # fmt: skip


def test_a_report_tells_the_run(tmp_path):
    text, words = page(tmp_path, STORY, metrics_of(40))
    for wanted in ("0.86", "base 0.7", "overfitting", "2048 tokens at once", "best", "3", "1 %", "差", "שלום", "4096"):
        assert wanted in words, wanted
    assert "<script>alert" not in text and "&lt;script&gt;" in text
    assert text.count("<svg") == 6


@pytest.mark.parametrize("steps", [0, 1, 2, 20_000])
def test_any_number_of_steps(steps, tmp_path):
    text, _ = page(tmp_path, STORY, metrics_of(steps))
    assert len(text) < 400_000


def test_little_is_enough_and_numbers_that_are_none_are_left_out(tmp_path):
    bare = {"status": "diverged at step 2", "config": {"base": "b"}}
    text, words = page(tmp_path, bare, metrics_of(12, loss=None, norm=None, lr=0.0, memory_mb=None))
    assert "diverged at step 2" in words and "Before and after" not in words and "Gradient" not in words
    assert "nan" not in text.lower().replace("inance", "")
    (tmp_path / "metrics.jsonl").unlink()
    write_report(tmp_path, bare)


def test_long_and_odd_words_stay_on_the_page(tmp_path):
    odd = {**STORY, "confusion": {"labels": ["<b>", "x" * 300], "base": [[0, 0], [0, 0]]}, "notices": ["y" * 5000]}
    text, _ = page(tmp_path, odd, metrics_of(9))
    assert "overflow-wrap" in text and "&lt;b&gt;" in text
    many = {**STORY, "confusion": {"labels": [str(n) for n in range(40)], "base": [[0] * 40] * 40}}
    assert "Labels, base" not in page(tmp_path, many, metrics_of(9))[1]


def test_lines_are_thinned_to_means_and_keep_their_end():
    points = thinned([(float(n), float(n % 2)) for n in range(1001)], 100)
    assert len(points) <= 100 and points[-1][0] == 1000 and abs(points[3][1] - 0.5) < 0.1
    assert lines("t", [Line("a", [], "--blue")]) == "" and bars("t", [0, 1], [0], "x") == ""
    assert lines("t", [Line("a", [(1, 5.0), (2, 5.0)], "--blue")]).count("<polyline") == 1


def test_the_card_is_read_by_hubs_and_says_how_to_use_it():
    card = model_card(STORY)
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "smollm2" and head["library_name"] == "peft" and "inlay" in head["tags"]
    for wanted in (
        "| accuracy | 0.7000 | 0.8600 |",
        "r=8",
        "Review: {text}",
        "label `0`: bad",
        "overfitting",
        "1,000 parameters",
    ):
        assert wanted in card, wanted
    assert "20.0" not in card and model_card({"config": {"base": "b: c"}, "status": "done"})
    assert yaml.safe_load(model_card({"config": {"base": "b: c\n- d"}}).split("---")[1])["base_model"] == "b: c\n- d"


def test_the_cards_python_runs(base_folder, tmp_path):
    import inlay
    from inlay.bases.load import load_base

    base = load_base(str(base_folder))
    bank = inlay.attach(base.model)
    bank.add("it", inlay.LoRA(r=2), seed=0)
    bank.save("it", tmp_path)
    code = model_card({**STORY, "config": {"base": str(base_folder)}}).split("```python")[1].split("```")[0]
    found = {}
    exec(code.replace('"."', repr(str(tmp_path))).replace("…", "words"), found)
    assert found["out"].logits.isfinite().all()
