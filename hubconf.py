"""The published networks for torch.hub, with random weights or those of a file; in evaluation mode, on the CPU.

    network = torch.hub.load(".", "ddsas_cifar10", source="local", weights=".weights/cifar10.pt")
    network = torch.hub.load(".", "pdarts", source="local", dataset="imagenet", num_classes=12)  # random weights
    logits, _ = network(images)                                    # (N, 3, H, W), normalised as lib/data.py says

A file is a checkpoint or a run folder; it is read as evaluate.py does: as data, and it must fit exactly.
"""

import argparse as _argparse

import evaluate as _evaluate
import genotypes as _genotypes
import model as _model
from lib.cli import UserError as _UserError

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm"]  # what the imports above need
_CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


def ddsas_cifar10(weights: str | None = None, num_classes: int | None = None) -> _model.NetworkCIFAR:
    """DDSAS' cells found on CIFAR-10: 36 channels, 20 cells, 10 classes; for 32x32 images."""
    return _build("DDSAS_cifar10", "cifar10", 36, 20, weights, num_classes)


def ddsas_cifar100(weights: str | None = None, num_classes: int | None = None) -> _model.NetworkCIFAR:
    """DDSAS' cells found on CIFAR-100: 36 channels, 20 cells, 100 classes; for 32x32 images."""
    return _build("DDSAS_cifar100", "cifar100", 36, 20, weights, num_classes)


def ddsas_imagenet(weights: str | None = None, num_classes: int | None = None) -> _model.NetworkImageNet:
    """DDSAS' cells found on ImageNet: 46 channels, 14 cells, 1000 classes; for 224x224 images."""
    return _build("DDSAS_imagenet", "imagenet", 46, 14, weights, num_classes)


def pdarts(weights: str | None = None, num_classes: int | None = None, dataset: str = "cifar10") -> _model.Network:
    """P-DARTS' cells for dataset cifar10 or cifar100 (36 channels, 20 cells) or imagenet (48 channels, 14 cells)."""
    if dataset not in _CLASSES:
        raise _UserError(f"dataset {dataset!r}: expected cifar10, cifar100 or imagenet")
    return _build("PDARTS", dataset, *((48, 14) if dataset == "imagenet" else (36, 20)), weights, num_classes)


def _build(arch, dataset, channels, layers, weights, num_classes) -> _model.Network:
    genotype, large = _genotypes.load(arch), dataset == "imagenet"
    if weights is None:
        return _model.network_for(large, channels, num_classes or _CLASSES[dataset], layers, False, genotype).eval()
    args = _argparse.Namespace(model_path=str(weights), arch=arch, init_channels=channels, layers=layers, best=False)
    checkpoint, network = _evaluate.load_network(args)
    found = _genotypes.parse(str(checkpoint.get("genotype", genotype)))  # cells of other pools have the same tensors
    if found != genotype or isinstance(network, _model.NetworkImageNet) != large:
        raise _UserError(f"{weights}: checkpoint is of another genotype than {arch}, or for images of another size")
    if num_classes not in (None, classes := network.classifier.out_features):
        raise _UserError(f"{weights}: checkpoint has {classes} classes, you asked for {num_classes}")
    return network.eval()
