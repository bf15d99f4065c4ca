"""The grid of depth against width: every cell is what prune makes, the best is the best, a kill costs one cell."""

import json

import pytest

import kvprune
from kvprune.errors import BadOption, OutputExists
from kvprune.runtime.modeling import PrunedAttention, Skipped
from kvprune.studies import depth as module
from kvprune.studies import depth_speed as speed
from kvprune.studies.depth import best_of, loss_of, sentence
from tiny import COARSE, stop

QUICK = {name: value for name, value in COARSE.items() if name != "windows"} | {"window": 64}
TIMED = {"batch": 2, "context": 20, "new_tokens": 4, "rounds": 2}
ASKED = {"ratios": (0.25, 0.5), "depths": (0, 1), "drop_blocks": (0, 1, 2), "speed": False, **TIMED, **QUICK}


def keys(cells):
    return [(cell["ratio"], cell["drop_blocks"], cell["depth"]) for cell in cells]


def test_the_grid(checkpoint, texts, tmp_path):
    report = kvprune.study_depth(checkpoint, tmp_path / "out", **ASKED)
    assert json.loads((tmp_path / "out" / "study.json").read_text()) == report
    assert (tmp_path / "out" / "study.png").read_bytes()[:4] == b"\x89PNG"
    # Of four layers, a quarter is one
    assert keys(report["cells"]) == [
        (0.25, 0, 0), (0.25, 0, 1), (0.25, 1, 0), (0.5, 0, 0), (0.5, 0, 1), (0.5, 1, 0), (0.5, 1, 1), (0.5, 2, 0)
    ]  # fmt: skip
    alone = kvprune.prune(checkpoint, ratio=0.5, depth=1, drop_blocks=1, **COARSE | {"windows": (64,)})
    cell = report["cells"][6]
    (row,) = alone.record["perplexity"]
    assert row in cell["perplexity"]
    assert cell["blocks"] == alone.record["dropped_blocks"]
    without = [i for i, width in enumerate(alone.record["widths"]) if not width]
    assert sorted(cell["blocks"] + cell["dropped"]) == without
    assert cell["parameters"] == alone.record["parameters"]
    for cell in report["cells"]:
        kv = cell["kv_bytes_per_token"]
        assert kv["pruned"] / kv["dense"] == pytest.approx(1 - cell["ratio"], abs=0.02)
        assert (len(cell["blocks"]), len(cell["dropped"])) == (cell["drop_blocks"], cell["depth"])
        assert cell["speed"] is None
        assert "config" not in cell
    for ratio in ("0.25", "0.5"):
        cells = [cell for cell in report["cells"] if f"{cell['ratio']:g}" == ratio]
        losses = {(cell["drop_blocks"], cell["depth"]): loss_of(cell) for cell in cells}
        assert losses[report["best_blocks"][ratio], report["best"][ratio]] == min(losses.values())


def test_speed_is_added_without_a_prune(checkpoint, texts, tmp_path, monkeypatch):
    asked = ASKED | {"ratios": (0.5,), "drop_blocks": (0, 1), "dtype": "float32"}
    before = kvprune.study_depth(checkpoint, tmp_path / "out", **asked)
    monkeypatch.setattr(module, "prune", stop)
    made = []
    own = speed.random_model
    monkeypatch.setattr(speed, "random_model", lambda *args: made.append(own(*args)) or made[-1])
    report = kvprune.study_depth(checkpoint, tmp_path / "out", **asked | {"speed": True}, resume=True)
    assert len(made) == 5
    assert not isinstance(made[0].model.layers[0].self_attn, PrunedAttention)
    assert [{**cell, "speed": None} for cell in report["cells"]] == before["cells"]
    for cell, model in zip(report["cells"], made[1:], strict=True):
        assert sum(p.numel() for p in model.parameters()) == cell["parameters"]["pruned"]
        assert [i for i, layer in enumerate(model.model.layers) if isinstance(layer, Skipped)] == cell["blocks"]
        weights = cell["weights_read_bytes"]
        kv = {side: 2 * 22 * held for side, held in cell["kv_bytes_per_token"].items()}  # half of 4 steps behind 20
        limit = (weights["dense"] + kv["dense"]) / (weights["pruned"] + kv["pruned"])
        assert cell["speed"]["decode_limit"] == pytest.approx(limit)
        low, high = cell["speed"]["spread"]
        assert 0 < low <= cell["speed"]["decode_ratio"] <= high
    assert "Decodes fastest" in report["said"]
    monkeypatch.setattr(speed, "random_model", stop)
    again = kvprune.study_depth(checkpoint, tmp_path / "out", **asked | {"speed": True}, resume=True)
    assert again == report


def test_a_stopped_study_goes_on(checkpoint, texts, tmp_path, monkeypatch):
    whole = kvprune.study_depth(checkpoint, tmp_path / "whole", **ASKED)
    own, made = module.prune, []

    def counted(*args, **kwargs):
        if len(made) == 2:
            stop()
        made.append(kwargs["ratio"])
        return own(*args, **kwargs)

    monkeypatch.setattr(module, "prune", counted)
    with pytest.raises(RuntimeError, match="stopped"):
        kvprune.study_depth(checkpoint, tmp_path / "out", **ASKED)
    monkeypatch.setattr(module, "prune", own)
    with pytest.raises(OutputExists, match="add --resume"):
        kvprune.study_depth(checkpoint, tmp_path / "out", **ASKED)
    report = kvprune.study_depth(checkpoint, tmp_path / "out", resume=True, **ASKED)

    def timeless(cells):
        return [{name: value for name, value in cell.items() if name != "seconds"} for cell in cells]

    assert timeless(report["cells"]) == timeless(whole["cells"])


def test_the_best_and_its_sentence():
    def cell(blocks, depth, *ratios, speed=None):
        speed = speed and {"decode_ratio": speed}
        return {"drop_blocks": blocks, "depth": depth, "speed": speed,
                "perplexity": [{"dense": 2.0, "pruned": 2 * ratio} for ratio in ratios]}  # fmt: skip

    assert loss_of(cell(0, 0, 2.0, 8.0)) == pytest.approx(4)
    assert best_of([cell(0, 0, 1.1, 1.3), cell(0, 1, 1.1, 1.2), cell(2, 0, 1.2, 1.3)])["depth"] == 1
    assert best_of([cell(1, 0, 1.1), cell(0, 1, 1.1)])["depth"] == 1
    quarter = [cell(0, 0, 1.1, speed=1.1), cell(2, 1, 1.25, speed=1.2)]
    half = [cell(0, 0, 1.3, speed=1.4), cell(1, 0, 1.2, speed=1.3)]
    said = sentence({"0.25": quarter, "0.5": half})
    assert said == (
        "Loses least: at 25% of the KV bytes width alone; at 50% of the KV bytes 1 block dropped. Decodes fastest: "
        "at 25% of the KV bytes 2 blocks dropped and 1 layer without attention (1.20 times dense, perplexity 1.250 "
        "times); at 50% of the KV bytes width alone (1.40 times dense, perplexity 1.300 times)."
    )
    half[0]["speed"] = None
    assert "Decodes" not in sentence({"0.5": half})


@pytest.mark.parametrize(("options", "message"), [
    ({"depths": (1, 2)}, "with 0 among them"),
    ({"drop_blocks": (1, 2)}, "with 0 among them"),
    ({"drop_blocks": (-1, 0)}, "with 0 among them"),
    ({"context": 126}, "130 together, the model takes 128"),
    ({"rounds": 0}, "--rounds must be at least 1"),
    ({"ratios": ()}, "needs ratios above 0"),
])  # fmt: skip
def test_what_cannot_be(checkpoint, texts, tmp_path, options, message):
    with pytest.raises(BadOption, match=message):
        kvprune.study_depth(checkpoint, tmp_path / "out", **{**ASKED, **options})
    assert not (tmp_path / "out").exists()


def test_the_command(checkpoint, texts, tmp_path, command):
    small = ["--calibration-tokens", "512", "--repair-tokens", "4096", "--eval-tokens", "512", "--window", "64"]
    small += ["--align", "2", "--min-width", "4", "--ratio", "0.5", "--depth", "0", "--depth", "1"]
    small += ["--drop-blocks", "0", "--drop-blocks", "1", "--batch", "1", "--context", "20", "--new-tokens", "4"]
    code, out, err = command("study", "depth", checkpoint, "--out", tmp_path / "out", *small)
    assert code == 0, err
    assert "without attention" in out
    assert "Loses least" in out
    assert "Decodes fastest" in out
