"""The kinds of use: which classes transformers registers for each, and how a model's outputs are read row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["USES", "Use", "types_of"]


@dataclass(frozen=True)
class Use:
    """`mapping` names transformers' table of model classes. `labels`: the class has a head with `num_labels`. `tokens`:
    outputs belong to tokens of the text, so that a padded row's are a part of its row.
    """

    name: str
    mapping: str
    labels: bool = False
    tokens: bool = False


USES = {
    use.name: use
    for use in (
        Use("causal", "CAUSAL_LM", tokens=True),
        Use("masked", "MASKED_LM", tokens=True),
        Use("seq2seq", "SEQ_TO_SEQ_CAUSAL_LM"),
        Use("classify", "SEQUENCE_CLASSIFICATION", labels=True),
        Use("image", "IMAGE_CLASSIFICATION", labels=True),
        Use("ctc", "CTC"),
        Use("sound", "AUDIO_CLASSIFICATION", labels=True),
        Use("speech", "SPEECH_SEQ_2_SEQ"),
        Use("vision-text", "MULTIMODAL_LM", tokens=True),
    )
}
SAME_USE = dict.fromkeys(("CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM"), "MULTIMODAL_LM")


def types_of(use: Use) -> dict[str, str]:
    """Model types, with the name of the class that transformers registers for them first."""
    from transformers.models.auto import modeling_auto

    def table(mapping: str) -> dict[str, Any]:
        return dict(getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES"))

    found = {name: kind[0] if isinstance(kind, tuple) else kind for name, kind in table(use.mapping).items()}
    for other in [m for m in (u.mapping for u in USES.values()) if m != use.mapping]:
        if use.mapping in SAME_USE and other == SAME_USE[use.mapping]:
            same = table(other)
            found = {name: kind for name, kind in found.items() if same.get(name) != kind}
    return found
