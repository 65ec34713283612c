"""Reward models in vLLM's pooling runner: the same rewards, and an engine that failed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rewards import EXAMPLES, one_by_one, reward_model
from running import ROOT

from actors.engine_loop import EngineDead
from actors.generator import environment
from actors.reward.engine import RewardEngine
from actors.settings import RewardScoring
from pipelines.serving import rewards as serving_rewards
from pipelines.serving.rewards import RewardReplica

ENGINE = """
import json, sys
from actors.engine_loop import EngineDead
from actors.reward import engine as reward_engine
from actors.settings import RewardScoring
from rewards import EXAMPLES

for directory in sys.argv[1:]:
    model, context = reward_engine.load(directory, RewardScoring(num_cpus=2), "float32", 256)
    assert isinstance(model, reward_engine.RewardEngine) and context == 256, model
    # Twice: the second call must not read what the first left in the cache.
    told = []
    print("RESULT", json.dumps([model(EXAMPLES, told.append), model(EXAMPLES)]), flush=True)
    assert told == [1, 2, 3, 4], told
    step = model.llm.llm_engine.step
    def broken():
        raise MemoryError("no room")
    model.llm.llm_engine.step = broken
    for _ in range(2):
        try:
            model(EXAMPLES)
        except EngineDead as error:
            assert "no room" in str(error), error
        else:
            raise AssertionError("alive")
        model.llm.llm_engine.step = step
    del model
"""


@pytest.mark.slow
@pytest.mark.parametrize("families", [["llama", "gpt2", "qwen2"]], ids="-".join)
def test_vllm_reads_the_same_rewards(families: list[str], tmp_path: Path) -> None:
    directories = [reward_model(tmp_path / family, family) for family in families]
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, *map(str, directories)],
        env=os.environ
        | environment(RewardScoring(num_cpus=2))
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])},
        capture_output=True,
        text=True,
    )
    got = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and len(got) == len(families), done.stderr[-3000:]
    for directory, calls in zip(directories, got, strict=True):
        want = [[one_by_one(directory, list(e.prompt_ids), list(r)) for r in e.responses] for e in EXAMPLES]
        assert calls[0] == calls[1]
        for rewards, expected in zip(calls[0], want, strict=True):
            assert rewards == pytest.approx(expected, abs=1e-4)


class Leftover:
    """An engine whose step fails once: the next call has more outputs than it asked for."""

    def __init__(self, outputs: int):
        self.outputs: list[Any] = [None] * outputs

    def reset_prefix_cache(self) -> None:
        pass

    def classify(self, prompts: list[Any], **_: Any) -> list[Any]:
        if not self.outputs:
            raise MemoryError("no room")
        return self.outputs


@pytest.mark.parametrize("outputs", [0, 3, 5])
def test_an_engine_that_failed_once_gives_no_reward_any_more(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = RewardEngine.__new__(RewardEngine)
    engine.llm, engine.raw, engine.failure = Leftover(outputs), None, None
    ended: list[EngineDead] = []
    monkeypatch.setattr(serving_rewards, "end_process", ended.append)
    replica = RewardReplica.__new__(RewardReplica)
    replica.model, replica.failures = engine, 0
    with pytest.raises(EngineDead, match="no room" if outputs == 0 else f"{outputs} rewards of 4 sequences"):
        replica._values([(1,), (2,), (3,), (4,)])
    engine.llm = Leftover(4)
    with pytest.raises(EngineDead):
        engine(EXAMPLES)
    assert len(ended) == 1, "the process ends at the first failure"
