"""What --flops_weight does: accuracy of the cells found against multiply-adds, beside random cells.

    python -m experiments.flops logs/flops --out figure     # keeps what docs/own-images.md has trained, and prints
    python -m experiments.flops                             # prints what figure/data keeps, and draws it

The folder has one of shell/study.sh for each LAMBDA, and one of random cells.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import genotypes
import model
from experiments import common
from experiments.common import COLORS, read_json
from lib import cli, tables


@dataclass
class Found:
    """A cell of a search with this --flops_weight, or a random one (None)."""

    seed: int
    genotype: str
    multiply_adds: float  # of the retrained network, millions
    test_acc: float  # percent, after the last epoch
    weight: float | None = None


def collect(folder: Path) -> list[Found]:
    """The finished cells, by weight, random ones last."""
    found = []
    for path in sorted(path.parents[1] for path in folder.glob("*/*/retrain/finished")):
        args, history = read_json(path / "retrain/args.json")["args"], read_json(path / "retrain/history.jsonl")
        genotype = genotypes.load(str(path / "retrain"))
        with torch.device("meta"):
            network = model.network_for(False, args["init_channels"], 10, args["layers"], False, genotype)
        cost = model.count_multiply_adds(network, args["image_size"]) / 1e6
        weight = read_json(path / "search/args.json")["args"]["flops_weight"]
        random = path.name.startswith("random")
        seed = int(path.name.rpartition("-")[2])
        found.append(Found(seed, str(genotype), cost, history[-1]["test_acc"], None if random else weight))
    return sorted(found, key=lambda one: (one.weight is None, one.weight or 0, one.seed))


def by_weight(cells: list[Found]) -> dict[float | None, list[Found]]:
    return {weight: list(group) for weight, group in itertools.groupby(cells, key=lambda one: one.weight)}


def table_of_weights(cells: list[Found]) -> str:
    """A row for each weight: means, and standard deviations over the seeds."""
    rows = [["--flops_weight", "cells", "multiply-adds M", "test accuracy %"]]
    for weight, group in by_weight(cells).items():
        row = ["random cells" if weight is None else f"{weight:g}", str(len(group))]
        for values in ([one.multiply_adds for one in group], [one.test_acc for one in group]):
            row.append(
                f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
            )
        rows.append(row)
    return tables.markdown_table(rows)


def draw(cells: list[Found]) -> Figure:
    """A point for each cell, and the means of the weights, joined."""
    figure = Figure((3.3, 2.4), layout="constrained")
    axis, groups = figure.subplots(), by_weight(cells)
    for weight, group in groups.items():
        color = COLORS["random" if weight is None else "ddsas"]
        costs, accuracies = [one.multiply_adds for one in group], [one.test_acc for one in group]
        axis.plot(costs, accuracies, "o", color=color, markersize=3, alpha=0.6, markeredgewidth=0)
        if weight is not None:
            axis.annotate(f"{weight:g}", (np.mean(costs), np.mean(accuracies)), (3, 3), textcoords="offset points")
    means = [
        [np.mean([one.multiply_adds for one in g]), np.mean([one.test_acc for one in g])]
        for w, g in groups.items()
        if w is not None
    ]
    axis.plot(
        *np.transpose(means), "-D", color=COLORS["ddsas"], markersize=4, linewidth=1, label="means, with their weights"
    )
    axis.plot([], [], "o", color=COLORS["random"], markersize=3, label="random cells")
    axis.set(xlabel="multiply-adds of the retrained network (millions)", ylabel="test accuracy (%)")
    axis.legend(frameon=False, loc="lower right")
    return figure


def main(args: argparse.Namespace) -> None:
    """Keep what the folder tells if one is given, print the table, draw the figure."""
    out = args.out or args.folder or common.FOLDER
    if args.folder:
        common.write_lines(out / "data/flops.jsonl", collect(args.folder))
    cells = common.read_lines(out / "data/flops.jsonl", Found)
    print(table_of_weights(cells))
    common.save(lambda: draw(cells), out / "flops")


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="with a folder for each weight")
    common.add_out(parser)
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
