"""The one way in which rows meet a model: shards of parquet, mapped one to one by a pool of actors under Ray Data.

    work items --Ray Data--> actors (min..max, scaled by Ray) --> one output shard an item, written whole or not at all

A finished output shard is never made again, unless it was damaged: that is resume within a stage. Items of several stages can share a
pool, so that one engine start serves all of them.
"""

import contextlib
import itertools
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.loading import loading
from actors.notices import FOLDER, tell, who
from actors.settings import Pool
from pipelines.artifacts import Run, Stage, StageError
from pipelines.cluster import person_can_mend, wait_for
from pipelines.records import intact
from pipelines.restarts import restarted, restarts
from pipelines.watching import title

log = logging.getLogger(__name__)
DEATHS = 3
"""Times that an actor may die and start again."""
NAME_LENGTH = 160


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
) -> dict[str, dict[str, Any]]:
    """Makes the output shards that are not there yet.

    Args:
        run: the run.
        work: all shards of all stages concerned.
        actor: a class whose instances take one item and write its output: `(inputs, output, options, tell) -> None`, where `tell(rows)`
            says how many of its rows are made so far.
        arguments: for its constructor.
        pool: how many actors and what each asks for.
        env: environment variables of the actors.
        waiting: items that an actor is given at a time; Ray Data's own number by default. With 1, long items divide evenly.

    Returns:
        by stage name the `share` of the wall time, by rows of work done.

    Raises:
        StageError: an actor could not be started, or failed on a shard; the finished shards stay.
    """
    import ray
    from ray.exceptions import RayError

    for shard in work:
        shard.output.parent.mkdir(parents=True, exist_ok=True)
    pending = [shard for shard in work if not _finished(shard)]
    directory = run.directory(work[0].stage) if work else run.root
    run.display.follow(sum(s.rows for s in work), "rows", lambda: sum(map(_made, work)), lambda: {"restarts": restarts(directory)})
    if pending:
        wait_for(run, pending[0].stage.name, min(pool.min_actors, len(pending)), pool.num_cpus, pool.num_gpus)
        items = [{"inputs": list(s.inputs), "output": str(s.output), "options": s.options} for s in pending]
        who = title(list(dict.fromkeys(shard.stage.name for shard in pending)))
        done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            named(actor.__name__, who),
            fn_constructor_kwargs={"actor": actor, "arguments": arguments, "directory": str(directory)},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=min(pool.min_actors, len(pending)),
                max_size=min(pool.max_actors, len(pending)),
                max_tasks_in_flight_per_actor=waiting,
            ),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus or None,
            # An engine that dies on a shard again and again must not do so all night.
            max_restarts=DEATHS,
            max_task_retries=DEATHS,
            runtime_env={"env_vars": env | {FOLDER: str((run.root / "logs" / "notices").absolute())}},
        )
        # In Ray's dashboard; Ray makes a file name of it, too.
        done.set_name(f"{run.root.name}-{who}".replace("/", "-")[:NAME_LENGTH])
        try:
            for _ in done.iter_rows():
                pass
        except RayError as error:
            log.info("an actor failed", exc_info=error)
            if known := person_can_mend(error):
                raise StageError(f"{pending[0].stage.name}: {known}") from error
            raise StageError(f"{pending[0].stage.name}: an actor failed: {last_words(error)} (logs/job.log has all of it)") from error
    missing = [shard for shard in work if not shard.output.exists()]
    if missing:
        raise StageError(f"{missing[0].stage.name}: {missing[0].output} was not written; run the job again")
    rows = {shard.stage.name: 0 for shard in work}
    for shard in pending or work:
        rows[shard.stage.name] += shard.rows
    return {name: {"share": count / max(1, sum(rows.values()))} for name, count in rows.items()}


class Adapter:
    """Between Ray Data's batches of one row and an actor's verb.

    Args:
        actor: the class.
        arguments: for its constructor.
        directory: of the stage, which hears of restarts.
    """

    def __init__(self, actor: Callable[..., Any], arguments: dict[str, Any], directory: str):
        import ray

        if ray.get_runtime_context().was_current_actor_reconstructed:
            restarted(Path(directory))
        with loading():
            self.actor = actor(**arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """INPUT inputs, output, options; OUTPUT output."""
        for inputs, output, options in zip(batch["inputs"], batch["output"], batch["options"], strict=True):
            tally = Tally(Path(output))
            tally.begin()
            self.actor([str(path) for path in inputs], str(output), dict(options), tally)
            with contextlib.suppress(OSError):
                tally.path.unlink(missing_ok=True)
        return {"output": batch["output"]}


def named(actor: str, stages: str) -> type[Adapter]:
    """The adapter under a name that Ray's dashboard shows for the actors: it has nothing else to tell those of one stage from others."""
    return type(f"{actor}: {stages}", (Adapter,), {})


class Tally:
    """Tells the driver's display how many rows of an unfinished shard are made, about once a second, in a file beside the shard."""

    def __init__(self, output: Path):
        self.path = _tally(output)
        self.said = time.monotonic()

    def begin(self) -> None:
        """Says who makes the shard; a tally that is there is of one who ended before its shard did."""
        if left := _read(self.path):
            rows, by = left
            tell(f"{self.path.parent.name}/{self.path.name[1:-5]}: made anew, {by or 'who made it'} ended after {rows} rows of it")
        self._write(0)

    def __call__(self, rows: int) -> None:
        """Says how many are made so far."""
        if time.monotonic() - self.said > 1:
            self.said = time.monotonic()
            self._write(rows)

    def _write(self, rows: int) -> None:
        # Storage that fails for a moment must not stop what is counted.
        with contextlib.suppress(OSError):
            self.path.write_text(f"{rows} {who()}")


def _tally(output: Path) -> Path:
    return output.with_name(f".{output.name}.rows")


def _made(shard: Shard) -> int:
    """Rows of a shard that are made."""
    if shard.output.exists():
        return shard.rows
    told = _read(_tally(shard.output))
    return min(shard.rows, told[0]) if told else 0


def _read(tally: Path) -> tuple[int, str] | None:
    """Rows that a tally counts, and who made them; None if there is no tally, or half of one."""
    try:
        rows, _, by = tally.read_text(encoding="utf-8").partition(" ")
        return int(rows or 0), by
    except (OSError, ValueError):
        return None


def _finished(shard: Shard) -> bool:
    """Whether an earlier attempt made a shard, and nothing has happened to it since. A damaged one is removed."""
    # What an earlier job left: who made it is known to have ended.
    _tally(shard.output).unlink(missing_ok=True)
    if not shard.output.exists():
        return False
    if intact(shard.output):
        return True
    log.warning("%s: %s is damaged: the shard is made anew", shard.stage.name, shard.output)
    shard.output.unlink()
    return False


RAISED = re.compile(r"(?!ray\.exceptions)([a-zA-Z_]\w*\.)*[A-Z]\w*(Error|Exception|Interrupt|Exit): ")
"""The line of a traceback that says what was raised, unless by Ray itself."""
FOLLOWS = ("The above exception", "During handling", "Traceback", "ray.exceptions", "To change retry attempts")


def last_words(error: BaseException) -> str:
    """What a worker said last, on one line: Ray's exceptions carry the worker's traceback as text, and words of Ray's own around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [number for number, line in enumerate(lines) if RAISED.match(line)]
    if not raised:
        return lines[-1] if lines else type(error).__name__
    said = itertools.takewhile(lambda line: not line.startswith(FOLLOWS), lines[raised[-1] :])
    return " ".join(said)[:500]
