"""Answers other than 200, from wherever they are known to the client, in OpenAI's error shape."""

import math
from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error", 422: "invalid_request_error"}


class Refused(Exception):
    """A request that gets another answer than it wished.

    Args:
        status: HTTP status.
        message: for a person; what was wrong and what is allowed.
        param: the field.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: float | None = None):
        # All of them, so that it survives pickling between processes.
        super().__init__(status, message, param, retry_after)
        self.status = status
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        # What a client wrote may be no UTF-8 when it is quoted back.
        message = self.message.encode("utf-8", "backslashreplace").decode("utf-8")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.status}}

    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {} if self.retry_after is None else {"Retry-After": str(math.ceil(self.retry_after))}


class Busy(Refused):
    """A queue is full: the same request may be taken a moment later."""
