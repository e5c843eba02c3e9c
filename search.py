"""Search for a cell: DDSAS, inside a subspace that a bandit moves (ACML 2021), or DARTS, GDAS, random cells beside it.

    python search.py --dataset cifar10                          # DDSAS, static space, 50 epochs, the published settings
    python search.py --dataset cifar10 --space_config shrink --epochs 60
    python search.py --dataset cifar10 --space_config nasbench201 --method darts    # see nasbench201.py
    python search.py --dataset fashion_mini --arch MY_CELL      # the embedded images; the result goes to genotypes.py
    python search.py --dataset folder --data path/to/images --image_size 32
    python search.py --resume logs/NAME                         # go on with a run that was stopped
    torchrun --nproc_per_node 4 search.py --dataset imagenet --data .data/imagenet_split

The run folder holds the log, the arguments, the current genotype, a line of history per epoch, and the checkpoint.
What a method does is in methods.py; the two steps of a batch are in bilevel.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import engine
import genotypes
import nasbench201
import utils
from bilevel import BilevelSearch, add_search_arguments
from lib import cli, data, distributed
from lib.cli import UserError, number
from lib.runs import RunFolder, create_run, resume_run, retrain_command
from methods import CELLS, METHODS, random_architecture


def main(args: argparse.Namespace) -> Path:
    """Run the search that the arguments describe; returns the run folder."""
    device = utils.device_of(args)
    distributed.start_distributed(device)
    resumed = resume_run(args, "search.py")
    check(args, device)
    utils.set_seed(args.seed)
    utils.cuda_settings(args.tf32)
    judge = Judge(args)
    if args.method == "random":
        return draw(args, judge, resumed)
    train, valid, info = data.search_data(**engine.data_arguments(args, device), train_portion=args.train_portion)
    search = Search(args, info, valid, judge, device)
    run = resumed or create_run(args, "search.py", f"search-{args.dataset}-{args.space_config}")
    search.restore(run)
    run.log(
        f"{args.dataset}: {train.num_images} images to train the weights, {valid.num_images} for the architecture;"
        f" {args.space_config} space, {search.method.summary()}; {device}"
    )
    if schedule := space_of(args).describe():
        run.log(f"the space: {schedule}; all other settings are those of --dataset {args.dataset}")
    judge.announce(run)
    search.fit(args.epochs, train, run)
    return finish(args, search.method.genotype(), run)


def space_of(args: argparse.Namespace) -> genotypes.Space:
    """The space of --space_config; with --scale_space its schedule is one for --epochs."""
    space = genotypes.SPACES[args.space_config]
    return space.scale(args.epochs) if args.scale_space else space


def draw(args: argparse.Namespace, judge: Judge, resumed: RunFolder | None) -> Path:
    """Random search: one architecture drawn uniformly, nothing trained; a run folder as of any search."""
    run = resumed or create_run(args, "search.py", f"search-random-{args.space_config}")
    judge.announce(run)
    genotype = random_architecture(genotypes.SPACES[args.space_config], np.random.default_rng(args.seed))
    line = {"epoch": 0, "genotype": str(genotype)} | judge(genotype)
    if run.load() is None:
        run.history(line)
        run.checkpoint({"epoch": 1, "genotype": str(genotype)})
    run.log(f"epoch 0: {genotype}{judge.in_words(line)}")
    return finish(args, genotype, run)


def finish(args: argparse.Namespace, genotype, run: RunFolder) -> Path:
    """Record the result; returns the run folder."""
    run.genotype(str(genotype))
    run.log(f"genotype: {genotype}")
    if args.arch and distributed.is_main():
        try:
            genotypes.record(args.arch, genotype)
        except ValueError as error:
            raise UserError(str(error)) from None
        run.log(f"recorded in genotypes.py as {args.arch}")
    run.log(f"retrain it with: {retrain_command('search.py', vars(args), run.folder)}")
    run.close()
    return run.folder


class Search(BilevelSearch):
    """A search of search.py: a supernet, and the method that trains its architecture parameters."""

    def __init__(
        self,
        args: argparse.Namespace,
        info: data.Info,
        valid: data.Loader | None,
        judge: Judge,
        device: torch.device,
    ) -> None:
        super().__init__(args, valid, device)
        self.info, self.judge, space = info, judge, space_of(args)
        stem = engine.stem_for(info, args.dataset)
        if space.cells == "nasbench201" and stem != "cifar":
            raise UserError(f"--space_config nasbench201 is for small images, {info.image_size} pixels are too many")
        network = CELLS[space.cells].supernet(args.init_channels, info.num_classes, args.layers, space.primitives, stem)
        self.method = METHODS[args.method](args, space)
        network.straight_through = self.method.straight_through
        self.take(network, self.method.architecture, args.method == "darts")

    # ---- the loop of one epoch ----

    def train_one_epoch(self, train: data.Loader) -> None:
        """For each batch one step of the architecture parameters, then one of the weights (DARTS, algorithm 1)."""
        valid_batches = self.valid.random(self.epoch, self.step)
        for x, y in self.steps(train):
            self.method.before_step(self.epoch, self.step)  # DDSAS moves its subspace
            arch_norm = self.architecture_step((x, y), next(valid_batches))
            loss, logits, norm = self.weight_step(x, y)
            self.end_step(loss, logits, y, norm, arch_norm)

    def operations(self, noise: bool = True) -> tuple[dict[str, Tensor], dict[str, list[list[int]]] | None]:
        return self.method.operations(self.epoch if noise else None)

    # ---- before and after an epoch ----

    def start_epoch(self) -> None:
        """Set the learning rate; at an epoch's first step the method's own schedule."""
        args = self.args
        lr = engine.cosine_rate(self.epoch, args.epochs, args.learning_rate, args.learning_rate_min)
        engine.set_learning_rate(self.optimizer, lr, self.epoch, args)
        if self.step == 0 and (text := self.method.start_epoch(self.epoch)):
            self.run.log(f"epoch {self.epoch}: {text}")

    def finish_epoch(self) -> dict:
        """Validate, log, write the current genotype; returns the epoch's line of history."""
        run, method = self.run, self.method
        metrics = self.validate()
        train, arch = (average.read() for average in self.averages.values())
        distributed.assert_same(dict(self.architecture.named_parameters()) | method.replicated())
        genotype = method.genotype()
        run.genotype(str(genotype))
        line = {
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "arch_lr": self.arch_optimizer.param_groups[0]["lr"],
            "tau": method.tau(self.epoch),
            "train_loss": train.loss,
            "train_acc": train.top1,
            "arch_loss": arch.loss,
            "valid_loss": metrics.loss,
            "valid_acc": metrics.top1,
            "genotype": str(genotype),
            "primitives": method.space.primitives,
        }
        line |= method.history() | self.judge(genotype)
        run.log(
            f"epoch {self.epoch}: train loss {train.loss:.4f}, accuracy {train.top1:.2f} %;"
            f" validation loss {metrics.loss:.4f}, accuracy {metrics.top1:.2f} %"
        )
        run.log(f"epoch {self.epoch}: {genotype}{self.judge.in_words(line)}")
        return line

    def step_notes(self) -> tuple[str, str]:
        return self.method.notes()

    # ---- what a checkpoint holds, besides what every search has ----

    def state_dict(self) -> dict:
        return super().state_dict() | self.method.state_dict()

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.method.load_state_dict(state)


class Judge:
    """In NAS-Bench-201's space, looks up what accuracy an architecture reaches; elsewhere there is nothing to say."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.asked = genotypes.SPACES[args.space_config].cells == "nasbench201"
        self.table = nasbench201.load_table(args.table) if self.asked else None

    def announce(self, run: RunFolder) -> None:
        if self.asked:
            run.log(f"architectures are looked up in {self.table.source}" if self.table else nasbench201.NO_TABLE)

    def __call__(self, genotype) -> dict:
        """The looked-up accuracy in percent and the rank among all (1: the best), for a line of history."""
        if self.table is None or self.table.accuracy(genotype) is None:
            return {}
        return {"table_acc": self.table.accuracy(genotype), "table_rank": self.table.rank(genotype)[0]}

    def in_words(self, line: dict) -> str:
        if "table_acc" not in line:
            return ""
        return f" {line['table_acc']:.2f} %, rank {line['table_rank']:,} of {len(self.table):,}"


# ---- arguments ------------------------------------------------------------------------------------------------------

METHOD_FLAGS = {  # what other methods have no use for
    **dict.fromkeys(("dss_max_ops", "dss_freq", "rdss_prob", "confidence", "begin"), {"ddsas"}),
    **dict.fromkeys(("saliency_type", "no_norm", "gumbel", "scale_space"), {"ddsas"}),
    **dict.fromkeys(("tau_min", "tau_max"), {"ddsas", "gdas"}),
    "unrolled": {"ddsas", "darts"},
}


def check(args: argparse.Namespace, device: torch.device) -> None:
    """UserError for arguments that make no sense together."""
    space = genotypes.SPACES[args.space_config]
    cells = CELLS[space.cells]
    for flag, methods in METHOD_FLAGS.items():
        if flag in args.given and args.method not in methods:
            raise UserError(f"--{flag} is for --method {' or '.join(sorted(methods))}, not {args.method}: leave it out")
    if cells is CELLS["nasbench201"] and args.checkpoint_cells:
        raise UserError("--checkpoint_cells is for the DARTS space; NAS-Bench-201's supernet is small: leave it out")
    if cells is not CELLS["nasbench201"] and args.table:
        raise UserError("--table is for --space_config nasbench201: no other space has its networks trained")
    if args.scale_space and not (space.shrink or space.expand):
        raise UserError(f"--scale_space: the space {args.space_config} stays as it is over the epochs: leave it out")
    if args.method == "ddsas" and args.dss_max_ops < cells.num_edges:
        raise UserError(f"--dss_max_ops {args.dss_max_ops}: at least {cells.num_edges}, one operation per edge")
    if args.tau_min > args.tau_max:
        raise UserError(f"--tau_min {args.tau_min} is larger than --tau_max {args.tau_max}: tau falls over the epochs")
    engine.check_common(args, device)
    if args.arch:
        try:
            genotypes.check_name(args.arch)
        except ValueError as error:
            raise UserError(str(error)) from None


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("method and space").add_argument
    add("--method", default="ddsas", choices=[*METHODS, "random"], help="ddsas: a bandit moves the subspace; darts: all"
        " operations at once; gdas: one operation an edge; random: draw an architecture, train nothing")  # fmt: skip
    add("--space_config", default="static", choices=list(genotypes.SPACES), metavar="SPACE",
        help="static, shrink, expand, imagenet: DARTS' cells (also space_config_NAME);"
        " nasbench201: cells whose accuracies are known")  # fmt: skip
    text = f"shrink or expand in proportion to --epochs, not at the epochs of {genotypes.WRITTEN_FOR}"
    add("--scale_space", action="store_true", help=text)
    add("--table", metavar="FILE.csv", help="nasbench201: accuracies to look up, instead of analog-nasbench's")
    add = parser.add_argument_group("dynamic subspace (ddsas)").add_argument
    add(
        "--dss_max_ops",
        type=number(int, 1),
        default=28,
        metavar="L",
        help="active operations per cell type, `none` not counted",
    )
    add("--dss_freq", type=number(int, 1), default=30, metavar="M", help="steps between two subspaces")
    add("--rdss_prob", type=number(float, 0, 1), default=0.0, help="probability of a random subspace")
    add(
        "--confidence",
        type=number(float, 0),
        default=1.44,
        metavar="c",
        help="c in the bandit's bound sigmoid(beta) + c sqrt(ln T / n)",
    )
    add(
        "--begin",
        type=number(int, 0),
        default=0,
        metavar="EPOCH",
        help="before this epoch every step has a random subspace",
    )
    add = parser.add_argument_group("architecture").add_argument
    add("--arch", metavar="NAME", help="record the result in genotypes.py under this name")
    add("--saliency_type", default="simple", choices=["simple", "all"], help="ddsas: weights of operations")
    add("--no_norm", action="store_true", help="ddsas: do not divide the weights of an edge by their sum")
    add("--gumbel", action="store_true", help="ddsas: Gumbel softmax; tau falls from tau_max to tau_min")
    add("--tau_min", type=number(float, 1e-3), default=0.1)
    add("--tau_max", type=number(float, 1e-3), default=10.0)
    add_search_arguments(parser)
    engine.add_common_arguments(parser)
    parser.ignore("--model_path", "--local_rank", "--local-rank")  # of the published script
    parser.set_defaults_for(
        "dataset", "imagenet", space_config="imagenet", batch_size=512, epochs=60, learning_rate=0.5,
        learning_rate_min=0.0, warmup_epochs=5, arch_learning_rate=6e-3, arch_grad_clip=5.0, seed=2,
    )  # fmt: skip
    parser.set_defaults_for("space_config", "nasbench201", layers=5, dss_max_ops=10, weight_decay=5e-4)
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
