"""What --flops_weight does: multiply-adds of the cells found, and accuracy of those retrained, beside random cells.

    python -m experiments.flops logs/flops --out figure     # keeps what docs/own-images.md has trained, and prints
    python -m experiments.flops                             # prints what figure/data keeps, and draws it

The folder has one of shell/study.sh for each LAMBDA, and one of random cells.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

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
    multiply_adds: float  # of the network that retraining builds of it, millions
    test_acc: float | None = None  # percent, after the last epoch; None: not retrained
    weight: float | None = None


def collect(folder: Path) -> list[Found]:
    """What the finished searches found, by weight, random cells last."""
    retrained = sorted(path.parent for path in folder.glob("*/*/retrain/finished"))
    if not retrained:
        raise cli.UserError(f"{folder}: no finished retraining; expected the folders of docs/own-images.md")
    shape, found = read_json(retrained[0] / "args.json")["args"], []
    for path in sorted(path.parents[1] for path in folder.glob("*/*/search/finished")):
        method, _, seed = path.name.rpartition("-")
        weight = None if method == "random" else read_json(path / "search/args.json")["args"]["flops_weight"]
        genotype = genotypes.load(path / "search")
        with torch.device("meta"):
            network = model.network_for(False, shape["init_channels"], 10, shape["layers"], False, genotype)
        cost = model.count_multiply_adds(network, shape["image_size"]) / 1e6
        history = read_json(path / "retrain/history.jsonl") if path / "retrain" in retrained else [{"test_acc": None}]
        found.append(Found(int(seed), str(genotype), cost, history[-1]["test_acc"], weight))
    return sorted(found, key=lambda one: (one.weight is None, one.weight or 0, one.seed))


def by_weight(cells: list[Found]) -> dict[float | None, tuple[np.ndarray, np.ndarray]]:
    """Of each weight the multiply-adds of all cells; and of those retrained multiply-adds and accuracies, 2 x cells."""
    groups = common.group(cells, "weight").items()
    pairs = {
        weight: np.array([(one.multiply_adds, one.test_acc) for one in group], float).T for weight, group in groups
    }
    return {weight: (values[0], values[:, ~np.isnan(values[1])]) for weight, values in pairs.items()}


def table_of_weights(cells: list[Found]) -> str:
    """A row for each weight: means, and standard deviations over the seeds."""
    rows = [["--flops_weight", "cells", "multiply-adds M", "retrained", "test accuracy %"]]
    for weight, (costs, retrained) in by_weight(cells).items():
        name, accuracies = "random cells" if weight is None else f"{weight:g}", retrained[1]
        accuracy = common.spread(accuracies) if len(accuracies) else "–"
        rows.append([name, str(len(costs)), common.spread(costs), str(len(accuracies)), accuracy])
    return tables.markdown_table(rows)


def trend(cells: list[Found]) -> str:
    """How surely multiply-adds fall with the weight: Kendall's rank correlation (tau-b) over the searches."""
    searched = [one for one in cells if one.weight is not None]
    tau, p = stats.kendalltau([one.weight for one in searched], [one.multiply_adds for one in searched])
    return (
        f"Kendall's tau of weight and multiply-adds over {len(searched)} searches: {tau:+.2f} (two-sided p = {p:.1g})"
    )


def draw(cells: list[Found]) -> Figure:
    """A point for each retrained cell; the means of the weights, joined: costs of all cells, accuracies of those."""
    figure, groups = Figure((3.3, 2.4), layout="constrained"), by_weight(cells)
    axis, color, means = figure.subplots(), COLORS["ddsas"], []
    for weight, (costs, retrained) in groups.items():
        style = {"color": COLORS["random"] if weight is None else color, "markersize": 3}
        axis.plot(*retrained, "o", alpha=0.6, markeredgewidth=0, **style)
        if weight is not None and retrained.size:
            means.append((costs.mean(), retrained[1].mean()))
            axis.annotate(f"{weight:g}", means[-1], (3, 3), textcoords="offset points")
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
    print(f"{table_of_weights(cells)}\n\n{trend(cells)}")
    common.save(lambda: draw(cells), out / "flops")


def get_parser() -> cli.Parser:
    return common.get_parser(__doc__, "with a folder for each weight")


if __name__ == "__main__":
    cli.run_script(main, get_parser())
