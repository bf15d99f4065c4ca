"""Which channels matter: one method, one file. To add one, write its file and a line here."""

from kvprune.channels.importance.base import Importance, Scores
from kvprune.channels.importance.energy import Energy
from kvprune.channels.importance.l1 import L1
from kvprune.channels.importance.l2 import L2
from kvprune.channels.importance.taylor import Taylor
from kvprune.channels.importance.variance import Variance

IMPORTANCE: dict[str, Importance] = {
    "variance": Variance(),
    "energy": Energy(),
    "taylor": Taylor(),
    "l1": L1(),
    "l2": L2(),
}

__all__ = ["IMPORTANCE", "Importance", "Scores"]
