"""The policies of a run, found from its files."""

from pathlib import Path

import pytest

from pipelines import policies
from pipelines.artifacts import Run, Stage, write_json
from pipelines.report.facts import gather


def test_policies_come_in_the_order_of_the_graph_whatever_the_clocks_say(tmp_path: Path) -> None:
    run, before = Run(tmp_path), None
    (tmp_path / "config.yaml").write_text("{}")
    for number, name in enumerate(("sft", "iteration-1", "iteration-2")):
        stage = Stage(f"{name}/training", {}, {"start": before} if before else {})
        run.directory(stage).joinpath("policy").mkdir(parents=True)
        manifest = {"name": stage.name, "fingerprint": stage.fingerprint, "finished": f"2026-01-0{9 - number}T00:00:00+00:00"}
        write_json(run.directory(stage) / "manifest.json", manifest | {"inputs": {"start": _came(before)} if before else {}})
        before = stage
    assert list(policies.of_run(tmp_path)) == ["base", "sft", "iteration-1", "iteration-2"]


def _came(stage: Stage) -> dict[str, str]:
    return {"name": stage.name, "fingerprint": stage.fingerprint}


def test_what_an_earlier_job_left_behind_is_no_policy_of_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def give(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, int]]:
        run.directory(stages[0]).joinpath("policy").mkdir()
        run.directory(stages[0]).joinpath("policy/config.json").write_text(stages[0].fingerprint)
        return {stages[0].name: {}}

    (tmp_path / "config.yaml").write_text("{}")
    for beta, iterations in ((1.0, 3), (2.0, 1)):
        run, before = Run(tmp_path), Stage("sft/training", {})
        run.do(give, before)
        for number in range(1, iterations + 1):
            before = Stage(f"iteration-{number}/training", {"beta": beta}, {"start": before})
            run.do(give, before)
    assert list(policies.of_run(tmp_path)) == ["base", "sft", "iteration-1"]
    assert "iteration-3/training was made from what the run has replaced since" in caplog.text
    assert [stage.name for stage in gather(tmp_path).stages] == ["sft/training", "iteration-1/training"]
