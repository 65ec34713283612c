"""What a model's programs can and cannot do."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.lmeval.sandbox import CodeEval, Limits, run

QUICK = Limits(seconds=1, memory_mib=512)


@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([3, 1]) == [1, 3]",
        "from dataclasses import dataclass\nfrom typing import List\n@dataclass\nclass A:\n    x: 'List[int]'\nassert A([1]).x == [1]",
        "import collections, heapq, itertools, math, re, random, string, datetime, hashlib, decimal, fractions, copy, bisect, subprocess",
        "open('note', 'w').write('x' * 1000)\nassert len(open('note').read()) == 1000\nimport os\nos.remove('note')",
        "print('x' * 10_000_000)",
        "if __name__ == '__main__':\n    raise RuntimeError('no script')",
    ],
)
def test_what_a_solution_may_do(program: str) -> None:
    assert run(program) == run("pass")
    assert run(program).passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 3, 'wrong\\nsum'", "AssertionError: wrong"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("# a letter \ud800 that is none", "UnicodeEncodeError: 'utf-8' codec"),
        ("import sys\nsys.exit(0)", "exited before its end"),
        ("raise SystemExit", "exited before its end"),
        ("import os\nos._exit(0)", "exited before its end"),
        ("while True: pass", "timed out"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "timed out"),
        ("import time\ntime.sleep(60)", "timed out"),
        ("x = [0] * 10**10", "out of memory"),
        ("x = []\nwhile True: x.append('y' * 10**6)", "out of memory"),
        ("with open('big', 'w') as f:\n    while True: f.write('x' * 10**6)", "OSError: [Errno 27] File too large"),
        ("f = [open(f'note{i}', 'w') for i in range(1000)]", "OSError: [Errno 24]"),
        ("import os\nos.fork()", "PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
        ("import os\nos.system('true')", "PermissionError: os.system is not allowed"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError: os.kill is not allowed"),
        ("import ctypes", "ImportError: ctypes is not allowed"),
        ("import _posixsubprocess\n_posixsubprocess.fork_exec()", "PermissionError"),
        ("import os\nos.symlink('/', 'root')", "PermissionError: os.symlink is not allowed"),
        ("open('/etc/passwd').read()", "PermissionError: /etc/passwd is outside"),
        ("import os\nos.open('/tmp', os.O_RDONLY)", "PermissionError"),
        ("import os\nos.open('.', os.O_RDONLY)", "PermissionError: . is a folder"),
        ("import os\nos.mkfifo('/tmp/pipe')", "PermissionError"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (100, 100))", "PermissionError: resource.setrlimit"),
        ("import threading\nthreading.Thread(target=print).start()\nraise ValueError('thread')", ""),
    ],
)
def test_what_it_may_not(program: str, reason: str) -> None:
    verdict = run(program, QUICK)
    assert not verdict.passed and verdict.reason.startswith(reason), verdict


def test_processes_stay_few(tmp_path: Path) -> None:
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except Exception:\n        pass"
    started = time.monotonic()
    assert run(bomb, QUICK).reason == "timed out"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "way", ["open({!r}, 'w')", "import os\nos.open({!r}, os.O_CREAT | os.O_WRONLY)", "import pathlib\npathlib.Path({!r}).touch()"]
)
def test_nothing_is_written_elsewhere(way: str, tmp_path: Path) -> None:
    place = tmp_path / "made"
    verdict = run(way.format(str(place)), QUICK)
    assert verdict.reason.startswith("PermissionError") and not place.exists()
    up = os.path.relpath(place, "/tmp")
    assert run(way.format(f"../../../../../../tmp/{up}"), QUICK).reason.startswith("PermissionError") and not place.exists()


def test_nothing_is_removed_or_renamed_elsewhere(tmp_path: Path) -> None:
    place = tmp_path / "precious"
    place.write_text("here")
    for way in (
        "os.remove({!r})",
        "os.rename({!r}, 'mine')",
        "os.truncate({!r}, 0)",
        "__import__('shutil').rmtree({!r})",
        "os.rename('.', {!r})",
    ):
        assert run("import os\n" + way.format(str(place)), QUICK).reason.startswith(("PermissionError", "NotADirectoryError"))
    assert place.read_text() == "here"


def test_nobody_is_reached_over_the_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        for way in (
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}))",
            f"import _socket\n_socket.socket().connect(('127.0.0.1', {port}))",
            f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')",
        ):
            assert not run(way, QUICK).passed
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_folder_of_its_own_is_gone_afterwards() -> None:
    program = "import os\nassert os.listdir('.') == [] and not os.environ.get('PATH')\nopen('x', 'w')\nraise ValueError(os.getcwd())"
    verdict = run(program)
    assert verdict.reason.startswith("ValueError: /") and not Path(verdict.reason.removeprefix("ValueError: ")).exists()


def test_pass_at_k() -> None:
    metric = CodeEval()
    right, wrong = "def add(a, b): return a + b", "def add(a, b): return a * b"
    scores, verdicts = metric.compute(["assert add(2, 3) == 5"] * 2, [[right, wrong], [wrong, wrong]], k=[1, 2, 3])
    # Of two samples one is right: 1/2 and 1; none of the others: 0; three samples there are not.
    assert scores == {"pass@1": 0.25, "pass@2": 0.5}
    assert [[v.passed for v in found] for found in verdicts.values()] == [[True, False], [False, False]]
    assert metric.reasons[wrong, "assert add(2, 3) == 5"] == "AssertionError"


def test_a_guest_that_cannot_begin_is_our_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not begin"):
        run("pass")


def test_nothing_is_left_running() -> None:
    run("import time\ntime.sleep(30)", Limits(seconds=0.2))
    found = subprocess.run(["pgrep", "-f", "sandbox_guest.py"], capture_output=True, text=True).stdout.split()
    assert not found
