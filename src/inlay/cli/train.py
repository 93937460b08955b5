"""inlay train"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from inlay.errors import UsageError

from .bar import Bar
from .common import BaseName, Device, Dtype, Json, Quantize, Set, console, emit, from_file, guarded, pairs

Option = typer.Option
DATA, MODEL, COURSE, WATCH, SAFE = "Data", "Method and base", "Course of training", "Best adapter", "Memory and safety"


def command(
    ctx: typer.Context,
    base: BaseName = "smollm2",
    data: Annotated[list[str] | None, Option("--data", help="csv, tsv, json, jsonl, parquet, txt, or a datasets folder; may be repeated.", rich_help_panel=DATA)] = None,
    out: Annotated[str | None, Option("--out", help="The run's folder.")] = None,
    method: Annotated[str, Option(help="See `inlay methods`.", rich_help_panel=MODEL)] = "lora",
    set_: Set = None,
    epochs: Annotated[float, Option(help="Passes over the rows.", rich_help_panel=COURSE)] = 1.0,
    steps: Annotated[int | None, Option(help="Optimizer steps, in place of epochs.", rich_help_panel=COURSE)] = None,
    batch_size: Annotated[int, Option(help="Rows per optimizer step.", rich_help_panel=COURSE)] = 16,
    lr: Annotated[float, Option(help="Learning rate.", rich_help_panel=COURSE)] = 1e-3,
    schedule: Annotated[str | None, Option(help="linear (default), cosine or constant.", rich_help_panel=COURSE)] = None,
    warmup: Annotated[float, Option(help="Share of the steps over which the rate grows.", rich_help_panel=COURSE)] = 0.0,
    optimizer: Annotated[str, Option(help="adamw, sgd, adafactor, lion, schedule-free or adamw-8bit.", rich_help_panel=COURSE)] = "adamw",
    weight_decay: Annotated[float, Option(help="The optimizer's weight decay.", rich_help_panel=COURSE)] = 0.0,
    clip: Annotated[float, Option(help="Largest norm of the adapter's gradient.", rich_help_panel=COURSE)] = 1.0,
    neftune_alpha: Annotated[float, Option(help="Noise on embeddings; 5 is usual.", rich_help_panel=COURSE)] = 0.0,
    label_smoothing: Annotated[float, Option(help="Share of each target spread over the vocabulary.", rich_help_panel=COURSE)] = 0.0,
    max_length: Annotated[int, Option(help="Tokens in a row; prompts are cut, answers never.", rich_help_panel=DATA)] = 512,
    dtype: Dtype = "auto",
    device: Device = None,
    quantize: Quantize = None,
    seed: Annotated[int, Option(help="Start, order of rows and dropout.", rich_help_panel=COURSE)] = 0,
    limit: Annotated[int | None, Option(help="Rows to use, drawn by the seed.", rich_help_panel=DATA)] = None,
    heldout: Annotated[str, Option(help="Share of the rows to score on, or a file.", rich_help_panel=WATCH)] = "0.05",
    eval_every: Annotated[int | None, Option(help="Steps between two scorings; four in a run by default.", rich_help_panel=WATCH)] = None,
    metric: Annotated[str | None, Option(help="What is best: loss (default), accuracy, f1, perplexity, exact_match.", rich_help_panel=WATCH)] = None,
    patience: Annotated[int | None, Option(help="Stop after so many scorings without a better one.", rich_help_panel=WATCH)] = None,
    template: Annotated[str | None, Option(help='"Review: {text}\\nSentiment:", chat for the model\'s own, or a .jinja file.', rich_help_panel=DATA)] = None,
    verbalizer: Annotated[str | None, Option(help="Words for labels: 0=negative,1=positive|great.", rich_help_panel=DATA)] = None,
    columns: Annotated[str | None, Option(help="text=NAME,label=NAME, prompt=, completion=, messages=.", rich_help_panel=DATA)] = None,
    virtual_tokens_at: Annotated[str, Option(help="start, after-system or before-answer, for methods with virtual tokens.", rich_help_panel=DATA)] = "start",
    tokens_at_once: Annotated[int, Option(help="Tokens in one forward; lower saves memory.", rich_help_panel=SAFE)] = 4096,
    gradient_checkpointing: Annotated[bool, Option("--gradient-checkpointing", help="Save memory, take a third more time.", rich_help_panel=SAFE)] = False,
    memory_limit: Annotated[str, Option(help="4GB, none, or what the machine has (auto); near it, forwards get smaller.", rich_help_panel=SAFE)] = "auto",
    checkpoint_every: Annotated[int | None, Option(help="Steps between two checkpoints; 5 minutes by default.", rich_help_panel=SAFE)] = None,
    keep_checkpoints: Annotated[int, Option(help="How many to keep.", rich_help_panel=SAFE)] = 2,
    resume: Annotated[bool, Option("--resume", help="Go on with the run in --out; flags that are left out are as before.", rich_help_panel=SAFE)] = False,
    track: Annotated[str | None, Option(help="tensorboard, wandb, mlflow, ... besides metrics.jsonl.")] = None,
    config: Annotated[str | None, Option(help="A YAML file of these settings; flags win.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Train an adapter on a data file: LoRA by default.

    Columns text and label (scored over the labels' words), prompt and completion, or messages are recognised.

        inlay train --base smollm2 --data reviews.csv --out runs/reviews
    """
    given = dict(locals())
    with guarded():
        settings = _settings(given, ctx)
        from inlay.training.run import run

        with Bar() as bar:
            result = run(settings, bar.step, bar.say)
        for reason, count in result["rows"].items():
            if count and reason != "rows":
                console.print(f"{count} of {result['rows']['rows']} rows {reason}", highlight=False)
        if result["duplicates"]:
            console.print(f"{result['duplicates']} rows stand there more than once", highlight=False)
        emit(result, json)
        if result["status"].startswith("diverged"):
            raise typer.Exit(1)


def _settings(given: dict[str, Any], ctx: typer.Context) -> Any:
    """Flags over the config file, over the run that is resumed, over defaults.

    Raises: UsageError naming a setting that does not exist.
    """
    from inlay.training.settings import Settings

    explicit = {name for name in given if str(ctx.get_parameter_source(name)).endswith("COMMANDLINE")}
    for name in ("ctx", "json"):
        given.pop(name)
    stored = from_file(given.pop("config"))
    given["set"] = pairs(given.pop("set_"), "--set")
    columns = given.pop("columns")
    given["columns"] = {k: str(v) for k, v in pairs(columns.split(",") if columns else None, "--columns").items()}
    names = {f.name for f in dataclasses.fields(Settings)}
    for name in stored:
        if name not in names:
            raise UsageError(f"config has no setting {name!r}", f"Settings: {', '.join(sorted(names))}.")
    if "set" in stored and given["set"]:
        stored["set"] = {**stored["set"], **given["set"]}
        explicit -= {"set_"}
    before = _before(given["out"] or stored.get("out")) if given["resume"] else {}
    explicit = {"set" if name == "set_" else name for name in explicit}
    for name, value in {**before, **stored}.items():
        if name not in explicit:
            given[name] = value
    data = given["data"]
    given["data"] = [data] if isinstance(data, str) else data
    given["heldout"] = str(given["heldout"])
    for name in ("data", "out"):
        if not given[name]:
            raise UsageError(f"--{name} is missing", f"Give --{name}.")
    return Settings(**given)


def _before(out: str | None) -> dict[str, Any]:
    """The settings of the run in `out`, where there is one."""
    from inlay.training.folder import RunFolder

    config = dict(RunFolder(out).told().get("config", {})) if out else {}
    return {name: value for name, value in config.items() if name not in ("resume", "out")}
