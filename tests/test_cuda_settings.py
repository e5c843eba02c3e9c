"""What is decided for a GPU and can be tested without one: its settings, copies to it. See also test_cuda.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import model_search
import retrain
import search
import train_search
import utils
from genotypes import PRIMITIVES
from lib import cli
from model_search import Architecture, DynamicSpace


@pytest.fixture(autouse=True)
def restored():
    """The settings are the process's: each is put back."""
    backends = (torch.backends.cudnn, "benchmark"), (torch.backends.cudnn, "allow_tf32")
    backends += ((torch.backends.cuda.matmul, "allow_tf32"),)
    before = [getattr(*setting) for setting in backends]
    yield
    for setting, value in zip(backends, before, strict=True):
        setattr(*setting, value)


@pytest.mark.parametrize("tf32", [False, True])
def test_the_settings(tf32):
    utils.cuda_settings(tf32)
    found = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    assert found == (True, tf32, tf32)


@pytest.mark.parametrize("script", [search, retrain, train_search])
def test_they_are_made_before_the_first_step_and_go_on_with_the_run(script, pictures, tmp_path, monkeypatch):
    """A resumed run takes those of the run, though they were not on its command line."""
    calls: list[object] = []
    monkeypatch.setattr(utils, "cuda_settings", calls.append)
    hook = register_optimizer_step_pre_hook(lambda *_: calls.append("step"))
    size = "--dataset folder --image_size 16 --init_channels 2 --layers 2 --batch_size 36 --epochs 1 --quiet"
    argv = [*size.split(), "--data", str(pictures), "--save", f"{tmp_path}/run", "--no-tf32", "--device", "cpu"]
    if script is train_search:
        argv += "--eps_no_arch 0 --add_layers 0 --add_layers 0".split()
    try:
        script.main(cli.parse(script.get_parser(), argv))
    finally:
        hook.remove()
    assert calls[0] is False and set(calls[1:]) == {"step"}
    (folder,) = tmp_path.iterdir()
    script.main(cli.parse(script.get_parser(), ["--resume", str(folder), "--device", "cpu"]))
    assert calls[-1] is False


def test_the_mask_is_copied_to_the_device_only_when_the_subspace_moves(monkeypatch):
    copies = []  # of masks, not of the Gumbel softmax' numbers
    copied = lambda tensor, device: tensor if tensor.is_floating_point() else copies.append(device) or tensor  # noqa: E731
    monkeypatch.setattr(model_search, "to_device", copied)
    architecture, space, rng = Architecture(14, 8), DynamicSpace(PRIMITIVES), np.random.default_rng(0)
    for moves in (1, 2):
        space.sample_random(rng)
        for _ in range(3):
            active = space.active_ops()
            w = architecture.weights(active, tau=1.0)
            for kind, lists in active.items():
                assert [row.nonzero().flatten().tolist() for row in w[kind]] == lists
        assert len(copies) == 2 * moves
    assert (architecture.weights(None)["normal"] > 0).all() and len(copies) == 2 * moves + 2
    active = space.active_ops()
    architecture.weights(active)
    active["normal"][0][:] = [7]  # the caller's own lists
    assert architecture.weights(active)["normal"][0].nonzero().tolist() == [[7]]
