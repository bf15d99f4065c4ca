"""What doctor says of folders whose widths, layouts and faults are known."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache

import kvprune
from kvprune.channels.cut.surgery import cut
from kvprune.cli import main
from kvprune.engines import doctor as module
from kvprune.errors import BadOption, BrokenCheckpoint, UnknownSource
from kvprune.models.view import ModelView
from kvprune.runtime.checkpoint import save
from kvprune.runtime.refresh import OWN
from tiny import COARSE, make_plan, random_layers, tiny_model, tiny_tokenizer

GPT_OSS = {
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 64},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    **{"max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 2},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA4 = {
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 256},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": 512, "num_global_key_value_heads": 1},
    **{"max_position_embeddings": 128, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    **{"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "top_k_experts": 2, "moe_intermediate_size": 24},
    **{"pad_token_id": 0, "eos_token_id": 2},
}
TEXTS = {name: COARSE[name] for name in ("calibration_tokens", "eval_tokens", "windows")}
ENGINES = ("transformers", "vllm", "vllm-cpu", "llama.cpp")


def written(folder, widths, layout="per-layer", dtype=torch.float32):
    """A pruned folder of these widths: four KV heads, eight query heads of 128 channels."""
    dense = tiny_model("llama", kv_heads=4, groups=2, layers=2, head_dim=128, hidden=64)
    plan = make_plan(dense, random_layers(dense, widths)).model_copy(update={"layout": layout})
    pruned = dense if layout == "stock" else cut(ModelView(dense), plan)
    pruned.to(dtype)
    size = dtype.itemsize
    record = {
        **{"source": "tiny", "layout": layout, "widths": widths, "head_dim": 128, "perplexity": [], "seconds": {}},
        **{"kv_bytes_per_token": {"dense": 2 * 4 * 256 * size, "pruned": 2 * 4 * sum(widths) * size}},
        "dtype": str(dtype).removeprefix("torch."),
        **{"kv_heads": {"dense": 4, "pruned": 4}, "ratio_achieved": 0.5},
    }
    save(pruned, tiny_tokenizer(), plan.to_json(), lambda: record, folder)
    return folder


@pytest.mark.parametrize(
    ("widths", "layout", "expected"),
    [
        ([32, 64], "per-layer", (True, True, True, False)),
        ([40, 64], "per-layer", (True, True, False, False)),
        ([80, 80], "per-layer", (True, True, True, False)),
        ([16, 64], "per-layer", (True, False, False, False)),
        ([36, 36], "per-layer", (True, False, False, False)),
        ([128, 128], "stock", (True, True, True, True)),
    ],
)
def test_which_engines_take_it(widths, layout, expected, tmp_path):
    report = kvprune.doctor(written(tmp_path / "pruned", widths, layout))
    engines = report["engines"]
    assert tuple(engines[name]["takes"] for name in ENGINES) == expected
    for engine in engines.values():
        assert engine["takes"] == (not engine["why"])
        assert all("prune" in why for why in engine["why"])  # how to mend it
    assert engines["vllm"]["tensor_parallel"] == [1, 2, 4, 8]  # 8 query heads, 4 KV heads, an MLP of 40
    assert engines["transformers"]["tensor_parallel"] == ([1] if layout == "stock" else [1, 2, 4])
    checks = report["checks"]
    assert checks["passed"]
    assert checks["cache_bytes_per_token"]["measured"] == 2 * 4 * sum(widths) * 4
    assert checks["cached_divergence"] < 1e-9
    assert checks["weights"] == "as recorded"


def test_sinks_want_todays_code_in_vllm(tmp_path, texts):
    """An older copy of the code hides them from vLLM, which then refuses to run it."""
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **GPT_OSS)).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    folder = tmp_path / "pruned"
    kvprune.prune(tmp_path / "dense", folder, target="vllm-cpu", merge=1, ratio=0.5, **TEXTS)
    engines = kvprune.doctor(folder)["engines"]
    assert [engines[name]["takes"] for name in ENGINES] == [True, True, True, False]
    assert "--trust-remote-code" in engines["vllm"]["how"]
    (folder / "modeling.py").write_text("VERSION = 8\n")
    found = kvprune.doctor(folder, target="vllm", check=False)["engines"]["vllm"]
    assert found["takes"]
    assert f"with kvprune installed beside it, or first: kvprune refresh {folder}" in found["how"]
    assert "--trust-remote-code" not in found["how"]


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="this transformers does not know it")
@pytest.mark.parametrize("experts", [False, True])
def test_gemma_4(experts, tmp_path, texts, monkeypatch, capsys):
    """Full layers have heads of 512, which vLLM takes; experts want the plugin."""
    more = {"enable_moe_block": experts, "num_experts": 4 if experts else None}
    config = AutoConfig.for_model("gemma4_text", **GEMMA4 | more)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    options = TEXTS | {"ratio": 0.125, "repair": "rotate", "calibration_window": 64}
    for name, widths, takes in (("vllm", [224, 448], (True, False)), ("vllm-cpu", [192, 512], (True, True))):
        out = tmp_path / name
        # the same bytes, of widths that the engine has: the CPU build has none between 256 and 512
        assert kvprune.prune(tmp_path / "dense", out, target=name, **options).record["widths"] == widths
        engines = kvprune.doctor(out, check=False)["engines"]
        assert (engines["vllm"]["takes"], engines["vllm-cpu"]["takes"]) == takes
        for engine in ("vllm", "vllm-cpu"):
            assert ("with kvprune installed beside it" in engines[engine]["how"]) == experts
            assert ("--trust-remote-code" in engines[engine]["how"]) != experts
    code, out, _ = run(monkeypatch, capsys, out, "--target", "vllm-cpu", "--no-check")
    assert code == 0
    assert ("vLLM alone stops at the experts" in out) == experts


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["kvprune", "doctor", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_the_command(tmp_path, monkeypatch, capsys):
    folder = written(tmp_path / "pruned", [40, 64])
    code, out, _ = run(monkeypatch, capsys, folder, "--json")
    assert code == 0
    assert set(json.loads(out)["engines"]) == set(ENGINES)
    code, out, err = run(monkeypatch, capsys, folder, "--target", "vllm-cpu", "--no-check", "--json")
    assert code == 2
    assert json.loads(out)["checks"] is None
    assert err == (
        "kvprune: vllm-cpu has no attention for heads of 40 channels; prune again with --target vllm-cpu, or take "
        "transformers\n"
    )
    code, out, err = run(monkeypatch, capsys, folder, "--target", "vllm", "--no-check")
    assert (code, err) == (0, "")
    assert "FlashAttention: computes 40 as 64" in out


class Forgetful(DynamicCache):
    """Stores what comes and hands back only that, as the first modeling.py did with newer transformers."""

    def update(self, key_states, value_states, *args, **kwargs):
        super().update(key_states, value_states, *args, **kwargs)
        return key_states, value_states


def test_a_model_that_forgets_is_found_out(tmp_path, monkeypatch, capsys):
    folder = written(tmp_path / "pruned", [32, 64])
    monkeypatch.setattr(module, "DynamicCache", Forgetful)
    code, out, err = run(monkeypatch, capsys, folder)
    assert code == 2
    assert "self-check in float32: FAILED" in out
    assert "does not do what its record says" in err


@pytest.mark.parametrize("forgets", [False, True])
def test_float32_tells_rounding_from_a_fault(tmp_path, monkeypatch, forgets):
    """A model may round more in 16 bits than is allowed for."""
    folder = written(tmp_path / "pruned", [32, 64], dtype=torch.bfloat16)
    monkeypatch.setitem(module.ROUNDING, torch.bfloat16, -1.0)
    if forgets:
        monkeypatch.setattr(module, "DynamicCache", Forgetful)
    checks = kvprune.doctor(folder)["checks"]
    assert checks["compute_dtype"] == "float32"
    assert checks["passed"] != forgets
    assert (checks["cached_divergence"] < 1e-9) != forgets
    assert not kvprune.doctor(folder, dtype="bfloat16")["checks"]["passed"]  # as asked, and no other


def test_bytes_that_are_not_the_records_are_found_out(tmp_path):
    folder = written(tmp_path / "pruned", [32, 64])
    record = json.loads((folder / "kvprune.json").read_text())
    record["kv_bytes_per_token"]["pruned"] += 8
    (folder / "kvprune.json").write_text(json.dumps(record))
    assert not kvprune.doctor(folder)["checks"]["passed"]


def test_an_old_copy_of_the_code_is_named(tmp_path):
    folder = written(tmp_path / "pruned", [32, 64])
    known = module.version_of(OWN.read_bytes())
    (folder / "modeling.py").write_text("VERSION = 1\n")
    report = kvprune.doctor(folder, check=False)
    assert (report["code"]["version"], report["code"]["known"]) == (1, known)
    assert "loses the KV cache" in report["code"]["fault"]
    assert any(f"kvprune refresh {folder}" in line for line in module.lines(report))
    assert "one rank only" in report["engines"]["vllm"]["how"]


def test_what_is_refused(tmp_path):
    with pytest.raises(UnknownSource, match="there is no folder"):
        kvprune.doctor(tmp_path / "nowhere")
    with pytest.raises(BrokenCheckpoint):
        kvprune.doctor(tmp_path)
    with pytest.raises(BadOption, match="unknown target 'tgi'"):
        kvprune.doctor(tmp_path, target="tgi")
