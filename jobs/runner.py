"""What every job does around its stages: parse, plan, lock, connect to Ray, show how it goes, say what went wrong."""

import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from actors.settings import Tracking
from actors.storage import advice, is_full, write_bytes
from jobs.config import parse, to_yaml
from jobs.schemas import JobConfig
from pipelines import summary
from pipelines.run.artifacts import Run, Stage
from pipelines.run.lock import locked
from pipelines.tables import Shown, reader_may_leave
from pipelines.workers import cluster


class Plan(Protocol):
    """The job graph of a job: all stages with their fingerprints."""

    def stages(self) -> list[Stage]:
        """In the order in which they run."""
        ...


log = logging.getLogger("gsil")
C = TypeVar("C", bound=JobConfig)
P = TypeVar("P", bound=Plan)


def main(
    schema: type[C],
    argv: Sequence[str],
    usage: str,
    plan: Callable[[C], P],
    work: Callable[[C, P, Run], dict[str, Any]],
    show: Callable[[dict[str, Any], Path], Shown] = summary.show,
    reported: Callable[[P], list[Stage]] = lambda graph: graph.stages(),
) -> int:
    """Runs a job.

    Args:
        schema: its config.
        argv: without the program's name.
        usage: the first lines of `--help`.
        plan: makes the job graph; starts nothing.
        work: runs it and returns what went into its summary.
        show: what of that a person sees at the end.
        reported: the stages that the report's page is about, by default all.

    Returns:
        the exit status.
    """
    # Python puts a script's folder before all others, and Ray hands it on to workers: there `evaluate` is a job, and no library.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    if not argv and schema.example:
        sys.exit(f"error: say what to run: --config {schema.example} is an example that runs as it is, --help lists every key")
    asked = parse(schema, argv, usage)
    config = asked.config
    root = config.run.directory()
    try:
        graph = plan(config)
        if asked.dry_run:
            _dry_run(config, graph, root)
            return 0
        with locked(root):
            _execute(config, graph, root, work, show, reported(graph))
        return 0
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command continues {root}", file=sys.stderr)
        return 130
    except Exception as error:
        known: object = cluster.person_can_mend(error)
        if known is None and is_full(root, error):
            known = advice(root, error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        return 1


def _dry_run(config: JobConfig, graph: Plan, root: Path) -> None:
    run = Run(root)
    with reader_may_leave():
        print(to_yaml(config))
        print(f"stages of {root}:")
        for stage in graph.stages():
            state = "done" if run.manifest(stage) else "to do"
            print(f"  {stage.fingerprint}  {state:5}  {stage.name:31}  {stage.demand}")


def _execute(
    config: C,
    graph: P,
    root: Path,
    work: Callable[[C, P, Run], dict[str, Any]],
    show: Callable[[dict[str, Any], Path], Shown],
    reported: list[Stage],
) -> None:
    from pipelines.report.attached import attach
    from pipelines.report.writing import Reporter
    from pipelines.run.plan import write_plan
    from pipelines.watching.job_metadata import JobMetadata
    from pipelines.watching.logs import Where, set_up_logs
    from pipelines.watching.metrics import Metrics
    from pipelines.watching.status import INTERRUPTED, ProgressFile
    from pipelines.watching.terminal import Terminal, chatter_to, print_result
    from pipelines.watching.watch import Watch

    described = False

    def describe() -> None:
        nonlocal described
        described = True
        write_bytes(root / config.file("config.yaml"), to_yaml(config).encode())
        write_plan(root, config.prefix, config.script, graph.stages())

    def begin() -> None:
        # What a run that has ended left stays as it is until a stage begins: a mistake that is found before costs nothing.
        if ended.exists():
            ended.unlink()
            describe()

    report, name, ended = Reporter(root, reported, config.prefix), config.run.name, root / config.file("summary.json")
    if not ended.exists():
        describe()
    with chatter_to(root / "logs" / "driver.log") as console, Terminal(console) as terminal:
        display = Watch(terminal, ProgressFile(root / config.file("progress.json")), Metrics(name), JobMetadata(name))
        set_up_logs(root / "logs", Where(name, lambda: display.running), terminal.say)
        terminal.say(f"{name}: {root}")
        try:
            # The display's clock stands still before Ray is gone.
            with cluster.connected(config.ray) as logs, display:
                # Ray has set handlers of its own by now.
                for stop in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(stop, signal.default_int_handler)
                terminal.say(f"logs: {root / 'logs'}, and of Ray, vLLM and DeepSpeed: {logs}")
                cluster.check_fits(config.ray.address, config.demands())
                run = Run(root, display, begin, report, config.ray.wait_minutes * 60)
                run.keeper, report.log = cluster.keeper(config.ray), run.log
                run.verify(graph.stages())
                try:
                    result = work(config, graph, run)
                except KeyboardInterrupt:
                    terminal.say("stopping: what runs is ended")
                    raise
                except Exception:
                    # Who interrupts does not wait: they end with Ray.
                    run.keeper.close()
                    raise
                run.keeper.close()
        except BaseException as error:
            why = INTERRUPTED if isinstance(error, KeyboardInterrupt) else str(cluster.person_can_mend(error) or repr(error))
            log.info("stopped: %s", why)
            if described:
                report(failure=why)
            display.over(why)
            raise
        display.over()
        if not described:
            describe()
        report()
        if isinstance(tracking := getattr(config, "tracking", None), Tracking):
            attach(tracking, root, report.page, result)
    shown = show(result, root)
    print_result(replace(shown, lines=[*shown.lines, f"report: {report.page}"]))
