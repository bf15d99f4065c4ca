"""Least squares with a ridge that pulls towards the matrix that was there.

Of many rows their moments are kept, of fewer rows than there are inputs the rows themselves: the same solution, from a
smaller system.
"""

from functools import cached_property

import torch

from kvprune import processes

PIECES = 4  # in which a symmetric product is computed: five eighths of the work


class Moments:
    """Sums over rows of x x^T, x y^T and |y|^2 in float64, (n, n), (n, m) and a number; x (..., n), y (..., m).

    A row's weight (..., 1) multiplies both x and y.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | None = None) -> None:
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.yy = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | float = 1.0) -> None:
        x, y = (x.float() * weight).flatten(0, -2), (y.float() * weight).flatten(0, -2)
        self.xx += gram(x)
        self.xy += x.T @ y
        self.yy += y.square().sum(dtype=torch.float64)

    def over_processes(self) -> None:
        """Add up what each has summed."""
        for sums in (self.xx, self.xy, self.yy):
            processes.summed(sums)

    def fit(self, weight: torch.Tensor, ridge: float) -> torch.Tensor:
        """See ridge_fit."""
        xx, xy = self.xx, self.xy
        pull = (ridge * xx.diagonal().mean()).clamp_min(1e-300)
        system = xx + pull * torch.eye(len(xx), dtype=torch.float64, device=xx.device)
        return torch.cholesky_solve(xy + pull * weight.double().T, torch.linalg.cholesky(system)).T

    def is_finite(self) -> bool:
        return all(torch.isfinite(torch.as_tensor(sums)).all() for sums in (self.xx, self.xy, self.yy))

    def error(self, weight: torch.Tensor) -> float:
        """Sum of |weight x - y|^2; weight (m, n)."""
        weight = weight.double()
        return float(((weight @ self.xx) * weight).sum() - 2 * (weight.T * self.xy).sum() + self.yy)


class Rows:
    """The rows themselves, with the same answers as Moments: for fewer rows than inputs."""

    def __init__(self) -> None:
        self._x: list[torch.Tensor] = []
        self._y: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | float = 1.0) -> None:
        self._x.append((x.float() * weight).flatten(0, -2))
        self._y.append((y.float() * weight).flatten(0, -2))

    def over_processes(self) -> None:
        """Nothing: of one process alone."""

    @cached_property
    def x(self) -> torch.Tensor:
        """(rows, n)"""
        return torch.cat(self._x).double()

    @cached_property
    def y(self) -> torch.Tensor:
        """(rows, m)"""
        return torch.cat(self._y).double()

    @property
    def yy(self) -> torch.Tensor:
        return self.y.square().sum()

    @cached_property
    def _inner(self) -> torch.Tensor:
        return self.x @ self.x.T

    def fit(self, weight: torch.Tensor, ridge: float) -> torch.Tensor:
        """See ridge_fit; (X^T X + c)^-1 X^T = X^T (X X^T + c)^-1."""
        old = weight.double()
        pull = (ridge * self._inner.trace() / self.x.shape[1]).clamp_min(1e-300)
        system = self._inner + pull * torch.eye(len(self.x), dtype=torch.float64, device=self.x.device)
        missing = self.y - self.x @ old.T
        return old + torch.cholesky_solve(missing, torch.linalg.cholesky(system)).T @ self.x

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.x).all() and torch.isfinite(self.y).all())

    def error(self, weight: torch.Tensor) -> float:
        """Sum of |weight x - y|^2; weight (m, n)."""
        return float((self.x @ weight.double().T - self.y).square().sum())


def sums_of(rows: int, inputs: int, outputs: int, device: torch.device | None = None) -> Moments | Rows:
    """What takes less for so many rows; processes share sums, and no rows."""
    few = rows < inputs and processes.count() == 1
    return Rows() if few else Moments(inputs, outputs, device)


def gram(x: torch.Tensor) -> torch.Tensor:
    """x^T x of x (rows, n): one half of it, which the other mirrors."""
    found = x.new_zeros(x.shape[1], x.shape[1])
    for columns in torch.arange(x.shape[1], device=x.device).chunk(PIECES):
        first, behind = int(columns[0]), int(columns[-1]) + 1
        found[first:behind, first:] = x[:, first:behind].T @ x[:, first:]
    return found.triu() + found.triu(1).T


def ridge_fit(sums: Moments | Rows, weight: torch.Tensor, ridge: float) -> torch.Tensor:
    """The W (m, n) that minimises sum |W x - y|^2 + ridge * mean square of x * rows * |W - weight|^2, in float64.

    The ridge pulls towards the matrix that was, not towards zero, so that directions which the text never
    shows stay as they are. It never raises the first term above what `weight` has.
    """
    return sums.fit(weight, ridge)
