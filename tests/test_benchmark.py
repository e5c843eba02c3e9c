"""The benchmarks: every row is printed, a trick that is taken out changes no number, gpu.py runs to its end."""

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

WORK = {
    "DDSAS search step": (8, partial(search_step, layers=1, C=2)),
    "retraining step": (8, partial(retraining_step, layers=1, C=2)),
    "evaluation": (8, partial(evaluation, layers=1, C=2)),
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


def test_every_way_computes_the_same(monkeypatch):
    """Two steps' losses; what is patched for one is as before afterwards."""
    monkeypatch.setattr(run, "WORK", {"step": (8, partial(search_step, layers=3, C=2))})
    losses = {}
    for which in [*run.WAYS, *run.WITHOUT, "published"]:
        step = run.build("step", which, Setting(4))
        found = [step(), step()]
        torch.testing.assert_close(found, losses.setdefault("first", found), rtol=1e-4, atol=1e-4, msg=which)


def test_memory_and_another_checkout(monkeypatch, capsys, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/run.py").write_text("ours = lambda name, batch: lambda: None")
    monkeypatch.setattr(run, "WORK", {"20 augmented batches": (8, run.augmentation)})

    def fill() -> None:  # 64 MB that the allocator cannot have kept from before
        np.frombuffer(mmap.mmap(-1, 2**26), np.uint8)[:] = 1

    assert run.measure_peak(fill, torch.device("cpu")) == pytest.approx(64, abs=4)
    found = run.compare(tmp_path, quick=False, repetitions=2)
    assert found["20 augmented batches"]["ratio"] > 1  # nothing is quicker than something
    assert "| 20 augmented batches | 8 |" in capsys.readouterr().out


def test_a_part_is_ended_and_a_failure_said():
    args = SimpleNamespace(device="cpu", small=True)
    assert gpu.run_part("epoch", args, 0.5)["failed"] == "ended after 0 s"
    args.device = "nonsense"
    assert gpu.run_part("graph", args, 100)["failed"].startswith("exit code 1: RuntimeError")


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.long), pytest.param("cuda", marks=pytest.mark.cuda)]
)
def test_gpu_py_comes_to_its_end(tmp_path, device):
    """Golden arrays, an epoch of every method, resuming, two processes, steps that never wait; on the CPU rehearsed."""
    words = f"benchmarks/gpu.py --device {device} --small --out {tmp_path / 'gpu.json'}"
    subprocess.run([sys.executable, *words.split()], cwd=ROOT, check=True, timeout=600)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(gpu.PARTS) < set(found)
    for name in gpu.PARTS:
        assert not re.search('"failed"|"ok": false', json.dumps(found[name])), found[name]
    for name, error in found["checks"]["golden arrays, largest relative errors"].items():
        assert error < (1e-3 if "gradients" in name else 1e-4), name


@pytest.mark.long
def test_a_script_runs_without_what_draws(tmp_path):
    """No figure, no bar, no event, as on a machine that has PyTorch, torchvision and numpy alone."""
    scripts = Scripts(torch.device("cpu"), tmp_path)
    assert scripts.epoch("ddsas")["ok"]
    assert not list(tmp_path.rglob("events*"))
