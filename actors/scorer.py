"""A model that scores given responses: a policy with their log-probs (the reference of a training stage), or a reward model.

The forward pass is the learner's own, so that at the first step of training every log ratio is 0.
"""

from collections.abc import Iterator, Sequence

import torch
from transformers import AutoConfig

from actors.learner import policy
from actors.learner.batches import Example, collate, shares_prompt
from actors.settings import Scoring


class Scorer:
    """Loads a model for forward passes only.

    Args:
        weights: its directory or hub id.
        scoring: settings of the pool.
        precision: of the training stage that reads the log-probs.
        longest: no prompt with one of its responses is longer, tokens.
        trust_remote_code: run Python code that comes with the model.
        kind: "policy" for log-probs, "reward" for rewards.
    """

    def __init__(
        self,
        weights: str,
        scoring: Scoring,
        precision: str,
        longest: int | None = None,
        trust_remote_code: bool = False,
        kind: str = "policy",
    ):
        self.max_batch_tokens = scoring.max_batch_tokens
        self.device = "cuda" if scoring.num_gpus else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(max(1, int(scoring.num_cpus)))
        if kind == "reward" and not policy.is_classifier(AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code)):
            raise ValueError(f"{weights} is no reward model: its config names no class for sequence classification")
        model = policy.load(weights, precision, longest, trust_remote_code, kind)
        self.module = policy.KINDS[kind].module(model).to(self.device).eval()
        self.share_prompt = shares_prompt(model.config, longest)

    def __call__(self, examples: Sequence[Example]) -> list[list[float]]:
        """Scores rows.

        Returns:
            the summed log-prob (nats) or the reward of every response of every row, in the order given.
        """
        results: list[list[float]] = [[] for _ in examples]
        with torch.no_grad():
            for rows in batches_by_length([example.cost(self.share_prompt) for example in examples], self.max_batch_tokens):
                batch = collate([examples[row] for row in rows], pad_id=0, share_prompt=self.share_prompt)
                values = iter(self.module(batch.to(self.device))[0].tolist())
                for row in rows:
                    results[row] = [next(values) for _ in examples[row].responses]
        return results


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Groups row indices, longest first, so that rows x longest row stays within `max_tokens` (a longer row goes alone)."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
