"""A judge behind an OpenAI-compatible endpoint."""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from pipelines.judges.settings import JudgeModel


class EndpointError(Exception):
    """The endpoint gives no answer; the text is for a person.

    Args:
        text: why.
        hopeless: asked again it would say the same.
        retry_after: seconds after which it wants to be asked again.
        denied: it wants another key, whatever is asked.
    """

    def __init__(self, text: str, hopeless: bool = False, retry_after: float | None = None, denied: bool = False):
        super().__init__(text)
        self.hopeless = hopeless
        self.retry_after = retry_after
        self.denied = denied


@dataclass(frozen=True)
class Said:
    """A judge's answer, and what it cost."""

    text: str
    logps: list[float] | None = None
    """of the labels, nats; None where words were wanted"""
    read: int = 0
    """tokens of the question, as who answers counts them"""
    written: int = 0
    """and of the answer"""
    cut: bool = False
    """whether the answer ends before the judge had ended"""


@dataclass
class Spent:
    """What was asked of an endpoint; answers that are of no use are paid for, too."""

    requests: int = 0
    read: int = 0
    """tokens"""
    written: int = 0
    most_read: int = 0
    """tokens, of one request"""
    most_written: int = 0

    def add(self, read: int, written: int) -> None:
        """The tokens of a request."""
        self.read, self.written = self.read + read, self.written + written
        self.most_read, self.most_written = max(self.most_read, read), max(self.most_written, written)


class Endpoint:
    """Asks, without thinking of its own and at temperature 0.

    Args:
        settings: its URL, its name there, and where its key is.
        retries: of the client, for requests that fail.
        timeout: seconds for one answer, retries included.
        spent: grows by the tokens of every answer.
    """

    def __init__(self, settings: JudgeModel, retries: int = 3, timeout: float = 120, spent: Spent | None = None):
        from openai import AsyncOpenAI

        assert settings.url
        self.url = settings.url
        self.model = settings.url_model
        self.key_env = settings.url_key_env
        key = os.environ.get(settings.url_key_env) or "none"
        self.timeout = timeout
        self.client = AsyncOpenAI(base_url=settings.url, api_key=key, max_retries=retries, timeout=timeout)
        self.spent = spent or Spent()

    async def write(self, question: str, max_new_tokens: int) -> Said:
        """Its words.

        Raises:
            EndpointError: there is no answer.
        """
        found = await self._ask(question, max_tokens=max_new_tokens)
        text = _read(lambda: found.choices[0].message.content, "a message") or ""
        if not isinstance(text, str):
            raise EndpointError(f"the judge's endpoint answers with a {type(text).__name__} in place of words")
        ended = found.choices[0].finish_reason
        if ended == "content_filter":
            raise EndpointError("the judge's endpoint stops its answer by a content filter", hopeless=True)
        # Whoever says nothing of how it ended may have broken off.
        return Said(text, None, *_cost(found), cut=ended != "stop")

    async def label_logps(self, question: str, labels: Sequence[str]) -> Said:
        """Log-probs of labels as the start of its answer; a label that is not among its twenty likeliest tokens counts as less likely
        than all of them.

        Raises:
            EndpointError: there is no answer, or none of the labels is among them.
        """
        found = await self._ask(question, max_tokens=1, logprobs=True, top_logprobs=20)
        top = _read(
            lambda: [(entry.token.strip(), float(entry.logprob)) for entry in found.choices[0].logprobs.content[0].top_logprobs],
            "log-probs: judge.mode=logprob needs an endpoint that gives them",
        )
        by_word: dict[str, float] = {}
        for word, logp in top:
            by_word.setdefault(word, logp)
        if not any(label in by_word for label in labels):
            raise EndpointError(f"the judge answers with none of the labels {', '.join(labels)}", hopeless=True)
        least = min(by_word.values()) - 1
        return Said(top[0][0], [by_word.get(label, least) for label in labels], *_cost(found))

    async def close(self) -> None:
        """Ends its connections."""
        await self.client.close()

    async def _ask(self, question: str, **options: Any) -> Any:
        from openai import APIStatusError, AuthenticationError, OpenAIError

        asked: Any = [{"role": "user", "content": question}]
        try:
            # The client's own time-out begins anew with every piece of an answer that drips.
            async with asyncio.timeout(self.timeout):
                create = self.client.chat.completions.with_raw_response.create
                answer = await create(model=self.model, messages=asked, temperature=0, seed=0, **options)
        except AuthenticationError:
            raise EndpointError(f"the judge's endpoint refuses the key in {self.key_env}", hopeless=True, denied=True) from None
        except APIStatusError as error:
            again = error.status_code in (408, 409, 429) or error.status_code >= 500
            why = f"the judge's endpoint {self.url} answers {error.status_code}: {' '.join(error.message.split())[:200]}"
            raise EndpointError(why, not again, seconds(error.response.headers.get("retry-after", ""))) from None
        except TimeoutError:
            raise EndpointError(f"the judge's endpoint gives no whole answer within {self.timeout:g} s") from None
        except (OpenAIError, ValueError) as error:
            why = f"{type(error).__name__}: {error.__cause__ or error}"
            raise EndpointError(f"the judge's endpoint {self.client.base_url} does not answer: {why[:200]}") from None
        found: Any = None
        with contextlib.suppress(OpenAIError, ValueError):
            found = answer.parse()
        self.spent.add(*_cost(found))
        if not getattr(found, "choices", None):
            raise _no_completion(self.url, answer.headers.get("content-type", ""), answer.text)
        return found


def seconds(retry_after: str) -> float | None:
    """How long a server wants to be left alone, from its header: a number, or a date; None if it is neither."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(retry_after))
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return None


def _no_completion(url: str, kind: str, text: str) -> EndpointError:
    """For an answer that came in full and is none: with the server's own reason, or how it begins."""
    start = " ".join(text[:1000].split())[:100]
    if "html" in kind or start.lower().startswith(("<!doctype html", "<html")):
        why = "with a page for browsers (another address, or one that wants a sign-in?): set judge.url"
        return EndpointError(f"the judge's endpoint {url} answers {why}; it begins {start!r}", hopeless=True)
    with contextlib.suppress(ValueError, LookupError, TypeError):
        if error := json.loads(text)["error"]:
            return EndpointError(f"the judge's endpoint {url} answers with an error: {str(error['message'])[:200]}")
    return EndpointError(f"the judge's endpoint {url} answers with no chat completion, but with {start!r}")


def _read(get: Callable[[], Any], what: str) -> Any:
    """A part of an endpoint's answer, which may be without it."""
    try:
        return get()
    except (AttributeError, LookupError, TypeError, ValueError):
        raise EndpointError(f"the judge's endpoint answers without {what}") from None


def _cost(found: Any) -> tuple[int, int]:
    """As an endpoint counts it; nothing where it does not."""
    usage = getattr(found, "usage", None)
    read, written = (getattr(usage, name, 0) for name in ("prompt_tokens", "completion_tokens"))
    return read if isinstance(read, int) else 0, written if isinstance(written, int) else 0
