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
import torch.nn.functional as F
from torch import Tensor, nn

import costs
import fast
import utils
import visualize
from architect import Architect
from genotypes import CELL_TYPES, EDGE_LIST, EDGES, NODES, PRIMITIVES, Genotype, count_skips
from lib import cli, data
from lib.cli import UserError
from lib.distributed import assert_same, share_buffers
from lib.run_folder import retrain_command
from lib.runs import Run
from methods import entropy
from model_search import Network
from space import INCOMING
from utils import Average, Metrics

STAGES = 3
VALIDATED = 4  # epochs at the end of each stage

Candidates = dict[str, list[list[str]]]  # cell type -> for each of the 14 edges its primitives that are still on
Alphas = dict[str, np.ndarray]  # cell type -> 14 x n, for the n candidates of each edge
Table = list[dict[str, float]]  # for each of the 14 edges of a cell: primitive -> probability


def main(args: argparse.Namespace) -> Path:
    """Run the three stages that the arguments describe; returns the run folder."""
    device = utils.choose_device(args)
    cli.prefix_save(args, "search")
    run = Run(args, "train_search.py", "search", STAGES)
    check(args)
    utils.set_seed(args.seed)
    utils.allow_tf32(args.tf32)
    train, valid, info = data.search_data(**cli.data_arguments(args, device), train_portion=args.train_portion)
    stem = utils.stem_for(info, args.dataset, args.init_channels)
    candidates: Candidates = run.saved.get("candidates") or {cell: [list(PRIMITIVES)] * EDGES for cell in CELL_TYPES}

    for stage in range(run.saved.get("stage", 0), STAGES):
        channels = args.init_channels + [0, *(args.add_width or [0, 0])][stage]
        layers = args.layers + [0, *(args.add_layers or [6, 12])][stage]
        num_ops = len(candidates["normal"][0])
        network = Network(channels, info.num_classes, layers, candidates, stem).to(device)
        network.checkpoint_cells = args.checkpoint_cells
        alphas = nn.ParameterDict({cell: 1e-3 * torch.randn(EDGES, num_ops) for cell in CELL_TYPES}).to(device)
        optimizer = utils.sgd(network, args)
        architect = Architect(network, alphas, optimizer, args, device)
        meter = Average(device)
        kept = {"state_dict": network, "architecture": alphas, "optimizer": optimizer, "architect": architect}
        facts = {"stage": stage, "candidates": candidates, "data_hash": info.data_hash}
        run.keep(kept | {"meter": meter}, facts)
        rate = (args.dropout_rate or STAGES * [0.0])[stage]
        if stage == 0:
            numbers = f"{train.num_images} images to train the weights, {valid.num_images} for the architecture"
            run.log(f"{args.dataset}: {numbers}; {STAGES} stages of {args.epochs} epochs; {device}")
        run.log(
            f"stage {stage + 1} of {STAGES}, epochs {stage * args.epochs} to {(stage + 1) * args.epochs - 1}:"
            f" {layers} cells, {num_ops} operations per edge, dropout {rate} behind skip connections"
        )
        flops = costs.MultiplyAdds(network, info.image_size)
        fast.use(network, run.log, args.plain, args.checkpoint_cells)  # may exchange network.forward for a faster one

        for epoch in range(run.epoch - stage * args.epochs, args.epochs):  # of this stage
            lr = utils.cosine_rate(epoch, args.epochs, args.learning_rate, args.learning_rate_min)
            utils.set_learning_rate(optimizer, utils.warmed_up(lr, epoch, args))
            network.skip_dropout = skip_dropout(epoch, args.epochs, args.eps_no_arch, rate)
            train_one_epoch(epoch, run, train, valid, network, alphas, optimizer, architect, meter, flops)

            validated = validate(network, alphas, valid, args) if args.epochs - epoch <= VALIDATED else None
            assert_same(dict(alphas.named_parameters()))
            trained, architecture = meter.read(), architect.meter.read()
            meter.reset(), architect.meter.reset()
            genotype = derive(candidates, as_arrays(alphas))
            text = f"; validation loss {validated.loss:.4f}, accuracy {validated.top1:.2f} %" if validated else ""
            run.log(f"epoch {run.epoch}: train loss {trained.loss:.4f}, accuracy {trained.top1:.2f} %{text}")
            run.log(f"epoch {run.epoch}: {genotype}")
            run.write("genotype.txt", str(genotype))
            weights = softmax(alphas)
            line = {
                "stage": stage,
                "epoch": run.epoch,
                "lr": optimizer.param_groups[0]["lr"],
                "arch_lr": args.arch_learning_rate,
                "dropout": network.skip_dropout,
                "train_loss": trained.loss,
                "train_acc": trained.top1,
                "arch_loss": architecture.loss if architecture.count else None,
                "valid_loss": validated and validated.loss,
                "valid_acc": validated and validated.top1,
                "candidates": candidates,
                "probabilities": {cell: p.tolist() for cell, p in weights.items()},
                "alpha_entropy": {cell: entropy(alpha) for cell, alpha in alphas.items()},
                "genotype": str(genotype),
            }
            line |= flops.history(weights, genotype)
            run.end_epoch(line, lambda line=line: visualize.epoch_pictures(line))

        if stage < STAGES - 1:  # P-DARTS, section 3.2: the next stage is deeper and has fewer operations on each edge
            candidates = drop_candidates(candidates, as_arrays(alphas), num_ops - args.num_to_keep[stage])

    genotype = restrict(run, candidates, as_arrays(alphas), args.max_skips)
    run.write("genotype.txt", str(genotype))
    run.log(f"genotype: {genotype}")
    run.log(f"retrain it with: {retrain_command('train_search.py', vars(args), run.folder)}")
    run.close()
    return run.folder


def train_one_epoch(
    epoch: int,
    run: Run,
    train: data.Loader,
    valid: data.Loader,
    network: Network,
    alphas: nn.ParameterDict,
    optimizer: torch.optim.Optimizer,
    architect: Architect,
    meter: Average,
    flops: costs.MultiplyAdds,
) -> None:
    """For each batch a step of alpha, except in the first epochs of a stage, then one of the weights."""
    args = run.args
    network.train()
    valid_batches, arch_norm = valid.again_and_again(run.epoch, run.step), None
    for x, y in run.steps(train):
        if epoch >= args.eps_no_arch:
            weights = softmax(alphas)
            penalty = flops.penalty(weights, args.flops_weight)
            arch_norm = architect.step(weights, None, (x, y), next(valid_batches), penalty)
        with utils.autocast(args, x.device):
            with torch.no_grad():
                weights = softmax(alphas)
            logits = network(x, weights, None)
            loss = F.cross_entropy(logits, y)
        norm = utils.descend(loss, optimizer, args.grad_clip)
        meter.add(loss, logits, y)
        run.after_step(meter, loss, norm, arch_norm)


@torch.no_grad()
def validate(network: Network, alphas: nn.ParameterDict, valid: data.Loader, args: argparse.Namespace) -> Metrics:
    """Loss and accuracy of the supernet on the validation half, in evaluation mode."""
    share_buffers(network)
    network.eval()
    weights, device = softmax(alphas), next(network.parameters()).device
    with utils.autocast(args, device):
        return utils.measure_accuracy(lambda x: network(x, weights, None), valid, device)


def softmax(alphas: nn.ParameterDict) -> dict[str, Tensor]:
    """The weights of the operations: softmax(alpha) over the candidates of each edge."""
    return {cell: alpha.softmax(dim=-1) for cell, alpha in alphas.items()}


def as_arrays(alphas: nn.ParameterDict) -> Alphas:
    """alpha as numpy arrays."""
    return {cell: alpha.detach().cpu().numpy() for cell, alpha in alphas.items()}


def restrict(run: Run, candidates: Candidates, alphas: Alphas, most: int) -> Genotype:
    """Write the genotypes with ever fewer skip connections to genotypes.txt; returns the first with few enough."""
    best = derive(candidates, alphas)
    run.log(f"end of stage {STAGES}: 1 operation per edge, two edges per node")
    lines = [f"unrestricted {best}"]
    for M, restricted in restrict_skips(candidates, alphas).items():
        lines.append(f"M={M} {restricted}")
        if count_skips(best) > most:
            best = restricted
    for line in lines:
        run.log(line)
    if count_skips(best) > most:
        run.log(f"warning: the candidates allow no fewer than {count_skips(best)} skip connections", always=True)
    run.write("genotypes.txt", "\n".join(lines))
    return best


def skip_dropout(epoch: int, epochs: int, eps_no_arch: int, rate: float) -> float:
    """Probability of the dropout behind skip connections in an epoch of a stage (P-DARTS, section 3.3).

    It falls linearly while only weights train, and is reset and falls exponentially afterwards.
    """
    if epoch < eps_no_arch:
        return rate * (epochs - epoch - 1) / epochs
    return rate * math.exp(-(epoch - eps_no_arch) * 0.2)


# ---- From alpha to a genotype: pure functions. Of equal probabilities the earlier one always goes first. ----


def drop_candidates(candidates: Candidates, alphas: Alphas, num_drop: int) -> Candidates:
    """The candidates without the ``num_drop`` of lowest softmax(alpha) on each edge (P-DARTS, section 3.2).

    ValueError if an edge would keep no operation.
    """
    kept = {}
    for cell in CELL_TYPES:
        kept[cell] = []
        for names, p in zip(candidates[cell], probabilities(candidates[cell], alphas[cell]), strict=True):
            if not 0 <= num_drop < len(names):
                raise ValueError(f"cannot drop {num_drop} of the {len(names)} candidates of an edge: {names}")
            dropped = sorted(names, key=p.get)[:num_drop]
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


def chosen_edges(table: Table) -> list[tuple[int, str]]:
    """(edge, op) of a discovered cell in edge order: two edges per node, with the last op standing on each.

    The edges are those of highest score: the largest probability, `none` being 0 in ``table``.
    """
    chosen = []
    for edges in INCOMING:
        best = sorted(edges, key=lambda e: max(table[e].values()))[-2:]
        chosen += [(e, sorted(table[e], key=lambda op: (op != "none", table[e][op]))[-1]) for e in sorted(best)]
    return chosen


def derive_cell(table: Table) -> list[tuple[str, int]]:
    """The (op, source) pairs of a genotype."""
    edges = chosen_edges(table)
    if any(op == "none" for _, op in edges):
        raise ValueError("an edge has no candidate besides none: keep at least two operations until the end")
    return [(op, EDGE_LIST[edge][1]) for edge, op in edges]


# ---- arguments ------------------------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> None:
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


def get_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add = parser.flags("stages")
    text = "cells more than --layers; given twice, for stages 2 and 3 (or not at all: 6 12)"
    add("--add_layers", cli.number(int, 0, 1000), None, text, action="append", metavar="N")
    text = "channels more than --init_channels; given twice, for stages 2 and 3 (or not at all: 0 0)"
    add("--add_width", cli.COUNT, None, text, action="append", metavar="N")
    text = "dropout behind skip connections; given three times, for each stage (or not at all: 0 0 0)"
    add("--dropout_rate", cli.PROBABILITY, None, text, action="append", metavar="P")
    text = "operations left on an edge at the end of each stage"
    add("--num_to_keep", cli.SIZE, [5, 3, 1], text, nargs=STAGES, metavar="N")
    add("--eps_no_arch", cli.COUNT, 10, "that train weights alone, per stage", metavar="EPOCHS")
    text = "most skip connections in the normal cell of the recorded genotype"
    add("--max_skips", cli.number(int, 0, 2 * NODES), 2, text, metavar="M")
    cli.add_search_arguments(parser)
    cli.add_data_arguments(parser, list(data.INFO))
    cli.add_training_arguments(parser)
    cli.add_run_arguments(parser)
    cli.add_cifar100(parser)
    parser.refuse(
        "this is P-DARTS' search; DDSAS' is search.py",
        *("--space_config", "--dss_max_ops", "--dss_freq", "--rdss_prob", "--confidence", "--begin", "--saliency_type"),
        *("--no_norm", "--gumbel", "--tau_min", "--tau_max", "--method", "--arch"),
    )
    parser.ignore("--local_rank", "--local-rank")  # of the published script
    parser.set_defaults(save="logs/", note="try", seed=2)  # --save: see cli.prefix_save
    parser.set_defaults(epochs=25, batch_size=96, layers=5, arch_learning_rate=6e-4, arch_grad_clip=5.0)
    parser.set_defaults(drop_path_prob=0.3)  # published, and without effect: a supernet drops no path
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
