"""The published networks for torch.hub, with random weights or those of a file.

    network = torch.hub.load(".", "ddsas_cifar10", source="local")                               # random weights
    network = torch.hub.load(".", "ddsas_cifar10", source="local", weights=".weights/cifar10.pt")
    network = torch.hub.load(".", "pdarts", source="local", dataset="imagenet", num_classes=12)
    logits, _ = network(images)                                   # (N, 3, H, W), normalised as data.py says

Networks come in evaluation mode on the CPU, without an auxiliary head. A file is a checkpoint or a run folder; it is
read as evaluate.py does: as data, never as code, and it must fit exactly.
"""

from __future__ import annotations

import argparse as _argparse

import engine as _engine
import evaluate as _evaluate
import genotypes as _genotypes
import model as _model
from lib import data as _data
from lib.cli import UserError as _UserError

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm"]  # what the imports above need


def ddsas_cifar10(weights: str | None = None, num_classes: int | None = None) -> _model.NetworkCIFAR:
    """DDSAS' cells found on CIFAR-10: 36 channels, 20 cells, 10 classes; for 32x32 images."""
    return _network("DDSAS_cifar10", "cifar10", 36, 20, weights, num_classes)


def ddsas_cifar100(weights: str | None = None, num_classes: int | None = None) -> _model.NetworkCIFAR:
    """DDSAS' cells found on CIFAR-100: 36 channels, 20 cells, 100 classes; for 32x32 images."""
    return _network("DDSAS_cifar100", "cifar100", 36, 20, weights, num_classes)


def ddsas_imagenet(weights: str | None = None, num_classes: int | None = None) -> _model.NetworkImageNet:
    """DDSAS' cells found on ImageNet: 46 channels, 14 cells, 1000 classes; for 224x224 images."""
    return _network("DDSAS_imagenet", "imagenet", 46, 14, weights, num_classes)


def pdarts(weights: str | None = None, num_classes: int | None = None, dataset: str = "cifar10") -> _model.Network:
    """P-DARTS' cells for dataset cifar10 or cifar100 (36 channels, 20 cells) or imagenet (48 channels, 14 cells)."""
    if dataset not in ("cifar10", "cifar100", "imagenet"):
        raise _UserError(f"dataset {dataset!r}: expected cifar10, cifar100 or imagenet")
    return _network("PDARTS", dataset, *((48, 14) if dataset == "imagenet" else (36, 20)), weights, num_classes)


def _network(
    arch: str, dataset: str, C: int, layers: int, weights: str | None, num_classes: int | None
) -> _model.Network:
    """The genotype's network. ``num_classes`` is by default that of the dataset, or of the file where there is one."""
    genotype, large = _genotypes.load(arch), dataset == "imagenet"
    if weights is None:
        classes = num_classes or _data.lookup(dataset).num_classes or 1000
        return _model.network_for(large, C, classes, layers, False, genotype).eval()
    checkpoint, network = _evaluate.load_network(
        _argparse.Namespace(model_path=str(weights), arch=arch, init_channels=C, layers=layers)
    )
    own, classes = checkpoint.get("genotype"), network.classifier.out_features
    if own is not None and _engine.load_genotype(str(own)) != genotype:  # cells of other pools have the same tensors
        raise _UserError(f"{weights}: checkpoint is of another genotype than {arch}")
    if large != isinstance(network, _model.NetworkImageNet):
        raise _UserError(f"{weights}: checkpoint has the network for {'small' if large else 'large'} images")
    if num_classes not in (None, classes):
        raise _UserError(f"{weights}: checkpoint has {classes} classes, you asked for {num_classes}")
    return network.eval()
