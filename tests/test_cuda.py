"""What only a GPU can show: bash shell/test.sh -m cuda. Skipped without one.

TEST_DEVICE=cpu runs the same bodies on the CPU, which shows that they can be run, not what they are for.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import checks  # noqa: E402
import gpu  # noqa: E402
from checks import METHODS, Scripts, lines  # noqa: E402
from steps import Setting, Way  # noqa: E402

pytestmark = pytest.mark.cuda

VARIANTS = {
    "cells recomputed": f"search.py {checks.TINY} --checkpoint_cells",
    "second order": f"search.py {checks.TINY} --method darts --unrolled",
    "nasbench201": f"search.py {checks.TINY} --space_config nasbench201 --layers 1",
}


@pytest.fixture
def device():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield torch.device(os.environ.get("TEST_DEVICE", "cuda:0"))
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def scripts(device, tmp_path) -> Scripts:
    return Scripts(device, tmp_path)


def test_the_published_numbers(device):
    for name, error in checks.golden_errors(device).items():
        assert error < (1e-3 if "gradients" in name else 1e-4), name


@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_an_epoch(scripts, name):
    folder = scripts.start((METHODS | VARIANTS)[name])
    assert all(0 < line["train_loss"] < 20 for line in lines(folder / "history.jsonl"))
    timing = lines(folder / "timing.jsonl")[-1]
    assert timing["images_per_second"] > 0 and timing["peak_memory_mb"] > 0


@pytest.mark.parametrize("words", ["search.py {} --dss_freq 2", "retrain.py {} --drop_path_prob 0"])
def test_it_learns_as_on_the_cpu(scripts, words):
    """The first epoch's loss: the same images, subspaces and weights at the start; no draws on the device."""
    folders = [scripts.start(words.format(checks.TINY) + more) for more in ("", " --device cpu")]
    ours, expected = (lines(folder / "history.jsonl")[0]["train_loss"] for folder in folders)
    assert ours == pytest.approx(expected, rel=1e-2)


def test_evaluation_repeats_what_retraining_found(scripts):
    folder = scripts.start(METHODS["retraining"])
    command = (
        f"{checks.ROOT}/evaluate.py --model_path {folder} --data {scripts.data} --device {scripts.device} --no-tf32"
    )
    found = re.search(r"(\d+\.\d+) ?%", scripts.see_through(command.split()))
    (line,) = lines(folder / "history.jsonl")
    assert float(found[1]) == pytest.approx(line["test_acc"], abs=4.2)  # one image of 24


@pytest.mark.parametrize(("script", "more"), [("search.py", "--begin 9"), ("retrain.py", "")])
def test_a_killed_run_goes_on_with_the_same_losses(scripts, script, more):
    """Not to the bit, as on the CPU; with --begin subspaces are drawn, so that a last digit moves none."""
    assert (result := scripts.resume(script, more))["ok"], result


def test_a_checkpoint_goes_on_on_the_other_device(scripts):
    folder = scripts.start(f"search.py {checks.TINY} --learning_rate 0.01 --learning_rate_min 0.01")
    for epochs, device in ((2, "cpu"), (3, scripts.device)):
        scripts.go_on(f"search.py --resume {folder} --epochs {epochs} --device {device}")
        assert len(lines(folder / "history.jsonl")) == epochs


def test_two_processes_on_one_device(scripts):
    assert (result := scripts.two_processes())["ok"], result


@pytest.mark.parametrize("name", ["ddsas", "pdarts", "retraining"])
def test_bfloat16_learns_the_same(scripts, name):
    if scripts.device.type != "cuda":
        pytest.skip("--amp is for CUDA")
    ours, expected = (scripts.epoch(name, more)["train_loss"][0] for more in ("--amp", ""))
    assert ours == pytest.approx(expected, rel=0.1) and ours != expected


@pytest.mark.parametrize("name", gpu.work(small=True))
@pytest.mark.parametrize("fast", [False, True])
def test_no_step_waits_for_the_gpu(device, name, fast):
    build, batch = gpu.work(small=True)[name]
    step = build(Setting(batch, Way(frozen=True, fast=fast), device))
    step()
    with gpu.waiting_is_an_error(device):
        step()
    with pytest.raises(RuntimeError), gpu.waiting_is_an_error(device):
        step().sum().item()
