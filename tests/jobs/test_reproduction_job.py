"""The whole reproduction in miniature, as a person starts it."""

import json
import sys
from pathlib import Path

import pytest
from running import finish


@pytest.mark.slow
def test_a_miniature_makes_its_tables_and_goes_on_where_it_was(tmp_path: Path) -> None:
    options = {
        "run.root": tmp_path,
        "run.name": "mini",
        "ray.num_cpus": 2,
        "scope.seeds": 2,
        "scope.tables": "[gsil, gsil_grid]",
        "scope.arms": "[sft-longer, spin, gsil-logistic]",
        "scope.trials": 2,
        "scope.iterations": 1,
        "model.hidden_size": 32,
        "model.layers": 1,
        "problems.corpus": 60,
        "problems.demonstrations": 24,
        "problems.prompts": 12,
        "problems.validation": 12,
        "problems.test": 12,
        "pretraining.epochs": 1,
        "training.epochs": 1,
    }
    command = [sys.executable, "jobs/reproduce.py", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]
    done = finish(command)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "mini" / "summary.json").read_text())
    rows = summary["tables"]["gsil"]["rows"]
    assert [row[0] for row in rows[1:]] == ["pre-trained", "sft", "sft-longer", "spin", "gsil-logistic"] and not summary["diverged"]
    assert len(summary["tables"]["gsil_grid"]["rows"]) == 5
    for name in ("gsil", "gsil_grid"):
        made = tmp_path / "mini" / "tables" / name
        assert (made / "table.md").read_text().startswith("| ") and (made / "figure.png").stat().st_size > 5000
        assert json.loads((made / "table.json").read_text())["missing"] == []
    # The chosen setting of the search is what every seed trained with.
    choice = json.loads((tmp_path / "mini/search/spin/choice/trials.json").read_text())["chosen"]
    trained = json.loads((tmp_path / "mini/seed-1/spin/iteration-1/training/manifest.json").read_text())["numbers"]["chosen"]
    assert trained["learning_rate"] == choice["learning_rate"] and trained["beta"] == choice["beta"]
    again = finish(command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert all(stage["skipped"] for stage in json.loads((tmp_path / "mini" / "summary.json").read_text())["stages"])
