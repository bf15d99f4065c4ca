"""Quality against KV bytes: fewer bits, less width, fewer tokens, and their products, all on the same text.

    KVPRUNE_DATA=DIR python benchmarks/kv_curve.py MODEL NAME=FOLDER ... [--window 512] [--only PATTERN ...] [--out OUT]

MODEL is the dense one; every FOLDER, pruned or not, is a model called NAME: `half=work/closed-form-0.5`. A name that
begins with "dense+" was trained on WikiText-2 and is compared with the model called "dense+", which was too. Each is
read as it is, on caches of 8, 4 and 2 bits (transformers' own), under a token filter that skips 25 % or keeps half,
and both. Judged on the first 8,192 tokens of the test splits of WikiText-2 and PTB. KV bytes are those of a real cache
of 64 tokens less than a window, where a quantised one holds 64 at full size, its mean while decoding: longer contexts
need a smaller share.
Finished cells are kept in OUT.json; OUT.md and OUT.png are drawn from it.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from cells import Cells

import kvprune
from kvprune.measure.memory import cache_bytes
from kvprune.measure.perplexity import perplexity
from kvprune.runtime.cache import GrowingCache
from kvprune.runtime.modeling import CACHE
from kvprune.runtime.quantized import RECENT, decoding_pieces, quantized_cache
from kvprune.text.judged import find_texts, judged_windows

TEXTS, TOKENS = ("wikitext2", "ptb"), 8192
BITS = (None, 8, 4, 2)
SKIPS, KEEP = (None, 0.25), 0.5
DENSE, PLUS = "dense", "dense+"


def ways() -> list[tuple[str, int | None, dict[str, float]]]:
    """(what is done at run time, bits, what a TokenFilter is given, if anything)."""
    found: list[tuple[str, int | None, dict[str, float]]] = []
    for bits in BITS:
        plain = f"{bits} bits" if bits else ""
        for skip in SKIPS:
            parts = (plain, f"{skip:.0%} of tokens skip" if skip else "")
            found.append((", ".join(filter(None, parts)) or "as it is", bits, {"ratio": skip} if skip else {}))
        found.append((", ".join(filter(None, (plain, f"{KEEP:.0%} of tokens kept"))), bits, {"keep": KEEP}))
    return found


@torch.no_grad()
def held(model, ids: torch.Tensor, bits: int | None, token_filter) -> int:
    """KV bytes of the tokens of ids (1, T)."""
    cache: Any = GrowingCache(model.config) if bits is None else quantized_cache(model.config, bits)
    tokens = ids.shape[1]
    pieces = [tokens] if bits is None else decoding_pieces(bits, tokens)
    with nullcontext() if token_filter is None else token_filter(model):
        for piece in ids.split(pieces, dim=1):
            model(piece, logits_to_keep=1, **{CACHE: cache})
    return cache_bytes(cache)


def measure(model, texts, bits: int | None, given: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    given = {**given, "layers": layers} if "ratio" in given else given
    token_filter = kvprune.TokenFilter(**given) if given else None
    found: dict[str, Any] = {}
    for name, windows in texts:
        with torch.no_grad(), nullcontext() if token_filter is None else token_filter(model):
            value = perplexity(model, windows, kv_bits=bits).value
        found[name] = {"perplexity": value, "kv_bytes": held(model, windows[:1, : -RECENT // 2], bits, token_filter)}
    return found


def run(cells: Cells, models: dict[str, str], window: int) -> None:
    texts = judged_windows(find_texts(TEXTS), kvprune.load_tokenizer(models[DENSE]), (window,), TOKENS)
    study = {"text": "wikitext2", "tokens": 4096, "window": 512}
    cells.run("layers", lambda: kvprune.study_layers(models[DENSE], **study), needed=True)
    layers = cells.cells["layers"]["layers"]
    for name, source in models.items():
        model = kvprune.load(source)
        for way, bits, given in ways():
            needed = name in (DENSE, PLUS) and way == "as it is"
            cells.run(f"{name}: {way}", lambda b=bits, g=given, m=model: measure(m, texts, b, g, layers), needed)


def points(cells: Cells, text: str) -> list[tuple[str, str, float, float]]:
    """(model, way, share of the dense KV bytes, perplexity over that of dense, or of dense+ trained alike)."""
    found = []
    whole = cells.cells[f"{DENSE}: as it is"][text]["kv_bytes"]
    for key, cell in cells.cells.items():
        if ": " in key:
            name, way = key.split(": ")
            base = cells.cells[f"{PLUS if name.startswith(PLUS) else DENSE}: as it is"][text]["perplexity"]
            found.append((name, way, cell[text]["kv_bytes"] / whole, cell[text]["perplexity"] / base))
    return sorted(found, key=lambda point: -point[2])


def best(found: list[tuple[str, str, float, float]]) -> set[tuple[str, str]]:
    """Those that nothing with as few bytes beats."""
    return {(p[0], p[1]) for p in found if not any(q[2] <= p[2] and q[3] < p[3] for q in found)}


def table(cells: Cells) -> str:
    both = {text: points(cells, text) for text in TEXTS}
    front = {text: best(found) for text, found in both.items()}
    rows = [
        "| model | read | KV bytes, WikiText-2 | perplexity / dense | KV bytes, PTB | perplexity / dense |",
        "| --- | --- |" + " ---: |" * 4,
    ]
    second = {(name, way): (share, ratio) for name, way, share, ratio in both["ptb"]}
    for name, way, share, ratio in both["wikitext2"]:
        columns = [name, way]
        for text, pair in (("wikitext2", (share, ratio)), ("ptb", second[name, way])):
            mark = "**" if (name, way) in front[text] else ""
            columns += [f"{pair[0]:.1%}", f"{mark}{pair[1]:.3f}{mark}"]
        rows.append("| " + " | ".join(columns) + " |")
    return "\n".join(rows) + "\n\nIn bold: no other has as few bytes and a lower figure.\n"


def draw(cells: Cells, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for panel, text in zip(panels, TEXTS, strict=True):
        found = points(cells, text)
        for number, name in enumerate(dict.fromkeys(name for name, *_ in found)):
            mine = [point for point in found if point[0] == name]
            panel.plot([p[2] for p in mine], [p[3] for p in mine], "os^DvPX*"[number % 8], label=name)
        front = sorted((p[2], p[3]) for p in found if (p[0], p[1]) in best(found))
        panel.step(*zip(*front, strict=True), where="post", color="0.6", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_ylim(0.9, 8)
        shares, ratios = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16), (1, 1.25, 1.5, 2, 3, 4, 6, 8)
        panel.set_xticks(shares, [f"{share:.3g}" for share in shares])
        panel.set_yticks(ratios, [f"{ratio:g}" for ratio in ratios])
        panel.minorticks_off()
        panel.set_xlabel("KV bytes / dense")
        panel.set_title(text)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity / dense (dense+: / dense trained alike)")
    panels[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("others", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="names of cells; * matches anything")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kv_curve"))
    arguments = parser.parse_args()
    models = {DENSE: arguments.model, **dict(other.split("=", 1) for other in arguments.others)}
    cells = Cells(arguments.out, arguments.model, arguments.only, {"window": arguments.window})
    run(cells, models, arguments.window)
    arguments.out.with_suffix(".md").write_text(table(cells))
    print(table(cells))
    draw(cells, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
