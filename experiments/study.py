"""The study of shell/study.sh: how well the cells of each method train, against random cells.

    python -m experiments.study logs/study                 # its cells; figure and small data are written there
    python -m experiments.study logs/study --out FOLDER    # written to FOLDER
    python -m experiments.study                            # this repository's, from figure/data

Cells whose retraining has finished are taken, so a study can be looked at while it runs. The accuracy is that of the
last epoch, not of the best, which would be chosen by the test images. Printed: a table of the methods in Markdown, and
what of it is larger than chance.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

import genotypes
import model
import visualize
from experiments.figure1 import by_method, kept_lines, markdown_table, place, write_lines
from lib import cli

COLORS = {  # the methods of the study in the order of the rows; what is none of them is a cell of genotypes.py
    "ddsas": "#0072b2",
    "ddsas-shrink": "#0072b2",
    "ddsas-expand": "#0072b2",
    "ddsas-random": "#009e73",
    "darts": "#d55e00",
    "gdas": "#cc79a7",
    "pdarts": "#e69f00",
}
RANDOM = "random"
LEVEL = 0.05  # of significance, for all methods together
GOAL = 0.15  # points, of the standard error of a method's mean
RESAMPLES = 100_000  # splits that are drawn where there are more
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

    @property
    def skips(self) -> int:
        """Skip connections of the normal cell."""
        return genotypes.count_skips(genotypes.load(self.genotype))


# ---- what is kept ---------------------------------------------------------------------------------------------------


def collect(folder: Path) -> tuple[list[Cell], int]:
    """The finished cells of a study, by method and seed, and how many have begun and are not finished."""
    begun = [path for path in sorted(folder.glob("*-*")) if (path / "search").is_dir() or (path / "retrain").is_dir()]
    finished = [path for path in begun if (path / "retrain/finished").is_file()]
    cells, protocols = [], {}
    for path in finished:
        method, _, seed = path.name.rpartition("-")
        record = visualize.load_run(path / "retrain")
        args = {name: value for name, value in record.info["args"].items() if name not in NOT_OF_THE_PROTOCOL}
        if differ := [name for name, value in args.items() if protocols.setdefault(name, value) != value]:
            raise cli.UserError(
                f"{path}: retrained with another --{differ[0]} than {finished[0].name}: draw them apart"
            )
        with torch.device("meta"):
            network = model.network_for(False, args["init_channels"], 10, args["layers"], False, record.genotype)
        cells.append(
            Cell(
                *(method, int(seed), str(record.genotype), record.history[-1]["test_acc"]),
                model.count_parameters(network) / 1e6,
                f"{args['dataset']}, {args['init_channels']} channels, {args['layers']} cells, {args['epochs']} epochs"
                f" of {100 * args['train_portion']:g} % of the training images",
                round(record.minutes, 2),
                *search_cost(path / "search"),
            )
        )
    return in_order(cells), len(begun) - len(finished)


def search_cost(folder: Path) -> tuple[float | None, float | None]:
    """Minutes and peak memory (GB) of the search in this folder, or inside of it (P-DARTS); None: nothing trained."""
    runs = [file.parent for pattern in ("timing.jsonl", "*/timing.jsonl") for file in folder.glob(pattern)]
    if not runs:
        return None, None
    record = visualize.load_run(max(runs, key=lambda run: len(visualize.read_json(run / "timing.jsonl"))))
    return round(record.minutes, 2), round(record.memory_gb, 3)


def in_order(cells: list[Cell]) -> list[Cell]:
    """Searched cells first, as in COLORS, then those of genotypes.py, then random ones; each by seed."""
    places = {method: place for place, method in enumerate(COLORS)} | {RANDOM: math.inf}
    return sorted(cells, key=lambda cell: (places.get(cell.method, len(COLORS)), cell.method, cell.seed))


def kept(folder: Path) -> list[Cell]:
    """The cells that FOLDER/study.jsonl keeps, a line for each."""
    cells = kept_lines(folder / "study.jsonl", Cell)
    if not cells:
        raise cli.UserError(f"nothing kept in {folder}: give the folder of bash shell/study.sh, with a finished cell")
    return cells


# ---- statistics -----------------------------------------------------------------------------------------------------


def permutation_test(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p of the difference of two means (Fisher, Pitman): the share of splits whose means differ as much.

    All numbers are split into groups of these sizes in every way, or in RESAMPLES ways drawn with a fixed seed where
    there are more (the given split counts as one of them). No distribution is assumed.
    """
    values, size = np.concatenate([first, second]), len(first)
    observed = abs(np.mean(first) - np.mean(second)) - 1e-9  # sums in another order
    if math.comb(len(values), size) <= RESAMPLES:
        splits = np.array(list(itertools.combinations(range(len(values)), size)))
        given = 0  # it is among them
    else:
        rng = np.random.default_rng(0)
        splits = rng.permuted(np.tile(np.arange(len(values)), (RESAMPLES, 1)), axis=1)[:, :size]
        given = 1
    sums = values[splits].sum(1)
    differences = np.abs(sums / size - (values.sum() - sums) / (len(values) - size))
    return float(((differences >= observed).sum() + given) / (len(splits) + given))


def holm(ps: dict[str, float]) -> dict[str, float]:
    """p values corrected for their number (Holm, 1979): the k-th smallest of m times m - k + 1, never falling."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(ps, key=ps.get)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[name]))
        corrected[name] = largest
    return corrected


def tests(found: dict[str, list[Cell]]) -> dict[str, tuple[float, float]]:
    """(difference of the means to that of random cells, p after Holm's correction) of each method with two cells."""
    accuracies = {method: np.array([cell.test_acc for cell in cells]) for method, cells in found.items()}
    reference = accuracies.get(RANDOM, np.array([]))
    if len(reference) < 2:
        return {}
    tested = [method for method in found if method in COLORS and len(found[method]) > 1]
    ps = holm({method: permutation_test(accuracies[method], reference) for method in tested})
    return {method: (accuracies[method].mean() - reference.mean(), ps[method]) for method in tested}


def standard_error(values: list[float]) -> float:
    """Of the mean; NaN for one value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


# ---- table and sentences --------------------------------------------------------------------------------------------


def markdown(found: dict[str, list[Cell]]) -> str:
    """A row for each method; minutes and memory of its searches are medians."""
    rows = [["method", "cells", "test accuracy %", "best (seed)", "worst (seed)", "skips", "parameters M"]]
    rows[0] += ["search min", "memory GB", "to random", "p (Holm)"]
    results = tests(found)
    for method, cells in found.items():
        accuracies = [cell.test_acc for cell in cells]
        spread = f" ± {standard_error(accuracies):.2f}" if len(cells) > 1 else ""
        ends = [f(cells, key=lambda cell: cell.test_acc) for f in (max, min)]
        row = [method, str(len(cells)), f"{np.mean(accuracies):.2f}{spread}"]
        row += [f"{cell.test_acc:.2f} ({cell.seed})" for cell in ends]
        row += [f"{np.mean([cell.skips for cell in cells]):.1f}", f"{np.mean([cell.params for cell in cells]):.3f}"]
        for values, form in (("search_minutes", "{:.1f}"), ("search_gb", "{:.2f}")):
            known = [value for cell in cells if (value := getattr(cell, values)) is not None]
            # the median: whatever else the machine did during one of them
            row.append(form.format(np.median(known)) if known else "–")
        row += [f"{results[method][0]:+.2f}", f"{results[method][1]:.3f}"] if method in results else ["–", "–"]
        rows.append(row)
    return markdown_table(rows)


def sentence(found: dict[str, list[Cell]]) -> str:
    """Which differences to random cells are larger than chance."""
    results = tests(found)
    if not results:
        return "Nothing can be said yet: two random cells and two of a method are needed."
    words = {method: f"{method} ({difference:+.2f}, p = {p:.3f})" for method, (difference, p) in results.items()}
    larger = [words[method] for method, (_, p) in results.items() if p < LEVEL]
    others = [words[method] for method, (_, p) in results.items() if p >= LEVEL]
    what = f"the mean of {len(found[RANDOM])} random cells"
    text = f"Further from {what} than chance explains: {', '.join(larger) or 'no method'}."
    text += f" Not so: {', '.join(others)}." if others else ""
    test = f"two-sided permutation test of the means, Holm's correction for {len(results)} methods, level {LEVEL}"
    return f"{text} Differences in points; {test}.{bandit(found)}"


def bandit(found: dict[str, list[Cell]]) -> str:
    """What the bandit adds to DDSAS: its subspaces against ones drawn at random."""
    pair = [np.array([cell.test_acc for cell in found.get(method, [])]) for method in ("ddsas", "ddsas-random")]
    if min(map(len, pair)) < 2:
        return ""
    difference, p = pair[0].mean() - pair[1].mean(), permutation_test(*pair)
    return f" The bandit's subspaces against random ones: {difference:+.2f}, p = {p:.3f}, not corrected."


def notes(found: dict[str, list[Cell]], unfinished: int = 0) -> str:
    """What stands below the table."""
    cells = [cell for group in found.values() for cell in group]
    lines = [f"retraining: {cells[0].protocol}; equal width, so parameters differ"]
    if min(len({cell.params for cell in cells}), len({cell.test_acc for cell in cells})) > 2:
        r = np.corrcoef(np.log([cell.params for cell in cells]), [cell.test_acc for cell in cells])[0, 1]
        lines.append(f"correlation of accuracy with the logarithm of parameters, over all cells: {r:.2f}")
    errors = {m: standard_error([cell.test_acc for cell in group]) for m, group in found.items() if len(group) > 1}
    if errors:
        worst = max(errors, key=errors.get)
        lines.append(f"± is the standard error of the mean over cells; the largest is {errors[worst]:.2f} ({worst})")
        needed = {m: math.ceil(len(found[m]) * (error / GOAL) ** 2) for m, error in errors.items()}  # it goes as 1/sqrt
        lines.append(f"cells for an error of {GOAL}: {', '.join(f'{m} {max(2, n)}' for m, n in needed.items())}")
    minutes = sum(cell.retrain_minutes + (cell.search_minutes or 0) for cell in cells)
    lines.append(f"{len(cells)} cells, {minutes / 60:.1f} hours of one thread (wall clock)")
    if unfinished:
        lines[-1] += f"; {unfinished} more have begun and are left out"
    return "\n".join(lines)


# ---- the figure -----------------------------------------------------------------------------------------------------


def draw(found: dict[str, list[Cell]]) -> Figure:
    """A row for each method: its cells as points, their mean and its standard error; random cells as a band."""
    figure = Figure((visualize.WIDTH, 0.9 + 0.27 * len(found)), layout="constrained")
    axis = figure.subplots()
    for row, (method, cells) in enumerate(found.items()):
        color = COLORS.get(method, visualize.MUTED if method == RANDOM else visualize.INK)
        accuracies = [cell.test_acc for cell in cells]
        places = row + 0.18 + np.zeros(len(cells))
        axis.plot(accuracies, places, "o", color=color, markersize=4, alpha=0.55, markeredgewidth=0)
        if len(cells) > 1:
            mean, error = np.mean(accuracies), standard_error(accuracies)
            axis.errorbar(mean, row - 0.12, xerr=error, fmt="D", color=color, markersize=4.5, capsize=3, linewidth=1.3)
    reference = [cell.test_acc for cell in found.get(RANDOM, [])]
    if reference:
        band = {"color": visualize.MUTED, "zorder": 0}
        axis.axvspan(min(reference), max(reference), alpha=0.10, linewidth=0, **band)
        axis.axvline(np.mean(reference), linewidth=1, linestyle=(0, (6, 2)), **band)
    axis.set_yticks(range(len(found)), [f"{method} ({len(cells)})" for method, cells in found.items()])
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.set_ylim(len(found) - 0.5, -0.6)
    axis.set_xlabel("test accuracy (%)")
    axis.set_title(
        "Points: cells; diamonds: mean ± standard error; grey: mean and extremes of random cells", loc="left"
    )
    return figure


# ---- command line ---------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    """Keep what a study tells if its folder is given, print the table, draw the figure."""
    unfinished, out = 0, place([args.study] if args.study else [], args.out)
    if args.study:
        cells, unfinished = collect(args.study)
        if not cells:
            raise cli.UserError(f"{args.study}: no finished cell; expected the folder of bash shell/study.sh")
        write_lines(out / "data/study.jsonl", cells)
    found = by_method(kept(out / "data"))
    print(f"{markdown(found)}\n\n{sentence(found)}\n\n{notes(found, unfinished)}")
    with matplotlib.rc_context(visualize.RC):
        visualize.save_figure(draw(found), out / "study")
    print(f"figure: {out / 'study.png'} and .svg")


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    parser.add_argument("study", nargs="?", type=Path, metavar="FOLDER", help="--out of shell/study.sh")
    text = "of study.svg, study.png and data/; default: FOLDER, figure/ without one"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
