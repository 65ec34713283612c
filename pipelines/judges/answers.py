"""Answers of judges by what they were asked, in a file that runs may share."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipelines.run.artifacts import StageError

Row = dict[str, Any]


class Cache:
    """Answers by the content of the question and the judge, in a file that only grows: a line for each answer with its checksum, written at
    once. A line that was cut off or changed is no answer.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.answers: dict[str, Row] = {}
        self.taken = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise StageError(f"judge.cache={str(path)!r} cannot be written: {error.strerror}") from None
        self.file.seek(0)
        whole = True
        for line in self.file:
            # Cut off when a job was killed, maybe right before the end of the line.
            whole = line.endswith("\n")
            digest, _, entry = line.rstrip("\n").partition(" ")
            if digest == _digest(entry):
                answer = json.loads(entry)
                self.answers[answer.pop("key")] = answer
        if not whole:
            self.file.write("\n")

    @staticmethod
    def key(who: Any, row: Row) -> str:
        """The key of a question to somebody."""
        return hashlib.sha256(json.dumps([who, row["kind"], row["question"]], sort_keys=True).encode()).hexdigest()[:32]

    def take(self, key: str, answer: Row) -> None:
        """Keeps an answer, also after the process is killed."""
        entry = json.dumps({"key": key} | answer)
        self.file.write(f"{_digest(entry)} {entry}\n")
        self.file.flush()
        self.answers[key] = answer
        self.taken += 1

    def close(self) -> None:
        """Makes sure that all of it is on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def _digest(entry: str) -> str:
    return hashlib.sha256(entry.encode()).hexdigest()[:16]
