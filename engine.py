"""What all trainings share: the run over epochs, the report of a step, validation, schedules, common arguments.

search.py, train_search.py and retrain.py each have a class of their own over `Training` (the searches over
`bilevel.Search`), which says what is trained; this file never asks which of them it serves.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fast
import genotypes
import model_search
import utils
from genotypes import Genotype
from lib import cli, data, distributed
from lib.cli import UserError, number
from lib.distributed import Diverged
from lib.runs import RunFolder, Stop, new_folder
from utils import Average, Metrics

# ---- a training and its epochs --------------------------------------------------------------------------------------


class Training:
    """A training that can be stopped and resumed: all its mutable state is in `state_dict`.

    A script says what happens in an epoch: `start_epoch`, `train_one_epoch`, `finish_epoch`. ``epoch`` and ``step`` are
    the next ones to do.
    """

    network: nn.Module
    run: RunFolder
    stop: Stop

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.epoch = self.step = 0
        self.averages = {"train": Average(device)}

    # what a script defines

    def start_epoch(self) -> None:
        """Set the learning rate and whatever else follows a schedule; also called where a run goes on in an epoch."""
        raise NotImplementedError

    def train_one_epoch(self, train: data.Loader) -> None:
        """Train on the batches of `steps`, with an `end_step` after each."""
        raise NotImplementedError

    def finish_epoch(self) -> dict:
        """Validate, log, and return the epoch's line of history.jsonl."""
        raise NotImplementedError

    def step_notes(self) -> tuple[str, str]:
        """What a report of a step says besides loss, accuracy and speed: for the progress bar, and for the log."""
        return "", ""

    def next_epoch(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0
        self.averages = {name: Average(self.device) for name in self.averages}

    def state_dict(self) -> dict:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "averages": [average.state() for average in self.averages.values()],
            "rng": utils.rng_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
        for average, sums in zip(self.averages.values(), state["averages"], strict=True):
            average.load(sums)
        utils.set_rng_state(state["rng"])

    # what they share

    def restore(self, run: RunFolder) -> None:
        """Go on from the run's last checkpoint, if it has one."""
        if (saved := run.load()) is None:
            return
        try:
            self.load_state_dict(saved)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = genotypes.shown(str(error))
            raise UserError(f"{run.folder}: its checkpoint is of another run or another version ({reason})") from None

    def fit(self, epochs: int, train: data.Loader, run: RunFolder) -> None:
        """All epochs that are left, each with its line of history, its timing and its checkpoint."""
        self.run = run
        with Stop() as self.stop, self.bar(None, "epochs", epochs, self.epoch) as bar:
            while self.epoch < epochs:
                started, first = time.time(), self.step
                self.start_epoch()
                self.network.train()
                self.train_one_epoch(train)
                line = self.finish_epoch()
                run.history(line)
                run.timing(self.timing(line, time.time() - started, 1 - first / len(train), train.num_images))
                write_tensorboard(run, line, self.args if self.epoch + 1 == epochs else None)
                self.next_epoch()
                saved = self.state_dict()
                if line.get("best_acc") is not None and line["test_acc"] == line["best_acc"]:
                    run.checkpoint(saved, "best.pt")
                run.checkpoint(saved)
                shown = {"valid_acc": "validation accuracy", "test_acc": "test accuracy", "best_acc": "best"}
                shown = [f"{text} {line[name]:.1f}%" for name, text in shown.items() if line.get(name) is not None]
                bar.set_postfix_str(", ".join(shown), refresh=False)
                bar.update()

    def timing(self, line: dict, seconds: float, part: float, images: int) -> dict:
        """The line of timing.jsonl, of this part of an epoch: all that differs between two identical runs."""
        return {key: line[key] for key in ("stage", "epoch") if key in line} | {
            "seconds": round(seconds, 2),
            "images_per_second": round(part * images / seconds, 1),
            "peak_memory_mb": round(distributed.peak_memory_mb(self.device)),
        }

    def bar(self, iterable, name: str, total: int, initial: int) -> tqdm:
        """A progress bar that fits into 80 columns."""
        shape = "{desc} {bar} {n_fmt}/{total_fmt}, {remaining} left{postfix}"
        return cli.progress(
            iterable, self.args.quiet, desc=name, total=total, initial=initial, bar_format=shape
        )  # fmt: skip

    def steps(self, train: data.Loader) -> Iterator[data.Batch]:
        """The batches of this epoch that are left, under a progress bar."""
        self.started, self.first_step = time.time(), self.step
        self.watch = Watch(self.device, self.epoch, self.run.folder)
        batches = train.epoch(self.epoch, self.step)
        self.steps_bar = self.bar(batches, f"epoch {self.epoch}", len(train), self.step)
        for batch in self.steps_bar:
            if not distributed.is_main():  # dropout and drop path of its own; what must agree has generators of its own
                place = int(os.environ["RANK"]), self.epoch, self.step
                torch.manual_seed(int(np.random.SeedSequence(self.args.seed, spawn_key=place).generate_state(1)[0]))
            yield batch

    def end_step(self, loss: Tensor, logits: Tensor, y: Tensor, norm: Tensor, arch_norm: Tensor | None = None) -> None:
        """Count the step, report it, leave if a signal came, write a checkpoint if one is due."""
        args = self.args
        self.averages["train"].add(loss, logits, y)
        self.watch.add(self.step, loss, norm, arch_norm)
        self.step += 1
        self.report()
        if (distributed.world_size() == 1 or self.step % args.report_freq == 0) and self.stop.agreed():
            self.watch.check()
            self.run.checkpoint(self.state_dict())
            self.run.log(f"stopped by signal {self.stop.signal} at epoch {self.epoch}, step {self.step}")
            self.run.close()
            self.stop.exit(self.run.resume_command)
        if args.checkpoint_freq and self.step % args.checkpoint_freq == 0:
            self.watch.check()
            self.run.checkpoint(self.state_dict())

    def report(self) -> None:
        """Loss, accuracy and speed to the progress bar and, every --report_freq steps, to the log.

        In between, a GPU or the other processes would have to wait for it.
        """
        bar = self.steps_bar
        due = self.step % self.args.report_freq == 0 or self.step == bar.total
        if due:
            self.watch.check()
        elif bar.disable or self.device.type != "cpu" or distributed.world_size() > 1:
            return
        train = self.averages["train"].read()
        speed = (self.step - self.first_step) * self.args.batch_size / (time.time() - self.started)
        speed = f"{speed * distributed.world_size():.0f} images/s"
        short, long = self.step_notes()
        bar.set_postfix_str(f"loss {train.loss:.3f}, acc {train.top1:.1f}%, {speed}{short}", refresh=False)
        if due:  # on a terminal the bar says it
            text = f"epoch {self.epoch} step {self.step}/{bar.total}: loss {train.loss:.4f}"
            text += f", accuracy {train.top1:.2f} %{long}, {speed}"
            self.run.log(text, screen=bar.disable or not sys.stdout.isatty())


class Watch:
    """Looks for losses and gradients that are not finite: at once on the CPU, on CUDA when `check` is called, since a
    look at every step would make the GPU wait."""

    def __init__(self, device: torch.device, epoch: int, folder: Path) -> None:
        self.at_once, self.epoch, self.folder, self.pending = device.type == "cpu", epoch, folder, []

    def add(self, step: int, loss: Tensor, norm: Tensor, arch_norm: Tensor | None = None) -> None:
        values = [loss.detach(), norm.detach()] + ([] if arch_norm is None else [arch_norm.detach()])
        self.pending.append((step, torch.stack([v.float() for v in values])))
        if self.at_once:
            self.check()

    def check(self) -> None:
        """Diverged with epoch, step, loss and norms, unless all values since the last check are finite."""
        for step, values in self.pending:
            if not values.isfinite().all():
                loss, norm, arch_norm = (values.tolist() + [0.0])[:3]
                saved = (self.folder / "checkpoint.pt").exists()
                advice = "the last checkpoint is from before: --resume it, or " if saved else ""
                raise Diverged(
                    f"epoch {self.epoch}, step {step}: loss {loss:.4g}, gradient norm {norm:.4g} (architecture"
                    f" {arch_norm:.4g}); {advice}start with a lower --learning_rate"
                )
        self.pending.clear()


@torch.no_grad()
def evaluate(forward: Callable[[Tensor], Tensor], loader: data.Loader, device: torch.device) -> Metrics:
    """Loss and accuracy of ``forward(x)`` (logits) over the loader's images, each once, not augmented."""
    average = Average(device)
    for x, y in loader.in_order():
        logits = forward(x)
        average.add(F.cross_entropy(logits, y), logits, y)
    return average.read()


# ---- schedules ------------------------------------------------------------------------------------------------------


def cosine_rate(epoch: int, epochs: int, first: float, last: float) -> float:
    """Cosine from ``first`` at epoch 0 towards ``last`` at ``epochs`` (SGDR, ICLR 2017, equation 5)."""
    return last + (first - last) * (1 + np.cos(np.pi * epoch / epochs)) / 2


def linear_rate(epoch: int, epochs: int, first: float, last: float = 0.0) -> float:
    """The linear schedule of the ImageNet runs: to first/(E-5) at E-5 epochs, then to 0 in five small steps.

    Runs of up to five epochs, which try things out, fall in a straight line.
    """
    left = epochs - epoch
    if epochs <= 5:
        return first * left / epochs
    return first * (left - 5) / (epochs - 5) if left > 5 else first * left / ((epochs - 5) * 5)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, epoch: int, args: argparse.Namespace) -> None:
    """lr, or in the first epochs with batches of more than 256 the undecayed rate * (epoch + 1) / warmup_epochs."""
    if epoch < args.warmup_epochs and args.batch_size * distributed.world_size() > 256:
        lr = args.learning_rate * (epoch + 1) / args.warmup_epochs
    for group in optimizer.param_groups:
        group["lr"] = float(lr)


def changed(args: argparse.Namespace, **arguments: object) -> argparse.Namespace:
    """The arguments with some of them changed."""
    return argparse.Namespace(**vars(args) | arguments)


# ---- device, data, network ------------------------------------------------------------------------------------------


def autocast(args: argparse.Namespace, device: torch.device) -> AbstractContextManager:
    """bfloat16 arithmetic on CUDA where --amp asks for it, float32 otherwise."""
    return torch.autocast(device.type, torch.bfloat16) if args.amp else nullcontext()


def placed(network: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The network on its device, a supernet computed by fast.py where that agrees with its definition."""
    network = network.to(device)
    if isinstance(network, model_search.Network):
        fast.use(network, lambda line: None, args.plain, args.checkpoint_cells)
    return network


def fused(device: torch.device) -> bool | None:
    """For an optimizer whose parameters all have a gradient at every step: one kernel for all of them, on CUDA."""
    return True if device.type == "cuda" else None


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """optimizer.load_state_dict, with the kernels of this device and not those of the one where it was saved."""
    own = {name: optimizer.defaults[name] for name in ("fused", "foreach")}
    optimizer.load_state_dict(state | {"param_groups": [group | own for group in state["param_groups"]]})


def data_arguments(args: argparse.Namespace, device: torch.device) -> dict:
    """What the functions of data.py that open a dataset are told by the arguments all scripts have."""
    rank, world_size = distributed.start_distributed(device)
    return dict(
        name=args.dataset,
        root=args.data,
        batch_size=args.batch_size,
        seed=args.seed,
        cutout=args.cutout_length if args.cutout else 0,
        device=device,
        image_size=args.image_size,
        workers=args.workers,
        rank=rank,
        world_size=world_size,
        bad_images=args.bad_images,
        quiet=args.quiet,
    )


def stem_for(info: data.Info, dataset: str) -> str:
    """ "imagenet", a stem of stride 8, from 96 pixels on and for ImageNet, "cifar" for smaller images."""
    large = dataset == "imagenet" or info.image_size >= 96
    multiple = 32 if large else 4
    if info.image_size % multiple:
        raise UserError(f"--image_size {info.image_size}: must be a multiple of {multiple}, the network halves it")
    return "imagenet" if large else "cifar"


def load_genotype(text: str) -> Genotype:
    """genotypes.load with a UserError."""
    try:
        return genotypes.load(text)
    except ValueError as error:
        raise UserError(f"--arch: {error}") from None


# ---- TensorBoard ----------------------------------------------------------------------------------------------------

TAGS = {  # the names of history.jsonl, as TensorBoard groups them
    "train_loss": "loss/train",
    "arch_loss": "loss/architecture",
    "valid_loss": "loss/valid",
    "test_loss": "loss/test",
    "train_acc": "accuracy/train",
    "valid_acc": "accuracy/valid",
    "test_acc": "accuracy/test",
    "test_acc_top5": "accuracy/test_top5",
    "best_acc": "accuracy/best",
    "table_acc": "accuracy/looked_up",
    "table_rank": "rank/looked_up",
    "lr": "learning_rate/weights",
    "arch_lr": "learning_rate/architecture",
    "tau": "schedule/tau",
    "stage": "schedule/stage",
    "dropout": "schedule/dropout",
    "drop_path": "schedule/drop_path",
}


def write_tensorboard(run: RunFolder, line: dict, args: argparse.Namespace | None) -> None:
    """An epoch's numbers, heat maps and cells as TensorBoard events; with ``args`` (at the end) the hyperparameters."""
    if not distributed.is_main():
        return
    board, epoch = run.tensorboard, line["epoch"]
    scalars = {tag: line[name] for name, tag in TAGS.items() if line.get(name) is not None}
    for name in ("alpha_entropy", "active_ops"):
        scalars |= {f"{name}/{kind}": value for kind, value in line.get(name, {}).items()}
    if line.get("samplings"):
        changed = np.array([sampling["changed"] for sampling in line["samplings"]])
        scalars["active_ops/changed_per_sampling"] = changed.mean()
        board.add_histogram("active_ops/changed_at_each_sampling", changed, epoch)
    for tag, value in scalars.items():
        board.add_scalar(tag, value, epoch)
    if "genotype" in line:  # a search
        import visualize  # matplotlib is slow to import, and only needed here

        for name in ("saliency", "visits"):
            if name in line:
                board.add_figure(name, visualize.heat_figure(line[name], line["primitives"]), epoch)
        if (picture := visualize.cell_image(genotypes.parse(line["genotype"]))) is not None:
            board.add_image("cells", picture, epoch, dataformats="HWC")
    if args is not None:
        given = {name: value for name, value in vars(args).items() if name not in cli.HARMLESS | {"given", "save"}}
        plain = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in given.items()}
        metrics = {f"final/{tag}": value for tag, value in scalars.items() if tag.startswith(("loss", "accuracy"))}
        board.add_hparams(plain, metrics, run_name=".", global_step=epoch)
    board.flush()


# ---- arguments ------------------------------------------------------------------------------------------------------


def check_common(args: argparse.Namespace, device: torch.device) -> None:
    """UserError for what search and retraining cannot do."""
    if args.amp and device.type != "cuda":
        raise UserError("--amp needs a CUDA device: on the CPU leave it out")


def add_tf32_argument(add: Callable) -> None:
    add("--tf32", action=argparse.BooleanOptionalAction, default=True,
        help="float32 convolutions and matrix products as TF32 on CUDA, as PyTorch does convolutions unless told"
        " otherwise; --no-tf32: in full, as on the GPUs before Ampere that the papers had")  # fmt: skip


DATA_FLAGS = "--data", "--tmp_data_dir"  # ours, and P-DARTS'


def add_common_arguments(parser: argparse.ArgumentParser, data_flags: tuple[str, ...] = DATA_FLAGS) -> None:
    """Dataset, training and run arguments that every search and retraining has."""
    add = parser.add_argument_group("data").add_argument
    add(*data_flags, default=".data", metavar="DIR", help="folder of the datasets, or of your own images")
    add("--dataset", default="cifar10", choices=list(data.INFO))
    add("--image_size", type=number(int, 8, 10_000), metavar="N", help="for folder and imagenet")
    add("--bad_images", default="stop", choices=["stop", "skip"], help="what unreadable images cause")
    add("--cutout", action="store_true", help="erase a random square of every training image")
    add("--cutout_length", type=number(int, 1), default=16, metavar="PIXELS")
    add = parser.add_argument_group("network and training").add_argument
    add("--init_channels", type=number(int, 1), default=16, metavar="C")
    add("--layers", type=number(int, 1, 1000), default=8, help="number of cells")
    add("--batch_size", type=number(int, 2), default=64, help="per process")
    add("--epochs", type=number(int, 1), default=50)
    add("--learning_rate", type=number(float, 0), default=0.025, help="of SGD, at epoch 0")
    add("--momentum", type=number(float, 0, below=1), default=0.9)
    add("--weight_decay", type=number(float, 0), default=3e-4)
    add("--grad_clip", type=number(float, 0), default=5.0, help="largest norm of the weights' gradient; 0: any")
    add("--warmup_epochs", type=number(int, 0), default=0, help="used with batches of more than 256")
    add("--amp", action="store_true", help="bfloat16 on CUDA (less memory, not the same digits)")
    add_tf32_argument(add)
    add("--plain", action="store_true", help="compute as the definitions say, without fast.py: slower, same numbers")
    cli.add_run_arguments(parser)


def add_cifar100_argument(parser: argparse.ArgumentParser) -> None:
    """P-DARTS' name for CIFAR-100."""
    parser.add_argument("--cifar100", dest="dataset", action="store_const", const="cifar100", default=argparse.SUPPRESS,
                        help="same as --dataset cifar100")  # fmt: skip


def prefix_save(args: argparse.Namespace, kind: str) -> None:
    """P-DARTS' --save is the beginning of the run folder's name: make it SAVE + kind-NOTE-TIME."""
    if args.resume is not None:
        args.given -= {"save"}  # the run keeps the folder it has
    else:
        folder = str(new_folder(f"{args.save}{kind}-{args.note}"))
        args.save = folder if "/" in folder else f"./{folder}"
