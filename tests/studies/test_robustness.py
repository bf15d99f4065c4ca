"""Reading and writing at length against Hugging Face run window by window."""

import json
import math

import pytest
import torch

import kvprune
from kvprune import errors
from kvprune.studies.robustness import read, reading, stretches, write, writing
from tiny import VOCABULARY, tiny_model, tiny_tokenizer, words


def ids_of(n):
    return torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n", [700, 520, 300])
@pytest.mark.parametrize("context", [1000, 600, 128])
def test_losses_are_those_of_the_window_that_reads_a_token(n, context):
    """A token up to the context's end has all before it; behind that, what its window of half a context's steps has."""
    model, ids, half = tiny_model("llama", positions=1000), ids_of(n), context // 2
    found = read(model, ids, context)
    assert math.isnan(found[0])
    for t in (1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 255, 256, 299, 511, 512, 513, 599, 600, 699):
        if t >= n:
            continue
        start = 0 if t < context else (t // half - 1) * half
        with torch.no_grad():
            logits = model(ids[None, start:t]).logits[0, -1]
        assert found[t].item() == pytest.approx(-logits.log_softmax(-1)[ids[t]].item(), abs=1e-4)
    assert not found[1:].isnan().any()


def test_an_answer_is_generates_until_the_context_ends():
    model, prompt = tiny_model("llama", positions=1000), ids_of(20)
    steps = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    assert write(model, prompt, 40, 1000) == model.generate(prompt[None], **steps)[0, 20:].tolist()
    short = write(model, prompt, 40, 30)  # ten fit; then the last fifteen are read anew, and fifteen more fit
    ids = prompt.tolist()
    with torch.no_grad():
        for i in range(40):
            left = ids if i < 11 else ids[30 - 14 :][: i + 4] if i < 26 else None
            if left is None:
                break
            assert short[i] == model(torch.tensor([left])).logits[0, -1].argmax().item()
            ids.append(short[i])
    assert len(short) == 40


def test_stretches_double():
    assert stretches(512) == [(0, 512)]
    assert stretches(5000) == [(0, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 5000)]


def test_means_of_stretches():
    losses = torch.cat([torch.tensor([math.nan]), torch.full((511,), 1.0), torch.full((88,), 2.0)])
    model = tiny_model("llama")
    assert [row["perplexity"] for row in reading(losses, model)] == [pytest.approx(math.e), pytest.approx(math.e**2)]
    losses[600 - 1] = math.nan
    with pytest.raises(errors.NotFinite, match="512 to 600"):
        reading(losses, model)
    answer = [*range(512), *range(88)]  # 4-grams that end in the second stretch: 3 cross the seam, 85 came before
    assert [row["repetition"] for row in writing(answer)] == [0, 85 / 88]


def test_the_study_from_end_to_end_and_again(tmp_path, monkeypatch):
    for seed in (0, 1):
        tiny_model("llama", seed=seed, positions=256).save_pretrained(tmp_path / f"m{seed}")
        tiny_tokenizer().save_pretrained(tmp_path / f"m{seed}")
    (tmp_path / "text.txt").write_text(words(3000))
    options = {
        "against": tmp_path / "m1",
        "text": tmp_path / "text.txt",
        "tokens": 600,
        "new_tokens": 300,
        "device": "cpu",
    }
    whole = kvprune.study_robustness(tmp_path / "m0", tmp_path / "out", **options)
    assert json.loads((tmp_path / "out" / "study.json").read_text()) == whole
    assert (tmp_path / "out" / "study.png").stat().st_size > 10_000
    assert [(row["from"], row["to"]) for row in whole["reading"]] == [(0, 512), (512, 600)]
    ids = kvprune.load_tokenizer(tmp_path / "m1")((tmp_path / "text.txt").read_text(), return_tensors="pt").input_ids[0]
    second = kvprune.load(tmp_path / "m1")
    assert whole["reading"][1]["perplexity"][1] == reading(read(second, ids[:600], 256), second)[1]["perplexity"]
    # killed behind the first model: what it had found stays
    lines = (tmp_path / "out" / "study.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "study.json").unlink()
    (tmp_path / "out" / "study.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    with pytest.raises(errors.OutputExists, match="--resume"):
        kvprune.study_robustness(tmp_path / "m0", tmp_path / "out", **options)
    loaded = []
    load = kvprune.studies.robustness.load_model
    monkeypatch.setattr(kvprune.studies.robustness, "load_model", lambda s, *a: loaded.append(s.name) or load(s, *a))
    assert kvprune.study_robustness(tmp_path / "m0", tmp_path / "out", resume=True, **options) == whole
    assert len(loaded) == 1


def test_what_cannot_be_studied(checkpoint, texts, tmp_path):
    with pytest.raises(errors.BadOption, match="--tokens"):
        kvprune.study_robustness(checkpoint, tmp_path / "out", tokens=100)
    with pytest.raises(errors.TextTooShort, match="ask for fewer"):
        kvprune.study_robustness(checkpoint, tmp_path / "out", tokens=10**6)
    assert not (tmp_path / "out").exists()
