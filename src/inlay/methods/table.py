"""The one table of methods: the name people type, and the class behind it, imported when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the public names, for those who check types
    from .adalora import AdaLoRA as AdaLoRA
    from .adapter_plus import AdapterPlus as AdapterPlus
    from .alora import ALoRA as ALoRA
    from .bitfit import BitFit as BitFit
    from .boft import BOFT as BOFT
    from .c3a import C3A as C3A
    from .compacter import Compacter as Compacter
    from .compacter_plus_plus import CompacterPlusPlus as CompacterPlusPlus
    from .contract import Method
    from .dora import DoRA as DoRA
    from .full import Full as Full
    from .fusion import Fusion as Fusion
    from .gated_lora import GatedLoRA as GatedLoRA
    from .gated_prefix import GatedPrefix as GatedPrefix
    from .gralora import GraLoRA as GraLoRA
    from .head import ModulesToSave as ModulesToSave
    from .hira import HiRA as HiRA
    from .houlsby import Houlsby as Houlsby
    from .hra import HRA as HRA
    from .ia3 import IA3 as IA3
    from .invertible import Invertible as Invertible
    from .invertible_presets import HoulsbyInv as HoulsbyInv
    from .invertible_presets import PfeifferInv as PfeifferInv
    from .llama_adapter import LlamaAdapter as LlamaAdapter
    from .loha import LoHa as LoHa
    from .lokr import LoKr as LoKr
    from .lora import LoRA as LoRA
    from .lora_bias import LoRABias as LoRABias
    from .lora_fa import LoRAFA as LoRAFA
    from .loreft import DiReFT as DiReFT
    from .loreft import LoReFT as LoReFT
    from .loreft import NoReFT as NoReFT
    from .mam import MAM as MAM
    from .merged_linear import MergedLoRA as MergedLoRA
    from .miss import MiSS as MiSS
    from .multitask import MultitaskPromptTuning as MultitaskPromptTuning
    from .norm import NormTuning as NormTuning
    from .oft import OFT as OFT
    from .parallel import Parallel as Parallel
    from .parallel import ScaledParallel as ScaledParallel
    from .pfeiffer import Pfeiffer as Pfeiffer
    from .prefix import PrefixTuning as PrefixTuning
    from .prompt import PromptTuning as PromptTuning
    from .ptuning import PTuning as PTuning
    from .ptuning_v2 import PTuningV2 as PTuningV2
    from .pvera import PVeRA as PVeRA
    from .randlora import RandLoRA as RandLoRA
    from .road import RoAd as RoAd
    from .selective import Selective as Selective
    from .shira import SHiRA as SHiRA
    from .trained_tokens import TrainableTokens as TrainableTokens
    from .unipelt import UniPELT as UniPELT
    from .unmoved import UnmovedPrefix as UnmovedPrefix
    from .vera import VeRA as VeRA

GROUPS: Mapping[str, Mapping[str, str]] = {
    "Low-rank products beside the weights": {
        "lora": "lora.LoRA",
        "dora": "dora.DoRA",
        "adalora": "adalora.AdaLoRA",
        "lora_fa": "lora_fa.LoRAFA",
        "lora_bias": "lora_bias.LoRABias",
        "merged_lora": "merged_linear.MergedLoRA",
        "alora": "alora.ALoRA",
        "gated_lora": "gated_lora.GatedLoRA",
        "vera": "vera.VeRA",
        "pvera": "pvera.PVeRA",
        "randlora": "randlora.RandLoRA",
        "loha": "loha.LoHa",
        "gralora": "gralora.GraLoRA",
        "hra": "hra.HRA",
    },
    "Other changes of the weights": {
        "lokr": "lokr.LoKr",
        "miss": "miss.MiSS",
        "oft": "oft.OFT",
        "boft": "boft.BOFT",
        "hira": "hira.HiRA",
        "road": "road.RoAd",
        "c3a": "c3a.C3A",
        "shira": "shira.SHiRA",
    },
    "Networks behind attention and MLP": {
        "houlsby": "houlsby.Houlsby",
        "pfeiffer": "pfeiffer.Pfeiffer",
        "parallel": "parallel.Parallel",
        "scaled_parallel": "parallel.ScaledParallel",
        "adapter_plus": "adapter_plus.AdapterPlus",
        "compacter": "compacter.Compacter",
        "compacter++": "compacter_plus_plus.CompacterPlusPlus",
        "invertible": "invertible.Invertible",
        "houlsby_inv": "invertible_presets.HoulsbyInv",
        "pfeiffer_inv": "invertible_presets.PfeifferInv",
        "fusion": "fusion.Fusion",
    },
    "Keys and values, or embeddings, before the text": {
        "prefix": "prefix.PrefixTuning",
        "ptuning_v2": "ptuning_v2.PTuningV2",
        "unmoved_prefix": "unmoved.UnmovedPrefix",
        "gated_prefix": "gated_prefix.GatedPrefix",
        "prompt": "prompt.PromptTuning",
        "ptuning": "ptuning.PTuning",
        "multitask": "multitask.MultitaskPromptTuning",
        "llama_adapter": "llama_adapter.LlamaAdapter",
    },
    "The stream behind each block": {
        "loreft": "loreft.LoReFT",
        "noreft": "loreft.NoReFT",
        "direft": "loreft.DiReFT",
    },
    "The base's own scales, biases, rows and weights": {
        "ia3": "ia3.IA3",
        "bitfit": "bitfit.BitFit",
        "norm": "norm.NormTuning",
        "trained_tokens": "trained_tokens.TrainableTokens",
        "selective": "selective.Selective",
        "full": "full.Full",
        "head": "head.ModulesToSave",
    },
    "Several of these in one adapter": {
        "mam": "mam.MAM",
        "unipelt": "unipelt.UniPELT",
    },
}
"""By what they touch: the names people type, with the module and class of each."""
CLASSES = {name: place for group in GROUPS.values() for name, place in group.items()}


class _Table(Mapping[str, "type[Method]"]):
    """Names alone need no torch, so that `--help` is quick."""

    def __getitem__(self, name: str) -> type[Method]:
        module, _, kind = CLASSES[name].partition(".")
        return getattr(import_module(f".{module}", __package__), kind)

    def __iter__(self) -> Iterator[str]:
        return iter(CLASSES)

    def __len__(self) -> int:
        return len(CLASSES)

    def __contains__(self, name: object) -> bool:
        return name in CLASSES


METHODS: Mapping[str, type[Method]] = _Table()


Described = list[tuple[str, dict[str, Any], dict[str, list[tuple[str, Any]]]]]


def described(methods: Sequence[Method]) -> Described:
    """Methods as names and settings, for a checkpoint; mappings apart, as pairs, whose order means something."""
    names = {kind: name for name, kind in CLASSES.items()}
    found: Described = []
    for method in methods:
        kind = f"{type(method).__module__.rpartition('.')[2]}.{type(method).__name__}"
        settings = {field.name: getattr(method, field.name) for field in fields(method) if field.init}
        pairs = {name: [*value.items()] for name, value in settings.items() if isinstance(value, Mapping)}
        plain = {name: value for name, value in settings.items() if name not in pairs}
        found.append((names[kind], plain, pairs))
    return found


def made_again(saved: Described) -> list[Method]:
    """The inverse of `described`."""
    return [METHODS[name](**plain, **{key: dict(own) for key, own in pairs.items()}) for name, plain, pairs in saved]
