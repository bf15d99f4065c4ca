"""Least squares of the layers' last matrices, so that the residual stream stays the dense model's."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from kvprune.channels.journal import Journal
from kvprune.errors import TextTooShort
from kvprune.models.finite import not_finite
from kvprune.models.stream import Calls, enter, input_of, learn_calls
from kvprune.models.view import ModelView

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # of the inputs' mean square; the held-out slice chooses
HELD_OUT = 8  # every eighth window is held out, and of fewer the last


@dataclass(frozen=True)
class Refitted:
    """One matrix: its squared error on the held-out slice relative to the target's, before and after, and the ridge
    chosen (None: no ridge did better than the matrix as it was, which was kept)."""

    layer: int
    matrix: str
    before: float
    after: float
    ridge: float | None


class Moments:
    """Sums over rows of x x^T, x y^T and |y|^2 in float64, (n, n), (n, m) and a number; x (..., n), y (..., m)."""

    def __init__(self) -> None:
        self.xx: torch.Tensor | float = 0.0
        self.xy: torch.Tensor | float = 0.0
        self.yy: torch.Tensor | float = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        self.xx = self.xx + (x.T @ x).double()
        self.xy = self.xy + (x.T @ y).double()
        self.yy = self.yy + y.square().sum(dtype=torch.float64)

    def is_finite(self) -> bool:
        return all(torch.isfinite(torch.as_tensor(sums)).all() for sums in (self.xx, self.xy, self.yy))

    def error(self, weight: torch.Tensor) -> float:
        """Sum of |weight x - y|^2; weight (m, n)."""
        weight = weight.double()
        return float(((weight @ self.xx) * weight).sum() - 2 * (weight.T * self.xy).sum() + self.yy)


def ridge_fit(moments: Moments, weight: torch.Tensor, ridge: float) -> torch.Tensor:
    """The W (m, n) that minimises sum |W x - y|^2 + ridge * mean square of x * rows * |W - weight|^2, in float64.

    The ridge pulls towards the matrix that was, not towards zero, so that directions which the text never
    shows stay as they are. It never raises the first term above what `weight` has.
    """
    xx, xy = moments.xx, moments.xy
    assert isinstance(xx, torch.Tensor)
    assert isinstance(xy, torch.Tensor)
    pull = (ridge * xx.diagonal().mean()).clamp_min(1e-300)
    system = xx + pull * torch.eye(len(xx), dtype=torch.float64, device=xx.device)
    return torch.linalg.solve(system, xy + pull * weight.double().T, left=True).T


@torch.no_grad()
def refit(
    view: ModelView,
    pruned: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    advance: Callable[[int], None],
    journal: Journal | None = None,
) -> list[Refitted]:
    """Refit O and the MLP's last matrix of every layer of `pruned` in place, front to back [ours].

    Two streams walk through the layers, the dense model's and the pruned one's, whose earlier layers are repaired
    already. O is fitted so that the residual stream behind the attention becomes the dense model's, then the MLP's
    last matrix so that the one behind the block does. Batches (B, T). Every eighth window is held out: it chooses
    the ridge, and where no ridge lowers its error the matrix stays. Memory: the hidden states of the text
    before one block, three times, and one layer's moments. A layer that the journal has is taken from there: the
    streams only pass through it. Raises NotFinite.
    """
    journal = journal or Journal()
    fitted, held = split(batches)
    dense, calls = enter(view, [*fitted, *held])
    ours = list(dense)
    blocks = view.family.blocks(pruned)
    own_calls = learn_calls(pruned, blocks, batches)  # a stock model's rotary table is its own
    report: list[Refitted] = []
    for index, (dense_block, block) in enumerate(zip(view.blocks, blocks, strict=True)):
        layer = _Layer(view, index, dense_block, block, (calls, own_calls), len(fitted))
        behind_attention = layer.dense(dense)
        kept = journal.load_refit(index)
        if kept is None:
            found = [layer.fit_o(ours, behind_attention), layer.fit_down(ours, dense)]
            journal.save_refit(index, layer.tensors(), [asdict(row) for row in found])
        else:
            found = layer.restore(*kept)
        layer.advance(ours)
        report += found
        advance(1)
    return report


class _Layer:
    """One layer, dense and pruned."""

    def __init__(
        self, view: ModelView, index: int, dense: nn.Module, block: nn.Module, calls: tuple[Calls, Calls], fitted: int
    ):
        family, self.lm = view.family, view.lm
        self.index, self.dense_block, self.block, self.fitted = index, dense, block, fitted
        self.dense_calls, self.calls = calls
        self.dense_attention = getattr(dense, family.attention)
        self.o = getattr(getattr(block, family.attention), family.o)
        mlp = getattr(block, family.mlp)
        self.down = getattr(mlp, family.down)
        for name, parameter in list(self.down.named_parameters()):  # shared with the dense model, which must stay
            setattr(self.down, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))

    def dense(self, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Take the dense residual stream behind the block, in place; returns what it was behind the attention."""
        behind_attention: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        hook = self.dense_attention.register_forward_hook(lambda _m, _a, output: outputs.append(output[0]))
        try:
            for number, state in enumerate(states):
                states[number] = self.dense_calls.run(self.dense_block, self.index, state)
                behind_attention.append(state + outputs.pop())
        finally:
            hook.remove()
        return behind_attention

    def fit_o(self, states: list[torch.Tensor], targets: list[torch.Tensor]) -> Refitted:
        """Fit O, so that behind the attention `states` become the targets."""
        moments = Moments(), Moments()
        for number, (state, target) in enumerate(zip(states, targets, strict=True)):
            z = input_of(self.o, partial(self.calls.run, self.block, self.index, state))
            moments[number >= self.fitted].add(_with_one(z, self.o), target.float() - state.float())
        return self._fit("o", self.o, *moments)

    def fit_down(self, states: list[torch.Tensor], targets: list[torch.Tensor]) -> Refitted:
        """Fit the MLP's last matrix, so that behind the block `states` become the targets."""
        moments = Moments(), Moments()
        inputs: list[torch.Tensor] = []
        hook = self.down.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
        try:
            for number, (state, target) in enumerate(zip(states, targets, strict=True)):
                output = self.calls.run(self.block, self.index, state)
                # What the MLP should have added is what it added and what is still missing behind the block.
                h = inputs.pop()
                missing = target.float() - output.float() + linear(h, self.down.weight, self.down.bias).float()
                moments[number >= self.fitted].add(_with_one(h, self.down), missing)
        finally:
            hook.remove()
        return self._fit("down", self.down, *moments)

    def advance(self, states: list[torch.Tensor]) -> None:
        """Take the pruned residual stream behind the block, in place."""
        for number, state in enumerate(states):
            states[number] = self.calls.run(self.block, self.index, state)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights that are fitted here, "o.weight", ..."""
        modules = {"o": self.o, "down": self.down}
        return {f"{name}.{part}": p for name, module in modules.items() for part, p in module.named_parameters()}

    def restore(self, tensors: dict[str, torch.Tensor], report: list[dict]) -> list[Refitted]:
        """Take the weights, and what was reported of them, from where an interrupted run kept them."""
        for name, parameter in self.tensors().items():
            parameter.copy_(tensors[name])
        return [Refitted(**row) for row in report]

    def _fit(self, name: str, module: nn.Linear, fitted: Moments, held: Moments) -> Refitted:
        if not (fitted.is_finite() and held.is_finite()):
            raise not_finite(f"layer {self.index}: what {name} is fitted to", self.lm)
        old = _as_matrix(module)
        before = held.error(old)
        # Judged as they will be written: rounding to the model's dtype can cost more than a fit gains.
        candidates = [ridge_fit(fitted, old, ridge).to(module.weight.dtype) for ridge in RIDGES]
        errors = [held.error(weight) for weight in candidates]
        best = min(range(len(RIDGES)), key=errors.__getitem__)
        scale = max(float(held.yy), 1e-300)
        if not errors[best] < before:
            return Refitted(self.index, name, before / scale, before / scale, None)
        _write(module, candidates[best])
        return Refitted(self.index, name, before / scale, errors[best] / scale, RIDGES[best])


def split(batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(fitted, held out), as batches of the size they came in. Raises TextTooShort for a single window."""
    windows = torch.cat(list(batches))
    if len(windows) < 2:
        raise TextTooShort(
            "refit holds out every eighth window and needs at least two; ask for more calibration tokens"
        )
    out = torch.arange(len(windows)) % HELD_OUT == HELD_OUT - 1
    if not out.any():
        out[-1] = True
    size = len(batches[0])
    return list(windows[~out].split(size)), list(windows[out].split(size))


def _with_one(x: torch.Tensor, module: nn.Linear) -> torch.Tensor:
    """(..., n) with a one appended where the matrix has a bias, which is then its last column."""
    return x if module.bias is None else torch.cat((x, torch.ones_like(x[..., :1])), dim=-1)


def _as_matrix(module: nn.Linear) -> torch.Tensor:
    weight = module.weight.double()
    return weight if module.bias is None else torch.cat((weight, module.bias.double().unsqueeze(1)), dim=1)


def _write(module: nn.Linear, matrix: torch.Tensor) -> None:
    n = module.weight.shape[1]
    module.weight.copy_(matrix[:, :n])
    if module.bias is not None:
        module.bias.copy_(matrix[:, n])
