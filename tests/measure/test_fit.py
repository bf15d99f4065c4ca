"""`fit` against real models and real caches."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvprune
from kvprune import cli, errors
from kvprune.channels.choice.merging import for_ranks, merge_of
from kvprune.channels.cut.surgery import cut
from kvprune.measure import fit as fitting
from kvprune.measure.memory import cache_bytes, weight_bytes
from kvprune.measure.shapes import random_model
from kvprune.measure.weights import Cut, Weights
from kvprune.models.view import ModelView
from kvprune.runtime.modeling import CACHE
from kvprune.runtime.quantized import quantized_cache
from kvprune.runtime.twin import twin_config
from tiny import COARSE, make_plan, random_layers, tiny_model

ALL = {"dtype": "float32", "reserve": 0.0, "align": 2, "min_width": 2}


@pytest.fixture
def saved(tmp_path):
    """A folder with a tiny model, head_dim 16, and the model."""

    def make(family):
        model = tiny_model(family, kv_heads=2, groups=2, layers=3)
        model.save_pretrained(tmp_path / family)
        return tmp_path / family, model

    return make


def real_bytes(model, batch, context):
    with torch.no_grad():
        cache = model(torch.zeros(batch, context, dtype=torch.long))[CACHE]
    return weight_bytes(model), cache_bytes(cache)


def twin(model, merge, widths):
    """A pruned model of random weights, whose Q and O are written in the way that has fewer numbers."""
    config = model.config
    heads, hidden, kv_heads, d = (
        getattr(config, name) for name in ("num_attention_heads", "hidden_size", "num_key_value_heads", "head_dim")
    )
    mixed = [heads * w * hidden > heads * d * hidden + kv_heads * d * w for w in widths]
    return random_model(twin_config(config, d, widths, merge, mixed), torch.device("cpu"), torch.float32), mixed


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "qwen2-sliding"])  # the last two with windows
def test_it_is_what_a_real_run_holds(saved, family):
    folder, model = saved(family)
    weights, kv = real_bytes(model, 3, 40)
    report = kvprune.fit(folder, memory=weights + kv, context=40, batch=3, **ALL)
    assert (report["ratio"], report["merge"]) == (0, 1)
    assert report["dense"] == {"weights": weights, "kv_cache": kv, "total": weights + kv, "fits": True}
    assert report["weights_read_bytes"]["dense"] == weights - model.get_input_embeddings().weight.nbytes
    half = cut(ModelView(model), make_plan(model, random_layers(model, [8, 8, 8])))
    lighter, smaller = real_bytes(half, 3, 40)
    report = kvprune.fit(folder, memory=lighter + smaller, context=40, batch=3, merge=1, **ALL)
    assert report["ratio"] == pytest.approx(0.5)
    assert report["pruned"] == {"weights": lighter, "kv_cache": smaller, "total": lighter + smaller, "fits": True}
    assert report["weights_read_bytes"]["pruned"] == lighter - model.get_input_embeddings().weight.nbytes


@pytest.mark.parametrize("family", ["llama", "qwen2", "llama-bias"])
@pytest.mark.parametrize(("width", "tied"), [(12, True), (16, False), (24, False), (28, True)])
def test_it_is_what_merged_heads_hold(tmp_path, family, width, tied):
    """28 of 32 channels: Q and O stay as they are, with small matrices beside them."""
    model = tiny_model(family, kv_heads=2, groups=2, layers=3, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    merged, mixed = twin(model, 2, [width] * 3)
    assert mixed[0] == (width > 16)
    weights, kv = real_bytes(merged, 20, 100)
    assert kv == 20 * 100 * 3 * 2 * width * 4
    report = kvprune.fit(tmp_path, memory=weights + kv, context=100, batch=20, **ALL)
    assert (report["merge"], report["ratio"]) == (2, pytest.approx(1 - width / 32))
    assert report["pruned"] == {"weights": weights, "kv_cache": kv, "total": weights + kv, "fits": True}
    read = weights - (0 if tied else merged.get_input_embeddings().weight.nbytes)
    assert report["weights_read_bytes"]["pruned"] == read


@pytest.mark.parametrize("family", ["llama", "qwen2", "llama-bias"])
@pytest.mark.parametrize(("merge", "width"), [(1, 8), (1, 16), (2, 16), (2, 28)])
def test_it_is_what_dropped_blocks_leave(tmp_path, family, merge, width):
    """The others share what is left: 16 of 16 channels of heads that stay apart is all that they had."""
    model = tiny_model(family, kv_heads=2, groups=2, layers=3)
    model.save_pretrained(tmp_path)
    mixed = [False, merge == 2 and width > 16, merge == 2 and width > 16]
    config = twin_config(model.config, 16, [0, width, width], merge, mixed, dropped=[0])
    dropped = random_model(config, torch.device("cpu"), torch.float32)
    weights, kv = real_bytes(dropped, 20, 100)
    assert kv == 20 * 100 * 2 * 2 * (2 // merge) * width * 4
    asked = {"context": 100, "batch": 20, "merge": merge, "drop_blocks": 1} | ALL
    report = kvprune.fit(tmp_path, memory=weights + kv, **asked)
    assert (report["merge"], report["ratio"]) == (merge, pytest.approx(1 - 2 * width / (3 * 16 * merge)))
    assert report["pruned"] == {"weights": weights, "kv_cache": kv, "total": weights + kv, "fits": True}
    less = kvprune.fit(tmp_path, memory=weights + kv - 1, **asked)
    assert less["ratio"] > report["ratio"]
    assert report["drop_blocks"] == 1


def test_fit_and_prune_agree_on_dropped_blocks(checkpoint, texts, tmp_path):
    """What prune makes of it fits, and no more heads are merged where the others keep all."""
    dense = kvprune.fit(checkpoint, memory="1GiB", context=100, batch=20, **ALL)["dense"]["total"]
    for share in (0.95, 0.8):
        asked = {"context": 100, "batch": 20, "reserve": 0.0}
        memory = f"{int(share * dense)}B"
        report = kvprune.fit(checkpoint, memory=memory, drop_blocks=1, dtype="float32", align=2, min_width=4, **asked)
        result = kvprune.prune(checkpoint, fit=memory, drop_blocks=1, **asked, **COARSE | {"dtype": "float32"})
        assert result.record["ratio"] == report["ratio"] >= 0.25
        assert result.record["merge"] == report["merge"]
        weights = sum(p.nbytes for p in result.model.parameters())
        assert weights + 2000 * result.record["kv_bytes_per_token"]["pruned"] <= share * dense * 1.001


@pytest.mark.parametrize(("options", "message"), [
    ({"drop_blocks": 3}, "leaves none of the 3"),
    ({"drop_blocks": -1}, "how many whole blocks"),
    ({"drop_blocks": 1, "layout": "uniform"}, "wants --layout per-layer"),
])  # fmt: skip
def test_blocks_that_cannot_be_dropped(saved, options, message):
    folder, _ = saved("llama")
    with pytest.raises(errors.BadOption, match=message):
        kvprune.fit(folder, memory="1GiB", context=40, **ALL, **options)


def of_one_rank(model, ranks):
    """Bytes of weights, and of the cache of a token, that one rank of several holds: a share of each matrix, but K and
    V by whole heads, with the small matrices that belong to them."""
    widths = [module.head_dim for name, module in model.named_modules() if name.endswith("self_attn")]
    heads = model.config.num_key_value_heads
    mine = -(-heads // ranks)
    weights = 0.0
    for name, parameter in model.named_parameters():
        of_heads = any(part in name for part in ("k_proj", "v_proj", "q_mix", "o_mix"))
        weights += parameter.nbytes * (mine / heads if of_heads else 1 / ranks)
    return weights, sum(2 * mine * width * 4 for width in widths)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("ranks", "merge", "width"), [(2, 1, 8), (2, 2, 20), (2, 2, 28), (4, 1, 8), (4, 2, 12), (4, 4, 8), (8, 1, 12)]
)
def test_a_rank_holds_its_share(tmp_path, family, ranks, merge, width):
    """Four KV heads: where fewer are left than there are ranks, each is held several times."""
    model = tiny_model(family, kv_heads=4, groups=2, layers=3, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    asked = {"context": 100, "batch": 20, "tensor_parallel": ranks, **ALL}
    weights, kv = of_one_rank(model, ranks)
    dense = kvprune.fit(tmp_path, memory=round(weights + 2000 * kv), **asked)
    assert (dense["ratio"], dense["dense"]["weights"], dense["dense"]["kv_cache"]) == (0, round(weights), 2000 * kv)
    assert dense["kv_bytes_per_token_of_a_rank"] == {"dense": kv, "pruned": kv}
    assert dense["largest_batch"]["dense"] == 20
    pruned, _ = twin(model, merge, [width] * 3)
    weights, kv = of_one_rank(pruned, ranks)
    report = kvprune.fit(tmp_path, memory=round(weights + 2000 * kv), merge=merge, **asked)
    assert (report["ratio"], report["merge"]) == (pytest.approx(1 - width / (16 * merge)), merge)
    assert (report["pruned"]["weights"], report["pruned"]["kv_cache"]) == (round(weights), 2000 * kv)
    assert report["kv_bytes_per_token_of_a_rank"]["pruned"] == kv
    assert report["largest_batch"]["pruned"] == 20
    assert kvprune.fit(tmp_path, memory=round(weights + 2000 * kv) - 2, merge=merge, **asked)["ratio"] > report["ratio"]


@pytest.mark.parametrize(("ranks", "merge"), [(1, 4), (2, 4), (4, 2), (8, 1), (16, 1)])
def test_it_merges_as_prune_does_for_so_many_ranks(ranks, merge):
    """llama-3-8b has 8 KV heads; most of the cache must go."""
    asked = {"context": 8192, "batch": 64, "tensor_parallel": ranks, "reserve": 0.0}
    dense = kvprune.fit("llama-3-8b", memory=1, **asked)["dense"]
    report = kvprune.fit("llama-3-8b", memory=int(dense["weights"] + 0.3 * dense["kv_cache"]), **asked)
    assert report["merge"] == merge == for_ranks(merge_of("auto", 8, 128, report["ratio"]), True, 8, ranks, print)
    assert 0.6 < report["ratio"] < 0.8


def test_ranks_that_cannot_share_a_model(command):
    asked = ["fit", "llama-3-8b", "--memory", "8GiB", "--context", "8192"]
    code, _, err = command(*asked, "--tensor-parallel", 3)
    assert (code, err.count("\n")) == (2, 1)
    assert "3 cannot share 32 query heads, 8 KV heads and the MLP evenly; choose 1, 2, 4, 8, 16" in err
    code, _, err = command(*asked, "--tensor-parallel", 0)
    assert (code, err.count("\n")) == (2, 1)
    code, out, err = command(*asked, "--tensor-parallel", 4)
    assert code == 0, err
    assert "on each of 4 ranks" in " ".join(out.split())
    assert "32,768" in out  # of 131,072 KV bytes a token


def test_prune_to_fit_on_ranks(checkpoint, texts):
    """As `fit` says, for the same ranks."""
    dense = kvprune.fit(checkpoint, memory="1MB", context=64, batch=6, tensor_parallel=2, **ALL)["dense"]
    memory = dense["weights"] + dense["kv_cache"] // 2
    quick = {"calibration_tokens": 512, "eval_tokens": 512, "windows": (64,), "align": 2, "min_width": 4}
    quick |= {"repair": "rotate", "dtype": "float32"}
    asked = {"context": 64, "batch": 6, "reserve": 0.0, "tensor_parallel": 2}
    result = kvprune.prune(checkpoint, fit=memory, **asked, **quick)
    weights, kv = of_one_rank(result.model, 2)
    assert memory * 0.95 < weights + 6 * 64 * kv <= memory
    assert result.record["merge"] == 1


@settings(max_examples=30)
@given(st.data(), st.sampled_from(["llama", "qwen2"]), st.sampled_from([1, 2, 4]))
def test_layers_around_the_mean_width_hold_no_more(data, family, merge):
    model = tiny_model(family, kv_heads=4, groups=2, layers=3, head_dim=8)
    widths = data.draw(st.lists(st.sampled_from(range(2, 8 * merge + 1, 2)), min_size=3, max_size=3))
    numbers = sum(p.numel() for p in twin(model, merge, widths)[0].parameters())
    mean = Cut(0.5, merge, sum(widths) / 3)
    counted = Weights.of(model.config, False).kept(mean)
    slack = 4 * 2 * 8 * merge * 3 if family == "qwen2" else 0  # Q's bias, which is_factored leaves out
    assert numbers <= counted + slack
    if len(set(widths)) == 1:
        assert numbers == counted


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_cache_is_what_a_real_one_holds(tmp_path, bits, dtype):
    model = tiny_model("llama", kv_heads=2, groups=2, layers=3, head_dim=32, positions=600).to(dtype)
    model.save_pretrained(tmp_path)
    try:
        cache = quantized_cache(model.config, bits)
    except errors.BadOption as error:
        pytest.skip(str(error))
    ids = torch.zeros(3, 500, dtype=torch.long)
    with torch.no_grad():
        for piece in (ids[:, :374], *ids[:, 374:].split(1, dim=1)):
            model(piece, **{CACHE: cache})
    way = next(
        way for way in kvprune.fit(tmp_path, memory="1GiB", context=500, batch=3)["quantized"] if way["kv_bits"] == bits
    )
    assert way["kv_cache"] == pytest.approx(cache_bytes(cache), rel=0.01)
    assert way["total"] - way["kv_cache"] == weight_bytes(model)


def test_the_share_of_tokens_that_fits():
    asked = {"context": 8192, "batch": 4, "reserve": 0.0}
    dense = kvprune.fit("llama-3-8b", memory=10**12, **asked)
    assert dense["keep"] == 1
    weights, kv = dense["dense"]["weights"], dense["dense"]["kv_cache"]
    for keep in (0.95, 0.5, 0.05):
        for memory, expected in ((weights + keep * kv, keep), (weights + (keep - 0.01) * kv, keep - 0.05)):
            found = kvprune.fit("llama-3-8b", memory=round(memory), **asked)["keep"]
            assert found == pytest.approx(expected, abs=1e-9)
    assert kvprune.fit("llama-3-8b", memory=weights - 1, **asked)["keep"] == 0


def test_what_is_recommended_follows_the_memory():
    """Half a byte, and scales: 0.53125 bytes of 2 for 128 channels of bfloat16 in 4 bits."""
    asked = {"context": 2048, "batch": 8, "reserve": 0.0}
    dense = kvprune.fit("llama-3-8b", memory=1, **asked)["dense"]
    weights, kv = dense["weights"], dense["kv_cache"]
    for share, expected in ((1.0, (None, 0)), (0.7, (8, 0)), (0.33, (4, 0))):
        found = kvprune.fit("llama-3-8b", memory=int(weights + share * kv), **asked)["recommended"]
        assert (found["kv_bits"], found["ratio"]) == expected, share
    beside = kvprune.fit("llama-3-8b", memory=int(weights + 0.1 * kv), **asked)
    assert beside["recommended"]["kv_bits"] == 4
    assert 0 < beside["recommended"]["ratio"] < (beside["ratio"] or 1)
    assert kvprune.fit("llama-3-8b", memory=10**9, **asked)["recommended"] is None
    long = {"context": 8192, "batch": 64, "reserve": 0.0}
    dense = kvprune.fit("llama-3-8b", memory=1, **long)["dense"]
    weights, kv = dense["weights"], dense["kv_cache"]
    for merge, two in (("auto", 4), (1, 2)):  # merged heads lose less, and two bits more than half of their width
        for share, expected in ((0.22, 4), (0.165, two), (0.13, 4)):  # two bits take 0.161, four 0.283
            found = kvprune.fit("llama-3-8b", memory=int(weights + share * kv), merge=merge, **long)
            assert found["recommended"]["kv_bits"] == expected, share
            assert (found["recommended"]["ratio"] == 0) == (expected == 2)
    assert kvprune.fit("mistral-7b", memory="1GiB", **asked)["quantized"]  # no sliding window in its second version


def plain_weights(merge, width):
    """Bytes of llama-7b in bfloat16 with `width` channels in each of its 32 / merge KV heads."""
    hidden, heads, d = 4096, 32, 128
    rest = 6_738_415_616 - 32 * 4 * hidden * heads * d
    cached = 2 * (heads // merge) * width * hidden
    outer = min(2 * heads * width * hidden, 2 * heads * d * hidden + 2 * heads * d * width)
    return 2 * (rest + 32 * (cached + outer))


def plain_merge(ratio):
    """As many of 32 KV heads of 128 channels as become one of no more than 256."""
    return max([m for m in (1, 2, 4, 8, 16, 32) if m * 128 * (1 - ratio) < 256.001] or [1])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 16), st.integers(1, 4096), st.floats(0.3, 3.0), st.sampled_from(["auto", 1, 2, "8"]))
def test_what_is_said_to_fit_fits_and_one_more_does_not(batch, context, share, merge):
    dense = fitting.fit("llama-7b", memory=1, context=context, batch=batch)["dense"]
    report = fitting.fit("llama-7b", memory=int(share * dense["total"]), context=context, batch=batch, merge=merge)
    usable, per_token = report["memory_bytes"] - report["reserve_bytes"], report["kv_bytes_per_token"]
    assert report["dense"]["fits"] == (dense["total"] <= usable) == (report["ratio"] == 0)
    if report["pruned"] is not None:
        assert report["pruned"]["fits"]
    largest = report["largest_ratio"]
    assert largest == 1 - 16 / (128 * {"auto": 32, 1: 1, 2: 2, "8": 8}[merge])
    reached = report["ratio"] if report["ratio"] is not None else largest
    merged = plain_merge(reached) if merge == "auto" else int(merge)
    assert report["merge"] == (1 if reached == 0 else merged)
    light = dense["weights"] if reached == 0 else plain_weights(merged, 128 * merged * (1 - reached))
    for removed, weights, name in ((0.0, dense["weights"], "dense"), (reached, light, "pruned")):
        assert report["weights_read_bytes"][name] == pytest.approx(weights - 2 * 32000 * 4096, abs=1)
        for largest, beside in (("largest_batch", context), ("largest_context", batch)):
            most = report[largest][name]
            assert most == 0 or weights + (1 - removed) * per_token * beside * most <= usable * (1 + 1e-9)
            over = weights + (1 - removed) * per_token * beside * (most + 1) > usable * (1 - 1e-9)
            assert over or (largest, most) == ("largest_context", 4096)  # what the model takes


@settings(deadline=None, max_examples=15)
@given(st.floats(0.3, 0.99), st.sampled_from(["auto", 1, 2, 4]), st.sampled_from(["per-layer", "uniform"]))
def test_no_smaller_ratio_is_enough(share, merge, layout):
    """Against all widths there are, one by one."""
    asked = {"context": 4096, "batch": 16, "reserve": 0.0, "merge": merge, "layout": layout, "align": 8}
    dense = fitting.fit("llama-7b", memory=1, **asked)["dense"]
    memory = int(share * dense["total"])
    found = []
    for m in (1, 2, 4, 8, 16, 32) if merge == "auto" else [merge]:
        step = 8 / 32 if layout == "per-layer" else 8
        for n in range(int(16 / step), int(128 * m / step)):
            ratio = 1 - n * step / (128 * m)
            allowed = plain_merge(ratio) == m if merge == "auto" else m == 1 or 128 * m * (1 - ratio) < 256.001
            if allowed and plain_weights(m, n * step) + (1 - ratio) * dense["kv_cache"] <= memory:
                found.append(ratio)
    assert fitting.fit("llama-7b", memory=memory, **asked)["ratio"] == (min(found) if found else None)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-sliding"])
def test_the_largest_context_fits_and_one_more_does_not(saved, family):
    folder, model = saved(family)
    for budget in (25, 60, 100):
        _, kv = real_bytes(model, 2, budget)
        report = kvprune.fit(folder, memory=weight_bytes(model) + kv, context=8, batch=2, **ALL)
        longest = report["largest_context"]["dense"]
        assert real_bytes(model, 2, longest)[1] <= kv
        assert longest == 128 or real_bytes(model, 2, longest + 1)[1] > kv


@pytest.mark.parametrize("merge", [1, 2, 4])
def test_one_width_for_all_layers_is_rounded_up(merge):
    options = {"memory": "20GiB", "context": 4096, "batch": 8, "merge": merge}
    free = fitting.fit("llama-7b", **options)["ratio"]
    ratio = fitting.fit("llama-7b", layout="uniform", **options)["ratio"]
    assert ratio >= free
    assert (merge * 128 * (1 - ratio)) % 8 == pytest.approx(0)
    assert ratio - free < 8 / (merge * 128)


def test_a_config_that_does_not_say_its_dtype(saved):
    folder, _ = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.BadOption, match="--dtype"):
        kvprune.fit(folder, memory="1MB", context=8)


def test_published_sizes():
    report = fitting.fit("llama-7b", memory="80GiB", context=4096, batch=1, reserve=0.0)
    assert report["kv_bytes_per_token"] == 512 * 1024
    assert report["dense"]["weights"] == 2 * 6_738_415_616
    assert fitting.fit("llama-3-8b", memory="80GB", context=4096)["kv_bytes_per_token"] == 128 * 1024


def test_prune_to_fit(checkpoint, texts, tmp_path):
    report = kvprune.fit(checkpoint, memory="1MB", context=64, batch=1, **ALL)
    memory = report["dense"]["weights"] + report["dense"]["kv_cache"] * 3
    options = {"context": 64, "batch": 6, "reserve": 0.0}
    quick = {
        "calibration_tokens": 512,
        "eval_tokens": 512,
        "windows": (64,),
        "align": 2,
        "min_width": 4,
        "repair": "none",
    }
    result = kvprune.prune(checkpoint, tmp_path / "out", fit=memory, **options, **quick)
    weights, kv = real_bytes(result.model, 6, 64)
    assert weights + kv <= memory
    asked = {"memory_bytes": memory, "reserve_bytes": 0, "context": 64, "batch": 6}
    assert kvprune.read_record(tmp_path / "out")["fit"] == asked
    assert result.record["ratio_achieved"] < 0.6  # no more than is needed, but for the widths' grid
    assert result.record["merge"] == 1  # nothing is rotated
    with pytest.raises(errors.UnreachableRatio, match="batch"):
        kvprune.prune(checkpoint, tmp_path / "no", fit=report["dense"]["weights"] // 2, **options, **quick)
    with pytest.raises(errors.BadOption, match="fits as it is"):
        kvprune.prune(checkpoint, tmp_path / "no", fit="1GiB", **options, **quick)
    with pytest.raises(errors.BadOption, match="--ratio"):
        kvprune.prune(checkpoint, tmp_path / "no", fit=memory, ratio=0.5, **options, **quick)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("merge", ["auto", "1"])
def test_prune_to_fit_with_merged_heads(checkpoint, texts, merge):
    dense = kvprune.fit(checkpoint, memory="1MB", context=64, batch=6, **ALL)["dense"]
    memory = dense["weights"] + dense["kv_cache"] // 2
    quick = {"calibration_tokens": 512, "eval_tokens": 512, "windows": (64,), "align": 2, "min_width": 4}
    quick |= {"repair": "rotate", "dtype": "float32", "merge": merge}
    result = kvprune.prune(checkpoint, fit=memory, context=64, batch=6, reserve=0.0, **quick)
    weights, kv = real_bytes(result.model, 6, 64)
    assert memory * 0.95 < weights + kv <= memory
    assert result.record["merge"] == (2 if merge == "auto" else 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": "lots"}, "24GiB"),
        ({"context": 10**9}, "the model takes"),
        ({"context": 0}, "at least 1"),
        ({"reserve": 1.0}, "reserve"),
        ({"dtype": "int4"}, "bfloat16"),
        ({"align": 0}, "align"),
        ({"min_width": 0}, "min-width"),
        ({"merge": 3}, "does not divide the 32 KV heads; choose auto, 1, 2, 4"),
        ({"merge": "many"}, "must be auto, or how many"),
    ],
    ids=str,
)
def test_bad_options(options, says):
    with pytest.raises(errors.BadOption, match=says):
        fitting.fit("llama-7b", **{"memory": "24GiB", "context": 512, **options})


def test_the_command_line(monkeypatch, capsys):
    words = ["fit", "llama-3-8b", "--memory", "24GiB", "--context", "8192", "--batch", "8"]
    for more in ([], ["--json"], ["--json", "--merge", "2"]):
        monkeypatch.setattr("sys.argv", ["kvprune", *words, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        found = capsys.readouterr().out
        if more:
            asked = {"merge": 2} if "--merge" in more else {}
            assert json.loads(found) == kvprune.fit("llama-3-8b", memory="24GiB", context=8192, batch=8, **asked)
        else:
            assert "ratio" in found
            assert "recommended: 8 bits with the dense model" in found
            assert "weights that a step reads" in found


def test_the_table_names_the_heads_that_are_merged(command):
    words = ("fit", "llama-3-8b", "--memory", "24GiB", "--context", "8192", "--batch", "16")
    for merge, says in (("auto", ", every 4 KV heads merged into one"), ("2", ", every 2 KV heads"), ("1", "")):
        code, found, _ = command(*words, "--merge", merge)
        (line,) = [line for line in found.splitlines() if "is needed" in line]
        assert code == 0
        assert says in line
        assert ("merged" in line) == bool(says)
    code, _, err = command(*words, "--merge", "3")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "choose auto, 1, 2, 4, 8" in err
