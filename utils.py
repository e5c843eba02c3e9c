"""What a reader of DARTS expects in utils.py: meters, seeds, devices, schedules, one step of SGD."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.cli import UserError
from lib.distributed import average_gradients, is_main, reduce_sum, start_distributed, together, world_size

# ---- device, processes, seed -----------------------------------------------------------------------------------------


def choose_device(args: argparse.Namespace) -> torch.device:
    """The device that --device and --gpu name; under torchrun every process takes the GPU of its local rank.

    --device cpu counts more than --gpu, so that it can be put behind any command. UserError if it cannot be used.
    """
    name = args.device if args.gpu is None or args.device == "cpu" else f"cuda:{args.gpu}"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and not 0 <= (device.index or 0) < (count := torch.cuda.device_count()):
            raise UserError(f"{name} is not there: {count} GPUs found; --device cpu works everywhere")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); --device cpu works") from None
    if args.amp and device.type != "cuda":
        raise UserError("--amp needs a CUDA device: on the CPU leave it out")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    start_distributed(device)
    return device


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU computes float32 as TF32 (--tf32); cuDNN keeps the fastest algorithm of each new shape."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def set_seed(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def autocast(args: argparse.Namespace, device: torch.device) -> AbstractContextManager:
    """bfloat16 arithmetic on CUDA where --amp asks for it, float32 otherwise."""
    return torch.autocast(device.type, torch.bfloat16) if args.amp else nullcontext()


def stem_for(info: Any, dataset: str, init_channels: int = 2) -> str:
    """ "imagenet", a stem of stride 8, from 96 pixels on and for ImageNet, "cifar" for smaller images."""
    large = dataset == "imagenet" or info.image_size >= 96
    multiple = 32 if large else 4
    if info.image_size % multiple:
        raise UserError(f"--image_size {info.image_size}: must be a multiple of {multiple}, the network halves it")
    if large and init_channels % 2:
        raise UserError(f"--init_channels {init_channels}: must be even for images of {info.image_size} pixels")
    return "imagenet" if large else "cifar"


# ---- meters ----------------------------------------------------------------------------------------------------------


class Metrics(NamedTuple):
    """Means over the images: loss, accuracies in percent (top5 is None for up to 5 classes); number of images."""

    loss: float
    top1: float
    top5: float | None
    count: int


class Average:
    """Running loss and accuracy. The sums stay on the device; only read() waits for it."""

    def __init__(self, device: torch.device | str) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
        self.has_top5 = True

    def add(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """Add a batch: its mean loss, logits (N, classes), labels (N)."""
        self.has_top5 = logits.shape[1] > 5
        hits = logits.detach().topk(5 if self.has_top5 else 1).indices.eq(y[:, None])
        batch = [loss.detach() * len(y), hits[:, 0].sum(), hits.sum(), torch.full_like(self.sums[3], len(y))]
        self.sums += torch.stack([value.double() for value in batch])

    def read(self) -> Metrics:
        """The means so far, over all ranks (a collective under torchrun)."""
        loss, top1, top5, count = reduce_sum(self.sums.clone()).tolist()
        n = max(count, 1)
        return Metrics(loss / n, 100 * top1 / n, 100 * top5 / n if self.has_top5 else None, int(count))

    def reset(self) -> None:
        """Begin again, for the next epoch."""
        self.sums.zero_()

    def state_dict(self) -> dict:
        """The sums over all ranks (a collective under torchrun)."""
        return {"sums": reduce_sum(self.sums.clone())}

    def load_state_dict(self, state: dict) -> None:
        """Go on from state_dict(); rank 0 holds the sums alone, so that they count once."""
        self.sums.copy_(state["sums"] if is_main() else torch.zeros_like(self.sums))


@torch.no_grad()
def measure_accuracy(forward: Callable[[Tensor], Tensor], loader: Any, device: torch.device) -> Metrics:
    """Loss and accuracy of ``forward(x)`` (logits) over the loader's images, each once, not augmented."""
    average = Average(device)
    for x, y in loader.in_order():
        logits = forward(x)
        average.add(F.cross_entropy(logits, y), logits, y)
    return average.read()


# ---- schedules, optimizer --------------------------------------------------------------------------------------------

# What the papers set otherwise on ImageNet: DDSAS' search and retraining (its sections 4 and 5), P-DARTS' retraining.
IMAGENET_SEARCH = {
    "space_config": "imagenet",
    "batch_size": 512,
    "epochs": 60,
    "learning_rate": 0.5,
    "learning_rate_min": 0.0,
    "warmup_epochs": 5,
    "arch_learning_rate": 6e-3,
    "arch_grad_clip": 5.0,
    "seed": 2,
}
IMAGENET_RETRAINING = {
    "arch": "DDSAS_imagenet",
    "init_channels": 46,
    "layers": 14,
    "batch_size": 1024,
    "epochs": 250,
    "learning_rate": 0.5,
    "weight_decay": 3e-5,
    "lr_scheduler": "linear",
    "warmup_epochs": 5,
    "label_smooth": 0.1,
    "drop_path_prob": 0.0,
}
PDARTS_IMAGENET = IMAGENET_RETRAINING | {"arch": "PDARTS", "init_channels": 48, "batch_size": 256, "learning_rate": 0.1}


def cosine_rate(epoch: int, epochs: int, first: float, last: float) -> float:
    """Cosine from ``first`` at epoch 0 towards ``last`` at ``epochs`` (SGDR, ICLR 2017, equation 5)."""
    return last + (first - last) * (1 + np.cos(np.pi * epoch / epochs)) / 2


def linear_rate(epoch: int, epochs: int, first: float, last: float = 0.0) -> float:
    """The linear schedule of the ImageNet runs: to first/(E-5) at E-5 epochs, then to 0 in five small steps.

    Runs of up to five epochs, which try things out, fall in a straight line.
    """
    left = epochs - epoch
    if epochs <= 5:
        return first * left / epochs
    return first * (left - 5) / (epochs - 5) if left > 5 else first * left / ((epochs - 5) * 5)


def warmed_up(rate: float, epoch: int, args: argparse.Namespace) -> float:
    """rate * (epoch + 1) / warmup_epochs in the first epochs, with batches of more than 256 over all processes."""
    ramp = epoch < args.warmup_epochs and args.batch_size * world_size() > 256
    return rate * (epoch + 1) / args.warmup_epochs if ramp else rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of all that the optimizer trains."""
    for group in optimizer.param_groups:
        group["lr"] = float(rate)


def sgd(network: nn.Module, args: argparse.Namespace) -> torch.optim.SGD:
    """The optimizer of the network's weights."""
    return torch.optim.SGD(network.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, grad_clip: float, keep_zeros: bool = False) -> Tensor:
    """Backpropagate, clip the gradient to norm ``grad_clip`` (0: not), step; returns the norm before clipping.

    What has no gradient, as operations that were not active, stays as it is; with ``keep_zeros`` (--decay_inactive) it
    has a gradient of zero as soon as it had one at all, and decays, as under PyTorch 1.4.
    """
    optimizer.zero_grad(set_to_none=not keep_zeros)
    together(loss.backward)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, grad_clip or float("inf"))
    optimizer.step()
    return norm
