"""A text or an Alpaca file -> what is trained on, and a held-out slice from its end that never is.

Everything is in memory as token ids. Which windows a step sees depends on the seed and the step's number alone, so a
run that was interrupted goes on with the very windows that it would have seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from transformers import PreTrainedTokenizerBase

from kvprune.errors import BadOption, TextTooShort
from kvprune.recovery import alpaca
from kvprune.text.corpus import is_file
from kvprune.text.given import Text
from kvprune.text.windows import cut_windows, start_token


@dataclass(frozen=True)
class Data:
    """ids (n, T), padded on the right; labels (n, T), the ids again or -100 where nothing is to be learnt (prompts,
    padding); lengths (n,) without padding. A token is scored where its label is not -100, but never a window's first.

    Right padding needs no attention mask in a causal model: what is padded comes after everything that is scored.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    lengths: torch.Tensor
    left_out: int = 0  # examples whose answer has no room in a window
    empty: int = 0  # and those without an instruction or an output, which are left out too

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: torch.Tensor) -> "Data":
        """The rows of that index (m,), cut to the longest of them."""
        longest = int(self.lengths[index].max()) if len(index) else 0
        counts = self.left_out, self.empty
        return Data(self.ids[index, :longest], self.labels[index, :longest], self.lengths[index], *counts)

    def to(self, device: torch.device) -> "Data":
        return Data(self.ids.to(device), self.labels.to(device), self.lengths.to(device))

    @property
    def scored(self) -> int:
        return int((self.labels[:, 1:] != -100).sum())

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


def has_examples(text: Text) -> bool:
    """Whether it is an Alpaca file, whose answers alone are learnt."""
    return text.file == text.name and is_file(text.name) and alpaca.is_named_so(text.name)


def read_data(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    tokens: int,
    held_out: int,
    batch: int,
    sampled: torch.Tensor | None = None,
) -> tuple[Data, Data]:
    """(train, held out) of a text, an Alpaca file, or `sampled` ids (n,).

    window: tokens of a window, and the longest example; windows that were given stay as they are. tokens: how much of
    the beginning to use, 0 for all. held_out: tokens at the end of that to keep apart, rounded down to whole windows,
    at least one; for examples, the last ones that have as many. Raises UnknownText, and TextTooShort where not even one
    batch is left to train on.
    """
    if has_examples(text):
        examples, empty = alpaca.read_examples(text.name)
        data = replace(_from_examples(examples, tokenizer, window, tokens), empty=empty)
        count = _rows_with(data.lengths.flip(0), held_out)
    else:
        window = text.row or window
        if sampled is not None:
            ids = cut_windows(sampled, window, start_token(tokenizer))
        else:
            ids = text.windows(tokenizer, window, tokens or None, what="recovery text")
        data = Data(ids, ids.clone(), torch.full((len(ids),), window))
        count = max(held_out // window, 1)
    if len(data) < count + batch:
        raise TextTooShort(
            f"the recovery text {text.name} has {data.tokens} tokens, too few to train on batches of {batch} x "
            f"{window} and to hold out {held_out} others; give a longer text, or a smaller --batch, --window or "
            "--held-out"
        )
    index = torch.arange(len(data))
    return data.rows(index[: len(data) - count]), data.rows(index[len(data) - count :])


def batch_rows(step: int, batch: int, count: int, seed: int) -> torch.Tensor:
    """The row numbers (batch,), below `count`, of step 0, 1, ...: every row once per epoch, in an order of its own."""
    first = step * batch
    return torch.tensor([_order(count, seed, i // count)[i % count] for i in range(first, first + batch)])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(mixed(seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def mixed(*numbers: int) -> int:
    """One seed out of several."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return seed


def _from_examples(examples: Sequence[alpaca.Example], tokenizer, window: int, tokens: int) -> Data:
    """Examples cut to `window` tokens; those whose answer is cut away altogether are left out."""
    rows: list[tuple[list[int], list[int]]] = []
    total = left_out = 0
    for example in examples:
        ids, labels = alpaca.tokenize(example, tokenizer)
        ids, labels = ids[:window], labels[:window]
        if all(label == -100 for label in labels):
            left_out += 1
            continue
        rows.append((ids, labels))
        total += len(ids)
        if tokens and total >= tokens:
            break
    if tokens and total < tokens:
        raise TextTooShort(f"the examples have {total} tokens, but {tokens} were asked for; ask for fewer")
    if not rows:
        raise BadOption(f"no example has an answer within {window} tokens; give a larger --window")
    longest = max(len(ids) for ids, _ in rows)
    return Data(  # padded with token 0, which every model has
        torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
        torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
        torch.tensor([len(ids) for ids, _ in rows]),
        left_out,
    )


def _rows_with(lengths: torch.Tensor, tokens: int) -> int:
    """How many of the first rows have `tokens` together (all of them if they have fewer)."""
    return min(int((lengths.cumsum(0) < tokens).sum()) + 1, len(lengths))
