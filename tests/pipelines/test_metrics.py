"""What Prometheus finds of a run, and the Grafana dashboard that draws it."""

import json
import re
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from running import ROOT

from pipelines.run.artifacts import Run, Stage
from pipelines.serving.metrics import Metrics as ServiceMetrics
from pipelines.serving.protocol import Usage
from pipelines.watching import metrics
from pipelines.watching.metrics import GAUGES, LABELS, Metrics, rejected
from pipelines.watching.watch import Pace, Progress, Watch

DASHBOARD = json.loads((ROOT / "deploy/grafana/gsil.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
WAIT_SECONDS = 40.0
"""Processes hand their metrics to the node's agent every ten seconds."""


def scraped() -> dict[tuple[str, tuple[str | None, ...]], float]:
    """(name, values of LABELS) -> value, of everything that this node exports."""
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(s.labels.get(label) for label in LABELS)): s.value for family in families for s in family.samples}


def test_prometheus_finds_a_run_at_the_port_of_a_real_ray_instance(local_ray: None, tmp_path: Path) -> None:
    data, training = Stage("demonstrations", {}), Stage("iteration-2/training", {})
    display = Watch(Metrics("mine"))

    def read(run: Run, stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
        (run.directory(data) / "rows").write_text("rows")
        return {data.name: {"rejected": 3}}

    Run(tmp_path, display).do(read, data)
    display.started((training,))
    display.follow(16, "steps", lambda: 4, lambda: {"tokens_per_second": 250.0, "restarts": 2})
    display.pace = Pace(0, time.monotonic() - 8)
    display.pace.at(2, time.monotonic() - 4)
    with display:
        deadline, named = time.monotonic() + WAIT_SECONDS, ("mine", "iteration-2/training", "2")
        while ("ray_gsil_steps", named) not in (found := scraped()):
            assert time.monotonic() < deadline, sorted(name for name, _ in found if "gsil" in name)
            time.sleep(1)
    of_stage = {name.removeprefix("ray_gsil_"): value for (name, labels), value in found.items() if labels == named}
    left, pace = of_stage.pop("stage_seconds_left"), of_stage.pop("steps_per_second")
    assert of_stage == {"stage_active": 1, "steps": 4, "steps_wanted": 16, "tokens_per_second": 250, "restarts": 2}
    assert 0 < pace <= 0.5 and left == pytest.approx(12 / pace)
    before = ("mine", "demonstrations", "")
    assert found["ray_gsil_stage_active", before] == 0 and found["ray_gsil_rejected_rows", before] == 3
    assert ("ray_gsil_stage_seconds", before) in found and ("ray_gsil_stage_seconds", named) not in found
    names = {name for name, _ in found}
    assert {"ray_node_cpu_utilization", "ray_node_mem_used", "ray_node_mem_total"} <= names, "what the dashboard draws of nodes"


class Remembers(Metrics):
    """Without Ray."""

    def __init__(self) -> None:
        super().__init__("mine")
        self.told: dict[tuple[str, str], float] = {}

    def _set(self, stages: tuple[str, ...], values: Mapping[str, float]) -> None:
        assert set(values) <= set(GAUGES)
        self.gauges |= dict.fromkeys(values)
        self.told |= {(name, " + ".join(stages)): value for name, value in values.items()}


def test_stages_of_one_call_are_one_series_until_they_are_done() -> None:
    told, both = Remembers(), ("sft/samples", "iteration-1/negatives")
    told.began(Progress(both, 0.0))
    told.goes_on(Progress(both, 9.0, "rows", 30, 120, 10.0, {"restarts": 1, "loss": 2.0}))
    title = "sft/samples + iteration-1/negatives"
    assert (
        told.told["gsil_rows", title] == 30 and told.told["gsil_stage_seconds_left", title] == 9 and told.told["gsil_restarts", title] == 1
    )
    told.ended("sft/samples", 3.0, False, {"rows": 60})
    assert told.told["gsil_stage_active", title] == told.told["gsil_rows_per_second", title] == 0
    assert told.told["gsil_stage_seconds", "sft/samples"] == 3 and told.told["gsil_rows", title] == 30
    # The clock may strike between the ends of two stages.
    told.goes_on(Progress(("iteration-1/negatives",), 9.1))
    assert told.told["gsil_stage_active", "iteration-1/negatives"] == 1
    told.ended("iteration-1/negatives", 6.0, False, {"rows": 60})
    assert told.told["gsil_stage_active", "iteration-1/negatives"] == 0
    told.ended("base/model", 4.0, True, {})
    assert told.told["gsil_stage_seconds", "base/model"] == 4, "also of what was done before"


def test_rows_that_a_stage_set_aside() -> None:
    assert rejected({"train": 144, "rejected": 2}) == 2, "demonstrations"
    assert rejected({"train": {"rows": 90, "identical": 8, "dropped": 1}, "held_out": {"rows": 9, "identical": 1}}) == 9, "pairs"
    assert rejected({"questions": 10, "failed": 1}) == 1 and rejected({"accuracy": 0.5, "failed": None}) == 0


def exported_by_the_service() -> set[str]:
    service = ServiceMetrics()
    service.came()
    service.answered("/v1/chat/completions", 500, 0.1)
    service.sampled(Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2), [0.5])
    body, _, _ = service.exposition()
    return {sample.name for family in text_string_to_metric_families(body.decode()) for sample in family.samples}


def test_every_metric_of_the_dashboard_is_exported() -> None:
    asked = {name for query in QUERIES for name in re.findall(r"\b(?:ray_)?(?:gsil|node|serve)_[a-z_]+", query)}
    panels = Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards"
    ray_draws = {name for path in panels.glob("*_panels.py") for name in re.findall(r"\bray_[a-z_]+", path.read_text())}
    ours = {f"ray_{name}" for name in GAUGES}
    assert asked <= ours | ray_draws | exported_by_the_service(), asked - ours - ray_draws - exported_by_the_service()
    drawn = ours & asked
    assert drawn == ours, f"and every gauge is drawn: {ours - drawn}"


def test_the_dashboard_has_what_grafana_needs() -> None:
    assert (
        DASHBOARD["uid"] == "gsil" and DASHBOARD["title"] and DASHBOARD["schemaVersion"] >= 36 and set(DASHBOARD["time"]) == {"from", "to"}
    )
    source, run = DASHBOARD["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    assert run["name"] == "run" and run["query"]["query"] == "label_values(ray_gsil_stage_seconds, run)"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) and len(PANELS) >= 15
    for panel in PANELS:
        assert panel["title"] and panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        letters = [target["refId"] for target in panel["targets"]]
        assert letters and len(set(letters)) == len(letters) and all(target["legendFormat"] for target in panel["targets"])
    for query in QUERIES:
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
        assert set(re.findall(r"(\w+)=~", query)) <= {"run"} and ("ray_gsil" in query) == ('run=~"$run"' in query), query
        by = {label.strip() for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(",")}
        assert by <= {*LABELS, "route", "status", "le", "kind", "deployment", "instance", "GpuIndex"}, query


def test_panels_lie_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


def test_the_names_are_ours_and_said() -> None:
    assert all(name.startswith("gsil_") and text for name, text in GAUGES.items()) and set(metrics.MOMENTARY) <= set(GAUGES)
    assert set(metrics.ALSO.values()) <= set(GAUGES)
