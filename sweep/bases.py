"""One tiny random base: its model, rows that it takes, batches of them, and what belongs to each row of the output."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configs import tiny_config
from .inputs import TOKENS, Row, find_maker
from .uses import USES, types_of

__all__ = ["Base", "Batch", "NotBuilt"]


class NotBuilt(Exception):
    """The rules made no model of the type, or none that runs: says what was seen."""


@dataclass(frozen=True)
class Batch:
    """Inputs of a model, and for each row which of its columns hold its tokens."""

    inputs: Mapping[str, Tensor]
    spans: tuple[slice, ...]


@dataclass
class Base:
    """A model type in one use. `make` gives equal models each time."""

    use: str
    type_name: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    made: nn.Module | None = field(default=None, repr=False)

    @cached_property
    def original(self) -> Any:
        """The model that the others are copies of, in float32."""
        kind = types_of(USES[self.use])[self.type_name]
        more: dict[str, Any] = {"num_labels": 3} if USES[self.use].labels else {}
        try:
            model_class = getattr(transformers, kind)
            config_class = model_class.config_class or CONFIG_MAPPING[self.type_name]
            config = tiny_config(config_class, self.type_name, **more)
            prepare_config(config, self.use)
            torch.manual_seed(0)
            model = model_class(config).eval()
        except Exception as error:
            raise NotBuilt(f"{type(error).__name__}: {first_line(error)}") from error
        if (count := sum(p.numel() for p in model.parameters())) > 3_000_000:
            raise NotBuilt(f"the rules left {count} parameters")
        randomise(model)
        return model

    def make(self, dtype: torch.dtype | None = None) -> Any:
        """A fresh model with the same weights."""
        return copy.deepcopy(self.original).to(self.device, dtype or self.dtype)

    @cached_property
    def maker(self) -> Any:
        """Makes rows; see `inputs.find_maker`. Raises: NotBuilt where no batch is found that the model runs."""
        why = ""
        for dtype in (torch.float64, torch.float32):  # some compute in float32 whatever their weights are
            self.dtype = dtype
            found = find_maker(self.make(), self.use)
            if not isinstance(found, str):
                return found
            why = why or found
        self.dtype = torch.float64
        raise NotBuilt(why)

    def rows(self, count: int, lengths: Sequence[int] = (4, 5, 6)) -> list[Row]:
        return [self.maker.row(lengths[i % len(lengths)], i) for i in range(count)]

    @property
    def padded(self) -> bool:
        """Whether rows have lengths, so that batches have padding."""
        return "input_ids" in self.maker.row(4, 0)

    def run(self, model: Any, batch: Batch, **more: Any) -> list[Tensor]:
        """The output of each row, without that of its padding."""
        out = model(**cast(batch.inputs, model), **more)
        logits = logits_of(out)
        if len(logits) != len(batch.spans):
            raise NotBuilt(f"the output has {len(logits)} rows for {len(batch.spans)}")
        if (
            USES[self.use].tokens
            and "input_ids" in batch.inputs
            and logits.shape[1] == batch.inputs["input_ids"].shape[1]
        ):
            return [row[span] for row, span in zip(logits, batch.spans, strict=True)]
        return list(logits)

    def first_row(self, model: Any, batch: Batch) -> Tensor:
        """What the model makes of the first row's tokens: its output, or its last states where that is one for all."""
        if USES[self.use].tokens:
            return self.run(model, batch)[0]
        return logits_of(model.base_model(**cast(batch.inputs, model)))[0][batch.spans[0]]

    def batch(self, rows: Sequence[Row], side: str = "right", width: int = 0) -> Batch:
        """Rows of any lengths, padded on one side to the longest or to `width` columns."""
        return collate(rows, side, width, pad_id(self.original.config))


def collate(rows: Sequence[Row], side: str, width: int, pad: int) -> Batch:
    """Token inputs are padded, the others joined. No mask where no row has padding and none is asked for."""
    inputs: dict[str, Tensor] = {}
    lengths = [row["input_ids"].shape[1] if "input_ids" in row else 0 for row in rows]
    width = max([width, *lengths])
    spans = tuple(slice(width - n, width) if side == "left" else slice(0, n) for n in lengths)
    for name in dict.fromkeys(key for row in rows for key in row):
        pieces = [row[name] for row in rows if name in row]
        if name in TOKENS:
            filled = pieces[0].new_full((len(rows), width, *pieces[0].shape[2:]), pad if name == "input_ids" else 0)
            for index, (piece, span) in enumerate(zip(pieces, spans, strict=True)):
                filled[index, span] = piece[0]
            inputs[name] = filled
        else:
            inputs[name] = torch.cat(pieces)
    if "input_ids" in inputs:
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, span in enumerate(spans):
            mask[index, span] = 1
        inputs["attention_mask"] = mask
    return Batch(inputs, spans)


def cast(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Inputs where the model is, and its dtype for numbers that are not whole."""
    like = next(p for p in model.parameters() if p.is_floating_point())

    def moved(value: Tensor) -> Tensor:
        return value.to(like.device, like.dtype if value.is_floating_point() else None)

    return {k: moved(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def logits_of(out: Any) -> Tensor:
    """What the model says of each row: its logits, else the first floating tensor."""
    for name in ("logits", "prediction_logits"):
        if isinstance(found := getattr(out, name, None), Tensor):
            return found
    return next(v for v in out.values() if isinstance(v, Tensor) and v.is_floating_point())


def prepare_config(config: Any, use: str) -> None:
    """What a use needs of a configuration, and values that every type must have."""
    if use == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    decoder: Any = getattr(config, "decoder", None)
    if hasattr(config, "encoder") and hasattr(decoder, "add_cross_attention"):
        decoder.is_decoder = decoder.add_cross_attention = True  # two models as one: else nothing reads the encoder
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for one in (config, text):
        if getattr(one, "pad_token_id", None) is None:
            one.pad_token_id = 0
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 2


def pad_id(config: Any) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "pad_token_id", 0) or 0)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """The usual start is so small that attention would hardly matter, with norms, biases and gates that do nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        elif parameter.ndim == 2 and float(parameter.std()) == 0:  # what starts at zero hides all before it
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.12)
        elif parameter.ndim == 2 and float(parameter.std()) < 0.1:
            parameter.mul_(min(6.0, 0.12 / max(1e-3, float(parameter.std()))))


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:2])[:240] or type(error).__name__
