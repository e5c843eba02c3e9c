"""The benchmarks: every row is printed, a trick that is taken out changes no number, gpu.py runs to its end."""

from __future__ import annotations

import argparse
import json
import mmap
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import run  # noqa: E402
from checks import Scripts  # noqa: E402
from steps import Setting, evaluation, retraining_step, search_step  # noqa: E402

SMALL = {"layers": 3, "C": 4}
WORK = {
    "DDSAS search step": (8, partial(search_step, **SMALL)),
    "retraining step": (8, partial(retraining_step, **SMALL)),
    "evaluation": (8, partial(evaluation, **SMALL)),
    "20 augmented batches": (8, run.augmentation),
}


def test_every_row_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(run, "WORK", WORK)
    run.main(argparse.Namespace(memory=None, against=None, quick=True, repetitions=1, device="cpu"))
    printed = capsys.readouterr().out
    for name, (batch, _) in WORK.items():
        assert re.search(rf"\| {name} \| {batch // 4} (\| \d+\.\d+ s ){{3}}\| \d+\.\d+x \|", printed)
    assert re.search(r"\| update and sample of the space \| \| \| \| \d\.\d\d ms", printed)
    for name in run.WITHOUT:
        assert re.search(rf"\| {re.escape(name)} \| \d+\.\d\d \|", printed)


@pytest.mark.parametrize("which", [*run.WAYS, *run.WITHOUT])
def test_every_way_computes_the_same(monkeypatch, which):
    """Two steps' losses; what is patched for one is as before afterwards."""
    monkeypatch.setattr(run, "WORK", WORK)
    (ours, expected) = (run.build("DDSAS search step", name, Setting(4)) for name in (which, "published"))
    for _ in range(2):
        torch.testing.assert_close(ours(), expected(), rtol=1e-4, atol=1e-4)


def test_memory_and_another_checkout(monkeypatch, capsys):
    """This tree stands for the other one."""
    monkeypatch.setattr(run, "WORK", {"20 augmented batches": (8, run.augmentation)})

    def fill() -> None:  # 64 MB that the allocator cannot have kept from before
        np.frombuffer(mmap.mmap(-1, 2**26), np.uint8)[:] = 1

    assert run.measure_peak(fill, torch.device("cpu")) == pytest.approx(64, abs=4)
    found = run.compare(ROOT, quick=False, repetitions=2)
    assert found["20 augmented batches"]["ratio"] > 0
    assert "| 20 augmented batches | 8 |" in capsys.readouterr().out


def test_a_part_is_ended_and_a_failure_said():
    args = SimpleNamespace(device="cpu", small=True)
    assert gpu.run_part("epoch", args, 0.5)["failed"] == "ended after 0 s"
    args.device = "nonsense"
    assert gpu.run_part("graph", args, 100)["failed"].startswith("exit code 1: RuntimeError")


@pytest.mark.long
def test_the_rehearsal_of_a_gpu_comes_to_its_end(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--device", "cpu", "--small", "--out", tmp_path / "gpu.json"]
    subprocess.run(command, check=True, timeout=600)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(gpu.PARTS) < set(found)
    for name in gpu.PARTS:
        assert '"failed"' not in json.dumps(found[name]), found[name]
        assert '"ok": false' not in json.dumps(found[name]), found[name]
    assert all(error < 1e-4 for error in found["checks"]["golden arrays, largest relative errors"].values())


def test_a_script_runs_without_what_draws(tmp_path):
    """No figure, no bar, no event, as on a machine that has PyTorch, torchvision and numpy alone."""
    scripts = Scripts(torch.device("cpu"), tmp_path)
    assert scripts.epoch("ddsas")["ok"]
    assert not list(tmp_path.rglob("events*"))
