"""Data that is there and cannot be used as it is: malformed tables, patterns that match nothing, held-out rows that are all bad."""

import json
from pathlib import Path
from typing import Any

import pytest
from demonstration_files import ROWS, prepare, write

from pipelines.data import sources
from pipelines.run.artifacts import StageError


def table(path: Path, *rows: str) -> str:
    path.write_text("\r\n".join(["prompt,completion", *rows, ""]), newline="")
    return str(path)


def read(file: str) -> list[tuple[Any, str]]:
    return [(json.loads(row["row"] or "null"), row["reason"]) for row in sources.read(file)]


GOOD = [f"What is {k}?,{k}" for k in range(200)]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*GOOD[:150], '"What is this?,it', *GOOD[150:]], "the row in line 152 opens a quote that is not closed"),
        ([*GOOD[:3], "", "", '"a\r\nb",c', 'Why?,"d'], "the row in line 9 opens a quote that is not closed"),
        (
            [*GOOD[:150], '"What is this?,it', *GOOD[150:], 'Why?,"d, e"'],
            "the row in line 152 opens a quote that is closed in line 203 with",
        ),
        (['"She said "yes"\r\nand left",ok'], "the row in line 2 opens a quote that is closed in line 2 with more text"),
    ],
    ids=["stray", "last", "closed far below", "over two lines"],
)
def test_a_quote_left_open_swallows_no_rows(rows: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=rf"a\.csv cannot be read as csv: {words}") as error:
        read(table(tmp_path / "a.csv", *rows))
    assert 'within a text, write "" for a quote' in str(error.value) and "\n" not in str(error.value)


def test_a_header_of_which_the_quotes_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"prompt"s,completion\na,b\n')
    with pytest.raises(StageError, match=r"cannot be read as csv: the row in line 1 opens a quote that is closed in line 1 with more text"):
        read(str(tmp_path / "a.csv"))


def test_quotes_that_are_wrong_within_a_line_spoil_their_row_alone(tmp_path: Path) -> None:
    long = ('He said ""' + "x" * 200_000 + '""\r\n') * 2
    found = read(table(tmp_path / "a.csv", 'a,"b"', 'a,"b "c" d"', 'it is 5" long,e', f'f,"{long}"', "", "g", "h,i,j", "k,l"))
    assert [reason[:10] for _, reason in found] == ["", "broken CSV", "", "", "", "the row ha", ""]
    good = [row for row, reason in found if not reason]
    assert [row["prompt"] for row in good] == ["a", 'it is 5" long', "f", "g", "k"]
    assert [row["completion"] for row in good] == ["b", "e", long.replace('""', '"'), None, "l"]


def test_a_pattern_that_matches_nothing_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("data/*.jsonl", f"{tmp_path}/data/*.jsonl"):
        with pytest.raises(StageError) as error:
            sources.find(path, "train")
        assert f"demonstrations.path='{path}': nothing matches {tmp_path}/data/*.jsonl: check" in str(error.value)
    (tmp_path / "data.txt").write_text("no rows")
    with pytest.raises(StageError, match=r"\*' holds no file that ends in \.jsonl"):
        sources.find("*", "train")


def test_the_name_of_the_directory_that_was_asked_for_says_nothing_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "train" / "train").mkdir(parents=True)
    for name in ("train.jsonl", "test.jsonl", "train/a.jsonl"):
        write(tmp_path / "train" / name, ROWS[:3])
    for path in (str(tmp_path / "train"), f"{tmp_path}/train/", f"file://{tmp_path}/train"):
        assert [Path(f).name for f in sources.find(path, "train")] == ["train.jsonl", "a.jsonl"]
        assert [Path(f).name for f in sources.find(path, "test")] == ["test.jsonl"]
    (tmp_path / "validation").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / "validation" / name, ROWS[:3])
    found = sources.find(str(tmp_path / "validation"), "validation", must=True)
    assert [Path(f).name for f in found] == ["a.jsonl", "b.jsonl"], "all of them are of that split"


@pytest.mark.usefixtures("local_ray")
def test_held_out_rows_of_which_not_one_is_good_stop_the_job_before_the_others_are_read(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    held = write(folder / "test.jsonl", [{"prompt": f"{k}"} for k in range(20)])
    said = "can be used. The first, test.jsonl:1: no layout fits the columns that are filled: prompt. Name the layout"
    for path, named, where in [
        (folder / "train.jsonl", {"held_out_path": str(held)}, f"{held} (demonstrations.held_out_path)"),
        (folder, {"held_out_split": "test"}, f"{folder} (demonstrations.held_out_split)"),
    ]:
        with pytest.raises(StageError) as error:
            prepare(tmp_path / path.name, tiny, path=str(path), **named)
        assert f"none of the 20 rows read from {where} {said}" in str(error.value)
        assert (tmp_path / path.name / "run" / "demonstrations" / "rejected.parquet").exists()
    write(held, [])
    with pytest.raises(StageError, match=r"test\.jsonl \(demonstrations\.held_out_path\) holds no row: name a file with rows"):
        prepare(tmp_path / "empty", tiny, path=str(folder / "train.jsonl"), held_out_path=str(held))


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("rows", "settings", "told", "untold"),
    [
        ([{"prompt": "a " * 90, "completion": "b"}], {}, "more than max_prompt_tokens=64", "layout"),
        ([{"prompt": 1, "completion": "b"}], {}, "'prompt' is a number, not text", "layout"),
        (
            [{"prompt": "a", "completion": f"{k}"} for k in range(5)],
            {"held_out_fraction": 0.9999},
            "5 rows read, 5 of them held out: rows are held out by their prompts, of which the 5 rows read have 1; name a file",
            "layout",
        ),
    ],
    ids=["long", "no text", "one prompt"],
)
def test_the_advice_is_about_what_is_wrong(
    rows: list[dict[str, Any]], settings: dict[str, Any], told: str, untold: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(StageError) as error:
        prepare(tmp_path, tiny, path=str(write(tmp_path / "a.jsonl", rows)), **settings)
    assert told in str(error.value) and untold not in str(error.value)
