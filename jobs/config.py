"""From YAML files and a command line to one frozen, typed config. Imports nothing heavy.

    python jobs/JOB.py --config FILE [--section.key value ...] [--dry-run] [--help]

Every key is a field of a `Settings` model; an unknown one is refused with the nearest name.
"""

import difflib
import inspect
import re
import shlex
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from actors.settings import Settings
from pipelines.run import sections
from pipelines.tables import reader_may_leave

C = TypeVar("C", bound=Settings)
NULL = ("null", "~", "")
"""No value, on the command line."""
WIDEST = 140
"""Columns of the help, where the terminal has as many."""


@dataclass(frozen=True)
class CommandLine(Generic[C]):
    """What a person asked for."""

    config: C
    dry_run: bool


class ConfigError(ValueError):
    """A config that cannot be run; its text is for the person who wrote it."""


def parse(schema: type[C], argv: Sequence[str], usage: str) -> CommandLine[C]:
    """Reads `argv`. Prints the help or the error and leaves, if there is nothing to run.

    Args:
        schema: the job's config model.
        argv: without the program's name.
        usage: the first lines of `--help`.
    """
    try:
        if "--help" in argv or "-h" in argv:
            with reader_may_leave():
                print(help_text(schema, usage))
            sys.exit(0)
        flags = [word for word in argv if word not in ("--dry-run", "--dry_run", "--dryrun")]
        return CommandLine(build(schema, flags), dry_run=len(flags) < len(argv))
    except ConfigError as error:
        sys.exit(f"error: {error}")


def build(schema: type[C], argv: Sequence[str]) -> C:
    """Merges `--config` files in the order given, then the overrides, and validates.

    Raises:
        ConfigError: with the file or flag, the key and what to do.
    """
    merged: dict[str, Any] = {}
    overrides: list[tuple[str, Any]] = []
    for flag, value in _pairs(argv):
        if flag == "config":
            _check_keys(schema, layer := _read_yaml(value), where=value)
            _merge(merged, layer)
        else:
            overrides.append((flag, _read_value(schema, flag, value)))
    for dotted, value in overrides:
        layer = value
        for key in reversed(dotted.split(".")):
            layer = {key: layer}
        _check_keys(schema, layer, where=f"--{dotted}")
        _merge(merged, layer)
    try:
        return schema.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_readable(item) for item in error.errors())) from None


def _pairs(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    words = iter(argv)
    for word in words:
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} is not a flag: write --section.key value (see --help)")
        flag, equals, value = word[2:].partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                raise ConfigError(f"{word} needs a value")
            value = following
        yield flag, value


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        return sections.read(path)
    except sections.SectionsError as error:
        raise ConfigError(f"--config {error}") from None


def _read_value(schema: type[BaseModel], dotted: str, value: str) -> Any:
    """A value as its key wants it: text stays text, which YAML might take for a number or a date, a list or a comment."""
    section, _, key = dotted.partition(".")
    found = _section(schema.model_fields[section].annotation) if section in schema.model_fields else None
    annotation = found.model_fields[key].annotation if found and key in found.model_fields else None
    if annotation == str | None:
        return None if value in NULL else value
    return value if annotation is str else _scalar(value)


def _scalar(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 as text, people mean the number.
        try:
            return float(text)
        except ValueError:
            return text
    return value


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _check_keys(schema: type[BaseModel], layer: dict[str, Any], where: str, prefix: str = "") -> None:
    known = {prefix + name: field for name, field in schema.model_fields.items()}
    for key, value in layer.items():
        dotted = f"{prefix}{key}"
        if dotted not in known:
            first, dot, rest = str(key).partition(".")
            if dot and prefix + first in known:
                raise ConfigError(
                    f"{where}: {dotted!r} has a dot, as on the command line: in a file write `{first}:` and below it `{rest}:`"
                )
            keys = _all_keys(schema)
            # Who left out the section is told which.
            nearest = _nearest(str(key), {name.rpartition(".")[2]: name for name in reversed(keys)} | {name: name for name in keys})
            advice = f"did you mean {prefix + nearest!r}?" if nearest else "--help lists all keys"
            if not prefix and key not in {name.rpartition(".")[2] for name in keys} and (others := _jobs_with(str(key))):
                advice = f"it is a section of {', '.join(others)}"
            raise ConfigError(f"{where}: there is no {dotted!r}; {advice}")
        section = _section(known[dotted].annotation)
        if section and value is None:
            # All of its keys are commented out.
            layer[key] = value = {}
        if section and not isinstance(value, dict):
            raise ConfigError(f"{where}: {dotted!r} is a section: give {dotted}.KEY, one of {', '.join(section.model_fields)}")
        if section:
            _check_keys(section, value, where, prefix=f"{dotted}.")


def _jobs_with(section: str) -> list[str]:
    """Scripts of other jobs that have a section."""
    found, left = [], [Settings]
    while left:
        job = left.pop()
        left += job.__subclasses__()
        if section in job.model_fields and hasattr(job, "script"):
            found.append(job.script)
    return sorted(found)


def _nearest(name: str, names: dict[str, str]) -> str | None:
    """What the spelling nearest to `name` stands for; None where none is near."""
    return next((names[spelling] for spelling in difflib.get_close_matches(name, names, n=1)), None)


def _all_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in schema.model_fields.items():
        section = _section(field.annotation)
        keys += [f"{prefix}{name}", *(_all_keys(section, f"{prefix}{name}.") if section else [])]
    return keys


def _readable(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    choices = re.findall(r"'([^']+)'", item["ctx"]["expected"]) if item["type"] == "literal_error" else []
    if nearest := _nearest(str(item["input"]), {choice: choice for choice in choices}):
        return f"{where}={item['input']!r}: did you mean {nearest!r}? It {message.partition('should ')[1]}{message.partition('should ')[2]}"
    if item["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if item["type"] in ("list_type", "tuple_type", "dict_type"):
        text, what = item["input"], "mapping" if item["type"] == "dict_type" else "list"
        if not isinstance(text, str):
            return f"{where}={text!r}: a {what} is wanted, such as {'{NAME: VALUE}' if what == 'mapping' else '[VALUE, VALUE]'}"
        return f"{where}='{text}': {_yaml_trouble(text)}a {what} is wanted, such as {_meant(text, what)}"
    return f"{where}={item['input']!r}: {message[0].lower()}{message[1:]}"


def _yaml_trouble(text: str) -> str:
    """Why YAML cannot read a list or mapping."""
    try:
        yaml.safe_load(text if text.startswith(("[", "{")) else "")
    except yaml.YAMLError as error:
        return f"YAML cannot read it ({sections.reason(error)}): "
    return ""


def _meant(text: str, what: str) -> str:
    """A list or mapping as a shell and YAML take it. Brackets, colons and backslashes of its own want single quotes inside."""
    bare = text[:1] + text[-1:] not in ("[]", "{}")
    inside = text if bare else text[1:-1]
    if '"' in inside and not bare:
        # YAML reads \d within double quotes as a character of its own.
        inside = inside.replace("'", "''").replace('"', "'")
    elif what == "mapping":
        inside = "NAME: VALUE"
    elif not re.fullmatch(r"[\w., /-]*", inside):
        inside = "'" + inside.replace("'", "''") + "'"
    whole = f"{{{inside}}}" if what == "mapping" else f"[{inside}]"
    return f'"{whole}"' if "'" in whole and '"' not in whole else shlex.quote(whole)


OPTIONS = {
    "--config FILE.yaml": "keys from a file; given several times, the later file says more",
    "--dry-run": "prints the config, of a job also its stages, what is done of them and what each asks for; begins nothing",
    "--help": "prints this",
}


def help_text(schema: type[BaseModel], usage: str) -> str:
    """The options and every key with its type, default and meaning."""
    lines = [usage.strip(), "", "Options:"]
    for words, meaning in OPTIONS.items():
        lines += [*_wrapped(words, 2), *_wrapped(meaning, 6)]
    lines += ["", "Keys (in the YAML as sections, on the command line as --section.key value):"]
    for name, field in schema.model_fields.items():
        section = _section(field.annotation)
        assert section, "a config is made of sections"
        lines += ["", *_wrapped(f"{name}: {inspect.getdoc(section)}", 0)]
        for key, option in section.model_fields.items():
            default = getattr(field.default, key)
            lines += _wrapped(f"--{name}.{key}  {_type_name(option.annotation)}, default {_shown(default)}", 2)
            lines += _wrapped(option.description or "", 6)
    return "\n".join(lines)


def _wrapped(text: str, indent: int) -> list[str]:
    """Lines that fit the terminal; those that follow the first are indented as descriptions are."""
    width = max(40, min(WIDEST, shutil.get_terminal_size((WIDEST, 0)).columns))
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    wrapper.initial_indent, wrapper.subsequent_indent = " " * indent, " " * 6
    return wrapper.wrap(text)


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " | ".join(str(choice) for choice in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(part) for part in typing.get_args(annotation))
    if annotation is type(None):
        return "null"
    if origin in (list, tuple):
        return f"[{_type_name(typing.get_args(annotation)[0])}, ...]"
    return str(annotation) if origin else annotation.__name__


def _shown(value: Any) -> str:
    return "null" if value is None else "true" if value is True else "false" if value is False else str(value)


def to_yaml(config: Settings) -> str:
    """The resolved config, as it can be given to `--config` again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
