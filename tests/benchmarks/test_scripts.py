"""Benchmarks' own scripts on tiny models: what they write is what they measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from transformers import cache_utils

import kvprune
from tiny import tiny_model, tiny_tokenizer

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def run(monkeypatch, name, *words):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    script = importlib.import_module(name)
    script.main()
    return script


def test_the_grid_of_shapes(checkpoint, tmp_path, monkeypatch):
    words = ("--batch", 1, 3, "--context", 8, 64, 4096, "--new-tokens", 2, "--rounds", 1, "--device", "cpu")
    run(monkeypatch, "shapes_grid", checkpoint, *words, "--dtype", "float32", "--out", tmp_path / "grid")
    cells = json.loads((tmp_path / "grid.json").read_text())["cells"]
    assert list(cells) == ["tiny-llama, 8", "tiny-llama, 64"]  # it takes no 4,096
    lines = (tmp_path / "grid.md").read_text().splitlines()[4:]
    found = [cell for report in cells.values() for cell in report["cells"]]
    assert len(lines) == len(found) == 4
    for line, cell in zip(lines, found, strict=True):
        columns = [column.strip() for column in line.strip("|").split("|")]
        held = [cell["memory_bytes"][side]["kv_cache"] for side in ("dense", "pruned")]
        assert held[0] == 2 * held[1] == cell["batch"] * cell["context"] * 4 * 2 * 2 * 32 * 4
        assert columns[4] == "yes"
        assert columns[8] == ("yes" if cell["decode_ratio"] >= 1.35 else "no")
        assert columns[6].startswith(f"{cell['decode_ratio']:.2f}")


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="8 bits are not fp8 here")
def test_the_curve_of_quality_against_bytes(tmp_path, texts, monkeypatch):
    model = tiny_model("llama", groups=2, head_dim=32, layers=4, positions=512)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    ways = ("*: as it is", "*: 8 bits", "*: 25%*")
    words = ("--window", 256, "--only", *ways, "--out", tmp_path / "curve")
    script = run(monkeypatch, "kv_curve", tmp_path / "model", *words)
    cells = json.loads((tmp_path / "curve.json").read_text())["cells"]
    plain, bits, fewer = (cells[f"dense: {way}"]["ptb"] for way in ("as it is", "8 bits", "25% of tokens skip"))
    tokens = 256 - 64
    assert plain["kv_bytes"] == tokens * kvprune.load(tmp_path / "model").dtype.itemsize * 4 * 2 * 2 * 32
    assert bits["kv_bytes"] == tokens * 4 * 2 * 2 * 32 + 4 * 2 * 4
    assert bits["kv_bytes"] < fewer["kv_bytes"] < plain["kv_bytes"]
    judged = kvprune.evaluate(tmp_path / "model", texts=["ptb"], window_lengths=[256], tokens=script.TOKENS)
    assert plain["perplexity"] == judged["perplexity"][0]["values"][0]
    assert "| dense | 8 bits | 25.0%" in (tmp_path / "curve.md").read_text()
    points = [("a", "x", 0.5, 1.2), ("b", "x", 0.4, 1.1), ("c", "x", 0.3, 1.3)]
    assert script.best(points) == {("b", "x"), ("c", "x")}


def test_speed_against_bytes(checkpoint, tmp_path, monkeypatch):
    ways = ("other: as it is", "dense: 25%*")
    words = ("--batch", 2, "--context", 64, "--new-tokens", 2, "--rounds", 1, "--only", *ways, "--out", tmp_path / "s")
    run(monkeypatch, "kv_speed", checkpoint, f"other={checkpoint}", *words, "--layers", 1, 0)
    cells = json.loads((tmp_path / "s.json").read_text())["cells"]
    assert list(cells) == ["dense: 25% of tokens skip", "other: as it is"]
    same, fewer = (cells[name]["memory_bytes"] for name in ("other: as it is", "dense: 25% of tokens skip"))
    assert same["pruned"]["kv_cache"] == same["dense"]["kv_cache"] == fewer["dense"]["kv_cache"]
    share = fewer["pruned"]["kv_cache"] / fewer["dense"]["kv_cache"]
    assert 0.75 <= share < 1
    first, second = (tmp_path / "s.md").read_text().splitlines()[2:]
    assert first.startswith(f"| other | as it is | 100.0% | {cells['other: as it is']['decode_ratio']:.2f} |")
    assert second.startswith(f"| dense | 25% of tokens skip | {share:.1%} |")
