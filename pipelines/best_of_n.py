"""Best-of-N: many samples a prompt, scored; the best of them kept, and a report of what that is worth for every N up to theirs.

policy --N samples a prompt--> best_of_n/samples                          (generation)
samples, scorers           --> best_of_n/golden, best_of_n/init-sft-0 ... (scoring, one stage a scorer)
samples, scores            --> best_of_n/results/                         (here)
    samples/held_out/*.parquet         all samples with all scores
    chosen.held_out.jsonl              {input, output, reward}: the best of each prompt; a layout that demonstrations can have
    preferences.held_out.jsonl         {prompt, chosen, rejected}: the best and the worst, of samples neither cut nor empty
    report.json, best_of_n.png, .svg   golden score and win rate against N
"""

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.settings import Engine, RewardScoring
from actors.storage import replacing
from pipelines import base_model, demonstrations, evaluation, generation, scoring
from pipelines.best_of_n_report import Array, Prompt, Report, centres_of, scorers, select
from pipelines.plots import plot_best_of_n
from pipelines.records import shards
from pipelines.run.artifacts import Run, Stage, StageError, write_json
from pipelines.settings import BestOfN, Combination, Demonstrations, Model

log = logging.getLogger(__name__)

Score = Callable[..., Stage]
"""plans a stage that scores: its name, the responses, who scores, the splits (all by default)"""


@dataclass(frozen=True)
class Golden:
    """Stages with golden scores."""

    samples: Stage
    """of the N samples"""
    greedy: Stage
    """of the same policy's greedy responses: what a choice has to win against"""
    base: Stage
    """of the base policy's greedy responses: 0 of the normalised score"""
    demonstrations: Stage
    """its 1"""

    @classmethod
    def by(cls, score: Score, judge: str, many: Stage, greedy: Stage, base_greedy: Stage, demonstrations: Stage) -> "Golden":
        """Plans them: everything is scored by `judge`, of all but the N samples the held-out part alone."""
        return cls(
            samples=score("best_of_n/golden", many, judge),
            greedy=score("best_of_n/golden-greedy", greedy, judge, "held_out"),
            base=score("best_of_n/golden-base", base_greedy, judge, "held_out"),
            demonstrations=score("best_of_n/golden-demonstrations", demonstrations, judge, "held_out"),
        )

    def stages(self) -> tuple[Stage, ...]:
        """All of them."""
        return self.samples, self.greedy, self.base, self.demonstrations


def plan(
    samples: Stage,
    golden: Golden | None,
    scores: Mapping[str, Stage],
    selectors: Mapping[str, Sequence[str]],
    chooser: str,
    rule: Combination,
    name: str = "best_of_n/results",
) -> Stage:
    """The stage that chooses and reports.

    Args:
        samples: N of each prompt.
        golden: scores by an independent judge; without them there are choices and no report.
        scores: of `samples`, by scorer.
        selectors: who chooses: names of scorers, whose combined score decides.
        chooser: the selector whose choice is written out.
        rule: how several scores are combined.
        name: of the stage.
    """
    settings = {"selectors": {name: list(members) for name, members in selectors.items()}, "chooser": chooser} | rule.identity()
    inputs = {"samples": samples} | {f"score-{name}": stage for name, stage in scores.items()}
    if golden:
        inputs |= {"golden": golden.samples, "greedy": golden.greedy, "base": golden.base, "demonstrations": golden.demonstrations}
    return Stage(name, settings, inputs, demand="the driver", version=2)


def choose(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
    """The work of these stages."""
    return {stage.name: _choose(run, stage) for stage in stages}


def _choose(run: Run, stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = {}
    written: dict[str, dict[str, int]] = {}
    for split in ("held_out", "train"):
        report = Report(run, stage) if split == "held_out" and "golden" in stage.inputs else None
        prompts, chosen = write_choices(run, stage, split, report)
        if prompts:
            written[split] = {"prompts": prompts, "chosen": chosen}
            if chosen < prompts:
                text = "%s: %d of %d %s prompts have no sample with a score, an end and words: they are missing in chosen.%s.jsonl"
                log.warning(text, stage.name, prompts - chosen, prompts, split, split)
        if prompts and report:
            found = report.result()
            write_json(run.directory(stage) / "report.json", found)
            plot_best_of_n(found, run.directory(stage) / "best_of_n")
    return found | {"written": written}


def write_choices(run: Run, stage: Stage, split: str, report: Report | None) -> tuple[int, int]:
    """Joins samples and scores of a split, writes them and the chosen ones, and tells the report; one file of samples in memory at a
    time. Returns how many prompts there are, and of how many a response was chosen."""
    folder, names = run.directory(stage), scorers(stage)
    columns = {f"score-{name}": f"reward_{name}" for name in names} | ({"golden": "golden"} if "golden" in stage.inputs else {})
    members, centres = stage.settings["selectors"][stage.settings["chooser"]], centres_of(run, stage)
    prompts = written = 0
    files = shards(run.directory(stage.inputs["samples"]) / split)
    if not files:
        return prompts, written
    (folder / "samples" / split).mkdir(parents=True, exist_ok=True)
    with _lines(folder / f"chosen.{split}.jsonl") as chosen, _lines(folder / f"preferences.{split}.jsonl") as preferences:
        for path in files:
            table = pq.read_table(path).drop_columns(["prompt_ids", "response_ids"])
            for role, column in columns.items():
                scores = pq.read_table(run.directory(stage.inputs[role]) / split / path.name, columns=["id", "sample", "score"])
                assert scores.select(["id", "sample"]).equals(table.select(["id", "sample"])), f"{path}: rows of {role} are others"
                table = table.append_column(column, scores["score"])
            with replacing(folder / "samples" / split / path.name) as temporary:
                pq.write_table(table, temporary, compression="zstd")
            for start, prompt in _by_prompt(table, names):
                prompts += 1
                if report:
                    report.add(prompt)
                scores_N = select(prompt, members, stage.settings, centres)
                written += _write_choice(table.slice(start, len(scores_N)), scores_N, chosen, preferences)
    return prompts, written


@contextlib.contextmanager
def _lines(path: Path) -> Iterator[TextIO]:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


def _by_prompt(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[int, Prompt]]:
    """Each prompt with the first row of its samples, which follow each other."""
    ids, responses = (table[name].to_numpy() for name in ("id", "response"))
    rewards = {name: table[f"reward_{name}"].to_numpy() for name in names}
    golden = table["golden"].to_numpy() if "golden" in table.column_names else np.zeros(len(table))
    starts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1), len(ids)]
    for start, end in itertools.pairwise(starts):
        scores = {name: rewards[name][start:end] for name in names}
        yield int(start), Prompt(ids[start], responses[start:end], golden[start:end], scores)


def _write_choice(samples: pa.Table, scores_N: Array, chosen: TextIO, preferences: TextIO) -> bool:
    """Writes the best of a prompt's samples, and the best with the worst if it is any better: of those that came to their end and say
    something, since a demonstration that is cut or empty teaches to be so. Returns whether there is one."""
    said = [bool(text.strip()) for text in samples["response"].to_pylist()]
    usable = np.isfinite(scores_N) & np.array(said) & (samples["finish_reason"].to_numpy() == "stop")
    places = np.flatnonzero(usable)
    if not len(places):
        return False
    order = places[np.argsort(-scores_N[places], kind="stable")]
    best, worst = (samples.slice(int(place), 1).to_pylist()[0] for place in (order[0], order[-1]))
    line = {"input": best["prompt"], "output": best["response"], "reward": float(scores_N[order[0]])}
    chosen.write(json.dumps(line, ensure_ascii=False) + "\n")
    if scores_N[order[0]] > scores_N[order[-1]]:
        sides = {key: [{"role": "assistant", "content": row["response"]}] for key, row in (("chosen", best), ("rejected", worst))}
        preferences.write(json.dumps({"prompt": best["prompt"]} | sides, ensure_ascii=False) + "\n")
    return True


def choose_from(
    root: Path,
    policy: str,
    data: Demonstrations,
    scorers: Sequence[str],
    settings: BestOfN | None = None,
    rule: Combination | None = None,
    engine: Engine | None = None,
    scoring_pool: RewardScoring | None = None,
    initial: str | None = None,
) -> Path:
    """Best-of-N from Python, with any policy and any scorers; `pipelines.workers.cluster.connected` has to hold a Ray connection.

        with connected(RaySettings()):
            folder = choose_from(Path("runs/mine"), "path/to/policy", Demonstrations(path="rows.jsonl"), ["path/to/reward-model"])

    Args:
        root: run directory; the same call continues what was stopped.
        policy: directory or hub id of the model that is sampled.
        data: whose prompts; rows that it holds out are answered too, into files of their own.
        scorers: reward models by directory or hub id, "exact_answer" or "module:function", beside those of `settings`; several decide
            together, unless `settings.choose_by` names one.
        settings: n, sampling, judge; by default all prompts.
        rule: how several scores are combined.
        engine: the pool that samples.
        scoring_pool: the pool that scores.
        initial: directory or hub id of the model that the policy was made from. With it there is a report against N on held-out prompts:
            `settings.golden` judges, and its greedy responses are 0 of the normalised score.

    Returns:
        the folder with all samples and scores, `chosen.*.jsonl` and `preferences.*.jsonl`, and with `initial` the report and its plot.

    Raises:
        StageError: a model, a scorer or the data cannot be used, or nobody is called as the one who is to choose.
    """
    settings, engine, scoring_pool = settings or BestOfN(train_prompts=None), engine or Engine(), scoring_pool or RewardScoring()
    scorers, run = list(dict.fromkeys([*scorers, *settings.scorers])), Run(root.resolve())
    selectors = {scorer: [scorer] for scorer in scorers} | ({"all": scorers} if len(scorers) > 1 else {})
    chooser = settings.choose_by or list(selectors or [""])[-1]
    if chooser not in selectors:
        raise StageError(f"nobody chooses: choose_by={settings.choose_by!r} is none of {', '.join(selectors) or 'no scorers'}")
    longest = data.max_prompt_tokens + settings.max_new_tokens
    base = base_model.plan(Model(path=policy))
    judged = initial and settings.golden != "none" and "held_out" in settings.asked()
    before = base_model.plan(Model(path=str(initial)), "initial/model") if judged else None
    rows = demonstrations.plan(data, base)

    def sample(name: str, weights: Stage) -> Stage:
        return generation.plan(f"best_of_n/{name}", weights, base, rows, settings.greedy(), engine, 0, {"held_out": settings.prompts})

    def score(name: str, given: Stage, scorer: str, *splits: str) -> Stage:
        return scoring.plan(name, given, rows, scorer, "float32", scoring_pool, splits or ("held_out", "train"))

    many = generation.plan("best_of_n/samples", base, base, rows, settings.sampling(), engine, 1, settings.asked())
    greedy = (sample("greedy", base), sample("greedy-base", before)) if before else ()
    golden = Golden.by(score, settings.golden, many, greedy[0], greedy[1], rows) if greedy else None
    scores = {scorer: score(f"best_of_n/scorer-{number}", many, scorer) for number, scorer in enumerate(scorers, start=1)}
    results = plan(many, golden, scores, selectors, chooser, rule or Combination())
    for path, model in ((policy, base), *([(str(initial), before)] if before else [])):
        run.do(base_model.prepare(Model(path=path)), model)
        base_model.check(run, model, {"max_prompt_tokens + max_new_tokens": longest}, {})
    if before:
        base_model.check_tokens(run, base, before, "name an initial model with the policy's tokenizer")
    run.do(demonstrations.prepare(data, False), rows)
    if before and settings.golden == "exact_answer":
        evaluation.check_answers(run, rows, "golden", "exact_answer", "name another judge, or no initial model")
    for stages in ((many, *greedy[:1]), greedy[1:]):
        run.do(generation.sample(engine, longest, False), *stages)
    for stages in (*([golden.stages()] if golden else []), *((stage,) for stage in scores.values())):
        run.do(scoring.score(scoring_pool, longest, False), *stages)
    run.do(choose, results)
    return run.directory(results)
