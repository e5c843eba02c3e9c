"""What a step asks of a GPU, said without one: launched kernels, bytes kept for the backward pass, peak memory.

A step runs on PyTorch's meta device, whose tensors have a size and no values: nothing is computed, and whatever needs a
value (.item(), bool(), .cpu()) raises. The modes below look at the operations on their way:

    with Memory() as memory, as_on_cuda():
        step = build()               # weights, optimizers
        step()                       # the optimizers' state is there from now on
        memory.peak = memory.now
        with Launches() as launches:
            step()
    memory.peak, launches.total

PyTorch's own MemTracker was tried: it puts hooks on modules, which fail where weights need no gradient, as in the
architecture step of a search. The prediction is that of the tensors (torch.cuda.max_memory_allocated). What the meta
device cannot see: CUDA's own memory (`CONTEXT`), the workspaces of cuDNN, and gaps between tensors, too small for the
next one (`SHARE`). Who says that something fits leaves room for them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch.optim.optimizer as optimizers
import torch.utils._foreach_utils as foreach_utils
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import data

Result = TypeVar("Result")

CONTEXT = 0.6e9  # bytes that CUDA, cuDNN and cuBLAS take on a GPU before the first tensor
SHARE = 0.9  # of the rest is for tensors; the others are cuDNN's workspaces and the gaps between tensors
BLOCK = 512  # bytes: the allocator of PyTorch gives multiples of it

# Operations that launch no kernel, besides the views
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal"}  # make the host wait for the device's values
VIEWS = {"detach", "_unsafe_view", "_reshape_alias", "lift_fresh"}  # older versions do not all call them views


def call(function: Any, args: tuple, kwargs: dict | None) -> Any:
    """function(*args, **kwargs); batch normalisation, which takes most of the time on the meta device, by its sizes."""
    aten = torch.ops.aten
    if function is aten.native_batch_norm.default and on_device(args[0]) and args[5]:
        x, channels = args[0], args[0].shape[1]
        return torch.empty_like(x), *(x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    if function is aten.native_batch_norm_backward.default and on_device(args[0]) and args[7]:
        grad, x, weight, *_, wanted = args
        parameters = (torch.empty_like(weight) if weight is not None and want else None for want in wanted[1:])
        return torch.empty_like(x) if wanted[0] else None, *parameters
    return function(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    """Counts the operations on a device's tensors that launch a kernel, by name: all but views and empty tensors.

    An operation on a list of tensors (foreach) counts once. ``copies`` are those from host to device;
    ``synchronisations`` those that wait for the device, which raise on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.copies = self.synchronisations = 0

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self.synchronisations += name in WAITING and any(map(on_device, tensors))
        result = call(function, args, kwargs)
        if not (function.is_view or name in EMPTY | VIEWS) and any(map(on_device, tree_leaves((args, kwargs, result)))):
            self.counts[name] += 1
            self.copies += name in ("_to_copy", "copy_") and any(t.is_cpu for t in tensors)
        return result


def on_device(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_cpu


class Memory(TorchDispatchMode):
    """Follows the storages of a device's tensors from first use to end: bytes ``now`` and at the ``peak``."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device, self.now, self.peak, self.seen = device, 0, 0, set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = call(function, args, kwargs)
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor) and value.device.type == self.device:
                self.add(value.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.seen.remove(key)
        self.now -= size


def kept_for_backward(forward: Callable[[], Result], network: nn.Module) -> tuple[Result, int]:
    """forward() and the bytes of the storages that it keeps for the backward pass, without those of the parameters."""
    sizes: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        sizes[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = forward()
    parameters = {p.untyped_storage()._cdata for p in network.parameters()}
    return result, sum(size for key, size in sizes.items() if key not in parameters)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Optimizers and clipping take lists of tensors (foreach) on the meta device too, which PyTorch does on CUDA."""
    name = "_get_foreach_kernels_supported_devices"
    with patch.object(foreach_utils, name, lambda: ["cuda", "meta"]), patch.object(optimizers, name, lambda: ["meta"]):
        yield


def bfloat16() -> AbstractContextManager:
    """What autocast to bfloat16 does on CUDA, as far as memory goes: there is no autocast on the meta device."""

    def computed_in(dtype: torch.dtype, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return lambda *args, **kwargs: function(*tree_map(cast, args), **tree_map(cast, kwargs))

    low = {name: computed_in(torch.bfloat16, getattr(F, name)) for name in ("conv2d", "linear")}
    return patch.multiple(F, **low, cross_entropy=computed_in(torch.float32, F.cross_entropy))


def recomputes() -> bool:
    """Whether this PyTorch computes checkpoints on the meta device (2.4 does not)."""
    try:
        checkpoint(torch.neg, torch.empty(1, device="meta", requires_grad=True), use_reentrant=False)
    except AttributeError:
        return False
    return True


class FirstSteps(data.Loader):
    """Batches as of a loader of ``images`` images, without their values; only the first ``steps`` of a long epoch."""

    def __init__(self, info: data.Info, images: int, options: data.Options, steps: int = 2) -> None:
        size = info.image_size
        pixels = torch.empty(images, size, size, 3, dtype=torch.uint8, device="meta")
        labels = torch.empty(images, dtype=torch.int64, device="meta")
        super().__init__(data.InMemory(pixels, labels, info, options), "images", options)
        self.steps = steps

    def __len__(self) -> int:
        return 1 << 40  # the last step, which ends in a report, is out of reach

    def epoch(self, epoch: int, start: int = 0) -> Iterator[data.Batch]:
        return islice(self.random(epoch, start), self.steps)


def largest_batch(free: float, batch_size: int, peak: int, state: int) -> int:
    """The largest batch that fits where ``free`` bytes are free, given peak and state of a step with ``batch_size``.

    Memory is state (weights, gradients, optimizers) plus a part that grows with the batch. 0 if nothing fits; from 16
    on a multiple of 8.
    """
    fits = max(0, int((SHARE * free - state) / (peak - state) * batch_size))
    return fits if fits < 16 else fits // 8 * 8
