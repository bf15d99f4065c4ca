"""With kvprune installed beside vLLM a folder is served without any flag, in all of vLLM's processes; and what doctor
takes vLLM for is what vLLM says of itself.

The environment has no kvprune: it is installed into a folder of the test's own, which PYTHONPATH names.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from served import ask, gaps

ROOT = Path(__file__).parents[2]
FOLDERS = Path(os.environ.get("KVPRUNE_TEST_TINY", "missing"))
FOLDER, EXPERTS = FOLDERS / "phi3", FOLDERS / "gemma4_text-experts"
LISTS = """
from importlib.metadata import entry_points
from transformers import CONFIG_MAPPING
from vllm import ModelRegistry
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
from kvprune.runtime import FAMILIES, modeling

(point,) = entry_points(group="vllm.general_plugins", name="kvprune")
before = len(ModelRegistry.models)
point.load()()
point.load()()  # vLLM may call it again
assert len(ModelRegistry.models) == before + len(modeling.TWINS)
for model_type, (config, _, lm) in modeling.TWINS.items():
    known = config(num_experts=4) if model_type == "dots1" else config()  # whose experts are said in the checkpoint
    experts = ModelArchConfigConvertorBase(known, known).get_num_experts() > 0
    kind = "TransformersMoEForCausalLM" if experts else "TransformersForCausalLM"
    assert ModelRegistry.models[lm.__name__].class_name == kind, model_type
    ModelRegistry.models[lm.__name__].load_model_cls()
"""

WIDTHS = """
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from kvprune.engines.targets import FLASH_ATTENTION, FLASH_ATTENTION_4, TARGETS, VLLM_CPU

def taken(backend):
    return [width for width in range(1, 2048) if backend.supports_head_size(width)]

assert taken(CPUAttentionBackend) == list(VLLM_CPU)
target = TARGETS["vllm"]
for newest, widest in ((3, FLASH_ATTENTION[-1]), (4, FLASH_ATTENTION_4)):
    flash_attn.is_fa_version_supported = lambda version: version <= newest
    assert taken(flash_attn.FlashAttentionBackend) == list(range(8, widest + 1, 8))
assert target.most == FLASH_ATTENTION_4
assert target.least == taken(TritonAttentionBackend)[0]
assert set(taken(TritonAttentionBackend)) >= {width for width in range(1, 2048) if not target.refused(width)}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with kvprune and its metadata."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site]
    subprocess.run([*pip, ROOT], check=True)
    return str(site)


def test_every_family_gets_the_class_that_vllm_itself_would_take(installed):
    subprocess.run([sys.executable, "-c", LISTS], check=True, env=os.environ | {"PYTHONPATH": installed})


@pytest.mark.parametrize("family", ["phi3", "gpt_oss"])  # the second in vLLM's class for experts
def test_a_folder_is_served_without_a_flag(family, installed, tmp_path):
    folder = FOLDERS / family
    difference, gap = gaps(folder, ask(folder, tmp_path, "plugin", PYTHONPATH=installed))
    assert difference < 1e-3
    assert gap < 1e-3


def test_without_kvprune_the_code_of_the_folder_is_refused(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        ask(FOLDER, tmp_path, "plugin")


def test_the_widths_that_doctor_judges_by(installed):
    """FlashInfer is not there on a CPU."""
    subprocess.run([sys.executable, "-c", WIDTHS], check=True, env=os.environ | {"PYTHONPATH": installed})


def test_experts_that_vllm_alone_stops_at(installed, tmp_path, capfd):
    """As doctor says of Gemma 4's; where the folder's own code runs, doctor is wrong. One layer has heads of 512."""
    difference, gap = gaps(EXPERTS, ask(EXPERTS, tmp_path, "plugin", PYTHONPATH=installed))
    assert difference < 1e-3
    assert gap < 1e-3
    with pytest.raises(subprocess.CalledProcessError):
        ask(EXPERTS, tmp_path)
    assert "assert top_k is not None" in "".join(capfd.readouterr())
