"""What a reader of DARTS expects in utils.py: meters, seeds, devices, schedules."""

from __future__ import annotations

import argparse
import os
import random
from typing import NamedTuple

import numpy as np
import torch

from lib.cli import UserError
from lib.distributed import is_main, reduce_sum


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that --device and --gpu name; under torchrun every process takes the GPU of its local rank.

    --device cpu counts more than --gpu, so that it can be put behind any command.
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
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def cuda_settings(tf32: bool) -> None:
    """How a GPU computes; without effect on a CPU. Once, before the first step.

    cuDNN tries its algorithms when it meets a new shape and keeps the fastest. ``tf32``: convolutions and matrix
    products of float32 on tensor cores (Ampere and later), which read 10 bits of each number's fraction instead of 23.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


def set_seed(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """The state of the global generators, as plain values and tensors that weights_only loading accepts."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None  # of the device that this process uses
    state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    return state | {"torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict) -> None:
    """Restore what rng_state() returned; a GPU's state only where there is a GPU."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


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

    def add(self, loss: torch.Tensor, logits: torch.Tensor, y: torch.Tensor) -> None:
        """Add a batch: its mean loss, logits (N, classes), labels (N)."""
        self.has_top5 = logits.shape[1] > 5
        hits = logits.detach().topk(5 if self.has_top5 else 1).indices.eq(y[:, None])
        batch = [loss.detach() * len(y), hits[:, 0].sum(), hits.sum(), torch.full_like(self.sums[3], len(y))]
        self.sums += torch.stack([value.double() for value in batch])

    def state(self) -> torch.Tensor:
        """The sums over all ranks, for a checkpoint (a collective under torchrun)."""
        return reduce_sum(self.sums.clone())

    def load(self, sums: torch.Tensor) -> None:
        """Go on from what state() returned; rank 0 holds it alone, so that it counts once."""
        self.sums.copy_(sums if is_main() else torch.zeros_like(sums))

    def read(self) -> Metrics:
        """The means so far, over all ranks (a collective under torchrun)."""
        loss, top1, top5, count = self.state().tolist()
        n = max(count, 1)
        return Metrics(loss / n, 100 * top1 / n, 100 * top5 / n if self.has_top5 else None, int(count))
