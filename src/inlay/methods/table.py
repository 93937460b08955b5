"""The one table of methods: the name people type, and the class behind it, imported when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the public names, for those who check types
    from .bitfit import BitFit as BitFit
    from .boft import BOFT as BOFT
    from .bottleneck import Houlsby as Houlsby
    from .bottleneck import Pfeiffer as Pfeiffer
    from .c3a import C3A as C3A
    from .contract import Method
    from .dora import DoRA as DoRA
    from .gralora import GraLoRA as GraLoRA
    from .head import ModulesToSave as ModulesToSave
    from .hira import HiRA as HiRA
    from .hra import HRA as HRA
    from .ia3 import IA3 as IA3
    from .loha import LoHa as LoHa
    from .lokr import LoKr as LoKr
    from .lora import LoRA as LoRA
    from .loreft import DiReFT as DiReFT
    from .loreft import LoReFT as LoReFT
    from .loreft import NoReFT as NoReFT
    from .mam import MAM as MAM
    from .miss import MiSS as MiSS
    from .norm import NormTuning as NormTuning
    from .oft import OFT as OFT
    from .parallel import Parallel as Parallel
    from .parallel import ScaledParallel as ScaledParallel
    from .prefix import PrefixTuning as PrefixTuning
    from .prompt import PromptTuning as PromptTuning
    from .pvera import PVeRA as PVeRA
    from .randlora import RandLoRA as RandLoRA
    from .road import RoAd as RoAd
    from .shira import SHiRA as SHiRA
    from .vera import VeRA as VeRA

CLASSES = {
    "lora": "lora.LoRA",
    "dora": "dora.DoRA",
    "vera": "vera.VeRA",
    "loha": "loha.LoHa",
    "lokr": "lokr.LoKr",
    "miss": "miss.MiSS",
    "oft": "oft.OFT",
    "boft": "boft.BOFT",
    "hra": "hra.HRA",
    "hira": "hira.HiRA",
    "road": "road.RoAd",
    "randlora": "randlora.RandLoRA",
    "c3a": "c3a.C3A",
    "gralora": "gralora.GraLoRA",
    "shira": "shira.SHiRA",
    "pvera": "pvera.PVeRA",
    "ia3": "ia3.IA3",
    "bitfit": "bitfit.BitFit",
    "houlsby": "bottleneck.Houlsby",
    "pfeiffer": "bottleneck.Pfeiffer",
    "parallel": "parallel.Parallel",
    "scaled_parallel": "parallel.ScaledParallel",
    "mam": "mam.MAM",
    "loreft": "loreft.LoReFT",
    "noreft": "loreft.NoReFT",
    "direft": "loreft.DiReFT",
    "norm": "norm.NormTuning",
    "prefix": "prefix.PrefixTuning",
    "prompt": "prompt.PromptTuning",
    "head": "head.ModulesToSave",
}


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
