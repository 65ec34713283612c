"""Scorers of responses: reward models of a run, published ones in a template of their own, programs, and what they fail on."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from models import TEMPLATE, tokenizer, write_tiny
from rewards import reward_model
from running import ROOT, finish
from tokenizers import normalizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from actors.generator import environment
from actors.settings import RewardScoring
from pipelines import evaluation, scorers, scoring
from pipelines.records import DEMONSTRATION, SAMPLE, write_rows
from pipelines.run.artifacts import Run, Stage, StageError
from pipelines.scorers import ByModel
from pipelines.scoring import ScoreResponses, check_reward_model

USER = [{"role": "user", "content": "What is 1 and 2?"}]
TRANSFORMERS = RewardScoring(backend="transformers")
ANSWERS = ["3 apples #### 3", "4", "3 apples #### 3", "there are 12 apples. #### 12"]


def nobody(rows: int) -> None:
    """Hears how far a scorer is."""


def rows() -> list[dict[str, Any]]:
    """Samples of two prompts; two are equal, the last was cut."""
    words = tokenizer()
    made = []
    for key in ("a", "b"):
        for number, text in enumerate(ANSWERS):
            prompt = words.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
            end = [] if number == 3 else [1]
            ids = {"prompt_ids": prompt, "response_ids": words(text, add_special_tokens=False).input_ids + end}
            reason = "stop" if end else "length"
            made.append({"id": key, "sample": number, "prompt": USER, "response": text, "finish_reason": reason, "iteration": 0} | ids)
    return made


def by_transformers(directory: Path, conversations: list[list[int]]) -> list[float]:
    """One conversation at a time, the way the model's card would show."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits.item() for ids in conversations]


@pytest.mark.parametrize("max_batch_tokens", [64, 4096])
def test_a_model_of_the_run_reads_its_token_ids(max_batch_tokens: int, tmp_path: Path) -> None:
    directory = reward_model(tmp_path, "llama")
    scorer = ByModel(str(directory), True, RewardScoring(max_batch_tokens=max_batch_tokens, backend="transformers"), "float32", 512, False)
    got = scorer(rows(), "", nobody)
    assert [reason for _, reason in got] == [None] * 8 and not scorer.retemplated
    want = by_transformers(directory, [[*row["prompt_ids"], *row["response_ids"]] for row in rows()])
    assert [score for score, _ in got] == pytest.approx(want, abs=1e-4)
    assert len({round(w, 4) for w in want}) == 3, "equal responses have one reward, others another"


def test_a_published_model_reads_text_in_its_own_template(tmp_path: Path) -> None:
    directory = reward_model(tmp_path, "gpt2")
    words = AutoTokenizer.from_pretrained(directory)
    # Another model's habits: no header for the assistant, white space behind its turn.
    words.chat_template = TEMPLATE.replace("{% if add_generation_prompt %}[assistant]{% endif %}", "").replace("[{{", "# [{{") + " "
    words.save_pretrained(directory)
    scorer = ByModel(str(directory), False, TRANSFORMERS, "float32", 512, False)
    got = scorer(rows(), "", nobody)
    conversations = []
    for row in rows():
        text = words.apply_chat_template([*USER, {"role": "assistant", "content": row["response"]}], tokenize=False)
        if row["finish_reason"] == "length":
            text = text.removesuffix("</s> ")
        conversations.append(words(text, add_special_tokens=False).input_ids)
    assert [score for score, _ in got] == pytest.approx(by_transformers(directory, conversations), abs=1e-4)
    assert scorer.retemplated and not scorer.untemplated
    (directory / "chat_template.jinja").unlink()
    assert ByModel(str(directory), False, TRANSFORMERS, "float32", 512, False).untemplated, "the log says so"


IN_VLLM = """
import json, sys
from actors.reward.engine import RewardEngine
from actors.settings import RewardScoring
from pipelines.scorers import ByModel

scorer = ByModel(sys.argv[1], False, RewardScoring(num_cpus=2), "float32", 512, False)
assert isinstance(scorer.model, RewardEngine), scorer.model
print("RESULT", json.dumps([scorer.context, scorer.retemplated, scorer(json.loads(sys.argv[2]), "", lambda count: None)]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_published_model_is_read_by_vllm_as_by_transformers(family: str, tmp_path: Path) -> None:
    directory = reward_model(tmp_path, family)
    words = AutoTokenizer.from_pretrained(directory)
    words.chat_template = TEMPLATE.replace("[{{", "# [{{") + " "
    words.save_pretrained(directory)
    ways = {"PYTHONPATH": str(ROOT)} | environment(RewardScoring(num_cpus=2))
    done = finish([sys.executable, "-c", IN_VLLM, str(directory), json.dumps(rows())], env=os.environ | ways)
    assert done.returncode == 0 and "RESULT" in done.stdout, done.stderr[-3000:]
    limit, before, got = json.loads(done.stdout.rpartition("RESULT")[2])
    plain = ByModel(str(directory), False, TRANSFORMERS, "float32", 512, False)
    want = plain(rows(), "", nobody)
    assert (limit, before, plain.retemplated) == (512, False, True), "its context is less than what would be asked for"
    assert [score for score, _ in got] == pytest.approx([score for score, _ in want], abs=1e-4) and len({score for score, _ in want}) > 2


def test_a_response_beyond_the_context_is_set_aside(tmp_path: Path) -> None:
    directory = reward_model(tmp_path, "gpt2")
    config = json.loads((directory / "config.json").read_text())
    scorer = ByModel(str(directory), True, TRANSFORMERS, "float32", 512, False)
    long = rows()
    long[1]["response_ids"] = [7] * config["n_positions"]
    got = scorer(long, "", nobody)
    assert got[1][0] is None and "the context of the reward model is 512" in str(got[1][1])
    assert all(score is not None for number, (score, _) in enumerate(got) if number != 1)


SCORER = """
import math

def length(messages, response):
    assert messages[-1]["role"] == "user"
    if response == "4":
        raise RuntimeError("no opinion")
    return math.nan if "12" in response else len(response)

thing = 3
"""


def test_what_a_program_fails_on_has_no_score_and_a_reason(tmp_path: Path) -> None:
    (tmp_path / "opinions.py").write_text(SCORER)
    write_rows(tmp_path / "in.parquet", rows(), SAMPLE)
    actor = ScoreResponses("opinions:length", False, folder=str(tmp_path))
    named = {"scorer": "opinions:length", "ours": False}
    actor([str(tmp_path / "in.parquet"), ""], str(tmp_path / "out.parquet"), named, nobody)
    made = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["score"] for row in made[:4]] == [15.0, None, 15.0, None]
    assert [row["reason"] for row in made[:4]] == [None, "the scorer raised RuntimeError: no opinion", None, "the score is nan"]
    assert pq.read_schema(tmp_path / "out.parquet").metadata[b"unscored"] == b"4"


def test_exact_answers_are_the_demonstrations_also_from_an_actor_that_scored_otherwise_before(tmp_path: Path) -> None:
    (tmp_path / "opinions.py").write_text(SCORER)
    named = {"scorer": "exact_answer", "ours": False}
    write_rows(tmp_path / "in.parquet", rows(), SAMPLE)
    gold = [{"id": key, "source": "x", "response": f"so #### {n}"} for key, n in (("a", 3), ("b", 12))]
    write_rows(tmp_path / "gold.parquet", gold, DEMONSTRATION)
    actor = ScoreResponses("opinions:length", False, folder=str(tmp_path))
    actor.change(named)
    actor([str(tmp_path / "in.parquet"), str(tmp_path / "gold.parquet")], str(tmp_path / "out.parquet"), named, nobody)
    assert [row["score"] for row in pq.read_table(tmp_path / "out.parquet").to_pylist()] == [1, 0, 1, 0, 0, 0, 0, 1]
    write_rows(tmp_path / "gold.parquet", [gold[0], gold[1] | {"response": "so 12"}], DEMONSTRATION)
    actor([str(tmp_path / "in.parquet"), str(tmp_path / "gold.parquet")], str(tmp_path / "out.parquet"), named, nobody)
    made = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["score"] for row in made] == [1, 0, 1, 0, None, None, None, None] and "no number after" in made[-1]["reason"]


def test_demonstrations_without_answers_stop_the_job_before_anything_is_trained(tmp_path: Path) -> None:
    run, data = Run(tmp_path), Stage("demonstrations", {})
    for split, response in (("train", "so #### 3"), ("held_out", "so 3")):
        (run.directory(data) / split).mkdir(parents=True)
        write_rows(run.directory(data) / split / "00000.parquet", [{"id": "a", "response": response}], DEMONSTRATION)
    with pytest.raises(StageError, match=r"best_of_n\.golden=exact_answer, but no demonstration \(held_out\) has a number after '####'"):
        evaluation.check_answers(run, data, "best_of_n.golden", "exact_answer", "set best_of_n.golden=none")


def test_a_name_that_scores_nothing_is_refused_before_anything_runs(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "opinions_too.py").write_text(SCORER)
    monkeypatch.chdir(tmp_path)
    data = Stage("demonstrations", {})

    def plan(scorer: str) -> Stage:
        return scoring.plan("best_of_n/golden", data, data, scorer, "float32", RewardScoring())

    for name, message in {
        "opinions_too:width": "the module 'opinions_too' has no function 'width'",
        "opinions_too:thing": "the module 'opinions_too' has no function 'thing'",
        "nowhere:f": "the module 'nowhere' cannot be imported",
        "exact_answr": "did you mean exact_answer",
        "/nowhere/at/all": "is no reward model's directory or hub id",
        str(tmp_path): "is no reward model's directory or hub id, nor exact_answer, nor module:function",
        str(tiny): "is LlamaForCausalLM: a reward model is a ...ForSequenceClassification with one label",
    }.items():
        with pytest.raises(StageError, match=message):
            plan(name)
    before = plan("opinions_too:length").fingerprint
    AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=2).save_pretrained(tmp_path / "two")
    with pytest.raises(StageError, match="has 2 labels, a reward model has one"):
        check_reward_model(str(tmp_path / "two"))
    check_reward_model(str(reward_model(tmp_path / "one", "llama")))
    assert plan("opinions_too:length").fingerprint == before


def test_a_stage_counts_what_has_no_score_and_stops_when_nothing_has(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "opinions_three.py").write_text(SCORER + "\n\ndef never(messages, response):\n    return math.inf\n")
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path / "run")
    samples = Stage("samples", {})
    (run.directory(samples) / "held_out").mkdir(parents=True)
    write_rows(run.directory(samples) / "held_out" / "00000.parquet", rows(), SAMPLE)
    work = scoring.score(RewardScoring(), 512, False)
    some = scoring.plan("golden", samples, samples, "opinions_three:length", "float32", RewardScoring())
    run.do(work, some)
    assert run.numbers(some) == {"rows": 8, "unscored": 4, "untemplated": 0, "retemplated": 0}
    never = scoring.plan("other", samples, samples, "opinions_three:never", "float32", RewardScoring())
    with pytest.raises(StageError, match="not one response could be scored: the score is inf"):
        run.do(work, never)
    assert not list(run.directory(never).glob("*/*.parquet")), "a mended scorer is asked again"


def test_the_log_says_how_published_reward_models_read_the_responses(
    local_ray: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = {name: reward_model(tmp_path / name, "gpt2") for name in ("same", "others", "plain")}
    words = AutoTokenizer.from_pretrained(published["others"])
    # It reads lower case alone: of "What" it makes other tokens, in the same template.
    words.backend_tokenizer.normalizer = normalizers.Lowercase()
    words.save_pretrained(published["others"])
    (published["plain"] / "chat_template.jinja").unlink()
    run, samples = Run(tmp_path / "run"), Stage("samples", {})
    (run.directory(samples) / "held_out").mkdir(parents=True)
    write_rows(run.directory(samples) / "held_out" / "00000.parquet", rows(), SAMPLE)
    stages = {name: scoring.plan(name, samples, samples, str(path), "float32", TRANSFORMERS) for name, path in published.items()}
    run.do(scoring.score(TRANSFORMERS, 512, False), *stages.values())
    # Files whose responses were read in other tokens or in a plain template; there is one.
    counted = {name: (run.numbers(stage)["retemplated"], run.numbers(stage)["untemplated"]) for name, stage in stages.items()}
    assert counted == {"same": (0, 0), "others": (1, 0), "plain": (1, 1)}
    assert all(run.numbers(stage)["rows"] == 8 and not run.numbers(stage)["unscored"] for stage in stages.values())
    others, plain = (record.getMessage() for record in caplog.records if record.getMessage().startswith(tuple(published)))
    assert others.startswith("others: the reward model reads other tokens than the policy wrote: responses are written in its own chat")
    assert plain.startswith("plain: the reward model has no chat template, responses are written in a plain one (User: ... Assistant")


def test_a_score_is_finite() -> None:
    assert scorers.finite(2.0) == (2.0, None) and scorers.finite(math.inf) == (None, "the score is inf")


def test_the_reward_models_template_ends_with_its_turn(tmp_path: Path) -> None:
    from actors.learner.policy import ends_with_its_turn

    words = AutoTokenizer.from_pretrained(write_tiny(tmp_path))
    talk = [*USER, {"role": "assistant", "content": "3 "}]
    plain = words.apply_chat_template(talk, tokenize=False)
    for tail in ("", "\n \n", "{{ '\n' }}\n", "{%- if true %} {% endif -%}"):
        words.chat_template = "\n" + TEMPLATE + tail
        asked = words.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
        words.chat_template = ends_with_its_turn(words.chat_template)
        assert words.apply_chat_template(talk, tokenize=False) == "\n" + plain
        assert words.apply_chat_template(USER, tokenize=False, add_generation_prompt=True) == asked
