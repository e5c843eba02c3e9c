"""The processes of torchrun, and the devices that they compute on."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

try:
    import resource
except ImportError:  # Windows: peak memory is not known
    resource = None

# What gloo and NCCL say when another process is gone; their errors are plain RuntimeErrors.
COMMUNICATION = ("gloo", "NCCL", "Connection ", "Timed out", "timed out", "Socket", "peer")
TIMEOUT = timedelta(seconds=60)  # a collective that waits longer than this for a lost rank ends the run


class RankLost(Exception):
    """Another process of the run is gone. Exit code 1."""


class Diverged(Exception):
    """A loss, gradient or weight is not finite, or the ranks differ; the message says where. Exit code 1."""


def start_distributed(device: torch.device) -> None:
    """Join the processes of torchrun (nccl on cuda, gloo on cpu), if there are any."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)


def leave_distributed() -> None:
    """Leave what start_distributed joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes that work together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """True for rank 0, the one process that writes files and prints."""
    return os.environ.get("RANK", "0") == "0"


def together(collective: Callable, *args: Any) -> Any:
    """Call a collective of torch.distributed, or what contains one; RankLost if another rank does not answer.

    Any other error, of the network inside the collective say, is passed on as it is.
    """
    try:
        return collective(*args)
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(word in str(error) for word in COMMUNICATION)
        if world_size() == 1 or not lost:
            raise
        reason = " ".join(str(error).split())[:150]
        raise RankLost(f"lost another process of this run; --resume goes on from its checkpoint ({reason})") from None


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    if world_size() > 1:
        together(dist.all_reduce, tensor)
    return tensor


def average_gradients(params: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradients that exist by their mean over the ranks.

    Only active operations have a gradient, and these are the same on every rank.
    """
    grads = [param.grad for param in params if param.grad is not None]
    _in_one_call(grads, lambda flat: reduce_sum(flat).div_(world_size()))


def share_buffers(network: torch.nn.Module) -> None:
    """Give all ranks the buffers of rank 0: each rank's BatchNorm has statistics of its own images."""
    _in_one_call(list(network.buffers()), lambda flat: together(dist.broadcast, flat, 0))


def _in_one_call(tensors: list[torch.Tensor], collective: Callable[[torch.Tensor], Any]) -> None:
    """Change tensors by an in-place collective that sees all of one dtype as one flat tensor: one call per dtype."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str) if world_size() > 1 else ():
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        collective(flat)
        parts = zip(group, flat.split([tensor.numel() for tensor in group]), strict=True)
        torch._foreach_copy_(group, [part.view(tensor.shape) for tensor, part in parts])


def assert_same(named: dict[str, Any]) -> None:
    """Diverged, with the names, if tensors or arrays are not bit-identical on all ranks. Once per epoch is cheap."""
    if world_size() == 1:
        return
    arrays = {name: torch.as_tensor(value).detach().cpu().numpy() for name, value in named.items()}
    mine = {name: hashlib.sha256(str(a.shape).encode() + a.tobytes()).hexdigest() for name, a in arrays.items()}
    everyone: list[Any] = [None] * world_size()
    together(dist.all_gather_object, everyone, mine)
    if different := sorted(name for name in mine if any(other.get(name) != mine[name] for other in everyone)):
        raise Diverged(f"the ranks no longer agree on {', '.join(different)}")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device; to a GPU from pinned memory, so that nothing waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def peak_memory_mb() -> float:
    """Peak memory in MB: of the tensors on the GPU where one is used, otherwise of the process; NaN where not known."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
