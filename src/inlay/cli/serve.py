"""inlay serve"""

from __future__ import annotations

from typing import Any

from inlay.serve.http.settings import ServeSettings

from . import flags
from .common import console, counted, emit

__all__ = ["command"]


@flags.command(ServeSettings, "serving")
def command(settings: ServeSettings, as_json: bool) -> None:
    """Answer over HTTP, as OpenAI does, with every adapter in a folder by its name, and with the plain base.

        inlay serve --adapters runs --port 8000

    /v1/chat/completions uses the template that an adapter was trained with, /v1/completions takes prompts as they are,
    /v1/classify gives labels. The server answers this machine alone until there are keys: --add-key NAME --keys FILE.
    --ray --replicas N runs several servers, and asks for an adapter where it is in memory.
    """
    from inlay.serve.http.run import make_key, serve

    if settings.add_key or settings.drop_key:
        emit(make_key(settings), as_json)
        return

    def ready(said: dict[str, Any]) -> None:
        if as_json:
            emit(said, True)
        else:
            adapters = counted(len(said["adapters"]), "adapter")
            by = f" by {counted(said['replicas'], 'replica')}" if "replicas" in said else ""
            console.print(f"serving {said['base']} with {adapters}{by} at {said['url']}", highlight=False, markup=False)

    with console.status("opening the base") as status:

        def on_ready(said: dict[str, Any]) -> None:
            status.stop()
            ready(said)

        if settings.ray:
            from inlay.serve.cluster.run import serve_cluster as serve
        serve(settings, lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True), on_ready)
