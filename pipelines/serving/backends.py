"""What the gateway asks: reward models, a policy and a judge, each a deployment of Ray Serve whose processes may die and come back."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from pipelines.serving.refusal import Busy, Refused

T = TypeVar("T")
ATTEMPTS = 4
"""times that a request is given to a deployment whose processes die under it"""


async def together(*work: Coroutine[Any, Any, T]) -> list[T]:
    """The results of all; when one fails or nobody waits any more, the others stop."""
    tasks = [asyncio.create_task(part) for part in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


class Remote:
    """A deployment behind its handle. What a dead process held is asked of another one; a full queue is answered at once.

    Args:
        name: in errors.
        handle: Ray Serve's.
        retry_after: what a client is told to wait, seconds.
    """

    def __init__(self, name: str, handle: Any, retry_after: float = 1.0):
        self.name = name
        self.handle = handle
        self.retry_after = retry_after

    async def call(self, method: str, *args: Any) -> Any:
        """The result of a method.

        Raises:
            Refused: by the method; or 503, because its queue is full or no process lives.
        """
        for attempt in range(1, ATTEMPTS + 1):
            response = getattr(self.handle, method).remote(*args)
            try:
                return await response
            except asyncio.CancelledError:
                # Nobody waits any more: its place in a queue or in an engine is for others.
                with contextlib.suppress(Exception):
                    response.cancel()
                raise
            except Exception as error:  # noqa: BLE001
                # Sorted by kind, of which Ray has a dozen.
                refused = self._refused(error)
                if refused:
                    raise refused from None
                await self._pause(attempt, error)
        raise AssertionError("the last attempt raises")

    async def stream(self, method: str, *args: Any) -> AsyncIterator[Any]:
        """The results of a method that gives several; once one has come, there is no second attempt.

        Raises:
            Refused: as `call`.
        """
        for attempt in range(1, ATTEMPTS + 1):
            begun = False
            response = getattr(self.handle.options(stream=True), method).remote(*args)
            try:
                async for item in response:
                    begun = True
                    yield item
                return
            except (asyncio.CancelledError, GeneratorExit):
                with contextlib.suppress(Exception):
                    response.cancel()
                raise
            except Exception as error:  # noqa: BLE001
                # Sorted by kind, of which Ray has a dozen.
                refused = self._refused(error)
                if refused or begun:
                    raise refused or self._unavailable(f"died in the middle of its answer: {type(error).__name__}") from None
                await self._pause(attempt, error)

    def _refused(self, error: Exception) -> Refused | None:
        """What the client is told at once; None for what another process may answer."""
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        cause = getattr(error, "cause", None) or error
        if isinstance(cause, Refused):
            return cause
        if isinstance(cause, BackPressureError):
            return Busy(503, f"{self.name} has a full queue: try again", retry_after=self.retry_after)
        if isinstance(cause, DeploymentUnavailableError):
            return self._unavailable("has no process that works")
        if isinstance(error, (ActorDiedError, ActorUnavailableError, RayActorError)) and not isinstance(error, RayTaskError):
            return None
        if type(cause).__name__ == "EngineDead":
            return None
        return self._unavailable(f"failed: {type(cause).__name__}")

    async def _pause(self, attempt: int, error: Exception) -> None:
        if attempt == ATTEMPTS:
            raise self._unavailable(f"died {ATTEMPTS} times under this request: {type(error).__name__}") from None
        await asyncio.sleep(0.1 * 2**attempt)

    def _unavailable(self, why: str) -> Refused:
        return Refused(503, f"{self.name} {why}: try again", retry_after=self.retry_after)
