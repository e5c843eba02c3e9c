"""The study of shell/study.sh: how well the cells of each method train, against random cells.

    python -m experiments.study logs/study                 # its finished cells; figure and data are written there
    python -m experiments.study logs/study --out FOLDER    # written to FOLDER
    python -m experiments.study                            # this repository's, from figure/data
    python -m experiments.study --pilot logs/pilot         # of shell/study.sh --pilot: which protocol tells cells apart

The accuracy is that of the last epoch, not of the best, which would be chosen by the test images.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import genotypes
import model
import visualize
from experiments import common
from experiments.common import COLORS, compare
from lib import cli

METHODS = ["ddsas", "ddsas-shrink", "ddsas-expand", "ddsas-random", "darts", "gdas", "pdarts"]  # each held against:
RANDOM = "random"
WIDEST = "darts"  # left out where one spread is taken for all methods
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


# ---- what is kept ---------------------------------------------------------------------------------------------------


def collect(folder: Path) -> tuple[list[Cell], int]:
    """The finished cells of a study, by method and seed, and how many have begun and are not finished."""
    begun = [path for path in sorted(folder.glob("*-*")) if (path / "search").is_dir() or (path / "retrain").is_dir()]
    finished = [path for path in begun if (path / "retrain/finished").is_file()]
    cells, protocols = [], {}
    for path in finished:
        method, _, seed = path.name.rpartition("-")
        args = visualize.read_json(path / "retrain/args.json")["args"]
        rules = {name: value for name, value in args.items() if name not in NOT_OF_THE_PROTOCOL}
        if differ := [name for name, value in rules.items() if protocols.setdefault(name, value) != value]:
            text = f"{path}: retrained with another --{differ[0]} than {finished[0].name}: draw them apart"
            raise cli.UserError(text)
        genotype = genotypes.load(path / "retrain/genotype.txt")
        with torch.device("meta"):
            network = model.network_for(False, args["init_channels"], 10, args["layers"], False, genotype)
        words = f"{args['dataset']}, {args['init_channels']} channels, {args['layers']} cells, {args['epochs']} epochs"
        words += f" of {100 * args['train_portion']:g} % of the training images"
        accuracy = visualize.read_json(path / "retrain/history.jsonl")[-1]["test_acc"]
        params = sum(value.numel() for value in network.parameters()) / 1e6
        costs = cost(path / "retrain")[0], *cost(path / "search")
        cells.append(Cell(method, int(seed), str(genotype), accuracy, params, words, *costs))
    order = {method: place for place, method in enumerate(METHODS)} | {RANDOM: math.inf}
    cells.sort(key=lambda cell: (order.get(cell.method, len(METHODS)), cell.method, cell.seed))
    return cells, len(begun) - len(finished)


def cost(folder: Path) -> tuple[float | None, float | None]:
    """Minutes and peak memory (GB) of the run in this folder, or inside of it (P-DARTS); None: nothing was trained."""
    timing = [visualize.read_json(file) for pattern in ("", "*/") for file in folder.glob(f"{pattern}timing.jsonl")]
    lines = max(timing, key=len, default=[])
    if not lines:
        return None, None
    memory = max(line.get("peak_memory_mb") or 0 for line in lines) / 1024
    return round(sum(line["seconds"] for line in lines) / 60, 2), round(memory, 3) or None


# ---- tables ---------------------------------------------------------------------------------------------------------


def results(groups: dict[str, list[Cell]]) -> str:
    """A row for each method; minutes (wall clock) and memory of its searches are medians."""
    rows = [["method", "cells", "test accuracy %", "best (seed)", "worst (seed)", "skips", "parameters M"]]
    rows[0] += ["search min", "memory GB"]
    for method, cells in groups.items():
        found = np.array([cell.test_acc for cell in cells])
        spread = f" ± {found.std(ddof=1) / math.sqrt(len(found)):.2f}" if len(found) > 1 else ""
        row = [method + " *" * any(cell.fault for cell in cells), str(len(cells)), f"{found.mean():.2f}{spread}"]
        row += [f"{cells[place].test_acc:.2f} ({cells[place].seed})" for place in (found.argmax(), found.argmin())]
        skips = [genotypes.count_skips(genotypes.load(cell.genotype)) for cell in cells]
        row += [f"{np.mean(skips):.1f}", f"{np.mean([cell.params for cell in cells]):.3f}"]
        for name, digits in (("search_minutes", 1), ("search_gb", 2)):
            known = [value for cell in cells if (value := getattr(cell, name)) is not None]
            row.append(f"{np.median(known):.{digits}f}" if known else "–")
        rows.append(row)
    return common.markdown_table(rows)


def hypotheses(groups: dict[str, list[Cell]]) -> tuple[list, list]:
    """The primary comparison, the bandit's subspaces with random ones, and each method with random cells."""
    found = {method: [cell.test_acc for cell in cells] for method, cells in groups.items() if len(cells) > 1}
    pairs = [("ddsas", "ddsas-random"), *((method, RANDOM) for method in METHODS)]
    tests = [compare(f"{a} – {b}", found[a], found[b]) for a, b in pairs if a in found and b in found]
    primary = [one for one in tests if one.name == "ddsas – ddsas-random"]
    return primary, [one for one in tests if one not in primary]


def notes(groups: dict[str, list[Cell]], unfinished: int) -> str:
    """What stands below the tables."""
    cells = [cell for group in groups.values() for cell in group]
    lines = [f"retraining: {cells[0].protocol}; equal width, so parameters differ; ± is the standard error of the mean"]
    samples = {method: np.array([cell.test_acc for cell in group]) for method, group in groups.items()}
    samples = {m: values for m, values in samples.items() if m in (*METHODS, RANDOM) and m != WIDEST and len(values) > 1}
    if RANDOM in samples and len(samples) > 1:
        sizes = [min(len(values) for m, values in samples.items() if m != RANDOM), len(samples[RANDOM])]
        deviation, freedom = common.pooled_deviation(list(samples.values()))
        least = common.detectable(sizes, deviation, freedom)
        text = f"detectable with {sizes[0]} against {sizes[1]} cells: {least:.2f} points"
        lines.append(f"{text}, by one spread for all but {WIDEST} ({deviation:.2f})")
    if min(len({cell.params for cell in cells}), len({cell.test_acc for cell in cells})) > 2:
        r = np.corrcoef(np.log([cell.params for cell in cells]), [cell.test_acc for cell in cells])[0, 1]
        lines.append(f"correlation of accuracy with the logarithm of parameters, over all cells: {r:.2f}")
    lines += sorted({f"* {cell.method}: {cell.fault}" for cell in cells if cell.fault})
    minutes = sum(cell.retrain_minutes + (cell.search_minutes or 0) for cell in cells)
    rest = f"; {unfinished} more have begun and are left out" if unfinished else ""
    return "\n".join([*lines, f"{len(cells)} cells, {minutes / 60:.1f} hours of one thread (wall clock){rest}"])


# ---- the pilot ------------------------------------------------------------------------------------------------------


def pilot(folder: Path) -> str:
    """A row for each protocol with which the same random cells were retrained, each with the same seeds."""
    found = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("random-*/*-*")):
        if (path / "finished").is_file():
            accuracy = visualize.read_json(path / "history.jsonl")[-1]["test_acc"]
            found[path.name.rpartition("-")[0]][path.parent.name].append((accuracy, cost(path)[0]))
    rows = [["protocol", "cells", "seeds", "intraclass correlation", "min", "a minute"]]
    for protocol, cells in found.items():
        seeds = max(map(len, cells.values()))
        table = np.array([values for values in cells.values() if len(values) == seeds])  # cells x seeds x 2
        if min(table.shape[:2]) < 2:
            raise cli.UserError(f"{folder}: {protocol} has less than two cells with two seeds; expected study.sh --pilot")
        icc, minutes = intraclass_correlation(table[..., 0]), np.median(table[..., 1])
        rows.append([protocol, str(len(table)), str(seeds), f"{icc:.2f}", f"{minutes:.1f}", f"{icc / minutes:.3f}"])
    if not found:
        raise cli.UserError(f"{folder}: no finished retraining; expected the folder of bash shell/study.sh --pilot")
    return common.markdown_table(rows)


def intraclass_correlation(values: np.ndarray) -> float:
    """ICC(1, 1) of cells x seeds (Shrout and Fleiss, 1979): the share of the variance that is the cells'."""
    seeds = values.shape[1]
    between, within = seeds * values.mean(1).var(ddof=1), values.var(1, ddof=1).mean()
    return float((between - within) / (between + (seeds - 1) * within))


# ---- the figure -----------------------------------------------------------------------------------------------------


def draw(groups: dict[str, list[Cell]]) -> Figure:
    """A row for each method: its cells as points, their mean and its standard error; random cells as a band."""
    figure = Figure((3.3, 0.7 + 0.22 * len(groups)), layout="constrained")
    axis = figure.subplots()
    for row, (method, cells) in enumerate(groups.items()):
        known = COLORS.get(method.removesuffix("-shrink").removesuffix("-expand"))
        color = known or (visualize.MUTED if method == RANDOM else visualize.INK)
        found = np.array([cell.test_acc for cell in cells])
        axis.plot(found, row + 0.18 + np.zeros(len(found)), "o", color=color, markersize=3, alpha=0.55, markeredgewidth=0)
        if len(cells) > 1:
            style = {"fmt": "D", "color": color, "markersize": 3, "capsize": 2, "linewidth": 1}
            axis.errorbar(found.mean(), row - 0.12, xerr=found.std(ddof=1) / math.sqrt(len(found)), **style)
    if reference := [cell.test_acc for cell in groups.get(RANDOM, [])]:
        axis.axvspan(min(reference), max(reference), alpha=0.10, linewidth=0, color=visualize.MUTED, zorder=0)
        axis.axvline(np.mean(reference), linewidth=0.8, linestyle=(0, (6, 2)), color=visualize.MUTED, zorder=0)
    axis.set_yticks(range(len(groups)), [f"{method} ({len(cells)})" for method, cells in groups.items()])
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.set(ylim=(len(groups) - 0.5, -0.6), xlabel="test accuracy, Fashion-MNIST (%)")
    return figure


# ---- command line ---------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    """Keep what a study tells if its folder is given, print the tables, draw the figure."""
    if args.pilot:
        return print(pilot(args.pilot))
    unfinished, out = 0, common.folder_for([args.study] if args.study else [], args.out)
    if args.study:
        cells, unfinished = collect(args.study)
        if not cells:
            raise cli.UserError(f"{args.study}: no finished cell; expected the folder of bash shell/study.sh")
        common.write_lines(out / "data/study.jsonl", cells)
    cells = common.read_lines(out / "data/study.jsonl", Cell)
    if not cells:
        raise cli.UserError(f"nothing kept in {out}: give the folder of bash shell/study.sh, with a finished cell")
    groups = {method: list(group) for method, group in itertools.groupby(cells, key=lambda cell: cell.method)}
    parts, tests = [results(groups)], hypotheses(groups)
    if any(tests):
        parts += [common.table_of_comparisons(*tests), common.sentences(*tests), common.NOTES]
    print("\n\n".join([*parts, notes(groups, unfinished)]))
    with common.style():
        common.save(draw(groups), out / "study")


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    parser.add_argument("study", nargs="?", type=Path, metavar="FOLDER", help="--out of shell/study.sh")
    parser.add_argument("--pilot", type=Path, metavar="FOLDER", help="--out of shell/study.sh --pilot")
    common.add_out(parser, "study.svg, study.png")
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
