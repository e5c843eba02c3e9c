"""Figure 1: searches in NAS-Bench-201's space, judged by looking their cells up.

    python -m experiments.figure1 logs/compare_nasbench201 --table FILE.csv   # its runs; figure and data go there
    python -m experiments.figure1 RUN RUN ... --out FOLDER                    # these runs; written to FOLDER
    python -m experiments.figure1                                             # this repository's, from figure/data

(a) is the share of the six edges whose operation changed from an epoch to the next, summed up. (b) is the simple
regret: the accuracy of the table's best cell minus that of the current one. Thin lines are seeds, thick their median.
Printed: the last cells' accuracies beside trivial references, and tests of the differences to DDSAS. A cell is written
as six digits, the operations of its edges: 0 none, 1 skip_connect, 2 nor_conv_1x1, 3 nor_conv_3x3, 4 avg_pool_3x3.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments import common
from experiments.common import COLORS, MUTED, compare, read_json, spread
from lib import cli, tables
from lib.genotype_io import CELL_OPERATIONS, parse_cell

PRIMARY = "ddsas – ddsas-random"  # the one hypothesis that was named before the runs
TESTED = ["ddsas-random", "darts", "gdas", "gdas-240", "rws", "ddsas-c0"]  # against DDSAS; by more than one seed
METHODS = ["ddsas", *TESTED, "ddsas-L6", "ddsas-L18", "ddsas-M5", "ddsas-M30", "random"]
OTHER = {"ddsas": "ddsas, `none` allowed", "darts": "darts without `none`", "gdas": "gdas without `none`"}
FIRST = "ddsas after one epoch"
QUANTITIES = ("probabilities", "saliency")  # of operations, in a line of history
ALL_CONV, CONV = "333333", "3"
SCALE = 9_999  # they are kept as four digits, 9999 is 1
AT_THE_END = ("rws", "random")  # methods that name their cell when they have ended, in genotype.txt
MOST = 64  # random cells of which the expected best is kept
TRAININGS = 12  # cells that truth.py trains in the time of a DDSAS search: 2.0 against 23.4 CPU minutes on two cores
NATS_BENCH = (94.37, 73.51, 47.31)  # its best cell on each data set, by which it is known
NAME = "NATS-Bench, topology (Dong et al., TPAMI 2021)"
PAPER = "no reproduction of the paper's figure 1, in which DARTS ends at 54.3 %, GDAS at about 92, DDSAS at about 93.7"


@dataclass
class Search:
    """What is kept of one search."""

    method: str
    seed: int
    minutes: float  # wall clock
    cells: list[str]  # of each epoch
    cpu_minutes: float | None = None
    other: str | None = None  # the last cell with `none` where the method may not choose it, without where it may
    commit: str | None = None
    processor: str | None = None
    versions: dict | None = None
    probabilities: list[str] | None = None  # of each epoch: 6 x 5 numbers of four digits
    saliency: list[str] | None = None


@dataclass
class Values:
    """What is kept of a table of test accuracies (percent): the cells that searches found, and summaries."""

    table: str
    datasets: list[str]
    cells: dict[str, list[float]]
    best: list[float]  # of all cells
    noise: list[float]  # standard deviation among cells of one function
    spaces: dict[str, dict]  # "all", "without none": count, mean, std, by_3x3, best_of

    def of(self, cells: list[str], dataset: int = 0) -> np.ndarray:
        """The cells' accuracies."""
        return np.array([self.cells[cell][dataset] for cell in cells])

    def same_convolutions(self, cells: list[str]) -> np.ndarray:
        """For each cell the mean of all with as many 3x3 convolutions; without `none`, unless one of these has it."""
        space = self.spaces["all" if "0" in "".join(cells) else "without none"]
        return np.array([space["by_3x3"][cell.count(CONV)] for cell in cells])


def digits(text: str) -> str:
    """The six digits of |op~0|+|op~0|op~1|+...; ValueError if it is no cell."""
    return "".join(str(CELL_OPERATIONS.index(op)) for op in parse_cell(text))


def function_of(cell: str) -> str:
    """A text that is the same for cells which compute the same function of their input.

    A node is the multiset of the terms that it sums: `none` adds none, skip_connect those of its source, pooling (which
    is linear) pools of them, a convolution one of its own. Convolutions of a kind are numbered, since one may reach the
    output on two ways; of all orders the first text counts. One of nothing leaves a constant, taken for nothing.
    """
    texts, edges = [], [[edge for edge, op in enumerate(cell) if op == kind] for kind in "23"]
    for orders in itertools.product(*map(itertools.permutations, edges)):
        number = {edge: n for order in orders for n, edge in enumerate(order)}
        nodes = [["x"], [], [], []]
        for edge, (op, node, source) in enumerate(zip(cell, (1, 2, 2, 3, 3, 3), (0, 0, 1, 0, 1, 2), strict=True)):
            terms = sorted(nodes[source])
            if op in "23" and terms:
                nodes[node].append(f"conv{op}_{number[edge]}({'+'.join(terms)})")
            elif op in "14":
                nodes[node] += terms if op == "1" else [f"pool({term})" for term in terms]
        texts.append("+".join(sorted(nodes[-1])))
    return min(texts)


def read_runs(folders: list[Path]) -> list[Search]:
    """The searches of run folders, or of folders of them, by method and seed."""
    files = [file for folder in folders for pattern in ("args.json", "*/args.json") for file in folder.glob(pattern)]
    if not (searches := [read_run(file.parent) for file in files if read_json(file.with_name("history.jsonl"))]):
        raise cli.UserError(f"{folders[0]}: no run folder with a finished epoch; expected what search.py made")
    return sorted(searches, key=lambda one: (METHODS.index(one.method), one.seed))


def read_run(path: Path) -> Search:
    """What is kept of a run. A folder named METHOD-SEED says the method."""
    info, lines, timing = (read_json(path / name) for name in ("args.json", "history.jsonl", "timing.jsonl"))
    args = info["args"]
    if args.get("space_config") != "nasbench201":
        raise cli.UserError(f"{path}: not a search in NAS-Bench-201's space; expected what search.py made")
    texts = [line["genotype"] for line in lines]
    if args["method"] in AT_THE_END:
        texts = [(path / "genotype.txt").read_text().strip()]
    method = path.name.removesuffix(f"-{args['seed']}")
    arrays = {name: [np.array(line[name]["cell"]) for line in lines if name in line] for name in QUANTITIES}
    skip, name = (0, "saliency") if args["method"] == "ddsas" else (1, "probabilities")  # whose argmax is `other`
    return Search(
        method=method if method in METHODS else args["method"],
        seed=args["seed"],
        minutes=round(sum(line["seconds"] for line in timing) / 60, 2),
        cells=[digits(text) for text in texts],
        cpu_minutes=round(sum(line.get("cpu_seconds", 0) for line in timing) / 60, 2) or None,
        other="".join(map(str, skip + arrays[name][-1][:, skip:].argmax(1))) if arrays[name] else None,
        **{name: info.get(name) for name in ("commit", "processor", "versions")},
        **{name: ["".join(f"{round(x * SCALE):04}" for x in a.flat) for a in arrays[name]] for name in QUANTITIES},
    )


def summarize(table: tables.Table, named: set[str]) -> Values:
    """The named cells, and the references, of a table of all cells."""
    rows = {digits(text): list(row.values()) for text, row in table.accuracies.items()}
    if missing := named - set(rows):
        raise cli.UserError(f"{table.source}: it lacks {len(missing)} of the cells that the searches found")
    values, spaces, functions = np.array(list(rows.values())), {}, defaultdict(list)
    for cell, row in rows.items():
        functions[function_of(cell)].append(row)
    noise = [np.std(group, axis=0, ddof=1) for group in functions.values() if len(group) >= 5]
    counts = np.array([cell.count(CONV) for cell in rows])
    for name, part in (("all", counts >= 0), ("without none", np.array(["0" not in cell for cell in rows]))):
        best_of = [expected_best(values[part, 0], count) for count in range(1, MOST + 1)]
        by_count = [values[part & (counts == count)].mean(0).round(3).tolist() for count in range(7)]
        mean, std = (number(values[part], axis=0).round(2).tolist() for number in (np.mean, np.std))
        spaces[name] = {"count": int(part.sum()), "mean": mean, "std": std}
        spaces[name] |= {"by_3x3": by_count, "best_of": np.round(best_of, 3).tolist()}
    best = values.max(0).round(2).tolist()
    source = NAME if tuple(best) == NATS_BENCH else table.source
    cells = {cell: rows[cell] for cell in sorted(named)}
    return Values(source, list(table.datasets), cells, best, np.median(noise, axis=0).round(2).tolist(), spaces)


def expected_best(values: np.ndarray, count: int) -> float:
    """The mean of the best of m = ``count`` draws: the k-th smallest of n is it with (k / n)^m - ((k - 1) / n)^m."""
    return float(np.sort(values) @ np.diff(np.linspace(0, 1, len(values) + 1) ** count))


def cost(searches: list[Search]) -> float:
    """Minutes of one search, the median: of the processor where they are known, else by the clock."""
    return float(np.median([search.cpu_minutes or search.minutes for search in searches]))


def trainings(searches: list[Search], groups: dict[str, list[Search]]) -> int:
    """How many random cells one of these searches pays for, by what it costs beside DDSAS; at least one."""
    return max(1, round(TRAININGS * cost(searches) / cost(groups.get("ddsas", searches))))


def result_cells(groups: dict[str, list[Search]]) -> dict[str, list[str]]:
    """The cells of each row: at the end, after one epoch, by the other readout."""
    rows = {method: [search.cells[-1] for search in searches] for method, searches in groups.items()}
    rows |= {FIRST: [search.cells[0] for search in groups.get("ddsas", [])]}
    rows |= {OTHER[method]: [one.other for one in groups.get(method, []) if one.other] for method in OTHER}
    return {name: cells for name, cells in rows.items() if cells}


def table_of_results(groups: dict[str, list[Search]], values: Values) -> str:
    """A row for each kind of cells: mean ± standard deviation on each data set; then the references."""
    rows = [["cells", "seeds", "functions", *values.datasets, "worst to best", "3x3", "as many 3x3", "CPU min"]]
    for name, cells in result_cells(groups).items():
        found = [values.of(cells, dataset) for dataset in range(len(values.datasets))]
        row = [name, str(len(cells)), str(len(set(map(function_of, cells)))), *map(spread, found)]
        row += [f"{found[0].min():.2f} to {found[0].max():.2f}", f"{np.mean([c.count(CONV) for c in cells]):.1f}"]
        row.append(f"{values.same_convolutions(cells)[:, 0].mean():.2f}")
        rows.append([*row, f"{cost(groups[name]):.1f}" if name in groups else "–"])
    references = {"nor_conv_3x3 on every edge": [f"{number:.2f}" for number in values.cells[ALL_CONV]]}
    for name, space in values.spaces.items():
        texts = [f"{m:.2f} ± {s:.2f}" for m, s in zip(space["mean"], space["std"], strict=True)]
        references[f"{name} ({space['count']:,.0f} cells)"] = texts
    references["the best on each"] = [f"{number:.2f}" for number in values.best]
    references["noise: cells of one function"] = [f"± {number:.2f}" for number in values.noise]
    rows += [[name, "–", "–", *texts, *"––––"] for name, texts in references.items()]
    return tables.markdown_table(rows)


def hypotheses(groups: dict[str, list[Search]], values: Values) -> list[common.Comparison]:
    """DDSAS against the other methods and against what needs no search, on the first data set."""
    cells = result_cells(groups)
    ddsas = values.of(cells["ddsas"])
    rivals = [name for name in [*TESTED, OTHER["darts"], OTHER["gdas"]] if len(cells.get(name, [])) > 1]
    references = {
        "itself after one epoch": values.of(cells[FIRST]),
        "nor_conv_3x3 on every edge": values.of([ALL_CONV]),
        "as many 3x3 at random": values.same_convolutions(cells["ddsas"])[:, 0],
        "random without `none`": values.spaces["without none"]["mean"][0],
        f"the best of {TRAININGS} of these": values.spaces["without none"]["best_of"][TRAININGS - 1],
    }
    found = [compare(f"ddsas – {name}", ddsas, values.of(cells[name])) for name in rivals]
    return found + [compare(f"ddsas – {name}", ddsas - known) for name, known in references.items()]


def report(groups: dict[str, list[Search]], values: Values) -> str:
    """The tables, and what they rest on."""
    text = [f"{PAPER}\naccuracies of the last cells (%): {values.table}", table_of_results(groups, values)]
    if len(groups.get("ddsas", [])) > 1:
        table = common.table_of(hypotheses(groups, values), PRIMARY)
        text += [f"{values.datasets[0]}:", table, common.NOTES]
    best_of = values.spaces["without none"]["best_of"]
    text.append(
        f"the best of {TRAININGS} random cells without `none`, which can be trained in the time of a DDSAS search, has"
        f" {best_of[TRAININGS - 1]:.2f} % on average; only the table tells which it is"
    )
    searches = [search for group in groups.values() for search in group]
    hours = sum(search.cpu_minutes or search.minutes for search in searches) / 60
    commits, processors = (
        ", ".join(sorted({getattr(search, name) or "not kept" for search in searches}))
        for name in ("commit", "processor")
    )
    text.append(f"{len(searches)} searches, {hours:.1f} hours of a processor; commits: {commits}; on {processors}")
    return "\n\n".join(text)


def draw(groups: dict[str, list[Search]], values: Values | None) -> Figure:
    """For one column of a paper: (a) over the epochs, (b) over CPU minutes where there is a table."""
    figure = Figure((3.3, 4.3 if values else 2.2), layout="constrained")
    axes = figure.subplots(1 + bool(values), 1, squeeze=False)[:, 0]
    axes[0].set(xlabel="epoch", ylabel="edges changed, summed up")
    axes[0].set_title("(a) How far the cell moved", loc="left")
    for method in COLORS:
        searches = groups.get(method, [])
        length = min((len(search.cells) for search in searches), default=0)
        epochs = np.arange(1, length + 1)
        if length > 1:
            draw_lines(axes[0], epochs, np.array([changes(search.cells[:length]) for search in searches]), method)
        if length and values:
            regrets = values.best[0] - np.array([values.of(search.cells[:length]) for search in searches])
            draw_lines(axes[1], epochs / length * cost(searches), regrets.clip(0.05), method)  # has a logarithm
    if values:
        title = f"(b) Distance to the best cell, {values.datasets[0].upper().replace('CIFAR', 'CIFAR-')}"
        axes[1].set(xlabel="CPU minutes", ylabel="simple regret (points)", yscale="log", xlim=(0, None))
        axes[1].set_title(title, loc="left")
        draw_references(axes[1], values, cost(groups["ddsas"]) / TRAININGS if "ddsas" in groups else None)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=2.4)
    return figure


def changes(cells: list[str]) -> np.ndarray:
    """The share of edges whose operation changed from each epoch to the next, summed up; 0 at the first."""
    ops = np.array([list(cell) for cell in cells])
    return np.cumsum([0, *(ops[1:] != ops[:-1]).mean(1)])


def draw_lines(axis, x: np.ndarray, values: np.ndarray, method: str) -> None:
    """A thin line for each seed (a row of values), a thick one for their median."""
    dashes = ["-", "--", "-.", ":", (0, (4, 1, 1, 1, 1, 1))][list(COLORS).index(method) % 5]
    axis.plot(x, values.T, color=COLORS[method], linewidth=0.4, alpha=0.4)
    style = {"linewidth": 1.5, "linestyle": dashes, "marker": "o" * (len(x) == 1)}
    axis.plot(x, np.median(values, 0), color=COLORS[method], label=f"{method} ({len(values)} seeds)", **style)


def draw_references(axis, values: Values, training: float | None) -> None:
    """What needs no search: 3x3 everywhere, a random cell, the best of as many as can be trained in so many minutes."""
    space, style = values.spaces["without none"], {"linewidth": 0.9, "zorder": 2}
    axis.axhline(values.best[0] - values.cells[ALL_CONV][0], color="black", label="3x3 on every edge", **style)
    axis.axhline(values.best[0] - space["mean"][0], color=MUTED, linestyle=":", label="random, without none", **style)
    if training:
        counts = np.arange(1, 1 + min(MOST, int(axis.get_xlim()[1] / training)))
        best = values.best[0] - np.array(space["best_of"])[: len(counts)]
        label = "best of the random that are trained"
        axis.plot(counts * training, best, color=MUTED, drawstyle="steps-post", label=label, **style)


def main(args: argparse.Namespace) -> None:
    """Keep what the runs tell if some are given, print the tables, draw the figure."""
    out = args.out or (args.runs or [common.FOLDER])[0]
    kept, looked_up = out / "data/figure1.jsonl", out / "data/nasbench201.jsonl"
    if args.runs:
        common.write_lines(kept, searches := read_runs(args.runs))
        named = {cell for search in searches for cell in [*search.cells, search.other] if cell} | {ALL_CONV}
        table = tables.load_table(args.table)
        common.write_lines(looked_up, [summarize(table, named)] if table else [])
    groups = common.group(common.read_lines(kept, Search), "method")
    values = Values(**found[0]) if (found := read_json(looked_up)) else None
    print(report(groups, values) if values else tables.NO_TABLE)
    common.save(lambda: draw(groups, values), out / "figure1")


def get_parser() -> cli.Parser:
    text = "run folders of search.py --space_config nasbench201, or folders of them"
    parser = common.get_parser(__doc__, text, "runs", "*")
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="accuracies, instead of analog-nasbench's")
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
