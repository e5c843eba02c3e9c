"""Figure 1: how far the architecture still moves, and how well it does, over the epochs of searches in NAS-Bench-201.

    python -m experiments.figure1 logs/compare_nasbench201      # its runs; figure and small data are written there
    python -m experiments.figure1 RUN RUN ... --out FOLDER      # these runs; written to FOLDER
    python -m experiments.figure1                               # this repository's, from figure/data

(a) is the cosine distance of the one-hot codes of consecutive architectures (DDSAS, figure 1a): the share of the six
edges whose operation changed. (b) is the accuracy on CIFAR-10 that the current architecture reaches when it is trained
on its own, looked up in the table of nasbench201.py. A line is the mean over the seeds, its band goes from the lowest
seed to the highest. Printed: a table of the methods, in Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import nasbench201
import visualize
from lib import cli
from lib.checkpoints import write_whole

FOLDER = Path(__file__).resolve().parent
STYLES = {  # in the order of the legend; random search trains nothing and is a line
    "ddsas": ("#0072b2", "-"),
    "ddsas-random": ("#009e73", "-."),
    "darts": ("#d55e00", "--"),
    "gdas": ("#cc79a7", ":"),
}
METHODS = [*STYLES, "random"]
LAST = 10  # epochs over which the table averages the distance
WINDOW = 5  # epochs over which the figure averages it, in searches of at least 4 * WINDOW epochs
RESAMPLES = 100_000  # means of random architectures
DRAWS = 4  # of random architectures, of which the notes tell the best


@dataclass
class Search:
    """What is kept of one search: a genotype for each epoch, accuracies and ranks if they were looked up."""

    method: str
    seed: int
    minutes: float
    genotypes: list[str]
    table_acc: list[float] | None  # percent
    table_rank: list[int] | None  # 1 is the best

    def distances(self) -> np.ndarray:
        """The share of edges whose operation changed, from each epoch to the next."""
        ops = [nasbench201.parse(text).ops for text in self.genotypes]
        return np.array([np.mean([a != b for a, b in zip(*pair, strict=True)]) for pair in itertools.pairwise(ops)])


@dataclass
class Space:
    """Accuracies (percent) of all architectures, or of some: what one finds who draws at random among them."""

    name: str
    count: int
    mean: float
    std: float
    rank: float  # the mean
    best_drawn: float  # the expected best of DRAWS draws
    quantiles: list[float]  # at equal distances from 0 to 100 %

    def quantile(self, percent: float | np.ndarray) -> float | np.ndarray:
        """The accuracy below which so many percent lie."""
        return np.interp(percent, np.linspace(0, 100, len(self.quantiles)), self.quantiles)

    def chance(self, accuracies: list[float]) -> float:
        """How often the mean of as many random cells is as high; of RESAMPLES such means, drawn with a fixed seed."""
        drawn = self.quantile(np.random.default_rng(0).uniform(0, 100, (RESAMPLES, len(accuracies))))
        return float((drawn.mean(1) >= np.mean(accuracies)).mean())


# ---- what is kept ---------------------------------------------------------------------------------------------------


def collect(folders: list[Path]) -> tuple[dict[str, list[Search]], list[Space]]:
    """The searches of the run folders, by method and ordered by seed; the spaces if there is a table."""
    runs = [(path, visualize.read_json(path / "args.json")["args"]) for path in run_folders(folders)]
    for path, args in runs:
        if "method" not in args:
            raise cli.UserError(f"{path}: not a search in NAS-Bench-201's space")
    tables = {args.get("table") for _, args in runs}
    if len(tables) > 1:
        raise cli.UserError(f"runs with different --table ({', '.join(map(str, tables))}): draw them apart")
    table = nasbench201.load_table(tables.pop())
    found: dict[str, list[Search]] = {}
    for path, args in sorted(runs, key=lambda run: run[1]["seed"]):
        method = "ddsas-random" if args["method"] == "ddsas" and args["rdss_prob"] == 1 else args["method"]
        if any(search.seed == args["seed"] for search in found.get(method, [])):
            raise cli.UserError(f"{path}: a second run of {method} with seed {args['seed']}: give one of the two")
        found.setdefault(method, []).append(read_run(path, method, args["seed"], table))
    return {method: found[method] for method in METHODS if method in found}, spaces_of(table)


def run_folders(folders: list[Path]) -> list[Path]:
    """The folders that are runs with an epoch, and those inside of the others; UserError where there is none."""
    found = []
    for folder in folders:
        inside = [folder] if (folder / "args.json").is_file() else sorted(folder.glob("*"))
        runs = [path for path in inside if (path / "args.json").is_file()]
        runs = [path for path in runs if visualize.read_json(path / "history.jsonl")]
        if not runs:
            raise cli.UserError(f"{folder}: no run folder with a finished epoch; expected what search.py made")
        found += runs
    return found


def read_run(path: Path, method: str, seed: int, table: nasbench201.Table | None) -> Search:
    """What the figure needs of a run. What the search did not look up itself is looked up now."""
    lines = visualize.read_json(path / "history.jsonl")
    seconds = [line["seconds"] for line in visualize.read_json(path / "timing.jsonl")]
    try:
        found = [nasbench201.parse(line["genotype"]) for line in lines]
    except (KeyError, ValueError) as error:
        raise cli.UserError(f"{path}: not a search in NAS-Bench-201's space ({error})") from None
    accuracies = [line.get("table_acc") for line in lines]
    ranks = [line.get("table_rank") for line in lines]
    if None in accuracies and table is not None and None not in map(table.accuracy, found):
        accuracies, ranks = [table.accuracy(one) for one in found], [table.rank(one)[0] for one in found]
    known = None not in accuracies
    minutes = round(sum(seconds) / 60, 2)
    return Search(method, seed, minutes, list(map(str, found)), accuracies if known else None, ranks if known else None)


def spaces_of(table: nasbench201.Table | None) -> list[Space]:
    """All architectures and those without `none`, among which DDSAS chooses; nothing without a whole table."""
    if table is None or len(table) != nasbench201.SIZE:
        return []
    operations = itertools.product(nasbench201.PRIMITIVES, repeat=len(nasbench201.EDGE_LIST))
    every = list(map(nasbench201.Architecture, operations))
    parts = {"every architecture": every, "those without none": [one for one in every if "none" not in one.ops]}
    return [space_of(name, part, table) for name, part in parts.items()]


def space_of(name: str, part: list[nasbench201.Architecture], table: nasbench201.Table) -> Space:
    """The spread of these architectures' accuracies."""
    values = np.sort([table.accuracy(one) for one in part])
    # the k-th smallest of n is the best of so many draws with probability (k / n)^draws - ((k - 1) / n)^draws
    best_drawn = values @ np.diff(np.linspace(0, 1, len(values) + 1) ** DRAWS)
    numbers = [values.mean(), values.std(), np.mean([table.rank(one)[0] for one in part]), best_drawn]
    quantiles = np.quantile(values, np.linspace(0, 1, 401)).round(2).tolist()
    return Space(name, len(values), *(round(float(number), 4) for number in numbers), quantiles)


def keep(found: dict[str, list[Search]], spaces: list[Space], folder: Path) -> None:
    """Write FOLDER/figure1.jsonl, a line for each search, and FOLDER/space.jsonl, one for each space."""
    write_lines(folder / "figure1.jsonl", [search for searches in found.values() for search in searches])
    write_lines(folder / "space.jsonl", spaces)


def kept(folder: Path) -> tuple[dict[str, list[Search]], list[Space]]:
    """What `keep` wrote."""
    searches, spaces = kept_lines(folder / "figure1.jsonl", Search), kept_lines(folder / "space.jsonl", Space)
    if not searches:
        raise cli.UserError(f"nothing kept in {folder}: give the runs (bash shell/compare_nasbench201.sh makes them)")
    return by_method(searches), spaces


def write_lines(path: Path, objects: list) -> None:
    """Write dataclass objects, a line of JSON for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(asdict(one)) + "\n" for one in objects))


def kept_lines(path: Path, kind: type) -> list:
    """The objects of a dataclass that `write_lines` wrote; none if the file is not there."""
    try:
        return [kind(**line) for line in visualize.read_json(path)]
    except TypeError as error:
        raise cli.UserError(f"{path}: not written by this script ({error}): draw it anew from the runs") from None


def by_method(found: list) -> dict[str, list]:
    """Searches, or other things that have a method, of each method in their order."""
    return {method: list(group) for method, group in itertools.groupby(found, key=lambda one: one.method)}


def place(runs: list[Path], out: Path | None) -> Path:
    """Where figure and data are written: --out, or the one folder that is given, or figure/ without any."""
    if out is None and len(runs) > 1:
        raise cli.UserError("--out FOLDER is missing: where the figure and data of several folders are written")
    return out or (runs[0] if runs else FOLDER)


# ---- the table ------------------------------------------------------------------------------------------------------


def markdown(found: dict[str, list[Search]], spaces: list[Space]) -> str:
    """A row for each method and space: the same numbers whenever the same searches are run."""
    rows = [["method", "seeds", "epochs", "final accuracy %", "best seed", "worst seed", "mean rank"]]
    rows[0] += ["by chance %", "distance"]
    for method, searches in found.items():
        epochs = [len(search.genotypes) for search in searches]
        row = [method, str(len(searches)), "–" if method == "random" else "–".join(map(str, sorted(set(epochs))))]
        accuracies = [search.table_acc[-1] for search in searches if search.table_acc]
        if len(accuracies) == len(searches):
            spread = f" ± {np.std(accuracies, ddof=1):.2f}" if len(accuracies) > 1 else ""
            row += [f"{np.mean(accuracies):.2f}{spread}", f"{max(accuracies):.2f}", f"{min(accuracies):.2f}"]
            row.append(f"{np.mean([search.table_rank[-1] for search in searches]):,.0f}")
            reference = spaces[1 if method.startswith("ddsas") else 0] if spaces else None
            row.append(f"{100 * reference.chance(accuracies):.1f}" if reference else "–")
        else:
            row += ["–"] * 5
        last = [search.distances()[-LAST:].mean() for search in searches if len(search.genotypes) > 1]
        rows.append([*row, f"{np.mean(last):.3f}" if last else "–"])
    for space in spaces:
        row = [space.name, f"{space.count:,}", "–", f"{space.mean:.2f} ± {space.std:.2f}"]
        ends = [f"{space.quantile(percent):.2f}" for percent in (100, 0)]
        rows.append([*row, *ends, f"{space.rank:,.0f}", "–", "–"])
    return markdown_table(rows)


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of texts, the first with the headings, as a table; all columns but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *rows[1:]]
    aligned = [
        [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)] for row in rows
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)


def notes(found: dict[str, list[Search]], spaces: list[Space]) -> str:
    """What stands below the table; minutes are no part of it, since they differ each time."""
    minutes = [  # the median: whatever else the machine did during one of them
        f"{method} {np.median([search.minutes for search in searches]):.1f}"
        for method, searches in found.items()
        if method != "random"
    ]
    text = f"± is the standard deviation; distance: of consecutive architectures, mean over the last {LAST} epochs\n"
    text += f"minutes per search (median, wall clock): {', '.join(minutes)}\n" if minutes else ""
    if spaces:
        text += "by chance: how often as many random cells have as high a mean; for ddsas, cells without none\n"
        drawn = [f"{space.best_drawn:.2f} ({space.name})" for space in spaces]
        text += f"the best of {DRAWS} drawn at random, on average: {', '.join(drawn)}\n"
    looked_up = all(search.table_acc for searches in found.values() for search in searches)
    return text + ("accuracies: looked up, CIFAR-10" if looked_up else nasbench201.NO_TABLE)


# ---- the figure -----------------------------------------------------------------------------------------------------


def draw(found: dict[str, list[Search]], spaces: list[Space]) -> Figure:
    """Panel (a), and (b) where all accuracies are known."""
    curves = {method: searches for method, searches in found.items() if method in STYLES}
    looked_up = all(search.table_acc for searches in found.values() for search in searches)
    figure = Figure((visualize.WIDTH, 3.0 if looked_up else 2.7), layout="constrained")
    axes = figure.subplots(1, 2 if looked_up else 1, squeeze=False)[0]
    lengths = {method: min(len(search.genotypes) for search in searches) for method, searches in curves.items()}
    width = WINDOW if min(lengths.values(), default=0) >= 4 * WINDOW else 1
    for method, searches in curves.items():
        length = lengths[method]
        label = f"{method} ({len(searches)} seed{'s' * (len(searches) > 1)})"
        if length > 1:
            values = np.array([running_mean(search.distances()[: length - 1], width) for search in searches])
            line(axes[0], np.arange(values.shape[1]) + 2 + width // 2, values, method, label)
        if looked_up:
            values = np.array([search.table_acc[:length] for search in searches])
            line(axes[1], np.arange(1, length + 1), values, method, label)
    axes[0].set_title("(a) Distance to the architecture one epoch before", loc="left")
    axes[0].set_ylim(bottom=0)
    if width > 1:
        axes[0].set_ylabel(f"running mean of {width} epochs")
    if looked_up:
        axes[1].set_title("(b) Its accuracy, looked up: CIFAR-10 (%)", loc="left")
        axes[1].set_yscale("function", functions=(by_error, lambda values: 100 - np.exp(-values)))
        axes[1].set_ylabel("scale: logarithm of the error")
        axes[1].set_yticks([10, 50, 70, 80, 85, 90, 92, 94])
        random_lines(axes[1], found.get("random", []), spaces)
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.set_xlim(0, max(lengths.values(), default=1) + 1)
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7.5, handlelength=2.6)
    return figure


def by_error(accuracy: np.ndarray) -> np.ndarray:
    """The scale of panel (b): equal lengths are equal ratios of the error, which tells good cells from better ones."""
    return -np.log(np.maximum(100 - accuracy, 0.1))


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The means of ``width`` values in a row."""
    return np.convolve(values, np.ones(width) / width, mode="valid")


def line(axis, epochs: np.ndarray, values: np.ndarray, method: str, label: str) -> None:
    """The mean over the seeds (rows of values) and a band from the lowest to the highest."""
    color, dashes = STYLES[method]
    # a run of one epoch is a point
    axis.plot(epochs, values.mean(0), color=color, linestyle=dashes, label=label, marker="o" * (len(epochs) == 1))
    axis.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.13, linewidth=0)


def random_lines(axis, drawn: list[Search], spaces: list[Space]) -> None:
    """What one random architecture reaches: the mean in each space, the middle 90 % of all; or of those drawn."""
    style = {"color": visualize.MUTED, "linewidth": 1, "zorder": 0}
    if spaces:
        every, without_none = spaces
        mean, low, high = every.mean, every.quantile(5), every.quantile(95)
        label = "random: mean and middle 90 % of all"
        axis.axhline(without_none.mean, linestyle=(0, (1, 2)), label="random without none: mean", **style)
    elif drawn:
        accuracies = [search.table_acc[-1] for search in drawn]
        mean, low, high = np.mean(accuracies), min(accuracies), max(accuracies)
        label = f"random: mean and extremes of {len(drawn)}"
    else:
        return
    axis.axhline(mean, linestyle=(0, (6, 2)), label=label, **style)
    axis.axhspan(low, high, color=visualize.MUTED, alpha=0.09, linewidth=0, zorder=0)


# ---- command line ---------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    """Keep what the runs tell if some are given, print the table, draw the figure."""
    out = place(args.runs, args.out)
    if args.runs:
        keep(*collect(args.runs), out / "data")
    found, spaces = kept(out / "data")
    print(f"{markdown(found, spaces)}\n\n{notes(found, spaces)}")
    if not any(len(search.genotypes) > 1 or search.table_acc for name in STYLES for search in found.get(name, [])):
        print("no figure: a search of two epochs, or a table, is needed for one")
        return
    with matplotlib.rc_context(visualize.RC):
        visualize.save_figure(draw(found, spaces), out / "figure1")
    print(f"figure: {out / 'figure1.png'} and .svg; lines are means over seeds, bands their extremes")


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    text = "run folders of search.py --space_config nasbench201, or folders of them"
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_FOLDER", help=text)
    text = "of figure1.svg, figure1.png and data/; default: the one folder that is given, figure/ without any"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
