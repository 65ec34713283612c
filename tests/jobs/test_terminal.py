"""The job before a real terminal."""

import contextlib
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
from running import ROOT, command


@pytest.mark.slow
def test_a_terminal_shows_one_live_display_the_table_and_nobodys_chatter(tiny: Path, demonstrations: Path, tmp_path: Path) -> None:
    ours, its = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "140", "LINES": "40"}
    process = subprocess.Popen(command(tiny, demonstrations, tmp_path), cwd=ROOT, env=environment, stdin=its, stdout=its, stderr=its)
    os.close(its)
    shown = b""
    # At the end of the last process that holds the other side, reading fails.
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    text = shown.decode()
    assert process.wait(60) == 0, text
    assert "\x1b[?25l" in text and "\x1b[?25h" in text.rpartition("\x1b[?25l")[2], "the cursor is hidden, and given back"
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    for unit in (r"sft/training .*\d+/\d+ steps, ", r"base/samples .*\d+/\d+ rows, "):
        assert any(re.search(unit, line) for line in lines), unit
    kept = [line for line in lines if line.startswith("  + ")]
    assert len(kept) == 12 and kept[0].startswith("  + base/model  ") and kept[-1].startswith("  + iteration-1/evaluation  ")
    behind = lines[lines.index(kept[-1]) :]
    assert any(re.search(r"\biteration-1\b.* \d\.\d+", line) for line in behind), behind
    assert not [line for line in lines if any(word in line for word in ("INFO", "WARNING", "Warning:", "[deepspeed]", "pid=", ".py:"))]
