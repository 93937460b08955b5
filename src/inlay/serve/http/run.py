"""Opens a base and folders of adapters, and serves them until a signal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from inlay.bases.extras import require
from inlay.errors import UsageError
from inlay.runtime.sizes import size_mb

from .keys import Keys
from .limits import Rate
from .settings import ServeSettings

__all__ = ["checked_keys", "hosts_of", "log_to_stderr", "make_key", "open_service", "serve", "url_of"]

LOCAL_NAMES = ("0.0.0.0", "::")
MARGIN = 256
"""Tokens of the store that are left for what adapters put before a row."""


def make_key(settings: ServeSettings) -> dict[str, Any]:
    """Make or drop a key. Raises: UsageError."""
    assert settings.keys is not None
    keys = Keys(settings.keys, make=settings.add_key is not None)
    try:
        if settings.drop_key:
            keys.drop(settings.drop_key)
            return {"dropped": settings.drop_key, "keys": settings.keys}
        allowed = list(settings.adapters_of) or None
        key = keys.add(settings.add_key or "", allowed, Rate.read(settings.rate), settings.admin)
        made = {"adapters": allowed, "rate": settings.rate, "admin": settings.admin}
        return {"name": settings.add_key, "key": key, **made, "keys": settings.keys}
    finally:
        keys.close()


def serve(
    settings: ServeSettings, on_message: Callable[[str], None], on_ready: Callable[[dict[str, Any]], None]
) -> None:
    """Serve until a signal. `on_ready` gets the address and what is served when requests are taken.

    Raises: UsageError where others could ask without a key, or something given is not there; InlayError where the port
    is taken or a library is missing.
    """
    keys = checked_keys(settings)
    from .app import make_routes
    from .experiments import start
    from .server import Server, bound

    log_to_stderr(settings.log_prompts)
    with ExitStack() as stack:
        opened = stack.enter_context(bound(settings.host, settings.port))
        if keys is not None:
            stack.callback(keys.close)
        service = open_service(settings)
        start(service, settings.experiments, on_message)
        said = {
            "url": url_of(settings, opened),
            "base": service.base,
            "adapters": [info.name for info in service.adapters.known()],
        }
        server = Server(make_routes(service), service, keys, hosts_of(settings, on_message), lambda: on_ready(said))
        stack.enter_context(service.running())
        server.serve_on(opened)


def checked_keys(settings: ServeSettings) -> Keys | None:
    """The keys, where some are given. Raises: UsageError where others could ask without one, or something is missing;
    InlayError where a library is."""
    for module in ("fastapi", "uvicorn", "prometheus_client", "llguidance"):
        require(module, "inlay serve", "serve")
    from .server import check_safe

    if not settings.adapters:
        raise UsageError("--adapters is missing", "Name a folder whose folders are adapters or runs.")
    keys = None if settings.keys is None else Keys(settings.keys)
    check_safe(settings.host, keys)
    return keys


def url_of(settings: ServeSettings, opened: Any) -> str:
    """Where the socket `opened` is asked."""
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{shown}:{opened.getsockname()[1]}"


def hosts_of(settings: ServeSettings, on_message: Callable[[str], None]) -> set[str]:
    """The names that the server answers to, beside this machine's own for itself."""
    if settings.host in LOCAL_NAMES and not settings.allow_host:
        on_message("clients elsewhere are refused by the name they ask for: say it with --allow-host NAME")
    return {*settings.allow_host, settings.host} - set(LOCAL_NAMES)


def open_service(settings: ServeSettings) -> Any:
    """The engine over the base, not yet started, and the folders of adapters."""
    from inlay.bank.bank import attach
    from inlay.bases.beside import check_serves, with_head
    from inlay.bases.load import load_base
    from inlay.runtime.requests import vocabulary_of
    from inlay.runtime.token_bytes import token_bytes
    from inlay.serve.adapters import AdapterStore
    from inlay.serve.engine import Engine
    from inlay.serve.experiments.store import Store
    from inlay.sites.positions import positions_of, table_size

    from .service import Service

    experiments = None if settings.state_file is None else Store(settings.state_file)
    paths = [Path(path) for path in settings.adapters]
    base = load_base(settings.base, _dtype(settings, paths), settings.device, settings.quantize)
    if base.tokenizer is None:
        raise UsageError(f"base {settings.base} has no tokenizer", "Name a base folder that holds one.")
    bank = attach(base.model)
    check_serves(base.model)
    memory = None if settings.adapter_memory is None else int(size_mb(settings.adapter_memory) * 2**20)
    store = int(size_mb(settings.store) * 2**20)
    adapters = AdapterStore(
        bank, paths, memory=memory, opens=lambda head: with_head(base.model, base.tokenizer, head, base.folder)
    )  # fmt: skip
    engine = Engine(bank, base.tokenizer, adapters, store=store, most=settings.rows, waiting=settings.queue)
    model: Any = base.model
    vocabulary = min(vocabulary_of(model), table_size(model) or vocabulary_of(model))
    room = max(1, store // token_bytes(bank) - MARGIN) if bank.packs else None
    known = None if model.config.is_encoder_decoder else positions_of(model)
    positions = min((n for n in (room, known) if n is not None), default=None)
    return Service(
        engine, adapters, base.tokenizer, settings.name_of_base, settings, vocabulary, positions,
        settings.share_prefixes, settings.log_prompts, experiments,
    )  # fmt: skip


def _dtype(settings: ServeSettings, paths: list[Path]) -> str:
    """What all adapters were trained in, where nothing is said."""
    from inlay.serve.folders import Folders

    if settings.dtype != "auto":
        return settings.dtype
    trained = {_noted_dtype(folder) for folder in Folders(paths).look().values()} - {None}
    return (trained.pop() if len(trained) == 1 else None) or settings.dtype


def _noted_dtype(folder: Path) -> str | None:
    """What an adapter was trained in; a broken folder says nothing here, and is reported when it is asked for."""
    from inlay.formats.notes import read_notes

    try:
        return read_notes(folder).dtype
    except Exception:
        return None


def log_to_stderr(prompts: bool) -> None:
    """The server's own log goes to stderr: a line for each request."""
    log = logging.getLogger("inlay.serve")
    log.setLevel(logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.propagate = False
    if prompts:
        log.info("prompts are written into this log")
