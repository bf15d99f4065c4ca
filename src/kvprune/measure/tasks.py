"""Tasks of lm-evaluation-harness on a loaded model: accuracies with standard errors."""

import copy
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvprune.errors import BadOption
from kvprune.models.check import first_line
from kvprune.models.tokenizer import check_ids
from kvprune.progress import replaced

Phase = Callable[[int], AbstractContextManager[Callable[[int], None]]]  # total -> advance(steps): see Progress
BATCH = 16
RESAMPLES = 1000  # for standard errors that no formula gives
PIQA = {  # as lm-eval has it, but for where the rows come from
    "task": "piqa",
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "doc_to_text": "Question: {{goal}}\nAnswer:",
    "doc_to_target": "label",
    "doc_to_choice": "{{[sol1, sol2]}}",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}


def load_tasks(names: Sequence[str]) -> list[Any]:
    """Names of lm-eval's tasks or groups, or paths of task .yaml files -> what `run_tasks` takes, its data fetched.

    Data comes from the hub; piqa's from piqa-valid.jsonl and piqa-valid-labels.lst (the data set's own files) where
    the folder that $KVPRUNE_DATA names has them. Raises BadOption: lm-eval is missing, no such task, no data.
    """
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError:
        raise BadOption("tasks are run by lm-evaluation-harness, which is missing: pip install lm-eval") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager()
    for name in names:
        if name not in manager.all_tasks and not (name.endswith(".yaml") and Path(name).is_file()):
            raise BadOption(f"unknown task {name!r}; give names that `lm-eval ls tasks` shows, or .yaml files")
    with _without_bars():
        return [_load(manager, name) for name in dict.fromkeys(names)]


@contextmanager
def _without_bars() -> Iterator[None]:
    """Within, data is fetched and read without the bars of `datasets`."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@functools.cache
def _manager() -> Any:
    """lm-eval's list of all its tasks, which takes it many seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(manager: Any, name: str) -> Any:
    rows = local_rows(name)
    if rows is not None:
        return _over_rows(rows)
    try:
        manager.load(name)  # the data stays in the hub's cache
    except Exception as error:  # the hub's errors have no common class
        reason = first_line(error)
        raise BadOption(
            f"task {name!r} did not load: {reason}; without a network give a task .yaml whose data_files are local"
        ) from error
    return name


def local_rows(name: str) -> list[dict[str, Any]] | None:
    """piqa's validation rows {"goal", "sol1", "sol2", "label"} from $KVPRUNE_DATA, or None. Raises BadOption."""
    folder = os.environ.get("KVPRUNE_DATA")
    if name != "piqa" or not folder:
        return None
    rows, labels = Path(folder) / "piqa-valid.jsonl", Path(folder) / "piqa-valid-labels.lst"
    if not (rows.is_file() and labels.is_file()):
        return None
    try:
        questions = [json.loads(line) for line in rows.read_text(encoding="utf-8-sig").splitlines()]
        answers = [int(line) for line in labels.read_text(encoding="utf-8-sig").split()]
        return [
            {name: str(question[name]) for name in ("goal", "sol1", "sol2")} | {"label": (0, 1).index(answer)}
            for question, answer in zip(questions, answers, strict=True)
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise BadOption(f"{rows} and {labels} are not PIQA's questions and answers: {error}") from None


def _over_rows(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(config={**PIQA, "custom_dataset": lambda **_: {"validation": Dataset.from_list(rows)}})


@contextmanager
def _as_phases(phase: Phase) -> Iterator[None]:
    """Every bar that lm-eval shows while a model answers becomes a phase; its other bars are left out."""
    from lm_eval.api import model, task
    from lm_eval.models import huggingface

    with ExitStack() as shown:  # one at a time; what an error leaves open ends with it

        def bar(rows: Any = None, total: int = 1, **_: Any) -> Any:
            if rows is not None:
                return rows
            advance = shown.enter_context(phase(total))
            return SimpleNamespace(update=advance, close=shown.close)

        with replaced(huggingface, tqdm=bar), replaced(model, tqdm=bar), replaced(task, tqdm=bar):
            yield


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    limit: int | None = None,
    phase: Phase = lambda total: nullcontext(lambda steps: None),
) -> list[dict[str, Any]]:
    """[{"task", "metric", "samples", "value", "stderr"}] of a model on what `load_tasks` returned.

    No examples stand in the prompt unless a task brings its own. limit: the first so many samples of each task. A
    metric behind one of lm-eval's filters is called "metric, filter". phase: is entered with a number of requests, and
    told of those that are answered, in place of lm-eval's own bars. Raises BadOption for a task without figures.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    rows = model.config.vocab_size
    if tokenizer.pad_token_id is not None and not 0 <= tokenizer.pad_token_id < rows:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token  # masked, but the model must have it
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH)
    # its own words go where they do not mix with what we print
    with _as_phases(phase), redirect_stdout(sys.stderr), _checked_ids(model, "a task's text"):
        found = simple_evaluate(
            wrapped,
            tasks=list(tasks),
            task_manager=_manager(),  # or it makes one again
            limit=limit,
            log_samples=False,
            bootstrap_iters=RESAMPLES,
        )
    assert found is not None  # None only on the other ranks of a distributed run
    table = []
    for name, figures in found["results"].items():
        samples = found["n-samples"].get(name, {}).get("effective")
        for key, value in figures.items():
            metric, _, chosen = key.partition(",")
            if chosen and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                error = figures.get(f"{metric}_stderr,{chosen}")
                row = {"metric": metric if chosen == "none" else f"{metric}, {chosen}", "samples": samples}
                table.append({"task": name, **row, "value": value, "stderr": error})
    if not table:
        raise BadOption(f"lm-eval found no figures for {', '.join(found['results'])}; check the metrics of the task")
    return table


@contextmanager
def _checked_ids(model: PreTrainedModel, what: str) -> Iterator[None]:
    """Raises TokenizerMismatch for every token that reaches the model without a row of its embedding."""

    def check(embedding: Any, args: tuple) -> None:
        check_ids(args[0], embedding.num_embeddings, what)

    hook = model.get_input_embeddings().register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()
