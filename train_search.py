"""P-DARTS: search in three stages over ever deeper supernets and ever fewer operations (Chen et al., ICCV 2019).

    python train_search.py --tmp_data_dir .data --save logs/ --add_layers 6 --add_layers 12 \\
        --dropout_rate 0.1 --dropout_rate 0.4 --dropout_rate 0.7 --note try       # CIFAR-10, the published settings
    python train_search.py ... --cifar100                                         # or --dataset fashion_mini, ...
    python train_search.py --resume logs/search-try-TIME                          # go on with a run that was stopped

The run folder is that of search.py; genotypes.txt beside genotype.txt has the cells with ever fewer skip connections.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import engine
import utils
from bilevel import BilevelSearch, add_search_arguments
from genotypes import CELL_TYPES, EDGE_LIST, EDGES, NODES, PRIMITIVES, Genotype, count_skips
from lib import cli, data, distributed
from lib.checkpoints import write_whole
from lib.cli import UserError, number
from lib.runs import create_run, resume_run, retrain_command
from methods import entropy
from model_search import Cell, Network

STAGES = 3
VALIDATED = 5  # epochs at the end of each stage

Candidates = dict[str, list[list[str]]]  # cell type -> for each of the 14 edges its primitives that are still on
Alphas = dict[str, np.ndarray]  # cell type -> 14 x n, for the n candidates of each edge
Table = list[dict[str, float]]  # for each of the 14 edges of a cell: primitive -> probability


def main(args: argparse.Namespace) -> Path:
    """Run the three stages that the arguments describe; returns the run folder."""
    device = utils.device_of(args)
    distributed.start_distributed(device)
    engine.prefix_save(args, "search")
    resumed = resume_run(args, "train_search.py", may_change=())
    check(args, device)
    utils.set_seed(args.seed)
    utils.cuda_settings(args.tf32)
    train, valid, info = data.search_data(**engine.data_arguments(args, device), train_portion=args.train_portion)
    search = ProgressiveSearch(args, info, valid, device)
    run = resumed or create_run(args, "train_search.py", "search")
    search.restore(run)
    run.log(
        f"{args.dataset}: {train.num_images} images to train the weights, {valid.num_images} for the architecture;"
        f" {STAGES} stages of {args.epochs} epochs; {device}"
    )
    search.fit(STAGES * args.epochs, train, run)
    genotype = search.restrict()
    run.genotype(str(genotype))
    run.log(f"genotype: {genotype}")
    run.log(f"retrain it with: {retrain_command('train_search.py', vars(args), run.folder)}")
    run.close()
    return run.folder


class ProgressiveSearch(BilevelSearch):
    """A search of P-DARTS: also the candidates that are still on. ``epoch`` counts through all stages.

    A stage has a supernet, alpha and optimizers of its own.
    """

    def __init__(
        self, args: argparse.Namespace, info: data.Info, valid: data.Loader | None, device: torch.device
    ) -> None:
        super().__init__(args, valid, device)
        self.info = info
        self.candidates: Candidates = {cell: [list(PRIMITIVES)] * EDGES for cell in CELL_TYPES}
        self.build_stage()

    # ---- the loop of one epoch ----

    def train_one_epoch(self, train: data.Loader) -> None:
        """For each batch train alpha, except in the first epochs of a stage, then the weights."""
        valid_batches = self.valid.again_and_again(self.epoch, self.step)
        for x, y in self.steps(train):
            arch_norm = None
            if self.trains_architecture:
                arch_norm = self.architecture_step((x, y), next(valid_batches))
            loss, logits, norm = self.weight_step(x, y)
            self.end_step(loss, logits, y, norm, arch_norm)

    @property
    def trains_architecture(self) -> bool:
        """False in the first epochs of a stage, which train the weights alone."""
        return self.epoch_of_stage >= self.args.eps_no_arch

    def operations(self, noise: bool = True) -> tuple[dict[str, Tensor], None]:
        """softmax(alpha) over the candidates of each edge; all of them are active at every step."""
        return {cell: alpha.softmax(dim=-1) for cell, alpha in self.architecture.items()}, None

    # ---- stages ----

    @property
    def stage(self) -> int:
        return min(self.epoch // self.args.epochs, STAGES - 1)

    @property
    def epoch_of_stage(self) -> int:
        return self.epoch - self.stage * self.args.epochs

    def build_stage(self) -> None:
        """The supernet of this stage with the ops that are still on, fresh alpha, 1e-3 * N(0, 1), fresh optimizers."""
        args, stage = self.args, self.stage
        channels = args.init_channels + [0, *values_of(args.add_width, [0, 0])][stage]
        layers = args.layers + [0, *values_of(args.add_layers, [6, 12])][stage]
        stem = engine.stem_for(self.info, args.dataset)
        network = Network(channels, self.info.num_classes, layers, self.candidates, stem)
        num_ops = len(self.candidates["normal"][0])
        self.take(network, nn.ParameterDict({cell: 1e-3 * torch.randn(EDGES, num_ops) for cell in CELL_TYPES}), True)

    def next_epoch(self) -> None:
        """Go on to the next epoch; after the last of a stage drop candidates and build the next stage's supernet."""
        super().next_epoch()
        if self.epoch_of_stage == 0:
            kept = self.args.num_to_keep[self.stage - 1]
            num_drop = self.architecture["normal"].shape[1] - kept
            self.candidates = drop_candidates(self.candidates, self.alphas(), num_drop)
            self.build_stage()

    def alphas(self) -> Alphas:
        return {cell: alpha.detach().cpu().numpy() for cell, alpha in self.architecture.items()}

    # ---- before and after an epoch ----

    def start_epoch(self) -> None:
        """Set the learning rate, a cosine over the stage, and the dropout of the skip connections."""
        args, epoch = self.args, self.epoch_of_stage
        lr = engine.cosine_rate(epoch, args.epochs, args.learning_rate, args.learning_rate_min)
        engine.set_learning_rate(self.optimizer, lr, epoch, args)
        rate = values_of(args.dropout_rate, STAGES * [0.0])[self.stage]
        self.dropout = self.network.skip_dropout = skip_dropout(epoch, args.epochs, args.eps_no_arch, rate)
        if epoch == self.step == 0:
            self.run.log(
                f"stage {self.stage + 1} of {STAGES}, epochs {self.epoch} to {self.epoch + args.epochs - 1}:"
                f" {len(self.network.cells)} cells, {self.architecture['normal'].shape[1]} operations per edge,"
                f" dropout {rate} behind skip connections"
            )

    def finish_epoch(self) -> dict:
        """Validate in the last epochs of a stage, log, write the current genotype; returns the line of history."""
        run = self.run
        metrics = self.validate() if self.epoch_of_stage >= self.args.epochs - VALIDATED else None
        distributed.assert_same(dict(self.architecture.named_parameters()))
        train, arch = (average.read() for average in self.averages.values())
        genotype = derive(self.candidates, self.alphas())
        run.genotype(str(genotype))
        text = f"; validation loss {metrics.loss:.4f}, accuracy {metrics.top1:.2f} %" if metrics else ""
        run.log(f"epoch {self.epoch}: train loss {train.loss:.4f}, accuracy {train.top1:.2f} %{text}")
        run.log(f"epoch {self.epoch}: {genotype}")
        return {
            "stage": self.stage,
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "arch_lr": self.arch_optimizer.param_groups[0]["lr"],
            "dropout": self.dropout,
            "train_loss": train.loss,
            "train_acc": train.top1,
            "arch_loss": arch.loss if self.trains_architecture else None,
            "valid_loss": metrics and metrics.loss,
            "valid_acc": metrics and metrics.top1,
            "candidates": self.candidates,
            "probabilities": {cell: p.tolist() for cell, p in self.operations()[0].items()},
            "genotype": str(genotype),
            "alpha_entropy": {cell: entropy(alpha) for cell, alpha in self.architecture.items()},
        }

    def restrict(self) -> Genotype:
        """Write the genotypes with ever fewer skip connections to genotypes.txt; returns the first with few enough."""
        run, most = self.run, self.args.max_skips
        genotype, alphas = derive(self.candidates, self.alphas()), self.alphas()
        run.log(f"end of stage {STAGES}: 1 operation per edge, two edges per node")
        lines, best = [f"unrestricted {genotype}"], genotype
        for M, restricted in restrict_skips(self.candidates, alphas).items():
            lines.append(f"M={M} {restricted}")
            if count_skips(best) > most:
                best = restricted
        for line in lines:
            run.log(line)
        if count_skips(best) > most:
            run.log(f"warning: the candidates allow no fewer than {count_skips(best)} skip connections", always=True)
        if distributed.is_main():
            write_whole(run.folder / "genotypes.txt", "\n".join(lines) + "\n")
        return best

    # ---- what a checkpoint holds, besides what every search has ----

    def state_dict(self) -> dict:
        return super().state_dict() | {"candidates": self.candidates}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.candidates = state["epoch"], state["candidates"]
        self.build_stage()
        super().load_state_dict(state)


def skip_dropout(epoch: int, epochs: int, eps_no_arch: int, rate: float) -> float:
    """Probability of the dropout behind skip connections in an epoch of a stage (P-DARTS, section 3.3).

    It falls linearly while only weights train, and is reset and falls exponentially afterwards.
    """
    if epoch < eps_no_arch:
        return rate * (epochs - epoch - 1) / epochs
    return rate * math.exp(-(epoch - eps_no_arch) * 0.2)


# ---- From alpha to a genotype: pure functions. Of equal probabilities the earlier one always goes first. ----


def drop_candidates(candidates: Candidates, alphas: Alphas, num_drop: int, drop_none_first: bool = False) -> Candidates:
    """The candidates without the ``num_drop`` of lowest softmax(alpha) on each edge (P-DARTS, section 3.2).

    With ``drop_none_first``, as at the end of the last stage, `none` goes first where it is still on and counts as one.
    ValueError if an edge would keep no operation.
    """
    kept = {}
    for cell in CELL_TYPES:
        kept[cell] = []
        for names, p in zip(candidates[cell], probabilities(candidates[cell], alphas[cell]), strict=True):
            if not 0 <= num_drop < len(names):
                raise ValueError(f"cannot drop {num_drop} of the {len(names)} candidates of an edge: {names}")
            dropped = weakest_first(p, drop_none_first)[:num_drop]
            kept[cell].append([name for name in names if name not in dropped])
    return kept


def derive(candidates: Candidates, alphas: Alphas) -> Genotype:
    """The genotype at the end of the last stage: one op per edge, two edges per node, in edge order.

    ValueError if a chosen edge has no candidate besides `none`.
    """
    return Genotype(
        normal=derive_cell(probabilities(candidates["normal"], alphas["normal"], none=0)),
        normal_concat=range(2, 2 + NODES),
        reduce=derive_cell(probabilities(candidates["reduce"], alphas["reduce"], none=0)),
        reduce_concat=range(2, 2 + NODES),
    )


def restrict_skips(candidates: Candidates, alphas: Alphas) -> dict[int, Genotype]:
    """The genotypes with at most M skip connections in the normal cell, for each M = 8, 7, ..., 0 that forced a change.

    While there are too many, the least probable of the chosen ones has its probability set to 0 and the cell is derived
    again (search space regularisation, P-DARTS section 3.3). Arguments are those of the last stage, as for ``derive``.
    An M is left out if the candidates cannot satisfy it.
    """
    table = probabilities(candidates["normal"], alphas["normal"], none=0)
    genotype, restricted = derive(candidates, alphas), {}
    for most in range(2 * NODES, -1, -1):
        while count_skips(genotype) > most:
            skips = [table[e] for e, op in chosen_edges(table) if op == "skip_connect" and table[e][op] > 0]
            if not skips:  # what is left are edges that have no other candidate
                return restricted
            min(skips, key=lambda p: p["skip_connect"])["skip_connect"] = 0.0
            genotype = genotype._replace(normal=derive_cell(table))
            if count_skips(genotype) <= most:
                restricted[most] = genotype
    return restricted


def probabilities(edges: list[list[str]], alphas: np.ndarray, none: float | None = None) -> Table:
    """softmax(alpha) over the candidates of each edge of a cell; the probability of `none` is overwritten if given.

    In float32, as the search computes it, whatever the precision of ``alphas``.
    """
    rows = torch.softmax(torch.as_tensor(alphas, dtype=torch.float32), dim=-1).tolist()
    table = [dict(zip(names, row, strict=True)) for names, row in zip(edges, rows, strict=True)]
    return table if none is None else [{op: none if op == "none" else p for op, p in edge.items()} for edge in table]


def weakest_first(edge: dict[str, float], none_first: bool) -> list[str]:
    """The candidates of an edge in the order in which they are dropped."""
    return sorted(edge, key=lambda op: (not (none_first and op == "none"), edge[op]))


def chosen_edges(table: Table) -> list[tuple[int, str]]:
    """(edge, op) of a discovered cell in edge order: two edges per node, with the last op standing on each.

    The edges are those of highest score: the largest probability, `none` being 0 in ``table``.
    """
    chosen = []
    for edges in Cell.incoming:
        best = sorted(edges, key=lambda e: max(table[e].values()))[-2:]
        chosen += [(e, weakest_first(table[e], none_first=True)[-1]) for e in sorted(best)]
    return chosen


def derive_cell(table: Table) -> list[tuple[str, int]]:
    """The (op, source) pairs of a genotype."""
    edges = chosen_edges(table)
    if any(op == "none" for _, op in edges):
        raise ValueError("an edge has no candidate besides none: keep at least two operations until the end")
    return [(op, EDGE_LIST[edge][1]) for edge, op in edges]


# ---- arguments ------------------------------------------------------------------------------------------------------


def values_of(given: list | None, default: list) -> list:
    """The values of a repeatable flag, or its default where it was not given."""
    return default if given is None else given


def check(args: argparse.Namespace, device: torch.device) -> None:
    """UserError for arguments that make no sense together."""
    for flag, wanted, what in (
        ("add_layers", STAGES - 1, "one for each stage after the first"),
        ("add_width", STAGES - 1, "one for each stage after the first"),
        ("dropout_rate", STAGES, "one for each stage"),
    ):
        given = getattr(args, flag)
        if given is not None and len(given) != wanted:
            raise UserError(f"--{flag} {' '.join(map(str, given))}: expected {wanted} values, {what}; got {len(given)}")
    kept = [len(PRIMITIVES), *args.num_to_keep]
    if any(before <= after for before, after in itertools.pairwise(kept)) or kept[-1] != 1:
        raise UserError(
            f"--num_to_keep {' '.join(map(str, args.num_to_keep))}: the operations left on an edge after each stage"
            f" must become fewer, from {len(PRIMITIVES)} down to 1, as 5 3 1"
        )
    if args.epochs <= args.eps_no_arch:
        raise UserError(
            f"--epochs {args.epochs}: a stage needs more than the --eps_no_arch {args.eps_no_arch} epochs that train"
            " weights alone, or alpha is never trained"
        )
    engine.check_common(args, device)


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("stages").add_argument
    add("--add_layers", action="append", type=number(int, 0, 1000), metavar="N",
        help="cells more than --layers; given twice, for stages 2 and 3 (or not at all: 6 12)")  # fmt: skip
    add("--add_width", action="append", type=number(int, 0), metavar="N",
        help="channels more than --init_channels; given twice, for stages 2 and 3 (or not at all: 0 0)")  # fmt: skip
    add("--dropout_rate", action="append", type=number(float, 0, below=1), metavar="P",
        help="dropout behind skip connections; given three times, for each stage (or not at all: 0 0 0)")  # fmt: skip
    add("--num_to_keep", nargs=STAGES, type=number(int, 1), default=[5, 3, 1], metavar="N",
        help="operations left on an edge at the end of each stage")  # fmt: skip
    add("--eps_no_arch", type=number(int, 0), default=10, metavar="EPOCHS", help="that train weights alone, per stage")
    add("--max_skips", type=number(int, 0, 2 * NODES), default=2, metavar="M",
        help="most skip connections in the normal cell of the recorded genotype")  # fmt: skip
    add_search_arguments(parser)
    engine.add_common_arguments(parser)
    engine.add_cifar100_argument(parser)
    parser.refuse(
        "this is P-DARTS' search; DDSAS' is search.py", "--space_config", "--dss_max_ops", "--dss_freq", "--rdss_prob",
        "--confidence", "--begin", "--saliency_type", "--no_norm", "--gumbel", "--tau_min", "--tau_max", "--method",
    )  # fmt: skip
    parser.ignore("--local_rank", "--local-rank")  # of torch.distributed.launch
    parser.set_defaults(
        save="logs/",  # see engine.prefix_save
        note="try",
        seed=2,
        epochs=25,  # per stage
        batch_size=96,
        layers=5,
        learning_rate_min=0.0,
        arch_learning_rate=6e-4,
        arch_grad_clip=5.0,
        drop_path_prob=0.3,
    )
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
