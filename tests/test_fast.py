"""fast.py against what it stands for, the forwards of operations.py, model_search.py and model.py; the benchmark."""

import argparse
import copy
import re
import sys
from pathlib import Path

import bilevel
import engine
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fast
import genotypes
import model
import utils
from genotypes import CELL_TYPES, PRIMITIVES
from model_search import Architecture, DynamicSpace, Network
from operations import OPS, Pool, SepConv

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import run  # noqa: E402


def plain_copy(network):
    return fast.switch_off(copy.deepcopy(network))


def close(ours, expected, dtype):
    """Relative to the largest entry, as rounding is; what is nothing but rounding is compared to nothing."""
    relative, absolute = (1e-9, 1e-12) if dtype == torch.float64 else (1e-4, 1e-6)
    assert (ours - expected).abs().max() <= relative * expected.abs().max() + absolute


@pytest.mark.parametrize("checkpoint_cells", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_supernet_steps_with_a_moving_subspace(dtype, stem, checkpoint_cells):
    """Logits, gradients of alpha, beta and weights, and running statistics, over steps in changing subspaces."""
    torch.manual_seed(0)
    size = 8 if stem == "cifar" else 64
    network, architecture = Network(4, 10, 3, PRIMITIVES, stem).to(dtype), Architecture(14, 8).to(dtype)
    network.checkpoint_cells = checkpoint_cells
    plain, rng, space = plain_copy(network), np.random.default_rng(0), DynamicSpace(PRIMITIVES, max_ops=40)
    for _ in range(3):
        space.sample_random(rng)
        active = space.active_ops()
        x, y = torch.randn(6, 3, size, size, dtype=dtype), torch.randint(0, 10, (6,))
        gradients = []
        for net in (network, plain):
            architecture.zero_grad()
            net.zero_grad()
            logits = net(x, architecture.weights(active), active)
            F.cross_entropy(logits, y).backward()
            gradients.append([logits.detach(), *(p.grad.clone() for p in architecture.parameters())])
        for ours, expected in zip(*gradients, strict=True):
            close(ours, expected, dtype)
        for (name, ours), expected in zip(network.named_parameters(), plain.parameters(), strict=True):
            assert (ours.grad is None) == (expected.grad is None), name
            if ours.grad is not None:
                close(ours.grad, expected.grad, dtype)
    for ours, expected in zip(network.buffers(), plain.buffers(), strict=True):
        close(ours.double(), expected.double(), dtype)
    network.eval(), plain.eval()
    with torch.no_grad():
        weights = architecture.weights(active)
        close(network(x, weights, active), plain(x, weights, active), dtype)
        only_none = {kind: [[0]] * 14 for kind in CELL_TYPES}
        close(network(x, weights, only_none), plain(x, weights, only_none), dtype)


@pytest.mark.parametrize("name", ["DDSAS_cifar10", "PDARTS", "DARTS_V1"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_discovered_network(name, dtype):
    torch.manual_seed(0)
    network = model.NetworkCIFAR(4, 10, 4, True, genotypes.load(name)).to(dtype)
    network.drop_path_prob = 0.3
    plain = plain_copy(network)
    x, y = torch.randn(6, 3, 32, 32, dtype=dtype), torch.randint(0, 10, (6,))
    for net in (network, plain):
        torch.manual_seed(1)
        logits, auxiliary_logits = net(x)
        (F.cross_entropy(logits, y) + F.cross_entropy(auxiliary_logits, y)).backward()
        net.logits = logits.detach()
    close(network.logits, plain.logits, dtype)
    for ours, expected in zip(network.parameters(), plain.parameters(), strict=True):
        close(ours.grad, expected.grad, dtype)
    for ours, expected in zip(network.buffers(), plain.buffers(), strict=True):
        close(ours.double(), expected.double(), dtype)
    network.eval(), plain.eval()
    with torch.no_grad():
        close(model.fuse(network)(x)[0], plain(x)[0], dtype)


@pytest.mark.parametrize("H", [1, 4, 5, 8, 9, 14])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ["sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"])
def test_convolutions_of_every_size(name, stride, H):
    torch.manual_seed(0)
    op = OPS[name](4, stride, True).double()
    x = torch.randn(3, 4, H, H, dtype=torch.float64, requires_grad=True)
    inputs = [x, *op.parameters()]
    ours, expected = fast.evaluate(fast.term_of(op, fast.Node(x))), op(x)
    close(ours, expected, torch.float64)
    dy = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, inputs, dy) for y in (ours, expected)), strict=True):
        close(a, b, torch.float64)


def test_an_operation_of_ones_own_works_in_search_and_retraining(monkeypatch):
    """A line in OPS is all: fast.py takes other sizes, and leaves what it does not know to the module's own forward."""
    own = {
        "conv_3x3": lambda C, stride, affine: torch.nn.Conv2d(C, C, 3, stride, 1),
        "max_pool_5x5": lambda C, stride, affine: Pool(torch.nn.MaxPool2d(5, stride, padding=2)),
        "avg_pool_5x5": lambda C, stride, affine: Pool(torch.nn.AvgPool2d(5, stride, padding=2)),
        "sep_conv_7x7": lambda C, stride, affine: SepConv(C, C, 7, stride, affine),
    }
    for name, op in own.items():
        monkeypatch.setitem(OPS, name, op)
    primitives = [*PRIMITIVES, *own]
    torch.manual_seed(0)
    network, weights = Network(4, 10, 3, primitives), {kind: torch.rand(14, 12) for kind in CELL_TYPES}
    plain, x = plain_copy(network), torch.randn(4, 3, 8, 8)
    outputs = [net(x, weights, None) for net in (network, plain)]
    close(*outputs, torch.float32)
    for logits in outputs:
        logits.square().sum().backward()
    for ours, expected in zip(network.parameters(), plain.parameters(), strict=True):
        close(ours.grad, expected.grad, torch.float32)


class NoSynchronisation(TorchDispatchMode):
    """Fails on what makes the host wait for a GPU: .item(), bool(tensor), nonzero, copies between devices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select"), name
        return function(*args, **(kwargs or {}))


def test_a_search_step_never_waits_for_the_device():
    torch.manual_seed(0)
    network, architecture = Network(4, 10, 3, PRIMITIVES), Architecture(14, 8)
    sgd = torch.optim.SGD(network.parameters(), 0.1, 0.9)
    space = DynamicSpace(PRIMITIVES)
    space.sample_random(np.random.default_rng(0))
    active, x, y = space.active_ops(), torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))
    average, watch = utils.Average("cpu"), engine.Watch(torch.device("cpu"), 0, Path())
    watch.at_once = False
    with NoSynchronisation():
        weights = architecture.weights(active, tau=1.0)
        loss, logits = bilevel.architecture_backward(network, sgd, weights, active, x, y)
        with torch.no_grad():
            weights = architecture.weights(active)
        loss = F.cross_entropy(network(x, weights, active), y)
        norm = bilevel.backward_clip_and_step(sgd, loss, 5)
        average.add(loss, logits, y)
        watch.add(0, loss, norm)
    with pytest.raises(AssertionError), NoSynchronisation():
        loss.item()
    assert set(weights) == set(CELL_TYPES)


def test_the_benchmark_prints_every_row(monkeypatch, capsys):
    monkeypatch.setattr(run, "WORK", {name: (8, build) for name, (_, build) in run.WORK.items()})
    monkeypatch.setattr(run, "summary", lambda: ({"convolution": 1.0}, 1.0, 1.0))  # a step at full size
    run.main(argparse.Namespace(memory=None, quick=True, repetitions=1))
    printed = capsys.readouterr().out
    for name in run.WORK:
        assert re.search(rf"\| {name} \| 2 \| \d+\.\d+ s \| \d+\.\d+ s \| \d+\.\dx \|", printed)
    assert re.search(r"\| update and sample of the space \| \| \| \d\.\d\d ms", printed)
