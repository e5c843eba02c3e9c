"""What a run shows on a terminal while it goes on, and what its log says."""

import io
import itertools
import re
import sys

import pytest
from conftest import run_script
from tqdm import tqdm

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
    assert log[0].startswith("run folder: ") and log[-1].startswith("retrain it with: python retrain.py")
    for epoch, step in itertools.product((0, 1), (4, 6)):  # every fourth step, and the last
        pattern = rf"epoch {epoch} step {step}/6: loss [\d.]+, accuracy [\d.]+ %.*, \d+ images/s$"
        assert sum(bool(re.match(pattern, line)) for line in log) == 1
    lines = [line for line in log if not re.match(r"epoch \d step ", line)]  # the bar says what those say
    assert [line for line in shown if line in log] == lines
