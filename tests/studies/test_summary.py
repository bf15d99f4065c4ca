"""The figures of a study against the statistics module and by hand."""

import statistics

import pytest

from kvprune.studies.summary import summarise


def cells(values):
    """values: {(text, tokens): [ratio a seed]}; dense is 10 on `a`, 20 on `b`, where the excess is double."""
    return [
        {
            "text": text,
            "tokens": tokens,
            "seed": seed,
            "perplexity": [
                {"text": "a", "dense": 10.0, "pruned": 10.0 * ratio},
                {"text": "b", "dense": 20.0, "pruned": 20.0 * (2 * ratio - 1)},
            ],
        }
        for (text, tokens), ratios in values.items()
        for seed, ratio in enumerate(ratios)
    ]


VALUES = {
    ("x", 8): [1.5, 1.7, 1.3],
    ("x", 64): [1.2, 1.25, 1.21],
    ("y", 8): [2.0, 1.9, 2.2],
    ("y", 64): [1.4, 1.4, 1.4],
}


def test_rows():
    rows, _ = summarise(cells(VALUES))
    assert [(row["eval"], row["text"], row["tokens"]) for row in rows] == [(e, *key) for e in "ab" for key in VALUES]
    for row in rows:
        expected = VALUES[row["text"], row["tokens"]]
        if row["eval"] == "b":
            expected = [2 * value - 1 for value in expected]
        assert row["seeds"] == 3
        assert row["mean"] == pytest.approx(statistics.mean(expected))
        assert row["stdev"] == pytest.approx(statistics.stdev(expected), abs=1e-12)
        assert (row["min"], row["max"]) == pytest.approx((min(expected), max(expected)))


def test_overall():
    _, (a, b) = summarise(cells(VALUES))
    every = [value for values in VALUES.values() for value in values]
    assert (a["cells"], a["min"], a["max"]) == (12, 1.2, 2.2)
    assert a["stdev"] == pytest.approx(statistics.stdev(every))
    assert a["relative"] == pytest.approx(2.2 / 1.2 - 1)
    assert a["by_seed"] == pytest.approx(0.4)  # of x at 8
    assert a["by_text"] == pytest.approx(6.1 / 3 - 1.5)  # at 8
    assert a["by_tokens"] == pytest.approx(6.1 / 3 - 1.4)  # of y
    assert b["by_seed"] == pytest.approx(0.8)


def test_what_does_not_vary_has_no_figure():
    (row, _), (overall, _) = summarise(cells({("x", 8): [1.5]}))
    assert (row["mean"], row["stdev"]) == (1.5, None)
    assert [overall[name] for name in ("stdev", "by_seed", "by_text", "by_tokens")] == [None] * 4
