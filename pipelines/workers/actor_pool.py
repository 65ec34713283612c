"""A pool of actors under Ray Data that takes items as they come, from one stage or from several.

    ActorPool.make(items) --Orders--> Feed (a streaming read) --Ray Data--> actors (min..max, scaled by Ray) --> a row for each item

The read ends when the pool is closed; until then the actors wait for its next item, with what they loaded.
"""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from actors.loading import loading
from actors.notices import FOLDER, who
from actors.orders import Orders, beside_the_driver, here
from actors.settings import Pool
from pipelines.run.artifacts import StageError
from pipelines.run.keeping import CLOSE_SECONDS, WAITS_FOR_ACTORS
from pipelines.run.restarts import restarted
from pipelines.workers.cluster import LOOK_SECONDS, living
from pipelines.workers.tally import Tally

DEATHS = 3
"""Times that an actor may die and start again."""
NAME_LENGTH = 160
Item = dict[str, Any]


class ActorPool:
    """Starts the actors.

    Args:
        actor: a class whose instances take one item and write its output: `(inputs, output, options, tell) -> None`. One that has
            `change(options)` is told so before each item what it is about, and loads that model if it holds another one.
        arguments: for its constructor.
        pool: what each asks Ray for.
        sizes: how many actors at least and at most.
        env: their environment variables.
        waiting: items that an actor is given at a time; Ray Data's own number by default.
        run: name of the run.
        notices: folder for what they tell.
    """

    def __init__(
        self,
        actor: Callable[..., Any],
        arguments: dict[str, Any],
        pool: Pool,
        sizes: tuple[int, int],
        env: dict[str, str],
        waiting: int | None,
        run: str,
        notices: Path,
    ):
        import ray

        from pipelines.workers.feed import Feed

        self.sizes = sizes
        self.hurt = False
        """whether an actor died and was started again"""
        self.over = False
        """whether there will be no more items"""
        self.orders = beside_the_driver(Orders)
        read = ray.data.read_datasource(Feed(self.orders), **here(), override_num_blocks=1)
        # Else Ray Data would wait for a block that is worth sending.
        read.context.target_max_block_size = 1
        # Who waits makes no progress.
        read.context.execution_no_progress_timeout_s = -1
        made = read.map_batches(
            named(actor.__name__, run),
            fn_constructor_kwargs={"actor": actor, "arguments": arguments},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=sizes[0], max_size=sizes[1], max_tasks_in_flight_per_actor=waiting),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus or None,
            # An engine that dies on a shard again and again must not do so all night.
            max_restarts=DEATHS,
            max_task_retries=DEATHS,
            runtime_env={"env_vars": env | {FOLDER: str(notices.absolute())}},
        )
        # In Ray's dashboard; Ray makes a file name of it, too.
        made.set_name(f"{run}-{actor.__name__}".replace("/", "-")[:NAME_LENGTH])
        self.done: queue.SimpleQueue[dict[str, Any] | BaseException | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, args=(made,), name=WAITS_FOR_ACTORS, daemon=True)
        self.thread.start()

    def _run(self, made: Any) -> None:
        try:
            # What is looked for ahead would hold the last row back until there is another.
            for batch in made.iter_batches(batch_size=1, prefetch_batches=0):
                self.done.put({name: column.tolist()[0] for name, column in batch.items()})
        except BaseException as error:  # noqa: BLE001
            self.done.put(error)
        self.done.put(None)

    def make(self, items: list[Item], last: bool) -> Iterator[dict[str, Any]]:
        """Yields for every item, as it is done, its `output`, by whom, and in how many seconds.

        Args:
            items: with inputs, output, options and the directory of their stage.
            last: there will be no more. Ray Data then ends whoever has nothing to do, which makes room for actors of a lost node.

        Raises:
            RayError: an actor could not be started, or failed; the pool is over.
        """
        import ray

        ray.get(self.orders.give.remote(*[json.dumps(item) for item in items]))
        nodes = set(living())
        if last:
            self._end()
        for _ in items:
            found = self._next(nodes)
            if isinstance(found, BaseException):
                raise found
            if found is None:
                raise StageError("Ray Data ended a pool of actors before its work was done: run the job again")
            self.hurt |= found.pop("again")
            yield found

    def _next(self, nodes: set[str]) -> dict[str, Any] | BaseException | None:
        """What is done next. When one of `nodes` is lost under actors that would wait for more, they do not any more."""
        while not self.over:
            with contextlib.suppress(queue.Empty):
                return self.done.get(timeout=LOOK_SECONDS)
            if nodes - living().keys():
                self._end()
        return self.done.get()

    def _end(self) -> None:
        self.over = True
        self.orders.end.remote()

    def alive(self) -> bool:
        """Whether all actors live that it was started with, as far as is known."""
        return self.thread.is_alive() and not self.hurt and not self.over

    def close(self) -> None:
        """Ends the actors, which wait."""
        import ray

        self._end()
        self.thread.join(CLOSE_SECONDS)
        ray.kill(self.orders)


class Adapter:
    """Between Ray Data's batches of one row and an actor's verb.

    Args:
        actor: the class.
        arguments: for its constructor.
    """

    def __init__(self, actor: Callable[..., Any], arguments: dict[str, Any]):
        import ray

        self.again = ray.get_runtime_context().was_current_actor_reconstructed
        with loading():
            self.actor = actor(**arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """INPUT item; OUTPUT output, by whom, in how many seconds, and whether that one had died before."""
        item, again, self.again = json.loads(batch["item"][0]), self.again, False
        if again:
            restarted(Path(item["directory"]))
        if hasattr(self.actor, "change"):
            self.actor.change(item["options"])
        began = time.monotonic()
        tally = Tally(Path(item["output"]))
        tally.begin()
        self.actor(item["inputs"], item["output"], item["options"], tally)
        with contextlib.suppress(OSError):
            tally.path.unlink(missing_ok=True)
        return {"output": [item["output"]], "by": [who()], "seconds": [time.monotonic() - began], "again": [again]}


def named(actor: str, run: str) -> type[Adapter]:
    """The adapter under a name that Ray's dashboard shows for the actors."""
    return type(f"{actor}: {run}", (Adapter,), {})
