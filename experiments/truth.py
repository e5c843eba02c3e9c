"""Truth on the images that were searched on: cells of NAS-Bench-201's space, all trained on fashion_mini by one protocol.

    bash shell/truth.sh --table FILE.csv                          # trains them; two hours of two cores
    python -m experiments.truth --table FILE.csv --list           # its cells: NAME ARCHITECTURE, one a line
    python -m experiments.truth logs/truth --out figure           # keeps what has finished, and prints the results
    python -m experiments.truth                                   # prints them from figure/data

The cells are one drawn from each of 60 equal parts of the table, by CIFAR-10 accuracy, and the last ones of all searches.
Of the drawn ones only the part is kept, which is their order on CIFAR-10.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

import genotypes
import nasbench201
import visualize
from experiments import common, figure1
from lib import cli

PARTS = 60


@dataclass
class Trained:
    """A cell, its test accuracy (percent) on fashion_mini after the last epoch, and what the training took."""

    cell: str
    test_acc: float
    minutes: float  # processor time where it is known, else wall clock
    part: int | None = None  # of the table, 0 is the best; None: a search's cell


def cells_of(table: nasbench201.Table, parts: int, searches: list[figure1.Search]) -> dict[str, str]:
    """The cells to train by name: part-K drawn from the K-th part of the table with a fixed seed, found-DIGITS."""
    every = ["".join(ops) for ops in itertools.product("01234", repeat=len(nasbench201.EDGE_LIST))]
    order = np.argsort(-figure1.look_up(table, every)[1][:, 0], kind="stable")
    rng = np.random.default_rng(0)
    drawn = {f"part-{k}": every[rng.choice(part)] for k, part in enumerate(np.array_split(order, parts))}
    rows = figure1.last_cells(figure1.by_method(searches)).values()
    return drawn | {f"found-{cell}": cell for cell in sorted({cell for row in rows for cell in row})}


def collect(folder: Path) -> list[Trained]:
    """The finished trainings of a folder."""
    found = []
    for path in sorted(path.parent for path in folder.glob("*-*/finished")):
        kind, _, number = path.name.partition("-")
        history, timing = (visualize.read_json(path / f"{name}.jsonl") for name in ("history", "timing"))
        minutes = sum(line.get("cpu_seconds") or line["seconds"] for line in timing) / 60
        cell = figure1.digits(str(genotypes.load(path / "genotype.txt")))
        part = int(number) if kind == "part" else None
        found.append(Trained(cell, history[-1]["test_acc"], round(minutes, 2), part))
    return found


def rank_correlation(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    """Spearman's, along an axis."""
    a, b = (stats.rankdata(values, axis=axis) for values in (first, second))
    a, b = a - a.mean(axis, keepdims=True), b - b.mean(axis, keepdims=True)
    return (a * b).sum(axis) / np.sqrt((a**2).sum(axis) * (b**2).sum(axis))


def report(trained: list[Trained], searches: list[figure1.Search]) -> str:
    """The rank correlation, and the regret of each method beside that of random search at its cost."""
    drawn = sorted((one for one in trained if one.part is not None), key=lambda one: one.part)
    accuracy = np.array([one.test_acc for one in drawn])
    pair = accuracy, -np.arange(len(drawn))
    text = [f"{len(drawn)} drawn cells, {len(trained) - len(drawn)} found ones"]
    if len(drawn) > 2:
        options = {"n_resamples": common.RESAMPLES, "method": "percentile", "paired": True}
        options |= {"rng": np.random.default_rng(0), "batch": 1000}
        low, high = stats.bootstrap(pair, rank_correlation, **options).confidence_interval
        text.append(f"rank correlation with CIFAR-10: {rank_correlation(*pair):.2f}, 95 % interval [{low:.2f}, {high:.2f}]")
    known = {one.cell: one.test_acc for one in trained}
    best, minutes = max(known.values()), float(np.median([one.minutes for one in trained]))
    rows = [["method", "seeds", "regret on fashion_mini", "CPU min", "random search at that cost"]]
    groups = figure1.by_method(searches)
    for name, cells in figure1.last_cells(groups).items():
        regrets = np.array([best - known[cell] for cell in cells if cell in known])
        if len(regrets) == len(cells) and name in groups:
            cost = figure1.cpu_minutes(groups[name])
            count = max(1, round(cost / minutes))
            by_chance = f"{best - expected_best(accuracy, count):.2f} ({count} cells)" if len(drawn) else "–"
            spread = f" ± {regrets.std(ddof=1):.2f}" if len(regrets) > 1 else ""
            rows.append([name, str(len(cells)), f"{regrets.mean():.2f}{spread}", f"{cost:.1f}", by_chance])
    text += ["", common.markdown_table(rows), f"\nregret: points below the best of all these cells, {best:.2f} %"]
    return "\n".join([*text, f"random search: the best of so many drawn cells, {minutes:.1f} minutes each (median)"])


def expected_best(accuracies: np.ndarray, count: int) -> float:
    """The mean of the best of ``count`` draws with replacement: the k-th of n is it with (k/n)^m - ((k-1)/n)^m."""
    shares = np.linspace(0, 1, len(accuracies) + 1)
    return float(np.sort(accuracies) @ np.diff(shares**count))


def main(args: argparse.Namespace) -> None:
    """List the cells, or keep what a folder has, and print."""
    searches = common.read_lines(common.FOLDER / "data/figure1.jsonl", figure1.Search)
    if args.list:
        table = nasbench201.load_table(args.table)
        if table is None:
            raise cli.UserError(nasbench201.NO_TABLE)
        for name, cell in cells_of(table, args.parts, searches).items():
            print(name, figure1.architecture_string(cell))
        return
    out = common.folder_for([args.folder] if args.folder else [], args.out)
    if args.folder:
        common.write_lines(out / "data/truth.jsonl", collect(args.folder))
    trained = common.read_lines(out / "data/truth.jsonl", Trained)
    if not trained:
        raise cli.UserError(f"nothing kept in {out / 'data'}: give the folder of bash shell/truth.sh")
    print(report(trained, searches))


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="--out of shell/truth.sh")
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="accuracies, instead of analog-nasbench's")
    parser.add_argument("--list", action="store_true", help="print the cells to train")
    parser.add_argument("--parts", type=cli.number(int, 1, 15_625), default=PARTS, help="cells that are drawn")
    common.add_out(parser, "nothing")
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
