"""The training loop: one step at a time, the same whether it runs through, is resumed, or is spread over processes.

Notable choices: the learning rate, the windows and the dropout of a step follow from its number, so that a checkpoint
holds no scheduler, loader or random state. A step's windows are split evenly over the processes and then into pieces of
at most MICRO_TOKENS tokens, each weighted by its share of the step's scored tokens: neither changes what a step
computes, up to rounding.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch.distributed.checkpoint import state_dict as distributed

from kvprune.errors import BadOption, NotFinite
from kvprune.recovery.checkpoints import Checkpoint, Checkpoints, State, Tensors
from kvprune.recovery.data import Data, batch_rows, mixed
from kvprune.recovery.settings import Settings
from kvprune.recovery.trainee import ADAPTER, Trainee, checkpoint_activations

MICRO_TOKENS = 4096  # whose activations are held at a time, in each process
_FULL = distributed.StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)


class Training:
    """A run of `total` steps. `state` is how far it is; `best` are the adapter weights of the best evaluation."""

    def __init__(
        self,
        accelerator: Any,
        trainee: Trainee,
        device: torch.device,
        data: tuple[Data, Data],
        settings: Settings,
        checkpoints: Checkpoints,
    ):
        self.accelerator, self.device, self.settings, self.checkpoints = accelerator, device, settings, checkpoints
        self.train, self.held_out = data
        if settings.batch % accelerator.num_processes:
            raise BadOption(f"--batch {settings.batch} cannot be split over {accelerator.num_processes} processes")
        if settings.gradient_checkpointing:
            checkpoint_activations(trainee.lm)
        trained = [p for p in trainee.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.highest_lr, weight_decay=settings.weight_decay)
        self.model, self.optimizer = accelerator.prepare(trainee, optimizer)
        self.state = State()
        self.best: Tensors = {}

    @property
    def total(self) -> int:
        s = self.settings
        return s.steps if s.steps is not None else math.ceil(len(self.train) * (s.epochs or 1) / s.batch)

    def run(self, advance: Callable[..., None]) -> None:
        """Go on from the newest checkpoint to the end, or to where it stops early.

        advance(steps, note) is told of every step. Raises NotFinite and NoSpace, after which the last checkpoint is
        still there.
        """
        found = self.checkpoints.load()
        if found is not None:
            self._restore(found)
            advance(self.state.step, self._note())
        else:
            self._evaluate()
        every = self.settings.checkpoint_every
        while self.state.step < self.total and not self.state.stopped_early:
            start = time.perf_counter()
            loss = self._step()
            self.state.step += 1
            self.state.curve.append((self.state.step, loss))
            self.state.seconds += time.perf_counter() - start
            if self.state.step % every == 0 or self.state.step == self.total:
                self._evaluate()
                self._checkpoint()
            advance(1, self._note())

    def _note(self) -> str:
        state = self.state
        if not state.curve:
            return ""
        rate = f", {state.tokens / state.seconds:,.0f} tok/s" if state.seconds else ""
        return f"loss {state.curve[-1][1]:.3f}{rate}"

    def _step(self) -> float:
        """One update; the mean loss of its windows before it. The seed decides dropout, differently in each process."""
        s, step, accelerator = self.settings, self.state.step, self.accelerator
        rows = batch_rows(step, s.batch, len(self.train), s.seed)
        whole = self.train.rows(rows)
        mine = rows[accelerator.process_index :: accelerator.num_processes]
        micro = mine.split(max(MICRO_TOKENS // self.train.ids.shape[1], 1))
        torch.manual_seed(mixed(s.seed, step, accelerator.process_index))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.total, s)
        self.model.train()
        total = torch.zeros((), device=self.device)
        for i, piece in enumerate(micro):
            batch = self.train.rows(piece)
            last = i == len(micro) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss = self._loss(batch) * (batch.scored / max(whole.scored, 1))
                total += loss.detach()
                accelerator.backward(loss * accelerator.num_processes)  # what is averaged over them is a sum
        mean = accelerator.reduce(total, "sum").item()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), s.clip)
        scaled = accelerator.scaler is not None  # then steps whose gradient overflows are skipped
        if not math.isfinite(mean) or not (scaled or math.isfinite(float(norm))):
            self._not_finite(step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.tokens += whole.tokens
        return mean

    def _loss(self, batch: Data, held_out: bool = False) -> torch.Tensor:
        batch = batch.to(self.device)
        return self.model(batch.ids, batch.labels, batch.lengths, held_out)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Next-token loss (nats per scored token) of the held-out slice; keeps the adapter if it is the best yet."""
        accelerator, data = self.accelerator, self.held_out
        size = max(MICRO_TOKENS // data.ids.shape[1], 1)
        self.model.eval()
        total = torch.zeros((), device=self.device)
        rounds = math.ceil(len(data) / (size * accelerator.num_processes))
        for i in range(rounds):  # as many in every process, which FSDP needs
            first = (i * accelerator.num_processes + accelerator.process_index) * size
            rows = torch.arange(first, first + size)
            batch = data.rows(rows[rows < len(data)] if first < len(data) else torch.zeros(1, dtype=torch.long))
            loss = self._loss(batch, held_out=True)
            if first < len(data):
                total += loss
        mean = accelerator.reduce(total, "sum").item() / max(data.scored, 1)
        if not math.isfinite(mean):
            self._not_finite(self.state.step)
        state = self.state
        better = not state.held_out or mean < min(loss for _, loss in state.held_out)
        state.held_out.append((state.step, mean))
        if better:
            state.best_step, state.worse = state.step, 0
            self.best = self._adapter()
        else:
            state.worse += 1
            state.stopped_early = 0 < self.settings.patience <= state.worse and state.step < self.total

    def _not_finite(self, step: int) -> None:
        what = f"the loss of step {step} is not finite"
        kept = self.checkpoints.stopped(step) if self.accelerator.is_main_process else ""
        raise NotFinite(f"{what}; {kept}")

    def _adapter(self) -> Tensors:
        """A copy of the trained weights, by their names in Trainee."""
        found = distributed.get_model_state_dict(self.model, options=_FULL)
        trained = {n: cast(torch.Tensor, value) for n, value in found.items() if ADAPTER in n}  # not the buffers
        return {name: _copy(value) for name, value in trained.items()}

    def _checkpoint(self) -> None:
        adapter = self._adapter()
        moments: dict[str, dict[str, Any]] = self._optimizer_state()["state"]
        flat = {
            f"{name}|{key}": _copy(torch.as_tensor(value))
            for name, values in moments.items()
            for key, value in values.items()
        }
        if self.accelerator.is_main_process:
            self.checkpoints.save(Checkpoint(self.state, adapter, self.best, flat))
        self.accelerator.wait_for_everyone()

    def _optimizer_state(self) -> dict[str, Any]:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return cast(dict[str, Any], distributed.get_optimizer_state_dict(self.model, optimizer, options=_FULL))

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.state, self.best = checkpoint.state, checkpoint.best
        adapter: Any = checkpoint.adapter
        distributed.set_model_state_dict(self.model, adapter, options=_FULL)
        complete = self._optimizer_state()
        complete["state"] = {}
        for name, value in checkpoint.optimizer.items():
            parameter, _, key = name.rpartition("|")
            complete["state"].setdefault(parameter, {})[key] = value
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        distributed.set_optimizer_state_dict(self.model, optimizer, complete, options=_FULL)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def learning_rate(step: int, total: int, settings: Settings) -> float:
    """Of step 0, 1, ...: up in a line over the warm-up, then half a cosine, which would be 0 at step `total`."""
    warmup, highest = min(settings.warmup, total), settings.highest_lr
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
