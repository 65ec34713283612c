"""A vLLM engine in this process that serves many callers at once.

    callers (asyncio) --requests, cancellations--> one thread: take in, step, step ... --outputs--> callers

vLLM's own asynchronous engine runs in a second process, which a SIGKILL of the first leaves behind with all its memory. Here the engine
lives and dies with the process that serves.
"""

import asyncio
import contextlib
import logging
import os
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """Who waits for a request's outputs."""

    loop: asyncio.AbstractEventLoop
    outputs: "asyncio.Queue[Any]" = field(default_factory=asyncio.Queue)

    def tell(self, output: Any) -> None:
        """From the engine's thread."""
        # A loop that is closed has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.outputs.put_nowait, output)


class EngineDead(RuntimeError):
    """A step of the engine failed: the process has to be started anew."""


def end_process(failure: EngineDead) -> None:
    """Ends a process that is nothing without its engine: it would answer faster than those that work, and so be asked the most."""
    log.critical("this process ends: %s", failure)
    logging.shutdown()
    os._exit(1)


class EngineLoop:
    """Steps an engine in a thread of its own.

    Args:
        engine: a `vllm.v1.engine.llm_engine.LLMEngine` whose core is in this process.
        died: called when a step has failed and every caller is told.
    """

    def __init__(self, engine: Any, died: Callable[[EngineDead], None] = lambda failure: None):
        self.engine = engine
        self.died = died
        self.commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.callers: dict[str, Caller] = {}
        self.names: dict[str, str] = {}
        """the engine's names of requests"""
        self.failure: EngineDead | None = None
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    async def outputs(self, prompt_ids: Sequence[int], params: Any) -> AsyncIterator[Any]:
        """What the engine gives for a prompt; a caller that stops listening stops the request.

        Args:
            prompt_ids: tokens.
            params: vLLM's `SamplingParams`, whose `output_kind` says what comes before the end.

        Raises:
            ValueError: the engine refuses the request.
            EngineDead: the engine failed.
        """
        self.check()
        name, caller = uuid.uuid4().hex, Caller(asyncio.get_running_loop())
        self.commands.put(partial(self._take_in, name, list(prompt_ids), params, caller))
        finished = False
        try:
            while not finished:
                output = await caller.outputs.get()
                if isinstance(output, Exception):
                    finished = True
                    raise output
                finished = output.finished
                yield output
        finally:
            if not finished:
                self.commands.put(partial(self._cancel, name))

    def check(self) -> None:
        """Raises EngineDead once a step failed."""
        if self.failure:
            raise self.failure

    def running(self) -> int:
        """Requests that are not finished."""
        return len(self.callers)

    def _take_in(self, name: str, prompt_ids: list[int], params: Any, caller: Caller) -> None:
        from vllm.inputs.engine import tokens_input

        try:
            self.check()
            self.names[name] = self.engine.add_request(name, tokens_input(prompt_ids), params)
        except EngineDead as error:
            caller.tell(error)
        except Exception as error:  # noqa: BLE001
            # Whatever it is about is this request; the others go on.
            caller.tell(ValueError(str(error)))
        else:
            self.callers[name] = caller

    def _cancel(self, name: str) -> None:
        if name in self.callers:
            # By its own name: by ours vLLM forgets the parts of a request for several samples, but not the whole.
            self.engine.abort_request([self.names.pop(name)], internal=True)
            del self.callers[name]

    def _run(self) -> None:
        while self.failure is None:
            try:
                self._step()
            except Exception as error:  # noqa: BLE001
                # Nothing is known of the engine's state any more.
                self.failure = EngineDead(f"the engine failed: {type(error).__name__}: {error}")
        while self.callers:
            self.callers.popitem()[1].tell(self.failure)
        self.died(self.failure)
        while True:
            # Who asks between the failure and the end of the process is told.
            self.commands.get()()

    def _step(self) -> None:
        # Without a request there is nothing to step for.
        waiting = not self.engine.has_unfinished_requests()
        with contextlib.suppress(queue.Empty):
            while True:
                self.commands.get(block=waiting)()
                waiting = False
        for output in self.engine.step():
            caller = self.callers.get(output.request_id)
            if output.finished:
                self.callers.pop(output.request_id, None)
                self.names.pop(output.request_id, None)
            if caller:
                caller.tell(output)
