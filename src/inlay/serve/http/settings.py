"""The settings of `inlay serve`, by the names of its flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from inlay.errors import UsageError
from inlay.runs.settings import Base, Device, Dtype, Quantize, as_path, as_paths
from inlay.runtime.sizes import size_mb
from inlay.values import Count, From, Help

from .limits import GUARD, Limits, Rate

__all__ = ["KEYS", "ServeSettings"]

KEYS = ("add_key", "drop_key", "adapters_of", "rate", "admin")
"""Settings of which a key is made or dropped; nothing is served then."""
CLUSTER = "Several servers"
"""The heading of Ray's flags in `--help`."""


def _listed(value: Any) -> Any:
    """Names parted by commas, or several of them."""
    given = [value] if isinstance(value, str) else value or []
    return [name.strip() for one in given for name in str(one).split(",") if name.strip()]


def _folders(value: Any) -> Any:
    return as_paths(value) if value else []


def _rate(value: Any) -> Any:
    """Raises: ValueError."""
    return None if value is None else str(Rate.read(value))


def _size(value: Any) -> Any:
    """Raises: ValueError."""
    if value is not None:
        try:
            size_mb(str(value))
        except UsageError:
            raise ValueError("Write 4GB or 900MB.") from None
    return value


@dataclass(frozen=True, kw_only=True)
class ServeSettings(Limits):
    """What is served, where, and to whom."""

    adapters: Annotated[
        Sequence[str],
        From(_folders),
        Help("a folder that holds folders of adapters or runs; new ones are found; repeatable"),
    ] = ()
    host: Annotated[str, Help("the address to listen on; others than this machine's need --keys")] = "127.0.0.1"
    port: Annotated[int, Ge(0), Le(65535), Help("0 takes one that is free")] = 8000
    base: Base = "smollm2"
    base_name: Annotated[str | None, Help("what the plain base is called; as --base where unset")] = None
    dtype: Dtype = "auto"
    device: Device = None
    quantize: Quantize = None
    store: Annotated[str, From(_size), Help("memory for keys and values of all answers under way")] = "1GB"
    rows: Annotated[Count, Help("answers that are written at once")] = 64
    queue: Annotated[Count, Help("prompts that may wait")] = 512
    adapter_memory: Annotated[
        str | None, From(_size), Help("memory for adapters; those used longest ago leave it. No limit where unset")
    ] = None
    experiments: Annotated[
        str | None, From(as_path), Help("a YAML file of aliases over weighted arms: {reviews: {v3: 0.9, v4: 0.1}}")
    ] = None
    state: Annotated[
        str | None,
        From(as_path),
        Help("a file for experiments, feedback and counts; beside --experiments where unset"),
    ] = None
    ray: Annotated[bool, Help("several servers behind Ray Serve, each with a base of its own", CLUSTER)] = False
    replicas: Annotated[Count | None, Help("how many servers; 2 where unset", CLUSTER)] = None
    replica_cpus: Annotated[Count | None, Help("cores of each server; an even share where unset", CLUSTER)] = None
    ray_address: Annotated[
        str | None,
        Help("a Ray cluster that runs already, as auto or HOST:PORT; one on this machine where unset", CLUSTER),
    ] = None
    log_prompts: Annotated[bool, Help("write prompts into the log, which is silent about them otherwise")] = False
    allow_host: Annotated[Sequence[str], From(_listed), Help("a name that clients call this server by", GUARD)] = ()
    keys: Annotated[str | None, From(as_path), Help("a file of API keys; every request then needs one", GUARD)] = None
    share_prefixes: Annotated[bool, Help("keys share what was read of common prompts", GUARD)] = False
    add_key: Annotated[str | None, Help("make a key of this name in --keys, print it once, and end", GUARD)] = None
    drop_key: Annotated[str | None, Help("take a key out of --keys, and end", GUARD)] = None
    adapters_of: Annotated[Sequence[str], From(_listed), Help("what the key may use: a,b; all where unset", GUARD)] = ()
    rate: Annotated[str | None, From(_rate), Help("requests that the key may make: 5/s, 100/m, 2000/h", GUARD)] = None
    admin: Annotated[bool, Help("the key may load adapters, set experiments and read metrics", GUARD)] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = [name for name in KEYS if getattr(self, name)]
        if self.keys is None and asked:
            raise UsageError(f"--{asked[0].replace('_', '-')} is about keys", "Name their file: --keys FILE.")
        if asked and not (self.add_key or self.drop_key):
            raise UsageError(f"--{asked[0].replace('_', '-')} says what a key may do", "Add --add-key NAME.")
        given = [name for name in ("replicas", "replica_cpus", "ray_address") if getattr(self, name) is not None]
        if given and not self.ray:
            raise UsageError(f"--{given[0].replace('_', '-')} is about several servers", "Add --ray.")
        if self.add_key and self.drop_key:
            raise UsageError("--add-key and --drop-key are two things", "Do one after the other.")

    @property
    def state_file(self) -> str | None:
        """Where experiments are kept: --state, else --experiments with the ending .sqlite; None for nowhere."""
        if self.state is None and self.experiments is not None:
            return str(Path(self.experiments).with_suffix(".sqlite"))
        return self.state

    @property
    def name_of_base(self) -> str:
        """What clients call the plain base: --base-name, else --base; of a path its last part."""
        return self.base_name or self.base.rstrip("/").rpartition("/")[2].removesuffix(".gguf") or self.base
