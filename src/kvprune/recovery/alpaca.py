"""Instruction data in Alpaca's form: {"instruction", "input" (may be missing), "output"}, a JSON list or JSON lines.

The prompt is the one of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca). Only the answer and the end-of-text
token are learnt; the prompt's labels are -100. Prompt and answer are tokenised apart, so that no token spans both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kvprune.errors import UnknownText
from kvprune.text.corpus import json_values, read_file

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        template = WITH_INPUT if self.input else WITHOUT_INPUT
        return template.format(instruction=self.instruction, input=self.input)


def is_named_so(path: str) -> bool:
    """Whether a file's name says JSON; any other file is plain text."""
    return Path(path).suffix in (".json", ".jsonl")


def read_examples(path: str) -> tuple[list[Example], int]:
    """The examples, and how many others there are whose instruction or output is empty (28 in Stanford's own file).

    Raises UnknownText, with the number of the example or line that is wrong.
    """
    content = read_file(Path(path)).strip()
    if not content:
        raise UnknownText(f"{path} is empty")
    read = [_example(value, f"{path}, example {i}") for i, value in enumerate(json_values(content, path), 1)]
    whole = [example for example in read if example.instruction.strip() and example.output.strip()]
    if not whole:
        raise UnknownText(f"{path} has no example with an instruction and an output; give some")
    return whole, len(read) - len(whole)


def _example(value: Any, where: str) -> Example:
    if not isinstance(value, dict):
        raise UnknownText(f"{where} is no object with instruction, input and output")
    fields = {name: value.get(name) or "" for name in ("instruction", "input", "output")}
    for name, field in fields.items():
        if name not in value and name != "input":
            raise UnknownText(f"{where} has no {name}; give objects with instruction, input and output")
        if not isinstance(field, str):
            raise UnknownText(f"{where}: {name} is no string")
    return Example(**fields)


def tokenize(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of prompt, answer and end of text, and as many labels: -100 on the prompt."""
    prompt = tokenizer(example.prompt, verbose=False)["input_ids"]
    answer = tokenizer(example.output, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    return [*prompt, *answer], [-100] * len(prompt) + answer
