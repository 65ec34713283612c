"""The one way in which rows meet a model: shards of parquet, mapped one to one by a pool of actors under Ray Data.

    work items --Ray Data--> actors (min..max, scaled by Ray) --> one output shard an item, written whole or not at all

A finished output shard is never made again, unless it was damaged: that is resume within a stage. Items of several stages can share a
pool, so that one engine start serves all of them.
"""

import itertools
import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.settings import Pool
from pipelines.records import intact
from pipelines.run.artifacts import Run, Stage, StageError
from pipelines.run.keeping import Need
from pipelines.run.restarts import restarts
from pipelines.workers.actor_pool import ActorPool, Item
from pipelines.workers.cluster import person_can_mend, wait_for
from pipelines.workers.tally import counted, tally_of

log = logging.getLogger(__name__)
SEEN_SECONDS = 75.0
"""within which every node sees what one has written: longer than NFS clients keep what they know of a folder (acdirmax)"""


@dataclass(frozen=True)
class Shard:
    """One work item: input files to one output file, with plain options for the actor."""

    stage: Stage
    inputs: tuple[str, ...]
    output: Path
    options: dict[str, Any]
    rows: int
    """rows that it will write, about"""


def map_shards(
    run: Run,
    work: list[Shard],
    actor: Callable[..., Any],
    arguments: dict[str, Any],
    pool: Pool,
    env: dict[str, str],
    waiting: int | None = None,
    keep: bool = True,
) -> dict[str, dict[str, Any]]:
    """Makes the output shards that are not there yet.

    Args:
        run: the run.
        work: all shards of all stages concerned.
        actor: a class whose instances take one item and write its output: `(inputs, output, options, tell) -> None`, where `tell(rows)`
            says how many of its rows are made so far.
        arguments: for its constructor; those that are among the options of every item too, its `change` goes by.
        pool: how many actors and what each asks for.
        env: environment variables of the actors.
        waiting: items that an actor is given at a time; Ray Data's own number by default. With 1, long items divide evenly.
        keep: actors that can change what they hold may wait for the next stage.

    Returns:
        by stage name the `share` of the wall time, by rows of work done, and of the busiest actor's `work`.

    Raises:
        StageError: an actor could not be started, or failed on a shard; the finished shards stay.
    """
    from ray.exceptions import RayError

    for shard in work:
        shard.output.parent.mkdir(parents=True, exist_ok=True)
    pending = [shard for shard in work if not _finished(shard)]
    directory = run.directory(work[0].stage) if work else run.root
    # By actor, not from the first one's begin to the last one's end: nodes have clocks of their own.
    busy: dict[str, float] = defaultdict(float)
    run.display.follow(sum(s.rows for s in work), "rows", lambda: _made(work), lambda: {"restarts": restarts(directory)})
    if pending:
        items = [_item(shard, directory) for shard in pending]
        name = pending[0].stage.name
        sizes = min(pool.min_actors, len(pending)), min(pool.max_actors, len(pending))
        need = Need(sizes[1], pool.num_cpus, pool.num_gpus, grows=sizes[0] < sizes[1])

        def start() -> ActorPool:
            wait_for(run, name, replace(need, count=sizes[0]))
            return ActorPool(actor, arguments, pool, sizes, env, waiting, run.root.name, run.notices)

        def lasts(actors: ActorPool) -> bool:
            # What Ray scales goes when it waits.
            fixed = pool.min_actors == pool.max_actors and actors.sizes[0] >= sizes[0]
            return keep and hasattr(actor, "change") and fixed

        try:
            with run.keeper.borrowed(actor.__name__, _key(actor, arguments, pending, pool, env), need, start, lasts) as actors:
                for made in actors.make(items, last=not (run.keeper.seconds and lasts(actors))):
                    busy[made["by"]] += made["seconds"]
        except RayError as error:
            log.info("an actor failed", exc_info=error)
            if known := person_can_mend(error):
                raise StageError(f"{name}: {known}") from error
            raise StageError(f"{name}: an actor failed: {last_words(error)} (logs/job.log has all of it)") from error
    if missing := _missing(work):
        raise StageError(
            f"{missing[0].stage.name}: {missing[0].output} was not written, or on storage that this node does not see; run the job again"
        )
    rows = {shard.stage.name: 0 for shard in work}
    for shard in pending or work:
        rows[shard.stage.name] += shard.rows
    shares = {name: count / max(1, sum(rows.values())) for name, count in rows.items()}
    return {name: {"share": share, "work": share * max(busy.values(), default=0.0)} for name, share in shares.items()}


def _item(shard: Shard, directory: Path) -> Item:
    return {
        "inputs": list(shard.inputs),
        "output": str(shard.output),
        "options": shard.options,
        "directory": str(directory),
    }


def _key(actor: Callable[..., Any], arguments: Mapping[str, Any], work: list[Shard], pool: Pool, env: Mapping[str, str]) -> str:
    """Equal for stages whose actors can do each other's work. What every item says itself, which weights for example, may differ."""
    said = set.intersection(*(set(shard.options) for shard in work))
    same = {name: repr(value) for name, value in arguments.items() if name not in said}
    return json.dumps([actor.__module__, same, repr(pool), dict(env)], sort_keys=True)


def _made(work: list[Shard]) -> int:
    """Rows that are made."""
    there, rows = _there(work), 0
    for shard in work:
        folder, tally = there[shard.output.parent], tally_of(shard.output)
        if shard.output.name in folder:
            rows += shard.rows
        elif tally.name in folder and (told := counted(tally)):
            rows += min(shard.rows, told[0])
    return rows


def _missing(work: list[Shard]) -> list[Shard]:
    """Those whose output is not there. Those who wrote it said so, so this node is given time to see it."""
    deadline, said = time.monotonic() + SEEN_SECONDS, False
    while True:
        there = _there(work)
        missing = [shard for shard in work if shard.output.name not in there[shard.output.parent]]
        if not missing or time.monotonic() > deadline:
            return missing
        if not said:
            said = True
            log.warning("%s: %d shards are written and not seen on this node yet: waits for the storage", work[0].stage.name, len(missing))
        time.sleep(0.5)


def _there(work: list[Shard]) -> dict[Path, set[str]]:
    """The names in every folder of shards. Listed, not asked for one by one: a list is of now, but of a name that was not there an NFS
    client believes so for up to a minute."""
    folders = {shard.output.parent for shard in work}
    return {folder: {path.name for path in folder.iterdir()} if folder.is_dir() else set() for folder in folders}


def _finished(shard: Shard) -> bool:
    """Whether an earlier attempt made a shard, and nothing has happened to it since. A damaged one is removed."""
    # What an earlier job left: who made it is known to have ended.
    tally_of(shard.output).unlink(missing_ok=True)
    if not shard.output.exists():
        return False
    if intact(shard.output):
        return True
    log.warning("%s: %s is damaged: the shard is made anew", shard.stage.name, shard.output)
    shard.output.unlink()
    return False


RAISED = re.compile(r"(?!ray\.exceptions)([a-zA-Z_]\w*\.)*[A-Z]\w*(Error|Exception|Interrupt|Exit): ")
"""The line of a traceback that says what was raised, unless by Ray itself."""
FULL = re.compile(r"Memory on the node .*? was (\S+) used / (\S+) limit")
"""Ray's words of a worker that it killed before the machine's memory was all gone."""
FOLLOWS = ("The above exception", "During handling", "Traceback", "ray.exceptions", "To change retry attempts")


def last_words(error: BaseException) -> str:
    """What a worker said last, on one line: Ray's exceptions carry the worker's traceback as text, and words of Ray's own around it."""
    if full := FULL.search(str(error)):
        return (
            f"killed, as its machine ran out of memory ({full[1]} of {full[2]} in use): fewer workers or engines on it at a time need less"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [number for number, line in enumerate(lines) if RAISED.match(line)]
    if not raised:
        return lines[-1] if lines else type(error).__name__
    said = itertools.takewhile(lambda line: not line.startswith(FOLLOWS), lines[raised[-1] :])
    return " ".join(said)[:500]
