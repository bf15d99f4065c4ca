"""The cells of a calibration study -> what their spread is."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """mean, min, max, and the sample standard deviation (None of a single value)."""
    return {
        "mean": statistics.fmean(values),
        "min": min(values),
        "max": max(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else None,
    }


def ratios(cells: Iterable[dict[str, Any]]) -> dict[str, dict[tuple[str, int], list[float]]]:
    """Perplexity, pruned / dense: by evaluation text, then by (calibration text, tokens), a value a seed."""
    found: dict[str, dict[tuple[str, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        for row in cell["perplexity"]:
            found[row["text"]][cell["text"], cell["tokens"]].append(row["pruned"] / row["dense"])
    return found


def summarise(cells: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row per (evaluation text, calibration text, tokens), and a row per evaluation text over all cells.

    The latter say how far the ratio moves when one thing varies and the rest stays: by_seed is the largest max - min
    over seeds, by_text and by_tokens the largest distance of the means of two texts of one size, and of two sizes of
    one text. Each is None where the study has only one. relative is max / min - 1 over all cells.
    """
    rows, overall = [], []
    for judged, groups in ratios(cells).items():
        means = {key: statistics.fmean(values) for key, values in groups.items()}
        for (text, tokens), values in groups.items():
            rows.append({"eval": judged, "text": text, "tokens": tokens, "seeds": len(values), **spread(values)})
        every = [value for values in groups.values() for value in values]
        overall.append(
            {
                "eval": judged,
                "cells": len(every),
                **spread(every),
                "relative": max(every) / min(every) - 1,
                "by_seed": _largest_range(groups.values()),
                "by_text": _largest_range(_sharing(means, 1)),
                "by_tokens": _largest_range(_sharing(means, 0)),
            }
        )
    return rows, overall


def _sharing(means: dict[tuple[str, int], float], fixed: int) -> Iterable[list[float]]:
    """The means that have the same text (fixed = 0) or the same size (1)."""
    groups: dict[str | int, list[float]] = defaultdict(list)
    for key, mean in means.items():
        groups[key[fixed]].append(mean)
    return groups.values()


def _largest_range(groups: Iterable[list[float]]) -> float | None:
    return max((max(values) - min(values) for values in groups if len(values) > 1), default=None)
