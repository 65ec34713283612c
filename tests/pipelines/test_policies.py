"""The policies of a run, found from its files."""

import re
from pathlib import Path

import pytest

from jobs import compare
from pipelines.report.facts import gather
from pipelines.run import policies
from pipelines.run.artifacts import Run, Stage, StageError, write_json


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
    (tmp_path / "sft/training/manifest.json").write_text('{"name": "sft/train')
    assert "sft" not in policies.of_run(tmp_path)
    assert "sft/training has a damaged manifest, and its job makes it anew" in caplog.text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"{{", ":1: not valid YAML: expected the node content, but found '<stream end>'; mend it, or run the job that wrote it again"),
        (b"a: \xff", ": not valid YAML: 'utf-8' codec can't decode byte 0xff"),
        (b"[1]", " must hold sections (run:, model:, ...), not list"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(text: bytes, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(text)
    with pytest.raises(StageError, match=re.escape(f"{file}{why}")):
        policies.of_run(tmp_path)
    assert compare.main([str(tmp_path), "--output", str(tmp_path / "compare.html")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file}{why}") and said.count("\n") == 1
    (tmp_path / "demonstrations" / "held_out").mkdir(parents=True)
    (tmp_path / "demonstrations" / "held_out" / "00000.parquet").write_bytes(b"rows")
    with pytest.raises(StageError, match=r"config\.yaml"):
        policies.demonstrations(tmp_path)
    file.write_text("model: 3")
    with pytest.raises(StageError, match=r"config\.yaml: 'model' must be a section, not 3"):
        policies.of_run(tmp_path)


def test_what_a_run_made_is_read_only_as_it_was_written(tmp_path: Path) -> None:
    def give(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, int]]:
        for name in ("policy/weights", "held_out/00000"):
            run.directory(stages[0]).joinpath(name).parent.mkdir()
            run.directory(stages[0]).joinpath(name).write_text("written")
        return {stages[0].name: {}}

    stage = Stage("sft/training", {})
    Run(tmp_path).do(give, stage)
    policy, rows = tmp_path / "sft/training/policy", tmp_path / "sft/training/held_out/00000"
    policies.require_intact(str(policy))
    (policy / "weights").write_text("wr\ntten")
    with pytest.raises(StageError, match=r"sft/training/policy/weights is damaged: its checksum is .* run the job that made it again"):
        policies.require_intact(str(policy))
    # What else the stage holds is as it was, and elsewhere nobody knows how it should be.
    policies.require_intact(str(rows))
    policies.require_intact(str(tmp_path))
    policies.require_intact("hub:owner/name")
    rows.unlink()
    with pytest.raises(StageError, match="held_out/00000 is gone"):
        policies.require_intact(str(rows))
    manifest = tmp_path / "sft/training/manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    with pytest.raises(StageError, match=r"manifest\.json is damaged"):
        policies.require_intact(str(policy))
    # A file of that name that is somebody else's.
    for other in ('{"checksums": {"a": 1}, "files": [1]}', "[1]", "no JSON"):
        manifest.write_text(other)
        policies.require_intact(str(policy))
