"""Figure 1: searches in NAS-Bench-201's space, judged by looking their cells up: how far they are from the best cell.

    python -m experiments.figure1 logs/compare_nasbench201 --table FILE.csv   # its runs; figure and data go there
    python -m experiments.figure1 RUN RUN ... --out FOLDER                    # these runs; written to FOLDER
    python -m experiments.figure1                                             # this repository's, from figure/data

(a) is the share of the six edges whose operation changed from an epoch to the next, summed up. (b) is the simple regret:
the accuracy of the table's best cell minus that of the current one. Thin lines are seeds, thick ones their median.
Printed: accuracies of the last cells beside trivial references, and tests of the differences to DDSAS, in Markdown.
figure/data keeps the cell of every epoch, and of the table only the cells that searches found and summaries.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import genotypes
import nasbench201
import visualize
from experiments import common
from experiments.common import COLORS, compare
from lib import cli

PRIMARY = ("ddsas", "ddsas-random")  # the one hypothesis that was named before the runs
SECONDARY = ["darts", "gdas", "gdas-240", "rws", "ddsas-c0"]  # held against DDSAS, corrected together
SWEEPS = ["ddsas-L6", "ddsas-L18", "ddsas-M5", "ddsas-M30"]  # four seeds each: described, not tested
METHODS = [*PRIMARY, *SECONDARY, *SWEEPS, "random"]
OTHER = {"ddsas": "ddsas, `none` allowed", "darts": "darts without `none`", "gdas": "gdas without `none`"}
CONV, ALL_CONV = "3", "333333"
SCALE = 9_999  # probabilities and saliencies are kept as four digits, 9999 is 1
MOST = 64  # random cells of which the expected best is kept
NATS_BENCH = (94.37, 73.51, 47.31)  # its best cell on each data set: by it the table is known
PAPERS = "the paper's figure 1 (CIFAR-10): DARTS ends at 54.3, GDAS at about 92, DDSAS at about 93.7"


@dataclass
class Search:
    """What is kept of one search. A cell is six digits, the operations of its edges: 0 none, 1 skip_connect, ..."""

    method: str
    seed: int
    minutes: float  # wall clock
    cells: list[str]  # of each epoch
    cpu_minutes: float | None = None
    other: str | None = None  # the last cell if `none` is allowed where it was not, or the other way round
    commit: str | None = None
    processor: str | None = None
    versions: dict | None = None
    probabilities: list[str] | None = None  # of each epoch: 6 x 5 numbers of four digits
    saliency: list[str] | None = None


@dataclass
class Values:
    """What is kept of a table of test accuracies (percent)."""

    table: str
    datasets: list[str]
    cells: dict[str, list[float]]  # those that searches found, and nor_conv_3x3 on every edge
    best: list[float] | None = None  # of all cells, per data set
    noise: list[float] | None = None  # standard deviation among cells of one function
    spaces: dict[str, dict] | None = None  # "all", "without none": mean, std, by_3x3, best_of

    def of(self, cells: list[str], dataset: int = 0) -> np.ndarray:
        """The cells' accuracies."""
        return np.array([self.cells[cell][dataset] for cell in cells])


# ---- cells ----------------------------------------------------------------------------------------------------------


def digits(text: str) -> str:
    """The six digits of an architecture string; ValueError if it is none."""
    return "".join(str(nasbench201.PRIMITIVES.index(op)) for op in genotypes.load(text).ops)


def function_of(cell: str) -> str:
    """A text that is the same for cells which compute the same function of their input.

    A node is the multiset of the terms that it sums: `none` adds none, skip_connect those of its source, pooling (which
    is linear) pools of them, a convolution one of its own. Convolutions are numbered, since one may reach the output on
    two ways; of all numberings the first text counts. A convolution of nothing leaves a constant, taken for nothing.
    """
    convolutions = [edge for edge, op in enumerate(cell) if op in "23"]
    numberings = itertools.permutations(range(len(convolutions)))
    return min(_terms(cell, dict(zip(convolutions, order, strict=True))) for order in numberings)


def _terms(cell: str, number: dict[int, int]) -> str:
    nodes: list[list[str]] = [["x"]]
    for node in nasbench201.NODES:
        terms = []
        for edge, (end, source) in enumerate(nasbench201.EDGE_LIST):
            if end == node and cell[edge] != "0" and nodes[source]:
                value, op = nodes[source], cell[edge]
                many = {"1": value, "4": [f"pool({term})" for term in value]}
                terms += many.get(op) or [f"conv{op}_{number[edge]}({'+'.join(value)})"]
        nodes.append(sorted(terms))
    return "+".join(nodes[-1])


# ---- what is kept ---------------------------------------------------------------------------------------------------


def collect(folders: list[Path], table_file: Path | None) -> tuple[list[Search], Values]:
    """The searches of the run folders, by method and seed, and what a table says of their cells."""
    paths = [path for folder in folders for path in run_folders(folder)]
    searches, known = [], {}
    for path in paths:
        search, looked_up = read_run(path)
        if any((one.method, one.seed) == (search.method, search.seed) for one in searches):
            raise cli.UserError(f"{path}: a second run of {search.method} with seed {search.seed}: give one of the two")
        searches.append(search)
        known |= looked_up
    searches.sort(key=lambda one: (METHODS.index(one.method) if one.method in METHODS else 99, one.method, one.seed))
    named = {cell for search in searches for cell in [*search.cells, search.other or ALL_CONV]} | {ALL_CONV}
    table = nasbench201.load_table(table_file)
    if table is not None:
        return searches, summary_of(table, named)
    return searches, Values("looked up by the searches", ["cifar10"], known)


def run_folders(folder: Path) -> list[Path]:
    """This folder if it is a run with an epoch, else those inside of it; UserError where there is none."""
    inside = [folder] if (folder / "args.json").is_file() else sorted(folder.glob("*"))
    paths = [path for path in inside if (path / "args.json").is_file()]
    paths = [path for path in paths if visualize.read_json(path / "history.jsonl")]
    if not paths:
        raise cli.UserError(f"{folder}: no run folder with a finished epoch; expected what search.py made")
    return paths


def read_run(path: Path) -> tuple[Search, dict[str, list[float]]]:
    """What is kept of a run, and the accuracies that it looked up itself. METHOD-SEED as folder name says the method."""
    info, lines = (visualize.read_json(path / name) for name in ("args.json", "history.jsonl"))
    timing = visualize.read_json(path / "timing.jsonl")
    lines = [line for line in lines if line.get("genotype")]  # a random search may name its cell at the end
    try:
        cells = [digits(line["genotype"]) for line in lines]
        method, seed = info["args"]["method"], info["args"]["seed"]
    except (AttributeError, KeyError, ValueError) as error:
        raise cli.UserError(f"{path}: not a search in NAS-Bench-201's space ({error})") from None
    if path.name.removesuffix(f"-{seed}") in METHODS:
        method = path.name.removesuffix(f"-{seed}")
    tables = {name: [np.array(line[name]["cell"]) for line in lines if name in line] for name in QUANTITIES}
    cpu = [line["cpu_seconds"] for line in timing if "cpu_seconds" in line]
    search = Search(
        *(method, seed, round(sum(line["seconds"] for line in timing) / 60, 2), cells),
        round(sum(cpu) / 60, 2) if cpu else None,
        other_readout(**tables),
        *(info.get(name) for name in ("commit", "processor", "versions")),
        *(["".join(f"{round(x * SCALE):04}" for x in t.flat) for t in tables[name]] or None for name in QUANTITIES),
    )
    known = {cell: line.get("table_acc") for cell, line in zip(cells, lines, strict=True)}
    known = {cell: value["cifar10"] if isinstance(value, dict) else value for cell, value in known.items()}
    return search, {cell: [value] for cell, value in known.items() if value is not None}


QUANTITIES = ("probabilities", "saliency")


def other_readout(probabilities: list[np.ndarray], saliency: list[np.ndarray]) -> str | None:
    """The last cell by the other rule: of DDSAS' saliency with `none`, of softmax(alpha) without it."""
    if not probabilities + saliency:
        return None
    scores = saliency[-1] if saliency else np.delete(probabilities[-1], 0, axis=1)
    return "".join(str(op + (not saliency)) for op in scores.argmax(1))


def summary_of(table: nasbench201.Table, named: set[str]) -> Values:
    """The named cells and the references of a table of all cells."""
    every = ["".join(ops) for ops in itertools.product("01234", repeat=len(nasbench201.EDGE_LIST))]
    datasets, all_values = look_up(table, every)
    place = {cell: index for index, cell in enumerate(every)}
    cells = {cell: all_values[place[cell]].tolist() for cell in sorted(named)}
    best = tuple(all_values.max(0).round(2))
    name = "NATS-Bench (topology; Dong et al., TPAMI 2021)" if best == NATS_BENCH else str(table.source)
    functions = defaultdict(list)
    for cell, values in zip(every, all_values, strict=True):
        functions[function_of(cell)].append(values)
    noise = np.median([np.std(group, axis=0, ddof=1) for group in functions.values() if len(group) >= 5], axis=0)
    counts = np.array([cell.count(CONV) for cell in every])
    spaces = {}
    for space, part in (("all", counts >= 0), ("without none", np.array(["0" not in cell for cell in every]))):
        values = all_values[part]
        ordered = np.sort(values[:, 0])  # the k-th of n is the best of m draws with (k / n)^m - ((k - 1) / n)^m
        shares = np.linspace(0, 1, len(ordered) + 1)
        spaces[space] = {
            "count": len(values),
            "mean": values.mean(0).round(2).tolist(),
            "std": values.std(0).round(2).tolist(),
            "by_3x3": [all_values[part & (counts == count)].mean(0).round(3).tolist() for count in range(7)],
            "best_of": [round(float(ordered @ np.diff(shares**m)), 3) for m in range(1, MOST + 1)],
        }
    return Values(name, datasets, cells, list(map(float, best)), noise.round(2).tolist(), spaces)


def look_up(table: nasbench201.Table, cells: list[str]) -> tuple[list[str], np.ndarray]:
    """The table's data sets, and the accuracies of cells on each (cells x data sets)."""
    found = [genotypes.load(nasbench201.to_string([nasbench201.PRIMITIVES[int(op)] for op in cell])) for cell in cells]
    return table.datasets, np.array([[table.accuracy(one, dataset) for dataset in table.datasets] for one in found])


# ---- the tables -----------------------------------------------------------------------------------------------------


def cpu_minutes(searches: list[Search]) -> float:
    """Of one search, the median: processor time where it is known, else wall clock."""
    return float(np.median([search.cpu_minutes or search.minutes for search in searches]))


def last_cells(groups: dict[str, list[Search]]) -> dict[str, list[str]]:
    """The cells at the end, by the row in which they stand: of each method, after one epoch, by the other readout."""
    rows = {method: [search.cells[-1] for search in searches] for method, searches in groups.items()}
    if "ddsas" in groups:
        rows["ddsas after one epoch"] = [search.cells[0] for search in groups["ddsas"]]
    for method, name in OTHER.items():
        others = [search.other for search in groups.get(method, []) if search.other]
        rows |= {name: others} if others else {}
    return rows


def same_convolutions(values: Values, cells: list[str], dataset: int = 0) -> np.ndarray:
    """For each cell the mean of all cells with as many 3x3 convolutions; without `none` if none of these has it."""
    space = values.spaces["all" if any("0" in cell for cell in cells) else "without none"]
    return np.array([space["by_3x3"][cell.count(CONV)][dataset] for cell in cells])


def accuracies(groups: dict[str, list[Search]], values: Values) -> str:
    """A row for each method, then the references. Accuracies: mean ± standard deviation over seeds, on each data set."""
    rows = [["method", "seeds", "functions", *values.datasets, "worst – best", "3x3", "as many 3x3", "CPU min"]]
    for name, cells in last_cells(groups).items():
        row = [name, str(len(cells)), str(len({function_of(cell) for cell in cells}))]
        for dataset in range(len(values.datasets)):
            found = values.of(cells, dataset)
            row.append(f"{found.mean():.2f}" + (f" ± {found.std(ddof=1):.2f}" if len(cells) > 1 else ""))
        row.append(f"{values.of(cells).min():.2f} – {values.of(cells).max():.2f}")
        row.append(f"{np.mean([cell.count(CONV) for cell in cells]):.1f}")
        row.append(f"{same_convolutions(values, cells).mean():.2f}" if values.spaces else "–")
        rows.append([*row, f"{cpu_minutes(groups[name]):.1f}" if name in groups else "–"])
    references = {"nor_conv_3x3 on every edge": [f"{value:.2f}" for value in values.cells.get(ALL_CONV, [])]}
    for name, space in (values.spaces or {}).items():
        numbers = zip(space["mean"], space["std"], strict=True)
        references[f"{'all' if name == 'all' else name} ({space['count']:,})"] = [f"{m:.2f} ± {s:.2f}" for m, s in numbers]
    if values.spaces:
        references["best cell"] = [f"{value:.2f}" for value in values.best]
        references["noise: cells of one function"] = [f"± {value:.2f}" for value in values.noise]
    rows += [[name, "–", "–", *numbers, *["–"] * 4] for name, numbers in references.items() if numbers]
    return common.markdown_table(rows)


def hypotheses(groups: dict[str, list[Search]], values: Values) -> tuple[list, list]:
    """The primary comparison and the secondary ones, on the first data set, of what is there."""
    cells = last_cells(groups)
    ddsas, found = values.of(cells["ddsas"]), []
    for name in [PRIMARY[1], *SECONDARY, *list(OTHER.values())[1:]]:
        if len(cells.get(name, [])) > 1:
            found.append(compare(f"ddsas – {name}", ddsas, values.of(cells[name])))
    found.append(compare("ddsas – its cell after one epoch", ddsas - values.of(cells["ddsas after one epoch"])))
    found.append(compare("ddsas – 3x3 on every edge", ddsas - values.of([ALL_CONV])))
    if values.spaces:
        found.append(compare("ddsas – as many 3x3 anywhere", ddsas - same_convolutions(values, cells["ddsas"])))
        found.append(compare("ddsas – mean without `none`", ddsas - values.spaces["without none"]["mean"][0]))
    primary = [one for one in found if one.name == f"ddsas – {PRIMARY[1]}"]
    return primary, [one for one in found if one not in primary]


def report(groups: dict[str, list[Search]], values: Values) -> str:
    """Tables, sentences and what they rest on."""
    parts = [f"accuracies: {values.table}; {PAPERS}", accuracies(groups, values)]
    if len(groups.get("ddsas", [])) > 1:
        tests = hypotheses(groups, values)
        parts += [f"on {values.datasets[0]}, points:", common.table_of_comparisons(*tests)]
        parts += [common.sentences(*tests), common.NOTES]
    if values.spaces:
        best_of = values.spaces["without none"]["best_of"]
        text = ", ".join(f"{best_of[n - 1]:.2f} of {n}" for n in (4, 8, 16))
        parts.append(f"expected best of n random cells without `none`, as the table tells it: {text}")
    searches = [search for group in groups.values() for search in group]
    commits = sorted({search.commit or "not kept" for search in searches})
    hours = sum(search.cpu_minutes or search.minutes for search in searches) / 60
    return "\n\n".join([*parts, f"{len(searches)} searches, {hours:.1f} hours; commits: {', '.join(commits)}"])


# ---- the figure -----------------------------------------------------------------------------------------------------


def draw(groups: dict[str, list[Search]], values: Values) -> Figure:
    """One column of a paper: (a) over the epochs, (b) over CPU minutes where the best cell is known."""
    shown = {method: groups[method] for method in COLORS if len(groups.get(method, [[]])[0].cells if method in groups else []) > 1}
    figure = Figure((3.3, 4.4 if values.best else 2.2), layout="constrained")
    axes = figure.subplots(2 if values.best else 1, 1, squeeze=False)[:, 0]
    for method, searches in shown.items():
        length = min(len(search.cells) for search in searches)
        changed = np.array([changes(search.cells[:length]) for search in searches])
        lines(axes[0], np.arange(1, length + 1), changed, method)
        if values.best:
            regret = values.best[0] - np.array([values.of(search.cells[:length]) for search in searches])
            lines(axes[1], np.arange(1, length + 1) / length * cpu_minutes(searches), regret, method)
    axes[0].set(xlabel="epoch", ylabel="edges changed, summed up")
    axes[0].set_title("(a) How far the cell moved", loc="left")
    if values.best:
        references(axes[1], values)
        axes[1].set(xlabel="CPU minutes", ylabel="simple regret (points)", yscale="log", xlim=(0, None))
        axes[1].set_title(f"(b) Distance to the best cell, CIFAR-10", loc="left")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=6.5, handlelength=2)
    return figure


def changes(cells: list[str]) -> np.ndarray:
    """The share of edges whose operation changed from each epoch to the next, summed up; 0 at the first."""
    share = [np.mean([a != b for a, b in zip(*pair, strict=True)]) for pair in itertools.pairwise(cells)]
    return np.concatenate([[0], np.cumsum(share)])


def lines(axis, x: np.ndarray, values: np.ndarray, method: str) -> None:
    """A thin line for each seed (rows of values), a thick one for their median."""
    axis.plot(x, values.T, color=COLORS[method], linewidth=0.4, alpha=0.45)
    axis.plot(x, np.median(values, 0), color=COLORS[method], linewidth=1.6, label=f"{method} ({len(values)})")


def references(axis, values: Values) -> None:
    """Lines of what needs no search: 3x3 everywhere, a random cell, the best of more and more random cells."""
    axis.axhline(values.best[0] - values.cells[ALL_CONV][0], color="black", linewidth=0.9, label="3x3 on every edge")
    space, style = values.spaces["without none"], {"color": visualize.MUTED, "linewidth": 0.9}
    axis.axhline(values.best[0] - space["mean"][0], linestyle=":", label="random without none: mean", **style)


# ---- command line ---------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    """Keep what the runs tell if some are given, print the tables, draw the figure."""
    out = common.folder_for(args.runs, args.out)
    files = out / "data/figure1.jsonl", out / "data/nasbench201.jsonl"
    if args.runs:
        searches, values = collect(args.runs, args.table)
        common.write_lines(files[0], searches)
        common.write_lines(files[1], [values])
    searches, values = common.read_lines(files[0], Search), common.read_lines(files[1], Values)
    if not searches or not values:
        raise cli.UserError(f"nothing kept in {out / 'data'}: give the runs (shell/compare_nasbench201.sh makes them)")
    groups = {method: list(group) for method, group in itertools.groupby(searches, key=lambda one: one.method)}
    print(report(groups, values[0]) if values[0].cells else nasbench201.NO_TABLE)
    with common.style():
        common.save(draw(groups, values[0]), out / "figure1")


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    text = "run folders of search.py --space_config nasbench201, or folders of them"
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_FOLDER", help=text)
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="accuracies, instead of analog-nasbench's")
    common.add_out(parser, "figure1.svg, figure1.png")
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
