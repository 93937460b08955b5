"""What a race is worth: how far its winner stands from the best of all contenders trained to the end, and at what cost.

Film reviews (Rotten Tomatoes), 480 rows, the first 12 contenders of the default space, three seeds; docstring to code
(short functions of Python's standard library) and dialogue (chatterbot-corpus), one seed each. All contenders are
trained to the end in one stream and scored at every rung on half of 1,300 held-out rows (500 at most; of code and
dialogue there are 600); the other half is scored once, at the end. Since each equals its solo run, what a race would
have done follows from those scores alone: the rule is asked rung by rung, and who it drops is looked at no further.
Beside it: random search at the race's cost (the best on the choosing rows of as many whole courses, in the mean over
2,000 draws), and LoRA r=8 at 1e-3.

    python benchmarks/race_worth.py --minutes 45
    python benchmarks/race_worth.py --minutes 0 --page docs/performance.md         nothing but the table
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from pages import write_between
from rich.console import Console

HERE = Path(__file__).resolve().parent
ROWS, HELD, FEWER, CONTENDERS, DRAWS = 480, 1300, 600, 12, 2000
CASES = [("reviews", 0), ("reviews", 1), ("reviews", 2), ("code", 0), ("dialogue", 0)]
USUAL = "lora-r8-1e-3"
MARKS = "<!-- race worth: begin -->", "<!-- race worth: end -->"
console = Console(stderr=True, highlight=False)
Cell = dict[str, Any]
Parts = tuple[list[dict[str, str]], list[dict[str, str]]]
"""Rows to train on, and those held out."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45, help="begin no stream after so many")
    parser.add_argument("--cells", type=Path, default=HERE / "race_worth.jsonl", help="the file of finished streams")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--page", type=Path, help="write the tables between the marks of this page")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- rows


def reviews(rows: int) -> Parts:
    from method_parts import film_reviews

    named = [{"text": row.values["text"], "label": row.values["label"]} for row in film_reviews()]
    return named[HELD:][:rows], named[:HELD]


def code(rows: int) -> Parts:
    pairs = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = file.read_text(encoding="utf8", errors="replace")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (words := ast.get_docstring(node)) and len(node.body) > 1:
                body = ast.unparse(ast.Module(node.body[1:], []))
                if len(words) < 160 and 20 < len(body) < 240:
                    head = f"def {node.name}({ast.unparse(node.args)}):"
                    pairs.append({"prompt": f'{head}\n    """{words}"""\n', "completion": body})
    return _parts(pairs, rows, FEWER)


def dialogue(rows: int) -> Parts:
    from inlay.data.yaml import read_yaml

    pairs: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "chatterbot-corpus==1.3.3", "-d", folder],
            check=True, capture_output=True,
        )  # fmt: skip
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
            for name in sorted(archive.namelist()):
                if "/english/" in name and name.endswith(".yml"):
                    for talk in (read_yaml(archive.read(name).decode("utf8")) or {}).get("conversations", []):
                        said = [str(turn) for turn in talk]
                        pairs += [{"prompt": a, "completion": b} for a, b in pairwise(said)]
    return _parts(pairs, rows, FEWER)


def _parts(pairs: list[dict[str, str]], rows: int, held: int) -> Parts:
    """As many to score on as are left, of pairs that differ, in an order of their own."""
    unique = [*{json.dumps(pair): pair for pair in pairs}.values()]
    order = np.random.default_rng(0).permutation(len(unique))
    drawn = [unique[n] for n in order]
    return drawn[:rows], drawn[rows:][:held]


TASKS: dict[str, Callable[[int], Parts]] = {"reviews": reviews, "code": code, "dialogue": dialogue}


# ---- one stream


def stream(task: str, seed: int, rows: int, dtype: str) -> Cell:
    """Train all contenders to the end; what each scored on every row, at each rung and at the end."""
    from inlay.race.contenders import contenders
    from inlay.race.halving import Halving, shares_of
    from inlay.race.space import read_space
    from inlay.runs.run import run
    from inlay.runs.settings import Settings
    from inlay.runs.turns import Selection

    train, held = TASKS[task](rows)
    seen: list[Any] = []

    def all_stay(progress: Sequence[Any], waiting: Sequence[Any]) -> Selection:
        seen[:] = progress
        return Selection(start=[plan.name for plan in waiting])

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, part in (("train", train), ("held", held)):
            with open(place / f"{name}.csv", "w", newline="", encoding="utf8") as file:
                writer = csv.DictWriter(file, [*part[0]])
                writer.writeheader()
                writer.writerows(part)
        words = {"template": "Review: {text}\nSentiment:", "verbalizer": "0=negative,1=positive"}
        settings = Settings(
            data=[str(place / "train.csv")], heldout=str(place / "held.csv"), out=str(place / "run"), dtype=dtype,
            max_length=256, seed=seed, **(words if task == "reviews" else {}),
        )  # fmt: skip
        found = contenders(read_space("default"), CONTENDERS, seed=seed, rows=rows)
        plans = [one.plan(-(-len(train) // 16), {"seed": seed}) for one in found]
        rule = Halving(shares_of(plans))
        begun = time.perf_counter()
        run(settings, on_message=lambda line: None, plans=plans, select=all_stay, due=rule.due)
        own = {one.name: _told(one, place / "run" / "final" / f"{one.name}.jsonl") for one in seen}
    cell = {"task": task, "seed": seed, "dtype": dtype, "seconds": time.perf_counter() - begun, "contenders": own}
    return cell | {"race": raced(rule, seen), "metric": "accuracy" if task == "reviews" else "loss"}


def _told(one: Any, file: Path) -> Cell:
    from inlay.evaluation.rows import RowScores
    from inlay.reporting.race_rows import read_final_rows

    found = read_final_rows(file)
    assert found is not None and isinstance(found.scores, RowScores), f"{file} holds no rows"
    own = found.scores
    return {"steps": one.learner.total, "choosing": [line["loss"] for line in one.best.scores],
            "diverged": one.learner.diverged, "nats": [round(nats, 6) for nats in own.nats.tolist()],
            "tokens": own.tokens.tolist(), "hits": own.hits.tolist()}  # fmt: skip


def raced(rule: Any, seen: Sequence[Any]) -> Cell:
    """What the rule makes of the scores: its winner, and how many steps each would have taken."""
    from inlay.race.rungs import rungs_of

    steps, gone = {one.name: one.learner.total for one in seen}, set[str]()
    for rung in range(len(rule.shares) - 1):
        there = []
        for one in seen:
            at = rungs_of(one.learner.total, rule.shares)[rung]
            best = SimpleNamespace(scores=one.best.scores[: rung + 1], rows=one.best.rows[: rung + 1], metric="loss")
            live = one.name not in gone and not one.learner.diverged
            learner = SimpleNamespace(
                plan=one.learner.plan, total=one.learner.total, step=at, live=live, diverged=one.learner.diverged
            )
            if live:
                there.append(SimpleNamespace(name=one.name, learner=learner, best=best, kept=False))
        for name in rule.select(there, []).stop:
            gone.add(name)
            steps[name] = next(own.learner.step for own in there if own.name == name)
    left = [one for one in seen if one.name not in gone and not one.learner.diverged]
    winner = min(left, key=lambda one: min(line["loss"] for line in one.best.scores))
    cost = sum(steps[one.name] / one.learner.total for one in seen)
    return {"winner": winner.name, "courses": cost, "steps": steps}


# ---- the table


def summary(cell: Cell) -> Cell:
    """Of one stream: the race's winner, random search and the usual LoRA, each less the exhaustive best."""
    from inlay.evaluation.intervals import mean_interval

    own, metric = cell["contenders"], cell["metric"]
    sound = [name for name, one in own.items() if not one["diverged"]]
    chosen = {name: min(own[name]["choosing"]) for name in sound}
    best = min(sound, key=chosen.__getitem__)

    def values(name: str) -> np.ndarray:
        return np.array(own[name]["hits"] if metric == "accuracy" else own[name]["nats"])

    def mean(name: str) -> float:
        return float(values(name).sum() / np.sum(own[name]["tokens"]))

    apart = values(cell["race"]["winner"]) - values(best)
    interval = mean_interval(apart, np.array(own[best]["tokens"])) if apart.any() else (0.0, 0.0)
    courses, draw = cell["race"]["courses"], np.random.default_rng(0)
    tries = max(1, round(courses))
    drawn = [min(draw.choice(sound, tries, replace=False), key=chosen.__getitem__) for _ in range(DRAWS)]
    return {
        "best": best, "best score": mean(best), "winner": cell["race"]["winner"], "score": mean(cell["race"]["winner"]),
        "apart": mean(cell["race"]["winner"]) - mean(best), "interval": interval, "courses": courses,
        "random": float(np.mean([mean(name) for name in drawn])), "usual": mean(USUAL) if USUAL in own else None,
    }  # fmt: skip


def report(cells: dict[tuple[str, int], Cell]) -> str:
    columns = ["task, seed", "the race's winner", "score", "exhaustive best", "score", "apart (95 %, paired)", "cost"]
    columns += ["random search at that cost", "LoRA r=8, 1e-3"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for task, seed in CASES:
        cell = cells.get((task, seed))
        if cell is None or "error" in cell:
            lines.append(f"| {task}, {seed} | {'missing' if cell is None else cell['error']} |" + " |" * 7)
            continue
        own = summary(cell)
        low, high = own["interval"] or (float("nan"), float("nan"))
        usual = "–" if own["usual"] is None else f"{own['usual']:.3f}"
        lines.append(
            f"| {task}, {seed} | {own['winner']} | {own['score']:.3f} | {own['best']} | {own['best score']:.3f} | "
            f"{own['apart']:+.3f} ({low:+.3f} to {high:+.3f}) | {own['courses']:.1f} of {CONTENDERS} courses | "
            f"{own['random']:.3f} | {usual} |"
        )
    return "\n".join([*lines, "", "Reviews: accuracy; code and dialogue: loss, nats a token."])


def read_cells(path: Path) -> dict[tuple[str, int], Cell]:
    lines = path.read_text(encoding="utf8").splitlines() if path.exists() else []
    return {(cell["task"], cell["seed"]): cell for cell in map(json.loads, lines)}


def main() -> None:
    a = arguments()
    if a.one:
        print(json.dumps(stream(*json.loads(a.one), a.rows, a.dtype)))
        return
    end = time.monotonic() + 60 * a.minutes
    for case in CASES:
        if case in read_cells(a.cells) or time.monotonic() >= end:
            continue
        command = [sys.executable, __file__, "--one", json.dumps(case), "--rows", str(a.rows), "--dtype", a.dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"task"')]
        why = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        with a.cells.open("a", encoding="utf8") as file:
            file.write((lines[-1] if lines else json.dumps({"task": case[0], "seed": case[1], "error": why})) + "\n")
        console.print(*case, "done" if lines else why)
    text = report(read_cells(a.cells))
    print(text)
    if a.page:
        write_between(a.page, MARKS, text)


if __name__ == "__main__":
    main()
