"""Asking an endpoint: patiently, within limits of requests, rate and cost, and no question twice."""

import asyncio
import logging
import random
import time
from dataclasses import asdict
from typing import Any

from pipelines.judges.answers import Cache
from pipelines.judges.endpoint import Endpoint, EndpointError, Said, Spent
from pipelines.judges.settings import Judge
from pipelines.run.artifacts import StageError

log = logging.getLogger(__name__)

LABELS = ("A", "B")
FIRST_WAIT = 1.0
"""Seconds before a request that failed is made again; then twice as many, up to a minute."""
LONGEST_WAIT = 600.0
"""Seconds that an endpoint may want to be left alone; one that wants more is asked another time."""
Row = dict[str, Any]


def cost(judge: Judge, read: int, written: int) -> float:
    """Price of tokens, in the currency of the prices."""
    return (read * judge.price_in + written * judge.price_out) / 1e6


class Stopped(Exception):
    """Nothing more is to be asked, and why."""


class Enough(Exception):
    """Too many have failed: nothing more is to be asked."""


class Asking:
    """Asks an endpoint, within the judge's limits.

    Args:
        judge: settings.
        cache: takes the answers.
        spent: in this go of the job, by all who ask; grows.
    """

    def __init__(self, judge: Judge, cache: Cache, spent: Spent):
        self.judge = judge
        self.cache = cache
        self.spent = spent
        # Every attempt counts against the limits: the client makes none of its own.
        self.endpoint = Endpoint(judge, retries=0, timeout=judge.timeout, spent=spent)
        self.next = 0.0
        self.told = 5.0
        """seconds of the longest wait that was said"""
        self.warned = False
        """whether it was said that questions are asked again"""
        self.stopped: str | None = None
        self.enough = False
        """whether more have failed than may"""
        self.under_way = 0
        """requests"""
        self.moved = asyncio.Event()
        """a request has ended, or nothing more is to be asked"""

    async def all(self, questions: dict[str, Row], most: float) -> dict[str, str]:
        """Asks them until more than `most` have failed; returns why, for those that did.

        Raises:
            StageError: a limit is reached, or the endpoint wants another key.
        """
        failed: dict[str, str] = {}
        waiting = iter(questions.items())

        async def one_after_the_other() -> None:
            while self.stopped is None and not self.enough and (item := next(waiting, None)):
                key, row = item
                try:
                    said = await self._patiently(row)
                except EndpointError as error:
                    failed[key] = str(error)
                    self.enough = len(failed) > most
                except Stopped as why:
                    # Answers under way to the others are paid for, and kept.
                    self.stopped = self.stopped or str(why)
                except Enough:
                    break
                else:
                    self.cache.take(key, asdict(said))
                    if self.judge.max_cost is not None and not said.read:
                        self.stopped = "judge.max_cost cannot be kept: the judge's endpoint does not say how many tokens it read"
                self.moved.set()

        try:
            await asyncio.gather(*(one_after_the_other() for _ in range(min(self.judge.concurrency, len(questions)))))
        finally:
            await self.endpoint.close()
        if self.stopped:
            raise StageError(f"{self.stopped}; {self.cache.taken} answers came and are kept: the same command continues")
        return failed

    async def _patiently(self, row: Row) -> Said:
        for attempt in range(self.judge.retries + 1):
            await self._turn()
            try:
                if row["kind"] == "logprob":
                    said = await self.endpoint.label_logps(row["question"], LABELS)
                else:
                    said = await self.endpoint.write(row["question"], self.judge.max_new_tokens)
                    if not said.text.strip():
                        raise EndpointError("the judge's endpoint answers with no word")
                return said
            except EndpointError as error:
                if error.denied:
                    raise Stopped(f"{error}: set that variable where the job runs") from None
                if error.hopeless or attempt == self.judge.retries:
                    raise
                if not self.warned:
                    self.warned = True
                    log.warning("%s; it is asked again, up to %d times a question, with growing waits", error, self.judge.retries)
                wait = max(self._wanted(error), min(60.0, FIRST_WAIT * 2.0**attempt))
            finally:
                self.under_way -= 1
                self.moved.set()
            # Never sooner than the endpoint wants.
            await asyncio.sleep(wait * random.uniform(1, 1.5))
        raise AssertionError("the last attempt returns or raises")

    def _wanted(self, error: EndpointError) -> float:
        """Seconds that the endpoint wants to be left alone, said where somebody would notice them.

        Raises:
            Stopped: they are too many to wait for.
        """
        seconds = error.retry_after or 0.0
        if seconds > LONGEST_WAIT:
            raise Stopped(f"{error}: it wants to be left alone for {seconds:.0f} s")
        if seconds > 2 * self.told:
            self.told = max(seconds, 10.0)
            log.info("the judge's endpoint wants to be left alone for %.0f s", seconds)
        return seconds

    async def _turn(self) -> None:
        """Waits until a request may be made, and counts it.

        Raises:
            Stopped: a limit is reached.
            Enough: too many have failed.
        """
        in_turn = not self.judge.requests_per_minute
        while True:
            if self.stopped:
                raise Stopped(self.stopped)
            if self.enough:
                raise Enough
            if self._too_dear():
                if not self.under_way:
                    raise Stopped(f"judge.max_cost={self.judge.max_cost:g} is spent, or too little of it is left for another question")
                self.moved.clear()
                await self.moved.wait()
                # Those who waited together do not ask together.
                in_turn = not self.judge.requests_per_minute
            elif self.judge.max_requests is not None and self.spent.requests >= self.judge.max_requests:
                raise Stopped(f"judge.max_requests={self.judge.max_requests} requests are made")
            elif not in_turn:
                await self._slot()
                in_turn = True
            else:
                self.spent.requests += 1
                self.under_way += 1
                return

    async def _slot(self) -> None:
        """Waits as long as the rate wants."""
        assert self.judge.requests_per_minute
        apart, now = 60 / self.judge.requests_per_minute, time.monotonic()
        at = max(now, self.next)
        self.next = at + apart
        await asyncio.sleep(at - now)

    def _too_dear(self) -> bool:
        """Whether another question may cost more than is left, with those under way: each as much as the dearest of this go, of which
        nothing is known before the first answer, so that it is waited for."""
        if self.judge.max_cost is None:
            return False
        spent = cost(self.judge, self.spent.read, self.spent.written)
        dearest = cost(self.judge, self.spent.most_read, self.spent.most_written)
        if not dearest:
            return self.under_way > 0
        # What is spent exactly is a sum of floats.
        return spent + (self.under_way + 1) * dearest > self.judge.max_cost * (1 + 1e-9)
