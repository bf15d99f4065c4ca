"""Which tokens of a paragraph are skipped in which layer: tokens along x, layers along y.

    python benchmarks/token_picture.py MODEL [--skip 0.25] [--layers 28 25 ...] [--out docs/tokens.png]

The paragraph is a part of docs/tokens.md, prefilled at once.
"""

import argparse
from pathlib import Path

import matplotlib
import torch

import kvprune

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import ListedColormap

HERE = Path(__file__).resolve().parent.parent
TOKENS, WARMUP = 128, 16


def paragraph() -> str:
    """The first two paragraphs of docs/tokens.md behind its title."""
    parts = (HERE / "docs" / "tokens.md").read_text().split("\n\n")
    return " ".join(" ".join(parts[1:3]).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--skip", type=float, default=0.25)
    parser.add_argument("--layers", type=int, nargs="*", help="those that may skip, best first")
    parser.add_argument("--out", type=Path, default=HERE / "docs" / "tokens.png")
    arguments = parser.parse_args()
    model, tokenizer = kvprune.load(arguments.model), kvprune.load_tokenizer(arguments.model)
    ids = tokenizer(paragraph(), return_tensors="pt")["input_ids"][:, :TOKENS]
    token_filter = kvprune.TokenFilter(arguments.skip, layers=arguments.layers, warmup=WARMUP, record=True)
    with torch.no_grad(), token_filter(model) as f:
        model(ids)
    words = [tokenizer.decode(i).replace("\n", "⏎") for i in ids[0]]
    figure, axes = pyplot.subplots(figsize=(18, 6))
    axes.imshow(f.skipped[:, 0], aspect="auto", cmap=ListedColormap(["#dbe7f3", "#c1440e"]), interpolation="nearest")
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
    axes.set_ylabel("layer")
    achieved = f.report["ratio_achieved"]
    axes.set_title(
        f"{Path(arguments.model).name}: attention that is skipped (red), {achieved:.0%} of all behind the warm-up "
        f"of {WARMUP} tokens, {arguments.skip:.0%} asked"
    )
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
