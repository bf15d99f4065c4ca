"""Which channels matter: one method, one file. To add one, write its file and a line here."""

from kvprune.channels.evidence.importance.base import Importance, Scores
from kvprune.channels.evidence.importance.energy import Energy
from kvprune.channels.evidence.importance.l1 import L1
from kvprune.channels.evidence.importance.l2 import L2
from kvprune.channels.evidence.importance.taylor import Taylor
from kvprune.channels.evidence.importance.variance import Variance

IMPORTANCE: dict[str, Importance] = {
    "variance": Variance(),
    "energy": Energy(),
    "taylor": Taylor(),
    "l1": L1(),
    "l2": L2(),
}

__all__ = ["IMPORTANCE", "Importance", "Scores"]
