"""A tournament of fabricated policies before a judge."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipelines import judging, tournament
from pipelines.judges.settings import Judge, Tournament
from pipelines.records import DEMONSTRATION, SAMPLE, write_rows
from pipelines.run.artifacts import Run, Stage

ROWS = 6
FEW = "some pairs met on {} prompts only: standard errors and bands over so few say little"
ALIKE = "the games of every pair all ended alike: how far ratings are apart is not known, whatever their bands say"
LENGTHS = {"demonstrations": 5, "short": 3, "long": 9}
"""Words of a response; each row one more."""


def prompt(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Say {number}."}]


def words(name: str, number: int) -> str:
    return " ".join(["word"] * (LENGTHS[name] + number))


class Played:
    """A tournament of fabricated policies, in a run directory of its own."""

    def __init__(self, root: Path, **options: Any):
        self.run = Run(root)
        self.data = Stage("prompts", {})
        samples = {name: Stage(f"{name}/answers", {}) for name in ("short", "long")}
        rows = [{"id": f"r{k}", "prompt": prompt(k), "response": words("demonstrations", k)} for k in range(ROWS)]
        self._write(self.data, [row | {"source": "", "prompt_ids": [], "response_ids": []} for row in rows], DEMONSTRATION)
        for name, stage in samples.items():
            made = [row | {"response": words(name, k), "iteration": 0, "sample": 0, "finish_reason": "stop"} for k, row in enumerate(rows)]
            self._write(stage, [row | {"prompt_ids": [], "response_ids": []} for row in made], SAMPLE)
        self.settings = Tournament(contestants=["short", "long", "demonstrations"], **options)
        self.samples = samples

    def _write(self, stage: Stage, rows: list[dict[str, Any]], schema: Any) -> None:
        folder = self.run.directory(stage) / "train"
        folder.mkdir(parents=True)
        write_rows(folder / "00000.parquet", rows, schema)

    def play(self, url: str, url_model: str = "m", **judge: Any) -> dict[str, Any]:
        """Its numbers, and those of the asking under "asking"."""
        asked = Judge(url=url, url_model=url_model, **judge)
        questions = tournament.plan_questions(self.data, self.samples, self.settings, asked)
        answers = judging.plan("evaluation/tournament/answers", questions, asked, None)
        games = tournament.plan_games(questions, answers, self.settings)
        self.run.do(tournament.write_questions(self.settings), questions)
        self.run.do(judging.ask(asked, False), answers)
        self.run.do(tournament.judge_games(self.settings, asked), games)
        return self.run.numbers(games) | {"asking": self.run.numbers(answers)}

    def games(self) -> list[dict[str, Any]]:
        return pq.read_table(self.run.root / "evaluation" / "tournament" / "games" / "games.parquet").to_pylist()
