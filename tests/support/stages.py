"""Training stages of a tiny model, on pairs that are made up, and other numbers for stages that are done."""

from pathlib import Path
from typing import Any

from training import write_pairs

from actors.settings import Objective, Tracking, Training
from pipelines import base_model, policy_training
from pipelines.run.artifacts import Run, Stage
from pipelines.run.manifests import read_manifest, write_manifest
from pipelines.settings import Model


def run_stage(root: Path, model: Path, spoil: dict[int, float] | None = None, **settings: Any) -> Path:
    """Runs a training stage on pairs of the tiny model; returns its directory."""
    run, training, (stage,) = planned(root, model, [spoil], **settings)
    run.do(policy_training.train(training, Tracking(), 64, False), stage)
    return run.directory(stage)


def planned(root: Path, model: Path, spoils: list[dict[int, float] | None], **settings: Any) -> tuple[Run, Training, list[Stage]]:
    """Training stages of the tiny model, one for each `spoil`, and their pairs."""

    def write(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        for split in ("train", "held_out"):
            (run.directory(stages[0]) / split).mkdir()
            write_pairs(model, run.directory(stages[0]) / split / "00000.parquet", spoils[stages[0].settings["spoil"]])
        return {}

    run, base = Run(root), base_model.plan(Model(path=str(model)))
    training = Training(**({"epochs": 12, "learning_rate": 1e-4, "checkpoint_every": 5, "zero_stage": 2} | settings))
    run.do(base_model.prepare(Model(path=str(model))), base)
    stages = []
    for number in range(len(spoils)):
        name = f"gsil-{number}" if number else "gsil"
        data = Stage(f"{name}/pairs", {"spoil": number})
        run.do(write, data)
        stages.append(policy_training.plan(f"{name}/training", base, base, data, training, Objective()))
    return run, training, stages


def renumber(directory: Path, **numbers: Any) -> None:
    """Makes other numbers of a stage that is done, in a manifest that is whole."""
    content = read_manifest(directory / "manifest.json")
    assert content
    write_manifest(directory / "manifest.json", content | {"numbers": numbers})
