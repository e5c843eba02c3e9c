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
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
import genotypes
import model
import search
import utils
from genotypes import Genotype
from search import Watch
from utils import Average, Run, Stop, UserError, number

SIZES = {"imagenet": (46, 14)}  # init_channels and cells where they are not given; 36 and 20 for all other datasets


def main(args: argparse.Namespace) -> Path:
    """Train the network that the arguments describe; returns the run folder."""
    device = utils.device_of(args)
    rank, world_size = utils.start_distributed(device)
    resumed = search.resume_run(args, "retrain.py")
    channels, cells = SIZES.get(args.dataset, (36, 20))
    args.init_channels, args.layers = args.init_channels or channels, args.layers or cells
    own = resumed and resumed.folder / "genotype.txt"  # what --arch was when the run began: files and names change
    genotype = load_genotype(str(own if own and own.exists() else args.arch))
    search.check_common(args, device)
    utils.set_seed(args.seed)
    train, test, info = data.train_data(**search.data_arguments(args, device, rank, world_size))
    training = Training(args, genotype, info, device)
    run = resumed or search.create_run(args, "retrain.py", f"retrain-{args.dataset}")
    search.restore(training, run)
    run.genotype(str(genotype))
    run.log(f"{args.dataset}: {train.num_images} training images, {test.num_images} test images; {device}")
    run.log(f"{genotype}")
    run.log(
        f"{training.init_channels} channels, {args.layers} cells,"
        f" {model.count_parameters(training.network) / 1e6:.3f} M parameters,"
        f" {model.count_multiply_adds(training.network, info.image_size) / 1e6:.1f} M multiply-adds"
    )
    search.run_epochs(
        training,
        args.epochs,
        train,
        run,
        train_epoch=lambda stop: train_epoch(training, train, run, stop),
        finish_epoch=lambda: finish_epoch(training, test, run),
    )
    run.log(f"best test accuracy {training.best_acc_top1:.2f} %")
    images = f" --data {shlex.quote(args.data)}" if args.data != ".data" else ""
    run.log(f"test it with: python evaluate.py --dataset {args.dataset}{images} --model_path {run.folder}")
    run.close()
    return run.folder


class Training:
    """All that changes during training, and so all that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, genotype: Genotype, info: data.Info, device: torch.device) -> None:
        self.args, self.genotype, self.info, self.device = args, genotype, info, device
        self.init_channels = args.init_channels
        large = search.stem_for(info, args.dataset) == "imagenet"
        if args.mobile:
            if not large:
                raise UserError(
                    f"--mobile is for large images, {args.dataset} has {info.image_size} pixels: leave it out"
                )
            self.init_channels = model.mobile_channels(genotype, args.layers, info.num_classes)
        extra = {"auxiliary_second_bn": args.auxiliary_second_bn} if large else {}
        self.network = (model.NetworkImageNet if large else model.NetworkCIFAR)(
            self.init_channels, info.num_classes, args.layers, args.auxiliary, genotype, **extra
        ).to(device)
        self.parallel: nn.Module = self.network
        if utils.world_size() > 1:
            warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 kernels: the memory is the same
            self.parallel = DistributedDataParallel(self.network, [device] if device.type == "cuda" else None)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smooth)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay
        )
        self.epoch = self.step = 0
        self.best_acc_top1 = 0.0
        self.train_average = Average(device)

    def state_dict(self) -> dict:
        return {
            "epoch": self.epoch,
            "step": self.step,
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
            "averages": [self.train_average.state()],
            "rng": utils.rng_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        for key in ("epoch", "step", "best_acc_top1"):
            setattr(self, key, state[key])
        self.network.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.train_average.load(state["averages"][0])
        utils.set_rng_state(state["rng"])

    def start_epoch(self, run: Run) -> None:
        """Learning rate and drop path of the epoch (section 5)."""
        args = self.args
        schedule = {"cosine": search.learning_rate, "linear": linear_rate}[args.lr_scheduler]
        lr = schedule(self.epoch, args.epochs, args.learning_rate, args.learning_rate_min)
        batch = args.batch_size * utils.world_size()
        search.set_learning_rate(self.optimizer, search.warmed_up(lr, self.epoch, args.warmup_epochs, batch))
        self.network.drop_path_prob = args.drop_path_prob * self.epoch / args.epochs

    def next_epoch(self) -> None:
        self.epoch, self.step, self.train_average = self.epoch + 1, 0, Average(self.device)


def linear_rate(epoch: int, epochs: int, first: float, last: float = 0.0) -> float:
    """The linear schedule of the ImageNet runs: to first/(E-5) at E-5 epochs, then to 0 in five small steps.

    Runs of up to five epochs, which try things out, fall in a straight line.
    """
    left = epochs - epoch
    if epochs <= 5:
        return first * left / epochs
    return first * (left - 5) / (epochs - 5) if left > 5 else first * left / ((epochs - 5) * 5)


def train_epoch(training: Training, train: data.Loader, run: Run, stop: Stop) -> None:
    """One epoch over the training images, from training.step on."""
    args, epoch, started, first = training.args, training.epoch, time.time(), training.step
    steps = search.bar(training, train.epoch(epoch, first), f"epoch {epoch}", len(train), first)
    watch = Watch(training.device, epoch)
    training.network.train()
    for x, y in steps:
        with search.autocast(args, training.device):
            logits, auxiliary_logits = utils.together(training.parallel, x)
            loss = objective = training.criterion(logits, y)
            if auxiliary_logits is not None:
                objective = loss + args.auxiliary_weight * training.criterion(auxiliary_logits, y)
        norm = gradient_step(training.network, training.optimizer, objective, args.grad_clip)
        training.train_average.add(loss, logits, y)
        watch.add(training.step, objective, norm)
        training.step += 1
        speed = (training.step - first) * args.batch_size / (time.time() - started)
        search.report(training, run, steps, watch, speed)
        search.leave_or_checkpoint(training, run, stop, watch, args)


def gradient_step(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, grad_clip: float) -> Tensor:
    """Backpropagate (DistributedDataParallel averages the gradients), clip, step; returns the norm before clipping."""
    optimizer.zero_grad()
    utils.together(loss.backward)
    norm = nn.utils.clip_grad_norm_(network.parameters(), grad_clip or float("inf"))
    optimizer.step()
    return norm


def finish_epoch(training: Training, test: data.Loader, run: Run) -> dict:
    """Test and log; returns the epoch's line of history."""
    network, args = training.network, training.args
    utils.share_buffers(network)
    with search.autocast(args, training.device):
        metrics = search.validate(network, test, lambda x: network(x)[0], training.device)
    train = training.train_average.read()
    search.check_finite(training.epoch, "test", loss=metrics.loss)
    training.best_acc_top1 = max(training.best_acc_top1, metrics.top1)
    run.log(
        f"epoch {training.epoch}: train loss {train.loss:.4f}, accuracy {train.top1:.2f} %;"
        f" test loss {metrics.loss:.4f}, accuracy {metrics.top1:.2f} %, best {training.best_acc_top1:.2f} %"
    )
    return {
        "epoch": training.epoch,
        "lr": training.optimizer.param_groups[0]["lr"],
        "drop_path": network.drop_path_prob,
        "train_loss": train.loss,
        "train_acc": train.top1,
        "test_loss": metrics.loss,
        "test_acc": metrics.top1,
        "test_acc_top5": metrics.top5,
        "best_acc": training.best_acc_top1,
    }


def load_genotype(text: str) -> Genotype:
    """genotypes.load with a UserError."""
    try:
        return genotypes.load(text)
    except ValueError as error:
        raise UserError(f"--arch: {error}") from None


def get_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(__doc__)
    group = parser.add_argument_group("genotype and regularisation")
    group.add_argument("--arch", default="DDSAS_cifar10", help="name, genotype.txt, run folder or Genotype(...)")
    group.add_argument("--mobile", action="store_true",
                       help="the most channels with less than 600 M multiply-adds at 224x224 (ImageNet)")  # fmt: skip
    group.add_argument("--auxiliary", action="store_true", help="auxiliary head behind cell 2*layers//3")
    group.add_argument("--auxiliary_weight", type=number(float, 0), default=0.4, help="of its loss")
    group.add_argument("--auxiliary_second_bn", action="store_true", help="ImageNet head as P-DARTS has it")
    group.add_argument("--drop_path_prob", type=number(float, 0, below=1), default=0.2, help="at the last epoch")
    group.add_argument("--label_smooth", type=number(float, 0, below=1), default=0.0)
    group.add_argument("--lr_scheduler", default="cosine", choices=["cosine", "linear"])
    group.add_argument("--learning_rate_min", type=number(float, 0), default=0.0, help="of the cosine schedule")
    search.add_common_arguments(parser)
    parser.set_defaults(init_channels=None, layers=None, batch_size=96, epochs=600)  # None: see SIZES
    return parser


if __name__ == "__main__":
    utils.cli(main, get_parser())
