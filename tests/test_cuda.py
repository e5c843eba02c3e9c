"""What only a GPU can show: bash shell/test.sh -m cuda. Skipped without one.

See also test_benchmark.py, which runs gpu.py. TEST_DEVICE=cpu runs the same bodies on the CPU, which shows
that they can be run, not what they are for.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import checks  # noqa: E402
from checks import Scripts, lines  # noqa: E402

pytestmark = pytest.mark.cuda

VARIANTS = {
    "cells recomputed": f"search.py {checks.TINY} --checkpoint_cells",
    "second order": f"search.py {checks.TINY} --method darts --unrolled",
    "nasbench201": f"search.py {checks.TINY} --space_config nasbench201 --layers 1",
}


@pytest.fixture
def scripts(tmp_path) -> Scripts:
    return Scripts(torch.device(os.environ.get("TEST_DEVICE", "cuda:0")), tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_epoch(scripts, name):
    folder = scripts.start(VARIANTS[name])
    assert all(0 < line["train_loss"] < 20 for line in lines(folder / "history.jsonl"))
    timing = lines(folder / "timing.jsonl")[-1]
    assert timing["images_per_second"] > 0 and timing["peak_memory_mb"] > 0


@pytest.mark.parametrize("words", ["search.py {} --dss_freq 2", "retrain.py {} --drop_path_prob 0"])
def test_it_learns_as_on_the_cpu(scripts, words):
    """The first epoch's loss: the same images, subspaces and weights at the start; no draws on the device."""
    folders = [scripts.start(words.format(checks.TINY) + more) for more in ("", " --device cpu")]
    ours, expected = (lines(folder / "history.jsonl")[0]["train_loss"] for folder in folders)
    assert ours == pytest.approx(expected, rel=1e-2)


def test_a_checkpoint_is_read_on_the_other_device(scripts):
    folder = scripts.start(f"search.py {checks.TINY}")
    for device in ("cpu", scripts.device):
        scripts.go_on(f"search.py --resume {folder} --device {device}")
        assert len(lines(folder / "history.jsonl")) == 1


@pytest.mark.parametrize("name", ["ddsas", "pdarts", "retraining"])
def test_bfloat16_learns_the_same(scripts, name):
    if scripts.device.type != "cuda":
        pytest.skip("--amp is for CUDA")
    ours, expected = (scripts.epoch(name, more)["train_loss"][0] for more in ("--amp", ""))
    assert ours == pytest.approx(expected, rel=0.1) and ours != expected
