"""Config files: YAML of sections, as a person writes one and a job leaves one in its run directory."""

from pathlib import Path
from typing import Any

import yaml


class SectionsError(Exception):
    """A file that holds no sections; the message says where and why."""


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a section in which a key stands twice, of which YAML itself would drop the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            if keys[number] in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {keys[number]!r} stands twice in its section", key.start_mark)
        return super().construct_mapping(node, deep)


def read(path: Path | str) -> dict[str, Any]:
    """The sections of a file.

    Raises:
        SectionsError: it cannot be read, or is no YAML of sections.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_EachKeyOnce)
    except OSError as error:
        raise SectionsError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise SectionsError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {reason(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SectionsError(f"{path} must hold sections (run:, model:, ...), not {type(content).__name__}")
    return content


def reason(error: Exception) -> str:
    """Why YAML cannot read something, in its own words, without the place."""
    return str(getattr(error, "problem", None) or getattr(error, "context", None) or " ".join(str(error).split()))
