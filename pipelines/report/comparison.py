"""Runs side by side."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from pipelines.report import figures, page
from pipelines.report.doubts import doubts
from pipelines.report.facts import Facts
from pipelines.watching.states import DONE, SKIPPED, StageFacts
from pipelines.watching.status import duration, look


def tables(runs: Sequence[Facts]) -> dict[str, page.Rows]:
    """By title: what became of the jobs; the settings and versions that differ, a run a column; every table that a run has, the rows of
    all runs one below the other; the times of the stages. Without rows where nothing differs."""
    found: dict[str, page.Rows] = {"Jobs": jobs(runs)}
    for title, differing in (("Settings", differences(runs)), ("Versions", _differing("software", runs, [run.versions for run in runs]))):
        found |= {f"{title} that differ": differing} if len(differing) > 1 else {f"{title} that differ: none": []}
    by_title: dict[str, list[list[str]]] = {}
    for run in runs:
        for title, (header, *rows) in (page.tables(run) | page.data_table(run)).items():
            # Columns are there where something was measured: runs that differ in them have tables of their own.
            key = next((k for k in (title, f"{title}, {run.name}") if k not in by_title or by_title[k][0] == ["run", *header]), title)
            by_title.setdefault(key, [["run", *header]]).extend([run.name, *row] for row in rows)
    times = _side_by_side("stage", runs, [{stage.name: _took(stage) for stage in run.stages} for run in runs])
    return found | by_title | {"Times": times}


def jobs(runs: Sequence[Facts]) -> list[list[str]]:
    """How far each is that worked in a run directory, of which there may be several; the header first."""
    rows = [["run", "job", "state", "stages", "work", "more"]]
    for run in runs:
        for job in look(run.root):
            done = sum(stage.state in (DONE, SKIPPED) for stage in job.stages)
            rows.append([run.name, job.script, job.state, f"{done} of {len(job.stages)}", duration(job.seconds), job.said])
    return rows


def differences(runs: Sequence[Facts]) -> list[list[str]]:
    """Settings that are not the same in all runs, of the sections that the jobs of all have; the header first."""
    configs: list[dict[str, Any]] = [yaml.safe_load(run.config) or {} for run in runs]
    shared = set.intersection(*(set(config) for config in configs))
    told = []
    for config in configs:
        told.append(dict(_flat({section: value for section, value in config.items() if section in shared})))
    return _differing("setting", runs, [{key: value for key, value in flat.items() if key != "run.name"} for flat in told])


def _side_by_side(what: str, runs: Sequence[Facts], values: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """A row for every key, a column for every run; the header first."""
    rows = [[key, *(flat.get(key, "") for flat in values)] for key in dict.fromkeys(key for flat in values for key in flat)]
    return [[what, *(run.name for run in runs)], *rows]


def _differing(what: str, runs: Sequence[Facts], values: Sequence[Mapping[str, str]]) -> list[list[str]]:
    header, *rows = _side_by_side(what, runs, values)
    return [header, *(row for row in rows if len(set(row[1:])) > 1)]


def _took(stage: StageFacts) -> str:
    return stage.state if stage.seconds is None else duration(stage.seconds)


def html(runs: Sequence[Facts]) -> str:
    """One self-contained page."""
    names = " and ".join(dict.fromkeys(run.name for run in runs))
    shared = "".join(f"<h2>{escape(title)}</h2>{page.table(rows) if rows else ''}" for title, rows in tables(runs).items())
    columns = "".join(f"<article><h3>{escape(run.name)}</h3>{_column(run, runs)}</article>" for run in runs)
    return page.TEMPLATE.substitute(
        title=escape(names), state="runs side by side", contents="", sections=f'{shared}<h2>Curves</h2><div class="columns">{columns}</div>'
    )


def _column(run: Facts, beside: Sequence[Facts]) -> str:
    warned = "".join(f"<li>{escape(text)}</li>" for text in doubts(run))
    found = page.figure(figures.accuracy(run, beside)) + page.figure(figures.ranking(run))
    samples = page.figure(figures.lengths(run)) + page.figure(figures.best_of_n(run))
    return (f"<ul class=warnings>{warned}</ul>" if warned else "") + found + page.training(run, beside) + samples


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "null" if value is None else str(value)
