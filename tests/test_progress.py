"""What a run shows while it goes on: bars on a terminal, plain lines elsewhere, next to nothing with --quiet."""

import io
import re
import sys

import pytest
from conftest import run_script
from tqdm import tqdm

import retrain
import search
from lib import cli

TINY = "--dataset folder --image_size 16 --init_channels 2 --layers 1 --batch_size 6 --epochs 2 --report_freq 4"


class Eager(tqdm):
    """Draws every step, however fast."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs, mininterval=0)


class Terminal(io.StringIO):
    """Something that says of itself that it is a terminal."""

    def isatty(self) -> bool:
        return True


def log_without_times(folder) -> list[str]:
    """The lines of log.txt."""
    lines = (folder / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    return [line[20:] for line in lines]


def assert_complete(lines: list[str], steps: int, last: str) -> None:
    """A log with the run folder, lines of steps every 4 and at an epoch's end, lines of epochs, and the end."""
    assert lines[0].startswith("run folder: ")
    for epoch in (0, 1):
        for step in sorted({*range(4, steps + 1, 4), steps}):
            (line,) = (line for line in lines if line.startswith(f"epoch {epoch} step {step}/{steps}: loss "))
            assert re.search(r"accuracy [\d.]+ %.*, \d+ images/s$", line)
        assert any(line.startswith(f"epoch {epoch}: train loss ") for line in lines)
    assert lines[-1].startswith(last)


def test_bars_of_a_search_on_a_terminal(pictures, tmp_path):
    file = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "tqdm", Eager)
        patch.setattr(sys, "stdout", file), patch.setattr(sys, "stderr", file), patch.setenv("COLUMNS", "80")
        folder = run_script(search, f"{TINY} --dss_freq 2", "--data", pictures, "--save", tmp_path / "run")
    shown = [part for part in re.split(r"[\r\n]+|\x1b\[A", file.getvalue()) if part]
    for epoch in (0, 1):
        bars = [line for line in shown if line.startswith(f"epoch {epoch} ") and "images/s" in line]
        assert len(bars) >= 6, "every step of six is drawn"
        figures = r" 6/6, \d\d:\d\d left, loss \d\.\d+, acc \d+\.\d%, \d+ images/s, ops \d+\+\d+$"
        assert re.search(figures, bars[-1])
    assert any(re.match(r"epochs .* 0/2, \? left", line) for line in shown)
    assert any(re.match(r"epochs .* 1/2, \d\d:\d\d left, validation accuracy \d+\.\d%", line) for line in shown)
    log = log_without_times(folder)
    assert_complete(log, 6, "retrain it with: python retrain.py")
    lines = [line for line in log if not re.match(r"epoch \d step ", line)]  # the bar says what those say
    assert [line for line in shown if line in log] == lines


def test_plain_lines_where_the_output_is_no_terminal(pictures, tmp_path, capfd):
    folder = run_script(retrain, TINY, "--data", pictures, "--save", tmp_path / "run")
    out, err = capfd.readouterr()
    assert err == "" and "\r" not in out and "\x1b" not in out
    assert out.splitlines() == log_without_times(folder)
    assert_complete(out.splitlines(), 12, "test it with: python evaluate.py")
