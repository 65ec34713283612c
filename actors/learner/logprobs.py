"""Log-probs of given responses, without a `[B, T, V]` tensor.

The one forward pass of the project: the learner, the reference and every test go through `ResponseLogProbs`, so both sides of a
log ratio come from the same arithmetic.

Shapes: B rows, T positions, N response tokens of a batch, R responses of a batch, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from actors.learner.batches import Batch

CHUNK_TOKENS = 512
"""Response tokens whose logits exist at one time."""


class ResponseLogProbs(torch.nn.Module):
    """A causal language model as a function from a batch to the summed log-probs of its responses.

    A module of its own, so that DeepSpeed sees the body and the head as one forward pass.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.head = Head(model)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sums log pi(token | prefix) over each response.

        Returns:
            `[2, R]` float32, in the order of the batch's responses: the plain sums, and those in which token k of T counts
            (T - k) / T (occupancy weighting). Prompt and padding tokens never count.
        """
        logps_N = self.head(last_hidden(self.model, batch).flatten(0, 1)[batch.sources_N], batch.targets_N)
        sums_2R = torch.zeros(2, batch.responses, dtype=torch.float32, device=logps_N.device)
        return sums_2R.index_add(1, batch.owners_N, torch.stack([logps_N, logps_N * batch.occupancy_N]))


def last_hidden(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The body's last hidden states, `[B, T, D]`."""
    return model.base_model(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask,
        position_ids=batch.positions_BT,
        use_cache=False,
        **({"branches": batch.branches} if batch.branches else {}),
    ).last_hidden_state


class Head(torch.nn.Module):
    """The language-model head in chunks of tokens, one module call a batch.

    ZeRO-3 gathers weights at module calls, on all workers in the same order, while the number of chunks is each worker's own: it has to
    take this module as a leaf (`deepspeed.utils.set_z3_leaf_modules`).

    Args:
        model: whose head.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.output = model.get_output_embeddings()
        if self.output is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings: is it a causal language model?")
        config = model.config.get_text_config()
        # What some architectures do between head and softmax.
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)

    def forward(self, source_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Log-probs of the targets, `[N]` float32."""
        starts = range(0, max(1, len(targets_N)), CHUNK_TOKENS)
        chunks = [(source_ND[start : start + CHUNK_TOKENS], targets_N[start : start + CHUNK_TOKENS]) for start in starts]
        # The last chunk's logits are the first that the backward pass needs: kept, they cost no memory that recomputing would not.
        recomputed = len(chunks) - 1 if torch.is_grad_enabled() else 0
        logps = [checkpoint(self._token_logps, *chunk, use_reentrant=False) for chunk in chunks[:recomputed]]
        return torch.cat(logps + [self._token_logps(*chunk) for chunk in chunks[recomputed:]])

    def _token_logps(self, source_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        # Not through the module's call, at which ZeRO-3 would gather again.
        logits_NV = self.output.forward(source_ND)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return SelectedLogSoftmax.apply(logits_NV, targets_N)


class SelectedLogSoftmax(torch.autograd.Function):
    """log softmax(logits)[target] of every row, in float32, with one buffer of the size of the logits.

    Autograd's own way through gather and logsumexp makes five of them.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Args: logits `[N, V]`, targets `[N]`. Returns `[N]` float32."""
        logps_NV = torch.log_softmax(logits_NV, dim=1, dtype=torch.float32)
        ctx.save_for_backward(logps_NV, targets_N)
        ctx.dtype = logits_NV.dtype
        return logps_NV.gather(1, targets_N[:, None]).squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """d/d logits = grad * (1[target] - softmax), written over the saved log softmax."""
        logps_NV, targets_N = ctx.saved_tensors
        grad_N = grads[0].float()
        result_NV = logps_NV.exp_().mul_(-grad_N[:, None])
        result_NV.scatter_add_(1, targets_N[:, None], grad_N[:, None])
        return result_NV.to(ctx.dtype), None
