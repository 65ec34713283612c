"""Batches out of single requests: the token budget, the order, callers that go away, a model that fails."""

import asyncio
import itertools
import time

import pytest

from actors.batching import Batcher, Turns

numbers = itertools.count()


def sequence(length: int) -> list[int]:
    """Tokens that begin like no others."""
    return [next(numbers)] * length


def lengths(sequences: list[tuple[int, ...]]) -> list[float]:
    return [float(len(ids)) for ids in sequences]


def test_requests_that_wait_go_together_up_to_the_budget_shortest_first() -> None:
    batches: list[list[int]] = []

    def model(sequences: list[tuple[int, ...]]) -> list[float]:
        batches.append([len(ids) for ids in sequences])
        time.sleep(0.02)
        return lengths(sequences)

    async def work() -> list[list[float]]:
        batcher = Batcher(model, max_batch_tokens=10)
        return await asyncio.gather(*(batcher([sequence(size) for size in sizes]) for sizes in ((4, 2), (3,), (12,), (1, 1))))

    assert asyncio.run(work()) == [[4, 2], [3], [12], [1, 1]]
    assert batches == [[2, 3, 4], [12], [1, 1]]


def test_samples_of_a_prompt_stay_together() -> None:
    batches: list[int] = []

    def model(sequences: list[tuple[int, ...]]) -> list[float]:
        batches.append(len(sequences))
        return lengths(sequences)

    async def work() -> None:
        prompt, other = sequence(100), sequence(100)
        batcher = Batcher(model, max_batch_tokens=100 + 16 * 4)
        await batcher([[*prompt, *sequence(4)] for _ in range(16)])
        await batcher([[*prompt, *sequence(4)] for _ in range(17)])
        await batcher([prompt] * 65)
        await batcher([[*start, 7] for start in (prompt, other)])

    asyncio.run(work())
    assert batches == [16, 16, 1, 65, 1, 1]


def test_a_caller_that_goes_away_takes_what_waits_along() -> None:
    seen: list[int] = []

    def model(sequences: list[tuple[int, ...]]) -> list[float]:
        seen.extend(len(ids) for ids in sequences)
        time.sleep(0.05)
        return lengths(sequences)

    async def work() -> None:
        batcher = Batcher(model, max_batch_tokens=3)
        first = asyncio.create_task(batcher([[0] * 3]))
        await asyncio.sleep(0.02)
        gone = asyncio.create_task(batcher([[0] * 2] * 100))
        last = asyncio.create_task(batcher([[0]]))
        await asyncio.sleep(0.001)
        gone.cancel()
        assert await first == [3] and await last == [1]
        assert not batcher.waiting

    asyncio.run(work())
    assert seen == [3, 1]


def test_a_batch_that_fails_is_told_to_its_callers_and_to_nobody_else() -> None:
    def model(sequences: list[tuple[int, ...]]) -> list[float]:
        if any(len(ids) == 2 for ids in sequences):
            raise RuntimeError("no")
        return lengths(sequences)

    async def work() -> None:
        batcher = Batcher(model, max_batch_tokens=2)
        bad, good = asyncio.create_task(batcher([[0, 0], [1]])), asyncio.create_task(batcher([[2]]))
        with pytest.raises(RuntimeError, match="no"):
            await bad
        assert await good == [1]

    asyncio.run(work())


def test_two_kinds_take_turns_and_neither_waits_for_ever() -> None:
    now: list[str] = []
    begun: list[str] = []

    async def one(turns: Turns, kind: str) -> None:
        async with turns.of(kind):
            now.append(kind)
            begun.append(kind)
            assert len(set(now)) == 1, now
            await asyncio.sleep(0.01)
            now.remove(kind)

    async def work() -> None:
        turns = Turns()
        tasks = [asyncio.create_task(one(turns, kind)) for kind in "aabaab"]
        await asyncio.sleep(0.001)
        gone = asyncio.create_task(one(turns, "b"))
        await asyncio.sleep(0)
        gone.cancel()
        async with turns.of(None):
            await asyncio.gather(*tasks)

    asyncio.run(work())
    assert begun == list("aabaab")
