"""Pairs for reward models: who is paired with whom, what is left out, and what the numbers say."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import gsil_iterative, irl_reward
from jobs.config import ConfigError, build
from jobs.schemas import GsilConfig, IrlConfig
from pipelines import reward_training
from pipelines.records import DEMONSTRATION, PREFERENCE, REWARD_PAIR, SAMPLE, SCORE, write_rows
from pipelines.reward_training import doubts, make_pairs, paired, plan_pairs, told_apart
from pipelines.run.artifacts import Run, Stage, StageError


def responses(*ids: int) -> list[dict[str, Any]]:
    return [{"prompt_ids": [1], "ids": [i]} for i in ids]


def ids_of(pairs: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    return [(row["id"], row["real_ids"][0], row["generated_ids"][0]) for row in pairs]


def test_sides_are_paired_in_order_and_equal_ones_left_out() -> None:
    pairs, identical = paired({"a": responses(1, 2), "b": responses(5), "c": responses(7)}, {"a": responses(3, 2), "b": responses(6, 5, 8)})
    assert ids_of(pairs) == [("a", 1, 3), ("b", 5, 6), ("b", 5, 8)] and identical == 2
    assert [row["sample"] for row in pairs] == [0, 0, 2]


def test_the_best_are_paired_with_those_that_score_less() -> None:
    given = {"a": responses(1, 2, 3, 4), "b": responses(5, 6), "c": responses(7, 8)}
    scores = [("a", 1.0), ("a", 0.0), ("a", None), ("a", 1.0), ("b", 0.0), ("b", 0.0), ("c", None), ("c", 1.0)]
    best, others = told_apart(given, [{"id": key, "score": score} for key, score in scores])
    assert best == {"a": responses(1, 4)} and others == {"a": responses(2)}
    assert ids_of(paired(best, others)[0]) == [("a", 1, 2), ("a", 4, 2)]


def stage_with(run: Run, name: str, schema: pa.Schema, rows: list[dict[str, Any]], file: str = "00000", **settings: Any) -> Stage:
    stage = Stage(name, settings)
    for split in ("train", "held_out"):
        folder = run.directory(stage) / split
        folder.mkdir(parents=True)
        write_rows(folder / f"{file}.parquet", rows, schema)
    return stage


def test_demonstrations_samples_and_preferences_on_disk(tmp_path: Path) -> None:
    run = Run(tmp_path)
    real = [{"id": key, "prompt_ids": [9], "response_ids": [n]} for n, key in enumerate("abc")]
    data = stage_with(run, "demonstrations", DEMONSTRATION, real)
    drawn = [{"id": "b", "sample": k, "prompt_ids": [9], "response_ids": [ids]} for k, ids in enumerate([1, 7])]
    # Samples from row 1 of the shard on: their demonstrations are in the whole one.
    samples = stage_with(run, "samples", SAMPLE, drawn, "00000-00001")
    preferences = stage_with(run, "preferences", PREFERENCE, [row | {"rejected_ids": [5]} for row in real], pairs=True)
    scores = stage_with(run, "labels", SCORE, [{"id": "b", "score": 0.0}, {"id": "b", "score": 1.0}], "00000-00001")
    stages = (
        plan_pairs("init-demo", data, samples),
        plan_pairs("bt", preferences, preferences),
        plan_pairs("golden", samples, samples, scores),
    )
    run.do(make_pairs, *stages)
    numbers = {stage.name: run.numbers(stage) for stage in stages}
    found = {s.name: [row for f in sorted((tmp_path / s.name / "train").glob("*")) for row in pq.read_table(f).to_pylist()] for s in stages}
    assert ids_of(found["init-demo"]) == [("b", 1, 7)] and numbers["init-demo"]["train"] == {"rows": 1, "identical": 1, "alike": 0}
    assert ids_of(found["bt"]) == [("a", 0, 5), ("b", 1, 5), ("c", 2, 5)]
    assert ids_of(found["golden"]) == [("b", 7, 1)]
    assert pq.read_schema(next((tmp_path / "bt/train").glob("*"))).names == REWARD_PAIR.names


def test_without_a_pair_the_job_stops(tmp_path: Path) -> None:
    run = Run(tmp_path)
    same = [{"id": "a", "sample": 0, "prompt_ids": [9], "response_ids": [1]}]
    above, below = (stage_with(run, name, SAMPLE, same) for name in ("above", "below"))
    with pytest.raises(StageError, match=r"no pair is left to train on: 1 had two equal sides$"):
        run.do(make_pairs, plan_pairs("rewards/init-sft/pairs", above, below))
    alike = stage_with(run, "labels", SCORE, [{"id": "a", "score": 0.0}])
    with pytest.raises(StageError, match="the judge likes all samples alike of 1 prompts: raise"):
        run.do(make_pairs, plan_pairs("rewards/bt/pairs", above, above, alike))


def test_doubts_name_what_does_as_well() -> None:
    good = {"pairs": 400, "trained_pairs": 400, "pair_accuracy": 0.9, "stderr": 0.015, "baseline_length": 0.6, "baseline_origin": 0.7}
    assert doubts("r", good) == []
    assert "no better than by chance" in doubts("r", good | {"pair_accuracy": 0.51, "baseline_length": 0.5, "baseline_origin": 0.5})[0]
    (length,) = doubts("r", good | {"baseline_length": 0.89})
    assert length == "r: the length alone tells held-out pairs apart as well (0.890, the reward model 0.900)"
    assert "the words alone" in doubts("r", good | {"baseline_origin": 0.95})[0]
    weak = {"pairs": 23, "pair_accuracy": 0.522, "stderr": 0.106, "baseline_length": 0.457, "baseline_origin": 0.696}
    assert doubts("r", good | weak) == [
        "r: held-out pairs are told apart no better than by chance (0.522 of 23)",
        "r: the words alone tell held-out pairs apart as well (0.696, the reward model 0.522)",
    ]
    perfect = {"pair_accuracy": 1.0, "stderr": 0.0, "baseline_origin": 1.0}
    assert "the words alone" in doubts("r", good | perfect)[0], "a standard error of 0 hides nothing"
    assert "no held-out pair" in doubts("r", good | {"pairs": 0})[0]
    few = doubts("r", good | {"pairs": 2, "trained_pairs": 11, "pair_accuracy": 1.0, "stderr": 0.0})
    assert few == ["r: learned from 11 pairs, too few to say anything", "r: is measured on 2 pairs, too few to say anything"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--best_of_n.n", "0"], r"best_of_n\.n=0: input should be greater than or equal to 1"),
        (["--rewards.kinds", "[init-stf]"], "init-sft"),
        (["--rewards.kinds", "init-sft"], r"rewards\.kinds='init-sft': a list is wanted, such as '\[init-sft\]'"),
        (["--rewards.kinds", "[init-sft, init-sft]"], "names a kind twice"),
        (["--rewards.ensemble", "[bt]"], "bt is not among kinds"),
        (["--rewards.kinds", "[bt]"], "made of several samples of a prompt, but responses.samples=1"),
        (["--rewards.kinds", "[bt]", "--best_of_n.golden", "none"], "made by the golden judge, but best_of_n.golden=none"),
        (["--best_of_n.choose_by", "bt"], "chooses nothing: there are init-sft"),
        (["--preferences.path", "pairs.jsonl"], "is read by nobody: add bt to rewards.kinds"),
        (["--responses.greedy", "true", "--responses.samples", "2"], "greedy sampling gives the same response"),
    ],
)
def test_a_config_that_cannot_be_run_says_so(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(IrlConfig, flags)


def test_the_graph_draws_nothing_that_nobody_reads(shared_preferences: Path, tiny: Path) -> None:
    flags = ["--model.path", str(tiny), "--rewards.kinds", "[bt]", "--preferences.path", str(shared_preferences)]
    names = [stage.name for stage in irl_reward.plan(build(IrlConfig, [*flags, "--best_of_n.prompts", "0"])).stages()]
    assert names == ["base/model", "preferences", "rewards/bt/pairs", "rewards/bt/seed-0", "rewards/metrics"]
    config = build(IrlConfig, ["--model.path", str(tiny), "--rewards.seeds", "2", "--best_of_n.prompts", "0"])
    graph = irl_reward.plan(config)
    assert [reward.training.settings["training"]["seed"] for reward in graph.rewards] == [0, 1], "seeds are seeds"
    assert [s.name for s in graph.stages()][2:] == [
        "sft/training",
        "base/responses",
        "sft/responses",
        "rewards/init-sft/pairs",
        "rewards/init-sft/seed-0",
        "rewards/init-sft/seed-1",
        "rewards/metrics",
    ]
    flags = ["--model.path", str(tiny), "--best_of_n.prompts", "0", "--best_of_n.train_prompts", "4"]
    names = [stage.name for stage in irl_reward.plan(build(IrlConfig, flags)).stages()]
    assert "best_of_n/results" in names and not {"best_of_n/greedy", "best_of_n/golden"} & set(names), "nothing held out, nothing to judge"
    config = build(IrlConfig, ["--model.path", str(tiny), "--best_of_n.golden", "none", "--best_of_n.train_prompts", "null"])
    assert config.best_of_n.asked() == {"held_out": None, "train": None}
    names = [stage.name for stage in irl_reward.plan(config).stages()]
    assert names[-2:] == ["best_of_n/init-sft-0", "best_of_n/results"] and "best_of_n/golden" not in names


def test_every_kind_learns_from_its_two_sides(tiny: Path, shared_preferences: Path) -> None:
    flags = ["--model.path", str(tiny), "--rewards.kinds", "[init-sft, init-demo, sft-demo, bt]", "--responses.samples", "2"]
    graph = irl_reward.plan(build(IrlConfig, flags))
    sides = {reward.kind: {side: stage.name for side, stage in reward.pairs.inputs.items()} for reward in graph.rewards}
    assert sides == {
        "init-sft": {"positives": "sft/responses", "negatives": "base/responses"},
        "init-demo": {"positives": "demonstrations", "negatives": "base/responses"},
        "sft-demo": {"positives": "demonstrations", "negatives": "sft/responses"},
        "bt": {"positives": "sft/responses", "negatives": "sft/responses", "labels": "rewards/bt/labels"},
    }
    stages = {stage.name: stage for stage in graph.stages()}
    sampled = {name: stages[name].inputs["policy"].name for name in ("base/responses", "sft/responses", "best_of_n/samples")}
    assert sampled == {"base/responses": "base/model", "sft/responses": "sft/training", "best_of_n/samples": "sft/training"}
    assert stages["rewards/bt/labels"].inputs["responses"] is stages["sft/responses"]
    given = irl_reward.plan(build(IrlConfig, [*flags, "--preferences.path", str(shared_preferences)])).rewards[-1].pairs
    assert {side: stage.name for side, stage in given.inputs.items()} == {"positives": "preferences", "negatives": "preferences"}
    assert given.settings["preferences"] and not graph.rewards[-1].pairs.settings["preferences"]


def test_the_seeds_of_a_kind_choose_together_and_each_alone(tiny: Path) -> None:
    flags = ["--model.path", str(tiny), "--rewards.kinds", "[init-sft, init-demo]", "--rewards.seeds", "2"]
    assert build(IrlConfig, [*flags, "--best_of_n.choose_by", "init-demo-1"]).chooser() == "init-demo-1"
    choice = irl_reward.plan(build(IrlConfig, flags)).choice
    assert choice
    members = {kind: [f"{kind}-0", f"{kind}-1"] for kind in ("init-sft", "init-demo")}
    assert choice.settings["selectors"] == members | {name: [name] for names in members.values() for name in names}
    assert choice.settings["chooser"] == "init-sft"
    scored = {role: stage.inputs["reward"].name for role, stage in choice.inputs.items() if role.startswith("score-")}
    assert scored == {f"score-{kind}-{seed}": f"rewards/{kind}/seed-{seed}" for kind in ("init-sft", "init-demo") for seed in (0, 1)}


def test_the_losses_of_the_kinds_and_the_ranks_of_the_adapters_are_the_published_ones(tiny: Path) -> None:
    flags = ["--model.path", str(tiny), "--rewards.kinds", "[init-sft, init-demo, sft-demo, bt]", "--responses.samples", "2"]

    def trained(*more: str) -> dict[str, tuple[str, float]]:
        stages = {reward.kind: reward.training.settings for reward in irl_reward.plan(build(IrlConfig, [*flags, *more])).rewards}
        assert {(s["training"]["lora_r"], s["training"]["lora_alpha"]) for s in stages.values()} == {(32, 32)}
        return {kind: (settings["objective"]["name"], settings["objective"]["beta"]) for kind, settings in stages.items()}

    binary, bradley_terry = ("gsil_logistic", 1.0), ("dpo", 1.0)
    demonstrated = ("init-sft", "init-demo", "sft-demo")
    assert trained() == dict.fromkeys(demonstrated, binary) | {"bt": bradley_terry}
    assert trained("--rewards.loss", "binary") == dict.fromkeys([*demonstrated, "bt"], binary)
    assert trained("--rewards.loss", "bradley_terry") == dict.fromkeys([*demonstrated, "bt"], bradley_terry)


def test_in_the_quickstarts_directory_the_embedded_example_trains_no_second_sft_policy() -> None:
    configs = Path(irl_reward.__file__).parent / "configs"
    main = build(GsilConfig, ["--config", str(configs / "quickstart.yaml")])
    beside = build(IrlConfig, ["--config", str(configs / "irl_arithmetic.yaml"), "--run.name", "quickstart"])
    assert beside.run.directory() == main.run.directory()
    theirs, ours = (
        {stage.name: stage.fingerprint for stage in graph.stages()} for graph in (gsil_iterative.plan(main), irl_reward.plan(beside))
    )
    # What --dry-run calls done is what has these fingerprints.
    for name in ("base/model", "demonstrations", "sft/training"):
        assert ours[name] == theirs[name], f"{name} would be done again"


@pytest.fixture
def shared_preferences(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "Hi?", "chosen": "Hello!", "rejected": "Go away."}\n')
    return path


def test_the_losses_are_the_papers(tiny: Path) -> None:
    import torch

    from actors.learner.objectives import Pair, Side, losses

    rewards = [torch.tensor([value]) for value in (0.7, -0.4)]
    zero, one = torch.zeros(1), torch.ones(1)
    sides = [Side(r, zero, one, r) for r in rewards]

    def loss(kind: str) -> float:
        return losses(Pair(sides[0], sides[1]), reward_training.objective(kind)).loss_B.item()

    softplus = torch.nn.functional.softplus
    assert loss("binary") == pytest.approx(float(softplus(torch.tensor(-0.7)) + softplus(torch.tensor(-0.4))))
    assert loss("bradley_terry") == pytest.approx(float(softplus(torch.tensor(-1.1))))
