"""What waits for its next stage: who is taken again, who gives way, and that nobody notices but by the clock."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from actors.settings import Pool
from pipelines.run import keeping
from pipelines.run.artifacts import Run, Stage
from pipelines.run.keeping import Keeper, Need
from pipelines.run.restarts import restarts
from pipelines.workers.shards import Shard, map_shards

# Ray's workers cannot import a test: the class travels with the task.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Kept:
    """Counts."""

    def __init__(self) -> None:
        self.living, self.closed = True, 0
        self.closes: Callable[[], None] = lambda: None

    def alive(self) -> bool:
        return self.living

    def close(self) -> None:
        self.closed += 1
        self.closes()


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many CPUs are free; a test sets it."""
    free = [9]
    monkeypatch.setattr(keeping, "_free", lambda need: free[0] >= need.count)
    return free


def borrow(keeper: Keeper, kind: str, key: str = "", grows: bool = False, keep: bool = True) -> Kept:
    with keeper.borrowed(kind, key, Need(1, 1, grows=grows), Kept, lambda _: keep) as kept:
        return kept


def test_the_same_work_finds_who_did_it_before(places: list[int]) -> None:
    keeper = Keeper(60)
    first, other = borrow(keeper, "a"), borrow(keeper, "b")
    assert borrow(keeper, "a") is first and first is not other
    assert borrow(keeper, "a", key="more") is not first and first.closed == 1, "one of a kind is kept"
    other.living = False
    assert borrow(keeper, "b") is not other and other.closed == 1
    assert borrow(keeper, "c", keep=False).closed == 1
    keeper.close()
    assert not keeper.kept


def test_who_has_waited_longest_gives_way_and_no_one_more_than_needed(places: list[int]) -> None:
    keeper = Keeper(60)
    a, b, c = (borrow(keeper, name) for name in "abc")
    borrow(keeper, "a")
    places[0] = 0
    b.closes = lambda: places.__setitem__(0, 1)
    borrow(keeper, "d")
    assert (a.closed, b.closed, c.closed) == (0, 1, 0) and list(keeper.kept) == ["c", "a", "d"]


def test_nobody_waits_beside_who_may_grow_nor_where_memory_is_short(places: list[int]) -> None:
    keeper = Keeper(60)
    kept = borrow(keeper, "a")
    borrow(keeper, "b", grows=True)
    assert kept.closed == 1
    keeper = Keeper(60, spare_bytes=1e18)
    kept = borrow(keeper, "a")
    assert borrow(keeper, "a") is kept and borrow(keeper, "b") and kept.closed == 1


def test_who_fails_is_not_waited_for_and_who_must_not_wait_is_closed(places: list[int]) -> None:
    keeper, kept = Keeper(60), Kept()
    with pytest.raises(OSError, match="gone"), keeper.borrowed("a", "", Need(1, 1), lambda: kept, lambda _: True):
        raise OSError("gone")
    assert kept.closed == 0 and not keeper.kept
    assert borrow(Keeper(), "a").closed == 1


def test_who_has_waited_too_long_goes(places: list[int]) -> None:
    keeper = Keeper(0.2)
    kept = borrow(keeper, "a")
    assert borrow(keeper, "a") is kept
    time.sleep(0.6)
    assert kept.closed == 1 and not keeper.kept


class Says:
    """Writes which process made the shard."""

    def change(self, options: dict[str, Any]) -> None:
        """Holds nothing."""

    def __call__(self, inputs: list[str], output: str, options: dict[str, Any], tell: Callable[[int], None]) -> None:
        Path(output).write_text(str(os.getpid()))


def made_by(run: Run, name: str, pool: Pool) -> int:
    """The process that made the only shard of a stage."""
    work = [Shard(Stage(name, {}), (), run.root / name / "0.txt", {}, rows=1)]
    map_shards(run, work, Says, {}, pool, {})
    return int(work[0].output.read_text())


def test_actors_wait_for_the_next_stage_and_give_way_to_one_that_lacks_room(local_ray: None, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.keeper = Keeper(60)
    first = made_by(run, "a", Pool())
    began = time.monotonic()
    assert made_by(run, "b", Pool()) == first and time.monotonic() - began < 5
    both = Pool(num_cpus=2)
    second = made_by(run, "c", both)
    assert second != first and not _there(first) and len(run.keeper.kept) == 1
    # One that died while it waited is started again with the next shard, and waits no more: it may die so often in every stage.
    os.kill(second, signal.SIGKILL)
    assert made_by(run, "d", both) not in (first, second)
    assert restarts(tmp_path / "d") == 1 and not run.keeper.kept


def test_without_minutes_nobody_outlives_a_stage(local_ray: None, tmp_path: Path) -> None:
    assert not _there(made_by(Run(tmp_path), "a", Pool()))


def _there(process: int, seconds: float = 10.0) -> bool:
    """Whether a process still lives after some time."""
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return Path(f"/proc/{process}").exists()
