"""gpt-oss under an engine: what gives attention its sinks is built before the model runs, and may lack them."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from every_family import VOCABULARY, family_model
from test_every_family import without_channels


@pytest.mark.parametrize(("said", "refused"), [({"has_sink": True}, False), ({"has_sink": False}, True), ({}, True)])
def test_an_engine_that_leaves_sinks_out_is_refused(said, refused):
    """As vLLM did, without a word, before its Transformers backend looked for them."""
    pruned = without_channels(family_model("gpt_oss"))[1]
    layers = enumerate(pruned.config.widths())
    engines = {layer: SimpleNamespace(head_size=width, **said) for layer, width in layers}
    with pytest.raises(ValueError, match=r"has attention sinks.*update vLLM") if refused else nullcontext():
        pruned(torch.randint(3, VOCABULARY, (1, 9)), attention_instances=engines)
