"""What --flops_weight does: accuracy of the cells found against multiply-adds, beside random cells.

    python -m experiments.flops logs/flops --out figure     # keeps what docs/own-images.md has trained, and prints
    python -m experiments.flops                             # prints what figure/data keeps, and draws it

The folder has one of shell/study.sh for each LAMBDA, and one of random cells.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

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
        args, genotype, network, accuracy = common.read_retraining(path / "retrain")
        method, _, seed = path.name.rpartition("-")
        weight = None if method == "random" else read_json(path / "search/args.json")["args"]["flops_weight"]
        cost = model.count_multiply_adds(network, args["image_size"]) / 1e6
        found.append(Found(int(seed), str(genotype), cost, accuracy, weight))
    return sorted(found, key=lambda one: (one.weight is None, one.weight or 0, one.seed))


def by_weight(cells: list[Found]) -> dict[float | None, np.ndarray]:
    """Of each weight multiply-adds and accuracies, 2 x cells."""
    groups = common.group(cells, "weight").items()
    return {weight: np.array([(one.multiply_adds, one.test_acc) for one in group]).T for weight, group in groups}


def table_of_weights(cells: list[Found]) -> str:
    """A row for each weight: means, and standard deviations over the seeds."""
    rows = [["--flops_weight", "cells", "multiply-adds M", "test accuracy %"]]
    for weight, values in by_weight(cells).items():
        name = "random cells" if weight is None else f"{weight:g}"
        rows.append([name, str(values.shape[1]), *map(common.spread, values)])
    return tables.markdown_table(rows)


def draw(cells: list[Found]) -> Figure:
    """A point for each cell, and the means of the weights, joined."""
    figure, groups = Figure((3.3, 2.4), layout="constrained"), by_weight(cells)
    axis, color = figure.subplots(), COLORS["ddsas"]
    for weight, values in groups.items():
        style = {"color": COLORS["random"] if weight is None else color, "markersize": 3}
        axis.plot(*values, "o", alpha=0.6, markeredgewidth=0, **style)
        if weight is not None:
            axis.annotate(f"{weight:g}", values.mean(1), (3, 3), textcoords="offset points")
    means = [values.mean(1) for weight, values in groups.items() if weight is not None]
    axis.plot(*np.transpose(means), "-D", color=color, markersize=4, linewidth=1, label="means, with their weights")
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


def get_parser() -> cli.Parser:
    return common.get_parser(__doc__, "with a folder for each weight")


if __name__ == "__main__":
    cli.run_script(main, get_parser())
