"""A vLLM engine: prompts as token ids in, responses as token ids out."""

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from actors.allocator import GENERATION
from actors.settings import Engine, EnginePool, Sampling

log = logging.getLogger(__name__)
BLOCK = 32
"""Tokens a block of the key-value cache on a CPU, the least its attention is made for. Whole blocks are what the samples of a prompt share,
and vLLM's own 128 are longer than many prompts: 64 samples of 12 prompts of 43 to 59 tokens came at 758 tokens/s instead of 557."""


@dataclass(frozen=True)
class Response:
    """One sampled response."""

    ids: list[int]
    """with the token that ended it, if one did"""
    finish_reason: str
    """"stop", or "length" for a response cut at max_new_tokens"""


def environment(pool: EnginePool) -> dict[str, str]:
    """Environment variables that have to be set before a process of a pool imports vLLM."""
    # In the actor's own process: then nothing outlives the actor. Engines on several GPUs need processes of their own.
    values = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not pool.num_gpus:
        threads = max(1, int(pool.num_cpus))
        values |= {"OMP_NUM_THREADS": str(threads)} | GENERATION
        # One engine a machine may take its cores by number; several would take the same ones.
        values["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}" if pool.max_actors == 1 and threads > 1 else "nobind"
    return values


def cache(pool: EnginePool) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for the key-value cache of a pool's engines."""
    if pool.num_gpus:
        return {"gpu_memory_utilization": pool.gpu_memory_utilization}
    return {"block_size": BLOCK, "kv_cache_memory_bytes": int(pool.kv_cache_gib * 2**30)}


def room(config: Any, asked: int) -> int:
    """How many tokens an engine can have room for.

    Args:
        config: of the model.
        asked: how many there should be; the log has a line where the model has fewer.
    """
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or asked
    # Stretched positions: how far, vLLM knows.
    if (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default") != "default":
        return asked
    if asked > most:
        log.warning("%s has a context of %s tokens: %s are not to be had", type(config).__name__.removesuffix("Config"), most, asked)
    return min(asked, most)


def of_engine(engine: Engine) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that the settings of an engine say."""
    return {
        "dtype": engine.dtype,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel,
        "enforce_eager": engine.enforce_eager or not engine.num_gpus,
        "disable_log_stats": True,
        **cache(engine),
    }


def load_format(safetensors_only: bool) -> str:
    """What vLLM takes for weights in safetensors alone, or in whatever format they are."""
    return "safetensors" if safetensors_only else "auto"


class Count(tqdm):
    """A bar that shows nothing and tells how many responses are finished."""

    def __init__(self, tell: Callable[[int], None], **options: Any):
        super().__init__(**options, file=io.StringIO())
        self.tell = tell

    def update(self, n: float | None = 1) -> bool | None:
        """vLLM calls it with the responses of every finished request."""
        self.n += n or 0
        self.tell(int(self.n))
        return None


def counted(tell: Callable[[int], None] | None) -> Any:
    """What vLLM takes for `use_tqdm`; without `tell` no bar at all. It has another bar for the requests that it takes in."""
    return (lambda taken=None, **options: Count(tell, **options) if taken is None else taken) if tell else False


def policy_engine(
    weights: str,
    engine: Engine,
    max_model_len: int,
    trust_remote_code: bool = False,
    text: bool = False,
    tokenizer: str | None = None,
    safetensors_only: bool = False,
) -> Any:
    """A `vllm.LLM` with a policy.

    Args:
        weights: directory or hub id of the policy.
        engine: settings.
        max_model_len: longest prompt and response together, tokens.
        trust_remote_code: run Python code that comes with the model.
        text: responses are wanted as text, too.
        tokenizer: its directory, if it is not that of the weights.
        safetensors_only: read no weights in other formats.
    """
    from vllm import LLM

    return LLM(
        model=weights,
        tokenizer=tokenizer,
        skip_tokenizer_init=not text,
        # Before temperature and nucleus; of processed ones vLLM computes every row in every step, asked for or not.
        logprobs_mode="raw_logprobs",
        max_model_len=max_model_len,
        trust_remote_code=trust_remote_code,
        load_format=load_format(safetensors_only),
        **of_engine(engine),
    )


class Generator:
    """Loads a policy into an engine.

    Args:
        weights: directory or hub id of the policy.
        engine: settings.
        max_model_len: longest prompt and response together, tokens.
        stop_ids: tokens that end a response.
        trust_remote_code: run Python code that comes with the model.
    """

    def __init__(self, weights: str, engine: Engine, max_model_len: int, stop_ids: Sequence[int], trust_remote_code: bool = False):
        self.gpu = engine.num_gpus > 0
        self.stop_ids = list(stop_ids)
        self.llm = policy_engine(weights, engine, max_model_len, trust_remote_code)

    def load(self, weights: str) -> None:
        """Reads another policy of the same architecture, in place.

        Args:
            weights: its directory or hub id.
        """
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": weights})
        if not self.gpu:
            # A head that is tied to the embedding has no weights of its own to read, but a copy that is packed for the CPU.
            self.llm.apply_model(_pack_heads)

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, tell: Callable[[int], None] | None = None
    ) -> list[list[Response]]:
        """Samples responses.

        Args:
            prompts: token ids.
            sampling: how to draw.
            seed: the same prompts in the same call with the same seed give the same responses.
            tell: called with the number of responses that are finished, as it grows.

        Returns:
            `sampling.samples` responses for each prompt.
        """
        import torch

        # Cached prefixes change rounding, and with it a sample: every call starts alike.
        self.llm.reset_prefix_cache()
        # The CPU engine draws from torch's generator and cannot take a seed a request; a GPU engine can.
        torch.manual_seed(seed)
        params = [self._params(sampling, _mixed(seed, row) if self.gpu else None) for row in range(len(prompts))]
        outputs = self.llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=counted(tell))
        for ids, output in zip(prompts, outputs, strict=True):
            if list(output.prompt_token_ids) != list(ids):
                raise RuntimeError(f"the engine was given the prompt {list(ids)} and says that it sampled from {output.prompt_token_ids}")
        return [[self._response(list(sample.token_ids), sample.finish_reason) for sample in output.outputs] for output in outputs]

    def _params(self, sampling: Sampling, seed: int | None) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=sampling.samples,
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_p=1.0 if sampling.greedy else sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=self.stop_ids,
            detokenize=False,
            seed=seed,
        )

    def _response(self, ids: list[int], reason: str) -> Response:
        stopped = reason == "stop"
        if stopped != (bool(ids) and ids[-1] in self.stop_ids):
            raise RuntimeError(f"the engine says finish_reason={reason!r} of a response that ends in token {ids[-1:]}")
        return Response(ids, reason)


def _pack_heads(model: Any) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

    for part in model.modules():
        if isinstance(part, VocabParallelEmbedding) and isinstance(part.quant_method, UnquantizedEmbeddingMethod):
            part.quant_method.process_weights_after_loading(part)


def _mixed(seed: int, row: int) -> int:
    """31 bits for one row: seeds that follow each other would meet those of other shards, and of a row's further samples."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}".encode()).digest()[:4], "big") >> 1
