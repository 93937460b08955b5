"""Starts Ray, replicas and their front, and serves until a signal."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from inlay.bases.extras import require
from inlay.errors import InlayError, UsageError
from inlay.serve.http.run import checked_keys, hosts_of, log_to_stderr, url_of
from inlay.serve.http.settings import ServeSettings

__all__ = ["serve_cluster"]

REPLICAS = 2
NAME = "inlay"
"""The application's name at Ray Serve."""
STORE = 256 * 2**20
"""Bytes of Ray's store of objects: bodies of requests that wait."""
LOCAL = ("127.", "::1")
QUIET: dict[str, Any] = {"log_level": "WARNING", "enable_access_log": False}


def serve_cluster(
    settings: ServeSettings, on_message: Callable[[str], None], on_ready: Callable[[dict[str, Any]], None]
) -> None:
    """`serve` with several servers behind one front. Raises: as `serve`; InlayError where Ray cannot run them."""
    keys = checked_keys(settings)
    for path in settings.adapters:
        if not Path(path).is_dir():  # said before Ray is started
            raise UsageError(f"the folder of adapters {path} does not exist", "Make it, or check the path.")
    _set_environment(settings.ray_address is None)
    require("ray.serve", "inlay serve --ray", "ray")
    from inlay.serve.http.server import Server, bound

    from .front import Front

    log_to_stderr(False)  # prompts stand in the logs of replicas, if anywhere
    with ExitStack() as stack:
        opened = stack.enter_context(bound(settings.host, settings.port))
        if keys is not None:
            stack.callback(keys.close)
        logs = stack.enter_context(_ray(settings))
        handle = _deployed(settings, stack)
        begun = handle.options(method_name="begin").remote().result()
        if "refused" in begun:
            kind, what, remedy = begun["refused"]
            raise (UsageError if kind == "UsageError" else InlayError)(what, remedy)
        for line in begun["said"]:
            on_message(line)
        on_message(f"the replicas' own logs, and Ray's, lie in {logs} on each machine")
        if settings.ray_address is None:
            _check_local(opened.getsockname()[1])
        front = Front(handle, settings, begun["base"], lambda: _leave(handle))
        said = {"url": url_of(settings, opened), "base": begun["base"], "adapters": begun["adapters"]}
        said |= {"replicas": settings.replicas or REPLICAS}
        server = Server(front, front, keys, hosts_of(settings, on_message), lambda: on_ready(said))
        front.start()
        server.serve_on(opened)


def _set_environment(alone: bool) -> None:
    """What Ray reads when it is imported. A cluster of our own is on this machine `alone`: nothing of it listens
    elsewhere, and whoever asks its processes needs a token that only they know."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if alone:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray then keeps to 127.0.0.1 on Linux too
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextmanager
def _ray(settings: ServeSettings) -> Iterator[str]:
    """Ray, as long as the context is entered; gives the folder of its logs.

    Raises: InlayError where it does not start or answer.
    """
    import ray

    _check_address(settings.ray_address)
    given: dict[str, Any] = {"address": settings.ray_address or "local", "logging_level": logging.WARNING}
    given["log_to_driver"] = False  # whatever Ray and its helpers say, tracebacks too
    if settings.ray_address is None:
        cores = _cores(settings) * (settings.replicas or REPLICAS)
        given |= {"include_dashboard": False, "num_cpus": cores, "object_store_memory": STORE}
    try:
        context: Any = ray.init(**given)
    except Exception as error:  # Ray raises what it likes
        at = settings.ray_address
        what = "Ray does not start" if at is None else f"no Ray cluster answers at --ray-address {at}"
        remedy = "See /tmp/ray." if at is None else "Start one (ray start --head), or leave --ray-address out."
        raise InlayError(f"{what} ({_line(error)})", remedy) from None
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        yield str(Path(context.address_info["session_dir"]) / "logs")
    finally:
        with suppress(Exception):
            ray.shutdown()


def _check_address(address: str | None) -> None:
    """Raises: InlayError where nobody listens there; Ray itself would try for minutes."""
    if address is None or address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise UsageError(f"--ray-address {address} is no address of a cluster", "Give auto or HOST:PORT.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        said = f"no Ray cluster answers at --ray-address {address} ({error})"
        raise InlayError(said, "Start one (ray start --head), or leave --ray-address out.") from None


def _deployed(settings: ServeSettings, stack: ExitStack) -> Any:
    """A handle of the replicas, when all of them are ready; they end with `stack`. Raises: InlayError."""
    from ray import serve

    from .replica import Replica

    serve.start(http_options={"location": "NoServer"}, logging_config=QUIET)
    if settings.ray_address is not None:  # replicas of a cluster of our own end with it
        if NAME in serve.status().applications:
            remedy = f"""End that server; if it has died: python -c "from ray import serve; serve.delete('{NAME}')"."""
            raise InlayError("another inlay serve --ray uses this cluster", remedy)
        stack.callback(_delete)
    many = settings.replicas or REPLICAS
    deployment: Any = serve.deployment
    own = deployment(Replica).options(
        name="Server",
        num_replicas=many,
        ray_actor_options={"num_cpus": _cores(settings), "num_gpus": _gpus(settings.device, many)},
        max_ongoing_requests=2 * settings.max_open,
        health_check_period_s=2,
        max_constructor_retry_count=1,
        request_router_config={"request_router_class": "inlay.serve.cluster.router.AdapterRouter"},
        logging_config=QUIET,
    )
    try:
        return serve.run(own.bind(_anywhere(settings), settings.ray_address is None), name=NAME, route_prefix=None)
    except Exception as error:
        raise InlayError(f"Ray cannot run the servers ({_line(error)})", "See the logs in /tmp/ray.") from None


def _leave(handle: Any) -> None:
    """Let the replicas end what they do."""
    with suppress(Exception):
        handle.broadcast("stop").results(timeout_s=10)


def _delete() -> None:
    from ray import serve

    with suppress(Exception):
        serve.delete(NAME)


def _anywhere(settings: ServeSettings) -> ServeSettings:
    """The settings for processes that were started in other folders."""
    base = settings.base
    paths = {name: given and str(Path(given).absolute()) for name, given in (
        ("state", settings.state_file), ("experiments", settings.experiments))}  # fmt: skip
    return replace(
        settings, adapters=[str(Path(path).absolute()) for path in settings.adapters], base_name=settings.name_of_base,
        base=str(Path(base).absolute()) if Path(base).exists() else base, **paths,
    )  # fmt: skip


def _cores(settings: ServeSettings) -> int:
    """Cores of one replica: Ray has its libraries take as many threads."""
    if settings.replica_cpus is not None:
        return settings.replica_cpus
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // (settings.replicas or REPLICAS))


def _gpus(device: str | None, replicas: int) -> float:
    """GPUs of one replica: one, or a share where there are fewer than replicas."""
    import ray

    there = 0 if device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    return 0 if not there else 1 / math.ceil(replicas / there)


def _check_local(port: int) -> None:
    """Raises: InlayError where a process of Ray listens beyond this machine; `port` is the front's own."""
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.Error):
            for one in process.net_connections("inet"):
                address: Any = one.laddr
                if one.status == psutil.CONN_LISTEN and address.port != port and not _local(address.ip):
                    raise InlayError(
                        f"Ray's process {process.name()} listens on {address.ip}, beyond this machine",
                        "Install ray[serve]==2.60.0, with which this was tried; or guard a cluster of your own, and "
                        "give its --ray-address.",
                    )


def _local(ip: str) -> bool:
    return ip.removeprefix("::ffff:").startswith(LOCAL)


def _line(error: Exception) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
