"""Train a genotype's network from scratch and test it after every epoch.

    python retrain.py --dataset cifar10 --arch DDSAS_cifar10 --auxiliary --cutout   # the published settings, 600 epochs
    python retrain.py --dataset fashion_mini --arch logs/SEARCH_RUN --epochs 10     # what a search has found
    python retrain.py --dataset folder --data path/to/images --arch DDSAS_cifar10
    python retrain.py --resume logs/NAME
    torchrun --nproc_per_node 8 retrain.py --dataset imagenet --data .data/imagenet --mobile

--arch takes a name in genotypes.py, a genotype.txt, a run folder, or a literal Genotype(...). The run folder keeps the
last checkpoint (checkpoint.pt) and the best one by test accuracy (best.pt), which the test images have chosen.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fast
import genotypes
import model
import utils
from genotypes import Genotype
from lib import cli, data
from lib.cli import UserError
from lib.distributed import share_buffers
from lib.runs import Run
from utils import Average

SCHEDULES = {"cosine": utils.cosine_rate, "linear": utils.linear_rate}


def main(args: argparse.Namespace) -> Path:
    """Train the network that the arguments describe; returns the run folder."""
    device = utils.choose_device(args)
    run = Run(args, "retrain.py", f"retrain-{args.dataset}")
    genotype = load_genotype(args, run)
    utils.set_seed(args.seed)
    utils.allow_tf32(args.tf32)
    train, test, info = data.train_data(**cli.data_arguments(args, device))
    if args.train_portion < 1:
        train = part_of(train, args.train_portion)
    network = build_network(args, genotype, info).to(device)
    optimizer = utils.sgd(network, args)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smooth)
    meter, best = Average(device), Best()
    kept = {"state_dict": network, "optimizer": optimizer, "meter": meter, "best": best}
    run.keep(kept, describe(args, network, genotype, info))
    fast.use_depthwise(network, run.log)
    run.write("genotype.txt", str(genotype))
    run.log(f"{args.dataset}: {train.num_images} training images, {test.num_images} test images; {device}")
    run.log(f"{genotype}")
    parameters, multiply_adds = model.count_parameters(network), model.count_multiply_adds(network, info.image_size)
    size = f"{parameters / 1e6:.3f} M parameters, {multiply_adds / 1e6:.1f} M multiply-adds"
    run.log(f"{network.init_channels} channels, {args.layers} cells, {size}")

    for epoch in range(run.epoch, args.epochs):
        rate = SCHEDULES[args.lr_scheduler](epoch, args.epochs, args.learning_rate, args.learning_rate_min)
        utils.set_learning_rate(optimizer, utils.warmed_up(rate, epoch, args))
        network.drop_path_prob = args.drop_path_prob * epoch / args.epochs
        train_one_epoch(run, train, network, optimizer, criterion, meter)

        share_buffers(network)
        network.eval()
        with utils.autocast(args, device):
            tested = utils.measure_accuracy(lambda x: network(x)[0], test, device)
        trained = meter.read()
        meter.reset()
        is_best = best.update(tested.top1)
        run.log(
            f"epoch {epoch}: train loss {trained.loss:.4f}, accuracy {trained.top1:.2f} %;"
            f" test loss {tested.loss:.4f}, accuracy {tested.top1:.2f} %, best {best.top1:.2f} %"
        )
        line = {
            "epoch": epoch,
            "lr": optimizer.param_groups[0]["lr"],
            "drop_path": network.drop_path_prob,
            "train_loss": trained.loss,
            "train_acc": trained.top1,
            "test_loss": tested.loss,
            "test_acc": tested.top1,
            "test_acc_top5": tested.top5,
            "best_acc": best.top1,
        }
        run.end_epoch(line, best=is_best)

    run.log(f"test it with: {evaluate_command(args, run.folder)}")
    run.close()
    return run.folder


def train_one_epoch(
    run: Run,
    train: data.Loader,
    network: model.Network,
    optimizer: torch.optim.Optimizer,
    criterion: nn.Module,
    meter: Average,
) -> None:
    """One epoch over the training images, from run.step on. The auxiliary head helps; its loss is not reported."""
    args = run.args
    network.train()
    for x, y in run.steps(train):
        with utils.autocast(args, x.device):
            logits, auxiliary_logits = network(x)
            loss = objective = criterion(logits, y)
            if auxiliary_logits is not None:
                objective = loss + args.auxiliary_weight * criterion(auxiliary_logits, y)
        norm = utils.descend(objective, optimizer, args.grad_clip)
        meter.add(loss, logits, y)
        run.after_step(meter, loss, norm)


class Best:
    """The highest test accuracy so far, in percent."""

    def __init__(self) -> None:
        self.top1 = -1.0

    def update(self, top1: float) -> bool:
        """Whether this one is strictly higher than all before."""
        higher, self.top1 = top1 > self.top1, max(top1, self.top1)
        return higher

    def state_dict(self) -> dict:
        return {"top1": self.top1}

    def load_state_dict(self, state: dict) -> None:
        self.top1 = state["top1"]


def load_genotype(args: argparse.Namespace, run: Run) -> Genotype:
    """The genotype of --arch; of a resumed run the one that it began with, since files and names change."""
    own = run.folder / "genotype.txt"
    genotype = genotypes.load(own if run.resumed and own.exists() else args.arch)
    if not isinstance(genotype, Genotype) and not run.resumed:  # NAS-Bench-201's published size
        vars(args).update({k: v for k, v in (("init_channels", 16), ("layers", 5)) if k not in args.given})
    return genotype


def build_network(args: argparse.Namespace, genotype: Genotype, info: data.Info) -> model.Network:
    """The genotype's network for images of this size."""
    large = utils.stem_for(info, args.dataset, args.init_channels) == "imagenet"
    channels = args.init_channels
    if args.mobile:
        if not large:
            raise UserError(f"--mobile is for large images, {args.dataset} has {info.image_size} pixels: leave it out")
        channels = model.mobile_channels(genotype, args.layers, info.num_classes)
    size = channels, info.num_classes, args.layers
    network = model.network_for(large, *size, args.auxiliary, genotype, has_second_bn(args, genotype))
    network.init_channels = channels
    return network


def has_second_bn(args: argparse.Namespace, genotype: Genotype) -> bool:
    """Whether the auxiliary head for large images has a second BatchNorm: P-DARTS' released ones have, DDSAS' have not.

    --auxiliary_second_bn says it, otherwise the genotype if it is one of theirs, otherwise the script: for a cell of
    one's own retrain.py builds DDSAS' head and train_imagenet.py P-DARTS'.
    """
    if args.auxiliary_second_bn is not None:
        return args.auxiliary_second_bn
    of_ddsas = genotypes.DDSAS_cifar10, genotypes.DDSAS_cifar100, genotypes.DDSAS_imagenet
    return genotype == genotypes.PDARTS or args.pdarts and genotype not in of_ddsas


def describe(args: argparse.Namespace, network: model.Network, genotype: Genotype, info: data.Info) -> dict:
    """What a checkpoint says of itself, so that it can be used alone."""
    return {
        "genotype": str(genotype),
        "network": type(network).__name__,
        "init_channels": network.init_channels,
        "layers": args.layers,
        "num_classes": info.num_classes,
        "image_size": info.image_size,
        "dataset": args.dataset,
        "class_names": list(info.class_names),
        "mean": list(info.mean),
        "std": list(info.std),
        "data_hash": info.data_hash,
    }


def part_of(train: data.Loader, portion: float) -> data.Loader:
    """A loader of this portion of the training images, the same for every seed: a study at a fraction of the cost."""
    order = np.random.default_rng(0).permutation(train.num_images)
    images = train.images.take(order[: round(portion * train.num_images)])
    return data.Loader(images, "training images", train.options)


def evaluate_command(args: argparse.Namespace, folder: Path) -> str:
    """The command that tests what was trained, complete."""
    words = ["python", "evaluate.py", "--dataset", args.dataset]
    words += ["--data", args.data] if args.data != ".data" else []
    words += ["--image_size", str(args.image_size)] if args.image_size else []
    return shlex.join([*words, "--model_path", str(folder)])


# ---- arguments ------------------------------------------------------------------------------------------------------


def get_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add = parser.flags("genotype and regularisation")
    add("--arch", str, "DDSAS_cifar10", "name, genotype.txt, run folder or Genotype(...)")
    add("--mobile", bool, False, "the most channels with less than 600 M multiply-adds at 224x224 (ImageNet)")
    add("--auxiliary", bool, False, "auxiliary head behind cell 2*layers//3")
    add("--auxiliary_weight", cli.RATE, 0.4, "of its loss")
    text = "ImageNet head as P-DARTS has it (default: as the genotype's authors, else as the script's)"
    parser.add_argument("--auxiliary_second_bn", action=argparse.BooleanOptionalAction, help=text)
    add("--drop_path_prob", cli.PROBABILITY, 0.2, "at the last epoch")
    add("--label_smooth", cli.PROBABILITY, 0.0, "label smoothing")
    add("--lr_scheduler", list(SCHEDULES), "cosine", "how the rate falls over the epochs")
    add("--train_portion", cli.SHARE, 1.0, "of the training images, the same ones for every seed")
    cli.add_data_arguments(parser, list(data.INFO))
    cli.add_training_arguments(parser)
    cli.add_run_arguments(parser)
    parser.ignore("--model_path", "--auto_aug", "--local_rank", "--local-rank")  # of the published scripts
    parser.set_defaults(init_channels=36, layers=20, batch_size=96, epochs=600, pdarts=False)
    parser.set_defaults_for("dataset", "imagenet", **utils.IMAGENET_RETRAINING)
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
