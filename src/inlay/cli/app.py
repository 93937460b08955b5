"""The `inlay` command."""

from __future__ import annotations

import typer

from . import chat, doctor, evaluate, generate, merge, methods, preview, pull, train

__all__ = ["app"]

app = typer.Typer(
    help="Parameter-efficient fine-tuning where the adapter is a batch dimension.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("train")(train.command)
app.command("eval")(evaluate.command)
app.command("generate")(generate.command)
app.command("chat")(chat.command)
app.command("merge")(merge.command)
app.command("preview")(preview.command)
app.command("methods")(methods.command)
app.command("pull")(pull.command)
app.command("doctor")(doctor.command)
