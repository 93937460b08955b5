"""Several processes of torch.distributed at one piece of work: words and tensors go between the first and the rest."""

from __future__ import annotations

import atexit
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from inlay.errors import InlayError

__all__ = ["Processes", "by_kind", "join"]

T = TypeVar("T", bound=Tensor)
PATIENCE = timedelta(hours=12)
"""How long a process waits for another that is still there: the first one scores and writes while the rest wait."""
HALVES = (torch.float16, torch.bfloat16)


class Processes:
    """This process is number `rank` of `size`, and number 0 leads. All of them make the same calls in the same order.

    Words are JSON, never pickles. Tensors on a GPU go from card to card where torch's NCCL connects them, all others
    through the machine's memory. Every call raises InlayError where another process has ended; no call can follow then,
    nor after one that was broken off.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self.over = False
        self._cards = "nccl" in str(distributed.get_backend_config(group))

    # ---- words

    def tell(self, words: Any = None) -> Any:
        """What the first process says (JSON), in all of them."""
        with self._exchange():
            data = _bytes(words) if not self.rank else torch.empty(0, dtype=torch.uint8)
            size = torch.tensor([len(data)])
            distributed.broadcast(size, 0, group=self._group)
            if self.rank:
                data = torch.empty(int(size), dtype=torch.uint8)
            distributed.broadcast(data, 0, group=self._group)
            return _words(data)

    def gather(self, words: Any) -> list[Any]:
        """What each process says (JSON), in all of them."""
        with self._exchange():
            own = _bytes(words)
            sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
            distributed.all_gather(sizes, torch.tensor([len(own)]), group=self._group)
            longest = max(int(size) for size in sizes)
            found = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
            padded = torch.cat([own, own.new_zeros(longest - len(own))])
            distributed.all_gather(found, padded, group=self._group)
            return [_words(data[: int(size)]) for data, size in zip(found, sizes, strict=True)]

    # ---- tensors

    @torch.no_grad()
    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values, in place; shapes and dtypes are the same in all."""
        with self._exchange():
            for alike in by_kind(tensors):
                flat = self._wire(torch.cat([value.detach().flatten() for value in alike]))
                distributed.broadcast(flat.view(torch.uint8), 0, group=self._group)
                if self.rank:
                    _spread(flat, alike)

    @torch.no_grad()
    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Give the first process the sums over all, in place; halves are added in float32. The rest keep their own."""
        with self._exchange():
            for alike in by_kind(tensors):
                flat = torch.cat([value.detach().flatten() for value in alike])
                flat = self._wire(flat.float() if flat.dtype in HALVES else flat)
                distributed.reduce(flat, 0, group=self._group)
                if not self.rank:
                    _spread(flat, alike)

    def _wire(self, flat: Tensor) -> Tensor:
        return flat if self._cards and flat.device.type == "cuda" else flat.cpu()

    # ---- the end

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        if self.over:
            raise InlayError("the processes of this run are no longer together", "Start them again, with --resume.")
        self.over = True  # until all is said: what is broken off leaves the rest at another place
        try:
            yield
        except RuntimeError as error:
            raise InlayError(
                f"another process of this run has ended or cannot be reached ({_line(error)})",
                "Start them all again, with --resume where there is a checkpoint.",
            ) from None
        self.over = False

    def dismiss(self, words: Any) -> None:
        """The first process's last words to the rest, as far as they are still there."""
        if not self.over:
            with suppress(InlayError):
                self.tell(words)

    def leave(self) -> None:
        """Let go of the rest, who notice it at their next call (where NCCL would wait, at the end of this process)."""
        self.over = True
        if not self._cards and self._group is None:
            with suppress(RuntimeError, AssertionError, ValueError):
                distributed.destroy_process_group()


_joined: list[Processes] = []
"""Those that this process has joined: torch's meeting place takes each process once."""


def join(cards: bool = False) -> Processes:
    """The processes that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), once all of them are here.

    With `cards`, tensors of a GPU go through NCCL. A group that the caller has made already is used as it is.
    Raises: InlayError where they do not come together, or have come apart before.
    """
    if not distributed.is_available():
        raise InlayError("this torch was built without torch.distributed", "Start one process, or take another build.")
    if _joined:
        if _joined[0].over:
            raise InlayError("an earlier run's processes have come apart here", "Start all processes again.")
        return _joined[0]
    if distributed.is_initialized():
        group = distributed.new_group(timeout=PATIENCE, backend="gloo")
        assert isinstance(group, distributed.ProcessGroup)
        _joined.append(Processes(group))
        return _joined[0]
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise InlayError(
            f"the processes do not find one another ({_line(error)})", "Start them with torchrun."
        ) from None
    atexit.register(_leave)
    _joined.append(Processes())
    return _joined[0]


def _leave() -> None:
    if distributed.is_initialized():
        with suppress(RuntimeError):
            distributed.destroy_process_group()


def by_kind(tensors: Iterable[T]) -> Sequence[Sequence[T]]:
    """In groups of one dtype and device, so that each is one message."""
    groups: dict[tuple[torch.dtype, torch.device], list[T]] = {}
    for value in tensors:
        groups.setdefault((value.dtype, value.device), []).append(value)
    return list(groups.values())


def _spread(flat: Tensor, into: Sequence[Tensor]) -> None:
    for value, part in zip(into, flat.split([value.numel() for value in into]), strict=True):
        value.detach().copy_(part.view_as(value))


def _line(error: Exception) -> str:
    """The first sentence of torch's error, without the place in its source."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return re.sub(r"^\[[^]]*\]\s*", "", line).partition(". ")[0][:200]


def _bytes(words: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(words, default=str).encode()), dtype=torch.uint8)


def _words(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
