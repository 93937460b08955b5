"""The residual stream that each sublayer's output is added to, read off while the base runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from inlay.methods.contract import Site, Structure

__all__ = ["Residuals"]


class Residuals:
    """Remembers, for each sublayer of the forward in flight, the stream its output will be added to.

    Where a norm feeds the sublayer, that is the norm's input; where the sublayer reads the stream itself (norms behind
    it, as in BERT), the sublayer's own input.
    """

    def __init__(self, base: Structure) -> None:
        self.base = base
        self._handles: list[RemovableHandle] = []
        self._normed: dict[str, tuple[Tensor, Tensor]] = {}  # block -> input and output of its latest norm
        self._now: dict[str, Tensor] = {}  # path of a sublayer's last module -> residual stream

    def watch(self) -> None:
        """Start remembering (once)."""
        if self._handles:
            return
        attended = [path for path in (s.path for s in self.base.attentions.values())]
        for norm in self.base.norms:
            block = self._block(norm.path)
            if block and not any(norm.path.startswith(path + ".") for path in attended):
                self._handles.append(norm.module.register_forward_hook(self._after_norm(block)))
        for sublayer in self.base.sublayers:
            block = self._block(sublayer.path)
            first = next(
                (
                    s
                    for s in self.base.projections
                    if block and s.path.startswith(block + ".") and s.part == sublayer.part
                ),
                None,
            )
            entry: Site = first or sublayer
            if block:
                hook = self._before_sublayer(block, sublayer.path)
                self._handles.append(entry.module.register_forward_pre_hook(hook, prepend=True))

    def of(self, path: str) -> Tensor | None:
        return self._now.get(path)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._now.clear()
        self._normed.clear()

    def _block(self, path: str) -> str:
        return next((block for block in self.base.blocks if path.startswith(block + ".")), "")

    def _after_norm(self, block: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if args:
                self._normed[block] = (args[0], out)

        return hook

    def _before_sublayer(self, block: str, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not args:
                return
            x = args[0]
            before, after = self._normed.get(block, (None, None))
            fed = after is not None and after.data_ptr() == x.data_ptr() and after.numel() == x.numel()
            self._now[path] = before if fed and before is not None else x

        return hook
