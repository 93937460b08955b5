"""Mixtures whose experts are held as 3-D parameters of one module: what that module computes, found by running it.

    y_t = sum over the experts e of token t:  w_te * norm(W2_e act(W1_e x_t + b1_e) + b2_e)

`Mixture` is that formula. Which of a module's parameters are W1 and W2, how they are stored and what stands between
them is tried out: what gives the module's own output is right, and a module for which nothing does has no sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .site import Site
from .tiny import quietly

__all__ = ["ExpertWeight", "Mixture", "Pairs", "expert_modules", "expert_sites", "read_mixtures"]


class Seen(Protocol):
    """How a module was called; see `inlay.sites.recorder.Call`."""

    @property
    def inputs(self) -> int: ...
    @property
    def gives(self) -> str: ...
    @property
    def input_shape(self) -> tuple[int, ...] | None: ...


Product = Callable[["ExpertWeight", Tensor], Tensor]
"""Gives W_e x + b_e (S, out) for x (S, in), whose rows are in the order of their experts."""


@dataclass(frozen=True)
class ExpertWeight:
    """The parameter `name` (E, out, in), or (E, in, out) where `transposed`; a `bias` is (E, out)."""

    name: str
    transposed: bool
    bias: str | None

    def features(self, module: nn.Module) -> tuple[int, int]:
        """in and out"""
        _, rows, columns = module.get_parameter(self.name).shape
        return (rows, columns) if self.transposed else (columns, rows)


@dataclass(frozen=True, eq=False)
class Pairs:
    """The S pairs of a token and one of its experts in one call, those of one token side by side or, where the module
    is given its tokens once for each expert, those of one expert.

    `row` (S,) says which row of x (rows, in) a pair reads, `token` (S,) whose it is of the `tokens` there are, `expert`
    (S,) where it goes, and `weight` (S,) by what its result is multiplied; None where x is multiplied already.
    """

    x: Tensor
    row: Tensor
    token: Tensor
    expert: Tensor
    weight: Tensor | None
    tokens: int


@dataclass(frozen=True, eq=False)
class Mixture:
    """The formula of one `module` of so many `experts`: `first` is W1, `last` W2, `between` the activation."""

    module: nn.Module
    experts: int
    first: ExpertWeight
    last: ExpertWeight
    between: Callable[[Any, Tensor], Tensor]

    def pairs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pairs:
        """What a call means: hidden_states (T, in), top_k_index and top_k_weights, or (E * T, in) alone."""
        tensors = _tensors(args, kwargs)
        x = tensors[0]
        rows = torch.arange(len(x), device=x.device)
        if len(tensors) == 1:
            tokens = len(x) // self.experts
            return Pairs(x, rows, rows % tokens, rows // tokens, None, tokens)
        index, weight = tensors[1:] if tensors[2].is_floating_point() else reversed(tensors[1:])
        row = rows.repeat_interleave(index.shape[1])
        return Pairs(x, row, row, index.reshape(-1), weight.reshape(-1), len(x))

    def tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The tokens of a call, (T, in), each once."""
        tensors = _tensors(args, kwargs)
        return tensors[0][: len(tensors[0]) // self.experts] if len(tensors) == 1 else tensors[0]

    def compute(self, pairs: Pairs, order: Tensor, product: Product) -> Tensor:
        """The module's output; `order` (S,) sorts the pairs by expert, as `product` takes them."""
        x = pairs.x.index_select(0, pairs.row.index_select(0, order))
        made = product(self.last, self.between(self.module, product(self.first, x)))
        norm = getattr(self.module, NORM, None)
        made = made if norm is None else norm(made)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        made = made.index_select(0, back)
        if pairs.weight is None:
            return made
        made = made * pairs.weight[:, None]
        return made.view(pairs.tokens, -1, made.shape[1]).sum(1).to(pairs.x.dtype)


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


# ---- what may stand between W1 and W2

GATE, NORM = "_apply_gate", "post_expert_norm"
"""What transformers' interface of experts calls a module's own activation, and the norm behind W2."""
ACTIVATIONS = ("act_fn", "activation_fn", "act")


def _activation(module: Any) -> Callable[[Tensor], Tensor]:
    return next(getattr(module, name) for name in ACTIVATIONS if hasattr(module, name))


def _own(module: Any, made: Tensor) -> Tensor:
    return getattr(module, GATE)(made)


def _gated(module: Any, made: Tensor) -> Tensor:
    gate, up = made.chunk(2, dim=-1)
    return _activation(module)(gate) * up


def _plain(module: Any, made: Tensor) -> Tensor:
    return _activation(module)(made)


BETWEEN = (_own, _gated, _plain)


# ---- reading modules


def expert_modules(model: nn.Module, blocks: Mapping[str, int]) -> dict[str, nn.Module]:
    """Modules inside of blocks that may be mixtures: those that hold a 3-D parameter of more than one matrix."""
    return {
        path: module
        for path, module in model.named_modules()
        if any(path.startswith(f"{block}.") for block in blocks) and _stacked(module)
    }


def _stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    own = module.named_parameters(recurse=False)
    return {name: p for name, p in own if p.ndim == 3 and min(p.shape) > 1 and getattr(module, name, None) is p}


def read_mixtures(
    model: nn.Module, blocks: Mapping[str, int], calls: Mapping[str, Seen], why: str
) -> tuple[dict[str, Mixture], dict[str, str]]:
    """The formula of each mixture by its path; and, for other modules that hold 3-D parameters, why they have none.

    `calls` is what a tiny forward showed, `why` the reason where none could be run.
    """
    found: dict[str, Mixture] = {}
    refused: dict[str, str] = {}
    with quietly(model):
        for path, module in expert_modules(model, blocks).items():
            made = f"was not seen running ({why})" if why else _read(module, path, blocks, calls)
            if isinstance(made, Mixture):
                found[path] = made
            else:
                refused[path] = f"is of the class {type(module).__name__}, which {made}"
    return found, refused


def _read(module: nn.Module, path: str, blocks: Mapping[str, int], calls: Mapping[str, Seen]) -> Mixture | str:
    """The formula of `module`, or why it has none."""
    stacked, call = _stacked(module), calls.get(path)
    if len(stacked) != 2:
        return f"holds {len(stacked)} 3-D parameter{'s' * (len(stacked) != 1)}, not the two of experts"
    sizes = {len(p) for p in stacked.values()}
    if len(sizes) > 1:
        return "holds matrices of unequal numbers of experts"
    if any(p.is_meta for p in stacked.values()):
        return "holds no numbers here: its weights are offloaded, or were never loaded"
    if any(p.dtype not in FLOATS for p in stacked.values()):
        return f"holds its experts as {next(str(p.dtype) for p in stacked.values()).removeprefix('torch.')}"
    if call is None:
        return "is not called in a forward of the base"
    experts, rows = sizes.pop(), (call.input_shape or (0,))[0]
    if call.gives != "tensor" or call.inputs not in (1, 3) or len(call.input_shape or ()) != 2:
        return f"is called with {call.inputs} tensors and gives a {call.gives}, as no experts known here"
    block = next(b for b in blocks if path.startswith(f"{b}."))
    tokens = _tokens(calls[block].input_shape)
    if rows != tokens * (experts if call.inputs == 1 else 1):
        return "is not given the tokens of the batch in their order"
    return _tried(module, experts, call.inputs == 3) or "computes something else than an activation of two products"


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _tokens(shape: tuple[int, ...] | None) -> int:
    count = 1
    for size in (shape or (0,))[:-1]:
        count *= size
    return count


def _tried(module: nn.Module, experts: int, indexed: bool) -> Mixture | None:
    """The first formula that gives the module's own output for some random tokens."""
    names = list(_stacked(module))
    for (one, two), turned, between in product(permutations(names), product((False, True), repeat=2), BETWEEN):
        first, last = (_weight(module, n, t) for n, t in zip((one, two), turned, strict=True))
        width, middle = first.features(module)
        if last.features(module)[1] != width or last.features(module)[0] not in (middle, middle // 2):
            continue
        mixture = Mixture(module, experts, first, last, between)
        if _alike(mixture, width, indexed):
            return mixture
    return None


def _weight(module: nn.Module, name: str, transposed: bool) -> ExpertWeight:
    own = (n for n, p in module.named_parameters(recurse=False) if p.ndim == 2 and n.startswith(name))
    return ExpertWeight(name, transposed, next(own, None))


def _alike(mixture: Mixture, width: int, indexed: bool) -> bool:
    """Whether formula and module agree but for rounding, on tokens from small to large: activations may be clamped."""
    module, experts = mixture.module, mixture.experts
    like = module.get_parameter(mixture.first.name)
    generator = torch.Generator().manual_seed(0)
    tokens = 4 if indexed else experts
    x = (
        torch.randn(tokens, width, generator=generator)
        * torch.tensor([0.3, 1.0, 3.0, 10.0]).repeat(experts)[:tokens, None]
    )
    args = [x.to(like.device, like.dtype)]
    if indexed:
        index = torch.stack([torch.randperm(experts, generator=generator)[: min(2, experts)] for _ in x])
        args += [index.to(like.device), torch.rand(index.shape, generator=generator).to(like.device, like.dtype)]
    try:
        own = type(module).forward(module, *(arg.clone() for arg in args))
        pairs = mixture.pairs(tuple(args), {})
        order = pairs.expert.argsort(stable=True)
        got = mixture.compute(pairs, order, lambda weight, value: _product(module, weight, value, pairs.expert[order]))
    except Exception:  # another formula's shapes
        return False
    if not isinstance(own, Tensor) or got.shape != own.shape or got.dtype != own.dtype:
        return False
    exact = [value.double().nan_to_num(posinf=torch.inf) for value in (own, got)]
    size = exact[0].norm(dim=-1)
    error = (exact[0] - exact[1]).norm(dim=-1)
    return bool(size.isfinite().all() and size.any() and (error <= 4 * torch.finfo(like.dtype).eps * size).all())


def _product(module: nn.Module, weight: ExpertWeight, x: Tensor, experts: Tensor) -> Tensor:
    stored, bias = module.get_parameter(weight.name), weight.bias
    made = [
        F.linear(
            row,
            stored[e].t() if weight.transposed else stored[e],
            None if bias is None else module.get_parameter(bias)[e],
        )
        for row, e in zip(x, experts.tolist(), strict=True)
    ]
    return torch.stack(made)


# ---- sites


def expert_sites(mixtures: Mapping[str, Mixture], blocks: Mapping[str, int]) -> Iterator[Site]:
    """One site for each W1 and W2, in the order in which the modules hold them."""
    for path, mixture in mixtures.items():
        layer = next(number for block, number in blocks.items() if path.startswith(f"{block}."))
        names = [name for name, _ in mixture.module.named_parameters(recurse=False)]
        for weight in sorted((mixture.first, mixture.last), key=lambda weight: names.index(weight.name)):
            n_in, n_out = weight.features(mixture.module)
            yield Site(
                f"{path}.{weight.name}", "experts", mixture.module, layer, "mlp", in_features=n_in, out_features=n_out,
                experts=mixture.experts, stored_transposed=weight.transposed,
            )  # fmt: skip
