"""The `inlay` command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import inlay

from . import (
    chat,
    combine,
    convert,
    doctor,
    evaluate,
    generate,
    inspect,
    merge,
    methods,
    plan,
    predict,
    preview,
    pull,
    race,
    serve,
    train,
)
from .common import fail, quiet_unless_first

__all__ = ["app"]


@contextmanager
def _on_one_line() -> Iterator[None]:
    """What cannot be parsed is said as everything else that is wrong: on one line, with the remedy."""
    try:
        yield
    except Exception as error:  # typer does not export its parser's error of usage
        said = getattr(error, "format_message", None)
        if said is None or type(error).__name__ == "NoArgsIsHelpError":
            raise
        place = getattr(error, "ctx", None)
        words = said().rstrip(".")
        mark = "" if words.endswith("?") else "."
        fail(f"{words}{mark} {place.command_path if place else 'inlay'} -h lists what there is", 2)


class Group(TyperGroup):
    def make_context(self, *arguments: Any, **more: Any) -> Any:
        quiet_unless_first()
        with _on_one_line():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: Any) -> Any:
        with _on_one_line():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Group,
    help="Parameter-efficient fine-tuning where the adapter is a batch dimension.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"inlay {inlay.__version__}")
        raise typer.Exit


@app.callback()
def whole(
    version: Annotated[bool, typer.Option("--version", help="print it", callback=_version, is_eager=True)] = False,
) -> None:
    """Parameter-efficient fine-tuning where the adapter is a batch dimension."""


app.command("train")(train.command)
app.command("race")(race.command)
app.command("eval")(evaluate.command)
app.command("predict")(predict.command)
app.command("inspect")(inspect.command)
app.command("generate")(generate.command)
app.command("chat")(chat.command)
app.command("serve")(serve.command)
app.command("merge")(merge.command)
app.command("combine")(combine.command)
app.command("convert")(convert.command)
app.command("preview")(preview.command)
app.command("methods")(methods.command)
app.command("plan")(plan.command)
app.command("pull")(pull.command)
app.command("doctor")(doctor.command)
