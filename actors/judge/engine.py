"""A judge in a vLLM engine of its own: questions as token ids in, words or probabilities of labels out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.generator import counted, policy_engine
from actors.settings import Engine


@dataclass(frozen=True)
class Words:
    """What a judge says."""

    text: str
    tokens: int
    """written"""
    logps: list[float] | None = None
    """of the labels among each other, nats; None where words were wanted"""
    cut: bool = False
    """whether they end before the judge had ended"""


def label_params(firsts: Sequence[int]) -> Any:
    """vLLM's sampling parameters for the log-probs of labels by their first tokens."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=list(firsts), detokenize=False)


def label_logps(found: Any, firsts: Sequence[int]) -> list[float]:
    """Log-probs of labels among each other, nats, of what `label_params` gives: vLLM's are among all tokens."""
    logps = [found.logprobs[0][token].logprob for token in firsts]
    most = max(logps)
    total = most + math.log(sum(math.exp(logp - most) for logp in logps))
    return [logp - total for logp in logps]


class JudgeEngine:
    """Loads a judge.

    Args:
        weights: its directory or hub id.
        tokenizer: directory of its tokenizer.
        engine: settings.
        max_model_len: longest question and answer together, tokens.
        stop_ids: tokens that end an answer.
        trust_remote_code: run Python code that comes with the model.
    """

    def __init__(
        self, weights: str, tokenizer: str, engine: Engine, max_model_len: int, stop_ids: Sequence[int], trust_remote_code: bool = False
    ):
        self.stop_ids = list(stop_ids)
        self.llm = policy_engine(weights, engine, max_model_len, trust_remote_code, text=True, tokenizer=tokenizer)

    def __call__(
        self, questions: Sequence[Sequence[int]], max_new_tokens: int, labels: Sequence[int] = (), tell: Callable[[int], None] | None = None
    ) -> list[Words]:
        """An answer to each question.

        Args:
            questions: token ids.
            max_new_tokens: length limit of an answer in words.
            labels: first tokens of the labels whose probabilities are wanted instead of words.
            tell: called with the number of answers, as it grows.
        """
        from vllm import SamplingParams

        words = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=self.stop_ids)
        params = label_params(labels) if labels else words
        outputs = self.llm.generate([{"prompt_token_ids": list(ids)} for ids in questions], params, use_tqdm=counted(tell))
        return [self._words(output.outputs[0], labels) for output in outputs]

    def _words(self, found: Any, labels: Sequence[int]) -> Words:
        logps = label_logps(found, labels) if labels else None
        return Words(found.text, len(found.token_ids), logps, cut=not labels and found.finish_reason == "length")
