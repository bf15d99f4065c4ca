"""The scaling study is bench's own figures, arranged."""

import json

import pytest

import kvprune
from kvprune import errors

QUICK = {"batch": "1,2", "context": "8,64", "new_tokens": 4, "rounds": 1, "device": "cpu"}


def test_the_study_is_the_bench(checkpoint, tmp_path):
    report = kvprune.study_scaling(checkpoint, tmp_path / "out", **QUICK)
    assert json.loads((tmp_path / "out" / "study.json").read_text()) == report
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["cells"] == report["cells"]
    assert (tmp_path / "out" / "study.png").stat().st_size > 10_000
    model = kvprune.load(checkpoint)
    weights = sum(p.nbytes for p in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes  # of which a step reads a row
    a_token = 4 * 2 * 2 * 32 * model.dtype.itemsize
    assert [(row["batch"], row["context"]) for row in report["scaling"]] == [(1, 8), (2, 8), (1, 64), (2, 64)]
    for row, cell in zip(report["scaling"], report["cells"], strict=True):
        cache = row["batch"] * (row["context"] + 2) * a_token  # half way
        assert row["kv_share"] == pytest.approx(cache / (cache + weights))
        assert (row["decode_ratio"], row["decode_limit"]) == (cell["decode_ratio"], cell["decode_limit"])
        assert row["kv_bytes_saved"] == 0


def test_what_cannot_be_studied(checkpoint, tmp_path):
    with pytest.raises(errors.BadOption, match="the model takes"):
        kvprune.study_scaling(checkpoint, tmp_path / "out", context=10**6)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    with pytest.raises(errors.OutputExists, match="not empty"):
        kvprune.study_scaling(checkpoint, tmp_path / "full")
