"""Truth on the images that were searched on: cells of NAS-Bench-201's space, all trained on fashion_mini alike.

    bash shell/truth.sh --table FILE.csv                    # trains them, and prints; two minutes a cell
    python -m experiments.truth logs/truth --out figure     # keeps what has finished in figure/data, and prints
    python -m experiments.truth                             # prints what figure/data keeps
    python -m experiments.truth --list --table FILE.csv     # the cells to train: NAME ARCHITECTURE, one a line

The cells are one drawn from each of 60 equal parts of the table, by CIFAR-10 accuracy, and the results of all searches.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from experiments import common, figure1
from experiments.common import read_json
from lib import cli, tables


@dataclass
class Trained:
    """A cell, its test accuracy (percent) on fashion_mini after the last epoch, and minutes of its training."""

    cell: str
    test_acc: float
    minutes: float  # of the processor where they are known, else by the clock
    part: int | None = None  # of the table, 0 is the best: the order on CIFAR-10; None: found by a search


def cells_to_train(table: tables.Table, parts: int, groups: dict[str, list[figure1.Search]]) -> dict[str, str]:
    """Architectures by name: part-K, drawn from the K-th part of the table with a fixed seed, and found-DIGITS."""
    order = sorted(table.accuracies, key=lambda text: -table.accuracies[text]["cifar10"])
    bounds, rng = np.linspace(0, len(order), parts + 1).astype(int), np.random.default_rng(0)
    drawn = {f"part-{k}": order[rng.integers(bounds[k], bounds[k + 1])] for k in range(parts)}
    found = {search.cells[-1] for searches in groups.values() for search in searches}
    return drawn | {f"found-{cell}": text for text in sorted(order) if (cell := figure1.digits(text)) in found}


def collect(folder: Path) -> list[Trained]:
    """The finished trainings of a folder."""
    found = []
    for path in sorted(path.parent for path in folder.glob("*-*/finished")):
        kind, _, number = path.name.partition("-")
        history, timing = (read_json(path / f"{name}.jsonl") for name in ("history", "timing"))
        minutes = sum(line.get("cpu_seconds") or line["seconds"] for line in timing) / 60
        cell = figure1.digits((path / "genotype.txt").read_text())
        found.append(Trained(cell, history[-1]["test_acc"], round(minutes, 2), int(number) if kind == "part" else None))
    return found


def rank_correlation(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    """Spearman's, along an axis."""
    a, b = (stats.zscore(stats.rankdata(values, axis=axis), axis=axis) for values in (first, second))
    return (a * b).mean(axis)


def report(trained: list[Trained], groups: dict[str, list[figure1.Search]]) -> str:
    """The rank correlation, and the regret of each method beside that of random search at its cost."""
    drawn = sorted((one for one in trained if one.part is not None), key=lambda one: one.part)
    accuracies, known = np.array([one.test_acc for one in drawn]), {one.cell: one.test_acc for one in trained}
    lines = [f"{len(drawn)} drawn cells, {len(trained) - len(drawn)} found ones, trained on fashion_mini"]
    if len(drawn) > 2:
        pair = accuracies, -np.arange(len(drawn))
        low, high = common.interval(pair, rank_correlation, paired=True)
        text = f"rank correlation of Fashion-MNIST with CIFAR-10, over the drawn ones: {rank_correlation(*pair):.2f}"
        lines.append(f"{text}, 95 % interval {low:.2f} to {high:.2f}")
    best, minutes = max(known.values()), float(np.median([one.minutes for one in trained]))
    rows = [["method", "seeds trained", "regret on Fashion-MNIST", "random search at that cost"]]
    whole = {}  # accuracies of the methods whose cells all are trained
    for method, searches in groups.items():
        found = np.array([known[one.cells[-1]] for one in searches if one.cells[-1] in known])
        if len(found) > 1 and drawn:
            count = figure1.trainings(searches, groups)
            chance = figure1.expected_best(accuracies, count)
            counted = f"{len(found)} of {len(searches)}"
            rows.append([method, counted, common.spread(best - found), f"{best - chance:.2f} ({count} cells)"])
            if len(found) == len(searches):
                whole[method] = found, chance
    lines += ["", tables.markdown_table(rows), "", f"regret: points below the best of all these cells, {best:.2f} %"]
    lines.append(f"random search: the best of so many drawn cells, {minutes:.1f} minutes each (median)")
    if "ddsas" in whole:
        ddsas, chance = whole.pop("ddsas")
        compared = [common.compare(f"ddsas – {method}", ddsas, found) for method, (found, _) in whole.items()]
        compared.append(common.compare("ddsas – random search at its cost", ddsas - chance))
        lines += ["", common.table_of(compared, figure1.PRIMARY), "", common.NOTES]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """List the cells to train; or keep what a folder has, and print."""
    groups = common.group(common.read_lines(common.FOLDER / "data/figure1.jsonl", figure1.Search), "method")
    if args.list:
        if not (table := tables.load_table(args.table)):
            raise cli.UserError(tables.NO_TABLE)
        for name, text in cells_to_train(table, args.parts, groups).items():
            print(name, text)
        return
    kept = (args.out or args.folder or common.FOLDER) / "data/truth.jsonl"
    if args.folder:
        common.write_lines(kept, collect(args.folder))
    print(report(common.read_lines(kept, Trained), groups))


def get_parser() -> cli.Parser:
    parser = common.get_parser(__doc__, "--out of shell/truth.sh")
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="accuracies, instead of analog-nasbench's")
    parser.add_argument("--list", action="store_true", help="print the cells to train")
    parser.add_argument("--parts", type=cli.number(int, 1, tables.SIZE), default=60, help="cells that are drawn")
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
