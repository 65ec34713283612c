"""Responses of somebody else to prompts, out of files.

FILE in any layout of demonstrations, prompts with ids --> {id: response}
"""

import json
import logging
from typing import Any

from pipelines.data import layouts, sources
from pipelines.run.artifacts import StageError

log = logging.getLogger(__name__)


def from_files(name: str, path: str, prompted: list[dict[str, Any]], warn: bool) -> dict[str, str]:
    """Responses by the prompt's id; those to other prompts are passed over.

    Args:
        name: who gave them.
        path: file, directory, glob or URI.
        prompted: `id` and `prompt` of every row that wants one.
        warn: of rows that are not used.

    Raises:
        StageError: there is none to any of the prompts.
    """
    exact, by_prompt = dict[str, list[str]](), dict[str, list[str]]()
    for row in prompted:
        exact.setdefault(json.dumps(row["prompt"]), []).append(row["id"])
        by_prompt.setdefault(_spoken(row["prompt"]), []).append(row["id"])
    found, loose, read, wrong, twice = dict[str, str](), dict[str, str](), 0, list[str](), list[str]()
    for file in sources.find(path, "", key=f"tournament.responses.{name}"):
        for raw in sources.read(file):
            read += 1
            try:
                if raw["reason"]:
                    raise layouts.RowError(raw["reason"])
                row = json.loads(raw["row"])
                layout = layouts.detect(row)
                if layout is None:
                    raise layouts.RowError(f"no layout fits the columns {', '.join(sorted(row))}")
                messages, response = layouts.turns(row, layout)
            except layouts.RowError as error:
                wrong.append(f"{raw['source']}: {error}")
                continue
            same, alike = exact.get(json.dumps(messages), []), by_prompt.get(_spoken(messages), [])
            known = [found.get(key, response) for key in same] or [loose.get(key, response) for key in alike]
            if any(said != response for said in known):
                twice.append(raw["source"])
            found |= dict.fromkeys(same, response)
            loose |= dict.fromkeys(alike, response)
    # To the very prompt before to one with another system turn.
    found = loose | found
    if not found:
        reason = f" ({wrong[0]})" if wrong else ""
        raise StageError(f"tournament.responses.{name}={path!r} holds no response to any of the prompts{reason}")
    if warn and wrong:
        log.warning("tournament.responses.%s: %d of %d rows cannot be used. The first, %s", name, len(wrong), read, wrong[0])
    if warn and twice:
        told = "tournament.responses.%s: %d of %d rows answer a prompt anew, of which the last answer counts. The first, %s"
        log.warning(told, name, len(twice), read, twice[0])
    return found


def _spoken(messages: list[dict[str, str]]) -> str:
    """A conversation without its system turn, which others may not have."""
    return json.dumps([[m["role"], m["content"].strip()] for m in messages if m["role"] != "system"], ensure_ascii=False)
