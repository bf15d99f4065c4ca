"""A model in memory is pruned as the folder that it was loaded from, and stays as it is."""

import copy
import hashlib
import json
from tempfile import TemporaryDirectory

import pytest
import torch
from every_family import family_model
from test_every_family import KNOWN
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, GPT2Model, LlamaForSequenceClassification

import kvprune
from kvprune import errors
from kvprune.models.in_memory import copied, from_memory
from kvprune.models.source import load_model, resolve
from kvprune.runtime.linear import PackedLinear
from tiny import COARSE, QUICK, tiny_model, tiny_tokenizer

HALF = {**COARSE, "ratio": 0.5, "windows": (64,)}


def tensors(model):
    """Every parameter and buffer, those of no checkpoint too."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def fingerprint(model):
    found = hashlib.sha256()
    for name, tensor in tensors(model).items():
        found.update(f"{name} {tensor.dtype} {tensor.shape} {tensor.requires_grad} {tensor.data_ptr()}".encode())
        found.update(tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
    state = [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()]
    return (
        found.hexdigest(),
        state,
        model.config.to_json_string(use_diff=False),
        model.generation_config.to_json_string(),
    )


def equal(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("model_type", KNOWN)
def test_a_copy_of_every_family_is_what_its_folder_loads_as(tmp_path, model_type):
    model = family_model(model_type)
    model.save_pretrained(tmp_path)
    loaded, found = load_model(resolve(tmp_path), "cpu"), copied(from_memory(model.train()), "cpu", "auto")
    equal(found, loaded)
    ids = torch.randint(3, 300, (2, 9))
    aligned = copy.deepcopy(loaded)  # a mapped file's tensors lie elsewhere, by which some products round
    assert torch.equal(found(ids).logits, aligned(ids).logits)
    assert found.config._attn_implementation == loaded.config._attn_implementation
    assert not found.training
    mine = {tensor.data_ptr() for tensor in tensors(model).values() if tensor.numel()}
    assert not mine & {tensor.data_ptr() for tensor in tensors(found).values()}


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_dtypes_are_those_of_the_folder(tmp_path, stored, dtype):
    tiny_model("llama", groups=2).to(getattr(torch, stored)).save_pretrained(tmp_path)
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path), kvprune.load(tmp_path)):
        loaded, found = load_model(resolve(tmp_path), "cpu", dtype), copied(from_memory(model), "cpu", dtype)
        assert found.dtype == loaded.dtype
        assert found.config.dtype == loaded.config.dtype
        equal(found, loaded)


def test_what_the_config_calls_rounded_and_is_not_is_written_as_it_is(tmp_path):
    """As after training a bfloat16 checkpoint in float32."""
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).float()
    assert copied(from_memory(model), "cpu", "auto").config.dtype == torch.bfloat16
    with torch.no_grad():
        model.model.norm.weight += 1e-6
    found = copied(from_memory(model), "cpu", "auto")
    assert found.config.dtype == found.dtype == torch.float32
    assert torch.equal(found.model.norm.weight, model.model.norm.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_so(tied):
    model = tiny_model("llama", tie_word_embeddings=tied)
    model.config.tie_word_embeddings = True  # what a config says may be wrong
    found = copied(from_memory(model), "cpu", "auto")
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("options", [{}, {"preset": "kvpruner"}, {"layout": "stock"}, {"dtype": "bfloat16"}], ids=str)
def test_it_is_pruned_as_its_folder_is_and_stays_as_it_is(checkpoint, texts, tmp_path, options):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.train()
    model.model.layers[1].requires_grad_(False)
    ids = torch.randint(3, 300, (1, 9))
    steps = {"max_new_tokens": 8, "do_sample": False}
    before, said = fingerprint(model), model.generate(ids, **steps)
    settings = {**HALF, **options}
    theirs = kvprune.prune(checkpoint, tmp_path / "theirs", **settings)
    mine = kvprune.prune(model, tmp_path / "mine", tokenizer=tiny_tokenizer(), **settings)
    assert fingerprint(model) == before
    assert torch.equal(model.generate(ids, **steps), said)
    assert mine.plan == theirs.plan
    for name in ("plan.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    same = set(mine.record) - {"seconds", "peak_memory_bytes", "files", "from_memory"}
    assert {name: mine.record[name] for name in same} == {name: theirs.record[name] for name in same}
    assert (mine.record["from_memory"], theirs.record["from_memory"]) == (True, False)
    assert mine.record["source"] == str(checkpoint)
    with torch.no_grad():  # what comes back shares nothing with it
        for parameter in mine.model.parameters():
            parameter.zero_()
    assert fingerprint(model) == before


def test_what_kvprune_loaded_is_pruned_too(checkpoint, texts):
    """It attends by a function of kvprune's own."""
    model = kvprune.load(checkpoint)
    found = kvprune.prune(model, tokenizer=tiny_tokenizer(), **HALF)
    again = kvprune.prune(checkpoint, **HALF)
    assert found.plan == again.plan
    equal(found.model, again.model)
    assert model.config._attn_implementation != found.model.config._attn_implementation


def test_one_without_a_name_nor_tokenizer(tmp_path):
    """On token ids alone; what is written loads, and has no tokenizer."""
    ids = torch.randint(3, 300, (9000,))
    model = tiny_model("llama", groups=2, head_dim=32, layers=4)
    result = kvprune.prune(model, tmp_path / "out", calibration=ids, **HALF)
    assert result.tokenizer is None
    assert result.record["source"] == result.plan.model.source == "a model in memory"
    assert result.record["calibration"]["text"] == "9000 token ids"
    assert torch.equal(kvprune.load(tmp_path / "out")(ids[None, :20]).logits, result.model(ids[None, :20]).logits)
    with pytest.raises(errors.BrokenCheckpoint, match="has no tokenizer"):
        kvprune.load_tokenizer(tmp_path / "out")
    for needs in ({"calibration": "wikitext2"}, {"calibration": ["the cat"]}, {"calibration": "self"}, {}):
        with pytest.raises(errors.BadOption, match="add tokenizer="):
            kvprune.prune(model, **needs, **HALF)
    with pytest.raises(errors.BadOption, match="add tokenizer="):
        kvprune.prune(model, calibration=ids, eval="wikitext2", **HALF)


def test_a_given_tokenizer_counts_for_a_folder_too(checkpoint, texts, tmp_path):
    """A folder that has none."""
    tiny_model("llama", groups=2, head_dim=32, layers=4).save_pretrained(tmp_path / "bare")
    with pytest.raises(errors.BrokenCheckpoint, match="has no tokenizer"):
        kvprune.prune(tmp_path / "bare", **HALF)
    found = kvprune.prune(tmp_path / "bare", tokenizer=tiny_tokenizer(), **HALF)
    assert found.plan.layers == kvprune.prune(checkpoint, **HALF).plan.layers


def test_a_run_goes_on_with_the_same_model_only(checkpoint, texts, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    given = {"tokenizer": tiny_tokenizer(), **HALF}

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kvprune.channels.prune.refit", stop)
        with pytest.raises(KeyboardInterrupt):
            kvprune.prune(model, tmp_path / "out", **given)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(errors.OutputExists, match="unfinished run with weights="):
        kvprune.prune(other, tmp_path / "out", resume=True, **given)
    found = kvprune.prune(model, tmp_path / "out", resume=True, **given)
    assert found.plan == kvprune.prune(checkpoint, **HALF).plan


def adapted():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))


def adapted_inside():
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), tiny_model("llama"))


def quantised():
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def on_meta():
    model = tiny_model("llama")
    model.model.layers[1].to("meta")
    return model


def left_on_disk():
    model, places = tiny_model("llama"), {"model.layers.1": "disk"}
    others = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, device_map=places | dict.fromkeys(others, "cpu"), offload_folder=folder
        )


def on_two_devices():
    """As device_map="auto" leaves it, but for the numbers, which no GPU holds here."""
    model = tiny_model("llama")
    with FakeTensorMode():
        elsewhere = torch.empty(model.model.layers[1].mlp.up_proj.weight.shape, device="cuda:1")
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(elsewhere, requires_grad=False)
    return model


def packed():
    model = tiny_model("llama")
    model.lm_head = PackedLinear(model.lm_head)
    return model


def another_module():
    model = tiny_model("llama")
    model.model.layers[0].self_attn.q_proj = torch.nn.Sequential(model.model.layers[0].self_attn.q_proj)
    return model


MISTAKES = {
    "adapters": (adapted, {}, errors.BadOption, "merge them first: model.merge_and_unload"),
    "adapters inside": (adapted_inside, {}, errors.BadOption, "merge them first"),
    "quantised": (quantised, {}, errors.BadOption, "quantised weights"),
    "packed": (packed, {}, errors.BadOption, "cannot be read back"),
    "on meta": (on_meta, {}, errors.BadOption, "not in memory"),
    "left on disk": (left_on_disk, {}, errors.BadOption, r"not in memory \(device_map.*give the folder"),
    "on two devices": (on_two_devices, {}, errors.BadOption, "spread over cpu, cuda:1; move it.*or give the folder"),
    "compiled": (lambda: torch.compile(tiny_model("llama")), {}, errors.UnknownSource, "the model inside"),
    "a module": (lambda: torch.nn.Linear(2, 2), {}, errors.UnknownSource, "Linear is no source"),
    "nothing": (lambda: None, {}, errors.UnknownSource, "NoneType is no source"),
    "no head": (lambda: GPT2Model(family_model("gpt2").config), {}, errors.UnknownSource, "ForCausalLM"),
    "another head": (
        lambda: LlamaForSequenceClassification(tiny_model("llama").config),
        {},
        errors.UnknownSource,
        "ForCausalLM",
    ),
    "changed": (another_module, {}, errors.UnknownSource, "has model.layers.0.self_attn.q_proj.0.weight|lacks model"),
    "revision": (lambda: tiny_model("llama"), {"revision": "main"}, errors.BadOption, "--revision"),
    "memory": (lambda: tiny_model("llama"), {"memory": "1GiB"}, errors.BadOption, "--memory 1GiB"),
    "fit": (lambda: tiny_model("llama"), {"fit": "1GiB", "context": 100}, errors.BadOption, "--fit"),
    "device": (lambda: tiny_model("llama"), {"device": "nosuch"}, errors.BadOption, "nosuch"),
    "two devices": (lambda: tiny_model("llama"), {"device": "cuda:0,cuda:1"}, errors.BadOption, "--device cuda:0"),
    "dtype": (lambda: tiny_model("llama"), {"dtype": "int3"}, errors.BadOption, "int3"),
    "tokenizer": (lambda: tiny_model("llama"), {"tokenizer": "gpt2"}, errors.BadOption, "tokenizer is a str"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_pruned_says_so_in_one_line(texts, tmp_path, name):
    make, options, error, message = MISTAKES[name]
    with pytest.raises(error, match=message) as caught:
        kvprune.prune(make(), tmp_path / "out", **{"tokenizer": tiny_tokenizer(), **QUICK, **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_pruned_one_is_refused(pruned_half):
    with pytest.raises(errors.BadOption, match="pruned already"):
        kvprune.prune(kvprune.load(pruned_half), tokenizer=tiny_tokenizer(), **QUICK)


def test_a_teacher_in_memory(checkpoint, texts, tmp_path):
    """Where the record cannot name one, it must be given; it teaches as its folder does."""
    quick = {"steps": 4, "window": 32, "rank": 4, "warmup": 2, "held_out": 512, "eval_tokens": 512, "device": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = fingerprint(model)
    kvprune.prune(model, tmp_path / "half", tokenizer=tiny_tokenizer(), **HALF)
    with pytest.raises(errors.UnknownSource, match="with --teacher"):
        kvprune.recover(tmp_path / "half", **quick)
    found = kvprune.recover(tmp_path / "half", teacher=model, **quick)
    again = kvprune.recover(tmp_path / "half", teacher=checkpoint, **quick)
    assert found.record["recovered"]["curve"] == again.record["recovered"]["curve"]
    equal(found.model, again.model)
    assert fingerprint(model) == before
    assert json.dumps(found.record)  # a name stands for the model
