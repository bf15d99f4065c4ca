"""The report as a file: it stands alone, says what the records say, and refuses what it cannot show."""

import base64
import json
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

import kvprune
from kvprune import errors
from kvprune.pages import figures
from kvprune.pages import report as page
from kvprune.runtime import files


@pytest.fixture
def pruned(pruned_half, tmp_path):
    shutil.copytree(pruned_half, tmp_path / "half")
    return tmp_path / "half"


class Page(HTMLParser):
    """Addresses, words and the names of what was opened and not closed."""

    VOID = ("meta", "source", "img", "link", "br")

    def __init__(self, text):
        super().__init__()
        self.addresses, self.words, self.open, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_it_stands_alone_and_says_what_was_measured(checkpoint, pruned, tmp_path):
    bench = tmp_path / "bench.json"
    kvprune.bench(checkpoint, pruned, context=[8], new_tokens=2, rounds=1, out=bench, device="cpu")
    path = kvprune.report(pruned, bench=bench)
    assert path == pruned / "report.html"
    found = Page(path.read_text())
    assert not found.open
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert len(found.addresses) == 8  # four figures, light and dark
    for address in found.addresses:
        kind, data = address.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    words = " ".join(" ".join(found.words).split())
    record = kvprune.read_record(pruned)
    for row in record["perplexity"]:
        assert f"{row['dense']:.2f}" in words
        assert f"{row['pruned'] / row['dense']:.3f}" in words
    assert f"{record['kv_bytes_per_token']['pruned']:,} in this one" in words
    read = record["weights_read_bytes"]
    assert f"reads {read['dense']:,} bytes of weights in the dense model, {read['pruned']:,} in this one" in words
    assert "2 KV heads merged into 1." in words
    assert "variance" in words
    cell = json.loads(bench.read_text())["cells"][0]
    assert f"{cell['decode_tokens_per_second']['pruned']:.1f}" in words
    for name in ("plan", "quality", "speed", "memory"):
        assert (pruned / f"report-{name}.png").read_bytes().startswith(b"\x89PNG")
    kvprune.load(pruned)  # whose checksums do not mind


def test_the_quality_figure_has_every_folder(pruned):
    record = kvprune.read_record(pruned)
    less = json.loads(json.dumps(record))
    less["kv_bytes_per_token"]["pruned"] //= 2
    rows = page.quality_rows([("a", record), ("b", less)])
    assert [row["name"] for row in rows] == ["a"] * len(record["perplexity"]) + ["b"] * len(record["perplexity"])
    assert [row["share"] for row in rows] == [0.5] * len(record["perplexity"]) + [0.25] * len(record["perplexity"])
    for row, judged in zip(rows, record["perplexity"], strict=False):
        assert row["ratio"] == judged["pruned"] / judged["dense"]


def test_each_record_is_read_once(pruned, monkeypatch):
    """What is compared with the checksums is what is shown, also while someone writes the folder anew."""
    shutil.copytree(pruned, pruned.with_name("other"))
    read, seen = files.read_json, []
    monkeypatch.setattr(files, "read_json", lambda path: seen.append(path.parent.name) or read(path))
    kvprune.report(pruned, others=[pruned.with_name("other"), pruned])
    assert sorted(seen) == ["half", "other"]


@pytest.mark.parametrize(("merge", "whole"), [(None, 32), (1, 32), (2, 64)])
def test_bars_of_widths_stand_before_those_of_the_dense_heads(pruned, merge, whole):
    """None: a record of an older version."""
    record = kvprune.read_record(pruned) | {"merge": merge, "sensitivity": None}
    if merge is None:
        del record["merge"]
    (panel,) = figures.plan(record).axes
    dense, kept = ([bar.get_height() for bar in bars] for bars in panel.containers)
    assert (dense, kept) == ([whole] * 4, record["widths"])
    assert [text.get_text() for text in panel.get_legend().get_texts()] == [f"dense, {whole}", "kept"]


def test_folders_of_one_name_are_told_apart(pruned, tmp_path, monkeypatch):
    (tmp_path / "more").mkdir()
    shutil.copytree(pruned, tmp_path / "more" / "half")
    found = []
    real = page.quality_rows
    monkeypatch.setattr(page, "quality_rows", lambda records: found.extend(records) or real(records))
    monkeypatch.chdir(pruned)
    text = kvprune.report(".", others=[tmp_path / "more" / "half", pruned]).read_text()
    assert [name for name, _ in found] == ["half", "half"]  # and the folder itself once
    assert "half" in " ".join(Page(text).words)


def test_a_record_of_an_older_version(pruned):
    record = json.loads((pruned / "kvprune.json").read_text())
    for name in ("merge", "kv_heads", "weights_read_bytes"):
        del record[name]
    (pruned / "kvprune.json").write_text(json.dumps(record))
    words = " ".join(Page(kvprune.report(pruned).read_text()).words)
    assert "in this one" in words
    assert "merged" not in words
    assert "bytes of weights" not in words


def test_names_are_escaped(pruned, tmp_path):
    record = json.loads((pruned / "kvprune.json").read_text())
    record["source"] = "<script>alert(1)</script>"
    (pruned / "kvprune.json").write_text(json.dumps(record))
    text = kvprune.report(pruned, out=tmp_path / "page.html").read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_warnings():
    row = {"text": "a", "window": 64, "tokens": 10000, "dense": 10.0, "pruned": 11.0}
    record = {"calibration": {"text": "b"}, "perplexity": [row]}
    assert page.warnings(record, None) == []
    assert "calibrated" in page.warnings({**record, "calibration": {"text": "a"}}, None)[0]
    assert "rough" in page.warnings({**record, "perplexity": [{**row, "tokens": 100}]}, None)[0]
    assert "one and a half" in page.warnings({**record, "perplexity": [{**row, "pruned": 16.0}]}, None)[0]
    assert "adapts" in page.warnings({**record, "recovered": {"text": "b", "loss": "next-token"}}, None)[0]
    slow = {"batch": 1, "context": 8, "spread": {"decode": [0.8, 0.9]}}
    found = page.warnings(record, {"cells": [slow, {"error": "out of memory"}]})
    assert "slower at batch 1" in found[0]
    assert "out of memory" in found[1]


def test_what_it_refuses(command, pruned, tmp_path):
    (tmp_path / "wrong.json").write_text("{}")
    (tmp_path / "none-there.json").write_text('{"cells": [{}], "environment": {"device": "x"}}')
    shutil.copytree(pruned, tmp_path / "stranger")
    record = json.loads((pruned / "kvprune.json").read_text())
    (tmp_path / "stranger" / "kvprune.json").write_text(json.dumps({**record, "source": "another"}))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "kvprune.json").write_text('{"files": {}}')
    for options, error in (
        ({"bench": tmp_path / "none-there.json"}, errors.BrokenCheckpoint),
        ({"others": [tmp_path / "stranger"]}, errors.BadOption),
        ({"others": [tmp_path / "damaged"]}, errors.BrokenCheckpoint),
        ({"out": tmp_path / "nowhere" / "page.html"}, errors.BadOption),
        ({"bench": tmp_path / "none.json"}, errors.BadOption),
        ({"bench": tmp_path / "wrong.json"}, errors.BrokenCheckpoint),
        ({"out": tmp_path / "page.txt"}, errors.BadOption),
        ({"others": [tmp_path]}, errors.BrokenCheckpoint),
    ):
        with pytest.raises(error):
            kvprune.report(pruned, **options)
    assert not (pruned / "report.html").exists()
    for words in (["show", tmp_path / "damaged"], ["report", tmp_path / "damaged"], ["report", tmp_path]):
        code, _, err = command(*words)
        assert code == 2
        assert "kvprune.json" in err


def test_a_folder_that_was_trained_further(pruned, texts, command, caplog):
    """show, report and eval work, and say that the record's figures are not those of the weights."""
    model = kvprune.load(pruned, device="cpu")
    model.lm_head.weight.data *= 1.5
    model.save_pretrained(pruned)
    record = kvprune.read_record(pruned)
    files._noted.clear()
    code, out, _ = command("show", pruned, "--json")
    assert (code, json.loads(out)) == (0, record)
    assert [files.CHANGED in entry.message for entry in caplog.records if entry.name == "kvprune"] == [True]
    words = " ".join(Page(kvprune.report(pruned).read_text()).words)
    assert files.CHANGED in words
    (row,) = kvprune.evaluate(pruned, window_lengths=(64,), tokens=512)["perplexity"]
    assert row["values"] != [pytest.approx(record["perplexity"][0]["pruned"], rel=1e-3)]
