"""Train a genotype's network from scratch and test it after every epoch.

    python retrain.py --dataset cifar10 --arch DDSAS_cifar10 --auxiliary --cutout   # the published settings, 600 epochs
    python retrain.py --dataset fashion_mini --arch logs/SEARCH_RUN --epochs 10     # what a search has found
    python retrain.py --dataset folder --data path/to/images --arch DDSAS_cifar10
    python retrain.py --resume logs/NAME
    torchrun --nproc_per_node 8 retrain.py --dataset imagenet --data .data/imagenet --arch DDSAS_imagenet --mobile

--arch takes a name in genotypes.py, a genotype.txt, a run folder, or a literal Genotype(...). The run folder keeps the
last checkpoint (checkpoint.pt) and the best one by test accuracy (best.pt).
"""

from __future__ import annotations

import argparse
import shlex
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import engine
import genotypes
import model
import utils
from engine import Training
from genotypes import Genotype
from lib import cli, data, distributed
from lib.cli import UserError, number
from lib.runs import create_run, resume_run
from nasbench201 import Architecture

SCHEDULES = {"cosine": engine.cosine_rate, "linear": engine.linear_rate}


def main(args: argparse.Namespace) -> Path:
    """Train the network that the arguments describe; returns the run folder."""
    device = utils.device_of(args)
    distributed.start_distributed(device)
    resumed = resume_run(args, "retrain.py")
    own = resumed and resumed.folder / "genotype.txt"  # what --arch was when the run began: files and names change
    genotype = engine.load_genotype(str(own if own and own.exists() else args.arch))
    if isinstance(genotype, Architecture) and not resumed:  # NAS-Bench-201's published size
        vars(args).update({k: v for k, v in (("init_channels", 16), ("layers", 5)) if k not in args.given})
    engine.check_common(args, device)
    utils.set_seed(args.seed)
    utils.cuda_settings(args.tf32)
    train, test, info = data.train_data(**engine.data_arguments(args, device))
    if args.train_portion < 1:
        train = part_of(train, args.train_portion)
    retraining = Retraining(args, genotype, info, test, device)
    run = resumed or create_run(args, "retrain.py", f"retrain-{args.dataset}")
    retraining.restore(run)
    run.genotype(str(genotype))
    run.log(f"{args.dataset}: {train.num_images} training images, {test.num_images} test images; {device}")
    run.log(f"{genotype}")
    run.log(
        f"{retraining.init_channels} channels, {args.layers} cells,"
        f" {model.count_parameters(retraining.network) / 1e6:.3f} M parameters,"
        f" {model.count_multiply_adds(retraining.network, info.image_size) / 1e6:.1f} M multiply-adds"
    )
    retraining.fit(args.epochs, train, run)
    run.log(f"best test accuracy {retraining.best_acc_top1:.2f} %")
    run.log(f"test it with: {evaluate_command(args, run.folder)}")
    run.close()
    return run.folder


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


class Retraining(Training):
    """A discovered network and its optimizer."""

    def __init__(
        self,
        args: argparse.Namespace,
        genotype: Genotype,
        info: data.Info,
        test: data.Loader | None,
        device: torch.device,
    ) -> None:
        super().__init__(args, device)
        self.genotype, self.info, self.test = genotype, info, test
        large = engine.stem_for(info, args.dataset) == "imagenet"
        self.init_channels = args.init_channels
        if args.mobile:
            if not large:
                raise UserError(
                    f"--mobile is for large images, {args.dataset} has {info.image_size} pixels: leave it out"
                )
            self.init_channels = model.mobile_channels(genotype, args.layers, info.num_classes)
        size = self.init_channels, info.num_classes, args.layers
        network = model.network_for(large, *size, args.auxiliary, genotype, second_bn(args, genotype))
        self.network = engine.placed(network, args, device)
        self.parallel: nn.Module = self.network
        if distributed.world_size() > 1:
            warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 kernels: the memory is the same
            self.parallel = DistributedDataParallel(self.network, [device] if device.type == "cuda" else None)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smooth)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            args.learning_rate,
            args.momentum,
            weight_decay=args.weight_decay,
            fused=engine.fused(device),
        )
        self.best_acc_top1 = 0.0

    def train_one_epoch(self, train: data.Loader) -> None:
        """One epoch over the training images, from self.step on."""
        args = self.args
        for x, y in self.steps(train):
            with engine.autocast(args, self.device):
                logits, auxiliary_logits = distributed.together(self.parallel, x)
                loss = objective = self.criterion(logits, y)
                if auxiliary_logits is not None:
                    objective = loss + args.auxiliary_weight * self.criterion(auxiliary_logits, y)
            norm = gradient_step(self.network, self.optimizer, objective, args.grad_clip)
            self.end_step(loss, logits, y, norm)

    def start_epoch(self) -> None:
        """Learning rate and drop path of the epoch."""
        args = self.args
        lr = SCHEDULES[args.lr_scheduler](self.epoch, args.epochs, args.learning_rate, args.learning_rate_min)
        engine.set_learning_rate(self.optimizer, lr, self.epoch, args)
        self.drop_path = args.drop_path_prob * self.epoch / args.epochs
        self.network.drop_path_prob = self.drop_path

    def finish_epoch(self) -> dict:
        """Test and log; returns the epoch's line of history."""
        distributed.share_buffers(self.network)
        self.network.eval()
        with engine.autocast(self.args, self.device):
            metrics = engine.evaluate(lambda x: self.network(x)[0], self.test, self.device)
        train = self.averages["train"].read()
        self.best_acc_top1 = max(self.best_acc_top1, metrics.top1)
        self.run.log(
            f"epoch {self.epoch}: train loss {train.loss:.4f}, accuracy {train.top1:.2f} %;"
            f" test loss {metrics.loss:.4f}, accuracy {metrics.top1:.2f} %, best {self.best_acc_top1:.2f} %"
        )
        return {
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "drop_path": self.drop_path,
            "train_loss": train.loss,
            "train_acc": train.top1,
            "test_loss": metrics.loss,
            "test_acc": metrics.top1,
            "test_acc_top5": metrics.top5,
            "best_acc": self.best_acc_top1,
        }

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "state_dict": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "genotype": str(self.genotype),
            "network": type(self.network).__name__,
            "init_channels": self.init_channels,
            "layers": self.args.layers,
            "num_classes": self.info.num_classes,
            "image_size": self.info.image_size,
            "dataset": self.args.dataset,
            "best_acc_top1": self.best_acc_top1,
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.network.load_state_dict(state["state_dict"])
        engine.load_optimizer(self.optimizer, state["optimizer"])
        self.best_acc_top1 = state["best_acc_top1"]


def second_bn(args: argparse.Namespace, genotype: Genotype) -> bool:
    """Whether the auxiliary head for large images has a second BatchNorm: P-DARTS' released ones have, DDSAS' have not.

    --auxiliary_second_bn says it, otherwise the genotype if it is one of theirs, otherwise the script.
    """
    if args.auxiliary_second_bn is not None:
        return args.auxiliary_second_bn
    of_ddsas = genotypes.DDSAS_cifar10, genotypes.DDSAS_cifar100, genotypes.DDSAS_imagenet
    return genotype == genotypes.PDARTS or args.pdarts and genotype not in of_ddsas


def gradient_step(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, grad_clip: float) -> Tensor:
    """Backpropagate (DistributedDataParallel averages the gradients), clip, step; returns the norm before clipping."""
    optimizer.zero_grad()
    distributed.together(loss.backward)
    norm = nn.utils.clip_grad_norm_(network.parameters(), grad_clip or float("inf"))
    optimizer.step()
    return norm


def get_parser(data_flags: tuple[str, ...] = engine.DATA_FLAGS) -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("genotype and regularisation")
    group.add_argument("--arch", default="DDSAS_cifar10", help="name, genotype.txt, run folder or Genotype(...)")
    group.add_argument("--mobile", action="store_true",
                       help="the most channels with less than 600 M multiply-adds at 224x224 (ImageNet)")  # fmt: skip
    group.add_argument("--auxiliary", action="store_true", help="auxiliary head behind cell 2*layers//3")
    group.add_argument("--auxiliary_weight", type=number(float, 0), default=0.4, help="of its loss")
    group.add_argument("--auxiliary_second_bn", action=argparse.BooleanOptionalAction,
                       help="ImageNet head as P-DARTS has it (default: as the genotype's authors)")  # fmt: skip
    group.add_argument("--drop_path_prob", type=number(float, 0, below=1), default=0.2, help="at the last epoch")
    group.add_argument("--label_smooth", type=number(float, 0, below=1), default=0.0)
    group.add_argument("--lr_scheduler", default="cosine", choices=["cosine", "linear"])
    group.add_argument("--learning_rate_min", type=number(float, 0), default=0.0, help="of the cosine schedule")
    engine.add_common_arguments(parser, data_flags)
    parser.add_argument(
        "--train_portion",
        type=number(float, 0, 1),
        default=1.0,
        help="of the training images; a seed changes nothing about which",
    )
    parser.ignore("--model_path", "--auto_aug", "--local_rank", "--local-rank")  # of the published scripts
    parser.set_defaults(init_channels=36, layers=20, batch_size=96, epochs=600, pdarts=False)
    parser.set_defaults_for(
        "dataset", "imagenet", init_channels=46, layers=14, batch_size=1024, epochs=250, learning_rate=0.5,
        weight_decay=3e-5, lr_scheduler="linear", warmup_epochs=5, label_smooth=0.1, drop_path_prob=0.0,
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
