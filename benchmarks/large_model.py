"""Pruning a model that is larger than the memory, block by block: how much of it is held, and how long it takes.

    python benchmarks/large_model.py make FOLDER --tokenizer SOURCE [--layers 32]  # LLaMA-7B's shape, random weights
    python benchmarks/large_model.py run FOLDER --work DIR [--memory 6GiB] [--tokens 2048] [--out OUT]
    python benchmarks/large_model.py prune MODEL --work DIR [--memory 6GiB] [--tokens 2048]  # a folder or .gguf file

`run` times a dense pass over the text, streamed, and then prunes half of the KV bytes in a process of its own. Written
down for each phase: seconds, and as multiples of that dense pass for the same number of tokens; the peak of the memory
that is the process's own (RssAnon: mapped files are the operating system's, and can be taken back at any time), and of
what PyTorch holds of a GPU, which is taken where there is one; beside it what the formula says. Weights are random, so
perplexities mean nothing and are left out.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import kvprune
from kvprune.models.source import load_model, resolve
from kvprune.progress import Progress
from kvprune.versions import versions

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}


def make(folder: Path, tokenizer: str, layers: int) -> None:
    """A sharded checkpoint of bfloat16 numbers, a shard a block; the vocabulary is the tokenizer's."""
    words = kvprune.load_tokenizer(tokenizer)
    shape: dict[str, Any] = SHAPE | {"num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=len(words), tie_word_embeddings=False, dtype="bfloat16", **shape)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        part = name.split(".")[2] if ".layers." in name else "outside"
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    folder.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            shape = model.state_dict()[name].shape
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            if "norm" not in name:
                tensors[name] = (torch.randn(shape, generator=generator, device=device) * 0.02).to(
                    "cpu", torch.bfloat16
                )
        save_file(tensors, folder / file, {"format": "pt"})
    weight_map = {name: file for file, names in shards.items() for name in names}
    total = sum(p.numel() * 2 for p in model.parameters())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    words.save_pretrained(folder)


class Watch(Progress):
    """Keeps the peak of the process's own memory in each phase, and tells the phases as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, int] = {}
        self.on_gpu: dict[str, int] = {}
        self.now = ""
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
            self.peaks[self.now] = max(self.peaks.get(self.now, 0), held)
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                held = torch.cuda.memory_reserved()
                self.on_gpu[self.now] = max(self.on_gpu.get(self.now, 0), held)
            time.sleep(0.05)

    @contextmanager
    def phase(self, name: str, total: int = 1):
        before, self.now = self.now, name
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        with super().phase(name, total) as advance:
            yield advance
        self.now = before

    def say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


def dense_pass(folder: Path, work: Path, tokens: int) -> float:
    """Seconds of one streamed pass of the text."""
    lm = load_model(resolve(folder), offload=work / "aside")
    ids = torch.randint(3, 30000, (tokens // 512, 512), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    kvprune.perplexity(lm, ids)
    return time.perf_counter() - start


def pruned(folder: Path, work: Path, memory: str, tokens: int) -> dict[str, Any]:
    watch = Watch()
    start = time.perf_counter()
    result = kvprune.prune(
        folder,
        work / "pruned",
        memory=memory,
        ratio=0.5,
        calibration_tokens=tokens,
        repair_tokens=tokens,
        eval_tokens=tokens,
        windows=(512,),
        resume=(work / "pruned").exists(),
        progress=watch,
    )
    record = result.record
    return {
        "seconds": record["seconds"] | {"all": time.perf_counter() - start},
        "peaks": {name: peak for name, peak in watch.peaks.items() if name},
        "gpu_peaks": {name: peak for name, peak in watch.on_gpu.items() if name},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "formula": record["memory_formula_bytes"],
        "streamed": record["streamed"],
        "merge": record["merge"],
        "refit": sum(row["ridge"] is not None for row in record["refit"]),
        "ratio_achieved": record["ratio_achieved"],
    }


def table(found: dict[str, Any]) -> str:
    rows = ["| phase | minutes | dense passes | peak, GiB | of the GPU |", "| --- |" + " ---: |" * 4]
    for name, seconds in found["seconds"].items():
        held = (found[key] for key in ("peaks", "gpu_peaks"))
        peaks = [max(peak.values(), default=0) if name == "all" else peak.get(name, 0) for peak in held]
        columns = [f"{seconds / 60:.1f}", f"{seconds / found['dense_pass']:.1f}", *(f"{p / 2**30:.2f}" for p in peaks)]
        rows.append(f"| {name} | {' | '.join(columns)} |")
    rows += ["", "| the formula | GiB |", "| --- | ---: |"]
    rows += [f"| {name} | {size / 2**30:.2f} |" for name, size in found["formula"].items()]
    rows.append(f"| together | {sum(found['formula'].values()) / 2**30:.2f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "dense", "prune"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--memory", default="6GiB")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/large_model"))
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder, given.tokenizer, given.layers)
    elif given.what == "dense":
        print(json.dumps(dense_pass(given.folder, given.work, given.tokens)))
    elif given.what == "prune":
        print(json.dumps(pruned(given.folder, given.work, given.memory, given.tokens)))
    else:
        again = [sys.executable, __file__, "", *sys.argv[2:]]
        found: dict[str, Any] = {"tokens": given.tokens, "memory": given.memory, "shape": SHAPE, "versions": versions()}
        for name in ("dense", "prune"):  # each in a process of its own, since memory is looked at
            again[2] = name
            told = json.loads(subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout)
            found |= {"dense_pass": told} if name == "dense" else told
        given.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
        print(table(found))


if __name__ == "__main__":
    main()
