"""Rewards of given responses: a language model's body with one scalar read at the last token of a response.

Shapes: B rows, T positions, R responses of a batch, D hidden size.
"""

import torch
from transformers import PreTrainedModel

from actors.learner.batches import Batch
from actors.learner.logprobs import last_hidden


class ResponseRewards(torch.nn.Module):
    """A reward model as a function from a batch to the reward of every response.

    The reward is read where the response ends, whatever padding follows and whatever token is used for it.

    Args:
        model: `AutoModelForSequenceClassification` of transformers with one label.

    Raises:
        ValueError: the model is something else.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        if not reads_its_last_token(model):
            raise ValueError(f"{type(model).__name__} is no reward model that reads its last token: it has no `score` head")
        if model.config.num_labels != 1:
            raise ValueError(f"a reward model has one label, this {type(model).__name__} has {model.config.num_labels}")
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        """Returns `[1, R]` float32, in the order of the batch's responses."""
        last_RD = last_hidden(self.model, batch).flatten(0, 1)[batch.ends_R]
        return self.model.score(last_RD).float().T


class ClassifierRewards(torch.nn.Module):
    """A published reward model that reads its rewards in a way of its own (encoders such as DeBERTa): one padded row a response.

    Args:
        model: `AutoModelForSequenceClassification` of transformers with one label.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        """Returns `[1, R]` float32, in the order of the batch's responses."""
        return self.model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask).logits.float().T


def reads_its_last_token(model: PreTrainedModel) -> bool:
    """Whether a classifier of transformers is a body with a `score` head at the last token, as those of language models are."""
    return hasattr(model, "score")
