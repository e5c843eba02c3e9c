"""State dicts of unknown origin: the size of the network that they are of, and a network with exactly these tensors."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lib.cli import UserError

MAX_CELLS = 1000
RUN_FILES = ("checkpoint.pt", "checkpoint.prev.pt", "best.pt")  # of a run folder: the last, the one before, the best


def find_checkpoint(path: str, best: bool = False) -> Path:
    """The checkpoint file that ``path`` names: itself, or of a run folder the last one, or the best one."""
    last, previous, chosen = (Path(path, name) for name in RUN_FILES)
    if not Path(path).is_dir():
        return Path(path)
    if not best and (last.exists() or previous.exists()):
        return last
    if not chosen.exists():
        raise UserError(f"{path} holds no checkpoint (checkpoint.pt or best.pt)")
    return chosen


def find_tensors(path: str, checkpoint: dict) -> dict[str, Tensor]:
    """The state dict in a checkpoint, or the checkpoint itself, without DataParallel's prefix; UserError: none."""
    tensors = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path}: no state dict in it; expected tensors by name, or {{state_dict: ...}}")
    return {str(name).removeprefix("module."): tensor for name, tensor in tensors.items()}


def measure(
    path: str, tensors: dict[str, Tensor], args: argparse.Namespace, cells: object = None
) -> tuple[bool, int, int, int, bool]:
    """(for large images, channels, classes, cells, with auxiliary head) of a network, as model.network_for takes them.

    UserError if it is none of ours, or not of the size that ``args`` ask for.

    ``cells`` is its number of cells where they may be without tensors, as in NAS-Bench-201's space.
    """

    def length(name: str) -> int:
        return len(tensors[name]) if name in tensors and tensors[name].ndim else 0

    large = "stem1.1.weight" in tensors
    channels = length("stem1.1.weight") if large else length("stem.0.weight") // (3 if cells is None else 1)
    most = MAX_CELLS
    if cells is None:
        cells = len({name.split(".")[1] for name in tensors if name.startswith("cells.")})
        most = len(tensors) / 10  # the inputs of a cell alone have so many
    classes = length("classifier.weight")
    if not (channels and classes and type(cells) is int and 0 < cells <= most):
        raise UserError(f"{path}: not a network of this family (stem, classifier or cells are not in it)")
    for name, found, asked in (("channels", channels, args.init_channels), ("cells", cells, args.layers)):
        if asked not in (None, found):
            raise UserError(f"{path}: checkpoint has {found} {name}, you asked for {asked}")
    return large, channels, classes, cells, any(name.startswith("auxiliary_head.") for name in tensors)


def find_saliency(checkpoint: dict, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Saliency times availability in DDSAS' checkpoint of a search, published or ours, by cell type; {}: not in it."""
    tables = {}
    try:
        space = checkpoint["method"]["space"] if "method" in checkpoint else None
        for kind in ("normal", "reduce"):
            if space is None:
                saliency, available = tensors[f"_op_saliency_{kind}"], tensors[f"_op_avail_{kind}"]
            else:
                saliency, available = space["saliency"][kind], space["available"][kind]
            tables[kind] = (saliency.double() * available.double()).numpy()
    except (AttributeError, KeyError, RuntimeError, TypeError):  # of another method, or of somebody's own making
        return {}
    return tables


def fill(path: str, tensors: dict[str, Tensor], make: Callable[[], nn.Module], arch: str) -> nn.Module:
    """The network that ``make`` makes, with exactly these tensors; UserError if they do not fit."""
    try:
        with torch.device("meta"):  # shapes first: nothing is allocated for a network that does not fit
            network = make()
    except RuntimeError:
        raise UserError(f"{path}: no network can have its numbers of channels and classes") from None
    expected = network.state_dict()
    counters = [name for name in expected if name.endswith("num_batches_tracked")]
    if not tensors.keys() & set(counters):  # files of old versions have none
        tensors = tensors | {name: torch.tensor(0) for name in counters}
    fault = f"{path} does not fit the network of {arch}, check --arch:"
    parts = []
    for what, names in (
        ("missing", [name for name in expected if name not in tensors]),
        ("unknown", [name for name in tensors if name not in expected]),
    ):
        if names:
            several = len(names) > 1
            parts.append(f"{len(names)} tensor{'s' * several} {what} ({names[0]}{', ...' * several})")
    if parts:
        raise UserError(f"{fault} {' and '.join(parts)}")
    for name, tensor in expected.items():
        have, want = list(tensors[name].shape), list(tensor.shape)
        if have != want:
            raise UserError(f"{fault} {name} has shape {have}, expected {want}")
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{path}: {name} is {tensors[name].dtype}, expected {tensor.dtype}")
    network.load_state_dict({name: tensors[name].to(t.dtype) for name, t in expected.items()}, assign=True)
    return network.to(memory_format=torch.channels_last)


def read_input(path: str, checkpoint: dict, classes: int) -> dict[str, tuple | None]:
    """``mean``, ``std`` and ``class_names`` of a checkpoint, None if it does not say them; UserError for nonsense."""
    own = {}
    for name, length, kind in (("mean", 3, float), ("std", 3, float), ("class_names", classes, str)):
        value = checkpoint.get(name) or None
        if value and not (isinstance(value, (list, tuple)) and [type(x) for x in value] == [kind] * length):
            raise UserError(f"{path}: {name} in it must be {length} values of kind {kind.__name__}")
        own[name] = value and tuple(value)
    mean, std, names = own.values()
    if bool(mean) != bool(std) or mean and not (np.isfinite(mean + std).all() and min(std) > 0):
        raise UserError(f"{path}: mean and std in it must be finite, and std above 0")
    if names and len(set(names)) < classes:
        raise UserError(f"{path}: class_names in it has a name twice")
    return own
