"""The smallest forward that a base can run: its inputs by rules, and a run that leaves nothing behind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["in_eval", "plain_tokens", "quietly", "run_tiny", "tiny_inputs"]

Inputs = dict[str, Any]


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without the model's own dropout; training flags are as before behind it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random numbers are as before behind it."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with in_eval(model), torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
        yield


def run_tiny(model: nn.Module, before: Callable[[], None] = lambda: None) -> str:
    """Run the first tiny batch that `model` takes; "" where one ran, else the first line of the likeliest one's error.

    `before` is called before each try, to forget what a broken one left.
    """
    errors: list[str] = []
    if all(parameter.is_meta for parameter in model.parameters()):
        return "the model's parameters hold no numbers"
    with quietly(model):
        for make in tiny_inputs(model):
            before()
            _run_towers(model)
            try:
                model(**make())
                return ""
            except Exception as error:  # whatever the model lacks, the next batch may have
                errors.append(next(iter(str(error).strip().splitlines()), "") or type(error).__name__)
    before()
    return errors[0] if errors else "the model names no input that is known here"


def _run_towers(model: Any) -> None:
    """Run what turns images and sounds into states for a text: forwards of text alone leave it out."""
    taken = inspect.signature(model.forward).parameters
    for name, argument in TOWERS.items():
        run = getattr(model, name, None)
        if argument not in taken or argument == getattr(model, "main_input_name", ""):
            continue
        ways = [partial(_run_tower, run, model, argument)] if run is not None else []
        for way in [*ways, *(partial(_run_tower, tower, tower, argument) for tower in _towers(model, argument))]:
            try:
                with _nothing_left(model):
                    way()
                break
            except Exception:  # it takes more than that
                continue


@contextmanager
def _nothing_left(model: nn.Module) -> Iterator[None]:
    """Take off what transformers' own capturing of states leaves on modules."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    before = [(m, set(vars(m)), [set(vars(m)[name]) for name in names]) for m in model.modules()]
    try:
        yield
    finally:
        for module, held, hooks in before:
            for name in set(vars(module)) - held:
                delattr(module, name)
            for name, numbers in zip(names, hooks, strict=True):
                for number in set(vars(module)[name]) - numbers:
                    del vars(module)[name][number]
                    for kind in ("_with_kwargs", "_always_called"):
                        vars(module).get(name + kind, {}).pop(number, None)


def _towers(model: nn.Module, argument: str) -> list[Any]:
    """The outermost modules that are models of `argument` of their own."""
    found = [m for m in model.children() if getattr(m, "main_input_name", None) == argument and hasattr(m, "config")]
    return found or [tower for child in model.children() for tower in _towers(child, argument)]


def _run_tower(run: Any, model: Any, argument: str) -> None:
    forward = run.forward if isinstance(run, nn.Module) else run
    run(**_tower_inputs(model, argument, "image_grid_thw" in inspect.signature(forward).parameters))


def _tower_inputs(model: Any, argument: str, in_one_sequence: bool) -> Inputs:
    """One image or sound, as a tower takes it; one of two patches by two where all patches are in one sequence."""
    config, first = model.config, next(model.parameters())
    inner = getattr(config, "vision_config", config)
    if not in_one_sequence:
        return {argument: MAKERS[argument](model, config).to(first.device, first.dtype)}
    side, frames = _number(inner, 14, "patch_size"), _number(inner, 2, "temporal_patch_size")
    width = _number(inner, 3, "in_channels", "in_chans", "num_channels") * frames * side**2
    square = _number(inner, 2, "spatial_merge_size")
    grid = torch.tensor([[1, square, square]], device=first.device)
    return {argument: _noise(square**2, width).to(first.device, first.dtype), "image_grid_thw": grid}


def tiny_inputs(model: Any) -> Iterator[Callable[[], Inputs]]:
    """Makers of batches that `model` may take, the likeliest first."""
    config = getattr(model, "config", None)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    taken = inspect.signature(model.forward).parameters
    own = {name: make for name, make in MAKERS.items() if name in taken}
    main = getattr(model, "main_input_name", "input_ids")

    def made(*names: str) -> Inputs:
        tensors = {name: own[name](model, config) for name in names if name in own}
        return {k: t.to(device, dtype if t.is_floating_point() else t.dtype) for k, t in tensors.items()}

    decoder = [name for name in ("decoder_input_ids",) if name in own and getattr(config, "is_encoder_decoder", False)]
    tries = ((main, *decoder), ("input_ids", *decoder), (main, "input_ids", *decoder), tuple(own))
    for names in dict.fromkeys(tries):
        if any(name in own for name in names):
            yield partial(made, *names)
    if "encoder_hidden_states" in taken and main in own:
        yield lambda: {**made(main), "encoder_hidden_states": _noise(1, 2, _width(config)).to(device, dtype)}
    if hasattr(model, "dummy_inputs"):
        yield lambda: {name: value.to(device) for name, value in model.dummy_inputs.items()}


def plain_tokens(model: Any, count: int) -> list[int]:
    """`count` ids, no two alike, that mean nothing special to the model; fewer where its table is smaller."""
    rows = _rows(model)
    special = {value for config in _configs(model) for value in _special(config)}
    plain = list(islice((i for i in range(3, rows) if i not in special), count))
    return plain or list(range(min(rows, count)))


def _rows(model: Any) -> int:
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError, IndexError):
        return _number(getattr(model, "config", None), 64, "vocab_size")


def _special(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index", "token_ids", "_id")):
            yield from (v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int))


def _configs(model: Any) -> list[Any]:
    config = getattr(model, "config", None)
    if config is None:
        return []
    return [config, *(v for v in vars(config).values() if hasattr(v, "to_dict") and hasattr(v, "model_type"))]


def _ids(model: Any, config: Any) -> Tensor:
    """Two plain tokens and the end of the text, which some heads look for."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    end = getattr(text, "eos_token_id", None)
    end = end[0] if isinstance(end, (list, tuple)) and end else end
    return torch.tensor(
        [[*plain_tokens(model, 2), *([end] if isinstance(end, int) and 0 <= end < _rows(model) else [])]]
    )


def _pixels(model: Any, config: Any) -> Tensor:
    encoder = getattr(config, "encoder", None)
    vision = getattr(config, "vision_config", None) or (encoder if hasattr(encoder, "image_size") else config)
    size = getattr(vision, "image_size", None) or 4 * _number(vision, 8, "patch_size")
    high, wide = size if isinstance(size, (list, tuple)) else (size, size)
    frames = getattr(vision, "num_frames", None)
    channels = _number(vision, 3, "num_channels", "in_channels", "in_chans")
    return _noise(1, *([frames] if isinstance(frames, int) else []), channels, high, wide)


def _features(model: Any, config: Any) -> Tensor:
    """Spectra: (1, mel bins, frames) for models of a fixed count of frames, else (1, frames, mel bins)."""
    sound = getattr(config, "audio_config", None) or config
    bins = _number(sound, 80, "feature_projection_input_dim", "num_mel_bins", "input_feat_per_channel", "feature_size")
    frames = getattr(sound, "max_source_positions", None)
    apart = hasattr(sound, "input_feat_per_channel") or hasattr(sound, "feature_projection_input_dim")
    if apart or not isinstance(frames, int):
        return _noise(1, 16, bins)
    return _noise(1, bins, 2 * frames)


def _values(model: Any, config: Any) -> Tensor:
    """A spectrum (1, frames, mel bins), or as much of a wave (1, samples) as its convolutions make three frames of."""
    if isinstance(getattr(config, "max_length", None), int) and hasattr(config, "num_mel_bins"):
        return _noise(1, config.max_length, config.num_mel_bins)
    if not hasattr(config, "conv_kernel"):
        return _noise(1, *([1] if hasattr(config, "audio_channels") else []), 4000)
    samples = 3
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return _noise(1, samples)


MAKERS: dict[str, Callable[[Any, Any], Tensor]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _values,
    "bbox": lambda model, config: torch.zeros(*_ids(model, config).shape, 4, dtype=torch.long),
}
"""The inputs that are known here, by the names of the arguments."""

TOWERS = {"get_image_features": "pixel_values", "get_audio_features": "input_features"}
"""Methods of models of text with images or sounds, and what they are given."""


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _width(config: Any) -> int:
    return _number(getattr(config, "encoder", config), 8, "hidden_size", "d_model")


def _number(config: Any, default: int, *names: str) -> int:
    return next((v for name in names if isinstance(v := getattr(config, name, None), int)), default)
