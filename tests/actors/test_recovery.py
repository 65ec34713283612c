"""Checkpoints: killed workers go on where they were; numbers that are not finite are skipped, and stop training when they stay."""

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from training import assert_same_steps, end, failure_of, kill_when, start, steps_of, train, write_pairs

from actors.learner.batches import batch_order
from actors.settings import Objective, Training


@pytest.fixture(scope="module")
def pairs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose reference is the tiny model itself."""
    return write_pairs(tiny, tmp_path_factory.mktemp("pairs") / "pairs.parquet")


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Steps of a run that nobody stopped."""
    return train(tiny, pairs, tmp_path_factory.mktemp("undisturbed"), 1, Objective(), epochs=6)


@pytest.mark.parametrize(
    ("zero", "before", "after"),
    [(0, 2, 2), *(pytest.param(zero, 2, 2, marks=pytest.mark.slow) for zero in (2, 3)), (1, 2, 1), (3, 2, 1)],
    ids=lambda value: str(value),
)
def test_killed_it_goes_on_from_the_checkpoint_also_with_another_number_of_workers(
    zero: int, before: int, after: int, undisturbed: list[dict[str, float]], tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    options = {"zero_stage": zero, "epochs": 6, "checkpoint_every": 3, "checkpoints_kept": 2}
    processes = start(tiny, pairs, tmp_path, before, Objective(), **options)
    kill_when(processes, (tmp_path / "checkpoints/step-000006/done.json").exists)
    assert 6 <= len(steps_of(tmp_path)) < 12
    before_the_kill = steps_of(tmp_path)[:6]
    steps = train(tiny, pairs, tmp_path, after, Objective(), **options)
    assert steps[:6] == before_the_kill, "they carry tokens per second: taken again they would differ"
    assert_same_steps(steps, undisturbed, rel=4e-3)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()} == {"step-000009", "step-000012"}


def test_another_zero_stage_goes_on_from_the_checkpoint(
    undisturbed: list[dict[str, float]], tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    options = {"epochs": 6, "checkpoint_every": 3}
    kill_when(
        start(tiny, pairs, tmp_path, 2, Objective(), zero_stage=1, **options), (tmp_path / "checkpoints/step-000003/done.json").exists
    )
    before_the_kill = steps_of(tmp_path)[:3]
    steps = train(tiny, pairs, tmp_path, 2, Objective(), zero_stage=2, **options)
    assert steps[:3] == before_the_kill
    assert_same_steps(steps, undisturbed, rel=4e-3)
    end(start(tiny, pairs, tmp_path, 2, Objective(), zero_stage=0, **options))
    assert "zero_stage=2 and cannot go on with 0: set it back" in str(failure_of(tmp_path))


@pytest.mark.parametrize("after", [pytest.param(2, marks=pytest.mark.slow), 1])
def test_so_does_bfloat16_with_its_float32_sums(after: int, tiny: Path, pairs: Path, tmp_path: Path) -> None:
    options = {"epochs": 6, "checkpoint_every": 3, "precision": "bfloat16", "micro_batch_tokens": 40}
    whole = train(tiny, pairs, tmp_path / "whole", 2, Objective(), **options)
    processes = start(tiny, pairs, tmp_path, 2, Objective(), **options)
    kill_when(processes, (tmp_path / "checkpoints/step-000006/done.json").exists)
    # One worker rounds in another order than two.
    assert_same_steps(train(tiny, pairs, tmp_path, after, Objective(), **options), whole, rel=1e-4 if after == 2 else 0.1)


@pytest.mark.parametrize("kind", ["policy", pytest.param("reward", marks=pytest.mark.slow)])
def test_low_rank_adapters_go_on_too(kind: str, tiny: Path, pairs: Path, tmp_path: Path) -> None:
    options = {"kind": kind, "epochs": 6, "checkpoint_every": 3, "lora_r": 4, "lora_targets": "q_proj,v_proj", "zero_stage": 2}
    if kind == "reward":
        # Its head is trained as a whole beside the adapters: fast and without a reference, so that it would be missed.
        options["learning_rate"] = 1e-2
        pq.write_table(pq.read_table(pairs, columns=["id", "prompt_ids", "real_ids", "generated_ids"]), tmp_path / "pairs.parquet")
        pairs = tmp_path / "pairs.parquet"
    whole = train(tiny, pairs, tmp_path / "whole", 1, Objective(), **options)
    processes = start(tiny, pairs, tmp_path, 2, Objective(), **options)
    kill_when(processes, (tmp_path / "checkpoints/step-000006/done.json").exists)
    assert_same_steps(train(tiny, pairs, tmp_path, 2, Objective(), **options), whole, rel=4e-3)


@pytest.mark.parametrize(
    ("zero", "precision"),
    [(0, "float32"), (1, "bfloat16"), *(pytest.param(zero, "float32", marks=pytest.mark.slow) for zero in (1, 3))],
)
def test_a_step_that_is_not_finite_is_skipped_and_counted(zero: int, precision: str, tiny: Path, tmp_path: Path) -> None:
    spoiled = write_pairs(tiny, tmp_path / "pairs.parquet", {5: math.nan})
    steps = train(tiny, spoiled, tmp_path / "out", 2, Objective(), zero_stage=zero, precision=precision)
    # Row 5 comes once an epoch of two steps; the others go on and stay finite.
    assert [("skipped" in step) for step in steps].count(True) == 2
    assert all(math.isfinite(step["loss"]) == ("skipped" not in step) for step in steps)


def test_three_in_a_row_stop_training_with_the_rows_and_the_last_good_checkpoint(tiny: Path, tmp_path: Path) -> None:
    spoiled = write_pairs(tiny, tmp_path / "pairs.parquet", dict.fromkeys(range(14), math.inf) | {3: -5.0})
    processes = start(tiny, spoiled, tmp_path, 2, Objective(), batch_size=2, epochs=1, checkpoint_every=1)
    end(processes)
    assert [process.exitcode for process in processes] == [0, 0], "all failed alike: nobody starts them again"
    error = str(failure_of(tmp_path))
    assert "not finite in 3 steps in a row, up to step 3" in error and "row-" in error and "row-3," not in error
    assert "there is no checkpoint yet" in error and not (tmp_path / "policy").exists()


def test_what_was_good_before_three_in_a_row_is_kept(tiny: Path, tmp_path: Path) -> None:
    later = [int(row) for batch in list(batch_order(14, 2, 1, Training().seed))[2:] for row in batch]
    spoiled = write_pairs(tiny, tmp_path / "pairs.parquet", dict.fromkeys(later, math.inf))
    end(start(tiny, spoiled, tmp_path, 2, Objective(), batch_size=2, epochs=1, checkpoint_every=1))
    kept = tmp_path / "checkpoints" / "step-000002"
    assert f"up to step 5, on the rows {', '.join(sorted(f'row-{row}' for row in later[:6]))}; " in str(failure_of(tmp_path))
    assert f"the last good checkpoint is {kept}" in str(failure_of(tmp_path)) and (kept / "done.json").exists()


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), 1, 3])
def test_a_gradient_that_is_not_finite_counts_though_the_loss_is(zero: int, tiny: Path, pairs: Path, tmp_path: Path) -> None:
    end(start(tiny, pairs, tmp_path, 2, Objective(), zero_stage=zero, spoil_gradient=True))
    assert "not finite in 3 steps in a row, up to step 3, on the rows row-0, row-1, row-10" in str(failure_of(tmp_path))
    steps = steps_of(tmp_path)
    assert [(step["skipped"], math.isfinite(step["loss"])) for step in steps] == [(1.0, True)] * 3
    assert len({step["logps_real"] for step in steps[::2]}) <= 2, "no weight was changed"


def test_a_checkpoint_of_another_architecture_is_refused(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    train(tiny, pairs, tmp_path, 1, Objective(), checkpoint_every=2)
    done = tmp_path / "checkpoints/step-000004/done.json"
    done.write_text(done.read_text().replace('"llama"', '"gpt2"'))
    with pytest.raises(AssertionError, match=r"is a checkpoint of .*gpt2.*remove it"):
        train(tiny, pairs, tmp_path, 1, Objective(), checkpoint_every=2)


def test_a_policy_on_disk_that_is_not_the_trained_one_fails_the_stage(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    end(start(tiny, pairs, tmp_path, 1, Objective(), spoil="file"))
    assert "is not what was trained" in str(failure_of(tmp_path)) and "model.embed_tokens.weight first" in str(failure_of(tmp_path))
    end(start(tiny, pairs, tmp_path / "gathered", 1, Objective(), spoil="weights"))
    assert "what was written is not it" in str(failure_of(tmp_path / "gathered"))
    end(start(tiny, pairs, tmp_path / "reward", 1, Objective(), spoil="file", kind="reward", precision="bfloat16", learning_rate=3e-3))
    assert "is not what was trained" in str(failure_of(tmp_path / "reward"))
    train(tiny, pairs, tmp_path / "rounded", 1, Objective(), precision="bfloat16")
