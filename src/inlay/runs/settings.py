"""The settings of a run, by the names of the command's flags, and what may change between its parts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from inlay.bases.choices import DTYPES, QUANTIZATIONS
from inlay.data.tasks import TASKS
from inlay.errors import UsageError
from inlay.methods.table import METHODS
from inlay.runtime.sizes import size_mb
from inlay.training.plan import COURSE, Course, Plan, VirtualTokensAt
from inlay.values import Count, From, Help, OneOf, fields_of

if TYPE_CHECKING:
    from inlay.methods.contract import Method

__all__ = [
    "COURSE",
    "PANELS",
    "Settings",
    "VirtualTokensAt",
    "check_place",
    "differences",
    "make_method",
    "plan_of",
    "plan_record",
]

DATA, MODEL, BEST, SAFE, ASK = "Data", "Method and base", "Best adapter", "Memory and safety", "Ask of one there"
USUAL = "lora"
"""The method where none is named."""
PANELS = ("", DATA, MODEL, COURSE, BEST, SAFE, ASK)
"""The headings of `--help`, in their order."""


# ---- how people write some of them


def as_path(value: Any) -> Any:
    """`~` as the home folder: no shell sees the paths of a --config file, or of --out=~/runs."""
    return os.path.expanduser(value) if isinstance(value, str) else value


def as_paths(value: Any) -> Any:
    """One path as a list of one."""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, Sequence) or not value or not all(isinstance(path, str) and path for path in value):
        raise ValueError("Give a path, or a list of paths.")
    return [as_path(path) for path in value]


def as_pairs(value: Any) -> Any:
    """`key=value` texts as a mapping, whose values are read as YAML."""
    from inlay.data.yaml import read_yaml

    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, Sequence):
        return value
    found: dict[str, Any] = {}
    for entry in entries:
        key, mark, text = entry.partition("=") if isinstance(entry, str) else ("", "", "")
        if not mark or not key.strip() or not text.strip():
            raise ValueError(f"{entry!r} cannot be read. Write --set key=value.")
        try:
            found[key.strip()] = read_yaml(text)
        except ValueError:
            found[key.strip()] = text.strip()
    return found


def as_columns(value: Any) -> Any:
    """`text=NAME,label=NAME` as a mapping; a comma that no kind of column follows belongs to the name."""
    from inlay.data.choose import Columns

    known = [f.name for f in dataclasses.fields(Columns)]
    if isinstance(value, str):
        entries = re.split(rf",\s*(?=(?:{'|'.join(known)})\s*=)", value)
        pairs = [entry.partition("=") for entry in entries if entry.strip()]
        if not all(mark and name for _, mark, name in pairs):
            raise ValueError("Write text=NAME,label=NAME.")
        value = {key.strip(): name.strip() for key, _, name in pairs}
    if isinstance(value, Mapping):
        for name in value:
            if name not in known:
                raise ValueError(f"{name!r} is no kind of column. Known: {', '.join(known)}.")
    return value


def as_verbalizer(value: Any) -> Any:
    """`0=negative,1=positive|great`, or a mapping of labels to a word or to several, as labels and their words."""
    from inlay.data.labels import parse_verbalizer

    if isinstance(value, str) and value.lstrip().startswith("{"):
        from inlay.data.yaml import read_yaml

        try:
            value = read_yaml(value)
        except ValueError:
            raise ValueError("it is no mapping. Write 0=negative,1=positive|great.") from None
    if isinstance(value, str):
        try:
            value = parse_verbalizer(value)
        except UsageError as error:
            raise ValueError(f"{error.what}. {error.remedy}") from None
    return _worded(value)


def _worded(value: Any) -> Any:
    """A mapping of labels to words, checked: a word that stood for two labels could not tell them apart."""
    from inlay.data.labels import label_key

    if not isinstance(value, Mapping) or not value:
        raise ValueError("Write 0=negative,1=positive|great, or a mapping of labels to words.")
    words: dict[Any, Any] = {}
    for label, word in value.items():
        name = str(label).lower() if isinstance(label, bool) else str(label).strip() if isinstance(label, str) else None
        name = name or label_key(label)
        if label_key(name) in map(label_key, words):
            raise ValueError(f"the label {name!r} is named twice: write its words as one list.")
        words[name] = [word] if isinstance(word, str) else word
    if None in words or "" in words:
        raise ValueError("a label is empty: name each label.")
    for label, listed in words.items():
        if not isinstance(listed, Sequence) or not listed or not all(isinstance(w, str) and w.strip() for w in listed):
            raise ValueError(f"the words for {label!r} are {listed!r}: give a word, or a list of words.")
    owners: dict[str, str] = {}
    for label, listed in words.items():
        for word in listed:
            if owners.setdefault(word.strip(), label) != label:
                raise ValueError(f"{word!r} stands for {owners[word.strip()]!r} and for {label!r}: part them.")
    return words


def as_share(value: Any) -> Any:
    """A share of the rows, or a file's path, as text."""
    try:
        share = float(value)
    except (TypeError, ValueError):
        return as_path(value)
    if isinstance(value, bool) or not math.isfinite(share) or not 0 <= share < 1:
        raise ValueError("Choose a share from 0 to below 1, or a file.")
    return str(value)


def as_limit(value: Any) -> Any:
    """ "4GB", "auto", or None for none."""
    if value == "none":
        return None
    if isinstance(value, str) and value != "auto":
        try:
            size_mb(value)
        except UsageError as error:
            raise ValueError(error.remedy) from None
    elif value != "auto":
        raise ValueError("Write 4GB or 900MB, auto or none.")
    return value


Split = Annotated[str, OneOf(("paragraph", "line", "whole"), "split"), Help("what a row of a .txt file is", DATA)]
Paths = Annotated[
    Sequence[str],
    From(as_paths),
    Help("csv, tsv, json, jsonl, parquet, txt (.gz too), a datasets folder, or - (standard input); repeatable"),
]
Columns = Annotated[
    Mapping[str, str], From(as_columns), Help("text=NAME,label=NAME, prompt=, completion=, messages=", DATA)
]
Template = Annotated[
    str | None, Help('"Review: {text}\\nSentiment:{answer}", chat for the model\'s own, or a .jinja file', DATA)
]
Verbalizer = Annotated[
    Mapping[str, Sequence[str]] | None, From(as_verbalizer), Help("words for labels: 0=negative,1=positive|great", DATA)
]
Set = Annotated[
    Mapping[str, Any], From(as_pairs), Help("a setting of the method, as --set r=16; see `inlay methods`", MODEL)
]
Base = Annotated[str, From(as_path), Help("smollm2, a model folder, a .gguf file or a hub id (org/name)", MODEL)]
Dtype = Annotated[str, OneOf(DTYPES, "dtype"), Help("number format; auto takes the fastest this machine has", MODEL)]
Device = Annotated[str | None, Help("cpu, cuda, ...; the best there is where unset", MODEL)]
Quantize = Annotated[
    str | None,
    OneOf(QUANTIZATIONS, "quantization"),
    Help("4bit: the base's linear layers in NF4 (bitsandbytes)", MODEL),
]
MethodName = Annotated[str, OneOf(METHODS, "method"), Help("how the base is adapted; see `inlay methods`", MODEL)]
TokensAtOnce = Annotated[Count, Help("tokens in one forward; lower saves memory", SAFE)]
MaxLength = Annotated[Count, Ge(2), Help("tokens in a row; prompts are cut, answers never", DATA)]
TaskName = Annotated[
    str | None,
    OneOf(TASKS, "task"),
    Help("generate: write the answer; classify, regress, tag: train a head. What fits the base where unset", DATA),
]


@dataclass(frozen=True, kw_only=True)
class Settings(Course):
    """Everything a run depends on, by the names of the command's flags."""

    data: Paths
    out: Annotated[str, From(as_path), Help("the run's folder")]
    base: Base = "smollm2"
    method: MethodName = USUAL
    set: Set = field(default_factory=dict)
    init_from: Annotated[str | None, Help("an adapter to go on from: its folder, or its run's", MODEL, "--from")] = None
    max_length: MaxLength = 512
    dtype: Dtype = "auto"
    device: Device = None
    quantize: Quantize = None
    limit: Annotated[Count | None, Help("rows to use, drawn by the seed", DATA)] = None
    heldout: Annotated[str, From(as_share), Help("share of the rows to score on, or a file", BEST)] = "0.05"
    group: Annotated[str | None, Help("column whose rows of one value are held out together", BEST)] = None
    eval_every: Annotated[Count | None, Help("steps between two scorings; four in a run where unset", BEST)] = None
    metric: Annotated[str | None, Help("what is best: loss (default), accuracy, f1; perplexity, exact_match", BEST)] = (
        None
    )
    patience: Annotated[Count | None, Help("stop after so many scorings without a better one", BEST)] = None
    task: TaskName = None
    template: Template = None
    verbalizer: Verbalizer = None
    columns: Columns = field(default_factory=dict)
    split: Split = "paragraph"
    virtual_tokens_at: VirtualTokensAt = "start"
    tokens_at_once: TokensAtOnce = 4096
    gradient_checkpointing: Annotated[bool, Help("save memory, take a third more time", SAFE)] = False
    memory_limit: Annotated[
        str | None,
        From(as_limit),
        Help("4GB, none, or what the machine has (auto); near it, forwards get smaller", SAFE),
    ] = "auto"
    checkpoint_every: Annotated[Count | None, Help("steps between two checkpoints; 5 minutes where unset", SAFE)] = None
    keep_checkpoints: Annotated[Count, Help("how many to keep", SAFE)] = 2
    resume: Annotated[bool, Help("go on with the run in --out; flags that are left out are as before", SAFE)] = False
    track: Annotated[str | None, Help("tensorboard, wandb, mlflow, ... besides metrics.jsonl")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heldout == "-" and "-" in self.data:
            raise UsageError("data and heldout are both standard input", "Name a file for one of them.")
        if self.init_from is not None and (self.set or self.method != USUAL):
            raise UsageError("--from takes method and settings from the adapter", "Leave --method and --set out.")


FREE = ("out", "resume", "checkpoint_every", "keep_checkpoints", "memory_limit", "track", "base", "data", "device")
"""Settings that may differ when a run is resumed: they change nothing, or what they name is compared by content."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of two runs' settings differs, for people; settings that change no result are left out."""
    names = [name for name in {**before, **now} if name not in FREE]
    usual = {f.name: f.default for f in fields_of(Settings)}
    values = [(name, before.get(name, usual.get(name)), now.get(name)) for name in names]
    return [f"{name} was {old!r}, is {new!r}" for name, old, new in values if old != new]


def make_method(name: str, values: Mapping[str, Any]) -> Method:
    """The method called `name` with some settings. Raises: UsageError naming methods or fields there are."""
    if name not in METHODS:
        raise UsageError(f"no method is called {name!r}", f"Methods: {', '.join(METHODS)}.")
    fields = [f.name for f in fields_of(METHODS[name])]
    for key in values:
        if key not in fields:
            raise UsageError(f"{name} has no setting {key!r}", f"Settings: {', '.join(fields)}.")
    return METHODS[name](**values)


def plan_of(settings: Settings, method: Method, name: str) -> Plan:
    """The plan that `settings` make for the adapter `name`. Raises: UsageError."""
    check_place(method, settings.virtual_tokens_at)
    course = {f.name: getattr(settings, f.name) for f in dataclasses.fields(Course)}
    return Plan(name, method, **course)


def check_place(method: Method, place: str | None) -> None:
    """Raises: UsageError where a method has no virtual tokens to stand at a place."""
    if place not in (None, "start") and not method.virtual_length:
        why = "keys of a prefix stand before every token" if method.prefix_length else "it has no virtual tokens"
        raise UsageError(f"{type(method).title} cannot act at {place} ({why})", "Use start.")


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan as JSON: its course, the method's name (its title, for one of no table) and all the method's settings."""
    kind = type(plan.method)
    name = next((name for name, known in METHODS.items() if known is kind), kind.title)
    values = dataclasses.asdict(plan) | {"method": name, "set": dataclasses.asdict(plan.method)}
    return json.loads(json.dumps(values, default=str))
