"""Memory and time of Best-of-N at scale: a stub draws the samples, all around it is real (pools, shards, scores, choice, report).

    python benchmarks/best_of_n_scale.py [--prompts 1000] [--samples 1000] [--scorers 2]
    python benchmarks/best_of_n_scale.py --real [--prompts 4] [--samples 1000]

The stub answers at once with 60 random tokens, the scorers are functions; what is measured is everything else: how long a sample takes
on its way from the prompt to the report, and the most memory that the driver and any other process hold. With `--real` nothing is a stub:
vLLM draws 60 tokens a sample from SmolLM2-135M, and a reward model of that shape scores them.
"""

import argparse
import functools
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from actors.generator import Response
from actors.settings import Engine, RewardScoring, Sampling
from pipelines import base_model, best_of_n, demonstrations, generation, scoring
from pipelines.run.artifacts import Run, Stage
from pipelines.settings import Combination, Demonstrations, Model, RaySettings
from pipelines.workers.cluster import connected

TOKENS = 60


class Stub(generation.SampleShards):
    """The real actor around an engine that draws tokens from a hat."""

    def __init__(self, tokenizer: str, **arguments: Any):
        self.chat = generation.Chat(tokenizer, False)
        self.weights = arguments["weights"]
        self.generator = self.answer

    def answer(self, prompts: Sequence[Any], sampling: Sampling, seed: int, tell: Callable[[int], None]) -> list[list[Response]]:
        """At once."""
        draw = random.Random(seed)
        tell(len(prompts))
        count = 1 if sampling.greedy else sampling.samples
        return [[Response([*draw.choices(range(300, 40_000), k=TOKENS), 2], "stop") for _ in range(count)] for _ in prompts]


def opinion(number: int, messages: Sequence[Mapping[str, str]], response: str) -> float:
    """A reward that anybody can compute."""
    return float(hash((number, response)) % 1009)


first, second, third, judge = (functools.partial(opinion, number) for number in range(4))
SCORERS = ("first", "second", "third")


def main() -> None:
    """Prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--scorers", type=int, default=2, choices=range(1, len(SCORERS) + 1))
    parser.add_argument("--real", action="store_true", help="vLLM draws the samples, a reward model scores them")
    options = parser.parse_args()
    # Workers import the scorers by this file's name.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    os.environ["PYTHONHASHSEED"] = "0"
    sys.path.insert(0, str(Path(__file__).parent))
    import best_of_n_scale as own

    if not options.real:
        generation.SampleShards = own.Stub  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder, connected(RaySettings(num_cpus=4)):
        run, base = Run(Path(folder) / "run"), base_model.plan(Model())
        run.do(base_model.prepare(Model()), base)
        scorers = [f"best_of_n_scale:{name}" for name in SCORERS[: options.scorers]]
        if options.real:
            scorers = [str(reward_model(base_model.weights(run, base), base_model.tokenizer(run, base), Path(folder) / "reward"))]
        watch, began = Watch(), time.monotonic()
        stage = flow(run, base, options.prompts, options.samples, scorers)
        seconds, count = time.monotonic() - began, options.prompts * options.samples
        most = watch.end()
        size = sum(file.stat().st_size for file in run.root.rglob("*") if file.is_file() and "base" not in file.parts)
        report = json.loads((stage / "report.json").read_text())
        assert report["sizes"][-1] == options.samples
        who = "vLLM, a reward model" if options.real else f"a stub, {options.scorers} scorers"
        print(f"{os.cpu_count()} cores, {options.prompts:,} prompts x {options.samples:,} samples, {who} and a judge")
        print(f"{seconds:,.0f} s, {seconds / count * 1e6:,.0f} us a sample; {size / 2**30:.2f} GiB on disk")
        print("MiB at most: " + ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in sorted(most.items(), key=lambda each: -each[1])))


def reward_model(policy: str, tokenizer: str, directory: Path) -> Path:
    """A reward model of the policy's shape whose head knows nothing."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    return directory


def flow(run: Run, base: Stage, prompts: int, samples: int, scorers: Sequence[str]) -> Path:
    """From demonstrations to the report; returns the folder of the last."""
    rows, other = run.root.parent / "rows.jsonl", run.root.parent / "other.jsonl"
    other.write_text('{"prompt": "Nobody reads this.", "completion": "#### 1"}\n')
    with rows.open("w") as file:
        for number in range(prompts):
            file.write(json.dumps({"prompt": f"Question {number}: {'word ' * 60}", "completion": "#### 1"}) + "\n")
    engine, pool = Engine(dtype="bfloat16"), RewardScoring()
    data = Demonstrations(path=str(other), held_out_path=str(rows))
    given = demonstrations.plan(data, base)

    def sample(name: str, sampling: Sampling) -> Stage:
        return generation.plan(name, base, base, given, sampling, engine, 1, {"held_out": None})

    def score(name: str, of: Stage, scorer: str) -> Stage:
        return scoring.plan(name, of, given, scorer, "bfloat16", pool, ("held_out",))

    many, greedy = (
        sample("samples", Sampling(samples=samples, max_new_tokens=TOKENS)),
        sample("greedy", Sampling(greedy=True, max_new_tokens=TOKENS)),
    )
    judge = "best_of_n_scale:judge"
    golden = best_of_n.Golden(
        samples=score("golden", many, judge),
        greedy=score("golden-greedy", greedy, judge),
        base=score("golden-base", greedy, judge),
        demonstrations=score("golden-demonstrations", given, judge),
    )
    scores = {f"scorer-{number}": score(f"score-{number}", many, name) for number, name in enumerate(scorers)}
    choice = best_of_n.plan(many, golden, scores, {name: [name] for name in scores}, next(iter(scores)), Combination())
    run.do(demonstrations.prepare(data, False), given)
    run.do(generation.sample(engine, 512, False), greedy, many)
    for stages in (golden.stages(), *((stage,) for stage in scores.values())):
        run.do(scoring.score(pool, 512, False), *stages)
    run.do(best_of_n.choose, choice)
    return run.directory(choice)


class Watch:
    """The most memory that this process and the largest of each kind that it started held, by looking four times a second."""

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        own = psutil.Process()
        while not self.over.wait(0.25):
            for process in (own, *own.children(recursive=True)):
                try:
                    name = "driver" if process == own else "a worker" if process.name().startswith("ray::") else process.name()
                    self.most[name] = max(self.most.get(name, 0), process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue

    def end(self) -> dict[str, int]:
        """Bytes, by what it is; of Ray's workers the largest."""
        self.over.set()
        self.thread.join()
        return self.most


if __name__ == "__main__":
    main()
