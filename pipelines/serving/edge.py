"""What stands before the gateway: a limit on bodies that counts as they come, and an answer for requests whose gateway process died.

Ray Serve's proxy loads `middlewares` by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=pipelines.serving.edge:middlewares.
"""

import asyncio
import json
import logging
import os
from collections.abc import Callable
from typing import Any

from pipelines.serving.refusal import Refused

log = logging.getLogger("ray.serve")
CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipelines.serving.edge:middlewares"}
"""environment of the processes of a cluster whose proxies load the edge"""
LIMIT = "GSIL_BODY_BYTES"
"""environment variable with the longest body that a proxy takes"""
MARK = b"x-served-by"
"""header of every answer that a gateway gave"""


SECONDS = 30.0
"""in which a body has to come"""
BODIES = 64
"""of the longest that a process holds at once"""


class BodyLimit:
    """ASGI middleware that answers 413 once a body is longer than it may be, whatever its header says, 408 where it comes too slowly, and
    503 where too many are held already.

    Args:
        app: what it stands before.
        limit: bytes.
    """

    def __init__(self, app: Callable[..., Any], limit: int):
        self.app = app
        self.limit = limit
        self.held = 0

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(SECONDS):
                    refused = await self._read(scope, receive, body)
            except TimeoutError:
                refused = Refused(408, f"the body did not come within {SECONDS:g} s", "body")
            except ConnectionError:
                return
            if refused:
                await answer(send, refused)
                return
            given = [{"type": "http.request", "body": bytes(body), "more_body": False}]
            await self.app(scope, lambda: _next(given, receive), send)
        finally:
            self.held -= len(body)

    async def _read(self, scope: dict[str, Any], receive: Callable[[], Any], body: bytearray) -> Refused | None:
        """Fills in the body; returns why it is not taken."""
        promised = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        more = True
        while more:
            if len(body) > self.limit or (promised.isdigit() and int(promised) > self.limit):
                break
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            piece = message.get("body", b"")
            body += piece
            self.held += len(piece)
            if self.held > BODIES * self.limit:
                return Refused(503, "too many long requests at once: try again", retry_after=1)
            more = message.get("more_body", False)
        if more or len(body) > self.limit:
            return Refused(413, f"the body is longer than {self.limit} bytes", "body")
        return None


async def _next(given: list[Any], receive: Callable[[], Any]) -> Any:
    return given.pop() if given else await receive()


class DeadGateway:
    """ASGI middleware of a proxy: what only the proxy could answer becomes a 503 in our shape that says to try again.

    Args:
        app: what it stands before.
    """

    def __init__(self, app: Callable[..., Any]):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = replaced = False

        async def pass_on(message: Any) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                started = True
                ours = any(name.lower() == MARK for name, _ in message.get("headers", ()))
                replaced = message["status"] >= 500 and not ours
                if replaced:
                    await answer(send, Refused(503, "the gateway is full, or not there: try again", retry_after=1))
            if not replaced:
                await send(message)

        try:
            await self.app(scope, receive, pass_on)
        except Exception as error:
            if started:
                raise
            # Ray Serve's proxy fails over headers that are no UTF-8; whatever else it fails over is not the client's.
            if isinstance(error, UnicodeDecodeError):
                refused = Refused(400, "a header of the request is no UTF-8")
            else:
                log.exception("the proxy failed over %s", scope["path"])
                refused = Refused(503, "the proxy failed: try again", retry_after=1)
            await answer(send, refused)
            return
        if not started:
            # That is how the proxy ends a request whose gateway died.
            await answer(send, Refused(503, "the gateway's process died under this request: try again", retry_after=1))


async def answer(send: Callable[[Any], Any], refused: Refused) -> None:
    """Sends an error."""
    content = json.dumps(refused.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), **refused.headers()}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": encoded})
    await send({"type": "http.response.body", "body": content})


def middlewares() -> list[Any]:
    """For Ray Serve's proxy."""
    from starlette.middleware import Middleware

    return [Middleware(BodyLimit, limit=int(os.environ.get(LIMIT, 4 * 2**20))), Middleware(DeadGateway)]
