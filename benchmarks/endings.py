"""A multiple-choice task from a text file: which of four endings a sentence has.

    KVPRUNE_DATA=DIR python benchmarks/endings.py SOURCE [SOURCE ...] [--text ptb] [--out benchmarks/results/endings]

Every sentence of the test split with enough words is one question, up to --questions of them, evenly spread: its first
half, then its own second half and those of three other sentences, drawn by a seed. lm-evaluation-harness judges, as in
`kvprune eval --tasks FILE.yaml`: acc takes the likeliest ending, acc_norm the likeliest a letter. OUT.json has a row a
source and metric.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import kvprune
from kvprune.progress import on_stderr
from kvprune.text.corpus import read_text

LEAST, MOST = 12, 40  # words of a sentence
TASK = """task: endings
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {rows}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{start}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


def questions(text: str, number: int, seed: int = 0) -> list[dict[str, Any]]:
    """{"start", "choices", "label"}, `number` of them at most."""
    sentences = [line.split() for line in text.splitlines()]
    sentences = [words for words in sentences if LEAST <= len(words) <= MOST]
    step = max(len(sentences) // number, 1)
    chosen = sentences[::step][:number]
    halves = [(" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])) for words in chosen]
    chance, found = random.Random(seed), []
    for i, (start, end) in enumerate(halves):
        others = chance.sample([other for j, (_, other) in enumerate(halves) if j != i and other != end], 3)
        label = chance.randrange(4)
        found.append({"start": start, "choices": [*others[:label], end, *others[label:]], "label": label})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--text", default="ptb")
    parser.add_argument("--questions", type=int, default=800)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/endings"))
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        rows, task = Path(folder) / "rows.jsonl", Path(folder) / "endings.yaml"
        made = questions(read_text(arguments.text, "test"), arguments.questions)
        rows.write_text("".join(json.dumps(row) + "\n" for row in made))
        task.write_text(TASK.format(rows=rows))
        for source in arguments.sources:
            (*rows_found,) = kvprune.evaluate(source, tasks=[str(task)], progress=on_stderr())["tasks"]
            for row in rows_found:
                value = {"metric": row["metric"], "value": row["values"][0], "stderr": row["stderr"][0]}
                found.append({"source": Path(source).name, "samples": row["samples"], **value})
                print(found[-1], flush=True)
    result = {"text": arguments.text, "questions": len(made), "rows": found}
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
