"""inlay train"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from inlay.errors import UsageError

from .common import BaseName, Device, Dtype, Json, Set, console, emit, from_file, guarded, pairs

Option = typer.Option


def command(
    base: BaseName = "smollm2",
    data: Annotated[list[str] | None, Option("--data", help="A csv, tsv, jsonl, json, parquet or txt file.")] = None,
    out: Annotated[str | None, Option("--out", help="The run's folder.")] = None,
    method: Annotated[str, Option(help="See `inlay methods`.")] = "lora",
    set_: Set = None,
    epochs: Annotated[float, Option(help="Passes over the rows.")] = 1.0,
    steps: Annotated[int | None, Option(help="Optimizer steps, in place of epochs.")] = None,
    batch_size: Annotated[int, Option(help="Rows per optimizer step.")] = 16,
    lr: Annotated[float, Option(help="Learning rate.")] = 1e-3,
    schedule: Annotated[str, Option(help="linear, cosine or constant.")] = "linear",
    warmup: Annotated[float, Option(help="Share of the steps over which the rate grows.")] = 0.0,
    weight_decay: Annotated[float, Option(help="AdamW's weight decay.")] = 0.0,
    clip: Annotated[float, Option(help="Largest norm of the gradient.")] = 1.0,
    max_length: Annotated[int, Option(help="Tokens in a row; prompts are cut, answers never.")] = 512,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Annotated[int, Option(help="Start, order of rows and dropout.")] = 0,
    limit: Annotated[int | None, Option(help="Rows to use, drawn by the seed.")] = None,
    heldout: Annotated[str, Option(help="Share of the rows to score on, or a file.")] = "0.05",
    template: Annotated[str | None, Option(help='"Review: {text}\\nSentiment:", or chat for the model\'s own.')] = None,
    verbalizer: Annotated[str | None, Option(help="Words for labels: 0=negative,1=positive|great.")] = None,
    columns: Annotated[str | None, Option(help="text=NAME,label=NAME, prompt=, completion=, messages=.")] = None,
    tokens_at_once: Annotated[int, Option(help="Tokens in one forward; lower saves memory.")] = 4096,
    config: Annotated[str | None, Option(help="A YAML file of these settings; flags win.")] = None,
    json: Json = False,
) -> None:
    """Train an adapter on a data file: LoRA by default.

    Columns text and label (scored over the labels' words), prompt and completion, or messages are recognised.

        inlay train --base smollm2 --data reviews.csv --out runs/reviews
    """
    given = dict(locals())
    with guarded():
        settings = _settings(given)
        from inlay.training.run import run

        with _Bar() as bar:
            result = run(settings, bar.step)
        for reason, count in result["rows"].items():
            if count and reason != "rows":
                console.print(f"{count} of {result['rows']['rows']} rows {reason}", highlight=False)
        emit(result, json)


def _settings(given: dict[str, Any]) -> Any:
    """Flags over the config file over defaults. Raises: UsageError naming a setting that does not exist."""
    from inlay.training.run import Settings

    given.pop("json")
    stored = from_file(given.pop("config"))
    given["set"] = pairs(given.pop("set_"), "--set")
    columns = given.pop("columns")
    given["columns"] = {k: str(v) for k, v in pairs(columns.split(",") if columns else None, "--columns").items()}
    defaults = {f.name: f.default for f in dataclasses.fields(Settings)}
    for name, value in stored.items():
        if name not in defaults:
            raise UsageError(f"config has no setting {name!r}", f"Settings: {', '.join(sorted(defaults))}.")
        if given[name] in (defaults[name], None, {}) or (name == "base" and given[name] == "smollm2"):
            given[name] = value
        elif name == "set":
            given[name] = {**value, **given[name]}
    data = given["data"]
    given["data"] = [data] if isinstance(data, str) else data
    for name in ("data", "out"):
        if not given[name]:
            raise UsageError(f"--{name} is missing", f"Give --{name}.")
    return Settings(**given)


class _Bar:
    """Steps, loss, tokens a second, memory and time left, on stderr."""

    def __init__(self) -> None:
        text = "{task.fields[loss]}  {task.fields[speed]} tokens/s  {task.fields[memory]} MB"
        self.progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn(text), TimeRemainingColumn(),
            console=console, transient=False,
        )  # fmt: skip
        self.task: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.task is not None:
            self.progress.stop()

    def step(self, contender: Any, total: int) -> None:
        from inlay.training.run import peak_memory_mb

        if self.task is None:
            self.progress.start()
            self.task = self.progress.add_task("training", total=total, loss="", speed="", memory="")
        seconds = self.progress.tasks[0].elapsed or 1e-9
        self.progress.update(
            self.task, completed=contender.step, loss=f"loss {contender.loss:.3f}",
            speed=f"{contender.tokens / max(seconds, 1):.0f}", memory=f"{peak_memory_mb():.0f}",
        )  # fmt: skip
