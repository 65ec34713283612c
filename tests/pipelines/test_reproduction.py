"""The reproduction: problems and their checker, statistics, the choice of settings, the order of many stages."""

import random
from pathlib import Path
from typing import Any

import pytest
from training import write_pairs

from actors.settings import READ_BY, Objective, Pool, Training
from jobs import reproduce
from jobs.config import build
from jobs.schemas import ReproduceConfig
from pipelines import base_model, evaluation, policy_training
from pipelines.evaluation import exact_text, final_text
from pipelines.records import write_rows
from pipelines.reproduction import arms, order, problems, reward_table, search, statistics, tables, training_pool
from pipelines.reproduction.data import preference
from pipelines.run.artifacts import Run, Stage, StageError
from pipelines.settings import Model

DONE = {"accuracy": 0.5}


def test_the_right_writer_is_right_and_shows_every_step() -> None:
    draw = random.Random(0)
    for _ in range(50):
        found = problems.sums(draw, 3, lambda: False)
        left, right = found.question.split("+")
        assert int(found.answer) == int(left) + int(right) and len(found.steps) == 3
    assert problems.MOVES["rev"][0]("abcd") == "dcba" and problems.MOVES["rot"][0]("abcd") == "bcda"
    assert problems.MOVES["swap"][0]("abcd") == "dbca"


def test_a_careless_writer_errs_where_there_is_something_to_get_wrong() -> None:
    def right(row: dict[str, str]) -> bool:
        left, other = row["question"].split("+")
        return final_text(row["answer"]) == str(int(left) + int(other))

    written = list(problems.problems(90, "0", "train", careless=1.0))
    added = [row for row in written if "+" in row["question"]]
    # Only sums without anything to carry come out right.
    assert 0 < sum(map(right, added)) < 0.8 * len(added)
    assert all(row["answer"].split("####")[0].count("+1=") == 0 for row in added if right(row))
    assert all(right(row) for row in problems.problems(90, "0", "train") if "+" in row["question"])


def test_the_three_splits_share_no_problem_and_draws_repeat() -> None:
    found = {split: {row["question"] for row in problems.problems(90, "0", split)} for split in problems.SPLITS}
    assert not found["train"] & found["test"] and not found["train"] & found["validation"] and not found["test"] & found["validation"]
    assert {row["question"] for row in problems.problems(90, "0", "test")} == found["test"]


def test_too_many_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="3000 problems of test were asked for, there are about"):
        list(problems.problems(3000, "0", "test", lengths=(1,)))


def test_styles_differ_in_words_and_not_in_the_answer() -> None:
    solution = problems.Solution("12+9", ("2+9+0=11", "1+0+1=2"), "21")
    assert problems.written(solution, "plain") == "2+9+0=11;1+0+1=2####21"
    assert problems.written(solution, "wordy") == "well , next 2+9+0=11 , next 1+0+1=2####21"
    assert exact_text(problems.written(solution, "plain"), problems.written(solution, "wordy"))
    assert exact_text("no answer", "####21") is False and exact_text("####21", "none") is None


def test_a_careless_writer_is_asked_the_same_questions() -> None:
    right, careless = (list(problems.problems(60, "0", "train", careless=share)) for share in (0.0, 0.4))
    assert [row["question"] for row in right] == [row["question"] for row in careless]
    wrong = sum(final_text(a["answer"]) != final_text(b["answer"]) for a, b in zip(right, careless, strict=True))
    assert 0.2 < wrong / 60 < 0.5
    graph = reproduce.plan(build(ReproduceConfig, ["--scope.seeds", "1", "--scope.trials", "2"]))
    data = {stage.name: stage.settings for stage in graph.stages() if stage.name.startswith("seed-0/data")}
    assert data["seed-0/data/wrong-20"]["drawn"] == data["seed-0/data/demonstrations"]["drawn"] != data["seed-0/data/test"]["drawn"]


def test_a_preference_is_a_right_sample_over_a_wrong_one() -> None:
    gold = {"id": "a", "response": "x####1", "response_ids": [1]}
    wrong, right = {"response": "y####2", "response_ids": [2]}, {"response": "z####1", "response_ids": [3]}
    found = preference(gold, [wrong, right])
    assert found == {"id": "a", "response": "z####1", "response_ids": [3], "rejected": "y####2", "rejected_ids": [2]}
    assert preference(gold, [right, right]) is None and preference(gold, [wrong]) is None


def test_sign_flips_are_counted_by_hand() -> None:
    # 8 choices of signs of (3, 2, 1): sums 6, 4, 2, 0, 0, 2, 4, 6 in size.
    assert statistics.sign_flip([3.0, 2.0, 1.0]) == 2 / 8
    assert statistics.sign_flip([3.0, -2.0, 1.0]) == 6 / 8
    assert statistics.sign_flip([0.0, 0.0]) == 1.0
    found = statistics.paired([0.5, 0.7], [0.4, 0.4])
    assert (round(found.mean, 6), round(found.stderr or 0, 6), found.p, found.seeds) == (0.2, 0.1, 0.5, 2)
    with pytest.raises(ValueError, match="17 seeds have too many"):
        statistics.sign_flip([1.0] * 17)


def test_errors_over_problems_and_corrected_p_values() -> None:
    # Means 0.5 and 0.5; standard errors 0.5 / sqrt(1) each ((1, 0): variance 0.5, / 2 problems = 0.25): sqrt(0.25 + 0.25) / 2.
    mean, error = statistics.stratified([[1.0, 0.0], [0.0, 1.0]])
    assert (mean, round(error, 6)) == (0.5, 0.353553)
    assert statistics.holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]


@pytest.mark.parametrize("arm", (*arms.GSIL, *arms.DIL, *arms.AFD), ids=lambda arm: arm.name)
def test_every_arm_tries_as_many_settings_that_differ_in_what_its_objective_reads(arm: arms.Arm) -> None:
    def read(setting: arms.Setting) -> tuple[float | None, ...]:
        objective = setting.objective(arm.preset)
        assert objective.name == arm.preset
        beta = None if objective.function in ("sft", "slic") else objective.beta
        return setting.learning_rate, beta, objective.gamma if objective.function in READ_BY["gamma"] else None

    assert len({read(setting) for setting in arm.settings}) == len(arm.settings) == 8
    assert len({setting.learning_rate for setting in arm.settings}) >= 3
    # A small budget sees two rates, and two of what the objective has beside them.
    first = [read(setting) for setting in arm.settings[:4]]
    assert (len({rate for rate, *_ in first}), len({tuple(rest) for _, *rest in first})) in ((4, 1), (2, 2))


def test_the_first_of_the_best_trials_is_chosen_and_diverged_ones_never() -> None:
    assert search.best([0.1, None, 0.3, 0.3]) == 2
    assert search.best([None, 0.0]) == 1
    assert search.best([None, None]) is None


def chain() -> list[order.Step]:
    """a -> trial -> choice -> final, and a second trial that diverges, on which an evaluation waits."""
    data = Stage("data", {})
    good, bad = (Stage(name, {}, {"data": data}) for name in ("good", "bad"))
    tested = [Stage(f"{stage.name}/evaluation", {}, {"policy": stage}) for stage in (good, bad)]
    choice = search.plan("choice", [arms.Setting(1e-3, 0.5, 0.25), arms.Setting(1.0)], tested)
    final = Stage("final", {"training": Training().identity(), "objective": {"name": "gsil_logistic"}}, {search.CHOSEN: choice})
    kinds = {"data": [data], "training": [good, bad, final], "evaluation": tested, "choice": [choice]}
    return [order.Step(kind, stage) for kind, stages in kinds.items() for stage in stages]


def write(numbers: Any, calls: list[tuple[str, ...]]) -> Any:
    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, Any]:
        calls.append(tuple(stage.name for stage in stages))
        for stage in stages:
            (run.directory(stage) / "made").write_text("x")
        return {stage.name: numbers(stage) for stage in stages}

    return work


def test_stages_share_calls_and_what_diverged_stops_only_what_needs_it(tmp_path: Path) -> None:
    run, calls, steps = Run(tmp_path), list[tuple[str, ...]](), chain()
    works = {
        "data": write(lambda stage: {}, calls),
        "evaluation": write(lambda stage: DONE, calls),
        "choice": search.choose,
        "training": write(lambda stage: {"diverged": "too hot" if stage.name == "bad" else None}, calls),
    }
    dead = order.follow(run, steps, works, "training", tolerant=("choice",))
    assert calls == [("data",), ("good", "bad"), ("good/evaluation",), ("final",)] and dead == ["bad", "bad/evaluation"]
    final = next(step.stage for step in steps if step.stage.name == "final")
    training, objective = search.settled(Training(workers=2))(run, final)
    assert (training.learning_rate, training.workers, objective.beta, objective.gamma) == (1e-3, 2, 0.5, 0.25)
    calls.clear()
    assert order.follow(run, steps, works, "training", tolerant=("choice",)) == dead and not calls


def test_an_arm_that_always_diverges_stops_nobody_else(tmp_path: Path) -> None:
    works = {
        "data": write(lambda stage: {}, []),
        "evaluation": write(lambda stage: DONE, []),
        "choice": search.choose,
        "training": write(lambda stage: {"diverged": "too hot"}, []),
    }
    run = Run(tmp_path)
    dead = order.follow(run, chain(), works, "training", tolerant=("choice",))
    assert dead == ["bad", "bad/evaluation", "choice", "final", "good", "good/evaluation"]
    choice = next(step.stage for step in chain() if step.kind == "choice")
    assert "diverged with every setting" in run.numbers(choice)["diverged"]


def test_a_pool_trains_stages_with_their_own_settings_and_survives_one_that_diverges(local_ray: None, tiny: Path, tmp_path: Path) -> None:
    def stage_of(name: str, rate: float) -> Stage:
        training = Training(epochs=4, learning_rate=rate, zero_stage=0, checkpoint_every=0, max_grad_norm=0)
        return policy_training.plan(name, base, base, pairs, training, Objective(name="gsil_exponential", beta=20.0))

    run, model = Run(tmp_path), Model(path=str(tiny))
    base, pairs = base_model.plan(model), Stage("pairs", {})
    run.do(base_model.prepare(model), base)

    def rows(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        (run.directory(pairs) / "train").mkdir()
        write_pairs(tiny, run.directory(pairs) / "train" / "00000.parquet")
        return {}

    run.do(rows, pairs)
    calm, wild = stage_of("calm", 1e-5), stage_of("wild", 1e30)
    run.do(training_pool.train(Pool(), search.settled(Training(zero_stage=0, checkpoint_every=0)), 64), calm, wild)
    assert run.numbers(calm)["diverged"] is None and run.numbers(calm)["steps"] == 8
    assert run.numbers(calm)["chosen"] == {"learning_rate": 1e-5, "beta": 20.0, "gamma": 0.0}
    assert (run.directory(calm) / "policy" / "model.safetensors").exists() and (run.directory(calm) / "metrics.jsonl").exists()
    assert "not finite" in run.numbers(wild)["diverged"] and not (run.directory(wild) / "policy").exists()


def test_every_table_is_planned_and_no_search_sees_a_test_problem() -> None:
    graph = reproduce.plan(build(ReproduceConfig, ["--scope.seeds", "2", "--scope.trials", "2"]))
    names = [stage.name for stage in graph.stages()]
    assert len(names) == len(set(names)) and set(graph.tables) == set(reproduce.plans.PLANS)
    known: set[str] = set()
    for stage in graph.stages():
        assert {given.name for given in stage.inputs.values()} <= known, f"{stage.name} comes before its inputs"
        known.add(stage.name)

    def sources(stage: Stage) -> set[str]:
        found = {stage.name}
        for given in stage.inputs.values():
            found |= sources(given)
        return found

    choices = [stage for stage in graph.stages() if stage.name.endswith("/choice")]
    # DPO stands in two tables.
    assert len(choices) == 1 + len(arms.GSIL) + len(arms.DIL) - 1 + len(arms.AFD)
    for stage in choices:
        assert not [name for name in sources(stage) if "/data/test" in name or "seed-1" in name]
    # Changed training of one arm redoes what follows from it and nothing else.
    other = reproduce.plan(build(ReproduceConfig, ["--scope.seeds", "2", "--scope.trials", "2", "--pretraining.epochs", "1"]))
    same = {stage.fingerprint for stage in graph.stages()} & {stage.fingerprint for stage in other.stages()}
    assert {stage.name for stage in graph.stages() if stage.fingerprint in same} >= {"seed-1/data/corpus", "seed-0/blank"}
    assert graph.steps[-1].stage.fingerprint not in same


def test_an_arm_that_is_not_there_is_named() -> None:
    with pytest.raises(StageError, match="there is no 'pref-dpo'; there are sft-longer, spin, "):
        reproduce.plan(build(ReproduceConfig, ["--scope.arms", "[pref-dpo]"]))


def scores(run: Run, stage: Stage, values: list[float]) -> None:
    write_rows(run.directory(stage) / "scores.parquet", [{"id": str(k), "score": v} for k, v in enumerate(values)], evaluation.SCORES)


def test_a_table_pairs_seeds_and_problems_and_leaves_out_what_diverged(tmp_path: Path) -> None:
    run = Run(tmp_path)
    values = {"sft:0:0": [1, 0, 0, 0], "sft:1:0": [1, 1, 0, 0], "a:0:1": [1, 1, 0, 0], "a:1:1": [1, 1, 1, 1], "b:0:1": [0, 0, 0, 0]}
    inputs = {role: Stage(role.replace(":", "/"), {}) for role in [*values, "b:1:1"]}

    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        for stage in stages:
            scores(run, stage, [float(v) for v in values[stage.name.replace("/", ":")]])
        return {}

    run.do(work, *(inputs[role] for role in values))
    found = tables.Found(run, Stage("tables/x", {}, inputs))
    content = tables.accuracy(found, ["sft"], ["a", "b"], {"a": "36.6"}, ["sft"])
    assert content["rows"][1][:2] == ["sft", "37.5 ± 12.5"]
    assert content["rows"][2] == ["a", "75.0 ± 25.0", "+37.5 ± 12.5 (problems ± 19.1; p = 0.5)", "", "36.6"]
    # One seed alone: no standard error over seeds.
    assert content["rows"][3][:3] == ["b", "0.0 (1 of 2 seeds)", "-25.0 (problems ± 25.0; p = 1)"]


def test_best_of_n_tables_count_wins_by_problem() -> None:
    assert reward_table.compared([1, 1, 0, 0], [0, 1, 1, 0]) == (0.25, 0.5, 0.25)
    rows = reward_table.tournament([{"a": [1, 1], "b": [0, 1]}, {"a": [0, 0], "b": [0, 1]}], ["a", "b"])
    assert rows[1] == ["a", "", "0.25 / 0.50 / 0.25"]
