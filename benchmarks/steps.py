"""What run.py and gpu.py measure, and how: the steps of search, retraining and evaluation at the papers' sizes.

Each function returns a step to be called, on random images that lie on the device: forward, backward, clipping and
optimizers. It depends on the networks, on Architecture and on fast.py, not on the scripts that train.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fast  # noqa: E402
import genotypes  # noqa: E402
import model  # noqa: E402
from genotypes import CELL_TYPES, EDGES, PRIMITIVES  # noqa: E402
from lib import depthwise  # noqa: E402
from model_search import Architecture, Network  # noqa: E402
from space import DynamicSpace  # noqa: E402

Step = Callable[[], Tensor]  # does all of it once; returns the loss, in evaluation the logits


class Way(NamedTuple):
    """How a step is computed; without any of these as published."""

    channels_last: bool = False  # images and kernels in this memory order, otherwise in NCHW
    frozen: bool = False  # a step on alpha computes no gradients of weights, and one on weights none of alpha
    fast: bool = False  # by fast.py; evaluation with its batch normalisations folded into the convolutions


class Setting(NamedTuple):
    """Where a step is computed, with how many images, and how."""

    batch: int
    way: Way = Way()
    device: torch.device = torch.device("cpu")
    bfloat16: bool = False  # autocast around the forward passes
    wrap: Callable[[Callable], Callable] = lambda forward: forward  # the network's forward becomes this, e.g. compiled


def search_step(
    at: Setting,
    layers: int = 8,
    C: int = 16,
    max_ops: int | None = 28,
    candidates: int = 8,
    capturable: bool = False,
    forward: Callable | None = None,
) -> Step:
    """A step of Adam on alpha and beta, and one of SGD on the weights.

    ``max_ops`` operations of each cell type are active, as in DDSAS; None: all of the ``candidates`` an edge, weighted
    with softmax(alpha), as in P-DARTS. ``capturable``: Adam can be part of a CUDA graph. ``forward(network, x, weights,
    active)`` computes the logits (None: as ``at.way`` says).
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    chosen = {
        kind: [[PRIMITIVES[k] for k in sorted(rng.choice(8, candidates, replace=False))] for _ in range(EDGES)]
        for kind in CELL_TYPES
    }
    network = arrange(Network(C, 10, layers, chosen), at)
    architecture, active = Architecture(EDGES, candidates).to(at.device), None
    if max_ops:
        space = DynamicSpace(PRIMITIVES, max_ops=max_ops)
        space.sample_random(rng)
        active = space.active_ops()
    sgd = torch.optim.SGD(network.parameters(), 0.025, 0.9, weight_decay=3e-4)
    adam = torch.optim.Adam(
        architecture.parameters(),
        3e-4,
        betas=(0.5, 0.999),
        weight_decay=1e-3,
        fused=True,
        capturable=capturable,
    )
    x, y = random_images(at)
    compute = at.wrap(partial(forward or (fast.supernet_forward if at.way.fast else call), network))

    def weights() -> dict[str, Tensor]:
        if max_ops:
            return architecture.weights(active)
        return {kind: alpha.softmax(-1) for kind, alpha in architecture.alphas().items()}

    def loss(w: dict[str, Tensor]) -> Tensor:
        with precision(at):
            return F.cross_entropy(compute(x, w, active), y)

    def step() -> Tensor:
        adam.zero_grad()
        with frozen(network) if at.way.frozen else nullcontext():
            loss(weights()).backward()
        adam.step()
        sgd.zero_grad()
        with torch.set_grad_enabled(not at.way.frozen):
            w = weights()
        return descend(network, sgd, loss(w))

    return step


def retraining_step(at: Setting, layers: int = 20, C: int = 36) -> Step:
    """A step of SGD on a discovered network with its auxiliary head and drop path."""
    torch.manual_seed(0)
    network = arrange(model.NetworkCIFAR(C, 10, layers, True, genotypes.load("DDSAS_cifar10")), at)
    network.drop_path_prob = 0.1
    if at.way.fast:
        fast.use_depthwise(network, print)
    sgd = torch.optim.SGD(network.parameters(), 0.025, 0.9, weight_decay=3e-4)
    x, y = random_images(at)
    compute = at.wrap(network)

    def step() -> Tensor:
        sgd.zero_grad()
        with precision(at):
            logits, auxiliary_logits = compute(x)
            loss = F.cross_entropy(logits, y) + 0.4 * F.cross_entropy(auxiliary_logits, y)
        return descend(network, sgd, loss)

    return step


def evaluation(at: Setting, layers: int = 20, C: int = 36) -> Step:
    """The logits of a discovered network."""
    torch.manual_seed(0)
    network = model.NetworkCIFAR(C, 10, layers, False, genotypes.load("DDSAS_cifar10")).eval()
    network = arrange(model.fuse(network) if at.way.fast else network, at)
    x, _ = random_images(at)

    def step() -> Tensor:
        with torch.inference_mode() if at.way.fast else torch.no_grad(), precision(at):
            return network(x)[0]

    return step


# ---- what they share -------------------------------------------------------------------------------------------------


def arrange(network: nn.Module, at: Setting) -> nn.Module:
    """The network on the device, its kernels in the memory order, in which the stem gets the images too."""
    order = torch.channels_last if at.way.channels_last else torch.contiguous_format
    network = network.to(at.device)
    for p in network.parameters():
        if p.dim() == 4:  # .to would leave 1x1 kernels as they are, whose order is that of both
            p.data = p.data.clone(memory_format=order)
    network.stem[0].register_forward_pre_hook(lambda conv, inputs: (inputs[0].contiguous(memory_format=order),))
    return network


def use_tf32(tf32: bool) -> None:
    """How a GPU computes float32, as utils.choose_device sets it; cuDNN keeps the fastest algorithm of each shape."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


def call(network: nn.Module, *arguments: object) -> Tensor:
    return network(*arguments)


def random_images(at: Setting) -> tuple[Tensor, Tensor]:
    """Images of CIFAR's size and their labels."""
    return torch.randn(at.batch, 3, 32, 32).to(at.device), torch.randint(0, 10, (at.batch,)).to(at.device)


def precision(at: Setting) -> torch.autocast:
    return torch.autocast(at.device.type, torch.bfloat16, enabled=at.bfloat16)


def descend(network: nn.Module, sgd: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """Backpropagate, clip to norm 5, step; operations that were not active stay as they are."""
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in network.parameters() if p.grad is not None], 5)
    sgd.step()
    return loss.detach()


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    network.requires_grad_(False)
    yield
    network.requires_grad_(True)


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU between two events."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000  # of milliseconds


def measure_peak(work: Callable[[], object], device: torch.device) -> float:
    """MB that a call takes at most above what was there before; on a CPU of this process (Linux can reset its peak)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    before = read_status("VmRSS")
    work()
    return read_status("VmHWM") - before


def read_status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


# ---- fast.py without one of its tricks -------------------------------------------------------------------------------


apply, normalise = fast.apply, fast.normalise
TRICKS: dict[str, Callable[[], AbstractContextManager]] = {
    "ReLU and pooled copies that operations share": lambda: mock.patch.object(
        fast, "apply", lambda op, node, gain=None: apply(op, fast.Node(node.x), gain)
    ),
    "an operation's weight as the gain of its normalisation": lambda: mock.patch.object(
        fast, "normalise", lambda x, bn, gain: normalise(normalise(x, bn, None), None, gain)
    ),
    "backward passes of depthwise convolutions": lambda: mock.patch.multiple(
        depthwise,
        convolve=lambda x, weight, stride=1, dilation=1: depthwise.convolve_plainly(x, weight, stride, dilation),
        average=lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    ),
}
