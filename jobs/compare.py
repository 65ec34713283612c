"""Put runs side by side: what they differ in, their tables, their curves.

    python jobs/compare.py runs/A runs/B ... [--output compare.html]

Reads what the runs left on disk, also while they are going on; prints the tables and writes one self-contained page.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml


def main(argv: Sequence[str]) -> int:
    """Writes the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page (default: %(default)s)")
    options = parser.parse_args(argv)

    from jobs.schemas import EvaluateConfig, GsilConfig, IrlConfig
    from pipelines.report import comparison
    from pipelines.report.facts import gather
    from pipelines.run.artifacts import StageError
    from pipelines.run.policies import read_config
    from pipelines.tables import Shown, Table
    from pipelines.watching.terminal import print_result

    found = []
    for path in {path.resolve(): path for path in options.runs}.values():
        # A run of one of the other jobs alone has that job's own files.
        jobs = [job for job in (GsilConfig, IrlConfig, EvaluateConfig) if (path / job.file("config.yaml")).exists()]
        try:
            configs = [read_config(path / job.file("config.yaml")) for job in jobs]
        except StageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        facts = gather(path, prefix=jobs[0].prefix if jobs else "")
        # What else was asked in the same directory adds the sections of its job; those that jobs share are the first one's.
        sections = {name: section for config in reversed(configs) for name, section in config.items()}
        facts = replace(facts, config=yaml.safe_dump(sections))
        if not facts.stages:
            print(f"error: {path} is no run directory: no stage has left a manifest.json in it", file=sys.stderr)
            return 1
        # Runs of the same name are told apart by their place.
        alike = len({other.resolve() for other in options.runs if other.resolve().name == facts.name}) > 1
        found.append(replace(facts, name=str(path)) if alike else facts)
    try:
        options.output.write_text(comparison.html(found), encoding="utf-8")
    except OSError as error:
        print(f"error: --output {options.output}: {error.strerror}", file=sys.stderr)
        return 1
    shown = comparison.tables(found)
    same = [title for title, rows in shown.items() if not rows]
    print_result(Shown([Table(title, rows) for title, rows in shown.items() if rows], [*same, f"page: {options.output}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
