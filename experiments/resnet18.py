"""torchvision's ResNet-18 trained as retrain.py trains cells, as a reference that no search has found.

    python -m experiments.resnet18 --dataset folder --data FOLDER --image_size 32 --batch_size 32 --epochs 10 --cutout

Prints an epoch's loss and accuracy a line, and keeps nothing.
"""

from __future__ import annotations

import argparse
import time

import torch.nn.functional as F
import torchvision

import utils
from lib import cli, data


def main(args: argparse.Namespace) -> None:
    """Train it, and test it after each epoch."""
    device = utils.choose_device(args)
    utils.set_seed(args.seed)
    train, test, info = data.train_data(**cli.data_arguments(args, device))
    network = torchvision.models.resnet18(num_classes=info.num_classes).to(device)
    optimizer, started = utils.sgd(network, args), time.process_time()
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.3f} M parameters")
    for epoch in range(args.epochs):
        rate = utils.cosine_rate(epoch, args.epochs, args.learning_rate, args.learning_rate_min)
        utils.set_learning_rate(optimizer, rate)
        network.train()
        meter = utils.Average(device)
        for x, y in train.epoch(epoch, 0):
            logits = network(x)
            loss = F.cross_entropy(logits, y)
            utils.descend(loss, optimizer, args.grad_clip)
            meter.add(loss, logits, y)
        network.eval()
        tested, minutes = utils.measure_accuracy(network, test, device), (time.process_time() - started) / 60
        text = f"train loss {meter.read().loss:.4f}, test accuracy {tested.top1:.2f} %, {minutes:.1f} CPU minutes"
        print(f"epoch {epoch}: {text}", flush=True)


def get_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    cli.add_data_arguments(parser, list(data.INFO))
    cli.add_training_arguments(parser)
    cli.add_run_arguments(parser)
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
