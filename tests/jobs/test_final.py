"""The policy that a job leaves, elsewhere: transformers, vLLM in process, vLLM's server."""

import sys
from pathlib import Path

import pytest
import torch
from running import finish
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import served


def test_the_policies_load_in_transformers_and_vllm_unchanged(undisturbed: Path) -> None:
    probe = (
        "import sys, os\n"
        "os.environ |= {'VLLM_ENABLE_V1_MULTIPROCESSING': '0', 'HF_HUB_OFFLINE': '1'}\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "from vllm import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=2**27)\n"
        "asked = [{'role': 'user', 'content': 'What is 3 and 4?'}]\n"
        "out = llm.chat(asked, SamplingParams(temperature=0, max_tokens=4, detokenize=True))\n"
        "prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)\n"
        "assert list(out[0].prompt_token_ids) == list(prompt), (out[0].prompt_token_ids, prompt)\n"
        "assert model.generation_config.eos_token_id in (1, [1]), model.generation_config\n"
        "import torch\n"
        "told = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=4)[0, len(prompt):].tolist()\n"
        "assert list(out[0].outputs[0].token_ids) == told, (out[0].outputs[0].token_ids, told)\n"
        "from actors.generator import Generator\n"
        "from actors.settings import Sampling\n"
        "generator = Generator.__new__(Generator)\n"
        "generator.stop_ids = [1]\n"
        "drawn = generator._params(Sampling(temperature=0.7, top_p=0.9, samples=3, max_new_tokens=5), None)\n"
        "assert (drawn.temperature, drawn.top_p, drawn.n, drawn.max_tokens, drawn.stop_token_ids) == (0.7, 0.9, 3, 5, [1]), drawn\n"
        "assert generator._params(Sampling(greedy=True, temperature=0.7), None).temperature == 0\n"
        "print('loaded')\n"
    )
    done = finish([sys.executable, "-c", probe, str(undisturbed / "final")])
    assert "loaded\n" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_vllms_own_server_answers_as_transformers_does(undisturbed: Path) -> None:
    final = undisturbed / "final"
    asked = [{"role": "user", "content": "What is 3 and 4?"}]
    options = {"temperature": 0, "max_tokens": 6, "return_token_ids": True}
    with served(final, "--max-model-len", "128", "--dtype", "float32") as client:
        answer = client.post("/v1/chat/completions", json={"model": "ours", "messages": asked} | options).raise_for_status().json()
    prompt = AutoTokenizer.from_pretrained(final).apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    model = AutoModelForCausalLM.from_pretrained(final)
    told = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0, len(prompt) :].tolist()
    assert answer["prompt_token_ids"] == prompt and answer["choices"][0]["token_ids"] == told
