"""An engine that reads another policy in place samples what a new engine samples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import write_tiny
from running import ROOT
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config

from actors.generator import environment, room
from actors.settings import Engine

PROMPTS = [[5, 6, 7, 8], [9, 10, 11] * 3, [40, 41]]
SAMPLES = """
import json, sys
from actors.generator import Generator
from actors.settings import Engine, Sampling
first, *others = sys.argv[3:]
generator = Generator(first, Engine(num_cpus=2, kv_cache_gib=0.05, dtype=sys.argv[1]), 64, [1])
found = []
for weights in [first, *others]:
    if weights != first or found:
        generator.load(weights)
    responses = generator(json.loads(sys.argv[2]), Sampling(greedy=True, max_new_tokens=24), 0)
    found.append([response.ids for drawn in responses for response in drawn])
print("FOUND", json.dumps(found))
"""


def samples(dtype: str, *weights: Path) -> list[list[list[int]]]:
    """What one engine samples of several policies, one after the other; in a process of its own."""
    env = os.environ | environment(Engine(num_cpus=2))
    argv = [sys.executable, "-c", SAMPLES, dtype, json.dumps(PROMPTS), *map(str, weights)]
    told = subprocess.run(argv, cwd=ROOT, env=env, text=True, capture_output=True, timeout=200)
    assert "FOUND" in told.stdout, told.stderr[-3000:]
    return json.loads(told.stdout.partition("FOUND")[2])


def tied(directory: Path) -> Path:
    """The model with one matrix for embedding and head."""
    model = AutoModelForCausalLM.from_pretrained(directory, tie_word_embeddings=True)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("family", "tie"),
    # A head that shares its weights with the embedding has a packed copy of its own on a CPU.
    [("llama", True), *(pytest.param(family, False, marks=pytest.mark.slow) for family in ("llama", "qwen2", "gpt2", "gemma"))],
)
def test_another_policy_is_read_in_place(family: str, tie: bool, tmp_path: Path) -> None:
    first, second = (write_tiny(tmp_path / str(seed), family, std=0.2, seed=seed) for seed in (0, 1))
    if tie:
        tied(first), tied(second)
    there, changed, back = samples("float32", first, second, first)
    assert back == there and changed != there
    model = AutoModelForCausalLM.from_pretrained(second).eval()
    for prompt, response in zip(PROMPTS, changed, strict=True):
        with torch.inference_mode():
            said = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=1, pad_token_id=2)
        assert response == said[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_in_bfloat16_too_as_a_new_engine_samples(tmp_path: Path) -> None:
    first, second = (tied(write_tiny(tmp_path / str(seed), std=0.2, seed=seed)) for seed in (0, 1))
    assert samples("bfloat16", first, second)[1] == samples("bfloat16", second)[0]


def test_a_model_has_no_more_room_than_it_has_positions(caplog: pytest.LogCaptureFixture) -> None:
    assert room(GPT2Config(), 512) == 512 and not caplog.messages
    assert room(GPT2Config(), 2048) == 1024
    assert "GPT2 has a context of 1024 tokens: 2048 are not to be had" in caplog.text
    assert room(BloomConfig(), 2048) == 2048, "no positions, no end"
