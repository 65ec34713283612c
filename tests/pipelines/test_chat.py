"""Token ids in, token ids out: one BOS, one end of turn, the same ids everywhere."""

from pathlib import Path

import pytest
from models import TEMPLATE, write_tiny

from pipelines.chat import PLAIN_TEMPLATE, Chat

PROMPT = [{"role": "user", "content": "How many apples are there?"}]


def test_smollm2_by_hand(smollm2: Path) -> None:
    chat = Chat(str(smollm2))
    tokenizer = chat.tokenizer
    prompt, response = chat.prompt_ids(PROMPT), chat.response_ids(PROMPT, "There are 12.")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    # The template opens every turn with <|im_start|>; nothing stands before the first.
    assert prompt[0] == start and prompt[1] != start
    assert tokenizer.decode(prompt).endswith("<|im_start|>user\nHow many apples are there?<|im_end|>\n<|im_start|>assistant\n")
    assert response.count(end) == 1 and response[-1] == end and chat.stop_ids == [end]
    assert tokenizer.decode(response) == "There are 12.<|im_end|>"
    assert chat.text(response) == "There are 12."


def test_a_template_with_bos_gives_exactly_one(tiny: Path) -> None:
    chat = Chat(str(tiny))
    prompt, response = chat.prompt_ids(PROMPT), chat.response_ids(PROMPT, "There are 12.")
    assert prompt[0] == 0 and prompt.count(0) == 1
    assert response.count(1) == 1 and response[-1] == 1 and 0 not in response
    assert chat.tokenizer.decode([*prompt, *response]) == "<s>[user]How many apples are there?[assistant]There are 12.</s>"


@pytest.mark.parametrize("family", ["smollm2", "tiny"])
def test_prompt_and_response_are_the_conversation_tokenized_once(family: str, request: pytest.FixtureRequest) -> None:
    chat = Chat(str(request.getfixturevalue(family)))
    turns = [
        {"role": "system", "content": "Be brief."},
        *PROMPT,
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "Sure?"},
    ]
    ids = chat.prompt_ids(turns) + chat.response_ids(turns, "Yes: 12.")
    whole = chat.tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "Yes: 12."}], tokenize=True, return_dict=False)
    assert list(whole)[: len(ids)] == ids


def test_a_tokenizer_that_writes_bos_itself_does_not_write_it_twice(tiny: Path, tmp_path: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    for name, template in (("with", TEMPLATE), ("without", TEMPLATE.replace("{{ bos_token }}", ""))):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
        ids = Chat(str(tmp_path / name)).prompt_ids(PROMPT)
        assert ids[0] == 0 and ids.count(0) == 1, name


def test_the_plain_template_ends_a_turn_with_eos(tmp_path: Path) -> None:
    chat = Chat(str(write_tiny(tmp_path / "plain", template=PLAIN_TEMPLATE)))
    ids = chat.prompt_ids(PROMPT) + chat.response_ids(PROMPT, "12")
    assert chat.tokenizer.decode(ids) == "User: How many apples are there?\n\nAssistant: 12</s>"


def test_a_template_that_rewrites_the_last_turn_still_ends_once(tmp_path: Path) -> None:
    # Opens the answer with a word that the finished conversation does not have.
    template = TEMPLATE.replace("{% if add_generation_prompt %}[assistant]", "{% if add_generation_prompt %}[assistant]think")
    chat = Chat(str(write_tiny(tmp_path / "rewrites", template=template)))
    response = chat.response_ids(PROMPT, "12")
    assert response[-1] == 1 and response.count(1) == 1 and chat.text(response) == "12"


def test_a_tokenizer_without_any_end_is_refused(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="could never stop"):
        Chat(str(tmp_path / "endless"))
