"""What editors and help() show of the public functions: every option, its type and its default, as the settings have
it."""

import inspect
from dataclasses import fields

import pytest

import kvprune
from kvprune.channels.settings import DECIDED_BY_A_PLAN
from kvprune.channels.settings import PRESETS as PRUNE_PRESETS
from kvprune.channels.settings import Settings as Prune
from kvprune.recovery.settings import PRESETS as RECOVER_PRESETS
from kvprune.recovery.settings import Settings as Recover
from kvprune.tokens.admission import Admission
from kvprune.tokens.settings import PRESETS as FILTER_PRESETS
from kvprune.tokens.settings import Settings as Filter

# What users may give beside what the settings hold in the end
WIDER = {"source", "folder", "eval", "windows", "eval_windows", "targets", "layers", "calibration", "teacher", "plan"}
WIDER |= {"text"}
DECIDED_IN_RECOVERY = {*RECOVER_PRESETS["kvpruner"], "steps"}


def parameters(function):
    return inspect.signature(function).parameters


def check(function, settings, decided, but=()):
    """Each field is a parameter of its type and default, or None where something else may decide."""
    found = parameters(function)
    for field in fields(settings):
        if field.name in but:
            assert field.name not in found
            continue
        parameter = found[field.name]
        if field.name not in WIDER:
            wanted = str(getattr(field.type, "__name__", field.type) if isinstance(field.type, type) else field.type)
            shown = inspect.formatannotation(parameter.annotation)
            assert shown.removesuffix(" | None") == wanted.removesuffix(" | None"), field.name
        if field.name in decided:
            assert parameter.default is None, field.name
            assert "None" in inspect.formatannotation(parameter.annotation), field.name
        elif field.name not in ("source", "folder"):
            assert parameter.default == field.default, field.name


def test_the_public_functions_have_no_options_without_a_name():
    for name in kvprune.__all__:
        value = getattr(kvprune, name)
        if not callable(value) or (inspect.isclass(value) and name != "TokenFilter"):
            continue
        assert value.__doc__, name
        for parameter in parameters(value).values():
            assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL), name
            assert name == "errors" or parameter.annotation is not parameter.empty, (name, parameter.name)


def test_prune():
    assert set(PRUNE_PRESETS["kvpruner"]) <= DECIDED_BY_A_PLAN
    check(kvprune.prune, Prune, DECIDED_BY_A_PLAN)
    assert list(parameters(kvprune.prune))[:2] == ["source", "out"]


def test_recover():
    check(kvprune.recover, Recover, DECIDED_IN_RECOVERY)
    assert list(parameters(kvprune.recover))[:2] == ["folder", "out"]


def test_token_filter():
    found = set(parameters(kvprune.TokenFilter)) - {"preset", "record"}
    assert found == {field.name for kind in (Admission, Filter) for field in fields(kind)}
    assert set(FILTER_PRESETS["paper"]) <= found
    for kind in (Admission, Filter):  # the two have names in common, and other defaults
        check(kvprune.TokenFilter, kind, found)


def test_the_defaults_in_the_filters_help_are_those_of_the_settings():
    told = " ".join(str(kvprune.TokenFilter.__init__.__doc__).split())
    late, skipping = told.split("Or ratio:")
    for text, kind in ((late, Admission), (skipping, Filter)):
        for field in fields(kind):
            if field.name in ("keep", "ratio") or field.default is None:
                assert field.name in text
                continue
            default = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
            assert f"{field.name} ({default}" in text or f"{field.name} (default {default}" in text, field.name


def test_what_is_none_in_the_signature_has_its_default_in_the_help():
    in_other_words = {"ratio", "targets", "window", "batch", "loss", "steps", "dropout"}
    for function, kind, decided in (
        (kvprune.prune, Prune, DECIDED_BY_A_PLAN),
        (kvprune.recover, Recover, DECIDED_IN_RECOVERY),
    ):
        told = " ".join(str(function.__doc__).split())
        for field in fields(kind):
            assert field.name in told
            if field.name in decided - in_other_words and field.default is not None:
                default = f'"{field.default}"' if isinstance(field.default, str) else f"{field.default:g}"
                assert f"{field.name} ({default}" in told, field.name


def test_studies():
    own = ("calibration", "calibration_tokens", "repair_tokens", "seed", "plan", "windows")
    check(kvprune.study_calibration, Prune, DECIDED_BY_A_PLAN, own)
    own = ("ratio", "depth", "plan", "allocation", "layout", "windows", "probes", "probe", "probe_tokens", "tau")
    depth = [field for field in fields(Prune) if field.name in (*own, "eval", "drop_blocks")]
    found = parameters(kvprune.study_depth)
    for field in fields(Prune):
        if field not in depth:
            decided = field.name in DECIDED_BY_A_PLAN
            assert field.name == "source" or found[field.name].default == (None if decided else field.default)
    assert not set(own) & set(found)


def test_scaling_is_bench():
    scaling, bench = parameters(kvprune.study_scaling), parameters(kvprune.bench)
    assert set(scaling) == set(bench)
    for name, parameter in bench.items():
        assert scaling[name].annotation == parameter.annotation or name == "out"
        assert scaling[name].default == parameter.default or name in ("out", "batch", "context")


@pytest.mark.parametrize("call", [kvprune.prune, kvprune.recover, kvprune.TokenFilter, kvprune.study_depth])
def test_a_misspelt_option_is_pythons_own_error(call):
    with pytest.raises(TypeError, match="ratoi"):
        call("source", ratoi=0.5)
