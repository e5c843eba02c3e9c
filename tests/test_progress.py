"""What a run shows while it goes on: bars on a terminal, plain lines elsewhere, next to nothing with --quiet."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tqdm import tqdm

import retrain
import search
from lib import cli

TINY = "--dataset folder --image_size 16 --init_channels 2 --layers 1 --batch_size 6 --epochs 2 --report_freq 4"


class Eager(tqdm):
    """Draws every step, however fast."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs, mininterval=0)


@contextmanager
def terminal(columns: int = 80) -> Iterator[list[str]]:
    """A pseudo terminal in place of standard output and standard error; the list then has what was written to it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    parts: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(master, 4096):
                parts.append(part)
        except OSError:  # Linux: the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    shown: list[str] = []
    with pytest.MonkeyPatch.context() as patch, open(slave, "w", buffering=1) as file:
        patch.setattr(cli, "tqdm", Eager)
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, file)
        yield shown
    reader.join()
    os.close(master)
    shown += filter(None, re.split(r"[\r\n]+|\x1b\[A", b"".join(parts).decode()))


def run(script, pictures, folder, text=""):
    arguments = [*TINY.split(), *text.split(), "--data", str(pictures), "--save", str(folder)]
    return script.main(cli.parse(script.get_parser(), arguments))


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
    with terminal() as shown:
        folder = run(search, pictures, tmp_path / "run", "--dss_freq 2")
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
    folder = run(retrain, pictures, tmp_path / "run")
    out, err = capfd.readouterr()
    assert err == "" and "\r" not in out and "\x1b" not in out
    assert out.splitlines() == log_without_times(folder)
    assert_complete(out.splitlines(), 12, "test it with: python evaluate.py")
