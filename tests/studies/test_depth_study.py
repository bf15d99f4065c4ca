"""The grid of depth against width: every cell is what prune makes, the best is the best, a kill costs one cell."""

import json

import pytest

import kvprune
from kvprune.errors import BadOption, OutputExists
from kvprune.studies import depth as module
from kvprune.studies.depth import best_of, loss_of, sentence
from tiny import COARSE, stop

QUICK = {name: value for name, value in COARSE.items() if name != "windows"} | {"window": 64}
ASKED = {"ratios": (0.25, 0.5), "depths": (0, 1, 2), **QUICK}


def test_the_grid(checkpoint, texts, tmp_path):
    report = kvprune.study_depth(checkpoint, tmp_path / "out", **ASKED)
    assert json.loads((tmp_path / "out" / "study.json").read_text()) == report
    assert (tmp_path / "out" / "study.png").read_bytes()[:4] == b"\x89PNG"
    found = [(cell["ratio"], cell["depth"]) for cell in report["cells"]]
    assert found == [(0.25, 0), (0.25, 1), (0.5, 0), (0.5, 1), (0.5, 2)]  # of four layers, a quarter is one
    alone = kvprune.prune(checkpoint, ratio=0.5, depth=1, **COARSE | {"windows": (64,)})
    cell = report["cells"][3]
    (row,) = alone.record["perplexity"]
    assert row in cell["perplexity"]
    assert cell["dropped"] == [i for i, width in enumerate(alone.record["widths"]) if not width]
    for cell in report["cells"]:
        kv = cell["kv_bytes_per_token"]
        assert kv["pruned"] / kv["dense"] == pytest.approx(1 - cell["ratio"], abs=0.02)
        assert len(cell["dropped"]) == cell["depth"]
    for ratio, best in report["best"].items():
        losses = {c["depth"]: loss_of(c) for c in report["cells"] if f"{c['ratio']:g}" == ratio}
        assert losses[best] == min(losses.values())
    assert report["said"] == sentence(report["best"])


def test_a_stopped_study_goes_on(checkpoint, texts, tmp_path, monkeypatch):
    whole = kvprune.study_depth(checkpoint, tmp_path / "whole", **ASKED)
    own, made = module.prune, []

    def counted(*args, **kwargs):
        if len(made) == 2:
            stop()
        made.append(kwargs["depth"])
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
    def cell(depth, *ratios):
        return {"depth": depth, "perplexity": [{"dense": 2.0, "pruned": 2 * ratio} for ratio in ratios]}

    assert loss_of(cell(0, 2.0, 8.0)) == pytest.approx(4)
    assert best_of([cell(0, 1.1, 1.3), cell(1, 1.1, 1.2), cell(2, 1.2, 1.3)]) == 1
    assert best_of([cell(0, 1.1), cell(1, 1.1)]) == 0
    said = sentence({"0.25": 0, "0.5": 2})
    assert said == (
        "Loses least: at 25% of the KV bytes width alone; at 50% of the KV bytes 2 layers without attention."
    )


@pytest.mark.parametrize(("options", "message"), [
    ({"depths": (1, 2)}, "with 0 among them"),
    ({"ratios": ()}, "needs ratios above 0"),
    ({"layout": "uniform"}, "layout is what a study of depth decides"),
])  # fmt: skip
def test_what_cannot_be(checkpoint, texts, tmp_path, options, message):
    with pytest.raises(BadOption, match=message):
        kvprune.study_depth(checkpoint, tmp_path / "out", **{**ASKED, **options})
    assert not (tmp_path / "out").exists()


def test_the_command(checkpoint, texts, tmp_path, command):
    small = ["--calibration-tokens", "512", "--repair-tokens", "4096", "--eval-tokens", "512", "--window", "64"]
    small += ["--align", "2", "--min-width", "4", "--ratio", "0.5", "--depth", "0", "--depth", "1"]
    code, out, err = command("study", "depth", checkpoint, "--out", tmp_path / "out", *small)
    assert code == 0, err
    assert "without attention" in out
    assert "Loses least" in out
