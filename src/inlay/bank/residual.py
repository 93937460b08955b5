"""The residual stream that each sublayer's output is added to, read off while the base runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from inlay.errors import UsageError
from inlay.methods.contract import Site, Structure
from inlay.sites.probe import run_tiny

__all__ = ["Residuals"]


@dataclass
class _Seen:
    """One sublayer in the tiny forward: what may be its residual stream, the modules that read it, and its output."""

    path: str
    candidates: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    output: Tensor | None = None

    def source(self, sums: list[Tensor]) -> nn.Module:
        """The candidate whose sum with the output the base goes on with; the first where it adds something else too."""
        errors = [self._error(stream, sums) for _, stream in self.candidates]
        best = min(range(len(errors)), key=errors.__getitem__)
        return self.candidates[best if errors[best] < 0.02 else 0][0]

    def _error(self, stream: Tensor, sums: list[Tensor]) -> float:
        if self.output is None or self.output.shape != stream.shape:
            return float("inf")
        total = (stream + self.output).float()
        alike = [t for t in sums if t.shape == total.shape]
        scale = float(total.abs().max()) or 1.0
        return min((float((t.float() - total).abs().max()) / scale for t in alike), default=float("inf"))


class Residuals:
    """Remembers, for each sublayer of the forward in flight, the stream its output will be added to.

    That is the input of the norm that feeds the sublayer or, where norms come behind, as in BERT, the sublayer's own
    input. Which of them it is, one tiny forward shows.
    """

    def __init__(self, base: Structure) -> None:
        self.base = base
        self._handles: list[RemovableHandle] = []
        self._now: dict[str, Tensor] = {}  # path of a sublayer's last module -> residual stream

    def watch(self) -> None:
        """Start remembering (once)."""
        if self._handles:
            return
        for path, module in self._sources().items():
            self._handles.append(module.register_forward_pre_hook(self._remember(path), prepend=True))

    def of(self, path: str) -> Tensor | None:
        return self._now.get(path)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._now.clear()

    def _remember(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args:
                self._now[path] = args[0]

        return hook

    def _sources(self) -> dict[str, nn.Module]:
        """For each sublayer, the module whose input is the residual stream."""
        seen = {site.path: _Seen(site.path) for site in self.base.sublayers}
        normed: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}  # address of a norm's output -> norm, input, output
        sums: list[Tensor] = []  # what norms read and blocks hand on: a sublayer's sum is one of them

        def after_norm(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            normed[out.data_ptr()] = (module, args[0], out)
            sums.append(args[0])

        def after_block(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            sums.append(out[0] if isinstance(out, tuple) else out)

        def entering(found: _Seen) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                if args and found.output is None:
                    if args[0].data_ptr() in normed:
                        found.candidates.append(normed[args[0].data_ptr()][:2])
                    found.candidates.append((module, args[0]))

            return hook

        def leaving(found: _Seen) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
                found.output = out[0] if isinstance(out, tuple) else out

            return hook

        handles = [norm.module.register_forward_hook(after_norm) for norm in self.base.norms]
        handles += [self.base.model.get_submodule(b).register_forward_hook(after_block) for b in self.base.blocks]
        for site in self.base.sublayers:
            for module in self._entries(site):
                handles.append(module.register_forward_pre_hook(entering(seen[site.path])))
            handles.append(site.module.register_forward_hook(leaving(seen[site.path])))
        ran = run_tiny(self.base.model)
        for handle in handles:
            handle.remove()
        if not ran:
            raise UsageError("the base's residual stream cannot be found", "Choose a method without sublayer sites.")
        return {path: found.source(sums) for path, found in seen.items() if found.candidates}

    def _entries(self, sublayer: Site) -> list[nn.Module]:
        """Projections of the sublayer's block and part that may read the stream; else the sublayer itself."""
        block = next(block for block in self.base.blocks if sublayer.path.startswith(block + "."))
        inside = [s for s in self.base.projections if s.path.startswith(block + ".") and s.part == sublayer.part]
        found = [s.module for s in inside if s.in_features == sublayer.out_features and s.path != sublayer.path]
        return found or [sublayer.module]
