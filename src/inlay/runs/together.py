"""A run in the processes that torchrun has started: the first one is the run, the others work for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from inlay.errors import InlayError

from .processes import Place, place

if TYPE_CHECKING:
    from inlay.runtime.processes import Processes
    from inlay.training.gradients import Shares

__all__ = ["helped", "together"]


def together(lead: Callable[[Shares], dict[str, Any]]) -> dict[str, Any]:
    """What `lead` gives in the first process, in all of them; the others do their shares of its steps until it ends.

    Raises: whatever `lead` raises; InlayError in every process where one has failed or ended.
    """
    from inlay.training.gradients import ALONE

    if (result := helped()) is not None:
        return result
    if (here := place()) is None:
        return lead(ALONE)
    from .sharing import Shared

    processes = _joined(here)
    shared = Shared(processes)
    try:
        result = lead(shared)
    except InlayError as error:
        processes.dismiss({"error": [error.what, error.remedy]})
        raise
    except BaseException as error:  # where the others are still opening the base, they notice by themselves
        if isinstance(error, KeyboardInterrupt) and shared.ready:
            processes.dismiss({"interrupted": str(error)})
        processes.leave()
        raise
    processes.dismiss({"result": result})
    return result


def helped() -> dict[str, Any] | None:
    """The run's result, in a process that is not the first, once it has done its shares; None in any other.

    Raises: InlayError where a process has failed or ended.
    """
    here = place()
    if here is None or not here.rank:
        return None
    from .worker import Worker

    processes = _joined(here)
    with _handled(signal.SIG_IGN):  # the first process hears them too, and decides
        return Worker(processes).work()


def _joined(here: Place) -> Processes:
    """All processes, once they have come."""
    import torch

    from inlay.runtime.processes import join

    cards = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    cards = cards and here.beside <= torch.cuda.device_count()
    if cards:
        torch.cuda.set_device(here.local)
    with _handled(signal.SIG_DFL):  # torch waits without looking at Python's handlers, and nothing can be lost yet
        return join(cards)


@contextmanager
def _handled(handler: Any) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM meet `handler` (in a main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
