"""What other libraries call their methods, so that one that is not here yet is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ADAPTERHUB_CONFIGS", "CONVERSIONS", "PEFT_TYPES", "unread_architecture", "unread_type"]

CONVERSIONS: Mapping[str, str] = {
    "peft": "peft", "adapterhub": "adapterhub", "loralib": "loralib", "lora": "peft", "vllm": "peft",
}  # fmt: skip
"""What `inlay convert` writes an adapter as, and the format of `bank.save` that it does so in."""

PEFT_TYPES: Mapping[str, str] = dict(
    [
        ("ADALORA", "AdaLoRA"),
        ("ADAMSS", "AdaMSS"),
        ("ADAPTION_PROMPT", "LLaMA-Adapter"),
        ("BEFT", "BEFT"),
        ("BOFT", "BOFT"),
        ("C3A", "C³A"),
        ("CARTRIDGE", "Cartridge"),
        ("CPT", "CPT"),
        ("DEFT", "DEFT"),
        ("DELORA", "DeLoRA"),
        ("FOURIERFT", "FourierFT"),
        ("FROD", "FRoD"),
        ("GLORA", "GLoRA"),
        ("GRALORA", "GraLoRA"),
        ("HIRA", "HiRA"),
        ("HRA", "HRA"),
        ("IA3", "IA³"),
        ("LILY", "Lily"),
        ("LN_TUNING", "Norm tuning"),
        ("LOHA", "LoHa"),
        ("LOKR", "LoKr"),
        ("LORA", "LoRA"),
        ("MISS", "MiSS"),
        ("MULTITASK_PROMPT_TUNING", "Multitask prompt tuning"),
        ("OFT", "OFT"),
        ("OSF", "OSF"),
        ("PEANUT", "PEANuT"),
        ("POLY", "Poly"),
        ("PREFIX_TUNING", "Prefix tuning"),
        ("PROMPT_TUNING", "Prompt tuning"),
        ("PSOFT", "PSOFT"),
        ("PVERA", "PVeRA"),
        ("P_TUNING", "P-tuning"),
        ("RANDLORA", "RandLoRA"),
        ("ROAD", "RoAd"),
        ("SHADOW", "ShadowPEFT"),
        ("SHIRA", "SHiRA"),
        ("SUPERTUNING", "SuperTuning"),
        ("TINYLORA", "TinyLoRA"),
        ("TRAINABLE_TOKENS", "Trained tokens"),
        ("UNILORA", "UniLoRA"),
        ("VBLORA", "VB-LoRA"),
        ("VERA", "VeRA"),
        ("WAVEFT", "WaveFT"),
        ("XLORA", "X-LoRA"),
    ]
)
"""HF PEFT 0.21's types, with the names of the methods."""

ADAPTERHUB_CONFIGS: Mapping[str, str] = dict(
    [
        ("seq_bn", "Pfeiffer adapter"),
        ("double_seq_bn", "Houlsby adapter"),
        ("par_bn", "Parallel adapter"),
        ("scaled_par_bn", "Scaled parallel adapter"),
        ("seq_bn_inv", "Pfeiffer adapter with an invertible one"),
        ("double_seq_bn_inv", "Houlsby adapter with an invertible one"),
        ("compacter", "Compacter"),
        ("compacter++", "Compacter++"),
        ("prefix_tuning", "Prefix tuning"),
        ("prefix_tuning_flat", "Prefix tuning without its network"),
        ("prompt_tuning", "Prompt tuning"),
        ("lora", "LoRA"),
        ("ia3", "IA³"),
        ("vera", "VeRA"),
        ("dora", "DoRA"),
        ("dvora", "DVoRA"),
        ("mtl_lora", "MTL-LoRA"),
        ("loreft", "LoReFT"),
        ("noreft", "NoReFT"),
        ("direft", "DiReFT"),
        ("mam", "MAM adapter"),
        ("unipelt", "UniPELT"),
    ]
)
"""AdapterHub 1.3's strings for its configs, but for the older names of the same ones."""


def unread_type(kind: object) -> str:
    """What an adapter is whose `peft_type` no method here has, for "... holds"."""
    if isinstance(kind, str) and kind in PEFT_TYPES:
        return f"{PEFT_TYPES[kind]} ({kind}), which Inlay does not have yet"
    return f"an adapter of type {kind!r}, which neither HF PEFT 0.21 nor Inlay has"


def unread_architecture(name: str) -> str:
    """What an adapter of AdapterHub is whose `architecture` is read by nothing here, for "... holds"."""
    title = ADAPTERHUB_CONFIGS.get(name)
    if title is None:
        return f"an adapter of architecture {name!r}, which neither AdapterHub 1.3 nor Inlay has"
    return f"{title} ({name}), which Inlay does not have yet"
