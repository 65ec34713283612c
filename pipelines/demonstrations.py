"""Read, validate and tokenize demonstrations: files in, shards of token ids out, bad rows set aside with a reason.

files --flat_map(read)--> raw rows --map_batches(tokenize)--> rows --driver: duplicates, split--> shards
INPUT  source, row (JSON text), reason
OUTPUT demonstrations/{train,held_out}/00000.parquet (DEMONSTRATION), rejected.parquet (REJECTED)

Preference pairs go the same way, with the response that was not chosen beside the chosen one (PREFERENCE).
"""

import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any

from pipelines import base_model
from pipelines.chat import Chat
from pipelines.data import layouts, sources
from pipelines.data.generated import GENERATED
from pipelines.data.splits import SPLITS, Splits, check, unusable
from pipelines.run.artifacts import Run, Stage, StageError
from pipelines.run.keeping import Need
from pipelines.run.policies import require_intact
from pipelines.settings import Demonstrations, Preferences
from pipelines.workers.shards import last_words

log = logging.getLogger(__name__)
GENERATED_ROWS = 128
"""Made of each split where no limit says otherwise."""


def plan(settings: Demonstrations, base: Stage, name: str | None = None) -> Stage:
    """The stage that reads the demonstrations, or preference pairs beside them; its name is that of their section by default.

    Raises:
        StageError: the data is not there.
    """
    identity = settings.identity() | {"content": {split: _identity(settings, split) for split in SPLITS}}
    # Where the data lies is not what it is.
    del identity["path"], identity["held_out_path"]
    return Stage(
        name or settings.section,
        identity | {"pairs": isinstance(settings, Preferences)},
        {"base": base},
        "1 task (1 CPU, 0 GPU) a file",
        version=5,
    )


def prepare(settings: Demonstrations, trust_remote_code: bool) -> Any:
    """Returns the work of the stage."""

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        stage = stages[0]
        writer = Splits(run.directory(stage), settings)
        run.display.follow(None, "rows", lambda: writer.read, lambda: {"rejected": len(writer.rejected)})
        tokenizer = base_model.tokenizer(run, stage.inputs["base"])
        run.keeper.make_room(Need(1, cpus=1))
        # Held-out first: a row that is in both belongs there.
        for split in ("held_out", "train"):
            if (origin := sources.origin(settings, split)) is not None:
                for file in origin[0]:
                    require_intact(file)
                writer.take(split, _rows(settings, split, tokenizer, trust_remote_code))
                if split == "held_out" and not writer.rows[split]:
                    writer.close()
                    named = "held_out_path" if settings.held_out_path else "held_out_split"
                    raise unusable(f"{settings.held_out_path or settings.path} ({settings.section}.{named})", writer, settings)
        numbers = writer.close()
        check(numbers, writer, settings)
        return {stage.name: numbers}

    return work


def _identity(settings: Demonstrations, split: str) -> Any:
    if settings.path in GENERATED:
        return {settings.path: GENERATED[settings.path].version}
    origin = sources.origin(settings, split)
    return sources.identity(origin[0], settings.subset, origin[1]) if origin else None


def _rows(settings: Demonstrations, split: str, tokenizer: str, trust_remote_code: bool) -> Iterator[dict[str, Any]]:
    import ray
    from ray.exceptions import RayError

    origin = sources.origin(settings, split)
    assert origin
    files, name = origin
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    tasks = ray.data.from_items([{"file": file} for file in files], override_num_blocks=len(files))

    def read(task: dict[str, str]) -> Iterator[sources.RawRow]:
        return _read(task["file"], settings, name)

    options = {"settings": settings, "tokenizer": tokenizer, "trust_remote_code": trust_remote_code}
    rows = tasks.flat_map(read).map_batches(tokenize, batch_size=1024, fn_kwargs=options)
    rows.set_name(f"{settings.section}-{split}")
    try:
        for row in rows.iter_rows():
            if row["fatal"]:
                raise StageError(row["fatal"])
            yield row
    except RayError as error:
        log.info("a reading task failed", exc_info=error)
        raise StageError(f"{settings.section}: a reading task failed: {last_words(error)} (logs/job.log has all of it)") from error


def _read(file: str, settings: Demonstrations, split: str) -> Iterator[sources.RawRow]:
    try:
        for row in _raw_rows(file, settings, split):
            yield row | {"fatal": ""}
    except StageError as error:
        # Ray Data buries exceptions of tasks in text of its own: what a person must read travels as a row.
        yield {"source": file, "row": "", "reason": "", "fatal": str(error)}


def _raw_rows(file: str, settings: Demonstrations, split: str) -> Iterator[sources.RawRow]:
    if settings.path not in GENERATED:
        return sources.read(file, settings.subset, split)
    held_out = split == "held_out"
    count = (settings.held_out_limit if held_out else settings.limit) or GENERATED_ROWS
    try:
        made = list(GENERATED[settings.path].draw(count, settings.seed, held_out))
    except ValueError as error:
        raise StageError(f"{settings.section}.path={settings.path}: {error}") from None
    return (
        {"source": f"{settings.path}/{split}:{number}", "row": json.dumps(row), "reason": ""} for number, row in enumerate(made, start=1)
    )


@functools.lru_cache(maxsize=2)
def _chat(tokenizer: str, trust_remote_code: bool) -> Chat:
    return Chat(tokenizer, trust_remote_code)


def tokenize(batch: dict[str, Any], settings: Demonstrations, tokenizer: str, trust_remote_code: bool) -> dict[str, list[Any]]:
    """One batch of raw rows; a row that cannot be used keeps its reason.

    INPUT  source, row, reason, fatal (why the whole data cannot be used)
    OUTPUT the same and `record`: the DEMONSTRATION row as JSON, empty where there is a reason
    """
    chat = _chat(tokenizer, trust_remote_code)
    made: dict[str, list[Any]] = {name: [str(value) for value in batch[name]] for name in ("source", "row", "reason", "fatal")}
    made["record"] = [""] * len(made["row"])
    for i, text in enumerate(made["row"]):
        if made["reason"][i] or made["fatal"][i]:
            continue
        try:
            made["record"][i] = json.dumps(demonstration(json.loads(text), made["source"][i], settings, chat))
        except layouts.RowError as error:
            made["reason"][i] = str(error)
    return made


def demonstration(row: dict[str, Any], source: str, settings: Demonstrations, chat: Chat) -> dict[str, Any]:
    """One raw row as a DEMONSTRATION row, and whether its response was cut (`truncated`).

    Raises:
        layouts.RowError: the row cannot be used.
    """
    absent = [theirs for theirs in settings.columns.values() if theirs not in row]
    if absent:
        raise layouts.RowError(f"{settings.section}.columns names {absent[0]!r}, but the columns are {', '.join(sorted(row))}")
    row = row | {ours: row[theirs] for ours, theirs in settings.columns.items()}
    layout = settings.layout if settings.layout != "auto" else layouts.detect(row, settings.columns)
    if layout is None:
        filled = ", ".join(sorted(name for name, value in row.items() if value is not None)) or "none"
        raise layouts.RowError(f"no layout fits the columns that are filled: {filled}")
    prompt, response = layouts.turns(row, layout)
    if settings.system_prompt and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": settings.system_prompt}, *prompt]
    other = {"rejected": layouts.rejected(row, layout)} if isinstance(settings, Preferences) else {}
    for text in (*(message["content"] for message in prompt), response, *other.values()):
        if token := chat.special_in(text):
            raise layouts.RowError(f"the special token {token!r} stands in the text: the model would read it as a control token")
    try:
        prompt_ids, response_ids = chat.prompt_ids(prompt), chat.response_ids(prompt, response)
    except Exception as error:  # noqa: BLE001
        # Templates are programs of others: they refuse system turns, two user turns in a row, ... in ways of their own.
        raise layouts.RowError(f"the chat template refuses the conversation: {error}") from None
    if len(prompt_ids) > settings.max_prompt_tokens:
        raise layouts.RowError(f"the prompt has {len(prompt_ids)} tokens, more than max_prompt_tokens={settings.max_prompt_tokens}")
    room = settings.max_tokens - len(prompt_ids)
    other_ids = {f"{side}_ids": chat.response_ids(prompt, text)[:room] for side, text in other.items()}
    if response_ids[:room] in other_ids.values():
        raise layouts.RowError(f"the two responses are equal up to max_tokens={settings.max_tokens}")
    key = json.dumps([prompt, response, *other.values()], ensure_ascii=False).encode()
    return (
        other
        | other_ids
        | {
            "id": hashlib.sha256(key).hexdigest()[:16],
            "source": source,
            "prompt": prompt,
            "response": response,
            "prompt_ids": prompt_ids,
            "response_ids": response_ids[:room],
            "truncated": len(response_ids) > room,
        }
    )
