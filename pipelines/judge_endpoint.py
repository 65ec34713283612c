"""A judge behind an OpenAI-compatible endpoint."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.judging_settings import JudgeModel


class EndpointError(Exception):
    """The endpoint gives no answer; the text is for a person.

    Args:
        text: why.
        hopeless: asked again it would say the same.
        retry_after: seconds after which it wants to be asked again.
    """

    def __init__(self, text: str, hopeless: bool = False, retry_after: float | None = None):
        super().__init__(text)
        self.hopeless = hopeless
        self.retry_after = retry_after


@dataclass(frozen=True)
class Said:
    """An answer, and what it cost."""

    text: str
    logps: list[float] | None = None
    """of the labels, nats; None where words were wanted"""
    read: int = 0
    """tokens of the question, as the endpoint counts them"""
    written: int = 0
    """and of the answer"""


class Endpoint:
    """Asks, without thinking of its own and at temperature 0.

    Args:
        settings: its URL, its name there, and where its key is.
        retries: of the client, for requests that fail.
        timeout: seconds for one answer.
    """

    def __init__(self, settings: JudgeModel, retries: int = 3, timeout: float = 120):
        from openai import AsyncOpenAI

        assert settings.url
        self.model = settings.url_model
        self.key_env = settings.url_key_env
        key = os.environ.get(settings.url_key_env) or "none"
        self.client = AsyncOpenAI(base_url=settings.url, api_key=key, max_retries=retries, timeout=timeout)

    async def write(self, question: str, max_new_tokens: int) -> Said:
        """Its words.

        Raises:
            EndpointError: there is no answer.
        """
        found = await self._ask(question, max_tokens=max_new_tokens)
        text = _read(lambda: found.choices[0].message.content)
        return Said(text or "", None, *_cost(found))

    async def label_logps(self, question: str, labels: Sequence[str]) -> Said:
        """Log-probs of labels as the start of its answer; a label that is not among its twenty likeliest tokens counts as less likely
        than all of them.

        Raises:
            EndpointError: there is no answer, or none of the labels is among them.
        """
        found = await self._ask(question, max_tokens=1, logprobs=True, top_logprobs=20)
        likely = _read(lambda: list(found.choices[0].logprobs.content[0].top_logprobs))
        by_word: dict[str, float] = {}
        for entry in likely:
            by_word.setdefault(entry.token.strip(), entry.logprob)
        if not any(label in by_word for label in labels):
            raise EndpointError(f"the judge answers with none of the labels {', '.join(labels)}", hopeless=True)
        least = min(entry.logprob for entry in likely) - 1
        return Said(likely[0].token, [by_word.get(label, least) for label in labels], *_cost(found))

    async def close(self) -> None:
        """Ends its connections."""
        await self.client.close()

    async def _ask(self, question: str, **options: Any) -> Any:
        from openai import APIStatusError, AuthenticationError, OpenAIError, PermissionDeniedError

        asked: Any = [{"role": "user", "content": question}]
        try:
            return await self.client.chat.completions.create(model=self.model, messages=asked, temperature=0, seed=0, **options)
        except (AuthenticationError, PermissionDeniedError):
            raise EndpointError(f"the judge's endpoint refuses the key in {self.key_env}", hopeless=True) from None
        except APIStatusError as error:
            wait = error.response.headers.get("retry-after", "")
            again = error.status_code in (408, 409, 429) or error.status_code >= 500
            why = f"the judge's endpoint answers {error.status_code}: {error.message[:200]}"
            raise EndpointError(why, not again, float(wait) if wait.isdigit() else None) from None
        except (OpenAIError, ValueError) as error:
            raise EndpointError(f"the judge's endpoint does not answer: {type(error).__name__}") from None


def _read(get: Callable[[], Any]) -> Any:
    """A part of an endpoint's answer, which may leave out what it was asked for."""
    try:
        return get()
    except (AttributeError, IndexError, TypeError):
        raise EndpointError(
            "the judge's endpoint answers without what it was asked for (logprobs need an endpoint that gives them)"
        ) from None


def _cost(found: Any) -> tuple[int, int]:
    """As an endpoint counts it; nothing where it does not."""
    usage = getattr(found, "usage", None)
    return (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
