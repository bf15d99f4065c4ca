"""Conversations -> token ids, through the tokenizer's own chat template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from kvprune.errors import BadOption, UnknownText
from kvprune.models.check import first_line
from kvprune.text.corpus import json_values, read_file

Conversation = list[dict[str, str]]
_FORM = '{"messages": [{"role": ..., "content": ...}, ...]}, such a list itself, or Alpaca\'s instruction and output'


def read_conversations(path: str) -> tuple[Conversation, ...]:
    """Of a JSON list, or JSON lines. Raises UnknownText, with the number of the conversation that is wrong."""
    content = read_file(Path(path)).strip()
    if not content:
        raise UnknownText(f"{path} is empty")
    values = json_values(content, path)
    if all(isinstance(value, dict) and "role" in value for value in values):  # of one conversation
        values = [values]
    return tuple(conversation_of(value, f"{path}, conversation {number}") for number, value in enumerate(values, 1))


def conversation_of(value: Any, where: str) -> Conversation:
    """Messages from one of the forms in _FORM. Raises UnknownText."""
    if isinstance(value, dict):
        value = value["messages"] if "messages" in value else _turns(value)
    if not isinstance(value, list) or not value:
        raise UnknownText(f"{where} is no conversation; give {_FORM}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UnknownText(f"{where} has a message without a role and a content in words; give {_FORM}")
    return value


def _turns(example: dict[str, Any]) -> Conversation | None:
    """Of an Alpaca example, which may have an input; None for another object."""
    asked, more, answer = (example.get(name) for name in ("instruction", "input", "output"))
    if asked is None or answer is None:
        return None
    question = f"{asked}\n\n{more}" if more else asked
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def check_template(tokenizer: PreTrainedTokenizerBase, remedy: str) -> None:
    """Raise BadOption for a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise BadOption(f"the tokenizer has no chat template; {remedy}")


def render(tokenizer: PreTrainedTokenizerBase, messages: Conversation, *, answer: bool = False) -> list[int]:
    """Ids of a conversation as the template has it, start token included if that writes one. answer: with the beginning
    of the assistant's next turn. Raises BadOption for what the template refuses."""
    try:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=answer, tokenize=True, return_dict=False)
    except Exception as error:  # what a template raises is its own
        raise BadOption(f"the chat template refuses the conversation: {first_line(error)}") from None
    return cast(list[int], found)


def stream(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, tokens: int | None
) -> torch.Tensor:
    """Ids (n,) of one conversation after the other, or the first `tokens` of them. Raises BadOption."""
    check_template(tokenizer, "give plain text, or a tokenizer with one")
    found: list[int] = []
    for conversation in conversations:
        if tokens is not None and len(found) >= tokens:
            break
        found += render(tokenizer, conversation)
    return torch.tensor(found[:tokens], dtype=torch.long)


def cut_conversations(ids: torch.Tensor, window: int, start: int | None) -> torch.Tensor:
    """Ids (n,) as whole windows (count, window), each behind `start` if there is one: its own, where a conversation
    begins with it there, and not a second."""
    found, position = [], 0
    while position < len(ids):
        bare = start is not None and int(ids[position]) != start
        end = position + window - bare
        if end > len(ids):
            break
        piece = ids[position:end]
        found.append(torch.cat((ids.new_tensor([start]), piece)) if bare else piece)
        position = end
    return torch.stack(found) if found else ids.new_empty(0, window)


def end_of_turn(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> int | None:
    """The special token that the template writes behind the assistant's answer, if there is one."""
    mark = "kvprune"
    try:
        told = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": mark}], tokenize=False)
    except Exception:  # the template wants no answer there
        return None
    behind = cast(str, told).rpartition(mark)[2].lstrip()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    special = tokenizer.added_tokens_decoder
    return ids[0] if ids and ids[0] in special and special[ids[0]].special else None
