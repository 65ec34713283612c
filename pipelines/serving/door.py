"""The gateway's door: API keys, and a count of everybody who passes."""

import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.serving.edge import MARK, answer
from pipelines.serving.metrics import Metrics
from pipelines.serving.refusal import Refused

log = logging.getLogger("ray.serve")
GONE = 499
"""in place of a status, where nobody was left to be answered"""
OPEN = ("/health", "/", "/docs", "/openapi.json")
"""what is answered without a key: nothing of it costs or tells anything"""
SCRIPTS = "/static-offline-docs/"
"""of /docs, as open"""


@dataclass(frozen=True)
class Access:
    """Who may come in, and for how long."""

    keys: tuple[str, ...] = ()
    """SHA-256 digests of the API keys; none are asked for where there are none"""
    timeout: float = 300
    """seconds that a request may take"""
    closed: Path | None = None
    """while there is such a file, nobody new comes in: the service ends"""

    def admits(self, path: str, headers: dict[bytes, bytes]) -> bool:
        """Whether a request has a key. Every key is compared in full, whatever the others said."""
        if not self.keys or path in OPEN or path.startswith(SCRIPTS):
            return True
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = hashlib.sha256((token if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")).strip()).hexdigest()
        return sum(hmac.compare_digest(given, key) for key in self.keys) > 0


class Door:
    """ASGI middleware: who has no key gets 401; every answer is counted and marked as ours.

    Args:
        app: what it stands before.
        access: the keys.
        metrics: counts.
        paths: of the application; nobody can fill the metrics with names of their own.
    """

    def __init__(self, app: Callable[..., Any], access: Access, metrics: Metrics, paths: set[str]):
        self.app = app
        self.access = access
        self.metrics = metrics
        self.paths = paths

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        status = GONE

        async def marked(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = message | {"headers": [*message.get("headers", ()), (MARK, b"gsil-ray")]}
            await send(message)

        self.metrics.came()
        try:
            if self.access.closed and self.access.closed.exists():
                await answer(marked, Refused(503, "this service ends", retry_after=5))
            elif self.access.admits(scope["path"], dict(scope["headers"])):
                await self.app(scope, receive, marked)
            else:
                await answer(marked, Refused(401, "an API key is needed: Authorization: Bearer KEY"))
        except Exception:
            log.exception("%s failed", scope["path"])
            if status == GONE:
                await answer(marked, Refused(500, "something is wrong with this service; its log says what"))
        finally:
            self.metrics.answered(scope["path"] if scope["path"] in self.paths else "other", status, time.monotonic() - started)
