"""What is decided for a GPU and can be tested without one: its settings, copies to it. See also test_cuda.py."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

import model_search
import utils
from genotypes import PRIMITIVES
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
def test_a_gpu_computes_as_the_flag_says(tf32, monkeypatch):
    for name, answer in (("device_count", 1), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)  # which shows that the device can be used
    args = argparse.Namespace(device="cuda", gpu=None, amp=True, tf32=tf32)
    assert utils.choose_device(args) == torch.device("cuda:0")
    utils.allow_tf32(args.tf32)
    found = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    assert found == (True, tf32, tf32)


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
