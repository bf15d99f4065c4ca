"""Least squares of the layers' last matrices, so that the residual stream stays the dense model's."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kvprune import processes
from kvprune.channels.journal import Journal
from kvprune.channels.repair.least_squares import Moments, Rows, ridge_fit, sums_of
from kvprune.errors import TextTooShort
from kvprune.models.finite import not_finite
from kvprune.models.held import coming, held
from kvprune.models.stream import Calls, answering, enter, input_of, learn_calls
from kvprune.models.view import ModelView
from kvprune.runtime.dtype import stored_dtype
from kvprune.runtime.modeling import Skipped

# Of the inputs' mean square; the held-out slice chooses. Less than a tenth loses on text of another kind.
RIDGES = (0.1, 1.0, 10.0, 100.0)
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
    last matrix so that the one behind the block does. A token's error counts relative to the size of its residual
    stream, which is what the next norm divides by: else the few tokens with huge ones would decide. Where a norm stands
    between a matrix and the stream, the matrix is fitted to what the dense one puts out, and a token counts relative to
    that or to what comes out now, whichever is larger: that norm divides by the latter, and else the few tokens whose
    small output has become a large one would decide.

    Batches (B, T). Every eighth window is held out: it chooses the ridge, and where no ridge lowers its error the
    matrix stays. Memory: of the text before one block the hidden states, four times, or three times and the inputs of
    the MLP's last matrix; and one layer's moments. A layer that the journal has is taken from there: the streams only
    pass through it, and through blocks that have no attention, which stay as they are. Raises NotFinite.
    """
    journal = journal or Journal()
    fitted, apart = split(batches)
    rows = sum(batch.numel() for batch in fitted), sum(batch.numel() for batch in apart)
    fitted, apart = processes.mine(fitted), processes.mine(apart)
    dense, calls = enter(view, [*fitted, *apart])
    ours = list(dense)
    blocks = view.family.blocks(pruned)
    own_calls = learn_calls(pruned, blocks, [*fitted, *apart])  # a stock model's rotary table is its own
    report: list[Refitted] = []
    for index, (dense_block, block) in enumerate(zip(view.blocks, blocks, strict=True)):
        if view.layer_at(index) is None:
            with held(dense_block, block):
                calls.take(dense_block, index, dense)
                own_calls.take(block, index, ours)
            continue
        with held(dense_block, block):
            layer = _Layer(view, index, dense_block, block, (calls, own_calls), len(fitted), rows, stored_dtype(pruned))
            targets = layer.dense(dense)
            kept = journal.load_refit(index)
            if kept is None:
                report += layer.fit(ours, targets)
                journal.save_refit(index, layer.tensors(), [asdict(row) for row in report if row.layer == index])
            else:
                report += layer.restore(*kept, ours)
            names = layer.names()
        there = coming(block)
        if there is not None:  # from now on it comes with the fitted ones
            place = {there.prefix + name: own for own, name in names.items()}
            there.shelf.also(place, journal.refit_file(index), stored_dtype(pruned))
        advance(1)
    return report


@dataclass(frozen=True)
class Targets:
    """What a layer's matrices are fitted to, one tensor (B, T, hidden) a batch. attention: the dense residual stream
    behind the attention, or what its attention puts out where a norm stands between; behind: the stream behind the
    block; down: what the MLP's last matrix puts out, where a norm stands between; else empty."""

    attention: list[torch.Tensor]
    down: list[torch.Tensor]
    behind: list[torch.Tensor]


class _Layer:
    """One layer, dense and pruned."""

    def __init__(
        self,
        view: ModelView,
        index: int,
        dense: nn.Module,
        block: nn.Module,
        calls: tuple[Calls, Calls],
        fitted: int,
        rows: tuple[int, int],
        stored: torch.dtype,
    ):
        self.family, self.lm = view.family, view.lm
        self.index, self.dense_block, self.block, self.fitted, self.rows = index, dense, block, fitted, rows
        self.dense_calls, self.calls = calls
        self.stored = stored
        self.is_gone = isinstance(block, Skipped)  # all that is left to fit is a constant, added to the stream
        has_times = self.family.times and not self.is_gone
        self.times = float(getattr(view.lm.config, self.family.times, 1.0)) if has_times else 1.0
        self.behind_attention = bool(self.family.behind_attention) and not self.is_gone
        self.dense_attention = getattr(dense, self.family.attention)
        self.attention = getattr(block, self.family.attention)
        self.o = self.attention.get_submodule("o_proj" if hasattr(self.attention, "o_proj") else self.family.o)
        self.mlp = getattr(block, self.family.mlp) if self.family.mlp and not self.is_gone else None
        self.down = None if self.is_gone else self._down(block)
        self.device = cast(torch.Tensor, self.o.weight).device
        if self.down is not None:
            for name, parameter in list(self.down.named_parameters()):  # shared with the dense model, which must stay
                setattr(self.down, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))

    def _down(self, block: nn.Module) -> nn.Module | None:
        """The MLP's last matrix; None where there is no one such matrix."""
        path = f"{self.family.mlp}.{self.family.down}".strip(".")
        return block.get_submodule(path) if self.family.down else None

    def dense(self, states: list[torch.Tensor]) -> "Targets":
        """Take the dense residual stream behind the block, in place; returns what the matrices are fitted to."""
        found = Targets([], [], states)
        outputs: dict[str, torch.Tensor] = {}
        watched = {"attention": self.dense_attention}
        if self.family.behind_mlp and self.down is not None:
            down = self._down(self.dense_block)
            assert down is not None
            watched["down"] = down
        hooks = [
            module.register_forward_hook(
                lambda _m, _a, output, name=name: outputs.__setitem__(
                    name, output[0] if isinstance(output, tuple) else output
                )
            )
            for name, module in watched.items()
        ]
        try:
            for number, state in enumerate(states):
                states[number] = self.dense_calls.run(self.dense_block, self.index, state, number)
                attention = outputs.pop("attention").to(state.device)
                if self.is_gone:
                    found.attention.append(states[number])
                else:
                    found.attention.append(attention if self.behind_attention else state + self.times * attention)
                if "down" in watched:
                    found.down.append(outputs.pop("down").to(state.device))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def fit(self, states: list[torch.Tensor], targets: "Targets") -> list[Refitted]:
        """Fit O and the MLP's last matrix to the dense stream, and take `states` behind the block, in place.

        Attention and MLP run once: what reaches their last matrices is kept, and the block is called again with what
        the new matrices make of it. What is fitted to is used up.
        """
        attended = [
            input_of(self.o, partial(self._run, state, number)).to(state.device) for number, state in enumerate(states)
        ]
        found = [self._fit_o(states, attended, targets.attention)]
        targets.attention.clear()
        inner: list[torch.Tensor] = []
        if self.down is not None:
            found.append(self._fit_down(states, attended, targets, inner))
        for number, z in enumerate(attended):
            with ExitStack() as stack:
                stack.enter_context(_giving(self.attention, (self.o(z.to(self.device)), None)))
                if self.mlp is not None and self.down is not None:
                    stack.enter_context(_giving(self.mlp, self.down(inner[number].to(self.device))))
                states[number] = self._run(states[number], number)
        return found

    def _fit_o(self, states: list[torch.Tensor], attended: list[torch.Tensor], targets: list[torch.Tensor]) -> Refitted:
        """Fit O, so that behind the attention `states` become the targets; or, where a norm stands between, so that it
        puts out the targets themselves."""
        moments = self._sums(self.o)
        for number, (state, z, target) in enumerate(zip(states, attended, targets, strict=True)):
            missing, sizes = target.float(), [target]
            if self.behind_attention:
                sizes.append(self.o(z.to(self.device)).to(target.device))
            else:
                missing = (missing - state.float()) / self.times
            self._add(moments[number >= self.fitted], _with_one(z, self.o), missing, _inverse_size(*sizes))
        return self._fit("o", self.o, *moments)

    def _fit_down(
        self, states: list[torch.Tensor], attended: list[torch.Tensor], targets: "Targets", inner: list[torch.Tensor]
    ) -> Refitted:
        """Fit the MLP's last matrix, so that behind the block `states` become the targets; or, where a norm stands
        between, so that it puts out the targets themselves. What reaches it is added to `inner`."""
        assert self.down is not None
        moments = self._sums(self.down)
        added: list[torch.Tensor] = []

        def keep(_module: nn.Module, args: tuple, output: torch.Tensor) -> None:  # some put all tokens in one dim
            state = states[len(inner)]
            inner.append(args[0].view(*state.shape[:2], -1).to(state.device))
            added.append(output.view(*state.shape[:2], -1).to(state.device))

        hook = self.down.register_forward_hook(keep)
        try:
            for number, (state, z, behind) in enumerate(zip(states, attended, targets.behind, strict=True)):
                with _giving(self.attention, (self.o(z.to(self.device)), None)):
                    output = self._run(state, number)
                put_out = added.pop()
                if targets.down:
                    missing, sizes = targets.down[number], [targets.down[number], put_out]
                else:  # What the MLP should have added is what it added and what is still missing behind the block.
                    missing, sizes = (behind.float() - output.float()) / self.times + put_out.float(), [behind]
                x = _with_one(inner[-1], self.down)
                self._add(moments[number >= self.fitted], x, missing, _inverse_size(*sizes))
        finally:
            hook.remove()
        return self._fit("down", self.down, *moments)

    def _sums(self, module: nn.Module) -> tuple[Moments | Rows, Moments | Rows]:
        """For the fitted rows and those held out."""
        weight, bias = cast(torch.Tensor, module.weight), module.bias
        inputs = weight.shape[0 if isinstance(module, Conv1D) else 1] + (bias is not None)
        sizes, device = (inputs, weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0]), self.device
        return sums_of(self.rows[0], *sizes, device), sums_of(self.rows[1], *sizes, device)

    def _add(self, moments: Moments | Rows, *rows: torch.Tensor) -> None:
        """Where the matrices are: the text may wait elsewhere."""
        moments.add(*(x.to(self.device) for x in rows))

    def _run(self, state: torch.Tensor, number: int) -> torch.Tensor:
        """The pruned residual stream behind the block, (B, T, hidden), of batch `number`."""
        return self.calls.run(self.block, self.index, state, number)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights that are fitted here, "o.weight", ..."""
        modules = {"o": self.o} | ({} if self.down is None else {"down": self.down})
        return {f"{name}.{part}": p for name, module in modules.items() for part, p in module.named_parameters()}

    def names(self) -> dict[str, str]:
        """The same, and what the block calls them."""
        known = {id(parameter): name for name, parameter in self.block.named_parameters()}
        return {own: known[id(parameter)] for own, parameter in self.tensors().items()}

    def restore(
        self, tensors: dict[str, torch.Tensor], report: list[dict], states: list[torch.Tensor]
    ) -> list[Refitted]:
        """Take the weights, and what was reported of them, from where an interrupted run kept them, and `states` behind
        the block, in place."""
        for name, parameter in self.tensors().items():
            parameter.copy_(tensors[name])
        for number, state in enumerate(states):
            states[number] = self._run(state, number)
        return [Refitted(**row) for row in report]

    def _fit(self, name: str, module: nn.Module, fitted: Moments | Rows, held: Moments | Rows) -> Refitted:
        for sums in (fitted, held):
            sums.over_processes()
        if not (fitted.is_finite() and held.is_finite()):
            raise not_finite(f"layer {self.index}: what {name} is fitted to", self.lm)
        old = _as_matrix(module)
        before = held.error(old)
        # Judged as they will be written: rounding can cost more than a fit gains.
        candidates = [ridge_fit(fitted, old, ridge).to(self.stored) for ridge in RIDGES]
        errors = [held.error(weight) for weight in candidates]
        best = min(range(len(RIDGES)), key=errors.__getitem__)
        scale = max(float(held.yy), 1e-300)
        if not errors[best] < before:
            return Refitted(self.index, name, before / scale, before / scale, None)
        _write(module, candidates[best])
        return Refitted(self.index, name, before / scale, errors[best] / scale, RIDGES[best])


def _giving(module: nn.Module, output: Any) -> AbstractContextManager[None]:
    """`module` gives this output, whatever it is called with."""
    return answering(module, lambda *args, **kwargs: output)


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


def _inverse_size(*streams: torch.Tensor) -> torch.Tensor:
    """(..., hidden) -> (..., 1): one over the root mean square, of the largest of several."""
    squares = [stream.float().square().mean(-1, keepdim=True) for stream in streams]
    return torch.stack(squares).amax(0).clamp_min(1e-12).rsqrt()


def _with_one(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """(..., n) with a one appended where the matrix has a bias, which is then its last column."""
    return x if module.bias is None else torch.cat((x, x.new_ones(*x.shape[:-1], 1)), dim=-1)


def _as_matrix(module: nn.Module) -> torch.Tensor:
    """(out, in), and the bias as one more column; float64."""
    weight = cast(torch.Tensor, module.weight).double()
    weight = weight.T if isinstance(module, Conv1D) else weight
    bias = cast(torch.Tensor | None, module.bias)
    return weight if bias is None else torch.cat((weight, bias.double().unsqueeze(1)), dim=1)


def _write(module: nn.Module, matrix: torch.Tensor) -> None:
    weight, bias = cast(torch.Tensor, module.weight), cast(torch.Tensor | None, module.bias)
    n = weight.shape[0 if isinstance(module, Conv1D) else 1]
    weight.copy_(matrix[:, :n].T if isinstance(module, Conv1D) else matrix[:, :n])
    if bias is not None:
        bias.copy_(matrix[:, n])
