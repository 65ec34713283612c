"""The curves of trainings."""

import json
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pipelines.report import figures
from pipelines.report.facts import gather
from pipelines.run.artifacts import Run, Stage


def write_curve(root: Path, stage: Stage, **values: float) -> None:
    def work(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        lines = [json.dumps({"step": k + 1, **values}) + "\n" for k in range(14)]
        (run.directory(stage) / "metrics.jsonl").write_text("".join(lines))
        return {stage.name: {}}

    Run(root).do(work, stage)


def test_a_reward_model_is_drawn_by_its_scores(tmp_path: Path) -> None:
    values = {"reward_real": 1.0, "reward_generated": 0.5, "margin": 0.5, "logps_real": 1.0, "logps_generated": 0.5}
    write_curve(tmp_path, Stage("rewards/sft-demo/seed-0", {}), **values)
    ((heading, drawn),) = figures.training(gather(tmp_path)).items()
    assert heading == "Training of reward models: sft-demo/seed-0" and "rewards (scores)" in drawn
    assert "log ratio" not in drawn and "log-probs" not in drawn and "logps" not in drawn


def test_trainings_side_by_side_have_the_same_ranges(tmp_path: Path) -> None:
    for name, loss in (("small", 1.0), ("large", 40.0), ("broken", float("nan"))):
        write_curve(tmp_path / name, Stage("sft/training", {}), loss=loss)
    small, large, broken = (gather(tmp_path / name) for name in ("small", "large", "broken"))
    ticks = [
        set(re.findall(r">(\d+)<", drawn)) for run in (small, large) for drawn in figures.training(run, (small, large, broken)).values()
    ]
    alone = set(re.findall(r">(\d+)<", figures.training(small)["Training on demonstrations: sft"]))
    assert "40" in ticks[0] and ticks[0] == ticks[1] and "40" not in alone
    assert figures.training(broken, (broken,))
    heights = []
    for names in (("sft",), ("sft", "again")):
        drawn = Figure()
        figures._sft(drawn, ({name: [{"loss": 1.0}, {"loss": 2.0}] for name in names}, {"loss": (0.5, 4.0)}))
        heights.append(drawn.axes[0].get_ylim())
    assert heights[0] == heights[1], "with a legend and without one"


def test_steps_are_whole(tmp_path: Path) -> None:
    write_curve(tmp_path, Stage("sft/training", {}), loss=1.0)
    (drawn,) = figures.training(gather(tmp_path)).values()
    assert ">3<" in drawn and ">2.5<" not in drawn
