"""torchvision's ResNet-18 trained by retrain.py's own loop, as a reference that no search has found.

python -m experiments.resnet18 --dataset folder --data FOLDER --image_size 32 --epochs 10     # flags of retrain.py
"""

from __future__ import annotations

import argparse

import torchvision
from torch import Tensor, nn

import retrain
from lib import cli, data


class ResNet18(nn.Module):
    """The network with what the training loop asks for: a second output that is not there, and drop path, not used."""

    init_channels, drop_path_prob = 64, 0.0

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = torchvision.models.resnet18(num_classes=num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.network(x), None


def build_network(args: argparse.Namespace, genotype: object, info: data.Info) -> ResNet18:
    """In the place of the network of --arch."""
    return ResNet18(info.num_classes)


if __name__ == "__main__":
    retrain.build_network = build_network
    cli.run_script(retrain.main, retrain.get_parser())
