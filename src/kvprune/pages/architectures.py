"""docs/architectures.md, made from the descriptors: python -m kvprune.pages.architectures > docs/architectures.md"""

from kvprune.models.family import FAMILIES, WHY_NOT, WRAPPERS, Family

ABOVE = """# Architectures

Made by `python -m kvprune.pages.architectures` from the descriptors in `models/family.py`; a test compares the two.
Every family is tested alike (`tests/models/test_every_family.py`): with channels removed, and with all KV heads
merged, the pruned model's logits are those of the dense model whose keys and values lose the same, within 1e-5 in
float32 (2e-5 to 4e-5 where norms or linear attention amplify rounding), for a prompt, for cached steps and for a
left-padded batch, with every attention function that the family has; and the model is the same when it is saved and
loaded.

| model_type | projections | RoPE | norm on q, k | joins the stream | logits | refitted | layouts portable, stock |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
BELOW = """
What a cell means:

- **others**: only some blocks have attention and a KV cache. Only these are cut and count as layers here; what the
  others have, with its state in the cache, stays as it is.
- **projections**: *apart*, or the matrix that holds Q, K and V. Pruned, all have four plain matrices. *Q with a gate*:
  what a head puts out is multiplied channel by channel. Pruned, the gate and O stay as wide as they are, with a matrix
  before them.
- **RoPE**: *half* pairs channel c with c + half, *interleaved* 2c with 2c + 1. Channels that no RoPE turns (partial,
  layers or families without it) are mixed freely, across heads too.
- **norm on q, k**: over each head, or over all at once. Q and K then keep all their rows, and what is kept is chosen
  behind the norm: the cache is as narrow, the weights of Q and K are not. Where RoPE stands before the norm, all
  channels turn, and what is kept of a pair is chosen behind both. A norm on v likewise: V keeps its rows.
- **joins the stream**: behind a norm, refit fits the matrix to what the dense one puts out, before the norm; behind a
  multiplier it divides by it.
- **refitted**: the matrices that refit may change. Experts stay as they are.

A checkpoint of a multimodal model is loaded as its text model alone, where that is one of the families above:
{wrappers}.
What such a model computes on text is what its text model does, tested alike; the tensors of its vision tower are not
read, and a pruned folder is that of the text model (`models/wrapped.py`).

Not supported, and why:

"""


def row(family: Family) -> str:
    """One line of the table."""
    rope = family.rope + (", in some layers" if family.rotates else "")
    rope += "; queries grow with position" if family.temperature else ""
    norm = {"": "", "head": "each head", "all": "all heads"}[family.norm_of]
    joins = "behind norms" if family.behind_attention else "times " + family.times if family.times else "plainly"
    logits = " ".join(family.logits) if family.logits else "plain"
    cells = (
        f"`{family.model_type}`" + (f" (others: {family.others})" if family.others else ""),
        f"`{family.qkv}`, by {family.split}" if family.qkv else "Q with a gate" if family.gated else "apart",
        rope,
        norm + (", behind RoPE" if family.norm_behind_rope else "") + (", and of v" if family.v_norm else ""),
        joins,
        logits,
        "O and down" if family.down else "O",
        family.portable_as or "",
    )
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    """The whole page."""
    reasons: dict[str, list[str]] = {}
    for model_type, why in WHY_NOT.items():
        reasons.setdefault(why, []).append(f"`{model_type}`")
    refused = "".join(f"- {', '.join(names)}: {why}\n" for why, names in reasons.items())
    options = [f"`{f.model_type}` with `{name}`" for f in FAMILIES.values() for name in f.unless]
    refused += f"- {', '.join(options)}: LayerNorm on q and k, projections that are clamped, "
    refused += "attention that looks ahead, a bias of values in front of a gate\n"
    wrappers = ", ".join(f"`{name}`" for name in WRAPPERS)
    return (
        ABOVE
        + "\n".join(row(family) for family in FAMILIES.values())
        + "\n"
        + BELOW.format(wrappers=wrappers)
        + refused
    )


if __name__ == "__main__":
    print(page(), end="")
