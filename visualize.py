"""Look at cells and at searches: pictures, a report, a comparison.

    python visualize.py DDSAS_cifar10                # the two cells -> DDSAS_cifar10.svg, .png, .gv
    python visualize.py logs/RUN                     # the same of a run; also of a genotype.txt or a "Genotype(...)"
    python visualize.py logs/RUN --all               # a GIF, trajectories and more besides, all in logs/RUN/report.html
    python visualize.py logs/RUN logs/OTHER ...      # a table of runs, printed and drawn

Cells are drawn by Graphviz (the program dot), all else by matplotlib. Runs of search.py, train_search.py and of
retraining are understood; of a retraining there are curves only.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import math
import os
import sys
from collections import Counter, namedtuple
from dataclasses import dataclass
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
from matplotlib.textpath import TextPath
from PIL import Image

import genotypes
import model
import nasbench201
from genotypes import CELL_TYPES, EDGE_LIST, NODES, Genotype
from lib import checkpoints, cli
from nasbench201 import Architecture

# ---- one look for all figures --------------------------------------------------------------------------------------
# The colours are those of Okabe and Ito, which colour-blind readers can tell apart. Each kind of operation has a colour
# and a line of its own, and 5x5 kernels have thicker lines than 3x3 ones, so figures survive printing in grey.

Look = namedtuple("Look", "label kind color style dashes width")  # line in Graphviz (style) and matplotlib; points
LOOK = {
    "none": Look("none", "none", "#999999", "dotted", (0, (1, 2)), 1.0),
    "skip_connect": Look("skip", "skip connection", "#009e73", "solid", (0, (6, 1, 1, 1)), 1.3),
    "sep_conv_3x3": Look("sep 3×3", "separable conv", "#0072b2", "solid", "-", 1.3),
    "sep_conv_5x5": Look("sep 5×5", "separable conv", "#0072b2", "solid", "-", 2.3),
    "dil_conv_3x3": Look("dil 3×3", "dilated conv", "#cc79a7", "dashed", (0, (4, 1.5)), 1.3),
    "dil_conv_5x5": Look("dil 5×5", "dilated conv", "#cc79a7", "dashed", (0, (4, 1.5)), 2.3),
    "max_pool_3x3": Look("max 3×3", "max pool", "#d55e00", "dotted", (0, (1, 1)), 1.5),
    "avg_pool_3x3": Look("avg 3×3", "average pool", "#e69f00", "dotted", (0, (3, 1, 1, 1)), 1.5),
    "nor_conv_1x1": Look("conv 1×1", "convolution", "#56b4e9", "solid", (0, (8, 1)), 1.0),  # NAS-Bench-201
    "nor_conv_3x3": Look("conv 3×3", "convolution", "#56b4e9", "solid", (0, (8, 1)), 1.7),
}
INK, MUTED, LINE, SOFT, PAPER, BLUE = "#1f2933", "#5f6b7a", "#d5dae1", "#f1f4f8", "#ffffff", "#0072b2"
CURVES = {"train": ("#56b4e9", "--"), "validation": (BLUE, "-"), "test": ("#d55e00", "-")}  # colour and line
CURVES |= {"normal cell": (BLUE, "-"), "reduction cell": ("#d55e00", "--"), "cell": (BLUE, "-"), "": (INK, "-")}
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
NO_DOT = "no cell can be drawn, dot is not installed: apt install graphviz, brew install graphviz, or graphviz.org"


def look(op: str) -> Look:
    """The look of an operation; one that LOOK does not list is drawn dark and dash-dotted under its own name."""
    return LOOK.get(op) or Look(op, op, INK, "dashed", (0, (5, 1, 1, 1, 1, 1)), 1.3)


def line_style(op: str, scale: float = 0.8) -> dict:
    """The arguments of matplotlib for a line that stands for an operation."""
    return {"color": look(op).color, "linestyle": look(op).dashes, "linewidth": scale * look(op).width}


def tint(color: str, strength: float = 0.16) -> str:
    """The colour mixed with white."""
    return "#" + "".join(f"{round(255 * (1 - strength + strength * channel)):02x}" for channel in to_rgb(color))


def kept(genotype: Genotype | Architecture) -> dict[str, list[tuple[tuple[int, int], str]]]:
    """Per cell type ((node, source), operation) of the edges that a genotype keeps."""
    if isinstance(genotype, Architecture):
        return {"cell": list(zip(nasbench201.EDGE_LIST, genotype.ops, strict=True))}
    cells = {cell: enumerate(getattr(genotype, cell)) for cell in CELL_TYPES}
    return {cell: [((index // 2, source), op) for index, (op, source) in edges] for cell, edges in cells.items()}


def one_hot(genotype: Genotype | Architecture) -> Counter:
    """The ones in the one-hot code of a genotype (DDSAS, figure 1a): one for each (cell, edge, operation) it keeps."""
    return Counter((cell, edge, op) for cell, edges in kept(genotype).items() for edge, op in edges)


def distance(first: Genotype | Architecture, second: Genotype | Architecture) -> float:
    """Cosine distance of the one-hot codes (DDSAS, figure 1a): 0 for equal genotypes, 1 for nothing in common."""
    one, other = one_hot(first), one_hot(second)
    return 1 - sum(one[key] * other[key] for key in one) / math.hypot(*one.values()) / math.hypot(*other.values())


# ---- cells ---------------------------------------------------------------------------------------------------------


def cell_graph(genotype: Genotype | Architecture, title: str = "", steady: bool = False) -> graphviz.Digraph:
    """Both cells of a genotype, operations as boxes on their edges; ``steady`` keeps a place for all other edges."""
    font = {"fontname": ",".join([*FONTS[:2], "sans-serif"]), "fontcolor": INK}
    graph = graphviz.Digraph(
        graph_attr={"rankdir": "LR", "newrank": "true", "nodesep": "0.11", "ranksep": "0.21", "pad": "0.1"}
        | {"bgcolor": PAPER, "label": f"<{_legend(genotype, title, steady)}>", "labelloc": "t", **font},
        node_attr={"shape": "box", "style": "rounded,filled", "color": LINE, "fillcolor": SOFT, "fontsize": "12"}
        | {"height": "0.3", "width": "0.3", "margin": "0.08,0.03", **font},
        edge_attr={"arrowsize": "0.6", "penwidth": "1.4", **font},
    )
    for cell, edges in reversed(kept(genotype).items()):  # from left to right, dot puts the first cluster at the bottom
        with graph.subgraph(name=f"cluster_{cell}") as part:
            part.attr(label=CELL_TITLES[cell], labeljust="l", color=LINE, style="rounded", fontsize="12", margin="10")
            points = _draw_nodes(part, genotype, cell)
            _draw_edges(part, points, cell, edges, steady)
    if isinstance(genotype, Genotype):
        for end in ("in0", "in1", "out"):  # both cells begin and end at the same place
            graph.body.append(f"\t{{rank=same; normal_{end}; reduce_{end}}}\n")
    return graph


def _draw_nodes(part: graphviz.Digraph, genotype: Genotype | Architecture, cell: str) -> dict[str, list[str]]:
    """Draw inputs, nodes and output; returns the names of the points that are sources, and of those that are nodes."""
    if cell == "cell":  # NAS-Bench-201: node 0 is the input, 3 the output
        points = [f"cell_{node}" for node in range(4)]
        for node, point in enumerate(points):
            part.node(point, str(node), shape="circle", margin="0")
        return {"sources": points, "nodes": points}
    points = [f"{cell}_in0", f"{cell}_in1", *(f"{cell}_{node}" for node in range(NODES))]
    output = '<c<sub><font point-size="9">{}</font></sub>>'  # of a cell, by its place in the network
    part.node(points[1], output.format("k-1"))
    part.node(points[0], output.format("k-2"))
    for node in range(NODES):
        part.node(points[2 + node], str(node), shape="circle", margin="0")
    part.node(f"{cell}_out", output.format("k"))
    return {"sources": points, "nodes": points[2:], "out": [points[i] for i in getattr(genotype, f"{cell}_concat")]}


def _draw_edges(part: graphviz.Digraph, points: dict[str, list[str]], cell: str, edges: list, steady: bool) -> None:
    if steady:
        edges = edges + [(edge, None) for edge in EDGES[cell] if edge not in dict(edges)]
    for index, ((node, source), op) in enumerate(sorted(edges, key=lambda edge: edge[0])):
        label, _, color, style, _, width = look(op or "none")
        hidden = {} if op else {"style": "invis"}
        size = {"width": "0.66", "fixedsize": "true"} if steady and (op is None or op in LOOK) else {}
        size |= {"height": "0.23", "margin": "0.06,0.02", "penwidth": "1.2", "fontsize": "10.5"}
        box, line = f"{cell}_edge{index}", {"color": color, "style": style, "penwidth": str(width)} | hidden
        part.node(box, label if op else "", color=color, fillcolor=tint(color), fontcolor="#111111", **size, **hidden)
        room = "2" if source < 2 else "1"  # an edge that leaves an input must not cross the other input
        part.edge(points["sources"][source], f"{box}:w", arrowhead="none", minlen=room, **line)
        part.edge(f"{box}:e", points["nodes"][node], **line)
    for point in points.get("out", []):
        part.edge(point, f"{cell}_out", color=MUTED, penwidth="0.8", arrowsize="0.5")


def _legend(genotype: Genotype, title: str, everything: bool) -> str:
    """An HTML-like label of Graphviz: the title, and below it the kinds of operations that occur (or may occur)."""
    ops = {op for _, _, op in one_hot(genotype)} | set(_primitives(genotype) if everything else ()) - {"none"}
    kinds = {look(op).kind: look(op) for op in [*LOOK, *sorted(ops - LOOK.keys())] if op in ops}
    keys = "".join(
        f'<td bgcolor="{tint(key.color)}" color="{key.color}" border="1" style="rounded,{key.style}" width="16"></td>'
        f'<td align="left"><font point-size="10.5">{html.escape(kind)}&nbsp; </font></td>'
        for kind, key in kinds.items()
    )
    heading = f'<font point-size="14"><b>{html.escape(title)}</b></font>'
    heading = f'<tr><td align="left">{heading}</td></tr>' if title else ""
    row = f'<table border="0" cellborder="0" cellspacing="4" cellpadding="1"><tr>{keys}</tr></table>'
    return f'<table border="0" cellspacing="2">{heading}<tr><td align="left">{row}</td></tr></table>'


def _primitives(genotype: Genotype | Architecture) -> list[str]:
    return nasbench201.PRIMITIVES if isinstance(genotype, Architecture) else genotypes.PRIMITIVES


def draw_cells(genotype: Genotype, path: str | Path, title: str = "") -> list[Path]:
    """Draw both cells as ``path`` + .svg and .png, with dot's source as .gv; without dot, the .gv alone is written."""
    graph = cell_graph(genotype, title)
    contents = {"svg": _dot(graph, "svg"), "png": _dot(graph, "png", dpi="180"), "gv": graph.source}
    if contents["svg"] is None:
        print(f"visualize: {NO_DOT}", file=sys.stderr)
    return [_write(f"{path}.{suffix}", content) for suffix, content in contents.items() if content is not None]


def cell_image(genotype: Genotype, title: str = "") -> np.ndarray | None:
    """Both cells as a picture (height x width x 3, uint8), an edge always at the same place; None without dot."""
    png = _dot(cell_graph(genotype, title, steady=True), "png", dpi="110")
    return None if png is None else np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _dot(graph: graphviz.Digraph, kind: str, **attributes: str) -> bytes | None:
    graph = graph.copy()
    graph.attr(**attributes)
    try:
        return graph.pipe(kind)
    except graphviz.ExecutableNotFound:
        return None


def _write(path: str, content: str | bytes) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_whole(Path(path), content)
    return Path(path)


# ---- runs ----------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What a run folder tells: ``info`` is args.json, ``history`` has a dict for each epoch; NaN is unknown."""

    folder: Path
    info: dict
    history: list[dict]
    quantity: str | None  # what ranks operations: "saliency" (DDSAS), "probability"; None: no search, or random search
    cells: list[str]  # the cell types of a search
    genotype: Genotype | None
    genotypes: list[Genotype]  # after each epoch; empty for a retraining
    minutes: float  # of computing
    memory_gb: float  # at its peak

    @property
    def stages(self) -> np.ndarray:
        """The lines of the history at which a new stage begins (P-DARTS), without the first."""
        return np.flatnonzero(np.diff(self.series("stage")) > 0) + 1

    def series(self, key: str) -> np.ndarray:
        """A number of each epoch, NaN where there is none."""
        return np.array([line.get(key) for line in self.history], dtype=float)

    def last(self, key: str) -> float:
        """The last finite number of a series, NaN if it has none."""
        return next((value for value in self.series(key)[::-1] if np.isfinite(value)), math.nan)


def load_run(folder: str | Path) -> Record:
    """Read a run folder. UserError when it is none, has no finished epoch, or holds a damaged line."""
    folder = Path(folder)
    if not (folder / "args.json").is_file():
        raise cli.UserError(f"{folder} is not a run folder (it has no args.json); give a folder that a search made")
    info, history, timing = (read_json(folder / name) for name in ("args.json", "history.jsonl", "timing.jsonl"))
    if not history:
        raise cli.UserError(f"{folder} has no finished epoch in history.jsonl yet; look again after the first one")
    try:
        info = {"script": "", "command": "", "versions": {}} | info | {"args": dict(info["args"])}
        quantity = "saliency" if "saliency" in history[0] else "probability" if "probabilities" in history[0] else None
        cells = list(history[0].get("saliency") or history[0].get("probabilities", {}))
        found = [genotypes.load(line["genotype"]) for line in history if "genotype" in line]
        file = folder / "genotype.txt"
        genotype = genotypes.load(file) if file.is_file() else found[-1] if found else None
        minutes = sum(line["seconds"] for line in timing) / 60 if timing else math.nan
        memory = max((line.get("peak_memory_mb") or 0 for line in timing), default=0) / 1024 or math.nan
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise cli.UserError(f"{folder} cannot be read: {error!r}") from None
    return Record(folder, info, history, quantity, cells, genotype, found, minutes, memory)


def read_json(path: Path) -> dict | list[dict]:
    """The content of a .json file, or the lines of a .jsonl file (none if it is missing, nor one that has no end)."""
    text = path.read_text() if path.is_file() else ""
    if path.suffix == ".jsonl":
        text = "[" + text.rpartition("\n")[0].replace("\n", ",\n") + "]"
    try:
        return json.loads(text)
    except ValueError as error:  # which says the line
        raise cli.UserError(f"{path} is damaged: {error}") from None


def trajectory(record: Record, cell: str) -> tuple[np.ndarray, list[str]]:
    """The record's quantity of each operation, epochs x edges x operations, NaN where it is gone; and their names."""
    if record.quantity == "saliency":
        ops = record.history[0]["primitives"]
        values = np.array([line["saliency"][cell] for line in record.history], dtype=float)
        return np.where(unpack([line["available"][cell] for line in record.history], len(ops)), values, math.nan), ops
    if "candidates" not in record.history[0]:  # DARTS, GDAS
        return np.array([line["probabilities"][cell] for line in record.history]), record.history[0]["primitives"]
    edges = record.history[0]["candidates"][cell]
    values = np.full((len(record.history), len(edges), len(edges[0])), math.nan)
    for epoch, line in enumerate(record.history):
        for edge, names in enumerate(line["candidates"][cell]):
            values[epoch, edge, [edges[0].index(name) for name in names]] = line["probabilities"][cell][edge]
    return values, edges[0]


def unpack(masks: list, ops: int) -> np.ndarray:
    """Active or available operations as bools from integers: one more dimension, bit k stands for operation k."""
    return np.array(masks)[..., None] >> np.arange(ops) & 1 == 1


def subspace(record: Record, cell: str, columns: int = 300) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The share of time that each operation was active, the operations that were available, and their names.

    Both arrays are columns x edges x operations. All epochs have as many columns: one for each sampling of the
    subspace where that makes at most ``columns`` in all, else several samplings share one.
    """
    values, ops = trajectory(record, cell)
    available = ~np.isnan(values)
    samplings = [[entry["active"][cell] for entry in line.get("samplings", [])] for line in record.history]
    if not any(samplings):
        return available * 1.0, available, ops
    width = max(1, min(max(map(len, samplings)), columns // len(samplings)))
    active = np.zeros((len(samplings), width, *values.shape[1:]))
    for epoch, masks in enumerate(samplings):
        if masks:
            starts = np.arange(width) * len(masks) // width
            counts = np.diff([*starts, len(masks)]).clip(1)
            active[epoch] = np.add.reduceat(unpack(masks, len(ops)) * 1.0, starts) / counts[:, None, None]
    return active.reshape(-1, *values.shape[1:]), available.repeat(width, axis=0), ops


# ---- figures of a run ----------------------------------------------------------------------------------------------


def save_figure(figure: Figure, path: str | Path) -> list[Path]:
    """Write a figure as ``path`` + .svg and .png. Returns the files."""
    files = []
    for suffix, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 160})):
        figure.savefig(buffer := io.BytesIO(), format=suffix, **options)
        figure.set_layout_engine("none")  # the first picture found the layout
        files.append(_write(f"{path}.{suffix}", buffer.getvalue()))
    return files


def progress_figure(record: Record) -> Figure:
    """Accuracy and loss over the epochs; of a search also the distance of consecutive architectures and the entropy."""
    search, judged = bool(record.quantity), np.isfinite(record.series("table_acc")).any()
    rows = 1 + search + (search and judged)
    figure = Figure((WIDTH, 0.3 + 2.1 * rows if search else 2.5), layout="constrained")
    axes = iter(figure.subplots(rows, 2, squeeze=False).flat)
    keys = {"train": "train"} | ({"validation": "valid"} if search else {"test": "test"})
    for key, title in (("acc", "Accuracy (%)"), ("loss", "Loss")):
        _progress(next(axes), record, title, {name: record.series(f"{part}_{key}") for name, part in keys.items()})
    if search:
        gaps = np.array([math.nan, *map(distance, record.genotypes, record.genotypes[1:])])
        axis = next(axes)
        axis.set_ylim(-0.02, 1.1 * max(0.2, *gaps[1:], 0))
        _progress(axis, record, "Distance to the architecture one epoch before", {"": gaps})
        entropy = np.array([list(line["alpha_entropy"].values()) for line in record.history]).T
        names = [CELL_TITLES[cell].lower() for cell in record.cells]
        _progress(next(axes), record, "Entropy of alpha", dict(zip(names, entropy, strict=True)))
    if search and judged:
        _progress(next(axes), record, "Looked-up test accuracy (%)", {"": record.series("table_acc")})
        _progress(next(axes), record, "Rank among all architectures", {"": record.series("table_rank")})
    return figure


def _progress(axis: Axes, record: Record, title: str, curves: dict[str, np.ndarray]) -> None:
    """A panel with curves of the table CURVES; a run of few epochs shows its points too."""
    for name, values in curves.items():
        if (known := np.isfinite(values).sum()) > 0:
            color, dashes = CURVES[name]
            marker = {"marker": "o", "markersize": 3} if known < 16 else {}
            axis.plot(*_broken(record, values), color=color, linestyle=dashes, label=name, **marker)
    axis.set_title(title, loc="left")
    axis.set_xlabel("epoch")
    axis.ticklabel_format(axis="y", useOffset=False)
    margin = max(0.5, 0.02 * len(record.history))
    axis.set_xlim(1 - margin, len(record.history) + margin)
    _epochs_below(axis, record)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="best", handlelength=2.4)


def _broken(record: Record, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of a curve, with a gap before each stage of P-DARTS: a stage starts with a new supernet."""
    epochs = np.arange(1.0, len(values) + 1)
    return np.insert(epochs, record.stages, math.nan), np.insert(values, record.stages, math.nan)


def _epochs_below(axis: Axes, record: Record) -> None:
    """Whole epochs on the axis, and lines between the stages of P-DARTS."""
    axis.xaxis.get_major_locator().set_params(integer=True)
    for line in record.stages:
        axis.axvline(line + 0.5, color=MUTED, linewidth=0.7, linestyle=":")


def trajectory_figure(record: Record, cell: str) -> Figure:
    """The record's quantity of each operation: a row for each node, a column for each source; the genotype shaded."""
    (values, ops), chosen = trajectory(record, cell), dict(kept(record.genotype)[cell])
    nodes = sorted({node for node, _ in EDGES[cell]})
    figure = Figure((WIDTH, 1.5 * len(nodes)), layout="constrained")
    grid, axis = figure.add_gridspec(len(nodes), 1 + max(source for _, source in EDGES[cell])), None
    for index, (node, source) in enumerate(EDGES[cell]):
        place, op = grid[nodes.index(node), source], chosen.get((node, source))
        axis = figure.add_subplot(place, sharex=axis, sharey=axis)
        for name, curve in sorted(zip(ops, values[:, index].T, strict=True), key=lambda pair: pair[0] == op):
            axis.plot(*_broken(record, curve), **line_style(name))  # the one of the genotype last, on top
        _epochs_below(axis, record)
        title = f"{EDGE_NAMES[cell][index]} · {look(op).label}" if op else EDGE_NAMES[cell][index]
        axis.set_title(title, fontsize=8, color=INK if op else MUTED)
        axis.set_facecolor(SOFT if op else "none")
        axis.tick_params(labelsize=7, labelleft=source == 0, labelbottom=node == nodes[-1])
    figure.supxlabel("epoch", fontsize=8.5)
    figure.supylabel(record.quantity, fontsize=8.5)
    corner = figure.add_subplot(grid[0, (1 if cell == "cell" else 2) :])
    corner.axis("off")
    keys = [Line2D([], [], label=look(op).label, **line_style(op)) for op in ops]
    keys.append(Patch(facecolor=SOFT, edgecolor=MUTED, linewidth=0.5, label="in the genotype"))
    title = f"{CELL_TITLES[cell]}: {record.quantity}"
    corner.legend(handles=keys, loc="upper right", ncols=3, handlelength=2.6, title=title)
    return figure


def subspace_figure(record: Record) -> Figure:
    """Which operations were active when, on each edge of the cells; grey where an operation is not available."""
    figure = Figure((WIDTH, 8.6), layout="constrained")
    for axis, cell in zip(figure.subplots(1, len(record.cells), squeeze=False)[0], record.cells, strict=True):
        active, available, ops = subspace(record, cell)
        extent = (0.5, len(record.history) + 0.5, active.shape[1] * (len(ops) + 1), 0)
        axis.imshow(_colored(active, available, ops), extent=extent, aspect="auto", interpolation="nearest")
        _label_edges(axis, cell, dict(kept(record.genotype)[cell]), ops)
        _epochs_below(axis, record)
        axis.set_title(CELL_TITLES[cell], loc="left")
        axis.set_xlabel("epoch")
    keys = [Patch(facecolor=look(op).color, label=look(op).label) for op in ops]
    keys.append(Patch(facecolor=MUTED, alpha=0.22, label="not available"))
    keys.append(Line2D([], [], color=MUTED, marker="<", linestyle="none", markersize=5, label="in the genotype"))
    figure.legend(handles=keys, loc="outside upper center", ncols=5, title="rows of an edge, top to bottom")
    return figure


def _colored(active: np.ndarray, available: np.ndarray, ops: list[str]) -> np.ndarray:
    """An RGBA picture, time to the right: a row for each operation of each edge, a transparent one after each edge."""
    picture = np.zeros((active.shape[1], len(ops) + 1, 5, active.shape[0], 4))  # a row: 4 pixels, 1 transparent
    for index, op in enumerate(ops):
        share, there = active[:, :, index].T[:, None], available[:, :, index].T[:, None]
        picture[:, index, :4, :, :3] = np.where(there[..., None], to_rgb(look(op).color), to_rgb(MUTED))
        picture[:, index, :4, :, 3] = np.where(there, share, 0.22)
    return picture.reshape(-1, active.shape[0], 4)


def _label_edges(axis: Axes, cell: str, chosen: dict[tuple[int, int], str], ops: list[str]) -> None:
    """The name of each edge beside its rows, and a mark at the operation that the genotype keeps."""
    tops = np.arange(len(EDGES[cell])) * (len(ops) + 1)
    axis.set_yticks(tops + len(ops) / 2, EDGE_NAMES[cell])
    for top, edge, label in zip(tops, EDGES[cell], axis.get_yticklabels(), strict=True):
        if op := chosen.get(edge):
            label.set(color=INK, fontweight="bold")
            right = {"clip_on": False, "transform": axis.get_yaxis_transform()}
            axis.plot(1.02, top + ops.index(op) + 0.5, "<", color=look(op).color, markersize=5, **right)
    axis.tick_params(axis="y", length=0)
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)


@matplotlib.rc_context(RC)
def heat_figure(values: dict[str, list[list[float]]], ops: list[str]) -> Figure:
    """A table of numbers for each cell type, (edges, operations), as colours: rows are edges, columns operations."""
    figure = Figure((WIDTH, 4.2), layout="constrained", dpi=100)
    axes = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for axis, (cell, table) in zip(axes, values.items(), strict=True):
        picture = axis.imshow(table, vmin=0, vmax=np.max(list(values.values())) or 1, cmap="viridis", aspect="auto")
        axis.set_title(CELL_TITLES[cell], loc="left")
        axis.set_xticks(range(len(ops)), [look(op).label for op in ops], rotation=45, ha="right")
        axis.tick_params(length=0)
        axis.grid(False)
        axis.spines[:].set_visible(False)
    axes[0].set_yticks(range(len(EDGE_NAMES[cell])), EDGE_NAMES[cell])
    figure.colorbar(picture, ax=axes, shrink=0.9).outline.set_visible(False)
    return figure


# ---- comparison of runs --------------------------------------------------------------------------------------------

CIFAR, IMAGENET = (36, 20, False), (46, 14, True)  # channels, layers, ImageNet's network: those of the papers
NASBENCH201 = (16, 5, False)  # layers are cells a stage
NAMES = ("run", "space", "seed", "genotype")
NUMBERS = {"skips": ("{:.0f}", None), "params M": ("{:.2f}", min), "madds M": ("{:.0f}", min)}  # format, better one
NUMBERS |= {"search min": ("{:.1f}", min), "memory GB": ("{:.2f}", min)}
NUMBERS |= {"valid %": ("{:.2f}", max), "test %": ("{:.2f}", max)}


def size_for(genotype: Genotype, size: tuple[int, int, bool]) -> tuple[int, int, bool]:
    """The size for a genotype of DARTS' space; an architecture of NAS-Bench-201 has one size only."""
    return NASBENCH201 if isinstance(genotype, Architecture) else size


def cost(genotype: Genotype, size: tuple[int, int, bool] = CIFAR) -> tuple[float, float]:
    """Parameters and multiply-adds, both in millions, of the discovered network, without auxiliary head."""
    channels, layers, imagenet = size_for(genotype, size)
    classes, pixels = (1000, 224) if imagenet else (10, 32)
    with torch.device("meta"):
        network = model.network_for(imagenet, channels, classes, layers, False, genotype)
        return model.count_parameters(network) / 1e6, model.count_multiply_adds(network, pixels) / 1e6


def compare(targets: list[str], size: tuple[int, int, bool] = CIFAR) -> list[dict]:
    """A row {column: value} for each run or genotype, with the genotype as "found".

    A retraining of what one of the searches found joins the row of that search; "tests" are the best accuracies of all.
    """
    empty = dict.fromkeys(NAMES, "–") | dict.fromkeys(NUMBERS, math.nan)
    rows, retrainings = [], []
    for target in targets:
        if not os.path.isfile(os.path.join(target, "args.json")):  # Path.is_file raises on a text too long for a path
            name = target if len(target) < 40 else "Genotype(...)"
            rows.append(empty | {"run": name, "found": _genotype(target), "tests": []})
            continue
        record = load_run(target)
        row = {"run": record.folder.resolve().name, "seed": str(record.info["args"].get("seed"))}
        row = empty | row | {"found": record.genotype, "tests": []}
        if record.quantity:
            row["space"] = record.info["args"].get("space_config") or "p-darts"
            row |= {"search min": record.minutes, "memory GB": record.memory_gb, "valid %": record.last("valid_acc")}
            rows.append(row)
        else:
            retrainings.append(row | {"tests": [float(np.nanmax(record.series("best_acc")))]})
    for training in retrainings:
        owners = [row for row in rows if row["found"] and row["found"] == training["found"]]
        for row in owners:
            row["tests"] += training["tests"]
        rows += [] if owners else [training]
    letters: dict[str, str] = {}
    for row in rows:
        row["test %"] = float(np.mean(row["tests"])) if row["tests"] else math.nan
        if found := row["found"]:
            row["genotype"] = letters.setdefault(str(found), _letter(found, len(letters)))
            row["skips"], (row["params M"], row["madds M"]) = genotypes.count_skips(found), cost(found, size)
    return rows


def _letter(genotype: Genotype, index: int) -> str:
    """A short name: that in genotypes.py, else A, B, ... , or a number when letters run out."""
    known = [name for name in genotypes.names() if getattr(genotypes, name) == genotype]
    return known[0] if known else chr(ord("A") + index) if index < 26 else f"#{index + 1}"


def _texts(row: dict) -> list[str]:
    """A row as text, column by column."""
    numbers = ["–" if math.isnan(row[name]) else form.format(row[name]) for name, (form, _) in NUMBERS.items()]
    if len(row["tests"]) > 1:
        numbers[-1] += f" ± {np.std(row['tests'], ddof=1):.2f} ({len(row['tests'])})"
    return [row[name] for name in NAMES] + numbers


def comparison_table(rows: list[dict]) -> str:
    """The comparison as text that is a table in Markdown too, with the genotypes written out below."""
    columns = []
    for heading, *texts in zip([*NAMES, *NUMBERS], *map(_texts, rows), strict=True):
        width = max(map(len, [heading, *texts]))
        if heading in NUMBERS:  # to the right
            columns.append([text.rjust(width) for text in [heading, "-" * (width - 1) + ":", *texts]])
        else:
            columns.append([text.ljust(width) for text in [heading, "-" * width, *texts]])
    lines = [f"| {' | '.join(line)} |" for line in zip(*columns, strict=True)]
    found = {row["genotype"]: row["found"] for row in rows if row["found"]}
    return "\n".join([*lines, "", *(f"{letter} = {genotype}" for letter, genotype in found.items())])


def comparison_figure(rows: list[dict], size: tuple[int, int, bool] = CIFAR) -> Figure:
    """The table as a figure: each number above a scale from the lowest to the highest in its column, the best bold."""
    columns = list(zip([*NAMES, *NUMBERS], *map(_texts, rows), strict=True))
    columns[0] = [text if len(text) <= 32 else f"{text[:15]}…{text[-16:]}" for text in columns[0]]  # of run folders
    widths = [max(30, *(TextPath((0, 0), text, size=8).get_extents().x1 for text in column)) for column in columns]
    lefts = np.cumsum([0, *(width + 12 for width in widths)])  # in points
    figure = Figure((lefts[-1] / 72 + 0.1, 0.75 + 0.42 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for left, (heading, *texts) in zip(lefts, columns, strict=False):
        axis.text(left, -0.75, heading, color=MUTED, fontsize=8, va="center")
        values = np.array([row[heading] for row in rows]) if heading in NUMBERS else np.full(len(rows), math.nan)
        known, better = set(values[np.isfinite(values)]), NUMBERS.get(heading, (None, None))[1]
        best = better(known) if better and len(known) > 1 else math.nan
        for line, (text, value) in enumerate(zip(texts, values, strict=True)):
            weight, middle = "bold" if value == best else "normal", line - 0.14 * (heading in NUMBERS)
            axis.text(left, middle, text, va="center", fontsize=8, fontweight=weight)
            if len(known) > 1 and np.isfinite(value):
                place = 34 * (value - min(known)) / (max(known) - min(known))
                scale = {"color": LINE, "linewidth": 1.2, "solid_capstyle": "round"}
                axis.plot([left + 1, left + 35], [line + 0.24] * 2, **scale)
                axis.plot(left + 1 + place, line + 0.24, "o", color=BLUE, markersize=3.2)
    axis.set_xlim(-2, lefts[-1])
    axis.set_ylim(len(rows) - 0.4, -1.1)
    axis.axhline(-0.5, color=LINE, linewidth=0.8)
    axis.axis("off")
    network = f"C={size[0]}, {size[1]} layers, {224 if size[2] else 32} pixels"
    note = f"parameters and multiply-adds at {network}; memory and minutes of the search"
    figure.supxlabel(note, fontsize=7, color=MUTED)
    return figure


# ---- command line --------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    """Draw what was asked for and print the files that were written."""
    with matplotlib.rc_context(RC):
        if args.all:
            from report import write_report  # which imports this module

            files = [file for target in args.targets for file in write_report(target)]
        elif len(args.targets) > 1:
            channels, layers, imagenet = IMAGENET if args.imagenet else CIFAR
            size = (args.init_channels or channels, args.layers or layers, imagenet)
            rows = compare(args.targets, size)
            print(comparison_table(rows) + "\n")
            files = save_figure(comparison_figure(rows, size), args.out or "comparison")
        else:
            files = _draw(args.targets[0], args.out)
    print(*files, sep="\n")


def _draw(target: str, out: str | None) -> list[Path]:
    """The cells of one genotype: beside the run they come from, else in the current folder under their name."""
    is_run = os.path.isdir(target)  # False for a text too long for a path
    name = Path(target).resolve().name if is_run else Path(target).stem if target.isidentifier() else "cells"
    files = draw_cells(_genotype(target), out or (Path(target, "figures", "cells") if is_run else name), title=name)
    if len(files) == 1:
        raise cli.UserError(f"only {files[0]} was written; with Graphviz, dot -Tsvg -O {files[0]} draws it")
    return files


def _genotype(target: str) -> Genotype:
    try:
        return genotypes.load(target)
    except ValueError as error:
        raise cli.UserError(str(error)) from None


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("targets", nargs="+", metavar="RUN|GENOTYPE", help="run folder, name, genotype.txt, literal; several: compare")
    add("--all", action="store_true", help="all figures of a run, and its report.html")
    add("--out", metavar="PATH", help="where to draw cells or comparison to, without suffix")
    add("--init_channels", type=cli.number(int, 1, 10_000), help="width at which to count (36; ImageNet: 46)")
    add("--layers", type=cli.number(int, 1, 1000), help="depth at which to count (20; ImageNet: 14)")
    add("--imagenet", action="store_true", help="count the ImageNet network at 224 pixels")
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
