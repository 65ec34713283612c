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
        self.under_way = 0
        """requests that are made, or wait for their turn"""
        self.dearest = 0.0
        """cost of an answer so far at most"""
        self.ended = asyncio.Event()
        """of a request"""

    async def all(self, questions: dict[str, Row], most: float) -> dict[str, str]:
        """Asks them until more than `most` have failed; returns why, for those that did.

        Raises:
            StageError: a limit is reached, or the endpoint wants another key.
        """
        failed: dict[str, str] = {}
        waiting = iter(questions.items())

        async def one_after_the_other() -> None:
            while self.stopped is None and len(failed) <= most and (item := next(waiting, None)):
                key, row = item
                try:
                    said = await self._patiently(row)
                except EndpointError as error:
                    failed[key] = str(error)
                except Stopped as why:
                    # Answers under way to the others are paid for, and kept.
                    self.stopped = str(why)
                    self.ended.set()
                else:
                    self.cache.take(key, asdict(said))
                    if self.judge.max_cost is not None and not said.read:
                        self.stopped = "judge.max_cost cannot be kept: the judge's endpoint does not say how many tokens it read"

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
                self.dearest = max(self.dearest, cost(self.judge, said.read, said.written))
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
                self._end()
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
        """Waits until a request may be made, and counts it: whoever has had a turn tells `_end`.

        Raises:
            Stopped: a limit is reached, or another request stopped all.
        """
        limit = self.judge.max_requests
        while self._too_dear():
            if not self.under_way:
                raise Stopped(f"judge.max_cost={self.judge.max_cost:g} is spent, or too little of it is left for another question")
            self.ended.clear()
            await self.ended.wait()
        self._go_on()
        if limit is not None and self.spent.requests >= limit:
            raise Stopped(f"judge.max_requests={limit} requests are made")
        self.spent.requests += 1
        self.under_way += 1
        if self.judge.requests_per_minute:
            now = time.monotonic()
            self.next = max(now, self.next) + 60 / self.judge.requests_per_minute
            await asyncio.sleep(max(0.0, self.next - 60 / self.judge.requests_per_minute - now))
            try:
                self._go_on()
            except Stopped:
                self.spent.requests -= 1
                self._end()
                raise

    def _go_on(self) -> None:
        if self.stopped:
            raise Stopped(self.stopped)

    def _end(self) -> None:
        self.under_way -= 1
        self.ended.set()

    def _too_dear(self) -> bool:
        """Whether another question may cost more than is left, with those under way: each as much as the dearest so far, of which
        nothing is known before the first answer, so that it is waited for."""
        if self.judge.max_cost is None or self.stopped:
            return False
        if not self.dearest and self.under_way:
            return True
        expected = cost(self.judge, self.spent.read, self.spent.written) + (self.under_way + 1) * self.dearest
        # What is spent exactly is a sum of floats.
        return expected > self.judge.max_cost * (1 + 1e-9)
