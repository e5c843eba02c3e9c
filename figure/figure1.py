"""Figure 1: how far the architecture still moves, and how well it does, over the epochs of searches in NAS-Bench-201.

    python -m figure.figure1 logs/compare_nasbench201      # keeps what the figure needs in figure/data, then draws it
    python -m figure.figure1 RUN RUN ... --out FOLDER      # the same with FOLDER instead of figure/
    python -m figure.figure1                               # draws what is kept

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
import utils
import visualize
from runs import write_whole

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
EVERY = "every architecture"


@dataclass
class Search:
    """What is kept of one search: a genotype for each epoch, accuracies and ranks if they were looked up."""

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
    """Accuracies of all architectures: how many, mean, standard deviation, extremes, the 5th and 95th percentile."""

    count: int
    mean: float
    std: float
    worst: float
    best: float
    low: float
    high: float


# ---- what is kept ---------------------------------------------------------------------------------------------------


def collect(folders: list[Path]) -> tuple[dict[str, list[Search]], Space | None]:
    """The searches of the run folders, by method and ordered by seed; the space if there is a table."""
    runs = [(path, json.loads((path / "args.json").read_text())["args"]) for path in run_folders(folders)]
    tables = {args.get("table") for _, args in runs}
    if len(tables) > 1:
        raise utils.UserError(f"runs with different --table ({', '.join(map(str, tables))}): draw them apart")
    table = nasbench201.load_table(tables.pop())
    found: dict[str, list[Search]] = {}
    for path, args in sorted(runs, key=lambda run: run[1]["seed"]):
        method = "ddsas-random" if args["method"] == "ddsas" and args["rdss_prob"] == 1 else args["method"]
        if any(search.seed == args["seed"] for search in found.get(method, [])):
            raise utils.UserError(f"{path}: a second run of {method} with seed {args['seed']}: give one of the two")
        found.setdefault(method, []).append(read_run(path, args["seed"], table))
    return {method: found[method] for method in METHODS if method in found}, summary(table)


def run_folders(folders: list[Path]) -> list[Path]:
    """The folders that are runs, and the runs inside of those that are none; UserError where there is no run."""
    found = []
    for folder in folders:
        inside = [folder] if (folder / "args.json").is_file() else sorted(folder.glob("*"))
        runs = [path for path in inside if (path / "args.json").is_file() and (path / "history.jsonl").is_file()]
        if not runs:
            raise utils.UserError(f"{folder}: no run folder, and none inside; expected what search.py made")
        found += runs
    return found


def read_run(path: Path, seed: int, table: nasbench201.Table | None) -> Search:
    """What the figure needs of a run. What the search did not look up itself is looked up now."""
    lines = read_lines(path / "history.jsonl")
    seconds = [line["seconds"] for line in read_lines(path / "timing.jsonl")]
    try:
        found = [nasbench201.parse(line["genotype"]) for line in lines]
    except (KeyError, ValueError) as error:
        raise utils.UserError(f"{path}: not a search in NAS-Bench-201's space ({error})") from None
    accuracies = [line.get("table_acc") for line in lines]
    ranks = [line.get("table_rank") for line in lines]
    if None in accuracies and table is not None and None not in map(table.accuracy, found):
        accuracies, ranks = [table.accuracy(one) for one in found], [table.rank(one)[0] for one in found]
    known = None not in accuracies
    minutes = round(sum(seconds) / 60, 2)
    return Search(seed, minutes, list(map(str, found)), accuracies if known else None, ranks if known else None)


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file; none if it is not there."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except ValueError as error:
        raise utils.UserError(f"{path}: damaged ({error})") from None


def summary(table: nasbench201.Table | None) -> Space | None:
    """The spread of a table of all architectures."""
    if table is None or len(table) != nasbench201.SIZE:
        return None
    every = np.array([table.accuracy(nasbench201.Architecture(ops)) for ops in all_operations()])
    numbers = every.mean(), every.std(), every.min(), every.max(), *np.percentile(every, [5, 95])
    return Space(len(every), *(round(float(number), 4) for number in numbers))


def all_operations() -> list[tuple[str, ...]]:
    """The operations of all 15,625 architectures."""
    indices = np.ndindex(*[len(nasbench201.PRIMITIVES)] * len(nasbench201.EDGE_LIST))
    return [tuple(nasbench201.PRIMITIVES[i] for i in index) for index in indices]


def keep(found: dict[str, list[Search]], space: Space | None, folder: Path) -> None:
    """Write FOLDER/METHOD.jsonl, a line for each seed, and FOLDER/space.jsonl; files of other methods stay."""
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, list] = found | ({"space": [space]} if space else {})
    for name, lines in content.items():
        text = "".join(json.dumps(asdict(line)) + "\n" for line in lines)
        write_whole(folder / f"{name}.jsonl", text)


def kept(folder: Path) -> tuple[dict[str, list[Search]], Space | None]:
    """What `keep` wrote."""
    found = {}
    try:
        for method in METHODS:
            if lines := read_lines(folder / f"{method}.jsonl"):
                found[method] = [Search(**line) for line in lines]
        spaces = [Space(**line) for line in read_lines(folder / "space.jsonl")]
    except TypeError as error:
        raise utils.UserError(f"{folder}: not written by this script ({error}): draw it anew from the runs") from None
    if not found:
        raise utils.UserError(f"nothing kept in {folder}: give the runs (bash shell/compare_nasbench201.sh makes them)")
    return found, spaces[0] if spaces else None


# ---- the table ------------------------------------------------------------------------------------------------------


def markdown(found: dict[str, list[Search]], space: Space | None) -> str:
    """A row for each method: the same numbers whenever the same searches are run."""
    rows = [["method", "seeds", "epochs", "final accuracy %", "best seed", "worst seed", "mean rank", "distance"]]
    for method, searches in found.items():
        epochs = [len(search.genotypes) for search in searches]
        row = [method, str(len(searches)), "–" if method == "random" else "–".join(map(str, sorted(set(epochs))))]
        accuracies = [search.table_acc[-1] for search in searches if search.table_acc]
        if len(accuracies) == len(searches):
            spread = f" ± {np.std(accuracies, ddof=1):.2f}" if len(accuracies) > 1 else ""
            row += [f"{np.mean(accuracies):.2f}{spread}", f"{max(accuracies):.2f}", f"{min(accuracies):.2f}"]
            row.append(f"{np.mean([search.table_rank[-1] for search in searches]):,.0f}")
        else:
            row += ["–"] * 4
        last = [search.distances()[-LAST:].mean() for search in searches if len(search.genotypes) > 1]
        rows.append([*row, f"{np.mean(last):.3f}" if last else "–"])
    if space:
        accuracy = f"{space.mean:.2f} ± {space.std:.2f}"
        middle = f"{(space.count + 1) / 2:,.0f}"
        rows.append([EVERY, f"{space.count:,}", "–", accuracy, f"{space.best:.2f}", f"{space.worst:.2f}", middle, "–"])
    return markdown_table(rows)


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of texts, the first with the headings, as a table; all columns but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *rows[1:]]
    aligned = [
        [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)] for row in rows
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)


def notes(found: dict[str, list[Search]]) -> str:
    """What stands below the table; minutes are no part of it, since they differ each time."""
    minutes = [
        f"{method} {np.mean([search.minutes for search in searches]):.1f}"
        for method, searches in found.items()
        if method != "random"
    ]
    text = f"distance: of consecutive architectures, mean over the last {LAST} epochs\n"
    text += f"minutes per search: {', '.join(minutes)}\n" if minutes else ""
    looked_up = all(search.table_acc for searches in found.values() for search in searches)
    return text + ("accuracies: looked up, CIFAR-10" if looked_up else nasbench201.NO_TABLE)


# ---- the figure -----------------------------------------------------------------------------------------------------


def draw(found: dict[str, list[Search]], space: Space | None) -> Figure:
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
        random_line(axes[1], found.get("random", []), space)
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


def random_line(axis, drawn: list[Search], space: Space | None) -> None:
    """What one random architecture reaches: mean and middle 90 % of all, or mean and extremes of those drawn."""
    if space:
        mean, low, high, label = space.mean, space.low, space.high, "random: mean and middle 90 % of all"
    elif drawn:
        accuracies = [search.table_acc[-1] for search in drawn]
        mean, low, high = np.mean(accuracies), min(accuracies), max(accuracies)
        label = f"random: mean and extremes of {len(drawn)}"
    else:
        return
    axis.axhline(mean, color=visualize.MUTED, linewidth=1, linestyle=(0, (6, 2)), label=label, zorder=0)
    axis.axhspan(low, high, color=visualize.MUTED, alpha=0.09, linewidth=0, zorder=0)


# ---- command line ---------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    """Keep what the runs tell if some are given, print the table, draw the figure."""
    if args.runs:
        keep(*collect(args.runs), args.out / "data")
    found, space = kept(args.out / "data")
    print(f"{markdown(found, space)}\n\n{notes(found)}")
    if not any(len(search.genotypes) > 1 or search.table_acc for name in STYLES for search in found.get(name, [])):
        print("no figure: a search of two epochs, or a table, is needed for one")
        return
    with matplotlib.rc_context(visualize.RC):
        visualize.save_figure(draw(found, space), args.out / "figure1")
    print(f"figure: {args.out / 'figure1.png'} and .svg; lines are means over seeds, bands their extremes")


def get_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(__doc__)
    text = "run folders of search.py --space_config nasbench201, or folders of them"
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_FOLDER", help=text)
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="of figure1.svg, figure1.png and data/")
    return parser


if __name__ == "__main__":
    utils.cli(main, get_parser())
