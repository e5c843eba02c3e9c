"""DDSAS: search for a cell inside a subspace of operations that a bandit moves (Yang et al., ACML 2021).

    python search.py --dataset cifar10                          # static space, 50 epochs, the published settings
    python search.py --dataset cifar10 --space_config shrink --epochs 60
    python search.py --dataset fashion_mini --arch MY_CELL      # the embedded images; the result goes to genotypes.py
    python search.py --dataset folder --data path/to/images --image_size 32
    python search.py --resume logs/NAME                         # go on with a run that was stopped
    torchrun --nproc_per_node 4 search.py --dataset imagenet --data .data/imagenet_split --space_config imagenet

The run folder holds the log, the arguments, the current genotype, a line of history per epoch, and the checkpoint.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import engine
import genotypes
import utils
from bilevel import Search, add_search_arguments
from model_search import Architecture, DynamicSpace, Network
from runs import create_run, resume_run, retrain_command
from utils import UserError, number


def main(args: argparse.Namespace) -> Path:
    """Run the search that the arguments describe; returns the run folder."""
    device = utils.device_of(args)
    utils.start_distributed(device)
    resumed = resume_run(args, "search.py")
    check(args, device)
    utils.set_seed(args.seed)
    train, valid, info = data.search_data(**engine.data_arguments(args, device), train_portion=args.train_portion)
    search = SubspaceSearch(args, info, valid, device)
    run = resumed or create_run(args, "search.py", f"search-{args.dataset}-{args.space_config}")
    search.restore(run)
    run.log(
        f"{args.dataset}: {train.num_images} images to train the weights, {valid.num_images} for the architecture;"
        f" {args.space_config} space, {args.dss_max_ops} active operations, moved every {args.dss_freq} steps; {device}"
    )
    search.fit(args.epochs, train, run)
    genotype = search.space.genotype()
    run.genotype(str(genotype))
    run.log(f"genotype: {genotype}")
    if args.arch and utils.is_main():
        try:
            genotypes.record(args.arch, genotype)
        except ValueError as error:
            raise UserError(str(error)) from None
        run.log(f"recorded in genotypes.py as {args.arch}")
    run.log(f"retrain it with: {retrain_command('search.py', vars(args), run.folder)}")
    run.close()
    return run.folder


class SubspaceSearch(Search):
    """A search of DDSAS: a supernet, alpha and beta, and the space that a bandit moves."""

    def __init__(
        self, args: argparse.Namespace, info: data.Info, valid: data.Loader | None, device: torch.device
    ) -> None:
        super().__init__(args, valid, device)
        self.config = genotypes.SPACES[args.space_config]
        primitives = self.config.primitives
        stem = engine.stem_for(info, args.dataset)
        network = Network(args.init_channels, info.num_classes, args.layers, primitives, stem)
        self.take(network, Architecture(genotypes.EDGES, len(primitives)))
        self.space = DynamicSpace(primitives, max_ops=args.dss_max_ops, confidence=args.confidence)
        self.rng = np.random.default_rng(args.seed)  # of what the space draws
        self.samplings: list[dict] = []  # of this epoch

    # ---- the loop of one epoch ----

    def train_one_epoch(self, train: data.Loader) -> None:
        """For each batch move the subspace, then train alpha and beta, then the weights (DDSAS, algorithm 1)."""
        valid_batches = self.valid.random(self.epoch, self.step)
        for x, y in self.steps(train):
            active = self.move_subspace()
            arch_norm = self.architecture_step(active, (x, y), next(valid_batches))
            loss, logits, norm = self.weight_step(active, x, y)
            self.end_step(loss, logits, y, norm, arch_norm)

    @torch.no_grad()
    def move_subspace(self) -> dict[str, list[list[int]]]:
        """Every dss_freq steps update the bandit and sample a subspace; before epoch `begin` a random one each step.

        Returns the active operations.
        """
        args, space = self.args, self.space
        before = {kind: active.copy() for kind, active in space.active.items()}
        if self.epoch < args.begin:
            space.sample_random(self.rng)
        elif self.step % args.dss_freq == 0:
            raw = self.architecture.weights(space.active_ops(), args.saliency_type, norm=False)
            space.update(as_arrays(raw), as_arrays(self.architecture.betas()))
            if self.rng.random() < args.rdss_prob:
                space.sample_random(self.rng)
            else:
                space.sample()
        else:
            return space.active_ops()
        if self.step % args.dss_freq == 0:  # what the run folder remembers
            changed = sum(int((before[kind] != space.active[kind]).sum()) for kind in before)
            active = {kind: bits(mask) for kind, mask in space.active.items()}
            self.samplings.append({"step": self.step, "active": active, "changed": changed})
        return space.active_ops()

    def weights(self, active: dict, noise: bool = True) -> dict[str, Tensor]:
        """The operations' weights in the supernet: see `Architecture.weights`."""
        tau = self.tau if noise else None
        return self.architecture.weights(active, self.args.saliency_type, not self.args.no_norm, tau)

    @property
    def tau(self) -> float | None:
        """Temperature of the Gumbel softmax, linear from tau_max to tau_min over the epochs; None: plain softmax."""
        args = self.args
        if not args.gumbel:
            return None
        return args.tau_max - (args.tau_max - args.tau_min) * self.epoch / max(args.epochs - 1, 1)

    # ---- before and after an epoch ----

    def start_epoch(self) -> None:
        """Set the learning rate; at an epoch's first step, shrink or expand the space if the schedule says so."""
        args = self.args
        lr = engine.cosine_rate(self.epoch, args.epochs, args.learning_rate, args.learning_rate_min)
        engine.set_learning_rate(self.optimizer, lr, self.epoch, args)
        if self.step == 0:
            if num := self.config.shrink.get(self.epoch):
                self.space.shrink(num)
                self.run.log(f"epoch {self.epoch}: the space shrinks by {num} operations per cell type")
            if num := self.config.expand.get(self.epoch):
                self.space.set_available(num)
                names = ", ".join(self.config.primitives[:num])
                self.run.log(f"epoch {self.epoch}: {num} primitives available: {names}")

    def finish_epoch(self) -> dict:
        """Validate, log, write the current genotype; returns the epoch's line of history."""
        space, run = self.space, self.run
        metrics = self.validate(space.active_ops())
        train, arch = (average.read() for average in self.averages.values())
        named = {f"active {kind}": active for kind, active in space.active.items()}
        utils.assert_same(dict(self.architecture.named_parameters()) | named)
        genotype = space.genotype()
        run.genotype(str(genotype))
        run.log(
            f"epoch {self.epoch}: train loss {train.loss:.4f}, accuracy {train.top1:.2f} %;"
            f" validation loss {metrics.loss:.4f}, accuracy {metrics.top1:.2f} %"
        )
        run.log(f"epoch {self.epoch}: {genotype}")
        return {
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "arch_lr": self.arch_optimizer.param_groups[0]["lr"],
            "tau": self.tau,
            "train_loss": train.loss,
            "train_acc": train.top1,
            "arch_loss": arch.loss,
            "valid_loss": metrics.loss,
            "valid_acc": metrics.top1,
            "genotype": str(genotype),
            "primitives": space.primitives,
            "samplings": self.samplings,
            "available": {kind: bits(mask) for kind, mask in space.available.items()},
            "saliency": {kind: saliency.tolist() for kind, saliency in space.saliency.items()},
            "visits": {kind: visits.tolist() for kind, visits in space.visits.items()},
            "alpha_entropy": {kind: engine.entropy(alpha) for kind, alpha in self.architecture.alphas().items()},
            "active_ops": {kind: int(active.sum()) for kind, active in space.active.items()},
        }

    def step_notes(self) -> tuple[str, str]:
        counts = [int(active.sum()) for active in self.space.active.values()]
        changed = f" ({self.samplings[-1]['changed']} changed at the last sampling)" if self.samplings else ""
        short, long = "+".join(map(str, counts)), " + ".join(map(str, counts))
        return f", ops {short}", f", active operations {long}{changed}"

    def next_epoch(self) -> None:
        super().next_epoch()
        self.samplings = []

    # ---- what a checkpoint holds, besides what every search has ----

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "space": self.space.state_dict(),
            "samplings": self.samplings,
            "space_rng": repr(self.rng.bit_generator.state),
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.space.load_state_dict(state["space"])
        self.samplings = state["samplings"]
        self.rng.bit_generator.state = ast.literal_eval(state["space_rng"])


def bits(mask: np.ndarray) -> list[int]:
    """A bool array (edges, operations) as one integer per edge: bit k is operation k."""
    return (mask @ (1 << np.arange(mask.shape[1]))).tolist()


def as_arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: t.detach().cpu().double().numpy() for name, t in tensors.items()}


# ---- arguments ------------------------------------------------------------------------------------------------------


def check(args: argparse.Namespace, device: torch.device) -> None:
    """UserError for arguments that make no sense together."""
    if args.dss_max_ops < genotypes.EDGES:
        raise UserError(f"--dss_max_ops {args.dss_max_ops}: at least {genotypes.EDGES}, one operation per edge")
    if args.tau_min > args.tau_max:
        raise UserError(f"--tau_min {args.tau_min} is larger than --tau_max {args.tau_max}: tau falls over the epochs")
    engine.check_common(args, device)
    if args.arch:
        try:
            genotypes.check_name(args.arch)
        except ValueError as error:
            raise UserError(str(error)) from None


def get_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(__doc__)
    add = parser.add_argument_group("dynamic subspace").add_argument
    add("--space_config", default="static", choices=list(genotypes.SPACES), metavar="SPACE",
        help="static, shrink, expand or imagenet (also space_config_NAME)")  # fmt: skip
    add("--dss_max_ops", type=int, default=28, metavar="L", help="active operations per cell type")
    add("--dss_freq", type=number(int, 1), default=30, metavar="M", help="steps between two subspaces")
    add("--rdss_prob", type=number(float, 0, 1), default=0.0, help="probability of a random subspace")
    add("--confidence", type=number(float, 0), default=1.44, metavar="c", help="of the UCB")
    add("--begin", type=number(int, 0), default=0, metavar="EPOCH", help="random subspaces before it")
    add = parser.add_argument_group("architecture").add_argument
    add("--arch", metavar="NAME", help="record the result in genotypes.py under this name")
    add("--saliency_type", default="simple", choices=["simple", "all"], help="weights of operations")
    add("--no_norm", action="store_true", help="do not divide the weights of an edge by their sum")
    add("--gumbel", action="store_true", help="Gumbel softmax; tau falls from tau_max to tau_min")
    add("--tau_min", type=number(float, 1e-3), default=0.1)
    add("--tau_max", type=number(float, 1e-3), default=10.0)
    add_search_arguments(parser)
    engine.add_common_arguments(parser)
    return parser


if __name__ == "__main__":
    utils.cli(main, get_parser())
