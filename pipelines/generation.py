"""Samples of a policy: negatives for training, answers for evaluation. Ray Data shards the prompts to generation actors.

    demonstrations/train/00000.parquet     (DEMONSTRATION) --> iteration-1/negatives/train/00000.parquet    (SAMPLE)
    demonstrations/held_out/00000.parquet                  --> iteration-1/negatives/held_out/00000.parquet
                                                           --> sft/samples/held_out/00000.parquet

Stages that sample the same policy run in one call and share its engines.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from actors.generator import Generator, environment
from actors.settings import Engine, Sampling
from pipelines import base_model
from pipelines.chat import Chat
from pipelines.records import SAMPLE, shards, sum_counts, write_rows
from pipelines.run.artifacts import Run, Stage, StageError, Work
from pipelines.workers.shards import Shard, map_shards

RESPONSES_A_FILE = 2048
"""The unit of work, of memory and of resume where many samples of a prompt are drawn."""


def plan(
    name: str,
    policy: Stage,
    base: Stage,
    demonstrations: Stage,
    sampling: Sampling,
    engine: Engine,
    iteration: int,
    prompts: dict[str, int | None],
) -> Stage:
    """A stage that samples a policy.

    Args:
        name: of the stage.
        policy: whose samples.
        base: where the tokenizer is.
        demonstrations: whose prompts.
        sampling: how to draw.
        engine: the pool.
        iteration: number written to every row.
        prompts: for each split how many prompts at most; None for all.
    """
    # What the pairs do with truncated samples is theirs.
    drawn = {key: value for key, value in sampling.identity().items() if key != "truncated"}
    settings = {"sampling": drawn, "iteration": iteration, "prompts": prompts, "dtype": engine.dtype}
    if engine.backend != "vllm":
        settings["backend"] = engine.backend
    return Stage(name, settings, {"policy": policy, "base": base, "demonstrations": demonstrations}, demand=engine.demand())


def sample(engine: Engine, max_model_len: int, trust_remote_code: bool) -> Work:
    """Returns the work of sampling stages, of policies with one tokenizer and architecture.

    Args:
        engine: the pool.
        max_model_len: longest prompt and response of any of them, tokens.
        trust_remote_code: run Python code that comes with the model.
    """

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        base = stages[0].inputs["base"]
        weights = {stage.name: base_model.weights(run, stage.inputs["policy"]) for stage in stages}
        stop_ids = run.numbers(base)["stop_ids"]
        arguments = {
            "weights": weights[stages[0].name],
            "engine": engine,
            "max_model_len": max_model_len,
            "stop_ids": stop_ids,
            "tokenizer": base_model.tokenizer(run, base),
            "trust_remote_code": trust_remote_code,
        }
        tasks = [task for stage in stages for task in _tasks(run, stage, weights[stage.name])]
        # What "auto" is, the first policy says.
        keep = engine.dtype != "auto"
        numbers = map_shards(run, tasks, SampleShards, arguments, engine, environment(engine), keep=keep)
        for stage in stages:
            numbers[stage.name] |= sum_counts(run.directory(stage).glob("*/*.parquet"))
        return numbers

    return work


def _tasks(run: Run, stage: Stage, weights: str) -> list[Shard]:
    tasks: list[Shard] = []
    sampling = stage.settings["sampling"]
    for split, limit in stage.settings["prompts"].items():
        before, step = 0, max(1, RESPONSES_A_FILE // sampling["samples"])
        for number, path in enumerate(shards(run.directory(stage.inputs["demonstrations"]) / split)):
            there = pq.read_metadata(path).num_rows
            wanted = there if limit is None else max(0, min(there, limit - before))
            before += there
            for first in range(0, wanted, step):
                prompts = min(step, wanted - first)
                place = {"shard": number, "split": split, "first": first, "prompts": prompts}
                options = {"weights": weights, "sampling": sampling, "iteration": stage.settings["iteration"], **place}
                name = path.name if step >= there else f"{path.stem}-{first:05d}{path.suffix}"
                tasks.append(Shard(stage, (str(path),), run.directory(stage) / split / name, options, prompts * sampling["samples"]))
    if not tasks:
        raise StageError(
            f"{stage.name}: no row was held out: raise demonstrations.held_out_fraction (the chance of each prompt: 0.3 holds out about 9 "
            "of 30), or name a held_out_path"
        )
    return tasks


class SampleShards:
    """The actor: an engine, and the files around it."""

    def __init__(self, tokenizer: str, **arguments: Any):
        self.chat = Chat(tokenizer, arguments["trust_remote_code"])
        self.weights = arguments["weights"]
        self.generator = _generator(**arguments)

    def change(self, options: dict[str, Any]) -> None:
        """Reads another policy, if the next shard is of one."""
        if options["weights"] != self.weights:
            self.weights = options["weights"]
            self.generator.load(self.weights)

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        """Samples for every row of one shard.

        INPUT  DEMONSTRATION rows
        OUTPUT SAMPLE rows, `samples` for each
        """
        sampling = Sampling(**options["sampling"])
        rows = pq.read_table(inputs[0], columns=["id", "prompt", "prompt_ids"]).slice(options["first"], options["prompts"]).to_pylist()
        # Each shard draws its own numbers, whatever ran before it on this engine.
        seed = shard_seed(sampling.seed, options["iteration"], options["shard"], options["split"], options["first"])
        responses = self.generator([row["prompt_ids"] for row in rows], sampling, seed, tell)
        made = [
            row
            | {
                "iteration": options["iteration"],
                "sample": number,
                "response": self.chat.text(response.ids),
                "response_ids": response.ids,
                "finish_reason": response.finish_reason,
            }
            for row, drawn in zip(rows, responses, strict=True)
            for number, response in enumerate(drawn)
        ]
        write_rows(Path(output), made, SAMPLE, {"truncated": sum(row["finish_reason"] == "length" for row in made)})


def _generator(engine: Engine, **arguments: Any) -> Any:
    if engine.backend == "vllm":
        return Generator(engine=engine, **arguments)
    from actors.sampler import Sampler

    return Sampler(engine=engine, **arguments)


def shard_seed(seed: int, iteration: int, shard: int, split: str, first: int) -> int:
    """A 31-bit seed of one file, whose prompts begin at row `first` of their shard."""
    return (seed * 1_000_003 + iteration * 10_007 + shard * 101 + (split == "held_out") * 7 + first * 1_009) % 2**31
