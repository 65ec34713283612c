"""A model that scores given responses: a policy with their log-probs (the reference of a training stage), or a reward model.

The forward pass is the learner's own, so that at the first step of training every log ratio is 0.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from transformers import AutoConfig

from actors.learner import policy
from actors.learner.batches import Example, collate, shares_prompt
from actors.learner.rewards import ClassifierRewards, reads_its_last_token
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
        safetensors_only: read no weights in other formats.
    """

    def __init__(
        self,
        weights: str,
        scoring: Scoring,
        precision: str,
        longest: int | None = None,
        trust_remote_code: bool = False,
        kind: str = "policy",
        safetensors_only: bool = False,
    ):
        self.max_batch_tokens = scoring.max_batch_tokens
        self.device = "cuda" if scoring.num_gpus else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(max(1, int(scoring.num_cpus)))
        if kind == "reward" and not policy.is_classifier(AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code)):
            raise ValueError(f"{weights} is no reward model: its config names no class for sequence classification")
        model = policy.load(weights, precision, longest, trust_remote_code, kind, safetensors_only)
        own_way = kind == "reward" and model.config.num_labels == 1 and not reads_its_last_token(model)
        module = ClassifierRewards(model) if own_way else policy.KINDS[kind].module(model)
        self.module = module.to(self.device).eval()
        self.share_prompt = shares_prompt(model.config, longest)

    def __call__(self, examples: Sequence[Example], tell: Callable[[int], None] | None = None) -> list[list[float]]:
        """Scores rows.

        Args:
            examples: the rows.
            tell: called with the number of responses that are scored, as it grows.

        Returns:
            the summed log-prob (nats) or the reward of every response of every row, in the order given.
        """
        results: list[list[float]] = [[0.0] * len(example.responses) for example in examples]
        parts = [(row, part) for row, example in enumerate(examples) for part in self._parts(example)]
        scored = 0
        cut = [replace(examples[row], responses=tuple(examples[row].responses[r] for r in part), ref_logps=()) for row, part in parts]
        with torch.no_grad():
            for numbers in batches_by_length([example.cost(self.share_prompt) for example in cut], self.max_batch_tokens):
                batch = collate([cut[number] for number in numbers], pad_id=0, share_prompt=self.share_prompt)
                values = iter(self.module(batch.to(self.device))[0].tolist())
                for row, part in (parts[number] for number in numbers):
                    for response in part:
                        results[row][response] = next(values)
                scored += sum(len(parts[number][1]) for number in numbers)
                if tell:
                    tell(scored)
        return results

    def _parts(self, example: Example) -> list[list[int]]:
        """The responses of a row in parts that fit one forward pass: there may be hundreds. Those that begin alike stay together where
        that is computed once, else those of one length."""
        if example.cost(self.share_prompt) <= self.max_batch_tokens:
            return [list(range(len(example.responses)))]
        lengths = [len(response) for response in example.responses]
        parts: list[list[int]] = []
        tokens = 0
        alike = (lambda response: list(example.responses[response])) if self.share_prompt else (lambda response: [-lengths[response]])
        for response in sorted(range(len(lengths)), key=alike):
            own = lengths[response] if self.share_prompt else len(example.prompt_ids) + lengths[parts[-1][0] if tokens else response]
            if not tokens or tokens + own > self.max_batch_tokens:
                parts.append([])
                tokens = len(example.prompt_ids) if self.share_prompt else 0
            parts[-1].append(response)
            tokens += own
        return parts


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
