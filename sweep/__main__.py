"""`python -m sweep`: the laws of Inlay on every model type that transformers registers."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from .choose import chosen_jobs
from .report import matrix, summary, worse, write_page
from .run import Job, preload, run_all
from .store import Store
from .verdicts import Cell

WORDS = """
Each type is built tiny and random by rules from its configuration class (configs.py, hints.py), given rows of text,
images or sound that it takes (inputs.py, media.py), and put to the laws (laws_*.py) with one method for each kind of
site (samples.py). A cell is one law for one method on one type: right; refused, by an error of Inlay that names the
thing and the remedy; raw, any other error; wrong, a difference beyond the base's own rounding; base, where the plain
base breaks the law as well; untried. Finished cells are kept in --cells: what is there is not done again.

examples:
  python -m sweep                                  everything that is missing, about 25 minutes
  python -m sweep --types llama,causal:gpt2        two types
  python -m sweep --use image --laws mixed,merge   one use, two laws
  python -m sweep --table                          all methods of the table on twelve types
  python -m sweep --types bert --again -v          do it again, and print every cell
  python -m sweep --part 3/20 --seconds 60         a twentieth of the types, as far as it comes in a minute
  python -m sweep --write docs/architectures.md    nothing but the page from what is kept, where nothing is missing
"""


def main() -> int:
    options = _arguments()
    store = Store(options.cells)
    jobs = chosen_jobs(options)
    if options.again:
        store.forget({(j.use, j.type_name) for j in jobs}, {law for j in jobs for law in j.laws})
    due = [replace(j, laws=tuple(laws)) for j in jobs if (laws := store.missing(j.use, j.type_name, j.methods, j.laws))]
    start = time.monotonic()
    if due and not options.report:
        print(f"{len(due)} of {len(jobs)} types", file=sys.stderr)
        preload()

        def on_job(job: Job, waiting: int) -> None:
            took = time.monotonic() - start
            print(f"{took:6.0f} s  {waiting:4} waiting  {job.use}:{job.type_name}", file=sys.stderr)

        left = run_all(due, store, options.processes, options.limit, on_job, options.seconds)
        if left:
            print(f"{left} of {len(jobs)} types were left: {options.seconds:g} s were over", file=sys.stderr)
    cells = _asked(store, jobs)
    if options.verbose:
        for cell in cells:
            print(f"{cell.use}:{cell.type_name} {cell.law}: {cell.method or 'all'}: {cell.status} {cell.note}")
    print(matrix(cells) if len(jobs) <= 40 else "", summary(cells), sep="\n")
    if options.write:
        write_page(options.write, cells)
    if options.against and not options.against.is_file():
        sys.exit(f"{options.against} is not there. Write it with --write.")
    found = worse(options.against, cells) if options.against else []
    for cell in found:
        what = f"{cell.use}:{cell.type_name} {cell.law}: {cell.method}: {cell.status} {cell.note}"
        print(f"worse than {options.against} says: {what}")
    return int(bool(found))


def _asked(store: Store, jobs: list[Job]) -> list[Cell]:
    """The cells that are kept of these jobs."""
    wanted = {(job.use, job.type_name): job for job in jobs}
    found = []
    for cell in store.cells.values():
        job = wanted.get((cell.use, cell.type_name))
        if job and cell.law in {*job.laws, "build", "add"} and cell.method in {"", *job.methods}:
            found.append(cell)
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "sweep", None, __doc__, WORDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", default="", help="model types, or use:type, with commas between")
    parser.add_argument("--use", default="", help="uses, with commas between: causal, image, ...")
    parser.add_argument("--methods", default="", help="samples of methods, with commas between")
    parser.add_argument("--laws", default="", help="laws, with commas between")
    parser.add_argument("--table", action="store_true", help="all methods, on twelve types where none are named")
    parser.add_argument("--part", default="", help="K/N: one of N equal parts of the types; HEAD/N: by the commit")
    parser.add_argument("--cells", type=Path, default=Path(".sweep/cells.jsonl"), help="the file of finished cells")
    parser.add_argument("--again", action="store_true", help="do the chosen cells again")
    parser.add_argument("--report", action="store_true", help="run nothing: show what is kept")
    parser.add_argument("--write", type=Path, help="write the matrix to this page")
    parser.add_argument("--processes", type=int, default=2, help="processes at a time")
    parser.add_argument("--device", default="cpu", help="where the bases are: cpu, cuda")
    parser.add_argument("--limit", type=float, default=90, help="seconds that one process may take")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further type after these seconds")
    parser.add_argument("--against", type=Path, help="exit 1 where a cell is worse than this page's matrix says")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every cell")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
