"""What the tables say of a record, word by word."""

import io

import pytest
from rich.console import Console

import kvprune
from kvprune.measure.table import bench_table, pruned_table


def lines_of(table):
    console = Console(file=io.StringIO(), width=200)
    for part in table.renderables:
        console.print(part, soft_wrap=isinstance(part, str))
    return console.file.getvalue().splitlines()


def line_with(lines, words):
    (found,) = [line for line in lines if words in line]
    return found


@pytest.fixture
def record(pruned_half):
    return kvprune.read_record(pruned_half)


def test_a_record_of_merged_heads(record):
    """Four layers of two KV heads of 32 channels, merged into one: of 64, half is kept."""
    record["widths"] = [64, 48, 16, 0]
    lines = lines_of(pruned_table(record))
    assert "2 KV heads merged into 1" in [line.strip() for line in lines]
    assert line_with(lines, "channels kept").strip() == "channels kept per KV head, of 64"
    for layer, bar in enumerate((32, 24, 8, 0)):
        assert line_with(lines, f"layer {layer} ").count("█") == bar
    read = record["weights_read_bytes"]
    row = line_with(lines, "weights that a step reads")
    for said in (f"{read['dense']:,}", f"{read['pruned']:,}", f"{read['pruned'] / read['dense']:.3f}"):
        assert said in row


def test_neighbours_of_one_width_share_a_line(record):
    record |= {"widths": [64, 48, 48, 48, 0, 0], "dropped_blocks": [5]}
    lines = [line.strip() for line in lines_of(pruned_table(record))]
    found = [line for line in lines if line.startswith("layer")]
    assert [line.split("  ")[0] for line in found] == ["layer 0", "layers 1 to 3", "layer 4", "layer 5"]
    assert found[1].count("█") == 24
    assert found[3].endswith("block dropped")


def test_a_record_of_an_older_version(record):
    """It has none of the fields, and its heads were each cut for itself."""
    for name in ("merge", "kv_heads", "weights_read_bytes"):
        del record[name]
    record["widths"] = [32, 24, 8, 16]
    lines = lines_of(pruned_table(record))
    assert line_with(lines, "channels kept").strip() == "channels kept per KV head, of 32"
    for layer, bar in enumerate((32, 24, 8, 16)):
        assert line_with(lines, f"layer {layer} ").count("█") == bar
    assert not any("merged" in line or "a step reads" in line for line in lines)


def test_a_bench_says_what_a_step_reads(checkpoint, pruned_half):
    report = kvprune.bench(checkpoint, pruned_half, context=[8], new_tokens=2, rounds=1, device="cpu")
    read = report["cells"][0]["decode_bytes_read"]
    read["dense"]["all"], read["pruned"]["all"] = 123_400_000, 45_600_000
    lines = lines_of(bench_table(report))
    assert "every 2 KV heads of the second merged" in " ".join(" ".join(lines[:3]).split())
    assert line_with(lines, " 123 ")
    assert line_with(lines, " 46 ")
