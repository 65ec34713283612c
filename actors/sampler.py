"""A sampler in transformers for models so small that an engine's start would cost more than its speed saves.

The same verb as `actors.generator.Generator`: token ids in, token ids out. Prompts are sorted by length and padded on the left; the
random numbers of a response depend on the seed and its place alone, not on what it is batched with.

Shapes: B responses of a batch, P positions of the padded prompts, N new tokens at most, L positions of prompts and responses, T positions
of them up to a step, S positions that a step adds (P, then 1), V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from actors.generator import Response
from actors.settings import Engine, Sampling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


class Sampler:
    """Loads a policy.

    Args:
        weights: directory or hub id of the policy.
        engine: settings; `max_num_seqs` responses are decoded at once.
        max_model_len: longest prompt and response together, tokens.
        stop_ids: tokens that end a response.
        trust_remote_code: run Python code that comes with the model.
    """

    def __init__(self, weights: str, engine: Engine, max_model_len: int, stop_ids: Sequence[int], trust_remote_code: bool = False):
        self.device = "cuda" if engine.num_gpus else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(max(1, int(engine.num_cpus)))
        self.options = {"dtype": DTYPES[engine.dtype], "trust_remote_code": trust_remote_code}
        self.at_once, self.max_model_len, self.stop_ids = engine.max_num_seqs, max_model_len, list(stop_ids)
        self.load(weights)

    def load(self, weights: str) -> None:
        """Reads another policy.

        Args:
            weights: its directory or hub id.
        """
        self.model = AutoModelForCausalLM.from_pretrained(weights, **self.options).to(self.device).eval()

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, tell: Callable[[int], None] | None = None
    ) -> list[list[Response]]:
        """Samples responses; arguments and results are those of `Generator`."""
        found: list[list[Response]] = [[] for _ in prompts]
        rows = sorted((row for row in range(len(prompts)) for _ in range(sampling.samples)), key=lambda row: len(prompts[row]))
        numbers = [k % sampling.samples for k in range(len(rows))]
        for start in range(0, len(rows), self.at_once):
            batch = rows[start : start + self.at_once]
            draws_BN = None
            if not sampling.greedy:
                places = zip(batch, numbers[start : start + self.at_once], strict=True)
                draws_BN = np.stack([uniform(seed, row, number, sampling.max_new_tokens) for row, number in places])
            for row, response in zip(batch, self._batch([prompts[row] for row in batch], sampling, draws_BN), strict=True):
                found[row].append(response)
            if tell:
                tell(start + len(batch))
        return found

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling, draws_BN: np.ndarray | None) -> list[Response]:
        """Decodes a batch to its end."""
        longest = max(len(ids) for ids in prompts)
        limit = min(sampling.max_new_tokens, self.max_model_len - longest)
        if limit < 1:
            raise ValueError(f"a prompt of {longest} tokens leaves no room for a response in max_model_len={self.max_model_len}")
        ids_BP = torch.zeros((len(prompts), longest), dtype=torch.long)
        mask_BL = torch.zeros((len(prompts), longest + limit), dtype=torch.long)
        for row, ids in enumerate(prompts):
            ids_BP[row, longest - len(ids) :] = torch.tensor(ids)
            mask_BL[row, longest - len(ids) :] = 1
        input_BS, mask_BL = ids_BP.to(self.device), mask_BL.to(self.device)
        positions_BS = (mask_BL[:, :longest].cumsum(1) - 1).clamp(min=0)
        stops = torch.tensor(self.stop_ids, device=self.device)
        ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        tokens, cache = [], None
        for step in range(limit):
            mask_BT = mask_BL[:, : longest + step]
            out = self.model(input_BS, attention_mask=mask_BT, position_ids=positions_BS, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token_B = choose(out.logits[:, -1].float(), sampling, None if draws_BN is None else torch.from_numpy(draws_BN[:, step]))
            tokens.append(token_B)
            ended_B |= torch.isin(token_B, stops)
            if ended_B.all():
                break
            input_BS, positions_BS = token_B[:, None], positions_BS[:, -1:] + 1
        return [self._cut(row) for row in torch.stack(tokens, dim=1).tolist()]

    def _cut(self, ids: list[int]) -> Response:
        """A response up to and with the first token that ends it."""
        end = next((k for k, token in enumerate(ids) if token in self.stop_ids), None)
        return Response(ids, "length") if end is None else Response(ids[: end + 1], "stop")


def choose(logits_BV: torch.Tensor, sampling: Sampling, draw_B: torch.Tensor | None) -> torch.Tensor:
    """The next token of every row, `[B]`: the most likely one, or where the cumulated probability passes a number in [0, 1)."""
    if draw_B is None:
        return logits_BV.argmax(dim=1)
    probs_BV = torch.softmax(logits_BV / sampling.temperature, dim=1)
    order_BV = None
    if sampling.top_p < 1:
        # The nucleus: all tokens before which less than top_p is cumulated.
        probs_BV, order_BV = probs_BV.sort(dim=1, descending=True)
        probs_BV = probs_BV * (probs_BV.cumsum(1) - probs_BV < sampling.top_p)
    sums_BV = probs_BV.double().cumsum(1)
    target_B = draw_B.to(sums_BV) * sums_BV[:, -1]
    # Rounding must not lead to a token without probability.
    last_B = (probs_BV > 0).double().mul(torch.arange(1, probs_BV.shape[1] + 1, device=probs_BV.device)).argmax(dim=1)
    place_B = torch.minimum(torch.searchsorted(sums_BV, target_B[:, None], right=True).squeeze(1), last_B)
    return place_B if order_BV is None else order_BV.gather(1, place_B[:, None]).squeeze(1)


def uniform(seed: int, row: int, number: int, count: int) -> np.ndarray:
    """`[count]` numbers in [0, 1) of one response: sample `number` of the prompt in `row`."""
    return np.random.default_rng([seed, row, number]).random(count)
