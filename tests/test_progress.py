"""What long work says: its lines against expected ones, by a clock that the tests move."""

import io
import sys
import time

import pytest
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

import kvprune
from ggufs import write_gguf
from kvprune.progress import Bars, Lines, on_stderr, without_bars
from tiny import COARSE, Counted, tiny_model


class Log(io.StringIO):
    """A stderr that is no terminal, and the clock, in seconds."""

    now = 100.0

    def lines(self) -> list[str]:
        return self.getvalue().splitlines()

    def until(self, count: int) -> None:
        """Wait for that many lines."""
        deadline = time.monotonic() + 30
        while len(self.lines()) < count:
            assert time.monotonic() < deadline, self.getvalue()
            time.sleep(0.002)

    def rest(self) -> None:
        """Give a line that should not come the time to come."""
        time.sleep(0.05)


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def lines(log):
    found = Lines(log, lambda: log.now)
    found.look = 0.002
    return found


def test_a_line_every_half_minute_and_one_at_the_end(log, lines):
    with lines.phase("train", 1000) as advance:
        for second in range(1, 91):
            advance(4, f"loss {9 - second / 100:.2f}")
            log.now += 1
            log.until(second // 30)
        log.rest()
    log.now += 100
    log.rest()
    assert log.lines() == [
        "train: 120 of 1,000 (12%), 0:30 elapsed, 3:39 left, loss 8.70",
        "train: 240 of 1,000 (24%), 1:00 elapsed, 3:09 left, loss 8.40",
        "train: 360 of 1,000 (36%), 1:30 elapsed, 2:39 left, loss 8.10",
        "train: done in 90.0 s, loss 8.10",
    ]


def test_a_step_that_takes_longer_is_not_silent(log, lines):
    with lines.phase("load"):
        for count in (1, 2):
            log.now += 45
            log.until(count)
    with lines.phase("layers", 3) as advance:
        log.now += 3600
        log.until(4)
        advance(1)
        log.now += 60
        log.until(5)
        log.now += 5000
        log.until(6)
    assert log.lines() == [
        "load: 0:45 elapsed",
        "load: 1:30 elapsed",
        "load: done in 90.0 s",
        "layers: 0 of 3 (0%), 1:00:00 elapsed",
        "layers: 1 of 3 (33%), 1:01:00 elapsed, 1:59:00 left",
        "layers: 1 of 3 (33%), 2:24:20 elapsed, 35:40 left",
        "layers: done in 8660.0 s",
    ]


def test_steps_that_were_there_before_say_nothing_of_the_speed(log, lines):
    with lines.phase("train", 100) as advance:
        log.now += 0.25
        advance(80)  # a resumed run
        log.now += 29.75
        log.until(1)
        advance(5)
        log.now += 30
        log.until(2)
    assert log.lines()[:2] == [
        "train: 80 of 100 (80%), 0:30 elapsed",
        "train: 85 of 100 (85%), 1:00 elapsed, 0:59 left",
    ]


def test_short_phases_and_broken_ones_say_nothing(log, lines):
    with lines.phase("surgery"):
        log.now += 0.9
        log.rest()

    def broken():
        with lines.phase("save"):
            log.now += 29
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    log.now += 100
    log.rest()
    assert log.lines() == []
    with lines.phase("evaluate", 0):
        log.now += 1
    lines.say("a warning")
    assert log.lines() == ["evaluate: done in 1.0 s", "a warning"]


def test_a_log_that_is_gone_ends_no_work(log, lines):
    log.close()
    with lines.phase("train"):
        log.now += 40
        log.rest()
    lines.say("a warning")
    assert list(lines.seconds) == ["train"]


@pytest.mark.parametrize(
    ("terminal", "kind", "expected"), [(True, "xterm", Bars), (True, "dumb", Lines), (False, "xterm", Lines)]
)
def test_bars_are_for_terminals(monkeypatch, terminal, kind, expected):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", kind)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    shown = on_stderr()
    assert type(shown) is expected
    shown.say("said")
    assert "said" in stream.getvalue()


@pytest.fixture
def bars():
    """transformers' own bars are on, as they are where nobody turned them off."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.enable_progress_bar()
    yield
    if not shown:
        hf_logging.disable_progress_bar()


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_loading_and_saving_show_no_bars_of_transformers(checkpoint, tmp_path, capsys, bars, kind):
    folder, given = checkpoint, {}
    if kind == "gguf":
        folder, given = tmp_path, {"gguf_file": "tiny.gguf"}
        write_gguf(tiny_model("llama", groups=2, head_dim=32, layers=1), tmp_path / "tiny.gguf")
    AutoModelForCausalLM.from_pretrained(folder, **given)
    theirs = "de-quantizing" if given else "Loading weights"
    assert theirs in capsys.readouterr().err  # or there would be nothing to take away
    model = kvprune.load(folder / given.get("gguf_file", ""))
    with without_bars():
        model.save_pretrained(tmp_path / "saved")
    assert "%|" not in capsys.readouterr().err
    AutoModelForCausalLM.from_pretrained(folder, **given)
    assert theirs in capsys.readouterr().err  # and what others load shows them as before


def test_pruning_shows_no_bars_of_transformers(checkpoint, texts, tmp_path, capsys, bars):
    kvprune.prune(checkpoint, tmp_path / "out", allocation="uniform", repair="none", **COARSE)
    assert capsys.readouterr().err == ""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    assert "Writing model shards" in capsys.readouterr().err


def test_generate_counts_its_tokens(checkpoint):
    progress = Counted()
    found = kvprune.generate(checkpoint, "the cat", max_new_tokens=7, progress=progress)
    assert progress.phases == [["load", 1, 0], ["generate", 7, found["new_tokens"]]]
    assert found["new_tokens"] > 1


def test_the_model_of_a_study_is_loaded_in_sight(checkpoint, texts):
    progress = Counted()
    kvprune.study_layers(checkpoint, tokens=128, window=64, device="cpu", progress=progress)
    assert progress.phases == [["load", 1, 0], ["layers", 2, 2]]
