"""What is said of trained reward models, from pairs and held-out rewards written by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import reward_training
from pipelines.records import REWARD_PAIR, write_rows
from pipelines.run.artifacts import Run, Stage

LOG_3, LOG_5_3, LOG_17_3 = math.log(3), math.log(5 / 3), math.log(17 / 3)
"""Rewards whose sigmoids are 0.75, 0.625 and 0.85: round numbers, in a bin each."""
TRAIN = [([1, 1, 1], [2]), ([1, 1, 1, 1], [2, 2])]
HELD_OUT = {"a": [([2], [1, 1]), ([2, 1], [1, 2])], "b": [([2], [1, 1, 1, 1])], "c": [([1], [3, 3, 3])]}
"""By prompt: what the words and the length of the positives were in training, held-out ones contradict."""
REAL, GENERATED = [LOG_17_3, LOG_3, -LOG_3, 0.0], [-LOG_3, LOG_3, LOG_5_3, -LOG_17_3]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def pairs(run: Run) -> Stage:
    stage = Stage("rewards/pairs", {})
    held_out = [(key, sides) for key, rows in HELD_OUT.items() for sides in rows]
    for split, rows in (("train", [("t", sides) for sides in TRAIN]), ("held_out", held_out)):
        made = [{"id": k, "sample": 0, "prompt_ids": [9], "real_ids": real, "generated_ids": other} for k, (real, other) in rows]
        (run.directory(stage) / split).mkdir(parents=True)
        write_rows(run.directory(stage) / split / "00000.parquet", made, REWARD_PAIR)
    return stage


def trained(run: Run, name: str, loss: str, pairs: Stage, measured: bool = True) -> Stage:
    stage = Stage(f"rewards/{name}", {"objective": {"name": reward_training.OBJECTIVES[loss]}}, {"data": pairs})
    run.directory(stage).mkdir(parents=True)
    if measured:
        ids = [key for key, rows in HELD_OUT.items() for _ in rows]
        pq.write_table(pa.table({"id": ids, "rho_real": REAL, "rho_generated": GENERATED}), run.directory(stage) / "held_out.parquet")
    return stage


def measured(run: Run, **models: Stage) -> dict[str, dict[str, Any]]:
    stage = reward_training.plan_metrics(models)
    run.do(reward_training.measure, stage)
    found: dict[str, dict[str, Any]] = json.loads((run.directory(stage) / "metrics.json").read_text())
    assert found == run.numbers(stage)
    return found


def test_the_numbers_of_a_reward_model_by_hand(run: Run, pairs: Stage) -> None:
    stages = {loss: trained(run, loss, loss, pairs) for loss in ("binary", "bradley_terry")}
    found = measured(run, **stages)
    for numbers in found.values():
        assert (numbers["pairs"], numbers["trained_pairs"]) == (4, 2)
        # Won, tied, lost, won.
        assert numbers["pair_accuracy"] == 2.5 / 4
        # Halves of signs, less their mean 1/8, summed by prompt: 3/8 - 1/8, -5/8, 3/8; G / (G - 1) is 3/2.
        assert numbers["stderr"] == pytest.approx(math.sqrt((0.25**2 + 0.625**2 + 0.375**2) * 3 / 2) / 4)
        # 0.85 beats four, 0.75 three and a half, 0.25 one and a half, 0.5 two.
        assert numbers["auc"] == pytest.approx(11 / 16)
    discriminator, preferred = found["binary"], found["bradley_terry"]
    # Positives: right, right, wrong, half. Negatives: right, wrong, wrong, right.
    assert discriminator["accuracy"] == (2.5 / 4 + 2 / 4) / 2
    # Bins of 0.85, 0.75 (one of each side), 0.25 (one of each), 0.5, 0.625 and 0.15.
    assert discriminator["calibration_error"] == pytest.approx((0.15 + 0.5 + 0.5 + 0.5 + 0.625 + 0.15) / 8)
    assert preferred["accuracy"] is None, "of Bradley-Terry's rewards only differences mean anything"
    # Odds that the positive is preferred: 17:1, 1:1, 1:5, 17:3. Bins of 17/18, 1/18, 1/2 (both), 1/6 with 3/20, 17/20 with 5/6.
    assert preferred["calibration_error"] == pytest.approx((1 / 18 + 1 / 18 + 0 + 41 / 60 + 41 / 60) / 8)


def test_what_would_do_without_reading_is_learned_from_training_pairs_alone(run: Run, pairs: Stage) -> None:
    numbers = measured(run, r=trained(run, "r", "binary", pairs))["r"]
    # Positives were longer: shorter, tied, shorter, shorter. Learned from held-out pairs it would be 7/8.
    assert numbers["baseline_length"] == 0.5 / 4
    # Positives were of ones and negatives of twos: lost, tied, lost, and 1 is more of a positive's word than 3, which nobody wrote.
    # Learned from held-out pairs it would be 7/8.
    assert numbers["baseline_origin"] == 1.5 / 4


def test_without_held_out_pairs_nothing_is_said_but_how_many_were_trained_on(run: Run, pairs: Stage) -> None:
    numbers = measured(run, r=trained(run, "r", "binary", pairs, measured=False))["r"]
    assert (numbers.pop("pairs"), numbers.pop("trained_pairs")) == (0, 2)
    assert len(numbers) == 7 and set(numbers.values()) == {None}
