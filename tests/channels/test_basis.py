"""The change of coordinates across KV heads: against brute force, least squares by other means, and RoPE itself."""

import itertools

import pytest
import torch

from kvprune.channels.choice.basis import Basis, Kept, basis_of, identity, slow_channels
from kvprune.channels.evidence.importance import IMPORTANCE, Scores
from kvprune.channels.evidence.moments import AttentionMoments
from kvprune.channels.evidence.statistics import measure_attention
from kvprune.channels.journal import Journal
from kvprune.channels.widths.masking import masked
from kvprune.models.attention import AttentionWeights
from kvprune.models.tap import tapped
from kvprune.models.view import ModelView
from tiny import STILL, VOCABULARY, batches, measured_bases, tiny_model

D, HALF, HIDDEN = 6, 3, 5
STILL_PAIRS = torch.tensor([2, 5, 1, 4])  # pairs 2 and 1, slowest first
NONE = torch.empty(0, dtype=torch.int64)


def covariances(generator, *shape, dtype=torch.float64):
    factors = torch.randn(*shape, 3 * shape[-1], dtype=dtype, generator=generator)
    return factors @ factors.mH / (3 * shape[-1] or 1)


def random_moments(m, groups=1, *, alike=False, slow=NONE, seed=0):
    """alike: the heads of a group have the same keys and values, up to how large their queries are, so that the best
    cut is known."""
    generator = torch.Generator().manual_seed(seed)
    heads, n = groups * m, len(slow)
    queries = torch.rand(heads, HALF, dtype=torch.float64, generator=generator) + 0.2
    keys = covariances(generator, heads, HALF, m, dtype=torch.complex128)
    slow_keys, outputs = (covariances(generator, heads, m * size) for size in (n, D))
    if alike:
        first = torch.arange(groups).repeat_interleave(m) * m
        keys, slow_keys, outputs = keys[first] * queries[..., None, None], slow_keys[first], outputs[first]
    order = torch.randperm(heads, generator=generator).view(groups, m)
    means = torch.zeros(heads, n, dtype=torch.float64)
    return AttentionMoments(order, queries, keys, covariances(generator, heads, n), slow_keys, means, outputs)


def based(moments, slow=NONE, seed=0):
    """Basis, worth of its keys, and W_o (heads, query heads of each, D, hidden)."""
    heads = moments.heads.numel()
    generator = torch.Generator().manual_seed(seed + 100)
    o = torch.randn(heads, 2, D, HIDDEN, dtype=torch.float64, generator=generator)
    nothing = torch.zeros(heads, D, HIDDEN)
    weights = AttentionWeights(nothing.unsqueeze(1).expand_as(o), nothing, nothing, o)
    return *basis_of(moments, weights, slow), o


def kept_of(basis, pairs, values=1):
    """Pairs of the keys' coordinates, by number, and the leading coordinates of the values."""
    qk = sorted([*pairs, *(pair + basis.width // 2 for pair in pairs)])
    groups = len(basis.heads)
    return Kept(torch.tensor([qk] * groups), torch.arange(values).repeat(groups, 1))


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


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("m", [1, 2])
def test_value_cut_is_the_optimum_of_its_metric(m, width):
    """E |W_o (z - z_hat)|^2, summed over the group's heads, over all rank-d maps z -> up down z, by brute force. One
    basis has the best cut of every width."""
    moments = random_moments(m, alike=True)
    basis, _, o = based(moments)
    eye = torch.eye(m * D, dtype=torch.float64)

    def loss(up, down):
        lost = (eye - up @ down).unflatten(0, (m, D))
        found = 0.0
        for member, head in enumerate(moments.heads[0].tolist()):
            for matrix in o[head]:
                at_output = matrix.T @ lost[member]
                found = found + (at_output @ moments.outputs[member] * at_output).sum()
        return found

    maps = basis.cut(kept_of(basis, [0], width))
    ours = loss(maps.outputs.flatten(0, 1), maps.values[0]).item()
    assert ours == pytest.approx(descend(loss, (m * D, width), (width, m * D)), rel=1e-3)
    assert ours < 0.9 * loss(eye[:, :width], eye[:width]).item()
    torch.testing.assert_close(  # none of them dominates a quantised cache
        basis.values[0] @ moments.outputs[0] @ basis.values[0].T, eye, atol=1e-3, rtol=0
    )


def as_complex(matrix, m, pair):
    """The complex (m, m) matrix by which a real one (m * D, m * D) maps one pair of every head."""
    a, b = ([head * D + pair + part * HALF for head in range(m)] for part in (0, 1))
    real, imaginary = matrix[a][:, a], matrix[b][:, a]
    torch.testing.assert_close(matrix[b][:, b], real)  # it is one, and leaves the other pairs alone
    torch.testing.assert_close(matrix[a][:, b], -imaginary)
    others = [c for c in range(m * D) if c not in a + b]
    assert not matrix[a + b][:, others].any()
    return torch.complex(real, imaginary)


@pytest.mark.parametrize(("m", "components"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)])
def test_pairs_that_turn_are_cut_at_the_optimum_of_their_metric(m, components):
    """E |q|^2 |k - k_hat|^2 of one pair, summed over the group's heads, over all complex maps of that rank."""
    moments = random_moments(m, alike=True)
    basis, worth, _ = based(moments)
    pair = 1
    kept = kept_of(basis, range(pair * m, pair * m + components))
    eye = torch.eye(m, dtype=torch.complex128)

    def loss(projection):
        lost = eye - projection
        return sum((lost @ moments.keys[j, pair] @ lost.mH)[j, j].real for j in range(m))

    ours = loss(as_complex(basis.cut(kept).projections()[0][0], m, pair)).item()
    brute = descend(
        lambda up, down: loss(torch.view_as_complex(up) @ torch.view_as_complex(down)),
        (m, components, 2),
        (components, m, 2),
    )
    total = loss(torch.zeros_like(eye)).item()
    assert ours == pytest.approx(brute, rel=1e-3, abs=1e-4 * total)
    own = worth[0].unflatten(0, (2, HALF, m))[:, pair].double()  # of both coordinates of each component
    assert own.sum().item() == pytest.approx(total / 2, rel=1e-4)  # half the energy: phases are unrelated
    assert own[:, components:].sum().item() == pytest.approx(ours / 2, rel=1e-3, abs=1e-4 * total)
    assert (own.diff() <= 0).all()


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("m", [1, 2])
def test_slow_pairs_are_cut_at_the_optimum_of_their_metric(m, pairs):
    """E (q^T (k - k_hat))^2 with q and centred k unrelated, over all real maps over slow pairs and heads."""
    moments = random_moments(m, alike=True, slow=STILL_PAIRS)
    basis, worth, _ = based(moments, STILL_PAIRS)
    first = m * (HALF - len(STILL_PAIRS) // 2)  # the pairs behind it are those of the slow channels
    kept = kept_of(basis, range(first, first + pairs))
    n = m * len(STILL_PAIRS)

    def loss(projection):
        lost = (torch.eye(n, dtype=torch.float64) - projection).unflatten(0, (m, -1))
        return sum((moments.slow_queries[j] @ lost[j] @ moments.slow_keys[j] @ lost[j].T).trace() for j in range(m))

    channels = torch.cat([head * D + STILL_PAIRS for head in range(m)])
    projection = basis.cut(kept).projections()[0][0]
    ours = loss(projection[channels][:, channels]).item()
    assert projection.square().sum().item() == pytest.approx(
        projection[channels][:, channels].square().sum().item(), rel=1e-12
    )
    brute = descend(lambda up, down: loss(up @ down), (n, 2 * pairs), (2 * pairs, n))
    total = loss(torch.zeros(n, n, dtype=torch.float64)).item()
    assert ours == pytest.approx(brute, rel=1e-3, abs=1e-4 * total)
    own = worth[0].unflatten(0, (2, -1))[:, first:].double()
    assert own.sum().item() == pytest.approx(total, rel=1e-4)
    assert own[:, pairs:].sum().item() == pytest.approx(ours, rel=1e-3, abs=1e-4 * total)
    order = own.T.flatten()  # two directions a pair, leading first
    assert (order.diff() <= 0).all()


def key_covariance(moments, row, m, slow):
    """(m * D, m * D) real: how a group's keys vary for the head in that row; pairs that turn at any angle alike."""
    found = torch.zeros(m * D, m * D, dtype=torch.float64)
    for pair in range(HALF):
        if pair in slow:
            continue
        cov = moments.keys[row, pair]
        for x, y in itertools.product(range(m), repeat=2):
            for (i, j), value in {
                (0, 0): cov[x, y].real,
                (1, 1): cov[x, y].real,
                (1, 0): cov[x, y].imag,
                (0, 1): -cov[x, y].imag,
            }.items():
                found[x * D + pair + i * HALF, y * D + pair + j * HALF] = value
    if len(slow):
        channels = torch.cat([head * D + slow for head in range(m)])
        found[channels.unsqueeze(1), channels] = moments.slow_keys[row]
    return found


@pytest.mark.parametrize("slow", [NONE, STILL_PAIRS], ids=["turning", "slow"])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_way_back_is_least_squares_for_each_head(m, slow):
    """Each head by its own covariance, whatever it shares with the others; lstsq on a factor of it."""
    groups = 2
    moments = random_moments(m, groups, slow=slow)
    basis, _, _ = based(moments, slow)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        pairs = [torch.randperm(basis.width // 2, generator=generator)[: m + 1].sort().values for _ in range(groups)]
        kept = Kept(
            torch.stack([torch.cat((p, p + basis.width // 2)) for p in pairs]),
            torch.arange(2 * m + 2).repeat(groups, 1),
        )
        maps = basis.cut(kept)
        for row in range(groups * m):
            g, own = row // m, slice(row % m * D, (row % m + 1) * D)
            for covariance, down, back in (
                (key_covariance(moments, row, m, slow), maps.keys[g], maps.queries[row]),
                (moments.outputs[row], maps.values[g], maps.outputs[row]),
            ):
                factor = torch.linalg.cholesky(covariance)
                expected = torch.linalg.lstsq((down @ factor).T, factor[own].T).solution.T
                torch.testing.assert_close(back, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("slow", [NONE, STILL_PAIRS], ids=["turning", "slow"])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_keeping_all_coordinates_loses_nothing(m, slow):
    basis, _, _ = based(random_moments(m, 2, slow=slow), slow)
    everything = torch.arange(m * D).repeat(2, 1)
    for projection in basis.cut(Kept(everything, everything)).projections():
        torch.testing.assert_close(projection, torch.eye(m * D).double().expand(2, -1, -1), rtol=0, atol=1e-3)


def turn(position, frequencies, n):
    """RoPE's matrix (n, n) for pairs (c, c + n / 2), each with a frequency of its own."""
    found = torch.zeros(n, n, dtype=torch.float64)
    for c, frequency in enumerate(frequencies.tolist()):
        angle = torch.tensor(position * frequency)
        a, b = c, c + n // 2
        found[a, a] = found[b, b] = angle.cos()
        found[b, a] = angle.sin()
        found[a, b] = -angle.sin()
    return found


@pytest.mark.parametrize("m", [1, 2, 3])
def test_keys_of_pairs_that_turn_commute_with_rope(m):
    """RoPE in front of the cut, at the dense frequencies, or behind it, at those of the kept coordinates."""
    basis, _, _ = based(random_moments(m))
    pairs = [0, 2, 3 * m - 1][: m + 1] if m > 1 else [0, 2]
    kept = kept_of(basis, pairs)
    maps = basis.cut(kept)
    frequencies = torch.tensor([1.0, 0.13, 0.002], dtype=torch.float64)
    width = kept.qk.shape[1]
    for position in (1, 5, 70, 12345):
        one = turn(position, frequencies, D)
        dense = torch.block_diag(*[one] * m)
        by_rope = frequencies[maps.rope[0, : width // 2] % HALF]
        assert torch.equal(maps.rope[0, width // 2 :], maps.rope[0, : width // 2] + HALF)  # cos and sin go by channel
        ours = turn(position, by_rope, width)
        torch.testing.assert_close(maps.keys[0] @ dense, ours @ maps.keys[0])
        for back in maps.queries:  # (D, width)
            torch.testing.assert_close(one @ back, back @ ours)
        projection = maps.projections()[0][0]
        torch.testing.assert_close(projection @ dense, dense @ projection)


def test_slow_directions_turn_as_one_of_the_slow_pairs_does():
    basis, _, _ = based(random_moments(2, slow=STILL_PAIRS), STILL_PAIRS)
    first, second = basis.rope[0].tolist()[:6], basis.rope[0].tolist()[6:]
    assert first == [0, 0, 2, 2, 1, 1]  # slowest first
    assert second == [3, 3, 5, 5, 4, 4]


@pytest.mark.parametrize("m", [1, 2])
def test_a_journal_keeps_a_basis_bit_for_bit(tmp_path, m):
    slow = STILL_PAIRS if m == 2 else NONE
    basis, worth, _ = based(random_moments(m, 2, slow=slow), slow)
    plain = identity(2, D)
    journal = Journal.open(tmp_path / "out", {}, resume=False)
    for layer, one in enumerate((basis, plain)):
        journal.keep_layer(layer, Scores(worth, worth[:, :0]), one)
    again = Journal.open(tmp_path / "out", {}, resume=True)
    (scores, first), (_, second) = (again.load_layer(layer) for layer in range(2))
    bases = [first, second]
    assert again.load_layer(2) is None
    assert torch.equal(scores.qk, worth)
    for found, expected in zip(bases, (basis, plain), strict=True):
        assert found.tensors().keys() == expected.tensors().keys()
        for name, tensor in expected.tensors().items():
            assert torch.equal(found.tensors()[name], tensor)
            assert not tensor.is_complex()
    assert bases[1].moments is None
    assert torch.equal(Basis.of(basis.tensors()).moments.keys, basis.moments.keys)
    kept = kept_of(basis, [0, 2], 3)
    for found, expected in zip(vars(bases[0].cut(kept)).values(), vars(basis.cut(kept)).values(), strict=True):
        assert torch.equal(found, expected)


def test_identity_keeps_channels_as_they_are():
    kept = Kept(torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]]), torch.tensor([[0, 1, 2, 3], [0, 2, 4, 5]]))
    maps = identity(2, D).cut(kept)
    assert maps.keys.shape[2] // maps.queries.shape[1] == 1
    assert torch.equal(maps.rope, kept.qk)
    x = torch.randn(2, D, 7, dtype=torch.float64)
    for head in range(2):
        assert torch.equal(maps.keys[head] @ x[head], x[head, kept.qk[head]])
        assert torch.equal(maps.values[head] @ x[head], x[head, kept.vo[head]])
        for projection, stays in zip(maps.projections(), (kept.qk, kept.vo), strict=True):
            mask = torch.tensor([float(c in stays[head].tolist()) for c in range(D)])
            assert torch.equal(projection[head], mask.diag().double())


def test_values_alone_leave_the_keys_channels_as_they_are():
    whole, _, _ = based(random_moments(1, 2, slow=STILL_PAIRS), STILL_PAIRS)
    basis = whole.of_values()
    kept = kept_of(basis, [0, 2], 3)
    maps, plain = basis.cut(kept), identity(2, D).cut(kept)
    assert torch.equal(maps.keys, plain.keys)
    assert torch.equal(maps.rope, plain.rope)
    torch.testing.assert_close(maps.queries, plain.queries, rtol=0, atol=1e-5)
    assert torch.equal(maps.values, whole.cut(kept).values)


@torch.no_grad()
def test_what_is_measured_for_each_importance():
    """With "variance" scores are worths of coordinates; with any other only V is rotated, and scored elsewhere."""
    model = tiny_model("llama", kv_heads=2, groups=2, layers=1)
    view = ModelView(model)
    variance, energy = IMPORTANCE["variance"], IMPORTANCE["energy"]
    scores, bases = measure_attention(view, batches(), variance, 2, lambda n: None)
    assert scores[0].qk.shape == (1, 32)
    assert scores[0].vo.numel() == 0
    assert bases[0].heads.tolist() == [[0, 1]]
    scores, bases = measure_attention(view, batches(), variance, None, lambda n: None)
    assert scores[0].qk.shape == scores[0].vo.shape == (2, 16)
    assert bases is None
    scores, bases = measure_attention(view, batches(), energy, 1, lambda n: None)
    assert scores == []
    assert torch.equal(bases[0].keys, identity(2, 16).keys)
    assert not torch.equal(bases[0].values, identity(2, 16).values)


@pytest.mark.parametrize("merge", [1, 2])
@torch.no_grad()
def test_values_of_low_rank_and_large_key_biases(merge):
    """Directions that never occur, and keys far from zero: float32 rounding must not become a basis."""
    model = tiny_model("qwen2", kv_heads=2, groups=2, **STILL)
    for block in model.model.layers:
        block.self_attn.v_proj.weight[1:] = block.self_attn.v_proj.weight[:1]
        block.self_attn.k_proj.bias.mul_(200)
    bases = measured_bases(model, merge, slow=True)
    ids = torch.randint(3, VOCABULARY, (2, 11))
    expected = model(ids).logits
    everything = torch.arange(16 * merge).repeat(2 // merge, 1)
    whole = Kept(everything, everything)
    for basis in bases:
        maps = basis.cut(whole)
        for down, up in ((maps.keys, maps.queries), (maps.values, maps.outputs)):
            assert torch.isfinite(down).all()
            assert down.abs().max() * up.abs().max() < 1e8
    view = ModelView(model)
    with tapped(view), masked(view.attention[0], whole, bases[0]):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("positions", [128, 2048, 131072])
def test_slow_pairs_hardly_turn_over_the_whole_context(positions):
    """Theta of 1e12: from one pair of eight to the next, 32 times slower."""
    theta = {"rope_type": "default", "rope_theta": 1e12}
    view = ModelView(tiny_model("llama", rope_parameters=theta, positions=positions))
    expected = [[pair, pair + 8] for pair in range(7, -1, -1) if positions * 1e12 ** (-pair / 8) <= 0.5]
    assert 0 < len(expected) < 8
    assert slow_channels(view.attention[0]).view(-1, 2).tolist() == expected
