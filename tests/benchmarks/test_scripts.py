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


@pytest.mark.parametrize("merge", ["auto", "1"])
def test_the_grid_of_shapes(checkpoint, tmp_path, monkeypatch, merge):
    words = ("--batch", 1, 3, "--context", 8, 64, 4096, "--new-tokens", 2, "--rounds", 1, "--device", "cpu")
    run(
        monkeypatch,
        "shapes_grid",
        checkpoint,
        *words,
        "--dtype",
        "float32",
        "--merge",
        merge,
        "--out",
        tmp_path / "grid",
    )
    cells = json.loads((tmp_path / "grid.json").read_text())["cells"]
    assert list(cells) == ["tiny-llama, 8", "tiny-llama, 64"]  # it takes no 4,096
    lines = (tmp_path / "grid.md").read_text().splitlines()[4:]
    found = [cell for report in cells.values() for cell in report["cells"]]
    assert len(lines) == len(found) == 4
    for line, cell in zip(lines, found, strict=True):
        columns = [column.strip() for column in line.strip("|").split("|")]
        held = [cell["memory_bytes"][side]["kv_cache"] for side in ("dense", "pruned")]
        assert held[0] == 2 * held[1] == cell["batch"] * cell["context"] * 4 * 2 * 2 * 32 * 4
        assert columns[1] == ("2" if merge == "auto" else "1")
        assert columns[5] == "yes"
        wide = 4 * 2 * 4 * 16 * 48 if merge == "auto" else 0  # Q and O stay as they are, for a width of 32
        read = [side["weights"] for side in cell["decode_bytes_read"].values()]
        assert columns[6] == f"{read[0] / 1e9:.3g} / {read[1] / 1e9:.3g}"
        assert read[0] - read[1] == 4 * (4 * (2 * 4 + 2 * 2) * 16 * 48 - wide)
        assert columns[10] == ("yes" if cell["decode_ratio"] >= 1.35 else "no")
        assert columns[8].startswith(f"{cell['decode_ratio']:.2f}")


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


def test_speed_against_bytes_of_merged_heads(checkpoint, pruned_half, tmp_path, monkeypatch):
    words = ("--batch", 2, "--context", 64, "--new-tokens", 2, "--rounds", 1, "--only", "half: as it is")
    run(monkeypatch, "kv_speed", checkpoint, f"half={pruned_half}", *words, "--out", tmp_path / "s")
    (cell,) = json.loads((tmp_path / "s.json").read_text())["cells"].values()
    models = {"dense": kvprune.load(checkpoint), "pruned": kvprune.load(pruned_half)}
    read = {}
    for side, model in models.items():
        width = sum(layer.self_attn.head_dim for layer in model.model.layers)
        kv = 2 * 65 * 2 * model.config.num_key_value_heads * width * model.dtype.itemsize
        weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
        read[side] = {"all": weights + kv, "weights": weights, "kv_cache": kv}
    assert cell["decode_bytes_read"] == read
    assert cell["decode_limit"] == read["dense"]["all"] / read["pruned"]["all"]
    assert f"| half | as it is | 50.0% | {cell['decode_ratio']:.2f} |" in (tmp_path / "s.md").read_text()


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


@pytest.fixture
def long_model(tmp_path):
    """A folder with a model that takes windows of 512."""
    model = tiny_model("llama", groups=2, head_dim=32, positions=512)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_table_of_methods_is_what_prune_does(long_model, texts, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("methods_table")
    monkeypatch.setattr(script, "SCORE_TOKENS", 2048)
    monkeypatch.setattr(script, "EVAL_TOKENS", 1024)
    bench = script.Bench(str(long_model), tmp_path / "table")
    bench.measure("ptb", 0.25, "l1", "joint", "sensitivity")
    own = {"importance": "l1", "channels": "joint", "allocation": "sensitivity", "probes": "measured", "repair": "none"}
    own |= {"calibration": "ptb", "calibration_tokens": 2048, "probe_tokens": 2048, "eval": ("ptb",)}
    result = kvprune.prune(long_model, ratio=0.25, eval_tokens=1024, windows=(512,), **own)
    (found,) = json.loads((tmp_path / "table.json").read_text())["perplexity"].values()
    assert found == pytest.approx(result.record["perplexity"][0]["pruned"])
    assert result.record["merge"] == 1


def test_old_rows_of_quality_are_made_as_they_were(long_model, texts, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script, cells = (importlib.import_module(name) for name in ("quality", "cells"))
    monkeypatch.setattr(script, "WINDOWS", (64,))
    monkeypatch.setattr(script, "TOKENS", 512)
    bench = script.Bench(str(long_model), tmp_path, cells.Cells(tmp_path / "out", str(long_model), []))
    few = {"calibration_tokens": 1024, "repair_tokens": 1024, "probe_tokens": 512, "keep": False}
    bench.prune("apart", 0.5, **few)
    bench.prune("merged", 0.5, merge="auto", **few)
    bench.prune("paper", 0.5, calibration_tokens=1024, probe_tokens=512, keep=False, preset="kvpruner")
    found = json.loads((tmp_path / "out.json").read_text())["cells"]
    assert {name: cell["merge"] for name, cell in found.items()} == {"apart": 1, "merged": 2, "paper": 1}
    assert found["apart"]["method"]["probes"] == "measured"
    assert len({cell["kv_bytes_per_token"]["pruned"] for cell in found.values()}) == 1
    read = {name: cell["weights_read_bytes"]["pruned"] for name, cell in found.items()}
    assert read["apart"] == read["paper"] < read["merged"]


def test_what_a_prune_costs(long_model, texts, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("prune_cost")
    monkeypatch.setattr(script, "TOKENS", 1024)
    few = {"calibration_tokens": 1024, "repair_tokens": 1024, "eval_tokens": 512, "windows": (64,)}
    monkeypatch.setattr(script, "SETTINGS", {name: {**how, **few} for name, how in script.SETTINGS.items()})
    words = ("--only", "default*", "--dtype", "float32", "--out", tmp_path / "cost")
    run(monkeypatch, "prune_cost", long_model, *words)
    found = json.loads((tmp_path / "cost.json").read_text())["cells"]
    assert {name: cell.get("merge") for name, cell in found.items()} == {
        "dense": None,
        "default": 2,
        "default, heads apart": 1,
    }
    dense = found["dense"]["perplexity"]
    for line in (tmp_path / "cost.md").read_text().splitlines()[2:]:
        name, first, second, *_ = [column.strip() for column in line.strip("|").split("|")]
        for shown, text in ((first, "wikitext2"), (second, "ptb")):
            assert shown == f"{found[name]['perplexity'][text] / dense[text]:.3f}"


def test_steps_that_are_graphs(tmp_path, monkeypatch):
    """Without a GPU the same steps, run as they are."""
    checkpoint = tmp_path / "model"
    tiny_model("llama", groups=2, head_dim=32, layers=4, positions=512).save_pretrained(checkpoint)
    words = ("--cells", "2x200", "--rounds", 1, "--device", "cpu", "--dtype", "float32", "--out", tmp_path / "graph")
    run(monkeypatch, "graph_speed", checkpoint, *words)
    cells = json.loads((tmp_path / "graph.json").read_text())["cells"]
    assert len(cells) == 4
    for cell in cells.values():
        for part in ("prefill", "eager", "graph"):
            assert cell[part]["ratio"] == pytest.approx(cell[part]["ms"]["dense"] / cell[part]["ms"]["other"])
    limits = [cell["graph"]["limit"] for cell in cells.values()]
    assert 1 < limits[0] < 2
    assert limits[2] < limits[3] < 2 * limits[1]
    assert len((tmp_path / "graph.md").read_text().splitlines()) == 2 + len(cells)


def test_the_picture_shows_what_the_tables_say(monkeypatch):
    """Each point from the tables that other scripts wrote, rounded there."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    picture = importlib.import_module("kv_picture")
    results = SCRIPTS / "results"

    def rows(name):
        return [[cell.strip("* ") for cell in line.strip("|").split("|")] for line in (results / name).open()]

    curve = {f"{row[0]}: {row[1]}": row[4:6] for row in rows("kv_curve_2048.md") if len(row) > 5}
    for name in ("dense: 2 bits", "dense: 50% of tokens kept", "merged-0.5, distilled: 4 bits, 50% of tokens kept"):
        share, ratio = picture.read_as(name)
        assert [f"{share:.1%}", f"{ratio:.3f}"] == curve[name]
    others = {(row[0], row[1]): row[3].split()[0] for row in rows("kv_peers.md") if len(row) > 3}
    for name in (*picture.PRESSES, "ours, key-distance"):
        assert [f"{ratio:.3f}" for _, ratio in picture.peers(name)] == [others[name, f"{k:.0%}"] for k in picture.KEEPS]
    quality = {row[0]: row[10] for row in rows("quality.md") if len(row) > 10}
    for name in ("paper {}", "closed form {}", "merged {}", "merged {}, distilled"):
        assert [f"{ratio:.3f}" for _, ratio in picture.widths(name)] == [
            quality[name.format(k)] for k in (0.25, 0.5, 0.75)
        ]
