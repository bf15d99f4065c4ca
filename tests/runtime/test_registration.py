"""The light list of families is the one that modeling.py and the descriptors have."""

from kvprune import runtime
from kvprune.models.family import FAMILIES
from kvprune.runtime import modeling


def test_the_lists_agree():
    assert runtime.FAMILIES == modeling.FAMILIES == tuple(sorted(FAMILIES))
    assert runtime.PREFIX == modeling.PREFIX
