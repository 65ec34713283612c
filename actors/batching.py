"""Batches out of requests that come one by one: whoever is waiting when the model is free goes together, up to a number of tokens; and who
may not go together."""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from actors.prefixes import common


@dataclass(frozen=True)
class Item:
    """A sequence that waits for its number."""

    ids: tuple[int, ...]
    value: "asyncio.Future[float]"


class Batcher:
    """Gathers sequences into batches for a model that is busy with one batch at a time.

    Args:
        model: numbers of sequences of token ids, in their order; called in a thread of its own.
        max_batch_tokens: of one batch; a longer sequence goes alone. What a sequence begins with like the one before it counts once.
        gather: seconds that an idle model waits for company of the first request.
    """

    def __init__(self, model: Callable[[list[tuple[int, ...]]], list[float]], max_batch_tokens: int, gather: float = 0.002):
        self.model = model
        self.max_batch_tokens = max_batch_tokens
        self.gather = gather
        self.waiting: deque[Item] = deque()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.worker: asyncio.Task[None] | None = None

    async def __call__(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The numbers of some sequences. A caller that goes away takes those that still wait along."""
        loop = asyncio.get_running_loop()
        items = [Item(tuple(ids), loop.create_future()) for ids in sequences]
        self.waiting.extend(items)
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._work())
        try:
            return list(await asyncio.gather(*(item.value for item in items)))
        finally:
            for item in items:
                # One failure speaks for the whole batch: asyncio would complain that nobody asked the others.
                if not item.value.cancel() and not item.value.cancelled():
                    item.value.exception()

    async def _work(self) -> None:
        await asyncio.sleep(self.gather)
        while batch := self._next():
            try:
                values = await asyncio.get_running_loop().run_in_executor(self.thread, self.model, [item.ids for item in batch])
            except Exception as error:  # noqa: BLE001
                # Each of its callers is told; the next batch is another matter.
                for item in batch:
                    if not item.value.done():
                        item.value.set_exception(error)
            else:
                for item, value in zip(batch, values, strict=True):
                    if not item.value.done():
                        item.value.set_result(value)

    def _next(self) -> list[Item]:
        """First come, first served; shortest first within the batch."""
        batch: list[Item] = []
        tokens = 0
        while self.waiting:
            item = self.waiting[0]
            if item.value.done():
                self.waiting.popleft()
                continue
            # Samples of a prompt come one behind the other, and are computed together.
            own = max(1, len(item.ids) - common(batch[-1].ids, item.ids)) if batch else len(item.ids)
            if batch and tokens + own > self.max_batch_tokens:
                break
            batch.append(self.waiting.popleft())
            tokens += own
        return sorted(batch, key=lambda item: len(item.ids))


class Turns:
    """Keeps kinds of requests apart that may not be under way together: one goes when the other is through, first come, first served."""

    def __init__(self) -> None:
        self.next = asyncio.Lock()
        self.under_way: Counter[str] = Counter()
        self.through = asyncio.Event()

    @contextlib.asynccontextmanager
    async def of(self, kind: str | None) -> AsyncIterator[None]:
        """For the length of a request; None goes with everybody."""
        if kind is None:
            yield
            return
        # Whoever waits for his turn holds back those who come later, also of the kind that is under way.
        async with self.next:
            while self.under_way.total() > self.under_way[kind]:
                self.through.clear()
                await self.through.wait()
            self.under_way[kind] += 1
        try:
            yield
        finally:
            self.under_way[kind] -= 1
            self.through.set()
