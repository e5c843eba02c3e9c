"""The study of shell/study.sh: how well the cells of each method train, against random cells.

    python -m experiments.study logs/study                 # its finished cells; figure and data are written there
    python -m experiments.study logs/study --out FOLDER    # written to FOLDER
    python -m experiments.study                            # this repository's, from figure/data
    python -m experiments.study logs/pilot --pilot         # which protocol of shell/study.sh --pilot tells cells apart

The accuracy is that of the last epoch, not of the best, which would be chosen by the test images.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import genotypes
import model
from experiments import common
from experiments.common import COLORS, MUTED, compare, read_json, spread
from lib import cli, tables
from lib.report import INK

METHODS = ["ddsas", "ddsas-shrink", "ddsas-expand", "ddsas-random", "darts", "gdas", "pdarts"]  # each held against:
RANDOM = "random"
WIDEST = "darts"  # left out where one spread is taken for all
PRIMARY = "ddsas – ddsas-random"
NOT_OF_THE_PROTOCOL = set("arch seed save note resume quiet data workers report_freq checkpoint_freq".split())


@dataclass
class Cell:
    """What is kept of one cell: who found it, how it trained, and what the search cost (None: there was none)."""

    method: str
    seed: int
    genotype: str
    test_acc: float  # percent of all test images, after the last epoch
    params: float  # millions, for 10 classes
    protocol: str  # of the retraining, in words
    retrain_minutes: float
    search_minutes: float | None = None
    search_gb: float | None = None  # at its peak
    fault: str | None = None  # found later in the code that searched


def collect(folder: Path) -> tuple[list[Cell], int]:
    """The finished cells of a study, by method and seed, and how many have begun and are not finished."""
    begun = [path for path in sorted(folder.glob("*-*")) if (path / "search").is_dir() or (path / "retrain").is_dir()]
    finished = [path for path in begun if (path / "retrain/finished").is_file()]
    cells, protocol = [], {}
    for path in finished:
        method, _, seed = path.name.rpartition("-")
        args, genotype, network, accuracy = common.read_retraining(path / "retrain")
        for name in sorted(set(args) - NOT_OF_THE_PROTOCOL):
            if protocol.setdefault(name, args[name]) != args[name]:
                raise cli.UserError(f"{path}: retrained with another --{name} than {finished[0].name}: draw them apart")
        words = f"{args['dataset']}, {args['init_channels']} channels, {args['layers']} cells, {args['epochs']} epochs"
        words += f" of {100 * args['train_portion']:g} % of the training images"
        params, costs = model.count_parameters(network) / 1e6, (cost(path / "retrain")[0], *cost(path / "search"))
        cells.append(Cell(method, int(seed), str(genotype), accuracy, params, words, *costs))
    order = {method: place for place, method in enumerate(METHODS)} | {RANDOM: 99}
    cells.sort(key=lambda cell: (order.get(cell.method, len(METHODS)), cell.method, cell.seed))
    return cells, len(begun) - len(finished)


def cost(folder: Path) -> tuple[float | None, float | None]:
    """Minutes and peak memory (GB) of the run in this folder, or inside of it (P-DARTS); None: nothing was trained."""
    runs = [read_json(file) for pattern in ("timing.jsonl", "*/timing.jsonl") for file in folder.glob(pattern)]
    if not (lines := max(runs, key=len, default=[])):
        return None, None
    memory = max(line.get("peak_memory_mb") or 0 for line in lines) / 1024
    return round(sum(line["seconds"] for line in lines) / 60, 2), round(memory, 3) or None


def accuracies(cells: list[Cell]) -> np.ndarray:
    """Their test accuracies."""
    return np.array([cell.test_acc for cell in cells])


def table_of_results(groups: dict[str, list[Cell]]) -> str:
    """A row for each method; minutes (wall clock) and memory of its searches are medians."""
    rows = [["method", "cells", "test accuracy %", "worst to best", "skips", "parameters M", "search min", "GB"]]
    for method, cells in groups.items():
        found = accuracies(cells)
        row = [method + " *" * any(cell.fault for cell in cells), str(len(cells)), spread(found, error=True)]
        skips = [genotypes.count_skips(genotypes.load(cell.genotype)) for cell in cells]
        row += [f"{found.min():.2f} to {found.max():.2f}", f"{np.mean(skips):.1f}"]
        row.append(f"{np.mean([cell.params for cell in cells]):.3f}")
        for name, form in (("search_minutes", ".1f"), ("search_gb", ".2f")):
            known = [value for cell in cells if (value := getattr(cell, name)) is not None]
            row.append(format(np.median(known), form) if known else "–")
        rows.append(row)
    return tables.markdown_table(rows)


def hypotheses(groups: dict[str, list[Cell]]) -> list[common.Comparison]:
    """The bandit's subspaces against random ones, and each method against random cells."""
    found = {method: accuracies(cells) for method, cells in groups.items() if len(cells) > 1}
    pairs = [("ddsas", "ddsas-random"), *((method, RANDOM) for method in METHODS)]
    return [compare(f"{a} – {b}", found[a], found[b]) for a, b in pairs if a in found and b in found]


def notes(groups: dict[str, list[Cell]], unfinished: int) -> str:
    """What stands below the tables."""
    cells = [cell for group in groups.values() for cell in group]
    lines = [f"retraining: {cells[0].protocol}; equal width, so parameters differ; ± is the standard error of the mean"]
    known = [method for method in METHODS if method != WIDEST and len(groups.get(method, [])) > 1]
    if known and len(groups.get(RANDOM, [])) > 1:
        sizes = min(len(groups[method]) for method in known), len(groups[RANDOM])
        least, deviation = common.detectable([accuracies(groups[method]) for method in (*known, RANDOM)], sizes)
        text = f"{sizes[0]} against {sizes[1]} cells tell {least:.2f} points apart"
        lines.append(f"{text}, with one standard deviation for all but {WIDEST}, {deviation:.2f}")
    lines += sorted({f"* {cell.method}: {cell.fault}" for cell in cells if cell.fault})
    hours = sum(cell.retrain_minutes + (cell.search_minutes or 0) for cell in cells) / 60
    rest = f"; {unfinished} more have begun and are left out" if unfinished else ""
    return "\n".join([*lines, f"{len(cells)} cells, {hours:.1f} hours of one thread (wall clock){rest}"])


def pilot(folder: Path) -> str:
    """A row for each protocol by which the same random cells were retrained, with the same seeds.

    The correlation is ICC(1, 1) (Shrout and Fleiss, 1979): the share of the variance that is the cells'.
    """
    runs = defaultdict(lambda: defaultdict(list))
    for path in sorted(path.parent for path in folder.glob("random-*/*-*/finished")):
        accuracy = read_json(path / "history.jsonl")[-1]["test_acc"]
        runs[path.name.rpartition("-")[0]][path.parent.name].append((accuracy, cost(path)[0]))
    rows = [["protocol", "cells", "seeds", "intraclass correlation", "minutes", "correlation a minute"]]
    for protocol, cells in runs.items():
        seeds = max(map(len, cells.values()))
        values = np.array([pairs for pairs in cells.values() if len(pairs) == seeds])  # cells x seeds x 2
        if min(values.shape[:2]) > 1:
            found, minutes = values[..., 0], np.median(values[..., 1])
            between, within = seeds * found.mean(1).var(ddof=1), found.var(1, ddof=1).mean()
            correlation = (between - within) / (between + (seeds - 1) * within)
            numbers = f"{correlation:.2f}", f"{minutes:.1f}", f"{correlation / minutes:.3f}"
            rows.append([protocol, str(len(values)), str(seeds), *numbers])
    if len(rows) == 1:
        raise cli.UserError(f"{folder}: no two cells retrained with two seeds; expected what study.sh --pilot made")
    return tables.markdown_table(rows)


def draw(groups: dict[str, list[Cell]]) -> Figure:
    """A row for each method: its cells as points, their mean and its standard error; random cells as a band."""
    figure = Figure((3.3, 0.6 + 0.2 * len(groups)), layout="constrained")
    axis = figure.subplots()
    for row, (method, cells) in enumerate(groups.items()):
        color = COLORS.get(method.removesuffix("-shrink").removesuffix("-expand"), INK)
        found = accuracies(cells)
        axis.plot(found, [row + 0.18] * len(found), "o", color=color, markersize=3, alpha=0.55, markeredgewidth=0)
        if len(cells) > 1:
            error, style = found.std(ddof=1) / len(found) ** 0.5, {"markersize": 3, "capsize": 2, "linewidth": 1}
            axis.errorbar(found.mean(), row - 0.12, xerr=error, fmt="D", color=color, **style)
    if RANDOM in groups:
        reference = accuracies(groups[RANDOM])
        axis.axvspan(reference.min(), reference.max(), alpha=0.10, linewidth=0, color=MUTED, zorder=0)
        axis.axvline(reference.mean(), linewidth=0.8, linestyle=(0, (6, 2)), color=MUTED, zorder=0)
    axis.set_yticks(range(len(groups)), [f"{method} ({len(cells)})" for method, cells in groups.items()])
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.set(ylim=(len(groups) - 0.5, -0.6), xlabel="test accuracy (%)")
    return figure


def main(args: argparse.Namespace) -> None:
    """Keep what a study tells if its folder is given, print the tables, draw the figure."""
    if args.pilot:
        print(pilot(args.folder or Path("logs/pilot")))
        return
    unfinished, out = 0, args.out or args.folder or common.FOLDER
    if args.folder:
        cells, unfinished = collect(args.folder)
        if not cells:
            raise cli.UserError(f"{args.folder}: no finished cell; expected the folder of bash shell/study.sh")
        common.write_lines(out / "data/study.jsonl", cells)
    groups = common.group(common.read_lines(out / "data/study.jsonl", Cell), "method")
    parts, comparisons = [table_of_results(groups)], hypotheses(groups)
    parts += [common.table_of(comparisons, PRIMARY), common.NOTES] if comparisons else []
    print("\n\n".join([*parts, notes(groups, unfinished)]))
    common.save(lambda: draw(groups), out / "study")


def get_parser() -> cli.Parser:
    parser = common.get_parser(__doc__, "--out of shell/study.sh")
    parser.add_argument("--pilot", action="store_true", help="the folder is that of shell/study.sh --pilot")
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
