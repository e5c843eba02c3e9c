"""How things are drawn: the style of every operation, and the figures of a run."""

from __future__ import annotations

import io
import math
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lib import records
from lib.checkpoints import write_whole
from lib.cli import UserError
from lib.records import Record
from lib.report import BLUE, INK, LINE, MUTED, PAPER, SOFT

# ---- one style for all figures --------------------------------------------------------------------------------------
# The colours are those of Okabe and Ito, which colour-blind readers can tell apart. Each kind of operation has a colour
# and a line of its own, and 5x5 kernels have thicker lines than 3x3 ones, so figures survive printing in grey.

Style = namedtuple("Style", "label kind color line dashes width")  # line in Graphviz and dashes in matplotlib; points
STYLES = {
    "none": Style("none", "none", "#999999", "dotted", (0, (1, 2)), 1.0),
    "skip_connect": Style("skip", "skip connection", "#009e73", "solid", (0, (6, 1, 1, 1)), 1.3),
    "sep_conv_3x3": Style("sep 3×3", "separable conv", "#0072b2", "solid", "-", 1.3),
    "sep_conv_5x5": Style("sep 5×5", "separable conv", "#0072b2", "solid", "-", 2.3),
    "dil_conv_3x3": Style("dil 3×3", "dilated conv", "#cc79a7", "dashed", (0, (4, 1.5)), 1.3),
    "dil_conv_5x5": Style("dil 5×5", "dilated conv", "#cc79a7", "dashed", (0, (4, 1.5)), 2.3),
    "sep_conv_7x7": Style("sep 7×7", "separable conv", "#0072b2", "solid", "-", 3.3),
    "dil_conv_7x7": Style("dil 7×7", "dilated conv", "#cc79a7", "dashed", (0, (4, 1.5)), 3.3),
    "max_pool_3x3": Style("max 3×3", "max pool", "#d55e00", "dotted", (0, (1, 1)), 1.5),
    "avg_pool_3x3": Style("avg 3×3", "average pool", "#e69f00", "dotted", (0, (3, 1, 1, 1)), 1.5),
    "max_pool_5x5": Style("max 5×5", "max pool", "#d55e00", "dotted", (0, (1, 1)), 2.5),
    "avg_pool_5x5": Style("avg 5×5", "average pool", "#e69f00", "dotted", (0, (3, 1, 1, 1)), 2.5),
    "conv_7x1_1x7": Style("7×1, 1×7", "convolution", "#56b4e9", "solid", (0, (8, 1)), 2.5),
    "nor_conv_1x1": Style("conv 1×1", "convolution", "#56b4e9", "solid", (0, (8, 1)), 1.0),  # NAS-Bench-201
    "nor_conv_3x3": Style("conv 3×3", "convolution", "#56b4e9", "solid", (0, (8, 1)), 1.7),
}
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
    """The style of an operation; one that STYLES does not list is drawn dark and dash-dotted under its own name."""
    return STYLES.get(op) or Style(op, op, INK, "dashed", (0, (5, 1, 1, 1, 1, 1)), 1.3)


def line_style(op: str, scale: float = 0.8) -> dict:
    """The arguments of matplotlib for a line that stands for an operation."""
    return {"color": style_of(op).color, "linestyle": style_of(op).dashes, "linewidth": scale * style_of(op).width}


def tint(color: str, strength: float = 0.16) -> str:
    """The colour mixed with white."""
    return "#" + "".join(f"{round(255 * (1 - strength + strength * channel)):02x}" for channel in to_rgb(color))


# ---- genotypes of both spaces, told apart by what they have ---------------------------------------------------------


def list_edges(genotype: Any) -> dict[str, list[tuple[tuple[int, int], str]]]:
    """Per cell type ((node, source), operation) of the edges that a genotype has."""
    if hasattr(genotype, "ops"):  # NAS-Bench-201
        return {"cell": list(zip(EDGES["cell"], genotype.ops, strict=True))}
    cells = {cell: enumerate(getattr(genotype, cell)) for cell in ("normal", "reduce")}
    return {cell: [((index // 2, source), op) for index, (op, source) in edges] for cell, edges in cells.items()}


def one_hot(genotype: Any) -> Counter:
    """The ones in the one-hot code of a genotype (DDSAS, figure 1a): one for each (cell, edge, operation) it has."""
    return Counter((cell, edge, op) for cell, edges in list_edges(genotype).items() for edge, op in edges)


def distance(first: Any, second: Any) -> float:
    """Cosine distance of the one-hot codes (DDSAS, figure 1a): 0 for equal genotypes, 1 for nothing in common."""
    one, other = one_hot(first), one_hot(second)
    return 1 - sum(one[key] * other[key] for key in one) / math.hypot(*one.values()) / math.hypot(*other.values())


# ---- figures of a run ----------------------------------------------------------------------------------------------


def write(path: str | Path, content: str | bytes) -> Path:
    """Write a file whole, with its folders; UserError if that is not possible."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); expected room in a folder that is yours"
        ) from None
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
    panels = [
        (title, {name: record.series(f"{part}_{key}") for name, part in parts.items()})
        for key, title in (("acc", "Accuracy (%)"), ("loss", "Loss"))
    ]
    moved = np.array([math.nan, *map(distance, record.genotypes, record.genotypes[1:])])
    panels.append(("Distance to the architecture one epoch before", {"": moved}))
    entropy = {CELL_TITLES[cell].lower(): record.series("alpha_entropy", cell) for cell in record.cells}
    panels.append(("Entropy of alpha", entropy))
    for key, title in (("acc", "Looked-up test accuracy (%)"), ("rank", "Rank among all architectures")):
        panels.append((title, {name: record.series(f"table_{key}", name) for name in record.parts(f"table_{key}")}))
    panels = [(title, curves) for title, curves in panels if any(np.isfinite(y).any() for y in curves.values())]
    rows = max(1, math.ceil(len(panels) / 2))
    figure = Figure((WIDTH, 0.3 + 2.1 * rows), layout="constrained")
    for axis, panel in zip(figure.subplots(rows, 2, squeeze=False).flat, [*panels, None], strict=False):
        axis.set_visible(panel is not None)
        if panel:
            _draw_progress(axis, record, *panel)
    return figure


def _draw_progress(axis: Axes, record: Record, title: str, curves: dict[str, np.ndarray]) -> None:
    """A panel with curves over the epochs; a run of few epochs shows its points too."""
    curves = {name: values for name, values in curves.items() if np.isfinite(values).any()}
    for (name, values), (color, dashes) in zip(curves.items(), CURVES, strict=False):
        marker = {"marker": "o", "markersize": 3} if np.isfinite(values).sum() < 16 else {}
        axis.plot(*_break_at_stages(record, values), color=color, linestyle=dashes, label=name, **marker)
    axis.set_title(title, loc="left")
    axis.set_xlabel("epoch")
    axis.ticklabel_format(axis="y", useOffset=False)
    margin = max(0.5, 0.02 * len(record.history))
    axis.set_xlim(1 - margin, len(record.history) + margin)
    _mark_epochs(axis, record)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="best", handlelength=2.4)


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
            axis.plot(*_break_at_stages(record, curve), **line_style(name))  # the genotype's last, on top
        _mark_epochs(axis, record)
        title = f"{EDGE_NAMES[cell][index]} · {style_of(op).label}" if op else EDGE_NAMES[cell][index]
        axis.set_title(title, fontsize=8, color=INK if op else MUTED)
        axis.set_facecolor(SOFT if op else "none")
        axis.tick_params(labelsize=7, labelleft=source == 0, labelbottom=node == nodes[-1])
    figure.supxlabel("epoch", fontsize=8.5)
    figure.supylabel(record.quantity, fontsize=8.5)
    corner = figure.add_subplot(grid[0, (1 if cell == "cell" else 2) :])
    corner.axis("off")
    keys = [Line2D([], [], label=style_of(op).label, **line_style(op)) for op in ops]
    keys.append(Patch(facecolor=SOFT, edgecolor=MUTED, linewidth=0.5, label="in the genotype"))
    title = f"{CELL_TITLES[cell]}: {record.quantity}"
    corner.legend(handles=keys, loc="upper right", ncols=3, handlelength=2.6, title=title)
    return figure


def subspace_figure(record: Record) -> Figure:
    """Which operations were active when, on each edge of the cells; grey where an operation is not available."""
    heights = [len(EDGES[cell]) * (1 + len(records.operations(record.history[0]))) for cell in record.cells]
    figure = Figure((WIDTH, 1.0 + 0.06 * max(heights)), layout="constrained")
    for axis, cell in zip(figure.subplots(1, len(record.cells), squeeze=False)[0], record.cells, strict=True):
        shares, ops = records.subspace(record, cell)
        rows, chosen = len(ops) + 1, dict(list_edges(record.genotype)[cell])
        extent = (0.5, len(shares) + 0.5, rows * len(EDGES[cell]), 0)
        axis.imshow(_color_rows(shares, ops), extent=extent, aspect="auto", interpolation="nearest")
        axis.set_yticks([rows * (i + 0.45) for i in range(len(EDGES[cell]))], EDGE_NAMES[cell])
        for index, (edge, label) in enumerate(zip(EDGES[cell], axis.get_yticklabels(), strict=True)):
            if op := chosen.get(edge):
                label.set(color=INK, fontweight="bold")
                place = {"transform": axis.get_yaxis_transform(), "clip_on": False}
                place |= {"color": style_of(op).color, "markersize": 5}
                axis.plot(1.02, rows * index + ops.index(op) + 0.5, "<", **place)
        axis.tick_params(axis="y", length=0)
        axis.grid(False)
        axis.spines[["left", "bottom"]].set_visible(False)
        _mark_epochs(axis, record)
        axis.set_title(CELL_TITLES[cell], loc="left")
        axis.set_xlabel("epoch")
    keys = [Patch(facecolor=style_of(op).color, label=style_of(op).label) for op in ops]
    keys.append(Patch(facecolor=MUTED, alpha=0.22, label="not available"))
    keys.append(Line2D([], [], color=MUTED, marker="<", linestyle="none", markersize=5, label="in the genotype"))
    figure.legend(handles=keys, loc="outside upper center", ncols=5, title="rows of an edge, top to bottom")
    return figure


def _color_rows(shares: np.ndarray, ops: list[str]) -> np.ndarray:
    """An RGBA picture, epochs to the right: a row for each operation of each edge, an empty one after each edge."""
    epochs, edges, _ = shares.shape
    picture = np.zeros((edges, len(ops) + 1, 5, epochs, 4))  # a row: 4 pixels, 1 transparent
    for index, op in enumerate(ops):
        share = shares[:, :, index].T[:, None]
        gone = np.isnan(share)
        picture[:, index, :4, :, :3] = np.where(gone[..., None], to_rgb(MUTED), to_rgb(style_of(op).color))
        picture[:, index, :4, :, 3] = np.where(gone, 0.22, share)
    return picture.reshape(-1, epochs, 4)


def heat_figure(line: dict, key: str) -> Figure:
    """A number of an epoch's line of history as colours, for each cell type: rows are edges, columns operations."""
    ops = records.operations(line)
    tables = {cell: records.values_of(line, key, cell, ops) for cell in line[key]}
    figure = Figure((WIDTH, 4.2), layout="constrained", dpi=100)
    axes = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    highest = max(np.nanmax(table) for table in tables.values()) or 1
    for axis, (cell, table) in zip(axes, tables.items(), strict=True):
        picture = axis.imshow(table, vmin=0, vmax=highest, cmap="viridis", aspect="auto")
        axis.set_title(CELL_TITLES[cell], loc="left")
        axis.set_xticks(range(len(ops)), [style_of(op).label for op in ops], rotation=45, ha="right")
        axis.tick_params(length=0)
        axis.grid(False)
        axis.spines[:].set_visible(False)
    axes[0].set_yticks(range(len(EDGE_NAMES[cell])), EDGE_NAMES[cell])
    figure.colorbar(picture, ax=axes, shrink=0.9).outline.set_visible(False)
    return figure
