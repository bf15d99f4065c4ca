"""The light list of families is the one that modeling.py and the descriptors have."""

from kvprune import runtime
from kvprune.models.family import FAMILIES
from kvprune.runtime import modeling, vllm


def test_the_lists_agree():
    assert runtime.FAMILIES == modeling.FAMILIES == tuple(sorted(FAMILIES))
    assert runtime.PREFIX == modeling.PREFIX


def test_vllm_hears_of_the_architectures_that_folders_name():
    for config, _, lm in modeling.TWINS.values():
        assert vllm.architecture(config.__mro__[1].__name__) == lm.__name__


def test_families_with_experts():
    """By what a config calls their number; vLLM's own answer is compared in tests/real/test_vllm_plugin.py."""
    names = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
    found = {family for family, (config, *_) in modeling.TWINS.items() if any(hasattr(config, n) for n in names)}
    assert found - {"gemma4_text"} == {*vllm.EXPERTS}  # one of its models has them, which the plain class runs
