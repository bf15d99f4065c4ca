"""`bench` on tiny models: its figures against what can be counted, and what it refuses."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import kvprune
from kvprune import benchmark, cli, errors
from kvprune.measure import shapes, speed
from kvprune.measure.memory import cache_bytes
from kvprune.runtime.modeling import CACHE
from kvprune.runtime.twin import twin_config
from kvprune.tokens.admission import Admission, Schedule
from tiny import COARSE, tiny_model, tiny_tokenizer

QUICK = {"new_tokens": 4, "rounds": 2, "device": "cpu"}


@pytest.fixture
def halved(checkpoint, texts, tmp_path):
    quick = {"calibration_tokens": 512, "eval_tokens": 512, "windows": (64,), "align": 2, "min_width": 4}
    kvprune.prune(checkpoint, tmp_path / "half", ratio=0.5, **quick)
    return tmp_path / "half"


def test_a_grid(checkpoint, halved, tmp_path):
    out = tmp_path / "bench.json"
    report = kvprune.bench(checkpoint, halved, batch="1,3", context=[8, 16], out=out, **QUICK)
    assert report == json.loads(out.read_text())
    assert out.with_suffix(".png").stat().st_size > 1000
    assert [(cell["batch"], cell["context"]) for cell in report["cells"]] == [(1, 8), (3, 8), (1, 16), (3, 16)]
    dense = kvprune.load(checkpoint)
    weights = sum(p.nbytes for p in dense.parameters())
    for cell in report["cells"]:
        b, c, held = cell["batch"], cell["context"], cell["memory_bytes"]
        with torch.no_grad():
            cache = dense(torch.zeros(b, c, dtype=torch.long))[CACHE]
        assert held["dense"]["kv_cache"] == cache_bytes(cache) == 2 * held["pruned"]["kv_cache"]
        assert held["dense"]["weights"] == weights > held["pruned"]["weights"]
        for name in ("dense", "pruned"):
            parts = held[name]
            assert set(parts) == {"weights", "kv_cache", "kv_room", "activations", "peak"}
            assert parts["peak"] is None or parts["peak"] == sum(parts.values()) - parts["peak"]
            prefill, decode = cell["prefill_seconds"][name], b * 4 / cell["decode_tokens_per_second"][name]
            assert cell["latency_seconds"][name] == pytest.approx(prefill + decode)
        for name in ("prefill", "decode"):
            low, high = cell["spread"][name]
            assert 0 < low <= cell[f"{name}_ratio"] <= high
        assert cell["decode_ratio_over_limit"] == pytest.approx(cell["decode_ratio"] / cell["decode_limit"])
        # the limit, from the bytes: the cache as it is half way through the steps
        read = [held[name]["kv_cache"] * (c + 2) / c for name in ("dense", "pruned")]
        bytes_read = cell["decode_bytes_read"]
        assert [bytes_read[name]["kv_cache"] for name in ("dense", "pruned")] == read
        saved = held["dense"]["weights"] - held["pruned"]["weights"]
        embedding = dense.get_input_embeddings().weight
        tied = embedding.data_ptr() == dense.get_output_embeddings().weight.data_ptr()
        all_read = weights - (0 if tied else embedding.nbytes)
        assert [bytes_read[name]["weights"] for name in ("dense", "pruned")] == [all_read, all_read - saved]
        assert cell["decode_limit"] == pytest.approx((all_read + read[0]) / (all_read - saved + read[1]))
    assert report["environment"]["merge"] == 2


def test_a_model_against_itself_has_no_limit_to_reach(checkpoint):
    (cell,) = kvprune.bench(checkpoint, **QUICK, context=[8])["cells"]
    assert cell["decode_limit"] == 1
    assert cell["memory_bytes"]["dense"]["kv_cache"] == cell["memory_bytes"]["pruned"]["kv_cache"]


@pytest.mark.parametrize("family", ["mistral", "qwen2-sliding"])
@pytest.mark.parametrize("skip", [None, 0.25])
def test_every_round_begins_behind_the_prompt(family, skip, tmp_path, monkeypatch):
    """Also where a cache cannot be cut back: windows that are full, and filters."""
    tiny_model(family, kv_heads=2, groups=2, layers=4).save_pretrained(tmp_path)
    lengths = []
    real = speed.Side.decode

    def decode(side, ids, steps):
        lengths.append(side.cache.get_seq_length())
        real(side, ids, steps)

    monkeypatch.setattr(speed.Side, "decode", decode)
    (cell,) = kvprune.bench(tmp_path, context=[90], batch=[2], skip=skip, **QUICK)["cells"]
    assert lengths == [90] * (2 + 2 * 2)  # the limit's, which warm up, and two rounds
    assert cell["rounds"] == {"prefill": 2, "decode": 2}


def test_under_a_filter(checkpoint):
    (cell,) = kvprune.bench(checkpoint, skip=0.25, skip_layers="1,0", context=[96], batch=[2], **QUICK)["cells"]
    held = cell["memory_bytes"]
    with torch.no_grad(), kvprune.TokenFilter(0.25, layers=(1, 0))(model := kvprune.load(checkpoint)) as f:
        ids = torch.randint(0, model.config.vocab_size, (2, 96), generator=torch.Generator().manual_seed(0))
        model(ids)
    assert held["pruned"]["kv_cache"] == pytest.approx(f.report["kv_bytes"], abs=2)
    assert cell["decode_limit"] > 1


def test_keeping_half_of_the_tokens(tmp_path):
    """What is held behind the prompt is what the rule says, and a step reads all of it and every weight."""
    tiny_model("llama", kv_heads=2, groups=2, layers=2, positions=512).save_pretrained(tmp_path)
    report = kvprune.bench(tmp_path, keep=0.5, context=[400], batch=[2], **QUICK)
    assert report["environment"]["keep"] == 0.5
    (cell,) = report["cells"]
    a_token = 2 * 2 * 2 * 16 * 4  # K and V, layers, KV heads, channels, bytes
    kept = Schedule(Admission(0.5)).stored(400)
    assert cell["memory_bytes"]["pruned"]["kv_cache"] == 2 * kept * a_token
    assert cell["memory_bytes"]["dense"]["kv_cache"] == 2 * 400 * a_token
    read = cell["decode_bytes_read"]
    assert read["pruned"]["weights"] == read["dense"]["weights"]
    assert read["pruned"]["kv_cache"] / read["dense"]["kv_cache"] == pytest.approx(kept / 400, abs=0.01)


def test_what_a_filtered_step_reads(checkpoint, monkeypatch):
    """Layer 1 skips nine tokens in ten: a tenth of its kept K/V, and Q and O unless both sequences skip. Where a device
    decides by itself, all that is kept, and all weights."""
    model = kvprune.load(checkpoint)
    side = speed.Side(model, kvprune.TokenFilter(0.225, layers=(1,)))
    with side.running():
        side.prefill(torch.randint(0, model.config.vocab_size, (2, 96)))
    a_token = 2 * 2 * 32 * model.dtype.itemsize
    kept = side.cache.layers[1].lengths.sum() * a_token
    attention = model.model.layers[1].self_attn
    seldom = attention.q_proj.weight.nbytes + attention.o_proj.weight.nbytes
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters()) - (0 if tied else model.get_input_embeddings().weight.nbytes)
    assert side.bytes_read() == pytest.approx(weights + 3 * 2 * 96 * a_token + 0.1 * kept - 0.81 * seldom)
    monkeypatch.setattr(speed, "decides_on", lambda device: True)
    assert side.bytes_read() == weights + 3 * 2 * 96 * a_token + kept


@pytest.mark.parametrize("shape", list(shapes.SHAPES))
def test_shapes_have_the_published_sizes(shape):
    config, _ = shapes.dense_config(shape)
    with torch.device("meta"):
        model = shapes.random_model(config, torch.device("meta"), torch.bfloat16)
    published = {"llama-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "mistral-7b": 7_248_023_552}
    assert sum(p.numel() for p in model.parameters()) == published[shape]
    half = shapes.random_model(shapes.pruned_config(config, 0.5, merge=1), torch.device("meta"), torch.bfloat16)
    assert {layer.self_attn.head_dim for layer in half.model.layers} == {64}
    q = half.model.layers[0].self_attn.q_proj.weight
    assert q.shape == (config.num_attention_heads * 64, config.hidden_size)
    merged = shapes.random_model(shapes.pruned_config(config, 0.5), torch.device("meta"), torch.bfloat16)
    of_four = config.num_key_value_heads // 4 * 256  # as wide as attention kernels take
    for layer in merged.model.layers:
        attention = layer.self_attn
        assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (of_four, 4096)
        assert attention.q_proj.weight.shape == attention.o_proj.weight.shape == (4096, 4096)
        assert attention.q_mix.weight.shape == (config.num_key_value_heads, 128, 256)
    a_layer = config.num_key_value_heads * 2 * 128 * 256 - 2 * config.num_key_value_heads * 64 * 4096
    assert sum(p.numel() for p in merged.parameters()) == published[shape] + 32 * a_layer


@pytest.mark.parametrize(("merge", "ratio"), [(1, 0.5), (2, 0.5), (2, 0.25), (4, 0.5), (4, 0.75)])
def test_a_pruned_shape_is_what_prune_makes_of_a_checkpoint(tmp_path, texts, merge, ratio):
    """Tensor by tensor; and random weights have rotary pairs that there are."""
    model = tiny_model("llama", kv_heads=4, groups=2)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    quick = {**COARSE, "repair": "rotate", "eval_tokens": 64, "layout": "uniform"}
    real = kvprune.prune(tmp_path, ratio=ratio, merge=merge, **quick).model
    config, dtype = shapes.dense_config(tmp_path)
    made = shapes.random_model(shapes.pruned_config(config, ratio, 2, merge), torch.device("cpu"), dtype)
    sizes = [{name: t.shape for name, t in m.state_dict().items()} for m in (real, made)]
    assert sizes[0] == sizes[1]
    for layer in made.model.layers:
        first, second = layer.self_attn.rope_index.unflatten(1, (2, -1)).unbind(1)
        assert (second == first + 8).all()
        assert first.min() == 0
        assert first.max() == min(first.shape[1], 8) - 1
    with torch.no_grad():
        assert made(torch.arange(12)[None]).logits.isfinite().all()


def test_a_pruned_shape_is_timed(monkeypatch):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 16}
    small |= {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(shapes.SHAPES, "tiny", small)
    asked = {"pruned_shape": True, "context": [8], "dtype": "float32", **QUICK}
    for merge, merged, ratio, width in ((None, 2, 0.25, 24), ("1", 1, 0.5, 8), (2, 2, 0.5, 16)):
        report = kvprune.bench("tiny", ratio=ratio, merge=merge, **asked)
        assert report["environment"]["merge"] == merged
        (cell,) = report["cells"]
        held, read = cell["memory_bytes"], cell["decode_bytes_read"]
        assert held["dense"]["kv_cache"] == 8 * 2 * 2 * 2 * 16 * 4
        assert (
            held["pruned"]["kv_cache"] == (1 - ratio) * held["dense"]["kv_cache"] == 8 * 2 * 2 * 2 / merged * width * 4
        )
        mlps_and_norms = 2 * (3 * 64 * 32 + 2 * 32) + 32
        dense = mlps_and_norms + 64 * 32 + 2 * (2 * 4 + 2 * 2) * 16 * 32  # and the head; of the embedding a row
        written, mixed = 2 * 4 * width * 32, 2 * 4 * 16 * 32 + 2 * 2 * 16 * width  # Q and O; or with mixes
        assert (mixed < written) == (width == 24)
        pruned = mlps_and_norms + 64 * 32 + 2 * (2 * 2 // merged * width * 32 + min(written, mixed))
        for side, numbers in (("dense", dense), ("pruned", pruned)):
            half_way = held[side]["kv_cache"] * 10 / 8
            assert read[side] == {"all": numbers * 4 + half_way, "weights": numbers * 4, "kv_cache": half_way}
        assert cell["decode_limit"] == pytest.approx(read["dense"]["all"] / read["pruned"]["all"])


def test_what_a_filtered_step_reads_of_merged_heads():
    """Of a layer in which both sequences skip with probability 0.25, neither Q and O nor what is between them."""
    dense = tiny_model("llama", kv_heads=2, groups=2)
    config = twin_config(dense.config, 16, [24, 24], 2, [True, True])
    side = speed.Side(shapes.random_model(config, torch.device("cpu"), torch.float32))
    side.prefill(torch.zeros(2, 10, dtype=torch.long))
    everything, kv = side.weight_bytes_read(), side.kv_bytes_read()
    side.token_filter = SimpleNamespace(rates=lambda layers: {1: 0.5})
    seldom = 2 * 4 * 16 * 48 + 2 * 2 * 16 * 24
    assert side.weight_bytes_read() == everything - 0.25 * seldom * 4
    assert side.kv_bytes_read() == 0.75 * kv
    assert side.bytes_read() == side.weight_bytes_read() + side.kv_bytes_read()


def test_a_widened_prefill_is_refused_where_it_cannot_fit(monkeypatch):
    """Queries of merged heads are wider than the hidden states: the layer's guess counts them."""
    dense = tiny_model("llama", kv_heads=2, groups=2)
    twins = [twin_config(dense.config, 16, [8, width], 2, [False, True]) for width in (8, 32)]
    narrow, wide = (speed.Side(shapes.random_model(c, torch.device("cpu"), torch.float32)) for c in twins)
    refused = []
    for side in (narrow, wide):
        for free in range(0, 10**6, 1000):
            monkeypatch.setattr(benchmark.memory, "free", lambda device, free=free: free)
            try:
                benchmark._refuse_what_cannot_fit((side, side), 1, 64, 4)
            except MemoryError:
                continue
            refused.append(free)
            break
    caches = [2 * 68 * 1.125 * 2 * (8 + width) * 4 for width in (8, 32)]  # of both sides, with room
    queries = 64 * 4 * 4 * (4 * 32 - 48)  # four times what they are wider than the hidden states
    assert refused[1] - refused[0] == pytest.approx(caches[1] - caches[0] + queries, abs=1000)


def test_a_cell_that_does_not_fit_says_so_and_the_grid_goes_on(checkpoint, monkeypatch):
    real = speed.Side.prefill

    def prefill(side, ids):
        if len(ids) == 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        real(side, ids)

    monkeypatch.setattr(speed.Side, "prefill", prefill)
    cells = kvprune.bench(checkpoint, batch=(3, 1), context=[8], **QUICK)["cells"]
    assert "out of memory: batch 3" in cells[0]["error"]
    assert cells[1]["decode_ratio"] > 0
    assert "error" in kvprune.bench(checkpoint, batch=10**20, context=[8], **QUICK)["cells"][0]
    monkeypatch.setattr(benchmark.memory, "free", lambda device: 1000)
    assert "error" in kvprune.bench(checkpoint, context=[8], **QUICK)["cells"][0]


def test_the_largest_batch_of_a_memory(checkpoint, halved):
    cells = kvprune.bench(checkpoint, halved, batch=(2,), context=[8, 32], memory_size="64MiB", **QUICK)["cells"]
    for cell in cells:
        for name, held in cell["memory_bytes"].items():
            if held["activations"] is None:
                assert cell["largest_batch"][name] is None
                continue
            a_sequence = (held["kv_cache"] + held["kv_room"] + held["activations"]) / 2
            most = cell["largest_batch"][name]
            assert held["weights"] + most * a_sequence <= 64 * 2**20 < held["weights"] + (most + 1) * a_sequence
    with pytest.raises(errors.BadOption, match="no amount of memory"):
        kvprune.bench(checkpoint, context=[8], memory_size="much", **QUICK)


def test_other_errors_are_not_taken_for_it(checkpoint, monkeypatch):
    def prefill(side, ids):
        raise RuntimeError("a fault")

    monkeypatch.setattr(speed.Side, "prefill", prefill)
    with pytest.raises(RuntimeError, match="a fault"):
        kvprune.bench(checkpoint, context=[8], **QUICK)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"context": [100_000]}, "the model takes"),
        ({"batch": "1,x"}, "whole numbers"),
        ({"batch": (0,)}, "at least 1"),
        ({"rounds": 0}, "at least 1"),
        ({"skip_layers": "1"}, "needs --skip"),
        ({"pruned_shape": True, "skip": 0.25}, "leave out"),
        ({"pruned_shape": True, "ratio": 0.3, "context": [8]}, "multiple of 8"),
        ({"pruned_shape": True, "ratio": float("nan"), "context": [8]}, "between 0 and 1"),
        ({"pruned_shape": True, "dtype": "int8", "context": [8]}, "unknown dtype"),
        ({"ratio": 0.5}, "--pruned-shape"),
        ({"merge": 2}, "--pruned-shape"),
        ({"pruned_shape": True, "merge": 3, "context": [8]}, "does not divide the 2 KV heads; choose auto, 1, 2"),
        ({"pruned_shape": True, "merge": "all", "context": [8]}, "must be auto, or how many"),
        ({"out": "nowhere/bench.json"}, "nowhere"),
        ({"out": "bench.png"}, ".json"),
        ({"skip": 0.99, "context": [8]}, "at most"),
    ],
    ids=str,
)
def test_bad_options(checkpoint, options, says):
    with pytest.raises(errors.KVPruneError, match=says):
        kvprune.bench(checkpoint, **{**QUICK, **options})


def test_two_that_cannot_be_compared(checkpoint, tmp_path):
    model = kvprune.load(checkpoint, dtype="bfloat16")
    model.save_pretrained(tmp_path / "other")
    for file in checkpoint.glob("tokenizer*"):
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(errors.BadOption, match="--dtype"):
        kvprune.bench(checkpoint, tmp_path / "other", context=[8], **QUICK)
    kvprune.bench(checkpoint, tmp_path / "other", context=[8], dtype="float32", **QUICK)
    words = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    words["model"]["vocab"]["another-word"] = len(words["model"]["vocab"])
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(errors.BadOption, match="tokenizers"):
        kvprune.bench(checkpoint, tmp_path / "other", context=[8], **QUICK)


def test_the_file_has_what_was_measured_before_a_fault(checkpoint, tmp_path, monkeypatch):
    real, out = speed.Side.prefill, tmp_path / "bench.json"

    def prefill(side, ids):
        if ids.shape[1] == 16:
            raise RuntimeError("a fault")
        real(side, ids)

    monkeypatch.setattr(speed.Side, "prefill", prefill)
    with pytest.raises(RuntimeError, match="a fault"):
        kvprune.bench(checkpoint, context=(8, 16), out=out, **QUICK)
    assert [cell["context"] for cell in json.loads(out.read_text())["cells"]] == [8]
    with pytest.raises(errors.BadOption, match="exists"):
        kvprune.bench(checkpoint, context=[8], out=out, **QUICK)
    (tmp_path / "mine.png").write_text("precious")
    with pytest.raises(errors.BadOption, match=r"mine\.png exists"):
        kvprune.bench(checkpoint, context=[8], out=tmp_path / "mine.json", **QUICK)


def test_the_command_line(checkpoint, monkeypatch, capsys):
    words = ["bench", checkpoint, "--against", checkpoint, "--context", "8", "--batch", "1,2", "--new-tokens", "2"]
    for more in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["kvprune", *map(str, words), "--rounds", "1", *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        found = capsys.readouterr().out
        if more:
            assert len(json.loads(found)["cells"]) == 2
        else:
            assert "tokens/s" in found
            assert "limit" in found


def test_merged_heads_on_the_command_line(command, monkeypatch):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 16}
    monkeypatch.setitem(
        shapes.SHAPES, "tiny", small | {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4}
    )
    words = ("bench", "tiny", "--pruned-shape", "--context", 8, "--new-tokens", 2, "--rounds", 1, "--device", "cpu")
    code, out, _ = command(*words, "--merge", 2, "--json")
    assert (code, json.loads(out)["environment"]["merge"]) == (0, 2)
    assert "every 4 KV heads of the second merged" in " ".join(command(*words)[1].split())


def test_rounds_are_paired_and_take_turns(checkpoint, monkeypatch):
    clock, order = [0.0], []
    sides = (speed.Side(kvprune.load(checkpoint)), speed.Side(kvprune.load(checkpoint)))
    costs = {id(sides[0]): iter([9, 2, 4, 6]), id(sides[1]): iter([9, 1, 1, 2])}

    def work(side):
        order.append(sides.index(side) if side is sides[0] else 1)
        clock[0] += next(costs[id(side)])

    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    timing = speed.alternate(sides, work, 3)
    assert timing.rounds == [(2, 1), (4, 1), (6, 2)]  # the first round, of 9 each, is not counted
    assert order == [1, 0, 0, 1, 1, 0, 0, 1]
    assert timing.seconds == (4, 1)
    assert (timing.ratios, timing.ratio) == ([2, 3, 4], 3)
    costs = {id(side): iter([70.0] * 4) for side in sides}
    assert len(speed.alternate(sides, work, 3, warm=True).rounds) == 1  # two minutes are over


def test_a_known_shape_needs_torch_and_transformers_only(tmp_path):
    """As on a GPU machine that has nothing else; transformers itself may use some of these, so it comes first."""
    code = """
import sys
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, Gemma4ForCausalLM, LlamaForCausalLM
for name in ("rich", "typer", "pydantic", "peft", "accelerate", "jinja2", "matplotlib", "datasets", "lm_eval", "gguf"):
    for loaded in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[loaded]
    sys.modules[name] = None
from kvprune.benchmark import bench
from kvprune.measure import shapes
small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
shapes.SHAPES["small"] = {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 100, **small}
(cell,) = bench("small", pruned_shape=True, context=64, new_tokens=4, rounds=1, device="cpu", dtype="float32")["cells"]
assert cell["decode_ratio"] > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
