"""What a change did to the speed of the whole house: this checkout beside another one, paired.

Every part is a process of its own. Processes of the two trees alternate, `--rounds` times, and the tree that goes first
changes each round, so that a noisy machine is noisy for both. The table gives medians, and the median of the paired
ratios; the JSON line behind it gives every single figure. Nothing is asserted: a person reads it.

    git worktree add /tmp/before HEAD~1
    python benchmarks/house.py --before /tmp/before                    # everything: an hour or so
    python benchmarks/house.py --parts train-bf16,load --rounds 2      # this checkout alone, two parts
    python benchmarks/house.py --before /tmp/before --cpu-time         # on a machine that others use at the same time
needs: pip install -e '.[bench]'

parts
  train-fp32, train-bf16   `inlay train`, LoRA r=8 on all linear layers, short film reviews, 16 rows a step
  train-long               the same in float32 with rows of 240 tokens, 4 a step
  race-fp32, race-bf16     16 contenders with a row each a step (16 alike; 16 of ranks 2 to 32 and alphas 4 to 64),
                           as shares of the tokens a second of one LoRA r=8 with 16 rows a step
  write-fp32, write-bf16   `model.generate` for 32 rows, greedy: before `attach`; no adapter; one LoRA for all; 32 LoRAs
                           r=8; 32 LoRAs of eight kinds; eight methods with 4 rows each. Shares are of the speed with
                           no adapter; `may` is the share that reading the adapters' bytes alone would leave
  load                     ms to load LoRA r=8 from warm files into a bank that holds a LoRA r=64: the first one and the
                           last of `--loads`, and how much longer than the base's the first forward with it takes
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path

from house_parts import PARTS, last_json, make_rows
from rich.console import Console
from rich.table import Table

Figures = dict[str, float]
HERE = Path(__file__).resolve().parents[1]
progress = Console(stderr=True, highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the other checkout: a folder with src/inlay")
    parser.add_argument("--tree", type=Path, default=HERE, help="the checkout to measure (default: this one)")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas between (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="processes for each part and tree (default: 5)")
    parser.add_argument("--steps", type=int, default=8, help="steps of each training (default: 8)")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens that each row writes (default: 24)")
    parser.add_argument("--loads", type=int, default=1000, help="adapters to load (default: 1000, about 10 GB)")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and the processes' own seconds alone")
    a = parser.parse_args()
    a.chosen = [part.strip() for part in a.parts.split(",")]
    if unknown := sorted(set(a.chosen) - set(PARTS)):
        parser.error(f"no part is called {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    for tree in filter(None, (a.tree, a.before)):
        if not (tree / "src" / "inlay").is_dir():
            parser.error(f"{tree} holds no src/inlay: name a checkout of the project")
    if min(a.rounds, a.steps, a.new_tokens, a.loads) < 1:
        parser.error("--rounds, --steps, --new-tokens and --loads are 1 or more")
    return a


def measured(a: argparse.Namespace, part: str, source: Path, folder: Path) -> Figures:
    """The figures of one part in a process of its own, with the package in `source`."""
    command: list[object] = [sys.executable, Path(__file__).with_name("house_parts.py"), part, "--folder", folder]
    command += ["--expected", source / "inlay", "--steps", a.steps, "--new-tokens", a.new_tokens, "--loads", a.loads]
    env = {**os.environ, "PYTHONPATH": str(source)}
    if a.cpu_time:
        command.append("--cpu-time")
        env["OMP_NUM_THREADS"] = "1"
    figures = last_json(list(map(str, command)), env)
    return {**figures, "machine's load": os.getloadavg()[0]}  # above the cores: others wanted the machine too


def compare(a: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[Figures]]]:
    """Every part's figures, by tree, in the order of the rounds; a round that failed has none."""
    trees = {"before": a.before, "this": a.tree} if a.before else {"this": a.tree}
    runs: dict[str, dict[str, list[Figures]]] = {part: {tree: [] for tree in trees} for part in a.chosen}
    for number in range(a.rounds):
        for part, own in runs.items():
            for name in list(trees)[:: -1 if number % 2 else 1]:
                try:
                    own[name].append(measured(a, part, trees[name].resolve() / "src", folder))
                except RuntimeError as error:
                    own[name].append({})
                    progress.print(f"{part}, {name}: failed: {error}", style="red")
                told = ", ".join(f"{key} {figure(value)}" for key, value in own[name][-1].items())
                progress.print(f"round {number + 1} of {a.rounds}, {part}, {name}: {told}")
    return runs


def figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def report(runs: dict[str, dict[str, list[Figures]]]) -> Table:
    trees = list(next(iter(runs.values())))
    table = Table("part", "figure", *trees, *(["this / before"] if len(trees) > 1 else []), "all, in order")
    for part, own in runs.items():
        for key in dict.fromkeys(key for rounds in own.values() for made in rounds for key in made):
            found = {tree: [made.get(key, math.nan) for made in rounds] for tree, rounds in own.items()}
            whole = {tree: [v for v in values if not math.isnan(v)] for tree, values in found.items()}
            cells = [figure(statistics.median(v)) if v else "–" for v in whole.values()]
            if len(trees) > 1:
                pairs = [
                    t / b for t, b in zip(found["this"], found["before"], strict=True) if b and not math.isnan(t / b)
                ]
                cells.append(f"{statistics.median(pairs):.2f}" if pairs else "–")
            singles = " | ".join(" ".join(map(figure, values)) for values in found.values())
            table.add_row(part, key, *cells, singles)
        table.add_section()
    return table


def main() -> None:
    a = arguments()
    sys.path.insert(0, str((a.before or a.tree).resolve() / "src"))  # the rows come from one tree
    with tempfile.TemporaryDirectory() as folder:
        make_rows(Path(folder), 256)
        runs = compare(a, Path(folder))
    Console(width=130, highlight=False).print(report(runs))
    kept = {key: str(value) if isinstance(value, Path) else value for key, value in vars(a).items()}
    print(json.dumps({"settings": kept, "runs": runs}))


if __name__ == "__main__":
    main()
