"""Log-probs of given responses, without a `[B, T, V]` tensor.

The one forward pass of the project: the learner, the reference and every test go through `ResponseLogProbs`, so both sides of a
log ratio come from the same arithmetic.

Shapes: B rows, T positions, N response tokens of a batch, R responses of a batch, D hidden size, V vocabulary.
"""

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from actors.learner.batches import Batch

CHUNK_TOKENS = 512
"""Response tokens whose logits exist at one time."""


class ResponseLogProbs(torch.nn.Module):
    """A causal language model as a function from a batch to the summed log-probs of its responses.

    A module of its own, so that DeepSpeed sees the body, the head and the loop over chunks as one forward pass (ZeRO-3 gathers
    weights at module calls).

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings: is it a causal language model?")
        config = model.config.get_text_config()
        # What some architectures do between head and softmax.
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sums log pi(token | prefix) over each response.

        Returns:
            `[2, R]` float32, in the order of the batch's responses: the plain sums, and those in which token k of T counts
            (T - k) / T (occupancy weighting). Prompt and padding tokens never count.
        """
        hidden_BTD = self.model.base_model(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask,
            position_ids=batch.positions_BT,
            use_cache=False,
        ).last_hidden_state
        source_ND = hidden_BTD.flatten(0, 1)[batch.sources_N]
        logps = [
            checkpoint(
                self._token_logps,
                source_ND[start : start + CHUNK_TOKENS],
                batch.targets_N[start : start + CHUNK_TOKENS],
                use_reentrant=False,
            )
            if torch.is_grad_enabled()
            else self._token_logps(source_ND[start : start + CHUNK_TOKENS], batch.targets_N[start : start + CHUNK_TOKENS])
            for start in range(0, len(batch.targets_N), CHUNK_TOKENS)
        ]
        sums_2R = torch.zeros(2, batch.responses, dtype=torch.float32, device=hidden_BTD.device)
        if not logps:
            return sums_2R
        logps_N = torch.cat(logps)
        return sums_2R.index_add(1, batch.owners_N, torch.stack([logps_N, logps_N * batch.occupancy_N]))

    def _token_logps(self, source_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        logits_NV = self.model.get_output_embeddings()(source_ND).float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV.gather(1, targets_N[:, None]).squeeze(1) - logits_NV.logsumexp(dim=1)
