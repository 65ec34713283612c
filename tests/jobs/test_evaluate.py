"""The evaluation job: policies of a run and others, before their prompts, a local judge and each other."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from judges import endpoint, longer
from running import finish

from jobs.config import ConfigError, build
from jobs.evaluate import plan
from jobs.schemas import EvaluateConfig
from pipelines import measures, mt_bench, scorers
from pipelines.judges.settings import JudgeModel, MtBench
from pipelines.means import cut_off
from pipelines.records import SAMPLE, SCORE, write_rows
from pipelines.report import scoreboard
from pipelines.run.artifacts import Run, Stage, StageError

QUICK = {
    "ray.num_cpus": 2,
    "engine.num_cpus": 2,
    "engine.kv_cache_gib": 0.1,
    "judge.num_cpus": 2,
    "judge.kv_cache_gib": 0.1,
    "prompts.max_prompt_tokens": 96,
    "prompts.max_tokens": 160,
    "answers.max_new_tokens": 16,
}


def command(root: Path, **options: Any) -> list[str]:
    flags = [part for key, value in ({"run.root": root} | QUICK | options).items() for part in (f"--{key}", str(value))]
    return [sys.executable, "jobs/evaluate.py", *flags]


def summary(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / name / "evaluation-summary.json").read_text())


@pytest.mark.slow
def test_policies_before_a_judge_of_their_own(tiny: Path, undisturbed: Path, tmp_path: Path) -> None:
    short = tmp_path / "templates" / "helpful.txt"
    short.parent.mkdir()
    short.write_text("{conversation} A: {first} B: {second}")
    options = {
        "run.name": "judged",
        "policies.run": undisturbed,
        "policies.paths": f"{{other: {tiny}}}",
        "policies.only": "[sft, other]",
        "answers.measures": "[exact_answer, 'regex:#### (\\d+)']",
        "answers.reference": "other",
        "judge.path": tiny,
        "judge.mode": "logprob",
        "judge.max_model_len": 512,
        "judge.templates": short.parent,
        "tournament.contestants": "[sft, other, demonstrations]",
        "tournament.limit": 6,
    }
    done = finish(command(tmp_path, **options), env=os.environ | {"GSIL_TEST": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary(tmp_path, "judged")
    held_out = pq.read_table(undisturbed / "demonstrations" / "held_out").to_pylist()
    assert list(found["measures"]) == ["sft", "other"] and found["measures"]["sft"]["texts"]["n"] == len(held_out)
    # Policies that say nothing of the kind: none is right by either measure, and all were looked at.
    assert {m["n"] for m in found["measures"]["sft"]["measures"].values()} == {len(held_out)}
    assert found["measures"]["sft"]["kl"]["mean"] > 0 and found["measures"]["other"]["kl"] is None
    assert len(found["tournament"]["pairs"]) == 3 and found["tournament"]["games"] == 3 * 6
    games = pq.read_table(tmp_path / "judged" / "evaluation" / "tournament" / "games" / "games.parquet").to_pylist()
    assert {game["id"] for game in games} <= {row["id"] for row in held_out}
    said = pq.read_table(tmp_path / "judged" / "evaluation" / "tournament" / "answers" / "00000.parquet").to_pylist()
    assert all(row["kind"] == "logprob" and len(row["logps"]) == 2 and not row["failed"] for row in said)
    again = finish(command(tmp_path, **options))
    assert again.returncode == 0 and all(stage["skipped"] for stage in summary(tmp_path, "judged")["stages"])
    in_words = finish(command(tmp_path, **(options | {"judge.mode": "text", "judge.max_new_tokens": 8, "judge.max_unread_fraction": 1})))
    assert in_words.returncode == 0, in_words.stdout + in_words.stderr
    ran = {stage["name"] for stage in summary(tmp_path, "judged")["stages"] if not stage["skipped"]}
    assert ran == {f"evaluation/tournament/{name}" for name in ("questions", "answers", "games")}
    said = pq.read_table(tmp_path / "judged" / "evaluation" / "tournament" / "answers" / "00000.parquet").to_pylist()
    assert all(row["text"] is not None and 0 < row["written"] <= 8 and not row["failed"] for row in said)


@pytest.mark.slow
def test_mt_bench_over_both_turns(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mt_bench"
    folder.mkdir()
    rows = [{"question_id": k, "category": "math", "turns": [f"What is {k} and 1?", "And one more?"]} for k in (1, 2)]
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reference = {"question_id": 1, "choices": [{"turns": ["It is two.", "three"]}]}
    (folder / "reference_answer_x.jsonl").write_text(json.dumps(reference) + "\n")

    def judge(question: str) -> str:
        return "Right. [[8]]" if "It is two." in question or "\nthree\n" in question else "Hm. [[3]]" if "more" in question else "No."

    # It starts at once: the turns, not the engine, are what is looked at here.
    options: dict[str, Any] = {"run.name": "graded", "policies.paths": f"{{tiny: {tiny}}}", "engine.backend": "transformers"}
    options |= {"mt_bench.path": folder, "mt_bench.max_new_tokens": 8}
    with endpoint(judge) as (url, asked):
        done = finish(command(tmp_path, **options, **{"judge.url": url, "judge.url_model": "m"}))
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary(tmp_path, "graded")["mt_bench"]["tiny"]
    # Question 1: 8 and 8, by its reference; question 2: unread and 3.
    assert (
        found["grade"] == 5.5
        and found["n"] == 3
        and found["unparsed"] == 1
        and found["parts"] == {"turn 1": 8, "turn 2": 5.5, "math": 19 / 3}
    )
    second = [body["messages"][0]["content"] for _, body in asked if "And one more?" in body["messages"][0]["content"]]
    assert len(second) == 2 and all(text.index("and 1?") < text.index("Assistant:") < text.index("And one more?") for text in second)


def test_questions_have_to_be_there(tmp_path: Path) -> None:
    (tmp_path / "question.jsonl").write_text("")
    with pytest.raises(StageError, match=r"question\.jsonl holds no question"):
        mt_bench.read(MtBench(path=str(tmp_path)))


def test_what_the_judge_reads_beside_the_answers_is_in_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "question.jsonl").write_text('{"question_id": 1, "category": "math", "turns": ["a", "b"]}\n')
    settings, judge = MtBench(path=str(tmp_path)), JudgeModel(url="http://x/v1")
    answers = {"tiny": (Stage("one", {}), Stage("two", {}))}
    before = mt_bench.plan_questions(answers, settings, judge).fingerprint
    (tmp_path / "reference_answer_x.jsonl").write_text('{"question_id": 1, "choices": [{"turns": ["c", "d"]}]}\n')
    assert mt_bench.plan_questions(answers, settings, judge).fingerprint != before
    grades = [
        {"id": "1", "policy": "tiny", "category": "math", "turn": turn, "grade": None, "failed": failed}
        for turn, failed in ((1, "x"), (2, None))
    ]
    assert mt_bench.doubts(mt_bench.numbers([*grades, grades[0] | {"grade": 3.0, "failed": None}])) == [
        "MT-Bench: 1 of its 80 questions (math): the mean is not that of MT-Bench",
        "MT-Bench: 1 questions about tiny were not answered by the judge: not in its mean over 1",
        "MT-Bench: 1 answers of the judge about tiny could not be read: not in its mean over 1",
    ]


def test_programs_run_only_where_the_command_says_so(tiny: Path, tmp_path: Path) -> None:
    asked = command(tmp_path, **{"tasks.names": "[mbpp]", "policies.paths": f"{{tiny: {tiny}}}"})
    (tmp_path / "before.yaml").write_text("tasks:\n  allow_code_execution: true\n")
    refused = finish([*asked, "--config", str(tmp_path / "before.yaml"), "--dry-run"])
    assert refused.returncode == 1 and "allow it with --allow-code-execution" in refused.stderr, "a file is no command"
    allowed = finish([*asked, "--allow-code-execution", "--dry-run"])
    assert allowed.returncode == 0 and "allow_code_execution: true" in allowed.stdout, allowed.stderr


def test_the_held_out_prompts_of_a_run_are_all_asked_however_long(tiny: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    (root / "demonstrations" / "held_out").mkdir(parents=True)
    (root / "demonstrations" / "held_out" / "00000.parquet").write_bytes(b"rows")
    (root / "config.yaml").write_text(f"model: {{path: {tiny}}}\ndemonstrations: {{max_prompt_tokens: 1800, max_tokens: 2000}}\n")
    flags = [f"--policies.run={root}", "--answers.measures=[exact_answer]"]
    (policy,) = plan(build(EvaluateConfig, flags)).policies
    assert policy.prompts and (policy.prompts.settings["max_prompt_tokens"], policy.prompts.settings["max_tokens"]) == (1800, 2000)
    with pytest.raises(StageError, match=r"policies.paths: 'base' is already a policy of .*run: give this one another name"):
        plan(build(EvaluateConfig, [*flags, f"--policies.paths={{base: {tiny}}}"]))


def test_a_mean_says_of_how_many_answers_it_is(tmp_path: Path) -> None:
    scored = {"mean": 0.5, "stderr": 0.06, "n": 70, "prompts": 70, "unscored": 30}
    found = {"sft": {"measures": {"exact_answer": scored}, "kl": None, "texts": measures.texts([])}}
    assert measures.table(found)[1][:2] == ["sft", "0.500 ± 0.060 of 70"]
    assert measures.doubts(found) == ["sft: exact_answer has no score of 30 of 100 answers"]
    whole = {"measures": {"exact_answer": scored | {"unscored": 0}}, "texts": measures.texts([])}
    assert measures.doubts({"sft": whole}) == []
    assert (
        "answers to 15 prompts only" in measures.doubts({"sft": {**whole, "measures": {"x": scored | {"prompts": 15, "unscored": 0}}}})[0]
    )
    cut = [{"response": "a", "response_ids": [1], "finish_reason": reason} for reason in ("length", "stop")]
    assert measures.doubts({"sft": {**whole, "texts": measures.texts(cut)}}) == [cut_off("sft/answers", 0.5, "answers.max_new_tokens")]
    both = {"sft": whole, "base": {**whole, "measures": {"exact_answer": scored | {"prompts": 60, "unscored": 0}}}}
    assert measures.doubts(both) == [
        "exact_answer is over different prompts (70 of sft, 60 of base): one took prompts that another could not, or has no score of"
    ]


def test_the_divergence_is_the_mean_difference_of_log_probs(tmp_path: Path) -> None:
    run, samples = Run(tmp_path), Stage("samples", {})
    own, same, other = Stage("own", {}), Stage("same", {}), Stage("other", {})
    (run.directory(samples) / "train").mkdir(parents=True)
    write_rows(
        run.directory(samples) / "train" / "00000.parquet", [{"response": "a", "response_ids": [1], "finish_reason": "stop"}], SAMPLE
    )
    for stage, values in ((own, (-1.0, -4.0)), (same, (-1.0, -4.0)), (other, (-3.0, -5.0))):
        (run.directory(stage) / "train").mkdir(parents=True)
        rows = [{"id": str(k), "sample": 0, "score": value} for k, value in enumerate(values)]
        write_rows(run.directory(stage) / "train" / "00000.parquet", rows, SCORE)
    for name, reference, mean, error in (("far", other, 1.5, 0.5), ("alike", same, 0.0, 0.0)):
        stage = measures.plan(name, samples, {}, own, reference)
        run.do(measures.measure, stage)
        assert run.numbers(stage)["kl"] == {"mean": mean, "stderr": error, "n": 2, "prompts": 2, "unscored": 0}


def test_several_samples_of_a_prompt_are_one_prompt_to_the_error(tmp_path: Path) -> None:
    run, samples, scored = Run(tmp_path), Stage("samples", {}), Stage("score", {})
    for stage in (samples, scored):
        (run.directory(stage) / "train").mkdir(parents=True)
    rows = [{"id": prompt, "sample": sample, "score": float(prompt == "a")} for prompt in "ab" for sample in range(8)]
    write_rows(run.directory(scored) / "train/00000.parquet", rows, SCORE)
    drawn = [row | {"response": "a", "response_ids": [1], "finish_reason": "stop"} for row in rows]
    write_rows(run.directory(samples) / "train/00000.parquet", drawn, SAMPLE)
    stage = measures.plan("m", samples, {"right": scored})
    run.do(measures.measure, stage)
    # One prompt has all, the other none: 16 answers say as much as two.
    assert run.numbers(stage)["measures"]["right"] == {"mean": 0.5, "stderr": 0.5, "n": 16, "prompts": 2, "unscored": 0}


def test_a_limit_of_mt_bench_is_spread_over_its_categories(tmp_path: Path) -> None:
    rows = [{"question_id": k, "category": "abcdefgh"[k // 10], "turns": ["a", "b"]} for k in range(80)]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def asked(limit: int | None) -> list[str]:
        return [row["id"] for row in mt_bench.read(MtBench(path=str(tmp_path), limit=limit))]

    assert asked(8) == [str(k) for k in range(0, 80, 10)] and asked(None) == asked(80) == asked(200) == [str(k) for k in range(80)]


def test_tasks_of_a_group_that_have_no_metric_in_common() -> None:
    one: dict[str, Any] = {"n": 10, "shots": 0, "main": None, "metrics": {}}
    assert scoreboard.tasks({"tiny": {"leaderboard": one}}) == [
        ["policy", "leaderboard (0 shots, no metric of all its tasks, n=10)"],
        ["tiny", ""],
    ]


def test_variety_and_lengths() -> None:
    rows = [{"response": "a b a b", "response_ids": [1, 2, 3], "finish_reason": "stop"}]
    found = measures.texts([*rows, {"response": "c", "response_ids": [1], "finish_reason": "length"}])
    assert (found["distinct_1"], found["distinct_2"], found["distinct_3"]) == (3 / 5, 2 / 3, 1.0)
    assert (found["tokens"], found["truncated"]) == (2.0, 0.5)
    assert measures.texts([])["distinct_1"] is None


@pytest.mark.parametrize(
    ("pattern", "text", "got"), [(r"#### (\d+)", "#### 1 #### 22", "22"), (r"\d+", "7 then 8 ", "8"), (r"\d", "none", None)]
)
def test_the_last_place_of_a_pattern(pattern: str, text: str, got: str | None) -> None:
    import re

    assert scorers.found(re.compile(pattern), text) == got


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "nothing is asked for"),
        (["--tournament.contestants", "[a, b]"], "need a judge: name judge.path or judge.url"),
        (["--tournament.contestants", "[a]"], "two or more different ones are needed"),
        (["--judge.max_cost", "3"], "max_cost needs price_in and price_out"),
        (["--policies.paths", "{a/b: x}"], "names are letters, digits"),
        (["--judge.url", "127.0.0.1:8000"], "it begins with http:// or https://"),
        (["--judge.url", "http://x/v1"], "needs url_model"),
        (["--judge.templates", "/nowhere"], "templates='/nowhere' is no folder"),
        (["--answers.measures", r"[regex:[a-z]+ (\d+)]"], r"such as \"\['regex:\[a-z\]\+ \(\\d\+\)'\]\""),
    ],
)
def test_what_cannot_be_evaluated(flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(EvaluateConfig, flags)


def test_prompts_of_a_run_that_is_not_there(tmp_path: Path) -> None:
    flags = ["--policies.paths", "{a: org/model}", "--answers.measures", "[exact_answer]", "--run.root", str(tmp_path), "--run.name"]
    with pytest.raises(StageError, match=r"nosuch is no run: there is no such directory: name a file of prompts, or another run"):
        plan(build(EvaluateConfig, [*flags, "nosuch"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(StageError, match=r"empty has no held-out demonstrations: name a file of prompts, or another run"):
        plan(build(EvaluateConfig, [*flags, "empty"]))


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_a_judges_model_runs_where_that_was_allowed(trust: bool, tiny: Path, tmp_path: Path) -> None:
    asked = ["--run.root", str(tmp_path), "--prompts.path", "arithmetic", "--policies.paths", f"{{a: {tiny}}}", "--judge.path", str(tiny)]
    config = build(EvaluateConfig, [*asked, "--tournament.contestants", "[a, demonstrations]", "--model.trust_remote_code", str(trust)])
    judge = plan(config).judge
    assert judge and judge.settings["trust_remote_code"] is trust


def test_who_cannot_be_evaluated(tiny: Path, tmp_path: Path) -> None:
    asked = ["--run.root", str(tmp_path), "--answers.measures", "[exact_answer]"]
    with pytest.raises(StageError, match="is no run directory"):
        plan(build(EvaluateConfig, [*asked, "--policies.run", str(tmp_path)]))
    with pytest.raises(StageError, match="there is no policy 'b'; there are a"):
        plan(build(EvaluateConfig, [*asked, "--policies.paths", f"{{a: {tiny}}}", "--policies.only", "[b]"]))
    with pytest.raises(StageError, match=r"prompts\.path is not given"):
        plan(build(EvaluateConfig, [*asked, "--policies.paths", f"{{a: {tiny}}}"]))
    with pytest.raises(StageError, match="is no regular expression"):
        prompts = ["--prompts.path", "arithmetic", "--policies.paths", f"{{a: {tiny}}}"]
        plan(build(EvaluateConfig, [*asked[:2], *prompts, "--answers.measures", "['regex:(']"]))


def test_a_longer_answer_wins_before_a_judge_of_length(tiny: Path, undisturbed: Path, tmp_path: Path) -> None:
    with endpoint(longer) as (url, _):
        options = {"run.name": "x", "policies.run": undisturbed, "policies.only": "[sft]", "judge.url": url, "judge.url_model": "m"}
        options["engine.backend"] = "transformers"
        done = finish(command(tmp_path, **options, **{"tournament.contestants": "[sft, demonstrations]", "tournament.limit": 5}))
    assert done.returncode == 0, done.stdout + done.stderr
    (pair,) = summary(tmp_path, "x")["tournament"]["pairs"]
    assert pair["longer_wins"] == 1.0 and pair["n"] + pair["unparsed"] == 5
    page = (tmp_path / "x" / "evaluation-report.html").read_text()
    for part in (
        "Tournament: games of the first",
        'aria-label="ranking"',
        '<span class="who">tournament</span>',
        '<span class="who">sft</span>',
    ):
        assert part in page
    assert page.count('class="card"') == 10 + 5, "prompts with their answers, and games"
    assert "| sft | demonstrations |" in (tmp_path / "x" / "evaluation-report.md").read_text()
