"""State dicts of unknown origin: the size of the network that they are of, and a network with exactly these tensors."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lib.cli import UserError

MAX_CELLS = 1000

RUN_FILES = ("checkpoint.pt", "checkpoint.prev.pt", "best.pt")  # of a run folder: the last, the one before, the best


def find_checkpoint(path: str, best: bool = False) -> Path:
    """The checkpoint file that ``path`` names: itself, or of a run folder the last one, or the best one."""
    if not Path(path).is_dir():
        return Path(path)
    files = [Path(path) / name for name in RUN_FILES]
    there = [file.exists() for file in files]
    if best and not there[2] or not any(there):
        raise UserError(f"{path} holds no checkpoint (checkpoint.pt or best.pt)")
    return files[2 if best or not any(there[:2]) else 0]


class Size(NamedTuple):
    """The size of a discovered network; ``large``: it is for large images."""

    large: bool
    channels: int
    classes: int
    cells: int
    auxiliary: bool


def find_tensors(path: str, checkpoint: dict) -> dict[str, Tensor]:
    """The state dict in a checkpoint, or the checkpoint itself, without DataParallel's prefix; UserError: none."""
    weights = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    if not isinstance(weights, dict) or not weights or not all(isinstance(t, Tensor) for t in weights.values()):
        raise UserError(f"{path}: no state dict in it; expected tensors by name, or {{state_dict: ...}}")
    weights = {str(name): tensor for name, tensor in weights.items()}
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return weights


def measure(path: str, weights: dict[str, Tensor], channels: int | None, cells: int | None) -> Size:
    """The size of a network of the DARTS family; UserError if it is none, or not of the size that is asked for.

    Width, depth and classes are read off several tensors, so that the message for a single bad one names that one.
    """
    large = any(name.startswith("stem1.") for name in weights)
    stem = first_size(t for name, t in weights.items() if name.startswith("stem1." if large else "stem."))
    heads = [f"{head}classifier.{kind}" for head in ("", "auxiliary_head.") for kind in ("bias", "weight")]
    classes = first_size(weights[name] for name in heads if name in weights)
    numbers = {int(m[1]) for m in map(re.compile(r"cells\.(\d{1,4})\.").match, weights) if m}
    size = Size(
        large,
        stem if large else stem // 3,
        classes,
        next(number for number in itertools.count() if number not in numbers),
        any(name.startswith("auxiliary_head.") for name in weights),
    )
    if not (size.channels and classes and size.cells):
        raise UserError(f"{path}: not a network of this family (no stem, cells.0 or classifier in it)")
    if size.cells > len(weights) / 10:  # of the inputs of a cell alone
        raise UserError(f"{path}: {len(weights)} tensors are not enough for the {size.cells} cells that they name")
    for name, asked in (("channels", channels), ("cells", cells)):
        if asked not in (None, getattr(size, name)):
            raise UserError(f"{path}: checkpoint has {getattr(size, name)} {name}, you asked for {asked}")
    return size


def measure_nasbench201(path: str, weights: dict[str, Tensor], cells: object) -> Size:
    """The size of a network of NAS-Bench-201's space, whose cells may have no tensors: ``cells`` has to be known."""
    channels, classes = (
        first_size(t for name, t in weights.items() if name.startswith(part)) for part in ("stem.", "classifier.")
    )
    if not (channels and classes and type(cells) is int and 0 < cells <= MAX_CELLS):
        raise UserError(f"{path}: not a network of NAS-Bench-201's space")
    return Size(False, channels, classes, cells, False)


OPERATION = re.compile(r"cells\.\d+\._ops\.\d+\._ops\.(\d{1,3})\.(.+)")  # (column, tensor) of a supernet


def find_columns(tensors: dict[str, Tensor]) -> dict[int, set[tuple[str, torch.Size]]]:
    """Of a supernet: (name, size of the kernel) of the tensors of each candidate operation, over all edges."""
    columns: dict[int, set] = {}
    for match, tensor in ((OPERATION.match(name), tensor) for name, tensor in tensors.items()):
        if match:
            columns.setdefault(int(match[1]), set()).add((match[2], tensor.shape[2:]))
    return columns


def find_saliency(checkpoint: dict, tensors: dict[str, Tensor]) -> list[np.ndarray]:
    """Saliency times availability in DDSAS' checkpoint of a search, of the normal and the reduction cell; else []."""
    method, tables = checkpoint.get("method"), []
    space = method.get("space") if isinstance(method, dict) else checkpoint.get("space")
    for kind in ("normal", "reduce"):
        pair = [tensors.get(f"_op_{name}_{kind}") for name in ("saliency", "avail")]  # published
        if isinstance(space, dict):  # ours
            pair = [space[name].get(kind) for name in ("saliency", "available") if isinstance(space.get(name), dict)]
        if len(pair) < 2 or not all(isinstance(t, Tensor) and t.isfinite().all() for t in pair):
            return []
        if pair[0].shape != pair[1].shape:
            return []
        tables.append((pair[0].double() * pair[1].double()).numpy())
    return tables


def first_size(tensors: Iterable[Tensor]) -> int:
    """The commonest first dimension of tensors; 0 if there are none. Those without data can claim any size."""
    return statistics.mode([len(t) for t in tensors if t.ndim and t.numel()] or [0])


def fill(path: str, weights: dict[str, Tensor], make: Callable[[], nn.Module], arch: str) -> nn.Module:
    """The network that ``make`` makes, with exactly these weights; UserError if they do not fit."""
    try:
        with torch.device("meta"):  # shapes first: nothing is allocated for a network that does not fit
            network = make()
    except RuntimeError:
        raise UserError(f"{path}: no network can have its numbers of channels and classes") from None
    expected = network.state_dict()
    if not any(name.endswith("num_batches_tracked") for name in weights):  # files of old versions have no counters
        weights = weights | {name: torch.tensor(0) for name in expected if name.endswith("num_batches_tracked")}
    check_tensors(path, weights, expected, arch)
    weights = {name: tensor.to(expected[name].dtype) for name, tensor in weights.items()}
    network.load_state_dict(weights, strict=True, assign=True)
    return network.to(memory_format=torch.channels_last)


def check_tensors(path: str, weights: dict[str, Tensor], expected: dict[str, Tensor], arch: str) -> None:
    """UserError unless the tensors are those expected, by name, shape and kind."""
    fault = f"{path} does not fit the network of {arch}, check --arch:"
    parts = []
    for what, names in (("missing", expected.keys() - weights.keys()), ("unknown", weights.keys() - expected.keys())):
        if names:
            first = next(name for name in (*expected, *weights) if name in names)
            several = len(names) > 1
            parts.append(f"{len(names)} tensor{'s' * several} {what} ({first}{', ...' * several})")
    if parts:
        raise UserError(f"{fault} {' and '.join(parts)}")
    for name, tensor in expected.items():
        have, want = list(weights[name].shape), list(tensor.shape)
        if have != want:
            raise UserError(f"{fault} {name} has shape {have}, expected {want}")
        if weights[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{path}: {name} is {weights[name].dtype}, expected {tensor.dtype}")


def read_input(path: str, checkpoint: dict, classes: int) -> dict[str, tuple | None]:
    """``mean``, ``std`` and ``class_names`` of a checkpoint, None if it does not say them; UserError for nonsense."""
    own = {}
    for name, length, kind in (("mean", 3, float), ("std", 3, float), ("class_names", classes, str)):
        value = checkpoint.get(name) or None
        own[name] = tuple(value) if isinstance(value, (list, tuple)) else value
        if value and not (isinstance(own[name], tuple) and [type(x) for x in value] == [kind] * length):
            raise UserError(f"{path}: {name} in it must be {length} values of kind {kind.__name__}")
    mean, std, names = own.values()
    if bool(mean) != bool(std) or mean and not (all(map(math.isfinite, mean + std)) and min(std) > 0):
        raise UserError(f"{path}: mean and std in it must be finite, and std above 0")
    if names and len(set(names)) < classes:
        raise UserError(f"{path}: class_names in it has a name twice")
    return own
