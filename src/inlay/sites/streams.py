"""The residual stream that each sublayer's output is added to, found by what the base goes on with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from .site import Site

__all__ = ["Streams", "chosen"]


@dataclass
class SublayerTrace:
    """One sublayer while its block runs: what may be its residual stream, the modules that read it, its output, and how
    many modules of the block were entered `before`.
    """

    candidates: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    output: Tensor | None = None
    before: int = 0

    def source(self, sums: list[Tensor], others: list[tuple[nn.Module, Tensor]]) -> tuple[nn.Module, bool]:
        """The candidate whose sum with the output the base goes on with, or one of the `others`; the first candidate
        where the base adds something else too. And whether the sum is that close that the output is surely in it.
        """
        for some in (self.candidates, others):
            errors = [self._error(stream, sums) for _, stream in some]
            best = min(range(len(errors)), key=errors.__getitem__, default=0)
            if errors and errors[best][0] < 0.02:
                return some[best][0], errors[best][1] < 0.2
        return self.candidates[0][0], False

    def _error(self, stream: Tensor, sums: list[Tensor]) -> tuple[float, float]:
        """How far the closest of `sums` is from stream + output, as shares of that and of the output."""
        if self.output is None or self.output.shape != stream.shape:
            return math.inf, math.inf
        total = (stream + self.output).float()
        error = min((float((t.float() - total).abs().max()) for t in sums if t.shape == total.shape), default=math.inf)
        return error / (float(total.abs().max()) or 1.0), error / (float(self.output.abs().max()) or 1.0)


class Streams:
    """Watches the sublayers of a forward, block by block; `found` maps the path of each to the module whose first
    input is its residual stream, `summed` says whether the sum of both was surely seen.

    That is the norm that feeds the sublayer or, where norms come behind, as in BERT, a projection at its beginning;
    where neither reads the stream as it is, another module of the block, or the block itself.
    """

    def __init__(self, blocks: Mapping[str, int], sublayers: list[Site], linear: list[Site], norms: list[Site]) -> None:
        self.found: dict[str, nn.Module] = {}
        self.summed: dict[str, bool] = {}
        self._norms = {site.module for site in norms}
        self._ends: dict[nn.Module, str] = {site.module: site.path for site in sublayers}
        self._starts: dict[nn.Module, list[str]] = {}
        for site in sublayers:
            for module in _entries(site, blocks, linear):
                self._starts.setdefault(module, []).append(site.path)
        self.begin_block()

    def begin_block(self) -> None:
        self._traces: dict[str, SublayerTrace] = {}
        self._normed: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}  # address of an output -> norm, input, output
        self._inputs: list[tuple[nn.Module, Tensor]] = []  # of all modules of the block
        self._sums: list[Tensor] = []  # what norms read and the block gives: a sublayer's sum is one of them

    def end_block(self, out: Tensor | None) -> None:
        """Judge what the block that gave `out` has shown."""
        if out is not None:
            self._sums.append(out)
        for path, trace in self._traces.items():
            if trace.candidates and path not in self.found:
                self.found[path], self.summed[path] = trace.source(self._sums, self._inputs[: trace.before])
        self.begin_block()

    def entering(self, module: nn.Module, x: Tensor | None) -> None:
        if x is None:
            return
        self._inputs.append((module, x))
        for path in self._starts.get(module, ()):
            trace = self._traces.setdefault(path, SublayerTrace())
            if trace.output is None:
                if x.data_ptr() in self._normed:
                    trace.candidates.append(self._normed[x.data_ptr()][:2])
                trace.candidates.append((module, x))

    def leaving(self, module: nn.Module, x: Tensor | None, out: Tensor | None) -> None:
        if x is None or out is None:
            return
        if module in self._norms:
            self._normed[out.data_ptr()] = (module, x, out)
            self._sums.append(x)
        if module in self._ends:
            trace = self._traces.setdefault(self._ends[module], SublayerTrace())
            trace.output, trace.before = out, len(self._inputs)


def chosen(ends: list[Site], blocks: Iterable[str], turns: Mapping[str, int], summed: Mapping[str, bool]) -> list[str]:
    """Of the modules that may end a part of a block, the paths of those that do: the one called last (`turns`), if
    possible of those whose sum with the stream was seen. Where none was called, it is the last by structure.
    """
    parts: dict[tuple[str, str], list[Site]] = {}
    for site in ends:
        parts.setdefault((_block(site, blocks), site.part), []).append(site)
    found = []
    for sites in parts.values():
        sites = [s for s in sites if summed.get(s.path)] or sites
        found.append(max(reversed(sites), key=lambda s: turns.get(s.path, 0)).path)
    return found


def _entries(sublayer: Site, blocks: Mapping[str, int], linear: list[Site]) -> list[nn.Module]:
    """Projections of the sublayer's block and part that may read the stream; else the sublayer itself."""
    block = _block(sublayer, blocks)
    inside = [s for s in linear if s.path.startswith(block + ".") and s.part == sublayer.part]
    found = [s.module for s in inside if s.in_features == sublayer.out_features and s.path != sublayer.path]
    return found or [sublayer.module]


def _block(site: Site, blocks: Iterable[str]) -> str:
    return next(block for block in blocks if site.path.startswith(block + "."))
