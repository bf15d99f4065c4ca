"""What a target sets, what it leaves to the user, and what it refuses."""

import pytest

import kvprune
from kvprune.channels.choice.merging import for_ranks
from kvprune.engines.targets import TARGETS, degrees, kernels, refusals, with_target
from kvprune.errors import BadOption

SET = {
    "transformers": ("per-layer", 8, 16),
    "vllm": ("per-layer", 8, 32),
    "vllm-cpu": ("per-layer", 32, 32),
    "llama.cpp": ("stock", 32, 32),
}


@pytest.mark.parametrize("name", TARGETS)
def test_what_it_sets(name):
    assert with_target(name, {"ratio": 0.5}) == dict(
        zip(("ratio", "layout", "align", "min_width"), (0.5, *SET[name]), strict=True)
    )
    assert with_target(None, {"ratio": 0.5}) == {"ratio": 0.5}


@pytest.mark.parametrize("name", TARGETS)
def test_every_width_that_it_sets_is_one_that_it_takes(name):
    target, (_, align, least) = TARGETS[name], SET[name]
    assert not any(target.refused(width) for width in range(least, 257, align))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vllm-cpu", {"align": 64, "min_width": 64, "layout": "uniform"}),
        ("llama.cpp", {"layout": "portable", "align": 32, "min_width": 64}),
        ("vllm", {"align": 16, "min_width": 48, "layout": "stock", "depth": 0}),
        ("transformers", {"align": 8, "min_width": 16, "layout": "portable", "depth": 3}),
    ],
)
def test_what_the_user_says_counts(name, options):
    assert with_target(name, dict(options)) == options


REFUSED = [
    ("vllm-cpu", {"align": 8}, "multiples of 32, not --align 8"),
    ("vllm-cpu", {"min_width": 16}, "32 at least, not --min-width 16"),
    ("llama.cpp", {"layout": "per-layer"}, "stock and portable, not --layout per-layer"),
    ("vllm", {"depth": "auto"}, "no layer without attention, not --depth auto"),
    ("vllm", {"drop_blocks": 1}, "no layer without attention, not --drop-blocks 1"),
    ("vllm", {"plan": "plan.json"}, "ask kvprune doctor"),
    ("tgi", {}, "choose transformers, vllm, vllm-cpu, llama.cpp"),
]


@pytest.mark.parametrize(("name", "options", "words"), REFUSED)
def test_a_contradiction_is_refused(name, options, words):
    with pytest.raises(BadOption, match=words):
        with_target(name, options)


def test_prune_for_a_target(checkpoint, texts, tmp_path):
    options = {"calibration_tokens": 512, "eval_tokens": 512, "windows": (64,), "device": "cpu"}
    with pytest.raises(BadOption, match="not --align 8"):
        kvprune.prune(checkpoint, tmp_path / "out", target="vllm-cpu", align=8, **options)
    assert not (tmp_path / "out").exists()
    result = kvprune.prune(checkpoint, tmp_path / "out", ratio=0.5, target="llama.cpp", **options)
    assert result.plan.layout == "stock"


KV_HEADS = 8


@pytest.mark.parametrize(
    ("merge", "may_change", "ranks", "expected"),
    [(4, True, 1, 4), (4, True, 2, 4), (4, True, 4, 2), (8, True, 8, 1), (8, True, 16, 1), (4, False, 4, 4)],
)
def test_merged_heads_for_ranks(merge, may_change, ranks, expected):
    said = []
    found = for_ranks(merge, may_change, KV_HEADS, ranks, said.append)
    assert found == expected
    left = KV_HEADS // found
    assert bool(said) == (left < ranks)
    if may_change and left >= ranks:  # no more can be merged, up to what was asked for
        better = [m for m in (1, 2, 4, 8) if found < m <= merge and (KV_HEADS // m) % ranks == 0]
        assert not better


def test_heads_that_ranks_cannot_share():
    with pytest.raises(BadOption, match="cannot share the 2 KV heads that --merge 3 leaves; choose --merge 1, 2"):
        for_ranks(3, False, 6, 3, print)


def test_degrees_by_hand():
    assert degrees(32, 8, 8) == [1, 2, 4, 8, 16]
    assert degrees(9, 3, 3) == [1, 3, 9]
    assert degrees(9, 1, 3) == [1, 3, 9]
    assert degrees(32, 2, 8, others=(11008,)) == [1, 2, 4, 8, 16]
    assert degrees(12, 4, 4) == [1, 2, 4, 12]
    assert degrees(12, 3, 3) == [1, 3, 6, 12]


def test_kernels_by_hand():
    assert kernels([64, 128]) == {"FlashAttention": "as it is", "FlashInfer": "as it is", "Triton": "as it is"}
    assert kernels([48, 96]) == {
        "FlashAttention": "computes 48 as 64",
        "FlashInfer": "not with 48, 96",
        "Triton": "pads 48 as 64, 96 as 128",
    }
    assert kernels([64, 512]) == {
        "FlashAttention": "not with 512, except on Hopper (its version 4)",
        "FlashInfer": "as it is",
        "Triton": "as it is",
    }
    assert kernels([520])["FlashAttention"] == "not with 520"


MIXED = "runs no pruned model some of whose layers never had attention; take transformers"
NO_SUCH = "; prune again with --target vllm-cpu, or take transformers"


@pytest.mark.parametrize(
    ("name", "about", "expected"),
    [
        ("vllm", {"widths": [32, 256, 512]}, []),
        (
            "vllm",
            {"widths": [520]},
            ["has no attention for heads of 520 channels; prune again with --target vllm, or "],
        ),
        ("vllm-cpu", {"widths": [72, 64, 40, 72]}, [f"has no attention for heads of 40, 72 channels{NO_SUCH}"]),
        (
            "vllm-cpu",
            {"widths": [0, 384]},
            ["runs no layer without", f"has no attention for heads of 384 channels{NO_SUCH}"],
        ),
        ("vllm", {"is_hybrid": True}, [MIXED]),
        ("llama.cpp", {"is_hybrid": True}, [MIXED]),
        ("transformers", {"is_hybrid": True, "widths": [0, 2, 1024]}, []),
    ],
)
def test_what_an_engine_refuses(name, about, expected):
    found = list(refusals(name, **{"is_hybrid": False} | about))
    assert len(found) == len(expected)
    for sentence, words in zip(found, expected, strict=True):
        assert sentence.startswith(f"{name} {words}")
