"""Runs the application on a socket until a signal, and lets answers under way end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Collection
from typing import Any, Protocol

import uvicorn

from inlay.errors import InlayError, UsageError

from .guard import LOCAL, Guard
from .keys import Keys
from .limits import Limits

__all__ = ["Served", "Server", "bound", "check_safe"]

BACKLOG = 2048


def check_safe(host: str, keys: Keys | None) -> None:
    """Raises: UsageError where others than this machine could ask without a key."""
    if keys is None and host not in LOCAL:
        raise UsageError(
            f"--host {host} lets other machines ask, and no keys are given",
            "Make keys (inlay serve --add-key NAME --keys FILE) and give --keys FILE, or leave --host out.",
        )


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises: InlayError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
        opened.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        opened.close()
        why = getattr(error, "strerror", None) or error
        raise InlayError(f"{host} port {port} cannot be had ({why})", "Choose another --port.") from None
    return opened


class Served(Protocol):
    """What stands behind a server; `draining` says that it stops."""

    draining: bool

    @property
    def limits(self) -> Limits: ...
    def stop(self) -> None: ...


class Server(uvicorn.Server):
    """One server over an ASGI `app` that may count on a `Guard`; it answers to the names `hosts`, and `keys` None lets
    everybody ask. A first SIGTERM or Ctrl-C lets answers end, for `drain` seconds at most; a second ends at once.

    `on_ready` is called when requests are taken.
    """

    def __init__(
        self, app: Any, served: Served, keys: Keys | None, hosts: Collection[str],
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.served, self.on_ready = served, on_ready
        drain = served.limits.drain
        super().__init__(
            uvicorn.Config(
                Guard(app, served.limits, keys, {*LOCAL, *hosts}),
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=max(1, round(drain)),
                h11_max_incomplete_event_size=65536,
                ws="none",
            )
        )

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop taking requests. Unlike uvicorn's own, it does not raise the signal again at the end."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = self.served.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_ready()

    def serve_on(self, opened: socket.socket) -> None:
        """Serve until a signal; then what is served stops too."""
        try:
            asyncio.run(self.serve([opened]))
        finally:
            self.served.stop()
            opened.close()
