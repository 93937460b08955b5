"""Commands from settings classes: each field is a flag, an entry of a --config file, and a line of `--help`."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from inlay.data.yaml import read_yaml
from inlay.errors import UsageError
from inlay.runs.processes import check_one_process
from inlay.runs.settings import PANELS
from inlay.runs.together import helped
from inlay.values import Checked, Field, From, OneOf, fields_of

from .common import Json, guarded

__all__ = ["command"]

C = TypeVar("C", bound=Checked)
Work = Callable[[C, bool], None]
Earlier = Callable[[dict[str, Any]], Mapping[str, Any]]


def command(
    kind: type[C], doing: str, earlier: Earlier | None = None, several: bool = False, without: Collection[str] = ()
) -> Callable[[Work[C]], Callable[..., None]]:
    """Makes a function of settings and `as_json` a command. Flags win over --config, that over `earlier` settings
    (those of a run that is resumed), these over defaults. `doing` says what is done, for errors. Where `several`
    processes may do it together, the first one alone reads settings. Fields `without` a flag keep their defaults.
    """

    def made(work: Work[C]) -> Callable[..., None]:
        def call(**flags: Any) -> None:
            with guarded(doing):
                if not several:
                    check_one_process(doing)
                elif helped() is not None:
                    return
                as_json, config = flags.pop("json"), flags.pop("config")
                work(_settings(kind, fields, flags, config, earlier), as_json)

        fields = {field.name: field for field in fields_of(kind) if field.name not in without}
        call.__name__, call.__doc__ = work.__name__, work.__doc__
        parameters = [*map(_parameter, sorted(fields.values(), key=_panel)), CONFIG, JSON]
        call.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return made


def _settings(
    kind: type[C], fields: Mapping[str, Field], flags: Mapping[str, Any], config: str | None, earlier: Earlier | None
) -> C:
    """Raises: UsageError naming a setting that does not exist, is missing or wrong."""
    for name, value in flags.items():
        if value == "" or (isinstance(value, list) and "" in value):  # a shell's variable that is not set
            raise UsageError(f"{fields[name].flag} is empty", "Give a value, or leave it out.")
    given = from_file(config, fields)
    flagged = {name: _read(fields[name], value) for name, value in flags.items() if value not in (None, [], False)}
    if "set" in given and "set" in flagged:
        flagged["set"] = {**_mapping(fields["set"], given["set"]), **_mapping(fields["set"], flagged["set"])}
    given |= flagged
    if earlier is not None:
        given = {**earlier(given), **given}
    for field in fields.values():
        if field.default is MISSING and given.get(field.name) in (None, ""):
            raise UsageError(f"{field.flag} is missing", f"Give {field.flag}: {field.help.words}.")
    return kind(**given)


def _mapping(field: Field, value: Any) -> Mapping[str, Any]:
    try:
        value = field.mark(From).convert(value)
    except ValueError as error:
        raise UsageError(f"{field.name} is {value!r}", str(error)) from None
    if not isinstance(value, Mapping):
        raise UsageError(f"{field.name} is {value!r}", "Write key: value lines.")
    return value


def from_file(path: str | None, fields: Mapping[str, Field]) -> dict[str, Any]:
    """Settings from a YAML file. Raises: UsageError."""
    if path is None:
        return {}
    try:
        loaded = read_yaml(Path(path).expanduser().read_text(encoding="utf8"))
    except OSError as error:
        raise UsageError(f"config {path} cannot be read ({error.strerror or error})", "Give a YAML file.") from None
    except ValueError as error:
        raise UsageError(f"config {path} is not YAML ({str(error)[:200]})", "Write key: value lines.") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"config {path} holds no settings", "Write key: value lines.")
    named = {str(name).replace("-", "_"): value for name, value in loaded.items()}
    aliases = {field.flag.removeprefix("--").replace("-", "_"): name for name, field in fields.items()}
    found = {aliases.get(name, name): value for name, value in named.items()}
    for name in found:
        if name not in fields:
            raise UsageError(f"config has no setting {name!r}", f"Settings: {', '.join(sorted(fields))}.")
    return found


def _read(field: Field, value: Any) -> Any:
    """A flag's text as a value: itself for texts and for what says how it is read, YAML's value for the rest."""
    if not isinstance(value, str) or field.is_text or field.mark(From) is not None:
        return value
    try:
        return read_yaml(value)
    except ValueError:
        return value


# ---- flags

MISSING = dataclasses.MISSING
KEYWORD = inspect.Parameter.KEYWORD_ONLY
FILE = typer.Option("--config", metavar="FILE", help="these settings as YAML; flags win")
CONFIG = inspect.Parameter("config", KEYWORD, default=None, annotation=Annotated[str | None, FILE])
JSON = inspect.Parameter("json", KEYWORD, default=False, annotation=Json)


def _panel(field: Field) -> int:
    """`--help` goes from what a newcomer needs to what one looks up, and to what one command has alone."""
    return PANELS.index(field.help.panel) if field.help.panel in PANELS else len(PANELS)


def _parameter(field: Field) -> inspect.Parameter:
    many = field.mark(From) is not None and _is_list(field)
    kind = bool if field.type is bool else list[str] if many else str
    shown = _default(field)
    option = typer.Option(
        field.flag, help=field.help.words, rich_help_panel=field.help.panel or None, metavar=_metavar(field),
        show_default=shown if shown else False,
    )  # fmt: skip
    default = False if kind is bool else None
    hint = kind if kind is bool else kind | None
    return inspect.Parameter(field.name, KEYWORD, default=default, annotation=Annotated[hint, option])


def _is_list(field: Field) -> bool:
    """Whether the flag may be repeated."""
    origin = typing.get_origin(field.type)
    return field.name == "set" or (origin is not None and not issubclass(origin, Mapping))


def _default(field: Field) -> str:
    if field.default is None or field.default is False or field.default is MISSING or field.default in ({}, (), []):
        return ""
    return str(field.default)


def _metavar(field: Field) -> str | None:
    if field.type is bool:
        return None
    if choices := field.mark(OneOf):
        return "[" + "|".join(choices.names) + "]"
    return {int: "N", float: "X"}.get(field.type, "TEXT")
