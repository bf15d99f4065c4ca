"""The light list of families is the one that modeling.py and the descriptors have."""

from kvprune import runtime
from kvprune.models.family import FAMILIES
from kvprune.runtime import modeling, vllm

MEMORY = "_can_set_experts_implementation_cached_value"


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


def test_experts_run_at_once_where_the_familys_do(monkeypatch):
    """The twin is asked first: a family that has been asked remembers, and its subclasses with it."""
    for family in {*vllm.EXPERTS, "llama"} & {*modeling.TWINS}:
        _, model, lm = modeling.TWINS[family]
        heads = (getattr(modeling, modeling._head_name(auto, family), None) for auto in modeling.HEADS)
        for twin in (model, lm, *(head for head in heads if head is not None)):
            for cls in twin.__mro__:
                if MEMORY in vars(cls):
                    monkeypatch.delattr(cls, MEMORY)
            assert twin._can_set_experts_implementation() == (family != "llama"), twin.__name__
            assert twin.__mro__[1]._can_set_experts_implementation() == (family != "llama")
