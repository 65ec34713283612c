"""Reading data: sources, splits, limits and what is set aside, through real Ray Data; and errors in one line."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demonstration_files import ROWS, prepare, write

from pipelines import base_model, demonstrations
from pipelines.chat import Chat
from pipelines.data import sources
from pipelines.data.layouts import RowError
from pipelines.records import shards
from pipelines.run.artifacts import Run, Stage, StageError
from pipelines.settings import Model, Preferences


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow", "a.csv", "a.jsonl.gz"])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, ROWS)
    (file,) = sources.find(str(path), "train")
    read = list(sources.read(file))
    assert [json.loads(row["row"]) for row in read] == ROWS
    assert read[2]["source"] == f"{name}:3" and not any(row["reason"] for row in read)


def test_a_text_of_any_length_and_a_mark_of_the_encoding_spoil_nothing(tmp_path: Path) -> None:
    long, rows = "x" * 200_000, {}
    (tmp_path / "a.csv").write_text(f"\ufeffprompt,completion\n{long},y\n", encoding="utf-8")
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text("\ufeff" + json.dumps({"prompt": long, "completion": "y"}) + "\n", encoding="utf-8")
    for file in sorted(tmp_path.iterdir()):
        rows[file.name] = [(json.loads(row["row"]), row["reason"]) for row in sources.read(str(file))]
    assert set(rows) == {"a.csv", "a.json", "a.jsonl"}
    assert all(found == [({"prompt": long, "completion": "y"}, "")] for found in rows.values())


def test_broken_lines_travel_with_their_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": \n\xff\xfe\n[1]\n\n{"prompt": "b"}\n')
    rows = list(sources.read(str(path)))
    assert [row["source"] for row in rows] == [f"a.jsonl:{line}" for line in (1, 2, 3, 4, 6)], "lines as an editor counts them"
    reasons = [row["reason"] for row in rows]
    assert reasons[0] == reasons[4] == "" and len(reasons) == 5
    assert "broken JSON" in reasons[1] and "not UTF-8" in reasons[2] and "list" in reasons[3]


def test_directories_globs_splits_and_uris(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:20])
    write(tmp_path / "test.jsonl", ROWS[20:])
    (tmp_path / "README.md").write_text("not data")
    assert [Path(f).name for f in sources.find(str(tmp_path), "test")] == ["test.jsonl"]
    assert [Path(f).name for f in sources.find(str(tmp_path), "validation")] == ["test.jsonl", "train.jsonl"]
    assert [Path(f).name for f in sources.find(f"{tmp_path}/t*.jsonl", "train")] == ["test.jsonl", "train.jsonl"], "as it says"
    assert [Path(f).name for f in sources.find(f"{tmp_path}/t*.jsonl", "test", must=True)] == ["test.jsonl"]
    with pytest.raises(StageError, match=r"no file or folder of the split 'validation', but test\.jsonl, train\.jsonl"):
        sources.find(str(tmp_path), "validation", must=True)
    (uri,) = sources.find(f"file://{tmp_path}/train.jsonl", "train")
    assert len(list(sources.read(uri))) == 20
    assert sources.find("openai/gsm8k", "train") == ["hub:openai/gsm8k"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_store_that_fsspec_has_no_client_for_is_read_by_pyarrows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / name, ROWS)

    def missing(uri: str) -> None:
        raise ImportError(f"Install s3fs to access {uri}")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    (file,) = sources.find(f"file://{tmp_path}/a.*", "train")
    assert [json.loads(row["row"]) for row in sources.read(file)] == ROWS
    marks = sources.identity([file], None, "train")
    write(tmp_path / name, ROWS[:5])
    assert sources.identity([file], None, "train") != marks


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no/such/file.jsonl", "no such file"),
        ("EMPTY", "holds no file"),
        ("nosuch://x/y.jsonl", "cannot be listed"),
        ("file:///no/such/file.jsonl", r"file.jsonl cannot be read: No such file"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_clear_line(path: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=words) as error:
        sources.identity(sources.find(str(tmp_path) if path == "EMPTY" else path, "train"), None, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"PAR1 no"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99)[:-20]),
        ("a.csv.gz", gzip.compress(b"prompt,completion\n" + b"x,y\n" * 99)[:-20]),
    ],
)
def test_an_unreadable_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(StageError, match=rf"{name} cannot be read as {name.split('.')[1]}"):
        list(sources.read(str(path)))


def test_bytes_that_are_not_utf_8_spoil_their_row_alone(tmp_path: Path) -> None:
    strings = pa.array([b"good", b"b\xffd", b"fine"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": strings}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfprompt\ngood\nb\xffd\nfine\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "good"}\n{"prompt": "b\xffd"}\n{"prompt": "fine"}\n')
    for name in ("a.parquet", "a.jsonl"):
        rows = list(sources.read(str(tmp_path / name)))
        assert ["not UTF-8" in row["reason"] for row in rows] == [False, True, False]
        assert json.loads(rows[2]["row"]) == {"prompt": "fine"}
    assert [json.loads(row["row"])["prompt"] for row in sources.read(str(tmp_path / "a.csv"))] == ["good", "b\udcffd", "fine"]


def rows_of(run: Run, stage: Stage, split: str) -> list[dict[str, Any]]:
    return [row for path in shards(run.directory(stage) / split) for row in pq.read_table(path).to_pylist()]


@pytest.mark.usefixtures("local_ray")
def test_rows_become_shards_and_bad_ones_are_set_aside(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad: list[dict[str, Any]] = [
        {"prompt": "", "completion": "x"},
        {"prompt": "long " * 200, "completion": "x"},
        ROWS[0],
        {"prompt": 3, "completion": "x"},
        {"prompt": "only"},
        {"prompt": "Strike <s>this</s>.", "completion": "x"},
        {"prompt": "Strike this.", "completion": "<s>this</s>"},
    ]
    path = write(tmp_path / "a.jsonl", [*ROWS, *bad])
    run, stage, numbers = prepare(tmp_path, tiny, path=str(path), held_out_fraction=0.3, max_rejected_fraction=0.5)
    train, held_out = rows_of(run, stage, "train"), rows_of(run, stage, "held_out")
    assert (len(train), len(held_out)) == (numbers["train"], numbers["held_out"]) and len(train) + len(held_out) == 30
    assert 3 <= len(held_out) <= 16 and not {r["id"] for r in train} & {r["id"] for r in held_out}
    assert [row["source"] for row in train] == sorted((r["source"] for r in train), key=lambda s: int(s.split(":")[1]))
    assert all(len(pq.read_table(p)) == 8 for p in shards(run.directory(stage) / "train")[:-1])
    rejected = pq.read_table(run.directory(stage) / "rejected.parquet").to_pylist()
    reasons = [row["reason"] for row in rejected]
    assert len(reasons) == 7 == numbers["rejected"]
    for reason, words in zip(
        reasons,
        ["prompt is empty", "max_prompt_tokens=64", "earlier row", "a number", "filled: prompt", "token '<s>'", "token '<s>'"],
        strict=True,
    ):
        assert words in reason
    assert f"7 of 37 rows rejected, see {run.directory(stage) / 'rejected.parquet'}" in caplog.text
    assert "are cut at" not in caplog.text and numbers["truncated"] == 0
    assert rejected[0]["source"] == "a.jsonl:31" and json.loads(rejected[0]["row"]) == bad[0]


MESSAGES = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"messages": MESSAGES}, {"messages": None}),
        ({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]}, {"conversations": None}),
        ({"real": MESSAGES, "generated": MESSAGES}, {"real": None, "generated": MESSAGES}),
        ({"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rejected": "x"}, {"chosen": None, "rejected": "x"}),
        ({"q": "Hi?", "a": "Yes."}, {"a": "Yes."}),
    ],
    ids=["messages", "sharegpt", "spin", "hh", "columns"],
)
def test_an_empty_row_is_set_aside_in_every_layout(good: dict[str, Any], bad: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [good, bad, {"id": 1}])
    columns = {"columns": {"prompt": "q", "completion": "a"}} if "q" in good else {}
    _, _, numbers = prepare(tmp_path, tiny, path=str(path), held_out_fraction=0.0, max_rejected_fraction=0.7, **columns)
    assert (numbers["train"], numbers["rejected"]) == (1, 2)


@pytest.mark.usefixtures("local_ray")
def test_too_many_bad_rows_stop_the_job_and_show_the_first(tiny: Path, tmp_path: Path) -> None:
    def first_of(rows: Iterable[int]) -> list[str]:
        return [f"  a.jsonl:{row}: no layout fits the columns that are filled: prompt" for row in rows]

    path = write(tmp_path / "a.jsonl", [*ROWS[:3], *({"prompt": f"{i}"} for i in range(7))])
    with pytest.raises(StageError) as error:
        prepare(tmp_path, tiny, path=str(path))
    assert "7 of 10 rows" in str(error.value) and str(error.value).splitlines()[1:-1] == first_of(range(4, 9))
    assert (tmp_path / "run" / "demonstrations" / "rejected.parquet").exists()
    # Nor is one reason taken for all where not one row is good.
    write(path, [{"text": "a"}, *({"prompt": f"{i}"} for i in range(7))])
    with pytest.raises(StageError, match=r"none of the 8 rows read from .* can be used\. The first:\n") as error:
        prepare(tmp_path / "all", tiny, path=str(path))
    assert "Name the layout" in str(error.value)
    assert str(error.value).splitlines()[1:-1] == ["  a.jsonl:1: no layout fits the columns that are filled: text", *first_of(range(2, 6))]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([{"text": "a"}], {}, "The first, a.jsonl:1: no layout fits the columns that are filled: text. Name the layout with"),
        ([{"prompt": "a", "text": "b"}] * 3, {}, "no layout fits the columns that are filled: prompt, text. Name the layout with"),
        (ROWS, {"columns": {"prompt": "q"}}, "demonstrations.columns names 'q', but the columns are completion, prompt. Name the layout"),
        (ROWS, {"layout": "messages"}, "The first, a.jsonl:1: 'messages' is missing. Name the layout with --demonstrations.layout"),
        ([], {}, "no demonstration to train on: 0 rows read, 0 of them held out; name a file with rows"),
    ],
)
def test_wrong_data_as_a_whole_is_one_clear_line(
    rows: list[dict[str, Any]], settings: dict[str, Any], words: str, tiny: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(StageError) as error:
        prepare(tmp_path, tiny, path=str(path), **settings)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.usefixtures("local_ray")
def test_all_responses_to_a_prompt_are_on_one_side(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {k}?", "completion": f"{k} and {n}"} for n in range(3) for k in range(40)]
    path = write(tmp_path / "a.jsonl", rows)
    for limit in (None, 4):
        run, stage, numbers = prepare(tmp_path / str(limit), tiny, path=str(path), held_out_fraction=0.3, held_out_limit=limit)
        asked = [{row["prompt"][0]["content"] for row in rows_of(run, stage, split)} for split in ("train", "held_out")]
        assert len(asked[1]) == limit or (not limit and len(asked[1]) > 4)
        assert not asked[0] & asked[1], "nobody is examined in what was learned by heart"
        assert numbers["train"] == 3 * len(asked[0]) and (limit or numbers["held_out"] == 3 * len(asked[1]))


@pytest.mark.usefixtures("local_ray")
def test_columns_system_prompt_cut_responses_and_limits(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"q": f"What is {i}?", "a": "very " * 60 + str(i)} for i in range(12)]
    options = {"columns": {"prompt": "q", "completion": "a"}, "system_prompt": "Be brief.", "limit": 5, "held_out_fraction": 0.0}
    run, stage, numbers = prepare(tmp_path, tiny, path=str(write(tmp_path / "a.jsonl", rows)), **options)
    made = rows_of(run, stage, "train")
    assert numbers == {"train": 5, "held_out": 0, "rejected": 0, "read": 5, "truncated": 5}
    assert "5 of 5 responses are cut at demonstrations.max_tokens=96: they do not teach a policy to stop. Raise it" in caplog.text
    for row in made:
        assert row["prompt"][0] == {"role": "system", "content": "Be brief."}
        # Cut at max_tokens: no EOS, as nothing ended.
        assert len(row["prompt_ids"]) + len(row["response_ids"]) == 96 and 1 not in row["response_ids"]


def test_a_pair_that_differs_only_beyond_max_tokens_is_rejected_as_equal(tiny: Path) -> None:
    chat = Chat(str(tiny))
    settings = Preferences(path="pairs.jsonl", max_prompt_tokens=30, max_tokens=40)
    prompt = chat.prompt_ids([{"role": "user", "content": "Hi?"}])
    room = 40 - len(prompt)

    def pair(chosen: str, rejected: str) -> dict[str, Any]:
        return demonstrations.demonstration({"prompt": "Hi?", "chosen": chosen, "rejected": rejected}, "a:1", settings, chat)

    # A letter of these is a token.
    with pytest.raises(RowError, match=r"^the two responses are equal up to max_tokens=40$"):
        pair("x" * room + "y", "x" * room + "z")
    made = pair("x" * (room - 1) + "y", "x" * (room - 1) + "z")
    assert made["truncated"] and len(made["response_ids"]) == len(made["rejected_ids"]) == room
    assert made["response_ids"][:-1] == made["rejected_ids"][:-1] and made["response_ids"][-1] != made["rejected_ids"][-1]
    # One that ends where the other one is cut says something else, namely that it ends.
    made = pair("x" * (room - 1), "x" * room)
    assert made["response_ids"][-1] == chat.end_id != made["rejected_ids"][-1] and not made["truncated"]


@pytest.mark.usefixtures("local_ray")
def test_a_chosen_line_of_best_of_n_is_a_demonstration_of_a_next_round(tiny: Path, tmp_path: Path) -> None:
    asked = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {i}?"}] for i in range(6)]
    lines = [{"input": prompt, "output": f"It is {i}.", "reward": i / 2 - 1} for i, prompt in enumerate(asked)]
    options = {"system_prompt": "Be long.", "held_out_fraction": 0.0}
    run, stage, numbers = prepare(tmp_path, tiny, path=str(write(tmp_path / "chosen.train.jsonl", lines)), **options)
    assert (numbers["train"], numbers["rejected"]) == (6, 0)
    chat = Chat(str(tiny))
    for row, prompt, line in zip(rows_of(run, stage, "train"), asked, lines, strict=True):
        # The system turn is the sample's own, once.
        assert row["prompt"] == prompt and row["prompt_ids"] == chat.prompt_ids(prompt)
        assert row["response"] == line["output"] and row["response_ids"] == chat.response_ids(prompt, str(line["output"]))


@pytest.mark.usefixtures("local_ray")
def test_files_are_not_looked_for_again_at_every_row(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, find = list[str](), sources.find

    def counted(path: str, *args: Any, **named: Any) -> list[str]:
        looked.append(path)
        return find(path, *args, **named)

    monkeypatch.setattr(sources, "find", counted)
    _, _, numbers = prepare(tmp_path, tiny, path=str(write(tmp_path / "a.jsonl", ROWS)))
    assert numbers["train"] + numbers["held_out"] == len(ROWS) and 0 < len(looked) < 10


@pytest.mark.usefixtures("local_ray")
def test_no_row_is_lost_between_the_splits(tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    _, _, numbers = prepare(tmp_path / "limited", tiny, path=str(path), held_out_fraction=0.5, held_out_limit=3)
    assert (numbers["train"], numbers["held_out"]) == (27, 3), "what is not held out any more is there to train on"
    _, _, numbers = prepare(tmp_path / "one", tiny, path=str(path), held_out_split="test", held_out_fraction=0.5, held_out_limit=4)
    assert (numbers["train"], numbers["held_out"], numbers["rejected"]) == (26, 4, 0), "one file for both is cut"
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "first.jsonl", ROWS[:10])
    write(folder / "second.jsonl", ROWS[10:20])
    write(folder / "test.jsonl", ROWS[20:])
    _, _, numbers = prepare(tmp_path / "several", tiny, path=str(folder), held_out_split="test")
    assert (numbers["train"], numbers["held_out"], numbers["rejected"]) == (20, 10, 0)


@pytest.mark.usefixtures("local_ray")
def test_a_model_without_a_chat_template_gets_a_plain_one_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from models import write_tiny

    model = Model(path=str(write_tiny(tmp_path / "model", template=None)))
    run, stage = Run(tmp_path / "run"), base_model.plan(model)
    run.do(base_model.prepare(model), stage)
    assert run.numbers(stage)["plain_chat_template"] and "has no chat template: a plain one is used" in caplog.text
    words = Chat(base_model.tokenizer(run, stage)).tokenizer
    talk = [{"role": "user", "content": "Hi?"}]
    assert words.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == "User: Hi?\n\nAssistant: "
