"""Look at cells and at runs.

    python visualize.py DDSAS_cifar10                # the two cells -> DDSAS_cifar10.svg, .png, .gv
    python visualize.py logs/RUN                     # the same of a run; also of a genotype.txt or a "Genotype(...)"
    python visualize.py logs/RUN --all               # a GIF, trajectories and more besides, all in logs/RUN/report.html
    python visualize.py logs/RUN logs/OTHER ...      # a table of runs and genotypes, as Markdown

Cells are drawn by Graphviz (the program dot), all else by matplotlib. Runs of search.py, train_search.py and of
retraining are understood; of a retraining there are curves, and what evaluate.py found in its test images.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import subprocess
import sys
from collections import Counter, namedtuple
from collections.abc import Iterator
from pathlib import Path

import graphviz
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

import genotypes
import model
import nasbench201
from genotypes import CELL_TYPES, EDGE_LIST, NODES, Genotype
from lib import checkpoints, cli, data, records, report, runs
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
    "max_pool_3x3": Style("max 3×3", "max pool", "#d55e00", "dotted", (0, (1, 1)), 1.5),
    "avg_pool_3x3": Style("avg 3×3", "average pool", "#e69f00", "dotted", (0, (3, 1, 1, 1)), 1.5),
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
EDGES = dict.fromkeys(CELL_TYPES, EDGE_LIST) | {"cell": nasbench201.EDGE_LIST}  # (node, source), per cell type
SOURCES = ("$c_{k{-}2}$", "$c_{k{-}1}$", "0", "1", "2", "3")  # of DARTS' cells: the two inputs, then the nodes
EDGE_NAMES = dict.fromkeys(CELL_TYPES, [f"{SOURCES[source]} → {node}" for node, source in EDGE_LIST])
EDGE_NAMES |= {"cell": [f"{source} → {node}" for node, source in nasbench201.EDGE_LIST]}
NO_DOT = "no cell can be drawn without a working dot: apt install graphviz, brew install graphviz, or graphviz.org"


def style_of(op: str) -> Style:
    """The style of an operation; one that STYLES does not list is drawn dark and dash-dotted under its own name."""
    return STYLES.get(op) or Style(op, op, INK, "dashed", (0, (5, 1, 1, 1, 1, 1)), 1.3)


def line_style(op: str, scale: float = 0.8) -> dict:
    """The arguments of matplotlib for a line that stands for an operation."""
    return {"color": style_of(op).color, "linestyle": style_of(op).dashes, "linewidth": scale * style_of(op).width}


def tint(color: str, strength: float = 0.16) -> str:
    """The colour mixed with white."""
    return "#" + "".join(f"{round(255 * (1 - strength + strength * channel)):02x}" for channel in to_rgb(color))


# ---- genotypes -----------------------------------------------------------------------------------------------------
# All functions take a genotype of either space: a Genotype, or one of NAS-Bench-201, which has ``ops``.


def edges_of(genotype: Genotype) -> dict[str, list[tuple[tuple[int, int], str]]]:
    """Per cell type ((node, source), operation) of the edges that a genotype has."""
    if not isinstance(genotype, Genotype):
        return {"cell": list(zip(nasbench201.EDGE_LIST, genotype.ops, strict=True))}
    cells = {cell: enumerate(getattr(genotype, cell)) for cell in CELL_TYPES}
    return {cell: [((index // 2, source), op) for index, (op, source) in edges] for cell, edges in cells.items()}


def one_hot(genotype: Genotype) -> Counter:
    """The ones in the one-hot code of a genotype (DDSAS, figure 1a): one for each (cell, edge, operation) it has."""
    return Counter((cell, edge, op) for cell, edges in edges_of(genotype).items() for edge, op in edges)


def distance(first: Genotype, second: Genotype) -> float:
    """Cosine distance of the one-hot codes (DDSAS, figure 1a): 0 for equal genotypes, 1 for nothing in common."""
    one, other = one_hot(first), one_hot(second)
    return 1 - sum(one[key] * other[key] for key in one) / math.hypot(*one.values()) / math.hypot(*other.values())


def load_genotype(text: str) -> Genotype:
    """genotypes.load with a UserError."""
    try:
        return genotypes.load(text)
    except ValueError as error:
        raise cli.UserError(str(error)) from None


# ---- cells ---------------------------------------------------------------------------------------------------------


def cell_graph(genotype: Genotype, title: str = "", steady: bool = False) -> graphviz.Digraph:
    """Both cells of a genotype, operations as boxes on their edges; ``steady`` reserves a place for all other edges."""
    font = {"fontname": ",".join([*FONTS[:2], "sans-serif"]), "fontcolor": INK}
    graph = graphviz.Digraph(
        graph_attr={"rankdir": "LR", "newrank": "true", "nodesep": "0.11", "ranksep": "0.21", "pad": "0.1"}
        | {"bgcolor": PAPER, "label": graphviz.escape(title), "labelloc": "t", "labeljust": "l", **font},
        node_attr={"shape": "box", "style": "rounded,filled", "color": LINE, "fillcolor": SOFT, "fontsize": "12"}
        | {"height": "0.3", "width": "0.3", "margin": "0.08,0.03", **font},
        edge_attr={"arrowsize": "0.6", "penwidth": "1.4", **font},
    )
    for cell, edges in reversed(edges_of(genotype).items()):  # dot puts the first cluster at the bottom
        with graph.subgraph(name=f"cluster_{cell}") as part:
            part.attr(label=CELL_TITLES[cell], labeljust="l", color=LINE, style="rounded", fontsize="12", margin="10")
            sources, nodes = _draw_nodes(part, genotype, cell)
            _draw_edges(part, sources, nodes, cell, edges, steady)
    if isinstance(genotype, Genotype):
        for end in ("in0", "in1", "out"):  # both cells begin and end at the same place
            graph.body.append(f"\t{{rank=same; normal_{end}; reduce_{end}}}\n")
    return graph


def _draw_nodes(part: graphviz.Digraph, genotype: Genotype, cell: str) -> tuple[list[str], list[str]]:
    """Draw inputs, nodes and output; returns the names of the points that are sources, and of those that are nodes."""
    if cell == "cell":  # NAS-Bench-201: node 0 is the input, 3 the output
        points = [f"cell_{node}" for node in range(4)]
        for node, point in enumerate(points):
            part.node(point, str(node), shape="circle", margin="0")
        return points, points
    points = [f"{cell}_in0", f"{cell}_in1", *(f"{cell}_{node}" for node in range(NODES))]
    output = '<c<sub><font point-size="9">{}</font></sub>>'  # of a cell, by its place in the network
    part.node(points[1], output.format("k-1"))
    part.node(points[0], output.format("k-2"))
    for node in range(NODES):
        part.node(points[2 + node], str(node), shape="circle", margin="0")
    part.node(f"{cell}_out", output.format("k"))
    for index in getattr(genotype, f"{cell}_concat"):
        part.edge(points[index], f"{cell}_out", color=MUTED, penwidth="0.8", arrowsize="0.5")
    return points, points[2:]


def _draw_edges(
    part: graphviz.Digraph, sources: list[str], nodes: list[str], cell: str, edges: list, steady: bool
) -> None:
    if steady:
        edges = edges + [(edge, None) for edge in EDGES[cell] if edge not in dict(edges)]
    for index, ((node, source), op) in enumerate(sorted(edges, key=lambda edge: edge[0])):
        style = style_of(op or "none")
        hidden = {} if op else {"style": "invis"}
        size = {"width": "0.66", "fixedsize": "true"} if steady and (op is None or op in STYLES) else {}
        size |= {"height": "0.23", "margin": "0.06,0.02", "penwidth": "1.2", "fontsize": "10.5"}
        line = {"color": style.color, "style": style.line, "penwidth": str(style.width)} | hidden
        box = {"color": style.color, "fillcolor": tint(style.color), "fontcolor": "#111111"} | size | hidden
        name = f"{cell}_edge{index}"
        part.node(name, style.label if op else "", **box)
        room = "2" if source < 2 else "1"  # an edge that leaves an input must not cross the other input
        part.edge(sources[source], f"{name}:w", arrowhead="none", minlen=room, **line)
        part.edge(f"{name}:e", nodes[node], **line)


def draw_cells(genotype: Genotype, path: str | Path, title: str = "") -> list[Path]:
    """Draw both cells as ``path`` + .svg and .png, with dot's source as .gv; without dot, the .gv alone is written."""
    graph = cell_graph(genotype, title)
    contents = {"svg": _run_dot(graph, "svg"), "png": _run_dot(graph, "png", dpi="180"), "gv": graph.source}
    return [write(f"{path}.{suffix}", content) for suffix, content in contents.items() if content is not None]


def cell_image(genotype: Genotype, title: str = "") -> np.ndarray | None:
    """Both cells as a picture (height x width x 3, uint8), an edge always at the same place; None without dot."""
    png = _run_dot(cell_graph(genotype, title, steady=True), "png", dpi="110")
    return None if png is None else np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _run_dot(graph: graphviz.Digraph, kind: str, **attributes: str) -> bytes | None:
    """What dot makes of the graph; None if it is not installed or fails."""
    graph = graph.copy()
    graph.attr(**attributes)
    try:
        return graph.pipe(kind, quiet=True)
    except (OSError, subprocess.CalledProcessError, graphviz.ExecutableNotFound):
        return None


def write(path: str | Path, content: str | bytes) -> Path:
    """Write a file whole, with its folders; UserError if that is not possible."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_whole(path, content)
    except OSError as error:
        raise cli.UserError(f"{path} cannot be written ({error.strerror}); --out names another place") from None
    return Path(path)


# ---- figures of a run ----------------------------------------------------------------------------------------------


def load_run(folder: str | Path) -> Record:
    """Read a run folder. UserError when it is none, has no finished epoch, or holds a damaged line."""
    return records.read_run(folder, genotypes.load)


def save_figure(figure: Figure, path: str | Path) -> list[Path]:
    """Write a figure as ``path`` + .svg and .png. Returns the files."""
    files = []
    for suffix, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 160})):
        figure.savefig(buffer := io.BytesIO(), format=suffix, **options)
        figure.set_layout_engine("none")  # the first picture found the layout
        files.append(write(f"{path}.{suffix}", buffer.getvalue()))
    return files


def progress_figure(record: Record) -> Figure:
    """What is known of each epoch: accuracy and loss; of a search also how its architecture moved, and how good it is."""
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
    (values, ops), chosen = records.trajectory(record, cell), dict(edges_of(record.genotype)[cell])
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
    figure = Figure((WIDTH, 8.6), layout="constrained")
    for axis, cell in zip(figure.subplots(1, len(record.cells), squeeze=False)[0], record.cells, strict=True):
        shares, ops = records.subspace(record, cell)
        rows, chosen = len(ops) + 1, dict(edges_of(record.genotype)[cell])
        extent = (0.5, len(shares) + 0.5, rows * len(EDGES[cell]), 0)
        axis.imshow(_color_rows(shares, ops), extent=extent, aspect="auto", interpolation="nearest")
        axis.set_yticks([rows * (i + 0.45) for i in range(len(EDGES[cell]))], EDGE_NAMES[cell])
        for index, (edge, label) in enumerate(zip(EDGES[cell], axis.get_yticklabels(), strict=True)):
            if op := chosen.get(edge):
                label.set(color=INK, fontweight="bold")
                place = {"transform": axis.get_yaxis_transform(), "clip_on": False}
                axis.plot(
                    1.02, rows * index + ops.index(op) + 0.5, "<", color=style_of(op).color, markersize=5, **place
                )
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


@matplotlib.rc_context(RC)
def epoch_pictures(line: dict) -> dict[str, Figure | np.ndarray]:
    """What TensorBoard shows of a search's epoch, by name: heat maps as figures, and "cells" as by `cell_image`.

    ``line`` is the epoch's line of history.jsonl. Without dot there are no cells, of a retraining there is nothing.
    """
    pictures = {key: heat_figure(line, key) for key in ("saliency", "visits", "probabilities") if key in line}
    image = cell_image(genotypes.parse(line["genotype"])) if "genotype" in line else None
    return pictures | ({} if image is None else {"cells": image})


# ---- a run's page ---------------------------------------------------------------------------------------------------

PANELS = "A panel for each edge: a column for each source, a row for each node; shaded if in the genotype. "
CELLS_CAPTION = (
    "A node adds up its two operations; a cell puts out its nodes side by side. Thick lines are 5×5 kernels."
)


def write_report(folder: str | Path) -> list[Path]:
    """All pictures of a run, in its folder figures/, and its page report.html that holds them. Returns the files."""
    record, files, sections = load_run(folder), [], []
    args, out, name = record.info["args"], record.folder / "figures", record.folder.resolve().name
    if record.genotype:
        hint = "To keep it, paste it into genotypes.py under a name."
        sections.append(report.copyable("Genotype", str(record.genotype), hint))
    if record.genotypes:
        command = runs.retrain_command(record.info["script"], args, record.folder)
        sections.append(report.copyable("Train it from scratch", command))
    if record.genotype:
        files += draw_cells(record.genotype, out / "cells")
        svg = report.embed_svg(files[0].read_text(), "The cells") if len(files) > 1 else ""
        sections.append(report.section("The cells", svg, CELLS_CAPTION if svg else NO_DOT))
    if gif := evolution_gif(record):
        files.append(write(out / "evolution.gif", gif))
        picture = report.embed(gif, "The cells after each epoch")
        sections.append(report.section("How the cells evolved", picture, "The best architecture after each epoch."))
    for stem, title, caption, figure in figures(record):
        files += save_figure(figure, out / stem)
        sections.append(report.section(title, report.embed_svg(files[-2].read_text(), title), caption))
    sections += [report.test_section(record.folder), report.copyable("Command of this run", record.info["command"])]
    rows = [[key, str(value)] for key, value in [*sorted(args.items()), *record.info["versions"].items()]]
    sections.append(report.details("All arguments, and versions", report.table(rows)))
    about = [args.get("dataset"), args.get("space_config"), f"seed {args.get('seed')}"]
    about = " · ".join(str(item) for item in [*about, f"{len(record.history)} epochs", args.get("note")] if item)
    page = report.build_page(record.kind, name, about, list(list_facts(record)), sections)
    return [*files, write(record.folder / "report.html", page)]


def figures(record: Record) -> Iterator[tuple[str, str, str, Figure]]:
    """(name of the file, title, caption, figure) of everything that matplotlib draws of a run."""
    caption = "Distance: cosine distance of the one-hot genotypes of consecutive epochs; 0 is the same architecture."
    search = bool(record.genotypes)
    yield "progress" if search else "curves", "Progress", caption if search else "", progress_figure(record)
    gone = {"saliency": "A line ends where its operation leaves the space.", "probabilities": ""}
    if record.info["script"] == "train_search.py":
        gone["probabilities"] = "At the end of a stage each edge loses its weakest candidates."
    for cell in record.cells:
        title = f"{record.quantity.capitalize()}, {CELL_TITLES[cell].lower()}"
        yield f"{record.quantity}_{cell}", title, PANELS + gone[record.quantity], trajectory_figure(record, cell)
    if record.quantity:
        caption = "Which operations were active when. The stronger the colour, the more of the time."
        yield "subspace", "The subspace over time", caption, subspace_figure(record)


def evolution_gif(record: Record) -> bytes | None:
    """An animated GIF of the cells after each epoch, with their accuracy; None without dot, and for a retraining."""
    pictures = {text: cell_image(genotypes.parse(text)) for text in dict.fromkeys(map(str, record.genotypes))}
    if not pictures or any(picture is None for picture in pictures.values()):
        return None
    texts = []
    for epoch, (line, genotype) in enumerate(zip(record.history, record.genotypes, strict=True)):
        text = f"stage {line['stage'] + 1}, " if "stage" in line else ""
        text += f"epoch {line['epoch'] + 1}"
        if line.get("valid_acc") is not None:
            text += f"   validation {line['valid_acc']:.1f} %"
        if epoch:
            ops = one_hot(genotype)
            changed = (ops - one_hot(record.genotypes[epoch - 1])).total()
            text += f"   {changed} of {ops.total()} operations changed" if changed else "   unchanged"
        texts.append(text)
    return report.animate([pictures[str(genotype)] for genotype in record.genotypes], texts)


def list_facts(record: Record) -> Iterator[tuple[str, str]]:
    """(number, what it is) of the tiles at the top of the page."""
    yield from report.list_results(record)
    if genotype := record.genotype:
        known = ("dataset", "image_size") if record.genotypes else ("dataset", "image_size", "init_channels", "layers")
        size = {key: record.info["args"].get(key) for key in known}
        channels, layers, parameters, multiply_adds = measure(genotype, size)
        unit, cell = ("layers", ", normal cell") if isinstance(genotype, Genotype) else ("cells a stage", "")
        yield f"{parameters:.2f} M", f"parameters at {channels} channels, {layers} {unit}"
        yield f"{multiply_adds:.0f} M", "multiply-adds of an image"
        yield str(genotypes.count_skips(genotype)), f"skip connections{cell}"
    yield from report.list_costs(record)


def measure(genotype: Genotype, args: dict) -> tuple[int, int, float, float]:
    """Channels, layers, parameters and multiply-adds (in millions, without auxiliary head) of a genotype's network.

    ``args`` may say dataset, image_size, init_channels and layers as a retraining does; else they are the papers'.
    """
    info = data.INFO.get(args.get("dataset") or "cifar10", data.INFO["folder"])
    pixels = args.get("image_size") or info.image_size
    large = pixels >= 96
    channels, layers = ((46, 14) if large else (36, 20)) if isinstance(genotype, Genotype) else (16, 5)
    channels, layers = args.get("init_channels") or channels, args.get("layers") or layers
    with torch.device("meta"):
        classes = info.num_classes or (1000 if large else 10)
        network = model.network_for(large, channels, classes, layers, False, genotype)
        costs = model.count_parameters(network), model.count_multiply_adds(network, pixels)
    return channels, layers, *(cost / 1e6 for cost in costs)


# ---- comparison of runs --------------------------------------------------------------------------------------------

TEXTS = ("run", "search", "seed", "genotype")
NUMBERS = {"skips": ".0f", "params M": ".2f", "madds M": ".0f", "minutes": ".1f", "memory GB": ".2f"}
NUMBERS |= {"valid %": ".2f", "test %": ".2f"}


def compare(targets: list[str]) -> list[dict]:
    """A row {column: value} for each run or genotype, with the genotype as "found".

    A retraining of what one of the searches found joins the row of that search; "tests" are the best accuracies of all.
    Networks are measured at the size of the papers: that for ImageNet if one of the runs is of ImageNet.
    """
    rows, retrainings, large = [], [], False
    for target in targets:
        row = dict.fromkeys(TEXTS, "–") | dict.fromkeys(NUMBERS, math.nan) | {"tests": []}
        if not os.path.isfile(os.path.join(target, "args.json")):  # Path.is_file raises on a text too long for a path
            name = target if len(target) < 40 else "Genotype(...)"
            rows.append(row | {"run": name, "found": load_genotype(target)})
            continue
        record = load_run(target)
        args = record.info["args"]
        large = large or args.get("dataset") == "imagenet"
        row |= {"run": record.folder.resolve().name, "seed": str(args.get("seed")), "found": record.genotype}
        if record.genotypes:
            row["search"] = f"{record.kind.split()[0]} {args.get('space_config') or ''}".strip()
            row |= {"minutes": record.minutes, "memory GB": record.memory_gb, "valid %": record.last("valid_acc")}
            rows.append(row)
        else:
            retrainings.append(row | {"tests": [record.last("best_acc")]})
    for training in retrainings:
        owners = [row for row in rows if row["found"] and row["found"] == training["found"]]
        for row in owners:
            row["tests"] += training["tests"]
        rows += [] if owners else [training]
    known, size = {str(getattr(genotypes, name)): name for name in genotypes.names()}, {"dataset": "imagenet"}
    for row in rows:
        row["test %"] = float(np.mean(row["tests"])) if row["tests"] else math.nan
        if found := row["found"]:
            row["genotype"] = known.setdefault(str(found), f"cell {len(known) + 1 - len(genotypes.names())}")
            row["skips"] = genotypes.count_skips(found)
            _, _, row["params M"], row["madds M"] = measure(found, size if large else {})
    return rows


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of texts, the header first, as an aligned table in Markdown; columns of numbers to the right."""
    columns = []
    for heading, *texts in zip(*rows, strict=True):
        width, right = max(map(len, [heading, *texts])), heading in NUMBERS
        rule = "-" * (width - 1) + ":" if right else "-" * width
        columns.append([text.rjust(width) if right else text.ljust(width) for text in [heading, rule, *texts]])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def comparison_table(rows: list[dict]) -> str:
    """The comparison as a table in Markdown, with the genotypes written out below."""
    texts = [[*TEXTS, *NUMBERS]]
    for row in rows:
        numbers = ["–" if math.isnan(row[name]) else format(row[name], form) for name, form in NUMBERS.items()]
        if len(row["tests"]) > 1:
            numbers[-1] += f" ± {np.std(row['tests'], ddof=1):.2f} ({len(row['tests'])})"
        texts.append([row[name] for name in TEXTS] + numbers)
    found = {row["genotype"]: row["found"] for row in rows if row["found"]}
    return "\n".join([markdown_table(texts), "", *(f"{name} = {genotype}" for name, genotype in found.items())])


# ---- command line --------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    """Draw what was asked for and print the files that were written."""
    one = len(args.targets) == 1 and not args.all
    if args.out and not one:
        raise cli.UserError("--out is where to draw the cells of one genotype; give one target, without --all")
    if not (one or args.all):
        print(comparison_table(compare(args.targets)))
        return
    with matplotlib.rc_context(RC):
        files = [file for target in args.targets for file in (_draw(target, args.out) if one else write_report(target))]
    print(*files, sep="\n")


def _draw(target: str, out: str | None) -> list[Path]:
    """The cells of one genotype: beside the run they come from, else in the current folder under their name."""
    is_run = os.path.isdir(target)  # False for a text too long for a path
    name = Path(target).resolve().name if is_run else Path(target).stem if target.isidentifier() else "cells"
    files = draw_cells(load_genotype(target), out or (Path(target, "figures/cells") if is_run else name), title=name)
    if len(files) == 1:
        raise cli.UserError(f"{NO_DOT}; only {files[0]} was written, which dot -Tsvg -O {files[0]} draws")
    return files


def get_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("targets", nargs="+", metavar="RUN|GENOTYPE", help="run folder, name, genotype.txt, literal; several: compare")
    add("--all", action="store_true", help="all pictures of a run, and its report.html")
    add("--out", metavar="PATH", help="where to draw the cells to, without suffix")
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
