"""How things are drawn: the style of every operation, and the figures of a run."""

from __future__ import annotations

import io
import math
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lib import records
from lib.checkpoints import write_whole
from lib.cli import UserError
from lib.records import Record
from lib.report import BLUE, INK, LINE, MUTED, PAPER, SOFT

# The colours are those of Okabe and Ito, which colour-blind readers can tell apart. Each kind of operation has a colour
# and a line of its own, and larger kernels have thicker lines, so figures survive printing in grey.

Style = namedtuple("Style", "label color line width plot")  # line and width (points) in Graphviz, plot in matplotlib
KINDS = {
    "none": ("#999999", "dotted", (0, (1, 2))),
    "skip_connect": ("#009e73", "solid", (0, (6, 1, 1, 1))),
    "sep_conv": ("#0072b2", "solid", "-"),
    "dil_conv": ("#cc79a7", "dashed", (0, (4, 1.5))),
    "max_pool": ("#d55e00", "dotted", (0, (1, 1))),
    "avg_pool": ("#e69f00", "dotted", (0, (3, 1, 1, 1))),
    "nor_conv": ("#56b4e9", "solid", (0, (8, 1))),
    "conv_7x1": ("#56b4e9", "solid", (0, (8, 1))),
}
LABELS = {"none": "none", "skip_connect": "skip", "conv_7x1_1x7": "7×1, 1×7"}
LABELS |= {"nor_conv_1x1": "conv 1×1", "nor_conv_3x3": "conv 3×3"}
CURVES = [(BLUE, "-"), ("#d55e00", "--"), ("#009e73", "-.")]  # colour and line of a panel's curves, in their order
FONTS = ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"]
RC = (
    {"font.family": "sans-serif", "font.sans-serif": FONTS, "font.size": 8.5, "mathtext.default": "regular"}
    | {"axes.titlesize": 9, "axes.linewidth": 0.7, "grid.linewidth": 0.6, "lines.linewidth": 1.5}
    | dict.fromkeys(["text.color", "axes.labelcolor", "axes.titlecolor"], INK)
    | dict.fromkeys(["axes.edgecolor", "xtick.color", "ytick.color"], MUTED)
    | {"grid.color": LINE, "axes.facecolor": "none", "figure.facecolor": PAPER, "legend.frameon": False}
    | {"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False}
    | {"svg.fonttype": "none", "svg.hashsalt": "figure"}  # text stays text; the same figure is the same file
)
HEAT = colormaps["viridis"].with_extremes(bad=LINE)  # grey: gone
WIDTH = 7.2  # inches of a page column
CELL_TITLES = {"normal": "Normal cell", "reduce": "Reduction cell", "cell": "Cell"}
SOURCES = ("$c_{k{-}2}$", "$c_{k{-}1}$", "0", "1", "2", "3")  # of DARTS' cells: the two inputs, then the nodes
EDGES = dict.fromkeys(["normal", "reduce"], [(node, source) for node in range(4) for source in range(2 + node)])
EDGES["cell"] = [(node, source) for node in (1, 2, 3) for source in range(node)]  # of NAS-Bench-201
EDGE_NAMES = {
    cell: [f"{source if cell == 'cell' else SOURCES[source]} → {node}" for node, source in edges]
    for cell, edges in EDGES.items()
}


def style_of(op: str) -> Style:
    """The style of an operation; one of no kind that KINDS knows is drawn dark and dash-dotted under its own name."""
    kind, _, kernel = op.rpartition("_")
    known = KINDS.get(op) or KINDS.get(kind)
    color, line, dashes = known or (INK, "dashed", (0, (5, 1, 1, 1, 1, 1)))
    label = (LABELS.get(op) or f"{kind[:3]} {kernel.replace('x', '×')}") if known else op
    width = {"1": 0.8, "5": 2.3, "7": 3.3}.get(op[-1], 1.3) if known else 1.3
    return Style(label, color, line, width, {"color": color, "linestyle": dashes, "linewidth": 0.8 * width})


def list_edges(genotype: Any) -> dict[str, list[tuple[tuple[int, int], str]]]:
    """Per cell type ((node, source), operation) of the edges that a genotype of either space has."""
    if hasattr(genotype, "ops"):  # NAS-Bench-201
        return {"cell": list(zip(EDGES["cell"], genotype.ops, strict=True))}
    cells = {cell: enumerate(getattr(genotype, cell)) for cell in ("normal", "reduce")}
    return {cell: [((index // 2, source), op) for index, (op, source) in edges] for cell, edges in cells.items()}


def distance(first: Any, second: Any) -> float:
    """Cosine distance of the one-hot codes (DDSAS, figure 1a): 0 for equal genotypes, 1 for nothing in common."""
    edges = ([(cell, edge) for cell, edges in list_edges(one).items() for edge in edges] for one in (first, second))
    one, other = map(Counter, edges)  # ones in the code, for each cell, edge and operation
    return 1 - sum(one[key] * other[key] for key in one) / math.hypot(*one.values()) / math.hypot(*other.values())


def write(path: str | Path, content: str | bytes) -> Path:
    """Write a file whole, with its folders; UserError if that is not possible."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); expected room in a folder of yours") from None
    return Path(path)


def save_figure(figure: Figure, path: str | Path) -> list[Path]:
    """Write a figure as ``path`` + .svg and .png. Returns the files."""
    files = []
    for suffix, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 160})):
        figure.savefig(buffer := io.BytesIO(), format=suffix, **options)
        figure.set_layout_engine("none")  # the first picture found the layout
        files.append(write(f"{path}.{suffix}", buffer.getvalue()))
    return files


def progress_figure(record: Record) -> Figure:
    """What is known of each epoch: accuracy and loss; of a search also how its architecture moved."""
    parts = {"train": "train", "validation": "valid", "test": "test"}
    moved = np.array([math.nan, *map(distance, record.genotypes, record.genotypes[1:])])
    panels = {
        "Accuracy (%)": {name: record.series(f"{part}_acc") for name, part in parts.items()},
        "Loss": {name: record.series(f"{part}_loss") for name, part in parts.items()},
        "Distance to the architecture one epoch before": {"": moved},
        "Entropy of alpha": {CELL_TITLES[c]: record.series("alpha_entropy", c) for c in record.cells},
        "Looked-up test accuracy (%)": {name: record.series("table_acc", name) for name in record.parts("table_acc")},
        "Rank among all architectures": {"": record.series("table_rank")},
    }
    known = {title: {n: v for n, v in curves.items() if np.isfinite(v).any()} for title, curves in panels.items()}
    panels = {title: curves for title, curves in known.items() if curves}
    rows = max(1, math.ceil(len(panels) / 2))
    figure = Figure((WIDTH, 0.3 + 2.1 * rows), layout="constrained")
    for number, (title, curves) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(rows, 2, number)
        for (name, values), (color, dashes) in zip(curves.items(), CURVES, strict=False):
            marker = "o" if len(values) < 16 else ""
            style = {"color": color, "linestyle": dashes, "marker": marker, "markersize": 3}
            axis.plot(*_break_at_stages(record, values), label=name, **style)
        axis.set_title(title, loc="left")
        axis.set_xlabel("epoch")
        axis.ticklabel_format(axis="y", useOffset=False)
        _mark_epochs(axis, record)
        if "" not in curves:
            axis.legend(handlelength=2.4)
    return figure


def _break_at_stages(record: Record, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of a curve, with a gap before each stage of P-DARTS: a stage starts with a new supernet."""
    epochs = np.arange(1.0, len(values) + 1)
    return np.insert(epochs, record.stages, math.nan), np.insert(values, record.stages, math.nan)


def _mark_epochs(axis: Axes, record: Record) -> None:
    """Whole epochs on the axis, and lines between the stages of P-DARTS."""
    axis.xaxis.get_major_locator().set_params(integer=True)
    for line in record.stages:
        axis.axvline(line + 0.5, color=MUTED, linewidth=0.7, linestyle=":")


def trajectory_figure(record: Record, cell: str) -> Figure:
    """The record's quantity of each operation: a row for each node, a column for each source; the genotype shaded."""
    (values, ops), chosen = records.trajectory(record, cell), dict(list_edges(record.genotype)[cell])
    nodes = sorted({node for node, _ in EDGES[cell]})
    figure = Figure((WIDTH, 1.5 * len(nodes)), layout="constrained")
    grid, axis = figure.add_gridspec(len(nodes), 1 + max(source for _, source in EDGES[cell])), None
    for index, (node, source) in enumerate(EDGES[cell]):
        place, op = grid[nodes.index(node), source], chosen.get((node, source))
        axis = figure.add_subplot(place, sharex=axis, sharey=axis)
        for name, curve in sorted(zip(ops, values[:, index].T, strict=True), key=lambda pair: pair[0] == op):
            axis.plot(*_break_at_stages(record, curve), **style_of(name).plot)  # the genotype's last, on top
        _mark_epochs(axis, record)
        title = f"{EDGE_NAMES[cell][index]} · {style_of(op).label}" if op else EDGE_NAMES[cell][index]
        axis.set_title(title, fontsize=8, color=INK if op else MUTED)
        axis.set_facecolor(SOFT if op else "none")
        axis.tick_params(labelsize=7, labelleft=source == 0, labelbottom=node == nodes[-1])
    figure.supxlabel("epoch", fontsize=8.5)
    figure.supylabel(record.quantity, fontsize=8.5)
    corner = figure.add_subplot(grid[0, (1 if cell == "cell" else 2) :])
    corner.axis("off")
    keys = [Line2D([], [], label=style_of(op).label, **style_of(op).plot) for op in ops]
    keys.append(Patch(facecolor=SOFT, edgecolor=MUTED, linewidth=0.5, label="in the genotype"))
    title = f"{CELL_TITLES[cell]}: {record.quantity}"
    corner.legend(handles=keys, loc="upper right", ncols=3, handlelength=2.6, title=title)
    return figure


def subspace_figure(record: Record) -> Figure:
    """Which operations were active when: epochs to the right, the operations of an edge below each other."""
    ops = records.operations(record.history[0])
    rows = max(len(EDGES[cell]) for cell in record.cells) * len(ops)
    figure = Figure((WIDTH, 1.0 + 0.06 * rows), layout="constrained")
    axes = figure.subplots(1, len(record.cells), squeeze=False)[0]
    for axis, cell in zip(axes, record.cells, strict=True):
        shares, _ = records.subspace(record, cell)
        extent = (0.5, len(shares) + 0.5, len(EDGES[cell]), 0)
        style = {"aspect": "auto", "interpolation": "nearest", "cmap": HEAT, "vmin": 0, "vmax": 1}
        picture = axis.imshow(shares.reshape(len(shares), -1).T, extent=extent, **style)
        axis.set_yticks(np.arange(len(EDGES[cell])) + 0.5, EDGE_NAMES[cell])
        axis.set_yticks(range(len(EDGES[cell])), minor=True)
        axis.grid(False)
        axis.grid(axis="y", which="minor", color=PAPER, linewidth=1.5)
        axis.tick_params(axis="y", which="both", length=0)
        _mark_epochs(axis, record)
        axis.set_title(CELL_TITLES[cell], loc="left")
        axis.set_xlabel("epoch")
    figure.colorbar(picture, ax=axes, shrink=0.5, label="share of the epoch")
    names = ", ".join(style_of(op).label for op in ops)
    figure.suptitle(f"rows of an edge, top to bottom: {names}", fontsize=8, color=MUTED)
    return figure


def heat_figure(line: dict, key: str) -> Figure:
    """A number of an epoch's line of history as colours, for each cell type: rows are edges, columns operations."""
    ops = records.operations(line)
    tables = {cell: records.values_of(line, key, cell, ops) for cell in line[key]}
    figure = Figure((WIDTH, 4.2), layout="constrained", dpi=100)
    axes = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    highest = max(np.nanmax(table) for table in tables.values()) or 1
    for axis, (cell, table) in zip(axes, tables.items(), strict=True):
        picture = axis.imshow(table, vmin=0, vmax=highest, cmap=HEAT, aspect="auto")
        axis.set_title(CELL_TITLES[cell], loc="left")
        axis.set_xticks(range(len(ops)), [style_of(op).label for op in ops], rotation=45, ha="right")
        axis.grid(False)
    axes[0].set_yticks(range(len(EDGE_NAMES[cell])), EDGE_NAMES[cell])
    figure.colorbar(picture, ax=axes, shrink=0.9)
    return figure
