"""notebooks/quickstart.ipynb, executed as it stands; what it found is compared with transformers and the record."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvprune

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"
MODEL = os.environ.get("KVPRUNE_TEST_MODEL", "missing")
SECONDS = 300
FOUND = """
import json
print(json.dumps({"dense": dense, "half": half, "text": text, "report": report, "prompt": PROMPT}))
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """(notebook with outputs, what its variables hold, the folder that it wrote)"""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(FOUND))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MODEL": Path(MODEL).absolute(), "TEXT": "wiki", "TOKENS": "4096"}.items():
            patch.setenv(f"KVPRUNE_NOTEBOOK_{name}", str(value))
        patch.setenv("KVPRUNE_DATA", str(Path(os.environ["KVPRUNE_DATA"]).absolute()))
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        client = nbclient.NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}})
        client.execute()  # raises for the first cell that does
    return notebook, json.loads(notebook.cells[-1].outputs[0].text), folder / "halved"


def test_it_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert len(cells) > 5


def test_figures(executed):
    """Far from the published tables (docs/results.md) means that something broke, in either direction."""
    _, _, folder = executed
    record = kvprune.read_record(folder)
    assert record["kv_bytes_per_token"] == {"dense": 2 * 30 * 3 * 64 * 2, "pruned": 30 * 3 * 64 * 2}
    (row,) = record["perplexity"]
    assert 10 < row["dense"] < 40
    assert 1.05 < row["pruned"] / row["dense"] < 3


def test_it_shows_them(executed):
    notebook, _, folder = executed
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    record = kvprune.read_record(folder)
    (row,) = record["perplexity"]
    figures = "".join(output.text for output in outputs["figures"] if output.output_type == "stream")
    assert f"{row['dense']:.2f} dense, {row['pruned']:.2f} pruned" in figures
    assert str(record["widths"]) in "".join(output.text for output in outputs["plan"])
    assert any("image/png" in output.get("data", {}) for output in outputs["plot"])
    assert (folder / "README.md").read_text() in "".join(output.text for output in outputs["card"])


@torch.no_grad()
def test_the_text_is_that_of_transformers(executed):
    """In this process, from the folder: token by token what the notebook got, by kvprune and by transformers."""
    _, found, folder = executed
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(found["prompt"], return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(40):  # no cache, no generate
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
        if ids[0, -1] == model.generation_config.eos_token_id:
            break
    text = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert text == found["text"] == found["half"]["text"]
    assert text != found["dense"]["text"]


def test_bytes_of_caches(executed):
    _, found, _ = executed
    assert found["half"]["cache_tokens"] == found["dense"]["cache_tokens"]
    assert 2 * found["half"]["cache_bytes"] == found["dense"]["cache_bytes"]
    report = found["report"]
    assert 0.45 < report["keep_achieved"] < 0.7  # undecided tokens are kept
    assert report["kv_bytes"] / report["kv_bytes_dense"] == pytest.approx(report["keep_achieved"] / 2, rel=0.02)
