"""Answers other than 200, from wherever they are known to the client, in OpenAI's error shape."""

import difflib
import math
from collections.abc import Collection, Sequence
from typing import Any

MOST_TOLD = 3
"""of what is wrong with a body"""
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


def invalid(errors: Sequence[Any], known: Collection[str]) -> Refused:
    """What is wrong with a body.

    Args:
        errors: pydantic's.
        known: its fields.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", first["msg"])
        return Refused(400, f"the body is no JSON: {why} at character {first['loc'][-1]}")
    if isinstance(first.get("input"), bytes):
        # Of another type it is not read: any page in a browser may send those to whatever listens on its machine.
        return Refused(422, "the body is not sent as JSON: send the header Content-Type: application/json")
    # A body may have room for a million others.
    told = [_wrong(error, known) for error in errors[:MOST_TOLD]]
    more = f" (and {len(errors) - MOST_TOLD} more)" if len(errors) > MOST_TOLD else ""
    return Refused(422, "; ".join(told) + more, _where(first) or None)


def _where(error: Any) -> str:
    *inner, last = [part for part in error["loc"] if part != "body"] or [""]
    # Among the names of fields pydantic puts those of a union's members.
    parts = [str(part) for part in inner if isinstance(part, int) or part.isidentifier()]
    named = error["type"] == "extra_forbidden" or isinstance(last, int) or last.isidentifier()
    return ".".join([*parts, *([str(last)[:100]] if named else [])])


def _wrong(error: Any, known: Collection[str]) -> str:
    where, message = _where(error), error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, known, n=1) if "." not in where else []
        message = "there is no such field" + (f", did you mean {near[0]}?" if near else "")
    return f"{where}: {message}" if where else message


class Busy(Refused):
    """A queue is full: the same request may be taken a moment later."""
