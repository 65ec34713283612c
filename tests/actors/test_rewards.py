"""Reward models: where the reward is read, training through the learner, the exported directory in transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tokenizer as model_tokenizer
from models import write_tiny
from rewards import EXAMPLES, one_by_one, reward_model
from safetensors.torch import load_file
from training import assert_same_steps, train, write_pairs
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig, LlamaConfig, pipeline

from actors.learner import policy
from actors.learner.batches import Example, collate, shares_prompt
from actors.reward import engine as reward_engine
from actors.scorer import Scorer
from actors.settings import Objective, RewardScoring, Scoring
from pipelines.chat import Chat
from pipelines.serving import prompts
from pipelines.serving import rewards as serving_rewards
from pipelines.serving.rewards import RewardReplica, alike

FAMILIES = ["llama", "gpt2", "qwen2", "mistral_window"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reward_is_read_at_the_last_token_in_every_layout(family: str, tmp_path: Path) -> None:
    directory = reward_model(tmp_path, family)
    want = [one_by_one(directory, list(e.prompt_ids), list(r)) for e in EXAMPLES for r in e.responses]
    model = policy.load(str(directory), "float32", None, False, "reward").eval()
    module = policy.KINDS["reward"].module(model)
    with torch.no_grad():
        for share in {False, shares_prompt(model.config)}:
            # Padding with EOS: it ends the responses too.
            for pad_id in (1, 2):
                assert module(collate(EXAMPLES, pad_id, share))[0].tolist() == pytest.approx(want, abs=1e-4)
            alone = [value for e in EXAMPLES for value in module(collate([e], 1, share))[0].tolist()]
            assert alone == pytest.approx(want, abs=1e-4), "a batch of one equals a batch of many"
    scored = Scorer(str(directory), Scoring(max_batch_tokens=10), "float32", kind="reward")(EXAMPLES)
    assert [value for row in scored for value in row] == pytest.approx(want, abs=1e-4)


@pytest.fixture(scope="module")
def pairs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs without a reference."""
    import pyarrow.parquet as pq

    path = write_pairs(tiny, tmp_path_factory.mktemp("pairs") / "pairs.parquet")
    pq.write_table(pq.read_table(path, columns=["id", "prompt_ids", "real_ids", "generated_ids"]), path)
    return path


def trained(model: Path, data: Path, output: Path, world: int, objective: str, **settings: Any) -> list[dict[str, float]]:
    return train(model, data, output, world, Objective(name=objective, beta=1.0), kind="reward", learning_rate=3e-3, **settings)


@pytest.mark.parametrize("objective", ["gsil_logistic", "dpo"], ids=["discriminator", "bradley_terry"])
def test_it_learns_to_tell_the_sides_apart_with_any_number_of_workers(objective: str, tiny: Path, pairs: Path, tmp_path: Path) -> None:
    alone = trained(tiny, pairs, tmp_path / "alone", 1, objective, epochs=6, zero_stage=0)
    stage = {"gsil_logistic": 3, "dpo": 2}[objective]
    two = trained(tiny, pairs, tmp_path / "two", 2, objective, epochs=6, zero_stage=stage, micro_batch_tokens=40)
    assert_same_steps(two, alone, rel=1e-2)
    held_out = json.loads((tmp_path / "two/held_out.json").read_text())
    assert held_out["accuracy"] > 0.9 and held_out["margin"] > 0.5 and alone[-1]["loss"] < 0.7 * alone[0]["loss"]


@pytest.mark.slow
def test_members_of_an_ensemble_begin_with_other_heads_and_see_rows_in_other_orders(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    first, second = (trained(tiny, pairs, tmp_path / str(seed), 1, "gsil_logistic", seed=seed, epochs=1) for seed in (0, 1))
    heads = [load_file(tmp_path / str(seed) / "reward/model.safetensors")["score.weight"] for seed in (0, 1)]
    cosine = torch.nn.functional.cosine_similarity(heads[0].flatten(), heads[1].flatten(), dim=0)
    assert abs(cosine.item()) < 0.9 and len(first) == len(second) and first[0]["loss"] != second[0]["loss"]


@pytest.mark.parametrize(("family", "lora_r"), [("llama", 0), ("gpt2", 0), ("qwen2", 0), ("llama", 4)])
def test_transformers_reads_the_same_rewards_whatever_the_padding_side(family: str, lora_r: int, pairs: Path, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "policy", family, std=0.2)
    # A policy whose padding is its EOS, as SmolLM2's is, and which has no special token to spare.
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(source)
    config = json.loads((source / "config.json").read_text()) | {"pad_token_id": 1}
    (source / "config.json").write_text(json.dumps(config))
    trained(source, pairs, tmp_path / "out", 1, "gsil_logistic", lora_r=lora_r)
    directory = tmp_path / "out" / "reward"
    ours, its = Chat(str(source)), Chat(str(directory))
    assert prompts.identity(its) == prompts.identity(ours), "the service passes tokens on"
    assert prompts.conversations(its, reward=True) == prompts.conversations(ours)
    want = Scorer(str(directory), Scoring(), "float32", kind="reward")(EXAMPLES)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    rows = [[*e.prompt_ids, *r] for e in EXAMPLES for r in e.responses]
    for side in ("left", "right"):
        tokenizer = AutoTokenizer.from_pretrained(directory, padding_side=side)
        assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.chat_template
        assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        if family == "gpt2":
            # It counts positions from the left itself, which padding there shifts: its users pass them.
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            got = model(**batch).logits[:, 0]
        assert got.tolist() == pytest.approx([value for row in want for value in row], abs=1e-4)
        assert np.std(got.numpy()) > 0


def test_a_served_reward_is_the_same_in_company(tmp_path: Path) -> None:
    replica = RewardReplica.__new__(RewardReplica)
    replica.model, replica.failures = Scorer(str(reward_model(tmp_path, "llama")), Scoring(), "float32", kind="reward"), 0
    prompt = tuple(range(20, 40))
    sequences = [(*prompt, 7, 8, 1), (9, 10), (*prompt, 7, 1), prompt, (*prompt, 7, 8, 1), (*prompt[:5], 1), (*prompt, 50, 1)]
    groups = alike(sequences)
    assert [members for _, members in groups] == [[1], [5], [3, 2, 0, 4, 6]] and groups[-1][0] == prompt[:-1]
    assert replica._values(sequences) == pytest.approx([replica._values([ids])[0] for ids in sequences], abs=1e-5)


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        ({}, None),
        ({"reward_mean": None, "reward_std": None}, None),
        ({"reward_mean": 0.5}, (0.5, 1.0)),
        ({"reward_mean": 0.5, "reward_std": 0.0}, (0.5, 1.0)),
        ({"reward_mean": 0.0, "reward_std": 2.0}, (0.0, 2.0)),
    ],
)
def test_a_config_may_say_nothing_of_mean_and_deviation(facts: dict[str, Any], found: Any) -> None:
    assert serving_rewards.centre(LlamaConfig(**facts)) == found


def test_weights_in_another_format_are_read_only_where_they_may_be(tmp_path: Path) -> None:
    directory = reward_model(tmp_path, "llama")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    scoring = RewardScoring(backend="transformers")
    reward_engine.load(str(directory), scoring, "float32", 64)
    with pytest.raises(OSError, match="safetensors"):
        reward_engine.load(str(directory), scoring, "float32", 64, safetensors_only=True)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_reward_bench_reads_the_same_rewards(family: str, pairs: Path, tmp_path: Path) -> None:
    """As reward-bench 0.1.4 does it (rewardbench/rewardbench.py): conversations as text in the model's chat template, padded on the left,
    through transformers' text-classification pipeline, raw logits."""
    trained(write_tiny(tmp_path / "policy", family, std=0.2), pairs, tmp_path / "out", 1, "gsil_logistic")
    directory = tmp_path / "out" / "reward"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    talks = [[{"role": "user", "content": "How many?"}, {"role": "assistant", "content": said}] for said in ("12", "there are 12 apples")]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    ids = [tokenizer.apply_chat_template(talk, return_dict=False) for talk in talks]
    want = Scorer(str(directory), Scoring(), "float32", kind="reward")([Example("a", row[:4], (row[4:],)) for row in ids])
    tokenizer.padding_side = "left"
    read = pipeline("text-classification", model=AutoModelForSequenceClassification.from_pretrained(directory), tokenizer=tokenizer)
    options = {"truncation": False, "padding": True, "max_length": 512, "function_to_apply": "none", "return_token_type_ids": False}
    got = [found["score"] for found in read(texts, batch_size=8, **options)]
    assert got == pytest.approx([value for (value,) in want], abs=1e-4) and got[0] != got[1]


def test_what_is_no_reward_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    two = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=2)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="a reward model has one label, this LlamaForSequenceClassification has 2"):
        Scorer(str(tmp_path / "two"), Scoring(), "float32", kind="reward")
    with pytest.raises(ValueError, match="is no reward model"):
        Scorer(str(tiny), Scoring(), "float32", kind="reward")


def test_a_published_encoder_is_read_in_its_own_way(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=40, num_labels=1, pad_token_id=2, **shape)).eval()
    torch.nn.init.normal_(model.classifier.out_proj.weight)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want = [model(torch.tensor([[*e.prompt_ids, *r]])).logits.item() for e in EXAMPLES for r in e.responses]
    scored = Scorer(str(tmp_path), Scoring(), "float32", kind="reward")(EXAMPLES)
    assert [value for row in scored for value in row] == pytest.approx(want, abs=1e-4)
    # Its 64 positions begin behind the padding's: 61 tokens are the most.
    scorer, limit = reward_engine.load(str(tmp_path), RewardScoring(backend="transformers"), "float32", 100)
    scorer([Example("most", [5] * 60, ([6] * (limit - 60),))])
    assert limit == 61
    with pytest.raises((IndexError, RuntimeError)):
        scorer([Example("more", [5] * 60, ([6] * (limit - 59),))])


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nTHINK{% endif %}"
)


def worded(folder: Path, template: str, pad: str | None = None) -> Chat:
    words = model_tokenizer(template)
    words.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    if pad:
        words.add_special_tokens({"pad_token": pad})
    words.save_pretrained(folder)
    return Chat(str(folder))


@pytest.mark.parametrize("thinks", ["", "<think>\n"])
def test_a_reward_model_reads_what_a_policy_leaves_or_what_was_published(thinks: str, tmp_path: Path) -> None:
    template = CHATML.replace("THINK", thinks)
    ours = worded(tmp_path / "policy", template)
    published = worded(tmp_path / "published", template)
    trained_here = worded(tmp_path / "trained", policy.ends_with_its_turn(template), pad=policy.PAD)
    of_others = worded(tmp_path / "others", policy.ends_with_its_turn(template.replace("im_start|>", "im_start|> ")))
    assert {prompts.identity(its) for its in (published, trained_here, of_others)} == {prompts.identity(ours)}
    left = prompts.conversations(ours)
    assert prompts.conversations(trained_here, reward=True) == left
    assert prompts.conversations(published, reward=True) != left, "it reads the reward at the newline behind the turn"
    assert prompts.conversations(of_others, reward=True) != left
    other = model_tokenizer(template)
    other.add_special_tokens({"eos_token": "<|im_start|>", "additional_special_tokens": ["<|im_end|>"]})
    other.save_pretrained(tmp_path / "turned")
    assert prompts.identity(Chat(str(tmp_path / "turned"))) != prompts.identity(ours)


def test_a_padding_token_that_ends_a_turn_is_replaced(tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(write_tiny(tmp_path))
    words.add_special_tokens({"pad_token": "<|eot|>"})
    words.chat_template = "{{ messages[0]['content'] }}<|eot|>"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    state = policy._pad_apart(model, words, dict(model.state_dict()))
    assert words.pad_token not in ("<|eot|>", words.eos_token, words.bos_token)
    assert model.config.pad_token_id == words.pad_token_id < len(state["model.embed_tokens.weight"])
    # Qwen's: a second token ends responses, and pads.
    words.add_special_tokens({"pad_token": "<|endoftext|>"})
    GenerationConfig(eos_token_id=[words.eos_token_id, words.pad_token_id]).save_pretrained(tmp_path)
    policy._pad_apart(model, words, dict(model.state_dict()), policy._ends(str(tmp_path), words))
    assert words.pad_token not in ("<|endoftext|>", "<|eot|>", words.eos_token)
