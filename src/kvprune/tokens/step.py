"""What one call of a model that skips is about, worked out once for all its layers."""

from dataclasses import dataclass, field, fields, replace

import torch

from kvprune.tokens.cache import HOST, FilteredLayer
from kvprune.tokens.settings import Settings
from kvprune.tokens.threshold import Places

TIES = 1e-5  # what similarities may differ by and count as equal: then the position decides
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Step:
    """All tensors stand where the call's decisions are made: on the host, or, of a step of decoding that leaves them
    where the model is, there.

    real (B, T) bool: what is no padding; numbers (B,): how many that are; all_real: whether the host knows that all
    are. begun (B,) bool: which sequences have had a token before; plain: all have, and all is real. order (B, T): the
    columns, real tokens first, or None where that is as they are. positions (B, T): absolute ones, of real tokens.
    ties (B, T): what tells equal similarities apart, so that text that repeats itself is not all or nothing. total,
    late: how many are real, and of those behind the warm-up. layers: those of the cache that filters use, by number.
    elsewhere: the same on other devices.
    """

    real: torch.Tensor
    numbers: torch.Tensor
    all_real: bool
    begun: torch.Tensor
    plain: bool
    order: torch.Tensor | None
    positions: torch.Tensor
    ties: torch.Tensor
    places: Places
    total: torch.Tensor | int
    late: torch.Tensor | int
    layers: dict[int, FilteredLayer]
    elsewhere: dict[torch.device, "Step"] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls,
        real: torch.Tensor,
        prompt_ends: torch.Tensor,
        layers: dict[int, FilteredLayer],
        settings: Settings,
        on_host: bool,
        all_real: bool,
    ) -> "Step":
        """real (B, T): where decisions are made; prompt_ends (B,): absolute positions behind the prompts' final tokens,
        0 for none; on_host: whether that is the host, which may look at values; all_real: what it knows already."""
        some, first = next(iter(layers.values())), settings.first
        device = real.device
        counts = some.counts.to(device) if some.is_initialized else torch.zeros(len(real), dtype=torch.long)
        if on_host:
            all_real = bool(real.all())
        numbers = real.sum(1)
        positions = counts.unsqueeze(1) + (real.cumsum(1) - 1 if real.shape[1] > 1 else 0)
        begun = counts > 0
        total = numbers.sum()
        late = (counts + numbers - counts.clamp(min=first)).clamp(min=0).sum()
        final = positions == prompt_ends.to(device).unsqueeze(1) - 1
        return cls(
            real=real,
            numbers=numbers,
            all_real=all_real,
            begun=begun,
            plain=all_real and (not on_host or bool(begun.all())),
            order=None if all_real or real.shape[1] == 1 else (~real).int().argsort(dim=1, stable=True),
            positions=positions,
            ties=TIES * (positions.double() * GOLDEN % 1),
            places=Places.of(real, counts, final, first, settings.block, on_host),
            total=int(total) if on_host else total,
            late=int(late) if on_host else late,
            layers=layers,
        )

    @property
    def tokens(self) -> int:
        return self.real.shape[1]

    def to(self, device: torch.device) -> "Step":
        """The same for a layer that is, or decides, on another device."""
        if self.real.device == device:
            return self
        if device not in self.elsewhere:
            is_host = device == HOST
            found = {
                f.name: getattr(self, f.name).to(device)
                for f in fields(self)
                if isinstance(getattr(self, f.name), (torch.Tensor, Places))
            }
            found |= {name: int(found[name]) for name in ("total", "late") if is_host and name in found}
            self.elsewhere[device] = replace(self, **found, elsewhere={})
        return self.elsewhere[device]
