"""A reward model in a vLLM engine: conversations as token ids in, rewards out."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from transformers import AutoConfig

from actors.engine_loop import EngineDead
from actors.generator import cache, counted, load_format
from actors.learner import policy
from actors.learner.batches import Example
from actors.scorer import Scorer
from actors.settings import RewardScoring


def load(
    weights: str, scoring: RewardScoring, precision: str, longest: int, trust_remote_code: bool = False, safetensors_only: bool = False
) -> "tuple[RewardEngine | Scorer, int]":
    """Loads a reward model into what runs it faster: vLLM where it knows the model (benchmarks/reward.py), else transformers.

    Args:
        weights: its directory or hub id.
        scoring: settings of the pool.
        precision: of the forward pass, "float32" or "bfloat16".
        longest: no conversation is longer, tokens.
        trust_remote_code: run Python code that comes with the model.
        safetensors_only: read no weights in other formats.

    Returns:
        the model, and how many tokens a conversation may have.

    Raises:
        ValueError: it is no reward model, or vLLM, where it is taken, cannot load it.
    """
    config = AutoConfig.from_pretrained(weights, trust_remote_code=trust_remote_code)
    limit = _positions(config.get_text_config())
    right = policy.is_classifier(config) and config.num_labels == 1
    if right and scoring.backend != "transformers":
        if knows(config.architectures[0]):
            context = min(limit, longest)
            try:
                return RewardEngine(weights, scoring, precision, context, trust_remote_code, safetensors_only), context
            except Exception as error:
                # Head sizes, memory, kernels: an engine has many ways to refuse a model that transformers takes.
                raise ValueError(f"vLLM cannot load {weights} (scoring.backend=transformers may): {error}") from error
        if scoring.backend == "vllm":
            raise ValueError(f"vLLM does not know {config.architectures[0]}: set scoring.backend=transformers")
    return Scorer(weights, scoring, precision, longest, trust_remote_code, "reward", safetensors_only), limit


def _positions(config: Any) -> int:
    """How many tokens a model reads at most."""
    limit = getattr(config, "max_position_embeddings", None) or sys.maxsize
    # RoBERTa and its kin count positions from behind that of the padding.
    kin = "roberta" in config.model_type or config.model_type in ("camembert", "xmod", "longformer", "mpnet", "ibert", "data2vec-text")
    return limit - config.pad_token_id - 1 if kin else limit


def knows(architecture: str) -> bool:
    """Whether vLLM has a reward model's class itself, or its language model's class, to which it puts a head."""
    from vllm import ModelRegistry

    language_model = architecture.replace("ForSequenceClassification", "ForCausalLM")
    return not ModelRegistry.get_supported_archs().isdisjoint({architecture, language_model})


class RewardEngine:
    """Loads a reward model into vLLM's pooling runner, which reads the reward at the last token.

    Args:
        weights: its directory or hub id.
        scoring: settings of the pool.
        precision: of the forward pass, "float32" or "bfloat16".
        context: no conversation is longer, tokens.
        trust_remote_code: run Python code that comes with the model.
        safetensors_only: read no weights in other formats.
    """

    def __init__(
        self, weights: str, scoring: RewardScoring, precision: str, context: int, trust_remote_code: bool, safetensors_only: bool = False
    ):
        from vllm import LLM, PoolingParams

        self.raw = PoolingParams(use_activation=False)
        self.failure: EngineDead | None = None
        self.llm = LLM(
            model=weights,
            runner="pooling",
            convert="classify",
            dtype=precision,
            max_model_len=context,
            max_num_batched_tokens=max(context, scoring.max_batch_tokens),
            tensor_parallel_size=scoring.tensor_parallel,
            enforce_eager=True,
            trust_remote_code=trust_remote_code,
            load_format=load_format(safetensors_only),
            disable_log_stats=True,
            **cache(scoring),
        )

    def __call__(self, examples: Sequence[Example], tell: Callable[[int], None] | None = None) -> list[list[float]]:
        """Scores rows.

        Args:
            examples: the rows.
            tell: called with the number of responses that are scored, as it grows.

        Returns:
            the reward of every response of every row, in the order given.

        Raises:
            EngineDead: the engine failed, in this call or in one before.
        """
        prompts: list[Any] = [{"prompt_token_ids": [*row.prompt_ids, *response]} for row in examples for response in row.responses]
        found = iter(self._classified(prompts, tell))
        return [[next(found).outputs.probs[0] for _ in row.responses] for row in examples]

    def _classified(self, prompts: list[Any], tell: Callable[[int], None] | None) -> list[Any]:
        # What a step that failed leaves in the engine comes out of the next call, before what that one asks for.
        if self.failure:
            raise self.failure
        try:
            # Cached prefixes change rounding: every call starts alike.
            self.llm.reset_prefix_cache()
            outputs = self.llm.classify(prompts, pooling_params=self.raw, use_tqdm=counted(tell))
            if len(outputs) != len(prompts):
                raise RuntimeError(f"{len(outputs)} rewards of {len(prompts)} sequences")
        except Exception as error:
            self.failure = EngineDead(f"the engine failed: {type(error).__name__}: {error}")
            raise self.failure from error
        return outputs
