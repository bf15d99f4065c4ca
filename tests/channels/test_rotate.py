"""Moments against plain loops, rotations against brute force, the rotated cut against the projected dense model."""

import copy

import pytest
import torch

import kvprune
from kvprune.channels.importance import IMPORTANCE
from kvprune.channels.masking import masked
from kvprune.channels.moments import AttentionMoments, attention_moments
from kvprune.channels.plan import LayerPlan
from kvprune.channels.repair.rotate import key_basis, slow_channels, value_basis
from kvprune.channels.selection import Kept
from kvprune.channels.statistics import measure_attention
from kvprune.channels.surgery import cut
from kvprune.errors import BadOption, PlanMismatch
from kvprune.models.view import ModelView
from kvprune.runtime.modeling import CACHE
from tiny import COARSE, FAMILIES, VOCABULARY, make_plan, tiny_model

D, KV, GROUPS = 16, 2, 3
# So slow that half of the pairs do not turn at all over a tiny text: then mixing them is exact.
STILL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e60}}

V_OF_LAYER_0 = "model.layers.0.self_attn.v_proj.weight"


def batches():
    return list(torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1)).split(2))


def nothing(_steps):
    pass


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_moments_equal_plain_loops(family):
    model = tiny_model(family, kv_heads=KV, groups=GROUPS, head_dim=D, attention="eager")
    view = ModelView(model)
    slow = torch.tensor([6, 14, 7, 15])
    found = list(attention_moments(view, batches(), slow, nothing))
    rotary = model.model.rotary_emb
    for layer, moments in enumerate(found):
        attention = model.model.layers[layer].self_attn
        pairs = torch.zeros(KV, D // 2, dtype=torch.float64)
        queries, keys = (torch.zeros(KV, 4, 4, dtype=torch.float64) for _ in range(2))
        outputs = torch.zeros(KV, D, D, dtype=torch.float64)
        tokens = 0
        for ids in torch.cat(batches()):
            out = model(ids[None], output_hidden_states=True, output_attentions=True)
            x = model.model.layers[layer].input_layernorm(out.hidden_states[layer][0])
            q, k = attention.q_proj(x).double(), attention.k_proj(x).double()
            v = torch.nn.functional.linear(x, attention.v_proj.weight).double()
            cos, sin = (table[0].double() for table in rotary(x[None], torch.arange(len(ids))[None]))
            tokens += len(ids)
            for head in range(KV):
                for group in range(GROUPS):
                    h = head * GROUPS + group
                    weights = out.attentions[layer][0, h].double()
                    for m in range(len(ids)):
                        qm = q[m, h * D : (h + 1) * D] * attention.scaling
                        queries[head] += torch.outer(qm[slow], qm[slow])
                        kn = k[:, head * D : (head + 1) * D]
                        mean = weights[m] @ kn[:, slow]
                        for n in range(m + 1):
                            centred = kn[n, slow] - mean
                            keys[head] += weights[m, n] * torch.outer(centred, centred)
                        z = weights[m] @ v[:, head * D : (head + 1) * D]
                        outputs[head] += torch.outer(z, z)
                        for pair in range(D // 2):
                            a, b = pair, pair + D // 2
                            terms = []
                            for n in range(len(ids)):
                                ra = kn[n, a] * cos[n, a] - kn[n, b] * sin[n, a]
                                rb = kn[n, b] * cos[n, b] + kn[n, a] * sin[n, b]
                                qa = qm[a] * cos[m, a] - qm[b] * sin[m, a]
                                qb = qm[b] * cos[m, b] + qm[a] * sin[m, b]
                                terms.append(qa * ra + qb * rb)
                            terms = torch.stack(terms)
                            pairs[head, pair] += weights[m] @ terms**2 - (weights[m] @ terms) ** 2
        both = torch.cat((pairs, pairs), 1) / (2 * tokens)
        torch.testing.assert_close(moments.pairs, both, rtol=1e-3, atol=1e-6)
        queries *= rotary.attention_scaling**4  # so that a direction counts in the unit of the pairs
        assert (rotary.attention_scaling != 1) == (family in ("yarn", "longrope"))
        torch.testing.assert_close(moments.queries, queries / tokens, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.keys, keys / (tokens * GROUPS), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(moments.outputs, outputs / tokens, rtol=1e-4, atol=1e-6)


def spd(n, seed):
    factor = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.T / n


def descend(loss, *shapes):
    """The lowest value that gradient descent from many starts finds."""
    best = float("inf")
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
        optimizer = torch.optim.LBFGS(tensors, max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-14)

        def closure(tensors=tensors, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(*tensors)
            value.backward()
            return value

        optimizer.step(closure)
        best = min(best, loss(*tensors).item())
    return best


@pytest.mark.parametrize("width", [1, 2, 4])
def test_value_cut_is_the_optimum_of_its_metric(width):
    """E |W_o (z - z_hat)|^2 over all rank-d maps z -> up down z, by brute force."""
    n, moment = 6, spd(6, 1)
    o = torch.randn(1, 2, n, 5, dtype=torch.float64)
    basis = value_basis(AttentionMoments(*(torch.zeros(1),) * 3, outputs=moment[None]), o)
    matrix = o[0].transpose(1, 2).reshape(-1, n)

    def loss(up, down):
        lost = matrix @ (torch.eye(n, dtype=torch.float64) - up @ down)
        return (lost @ moment * lost).sum()

    ours = loss(basis.up[0, :, :width], basis.down[0, :width]).item()
    assert ours == pytest.approx(descend(loss, (n, width), (width, n)), rel=1e-3)
    torch.testing.assert_close(basis.up @ basis.down, torch.eye(n, dtype=torch.float64)[None], atol=1e-8, rtol=0)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_key_cut_is_the_optimum_of_its_metric(width):
    """E (q^T (k - k_hat))^2 with q and centred k unrelated."""
    n, queries, keys = 6, spd(6, 1), spd(6, 2)
    basis, kept = key_basis(AttentionMoments(torch.zeros(1), queries[None], keys[None], torch.zeros(1)))

    def loss(up, down):
        lost = torch.eye(n, dtype=torch.float64) - up @ down
        return torch.trace(queries @ lost @ keys @ lost.T)

    ours = loss(basis.up[0, :, :width], basis.down[0, :width]).item()
    assert ours == pytest.approx(descend(loss, (n, width), (width, n)), rel=1e-3)
    assert ours == pytest.approx(kept[0, width:].sum().item(), rel=1e-3)
    assert kept.sum().item() == pytest.approx(torch.trace(queries @ keys).item(), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2"])
@pytest.mark.parametrize("groups", [1, 3])
@torch.no_grad()
def test_rotated_cut_equals_the_projected_dense_model(family, groups):
    """With pairs that do not turn: K and V of the dense model projected on the kept directions, the rest untouched."""
    model = tiny_model(family, kv_heads=KV, groups=groups, head_dim=D, **STILL)
    view = ModelView(model)
    slow = slow_channels(view)
    assert len(slow) == D - 2  # all pairs but the first
    _, rotations = measure_attention(view, batches(), IMPORTANCE["variance"], True, nothing)
    width, turning = 8, [0, D // 2]
    # The pair that turns, and the first three pairs of directions.
    kept = sorted([*turning, *slow[: width - 2].tolist()])
    plan = make_plan(model, [([kept] * KV, [list(range(width))] * KV)] * 2)
    plan = plan.model_copy(update={"layers": tuple(LayerPlan(qk=layer.qk, vo=None) for layer in plan.layers)})
    with pytest.raises(PlanMismatch, match="calibration"):
        cut(view, plan)

    reference = copy.deepcopy(model)
    for block, rotation in zip(reference.model.layers, rotations, strict=True):
        attention = block.self_attn
        for head in range(KV):
            rows = slice(head * D, (head + 1) * D)
            values = rotation.values
            left = (values.up[head, :, :width] @ values.down[head, :width]).float()
            attention.v_proj.weight[rows] = left @ attention.v_proj.weight[rows]
            left = (rotation.keys.up[head, :, : width - 2] @ rotation.keys.down[head, : width - 2]).float()
            attention.k_proj.weight[head * D + slow] = left @ attention.k_proj.weight[head * D + slow]
            if attention.k_proj.bias is not None:
                attention.k_proj.bias[head * D + slow] = left @ attention.k_proj.bias[head * D + slow]
    ids = torch.randint(3, VOCABULARY, (2, 11))
    expected = reference(ids).logits
    pruned = cut(view, plan, rotations)
    torch.testing.assert_close(pruned(ids).logits, expected, rtol=1e-4, atol=2e-5)
    assert (expected - model(ids).logits).abs().max() > 1e-3
    prefill = pruned(ids[:, :6], use_cache=True)
    decoded = pruned(ids[:, 6:], **{CACHE: prefill[CACHE]}).logits
    torch.testing.assert_close(decoded, expected[:, 6:], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_keeping_all_directions_changes_nothing():
    model = tiny_model("qwen2", kv_heads=KV, groups=2, head_dim=D, **STILL)
    view = ModelView(model)
    _, rotations = measure_attention(view, batches(), IMPORTANCE["variance"], True, nothing)
    ids = torch.randint(3, VOCABULARY, (2, 11))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(ids).logits
    everything = torch.arange(D).repeat(KV, 1)
    with masked(view.attention[0], Kept(everything, None), rotations[0]):
        assert not torch.equal(
            model.model.layers[0].self_attn.v_proj.weight, before["model.layers.0.self_attn.v_proj.weight"]
        )
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=2e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masked_is_what_cut_makes(checkpoint):
    """The sensitivity probes see the very model that surgery would make, frequencies included."""
    model = kvprune.load(checkpoint)
    view = ModelView(model)
    scores, rotations = measure_attention(view, batches(), IMPORTANCE["variance"], True, nothing)
    from kvprune.channels.selection import everything, select

    kept = Kept(select(scores[1], 16, view.units, False).qk, None)
    whole = everything(2, 32)
    layers = [LayerPlan(qk=whole.qk.tolist(), vo=whole.vo.tolist())] * 4
    layers[1] = LayerPlan(qk=kept.qk.tolist(), vo=None)
    plan = make_plan(model, [(whole.qk.tolist(), whole.vo.tolist())] * 4)
    ids = torch.randint(3, VOCABULARY, (2, 11))
    with torch.no_grad():
        found = cut(view, plan.model_copy(update={"layers": tuple(layers)}), rotations)(ids).logits
        with masked(view.attention[1], kept, rotations[1]):
            torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=2e-5)


def test_plan_of_a_rotated_model_applies_again(checkpoint, texts, tmp_path):
    first = kvprune.prune(checkpoint, tmp_path / "a", ratio=0.5, **COARSE)
    assert all(layer.vo is None for layer in first.plan.layers if layer.width < 32)
    again = kvprune.prune(checkpoint, tmp_path / "b", plan=tmp_path / "a" / "plan.json", **{**QUICK_TEXT})
    assert again.plan == first.plan
    for name, tensor in first.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], tensor)


def test_a_plan_knows_how_much_text_its_refit_took(checkpoint, texts, tmp_path):
    first = kvprune.prune(checkpoint, tmp_path / "a", ratio=0.5, **{**COARSE, "repair_tokens": 1024})
    plan = tmp_path / "a" / "plan.json"
    again = kvprune.prune(checkpoint, plan=plan, **QUICK_TEXT)
    for name, tensor in first.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], tensor)
    with pytest.raises(BadOption, match="--repair-tokens"):
        kvprune.prune(checkpoint, plan=plan, repair_tokens=2048, **QUICK_TEXT)


QUICK_TEXT = {name: value for name, value in COARSE.items() if name not in ("repair_tokens", "align", "min_width")}


def test_joint_channels_cannot_be_rotated(checkpoint, texts):
    with pytest.raises(BadOption, match="refit or none"):
        kvprune.prune(checkpoint, ratio=0.5, channels="joint", repair="rotate", **COARSE)


@torch.no_grad()
def test_values_of_low_rank_and_large_key_biases():
    """Directions that never occur, and keys far from zero: float32 rounding must not become a basis."""
    model = tiny_model("qwen2", kv_heads=KV, groups=2, head_dim=D, **STILL)
    for block in model.model.layers:
        block.self_attn.v_proj.weight[1:] = block.self_attn.v_proj.weight[:1]
        block.self_attn.k_proj.bias.mul_(200)
    view = ModelView(model)
    _, rotations = measure_attention(view, batches(), IMPORTANCE["variance"], True, nothing)
    ids = torch.randint(3, VOCABULARY, (2, 11))
    expected = model(ids).logits
    everything = torch.arange(D).repeat(KV, 1)
    for rotation in rotations:
        for basis in (rotation.values, rotation.keys):
            assert torch.isfinite(basis.down).all()
            assert basis.down.abs().max() * basis.up.abs().max() < 1e8
    with masked(view.attention[0], Kept(everything, None), rotations[0]):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-2, atol=1e-2)


def test_a_rotated_plan_without_its_importance_is_refused(checkpoint, texts, tmp_path):
    plan = kvprune.prune(checkpoint, ratio=0.5, repair="rotate", **COARSE).plan
    broken = plan.model_copy(update={"method": {}})
    (tmp_path / "plan.json").write_text(broken.to_json())
    with pytest.raises(PlanMismatch, match="importance"):
        kvprune.prune(checkpoint, plan=tmp_path / "plan.json", **QUICK_TEXT)
