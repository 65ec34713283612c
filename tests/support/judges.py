"""Judges of known character behind an OpenAI-compatible endpoint, over real HTTP."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from serving import over_http

Asked = tuple[str, dict[str, Any]]
"""Authorization header and body of a request."""
SHOWN = re.compile(r"<response A>\n(.*)\n</response A>.*<response B>\n(.*)\n</response B>", re.DOTALL)


def always_a(question: str) -> str:
    """The one that is shown first."""
    return "Clear. [[A]]"


def longer(question: str) -> str:
    """The longer one."""
    found = SHOWN.search(question)
    assert found, question
    a, b = (len(text) for text in found.groups())
    return "[[A]]" if a > b else "[[B]]" if b > a else "[[C]]"


def completion(text: Any, body: dict[str, Any], ended: str = "stop") -> dict[str, Any]:
    """A chat completion of OpenAI's shape; with log-probs where they are asked for."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": ended, "message": {"role": "assistant", "content": text}}
    if body.get("logprobs"):
        likely = [{"token": token, "logprob": logp, "bytes": None} for token, logp in ((" A", -0.1), ("The", -2.5), ("B", -4.0))]
        choice["logprobs"] = {"content": [likely[0] | {"top_logprobs": likely}]}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice], "usage": usage}


@contextlib.contextmanager
def endpoint(answer: Callable[[str], str | tuple[int, Any] | tuple[int, Any, dict[str, str]]]) -> Iterator[tuple[str, list[Asked]]]:
    """Serves a judge.

    Args:
        answer: from the question to its words; or to a status and a body: JSON, text, or bytes that the connection ends within; and
            headers, if there are some.

    Yields:
        its URL, and the requests that it got.
    """
    app, asked = FastAPI(), list[Asked]()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Any:
        body = await request.json()
        asked.append((request.headers["authorization"], body))
        said = answer(body["messages"][0]["content"])
        if isinstance(said, str):
            return completion(said, body)
        status, content, headers = (*said, {})[:3]
        if isinstance(content, bytes):
            return Response(content, status, {"content-length": str(len(content) + 99), "content-type": "application/json"})
        return PlainTextResponse(content, status, headers) if isinstance(content, str) else JSONResponse(content, status, headers)

    with over_http(app) as url:
        yield f"{url}/v1", asked
