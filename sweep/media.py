"""Images and sounds of rows: makers of them by the arguments of a model's forward, the likeliest first."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .inputs import Maker, Row

__all__ = ["makers"]

Media = Callable[[torch.Generator], Row]


def makers(model: Any, use: str) -> Iterator[Maker]:
    """Makers to try. A model of text and images is tried with images first, then with text alone; one that reads no
    text but writes some, with images alone."""
    taken = inspect.signature(model.forward).parameters
    if use == "vision-text":
        text = "input_ids" in taken
        for media in (*_images(model), *_sounds(model)):
            for holders in placeholders(model, media) if text else ((),):
                yield Maker(model, use, media, holders, text)
        yield Maker(model, use)
        return
    if use in ("image", "ctc", "sound", "speech") or "input_ids" not in taken:
        for media in (*_images(model), *_sounds(model)):
            yield Maker(model, use, media, text=False)
        if use == "image" and "input_ids" not in taken:
            return
    if "input_ids" in taken:
        yield Maker(model, use)


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _images(model: Any) -> Iterator[Media]:
    taken = inspect.signature(model.forward).parameters
    name = next((n for n in ("pixel_values", "inputs", "flattened_patches", "pixel_values_images") if n in taken), "")
    if not name:
        return
    config = model.config
    vision = _part(config, "vision_config", "vision_encoder_config", "encoder")
    channels = _number(vision, 3, "num_channels", "in_channels", "in_chans")
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 16
    high, wide = size if isinstance(size, (list, tuple)) else (size, size)
    patch = _number(vision, 4, "patch_size", "spatial_patch_size")
    if "image_grid_thw" in taken or "grid_thw" in taken:
        merge = _number(vision, 2, "spatial_merge_size")
        width = channels * patch * patch * _number(vision, 1, "temporal_patch_size")
        side = 2 * merge
        grid: Row = {"image_grid_thw": torch.tensor([[1, side, side]])}
        if "image_merge_sizes" in taken:
            grid["image_merge_sizes"] = torch.tensor([merge])
        for shape in (
            (side * side, width),
            (side * side, channels, patch, patch),
            (1, side * side, channels, patch, patch),
        ):
            yield lambda g, shape=shape: {name: _noise(shape, g), **grid}
    if "spatial_shapes" in taken:
        for key in ("pixel_attention_mask", "pixel_mask"):
            if key in taken:
                mask: Row = {key: torch.ones(1, 16, dtype=torch.long), "spatial_shapes": torch.tensor([[4, 4]])}
                yield lambda g, mask=mask: {name: _noise((1, 16, channels * patch * patch), g), **mask}
    if "aspect_ratio_ids" in taken:
        tiles: Row = {
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        }
        yield lambda g: {name: _noise((1, 1, 1, channels, high, wide), g), **tiles}
    sizes: Row = {"image_sizes": torch.tensor([[high, wide]])} if "image_sizes" in taken else {}
    shapes = ((1, channels, high, wide), (1, 1, channels, high, wide), (1, 2, channels, high, wide))
    larger = ((1, channels, 32, 32), (1, channels, 64, 64), (1, 16, channels * patch * patch))
    for more in ({}, sizes) if sizes else ({},):
        for shape in (*shapes, *larger):
            yield lambda g, shape=shape, more=more: {name: _noise(shape, g), **more}
    frames = _number(vision, 2, "num_frames")
    yield lambda g: {name: _noise((1, frames, channels, high, wide), g)}


def _sounds(model: Any) -> Iterator[Media]:
    taken = inspect.signature(model.forward).parameters
    config = model.config
    sound = next(
        (v for n in ("audio_config", "encoder_config", "audio_encoder_config") if (v := getattr(config, n, None))),
        config,
    )
    bins = _number(sound, 80, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "feature_size",
                   "n_mels", "input_dim", "input_feat_size")  # fmt: skip
    if "input_features" in taken:
        frames = 2 * _number(sound, 8, "max_source_positions")
        masks = [key for key in ("feature_attention_mask", "input_features_mask") if key in taken]
        counted = (((1, bins, frames), frames), ((1, 32, bins), 32), ((1, bins, 32), 32), ((1, 64, bins), 64))
        for shape, count in counted:
            more: Row = {key: torch.ones(1, count, dtype=torch.long) for key in masks}
            yield lambda g, shape=shape, more=more: {"input_features": _noise(shape, g), **more}
    name = next((n for n in ("input_values", "audio_values") if n in taken), "")
    if name:
        if isinstance(getattr(config, "max_length", None), int) and hasattr(config, "num_mel_bins"):
            yield lambda g: {name: _noise((1, config.max_length, config.num_mel_bins), g)}
        for shape in ((1, _samples(sound)), (1, 4000), (1, 1, 4000), (1, 32, bins)):
            yield lambda g, shape=shape: {name: _noise(shape, g)}


def _samples(sound: Any) -> int:
    """As much of a wave as its convolutions make six frames of."""
    count = 6
    for kernel, stride in zip(
        reversed(getattr(sound, "conv_kernel", ())), reversed(getattr(sound, "conv_stride", ())), strict=True
    ):
        count = (count - 1) * stride + kernel
    return count


def placeholders(model: Any, media: Media) -> Iterator[tuple[int, ...]]:
    """Ids that stand for the images of a row, as many as their features."""
    config = model.config
    names = (
        "image_token_id",
        "image_token_index",
        "audio_token_id",
        "audio_token_index",
        "image_patch_id",
        "media_token_id",
    )
    holder = next((v for n in names if isinstance(v := getattr(config, n, None), int)), None)
    if holder is None:
        yield ()
        return
    row = media(torch.Generator().manual_seed(0))
    around = [getattr(config, n, None) for n in ("vision_start_token_id", "vision_end_token_id")]
    first, last = ([v] if isinstance(v, int) and v < 128 else [] for v in around)
    for count in dict.fromkeys((_count(model, row), _asked(model, row), 16, 4, 32, 0)):
        yield (*first, *[holder] * count, *last) if count else ()


def _asked(model: Any, row: Row) -> int:
    """How many placeholders the model asks for in its error, where it is run without any."""
    from .bases import cast
    from .inputs import plain_ids

    ids = torch.tensor([plain_ids(model.config)[:4]])
    try:
        with torch.no_grad():
            model(**cast({"input_ids": ids, "attention_mask": torch.ones_like(ids), **row}, model))
    except Exception as error:
        found = re.search(r"features:? (\d+)", str(error))
        return int(found.group(1)) if found else 0
    return 0


def _count(model: Any, row: Row) -> int:
    """How many features an image or a sound of a row has: what the model's own feature extractor gives."""
    from .bases import cast

    sound = any(name.startswith("input_") for name in row)
    find = getattr(model, "get_audio_features" if sound else "get_image_features", None) or getattr(
        getattr(model, "model", None), "get_audio_features" if sound else "get_image_features", None
    )
    if find is None:
        return 0
    accepted = inspect.signature(find).parameters
    whole = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    try:
        with torch.no_grad():
            found = find(**{k: v for k, v in cast(row, model).items() if whole or k in accepted})
    except Exception:
        return 0
    return _features(found)


def _features(found: Any) -> int:
    """The vectors in what a feature extractor gave: a tensor, a list of them, or a record with them."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            return _features(getattr(found, name))
    if isinstance(found, (list, tuple)):
        return sum(_features(one) for one in found)
    return found[..., 0].numel() if hasattr(found, "numel") else 0


def _part(config: Any, *names: str) -> Any:
    """The first part of a configuration that is there, else itself."""
    return next((part for name in names if (part := getattr(config, name, None)) is not None), config)


def _number(config: Any, default: int, *names: str) -> int:
    return next((v for name in names if isinstance(v := getattr(config, name, None), int)), default)
