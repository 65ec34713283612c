"""A client of the service: rewards, Best-of-N and verdicts, with retries, in batches; for programs that wait and for asyncio.

    client = Client("http://127.0.0.1:8000")
    client.rewards([[{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]])
    client.best_of_n([{"role": "user", "content": "2 + 3?"}], n=16)

`AsyncClient` has the same methods to be awaited.
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

Conversation = Sequence[Mapping[str, str]]
AGAIN = (408, 429, 500, 502, 503, 504)
"""answers after which a request is tried again: what it asks for changes nothing"""


class ServiceError(RuntimeError):
    """The service said no, or nothing.

    Args:
        message: for a person.
        status: HTTP status of its no.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class AsyncClient:
    """Asks a service.

    Args:
        url: of the service.
        api_key: if it wants one.
        batch: conversations in one request.
        concurrency: requests at once.
        retries: of a request that met a full queue, a restart or a broken connection.
        timeout: seconds that a request may take.
    """

    def __init__(self, url: str, api_key: str | None = None, batch: int = 32, concurrency: int = 8, retries: int = 8, timeout: float = 300):
        self.url = url.rstrip("/")
        self.batch = batch
        self.retries = retries
        self.places = asyncio.Semaphore(concurrency)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=timeout)

    async def rewards(
        self,
        conversations: Sequence[Conversation | str | Sequence[int]],
        model: str | None = None,
        normalize: bool = False,
        cut: bool = False,
    ) -> list[float]:
        """Raw rewards.

        Args:
            conversations: messages that end in the assistant's turn; whole texts; or token ids.
            model: name of the reward model; the service's first by default.
            normalize: centre and scale them by the model's stored mean and deviation.
            cut: the last turn of messages was cut at a limit: the chat template does not end it.

        Raises:
            ServiceError: the service refuses one of them, or does not answer.
        """
        options = {"model": model, "normalize": normalize, "use_activation": False}
        # A conversation goes alone in this shape, texts and tokens together.
        spoken = [
            number for number, given in enumerate(conversations) if given and not isinstance(given, str) and isinstance(given[0], Mapping)
        ]
        told = set(spoken)
        bare = [number for number in range(len(conversations)) if number not in told]
        kinds = [[number for number in bare if isinstance(conversations[number], str) == text] for text in (True, False)]
        parts = [numbers[at : at + self.batch] for numbers in kinds for at in range(0, len(numbers), self.batch)]
        asked = [{"messages": conversations[number], "continue_final_message": cut} for number in spoken] + [
            {"input": [conversations[number] for number in part]} for part in parts
        ]
        answers = await asyncio.gather(*(self._post("/classify", body | options) for body in asked))
        values = [0.0] * len(conversations)
        for numbers, answer in zip([*([number] for number in spoken), *parts], answers, strict=True):
            for number, item in zip(numbers, answer["data"], strict=True):
                values[number] = item["probs"][0]
        return values

    async def best_of_n(self, messages: Conversation, n: int, **options: Any) -> tuple[str, float]:
        """The best of n responses, and its reward. `options` are fields of a chat completion."""
        found = await self._post("/v1/chat/completions", {"messages": list(messages), "best_of_n": n} | options)
        return found["choices"][0]["message"]["content"], found["choices"][0]["reward"]

    async def judge(self, messages: Conversation, first: str, second: str, **options: Any) -> dict[str, Any]:
        """The verdict on two responses. `options` are fields of a request to the judge."""
        return await self._post("/v1/judge", {"messages": list(messages), "responses": [first, second]} | options)

    async def close(self) -> None:
        """Ends its connections."""
        await self.http.aclose()

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        async with self.places:
            for attempt in range(self.retries + 1):
                try:
                    answer = await self.http.post(path, json=body)
                except httpx.TransportError as error:
                    why, wait = f"{type(error).__name__}: {error}", None
                else:
                    if answer.status_code == 200:
                        return answer.json()
                    why = _message(answer)
                    if answer.status_code not in AGAIN:
                        raise ServiceError(f"{self.url}{path} answers {answer.status_code}: {why}", answer.status_code)
                    wait = answer.headers.get("retry-after", "")
                    wait = wait if wait.isdigit() else None
                if attempt < self.retries:
                    # Not all at the same time.
                    await asyncio.sleep(max(float(wait or 0), min(30.0, 0.25 * 2**attempt)) * random.uniform(0.75, 1.25))
        raise ServiceError(f"{self.url}{path} does not answer, tried {self.retries + 1} times: {why}")


class Client:
    """`AsyncClient` for programs that wait; the same arguments and methods."""

    def __init__(self, url: str, **options: Any):
        self.url = url
        self.options = options

    def rewards(self, conversations: Sequence[Conversation | str | Sequence[int]], **options: Any) -> list[float]:
        """Raw rewards."""
        return self._run("rewards", conversations, **options)

    def best_of_n(self, messages: Conversation, n: int, **options: Any) -> tuple[str, float]:
        """The best of n responses, and its reward."""
        return self._run("best_of_n", messages, n, **options)

    def judge(self, messages: Conversation, first: str, second: str, **options: Any) -> dict[str, Any]:
        """The verdict on two responses."""
        return self._run("judge", messages, first, second, **options)

    def _run(self, method: str, *args: Any, **options: Any) -> Any:
        async def work() -> Any:
            client = AsyncClient(self.url, **self.options)
            try:
                return await getattr(client, method)(*args, **options)
            finally:
                await client.close()

        return asyncio.run(work())


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]
