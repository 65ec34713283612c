"""From messages to token ids: the only place where a chat template is applied.

The ids made here are generated from, scored and trained on. The template writes BOS; a response ends in the token that ends an
assistant's turn, once, and that token counts.
"""

from collections.abc import Sequence
from typing import Any

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
"""For models without a chat template."""

Message = dict[str, str]


class Chat:
    """A tokenizer with its chat template.

    Args:
        path: directory or hub id; without a template the tokenizer gets a plain one.
        trust_remote_code: run Python code that comes with the tokenizer.
    """

    def __init__(self, path: str, trust_remote_code: bool = False):
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        self.plain = not self.tokenizer.chat_template
        """whether it has no template of its own"""
        self.tokenizer.chat_template = self.tokenizer.chat_template or PLAIN_TEMPLATE
        probe = self.tokenizer("x").input_ids
        bos = self.tokenizer.bos_token_id
        self.bos_id = bos if bos is not None and probe[:1] == [bos] else None
        """BOS where the tokenizer itself would write one"""
        self.end_id = self._end_of_turn()
        self.stop_ids = sorted({self.end_id, self.tokenizer.eos_token_id} - {None})
        """tokens that end a response"""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """A conversation up to and with the header of the assistant's turn."""
        return self._encode(self._render(messages, add_generation_prompt=True))

    def response_ids(self, messages: Sequence[Message], response: str) -> list[int]:
        """The assistant's turn as the template writes it after `prompt_ids(messages)`, up to and with the end of the turn."""
        prompt = self._render(messages, add_generation_prompt=True)
        whole = self.read_text(messages, response)
        if whole.startswith(prompt):
            prompt_ids, whole_ids = self._encode(prompt), self._encode(whole)
            if whole_ids[: len(prompt_ids)] == prompt_ids and self.end_id in whole_ids[len(prompt_ids) :]:
                ids = whole_ids[len(prompt_ids) :]
                return ids[: len(ids) - ids[::-1].index(self.end_id)]
        # A template that rewrites the last turn, or a tokenizer that merges across its start.
        return [*self.tokenizer(response, add_special_tokens=False).input_ids, self.end_id]

    def conversation_ids(self, messages: Sequence[Message], response: str, ended: bool) -> list[int]:
        """A whole conversation as the template writes it, the way published reward models read one.

        Args:
            messages: before the response.
            response: the last turn.
            ended: whether that turn came to its end; else everything from the token that ends it on is left out.
        """
        ids = self._encode(self.read_text(messages, response))
        return ids if ended or self.end_id not in ids else ids[: len(ids) - 1 - ids[::-1].index(self.end_id)]

    def left_text(self, messages: Sequence[Message], response: str) -> str:
        """A conversation with a response in the words in which a policy leaves it, up to and with the token that ends the response."""
        return self._render(messages, add_generation_prompt=True) + response + self.tokenizer.convert_ids_to_tokens(self.end_id)

    def read_text(self, messages: Sequence[Message], response: str) -> str:
        """A whole conversation in the words in which published reward models read one."""
        return self._render([*messages, {"role": "assistant", "content": response}], add_generation_prompt=False)

    def text_ids(self, text: str) -> list[int]:
        """A text, or a conversation in the words of the template: what stands in it for a special token is one, and BOS is there once."""
        return self._encode(text)

    def special_in(self, text: str) -> str | None:
        """A special token that stands in a text as words: the tokenizer would take it for the token itself."""
        return next((token for token in self.tokenizer.all_special_tokens if token in text), None)

    def text(self, ids: Sequence[int]) -> str:
        """A response as a person reads it, without the token that ends it."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)

    def _encode(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def _end_of_turn(self) -> int:
        """The first special token that the template writes after an assistant's words; EOS if it writes none."""
        words = "x"
        user = [{"role": "user", "content": words}]
        start = len(self._render(user, add_generation_prompt=True))
        whole = self._render([*user, {"role": "assistant", "content": words}], add_generation_prompt=False)
        special = set(self.tokenizer.all_special_ids)
        tail = self.tokenizer(whole[start:], add_special_tokens=False).input_ids
        found = next((token for token in tail if token in special), self.tokenizer.eos_token_id)
        if found is None:
            raise ValueError(
                "the tokenizer has no EOS and its chat template ends a turn with no special token: a response could never stop"
            )
        return found
