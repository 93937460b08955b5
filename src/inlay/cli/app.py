"""The `inlay` command."""

from __future__ import annotations

from typing import Annotated

import typer

import inlay

from . import chat, doctor, evaluate, generate, merge, methods, predict, preview, pull, train

__all__ = ["app"]

app = typer.Typer(
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
app.command("eval")(evaluate.command)
app.command("predict")(predict.command)
app.command("generate")(generate.command)
app.command("chat")(chat.command)
app.command("merge")(merge.command)
app.command("preview")(preview.command)
app.command("methods")(methods.command)
app.command("pull")(pull.command)
app.command("doctor")(doctor.command)
