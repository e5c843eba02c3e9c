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
import base64
import html
import io
import json
import math
import os
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import graphviz
import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath
from PIL import Image, ImageDraw, ImageFont

import genotypes
import model
import utils
from genotypes import Genotype

# ---------------------------------------------------------------------------------------------------------------------
# One look for all figures. Colours of Okabe and Ito, told apart by colour-blind readers; a kind of operation has its
# colour and its line, a 5x5 kernel a thicker line than a 3x3 one, so that figures survive printing in grey.
# ---------------------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """How an operation is drawn: label, kind (legend), colour, line in Graphviz and in matplotlib, width in points."""

    label: str
    kind: str
    color: str
    style: str = "solid"
    dashes: str | tuple = "-"
    width: float = 1.3


LOOK = {
    "none": Look("none", "none", "#999999", "dotted", (0, (1, 2)), 1.0),
    "skip_connect": Look("skip", "skip connection", "#009e73", "solid", (0, (6, 1, 1, 1)), 1.3),
    "sep_conv_3x3": Look("sep 3×3", "separable conv", "#0072b2", "solid", "-", 1.3),
    "sep_conv_5x5": Look("sep 5×5", "separable conv", "#0072b2", "solid", "-", 2.3),
    "dil_conv_3x3": Look("dil 3×3", "dilated conv", "#cc79a7", "dashed", (0, (4, 1.5)), 1.3),
    "dil_conv_5x5": Look("dil 5×5", "dilated conv", "#cc79a7", "dashed", (0, (4, 1.5)), 2.3),
    "max_pool_3x3": Look("max 3×3", "max pool", "#d55e00", "dotted", (0, (1, 1)), 1.5),
    "avg_pool_3x3": Look("avg 3×3", "average pool", "#e69f00", "dotted", (0, (3, 1, 1, 1)), 1.5),
}
INK, MUTED, LINE, SOFT, PAPER = "#1f2933", "#5f6b7a", "#d5dae1", "#f1f4f8", "#ffffff"
SERIES = {  # curves: colour and line
    "train": ("#56b4e9", "--"),
    "validation": ("#0072b2", "-"),
    "test": ("#d55e00", "-"),
    "normal": ("#0072b2", "-"),
    "reduce": ("#d55e00", "--"),
    "both": (INK, "-"),
}
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", SOFT: "var(--soft)", PAPER: "none"}
FONTS = ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"]
RC = {
    "font.family": "sans-serif",
    "font.sans-serif": FONTS,
    "font.size": 8.5,
    "mathtext.default": "regular",
    "svg.fonttype": "none",
    "svg.hashsalt": "figure",  # the same figure is the same file
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "lines.linewidth": 1.5,
}
WIDTH = 7.2  # inches of a page column
CELLS = ("normal", "reduce")
CELL_TITLES = {"normal": "Normal cell", "reduce": "Reduction cell"}
NO_DOT = (
    "dot is not installed, so no cell can be drawn: install Graphviz (apt install graphviz, brew install graphviz,"
    " conda install graphviz, or graphviz.org/download)"
)


def edge_list(nodes: int = genotypes.NODES) -> list[tuple[int, int]]:
    """(node, source) of the 14 edges of a cell, in the order of every table: node by node, source by source."""
    return [(node, source) for node in range(nodes) for source in range(2 + node)]


def source_name(source: int) -> str:
    """The name of a source of an edge, for matplotlib: the two inputs, then the intermediate nodes 0..3."""
    return ("$c_{k{-}2}$", "$c_{k{-}1}$")[source] if source < 2 else str(source - 2)


def tint(color: str, strength: float = 0.16) -> str:
    """The colour mixed with white."""
    return "#" + "".join(f"{round(255 * (1 - strength + strength * channel)):02x}" for channel in to_rgb(color))


def chosen(genotype: Genotype, cell: str) -> dict[tuple[int, int], str]:
    """{(node, source): operation} of the edges that a genotype keeps in a cell."""
    return {(index // 2, source): op for index, (op, source) in enumerate(getattr(genotype, cell))}


def distance(first: Genotype, second: Genotype) -> float:
    """Cosine distance of the one-hot codes of two genotypes (DDSAS, figure 1a): 0 for equal, 1 for nothing in common.

    A code has a one for each (cell, node, source, operation) that the genotype holds, 16 in all.
    """
    codes = [
        Counter((cell, i // 2, source, op) for cell in CELLS for i, (op, source) in enumerate(getattr(genotype, cell)))
        for genotype in (first, second)
    ]
    dot = sum(count * codes[1][key] for key, count in codes[0].items())
    return 1 - dot / math.sqrt(math.prod(sum(n * n for n in code.values()) for code in codes))


# ---------------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------------


def cell_graph(genotype: Genotype, title: str = "", steady: bool = False) -> graphviz.Digraph:
    """Both cells of a genotype as a graph, operations as boxes on their edges, with a legend.

    ``steady`` keeps a place for each of the 14 edges, so that the pictures of a search differ in what changed alone.
    """
    font = {"fontname": ",".join(FONTS[:2] + ["sans-serif"]), "fontcolor": INK}
    graph = graphviz.Digraph(
        graph_attr={"rankdir": "LR", "newrank": "true", "nodesep": "0.11", "ranksep": "0.21", "pad": "0.1"}
        | {"bgcolor": PAPER, "label": f"<{_legend(genotype, title, steady)}>", "labelloc": "t", **font},
        node_attr={"shape": "box", "style": "rounded,filled", "color": LINE, "fillcolor": SOFT, "fontsize": "12"}
        | {"height": "0.3", "width": "0.3", "margin": "0.08,0.03", **font},
        edge_attr={"arrowsize": "0.6", "penwidth": "1.4", **font},
    )
    for cell in reversed(CELLS):  # from left to right, dot puts the first cluster at the bottom
        with graph.subgraph(name=f"cluster_{cell}") as part:
            part.attr(label=CELL_TITLES[cell], labeljust="l", color=LINE, style="rounded", fontsize="12", margin="10")
            _draw_cell(part, genotype, cell, steady)
    for end in ("in0", "in1", "out"):  # both cells begin and end at the same place
        graph.body.append(f"\t{{rank=same; normal_{end}; reduce_{end}}}\n")
    return graph


def _draw_cell(part: graphviz.Digraph, genotype: Genotype, cell: str, steady: bool) -> None:
    """Inputs, nodes, output and the operations between them."""
    points = [f"{cell}_in0", f"{cell}_in1", *(f"{cell}_{node}" for node in range(genotypes.NODES))]
    for index, label in ((1, "k-1"), (0, "k-2")):
        part.node(points[index], label=f'<c<sub><font point-size="9">{label}</font></sub>>')
    for node in range(genotypes.NODES):
        part.node(points[2 + node], label=str(node), shape="circle", margin="0")
    part.node(f"{cell}_out", label='<c<sub><font point-size="9">k</font></sub>>')

    edges = [(index // 2, source, op) for index, (op, source) in enumerate(getattr(genotype, cell))]
    if steady:
        edges += [(*place, None) for place in edge_list() if place not in chosen(genotype, cell)]
    for index, (node, source, op) in enumerate(sorted(edges, key=lambda edge: edge[:2])):
        look, name = LOOK[op or "none"], f"{cell}_edge{index}"
        hidden = {} if op else {"style": "invis"}
        size = {"width": "0.66", "fixedsize": "true"} if steady else {}
        box = {"color": look.color, "fillcolor": tint(look.color), "fontcolor": "#111111", "fontsize": "10.5"}
        box |= {"height": "0.23", "margin": "0.06,0.02", "penwidth": "1.2"}
        line = {"color": look.color, "style": look.style, "penwidth": str(look.width)}
        part.node(name, label=look.label if op else "", **(box | size | hidden))
        room = "2" if source < 2 else "1"  # an edge that leaves an input must not cross the other input
        part.edge(points[source], f"{name}:w", arrowhead="none", minlen=room, **(line | hidden))
        part.edge(f"{name}:e", points[2 + node], **(line | hidden))
    for node in getattr(genotype, f"{cell}_concat"):
        part.edge(points[node], f"{cell}_out", color=MUTED, penwidth="0.8", arrowsize="0.5")


def _legend(genotype: Genotype, title: str, everything: bool) -> str:
    """An HTML-like label of Graphviz: the title, and below it the kinds of operations that occur."""
    ops = {op for cell in CELLS for op, _ in getattr(genotype, cell)}
    kinds = {look.kind: look for op, look in LOOK.items() if op in ops or everything and op != "none"}
    keys = "".join(
        f'<td bgcolor="{tint(look.color)}" color="{look.color}" border="1" style="rounded,{look.style}" width="16">'
        "</td>"
        f'<td align="left"><font point-size="10.5">{kind}&nbsp; </font></td>'
        for kind, look in kinds.items()
    )
    heading = f'<font point-size="14"><b>{html.escape(title)}</b></font>'
    heading = f'<tr><td align="left">{heading}</td></tr>' if title else ""
    row = f'<table border="0" cellborder="0" cellspacing="4" cellpadding="1"><tr>{keys}</tr></table>'
    return f'<table border="0" cellspacing="2">{heading}<tr><td align="left">{row}</td></tr></table>'


def draw_cells(
    genotype: Genotype, path: str | Path, formats: tuple[str, ...] = ("svg", "png"), title: str | None = None
) -> list[Path]:
    """Draw both cells of a genotype into ``path`` + .svg, .png; the source for dot is always written as ``path`` + .gv.

    Returns the files written. Without dot a line on stderr says how to install it, and the .gv alone is written.
    """
    graph = cell_graph(genotype, title or "")
    files = {_suffixed(path, kind): _dot(graph, kind) for kind in formats}
    if None in files.values():
        print(f"visualize: {NO_DOT}", file=sys.stderr)
    files[_suffixed(path, "gv")] = graph.source
    written = [file for file, content in files.items() if content is not None]
    for file in written:
        file.parent.mkdir(parents=True, exist_ok=True)
        utils.write_whole(file, files[file])
    return written


def cell_image(genotype: Genotype, title: str = "") -> np.ndarray | None:
    """Both cells as a picture (height x width x 3, uint8), an edge always at the same place; None without dot."""
    png = _dot(cell_graph(genotype, title, steady=True), "png", dpi=110)
    return None if png is None else np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _dot(graph: graphviz.Digraph, kind: str, dpi: int = 180) -> bytes | None:
    """The graph laid out and drawn by dot, None where dot is not installed."""
    graph = graph.copy()
    if kind == "png":
        graph.attr(dpi=str(dpi))
    try:
        return graph.pipe(kind)
    except graphviz.ExecutableNotFound:
        return None


def _suffixed(path: str | Path, kind: str) -> Path:
    """path.kind, also where the name has dots of its own."""
    return Path(f"{path}.{kind}")


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run folder tells. ``kind`` is "ddsas", "pdarts" or "retrain"; ``history`` has a dict for each epoch."""

    folder: Path
    kind: str
    command: str
    args: dict
    versions: dict
    history: list[dict]
    timing: list[dict]
    genotype: Genotype | None
    genotypes: list[Genotype] = field(default_factory=list)  # after each epoch; empty for a retraining

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def epochs(self) -> np.ndarray:
        """Where the lines of the history stand on the axis: one place per epoch, through all stages."""
        return np.arange(1, len(self.history) + 1)

    @property
    def stages(self) -> list[int]:
        """The lines at which a new stage begins (P-DARTS), without the first."""
        stage = [line.get("stage", 0) for line in self.history]
        return [i for i in range(1, len(stage)) if stage[i] != stage[i - 1]]

    def series(self, key: str, cell: str | None = None) -> np.ndarray:
        """A number of each epoch, NaN where there is none."""
        values = [line.get(key) if cell is None else (line.get(key) or {}).get(cell) for line in self.history]
        return np.array([math.nan if value is None else float(value) for value in values])

    def minutes(self) -> float:
        """Minutes of computing; NaN when the run kept no times."""
        return sum(line["seconds"] for line in self.timing) / 60 if self.timing else math.nan

    def memory(self) -> float:
        """Peak memory in MB, NaN when unknown."""
        return max((line["peak_memory_mb"] for line in self.timing if line.get("peak_memory_mb")), default=math.nan)


def load_run(folder: str | Path) -> Run:
    """Read a run folder. UserError when it is none, has no finished epoch, or holds a damaged line."""
    folder = Path(folder)
    if not (folder / "args.json").is_file():
        raise utils.UserError(f"{folder} is not a run folder (it has no args.json); give a folder that a search made")
    info = _json(folder / "args.json", (folder / "args.json").read_text())
    history, timing = _lines(folder / "history.jsonl"), _lines(folder / "timing.jsonl")
    if not history:
        raise utils.UserError(f"{folder} has no finished epoch in history.jsonl yet; look again after the first one")
    kind = "pdarts" if "candidates" in history[0] else "ddsas" if "saliency" in history[0] else "retrain"
    try:
        found = [genotypes.load(line["genotype"]) for line in history] if kind != "retrain" else []
        file = folder / "genotype.txt"
        genotype = genotypes.load(file) if file.is_file() else found[-1] if found else None
        args, versions = dict(info["args"]), dict(info.get("versions", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise utils.UserError(f"{folder} cannot be read: {error!r}") from None
    return Run(folder, kind, info.get("command", ""), args, versions, history, timing, genotype, found)


def _lines(path: Path) -> list[dict]:
    """The lines of a .jsonl file; a last line that was never finished does not count."""
    if not path.is_file():
        return []
    text = path.read_text()
    return [_json(f"line {i + 1} of {path}", line) for i, line in enumerate(text[: text.rfind("\n") + 1].splitlines())]


def _json(where: object, text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise utils.UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise utils.UserError(f"{where}: expected a JSON object")
    return value


def trajectory(run: Run, cell: str) -> tuple[np.ndarray, list[str]]:
    """Saliency (DDSAS) or probability (P-DARTS) of each operation: epochs x 14 x operations, NaN where it is gone."""
    if run.kind == "ddsas":
        ops = run.history[-1]["primitives"]
        values = np.array([line["saliency"][cell] for line in run.history], dtype=float)
        return np.where([unpack(line["available"][cell], len(ops)) for line in run.history], values, math.nan), ops
    ops = run.history[0]["candidates"][cell][0]
    values = np.full((len(run.history), len(edge_list()), len(ops)), math.nan)
    for epoch, line in enumerate(run.history):
        for edge, names in enumerate(line["candidates"][cell]):
            values[epoch, edge, [ops.index(name) for name in names]] = line["probabilities"][cell][edge]
    return values, ops


def unpack(masks: list[int], ops: int) -> np.ndarray:
    """Active or available operations, 14 x ops, from an integer per edge: bit k stands for operation k."""
    return (np.array(masks)[:, None] >> np.arange(ops)) & 1 == 1


def subspace(run: Run, cell: str, columns: int = 300) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The share of time that each operation was active, the operations that were available, and their names.

    Both arrays are (columns x 14 x operations); an epoch has the same number of columns as every other, at best one
    for each sampling of the subspace, at most as many as make ``columns`` in all.
    """
    values, ops = trajectory(run, cell)
    if run.kind == "pdarts":
        return ~np.isnan(values) * 1.0, ~np.isnan(values), ops
    most = max(len(line["samplings"]) for line in run.history)
    width = max(1, min(most, columns // len(run.history)))
    active, available = [], []
    for line in run.history:
        masks = [unpack(sampling["active"][cell], len(ops)) for sampling in line["samplings"]]
        for column in range(width):
            first, last = column * len(masks) // width, (column + 1) * len(masks) // width
            part = masks[first : max(last, first + 1)]
            active.append(np.mean(part, axis=0) if part else np.zeros((len(edge_list()), len(ops))))
            available.append(unpack(line["available"][cell], len(ops)))
    return np.array(active), np.array(available), ops


# ---------------------------------------------------------------------------------------------------------------------
# Figures of a run
# ---------------------------------------------------------------------------------------------------------------------


def save_figure(figure: Figure, path: str | Path) -> str:
    """Write a figure as ``path`` + .svg and .png; returns the SVG."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 160})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, **options)
        figure.set_layout_engine("none")  # the first picture found the layout
        utils.write_whole(_suffixed(path, kind), buffer.getvalue())
    return _suffixed(path, "svg").read_text()


def progress_figure(run: Run) -> Figure:
    """Accuracy and loss over the epochs; of a search also the distance of consecutive architectures and the entropy."""
    search = run.kind != "retrain"
    figure = Figure((WIDTH, 4.4 if search else 2.5), layout="constrained")
    axes = figure.subplots(2 if search else 1, 2, squeeze=False)
    curves = {"train": "train", "validation": "valid"} if search else {"train": "train", "test": "test"}
    for axis, quantity, title in ((axes[0, 0], "acc", "Accuracy (%)"), (axes[0, 1], "loss", "Loss")):
        for name, key in curves.items():
            _curve(axis, run, run.series(f"{key}_{quantity}"), name)
        _finish(axis, run, title)
    if search:
        gaps = [math.nan] + [distance(a, b) for a, b in zip(run.genotypes, run.genotypes[1:], strict=False)]
        _curve(axes[1, 0], run, np.array(gaps), "both", label=None)
        axes[1, 0].set_ylim(-0.02, 1.1 * max(0.2, *gaps[1:], 0))
        _finish(axes[1, 0], run, "Distance to the architecture one epoch before")
        for cell in CELLS:
            _curve(axes[1, 1], run, run.series("alpha_entropy", cell), cell, label=CELL_TITLES[cell].lower())
        _finish(axes[1, 1], run, "Entropy of alpha")
    return figure


def _curve(axis, run: Run, values: np.ndarray, name: str, label: str | None = "") -> None:
    """A line of the table SERIES; a run of few epochs shows its points too."""
    if np.isnan(values).all():
        return
    color, dashes = SERIES[name]
    marker = {"marker": "o", "markersize": 3} if np.isfinite(values).sum() < 16 else {}
    label = name if label == "" else label
    axis.plot(*_broken(run, values), color=color, linestyle=dashes, label=label, **marker)


def _broken(run: Run, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of a curve, with a gap before each stage of P-DARTS: a stage starts with a new supernet."""
    return tuple(np.insert(row.astype(float), run.stages, math.nan) for row in (run.epochs, values))


def _finish(axis, run: Run, title: str) -> None:
    """Title, legend, whole epochs on the axis, and lines between the stages of P-DARTS."""
    axis.set_title(title, loc="left")
    axis.set_xlabel("epoch")
    axis.ticklabel_format(axis="y", useOffset=False)
    margin = max(0.5, 0.02 * len(run.history))
    axis.set_xlim(1 - margin, len(run.history) + margin)
    axis.xaxis.get_major_locator().set_params(integer=True)
    for line in run.stages:
        axis.axvline(line + 0.5, color=MUTED, linewidth=0.7, linestyle=":")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="best", handlelength=2.4)


def trajectory_figure(run: Run, cell: str) -> Figure:
    """Saliency or probability of each operation on the 14 edges: a row for each node, a column for each source.

    The edges of the genotype are shaded and named by their operation.
    """
    values, ops = trajectory(run, cell)
    nodes, kept = genotypes.NODES, chosen(run.genotype, cell)
    figure = Figure((WIDTH, 6.0), layout="constrained")
    grid = figure.add_gridspec(nodes, nodes + 1)
    axis = None
    for edge, (node, source) in enumerate(edge_list()):
        axis = figure.add_subplot(grid[node, source], sharex=axis, sharey=axis)
        op = kept.get((node, source))
        for index in sorted(range(len(ops)), key=lambda index: ops[index] == op):  # the chosen one on top
            look = LOOK[ops[index]]
            style = {"color": look.color, "linestyle": look.dashes, "linewidth": 0.8 * look.width}
            axis.plot(*_broken(run, values[:, edge, index]), **style)
        for line in run.stages:
            axis.axvline(line + 0.5, color=MUTED, linewidth=0.7, linestyle=":")
        title = f"{source_name(source)} → {node}"
        axis.set_title(f"{title} · {LOOK[op].label}" if op else title, fontsize=8, color=INK if op else MUTED)
        axis.set_facecolor(SOFT if op else "none")
        axis.tick_params(labelsize=7, labelleft=source == 0, labelbottom=node == nodes - 1)
        axis.xaxis.get_major_locator().set_params(integer=True)
    quantity = "saliency" if run.kind == "ddsas" else "probability"
    figure.supxlabel("epoch", fontsize=8.5)
    figure.supylabel(quantity, fontsize=8.5)
    corner = figure.add_subplot(grid[0, 2:])
    corner.axis("off")
    looks = [LOOK[op] for op in ops]
    lines = [Line2D([], [], color=k.color, linestyle=k.dashes, linewidth=0.8 * k.width, label=k.label) for k in looks]
    lines.append(Patch(facecolor=SOFT, edgecolor=MUTED, linewidth=0.5, label="in the genotype"))
    corner.legend(handles=lines, loc="upper right", ncols=3, handlelength=2.6, title=f"{CELL_TITLES[cell]}: {quantity}")
    return figure


def subspace_figure(run: Run) -> Figure:
    """Which operations were active when, on each edge of both cells; grey where an operation is not available."""
    figure = Figure((WIDTH, 8.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, cell in zip(axes, CELLS, strict=True):
        active, available, ops = subspace(run, cell)
        axis.imshow(
            _colored(active, available, ops),
            extent=(0.5, len(run.history) + 0.5, len(edge_list()) * (len(ops) + 1), 0),
            aspect="auto",
            interpolation="nearest",
        )
        _label_edges(axis, run, cell, ops)
        axis.set_title(CELL_TITLES[cell], loc="left")
        axis.set_xlabel("epoch")
    keys = [Patch(facecolor=LOOK[op].color, label=LOOK[op].label) for op in ops]
    keys.append(Patch(facecolor=MUTED, alpha=0.22, label="not available"))
    keys.append(Line2D([], [], color=MUTED, marker="<", linestyle="none", markersize=5, label="in the genotype"))
    figure.legend(handles=keys, loc="outside upper center", ncols=5, title="rows of an edge, top to bottom")
    return figure


@matplotlib.rc_context(RC)
def heat_figure(values: dict[str, list[list[float]]], ops: list[str]) -> Figure:
    """A table of numbers for each cell type, (14 edges, operations), as colours: rows are edges, columns operations."""
    figure = Figure((WIDTH, 4.2), layout="constrained", dpi=100)
    axes = figure.subplots(1, 2, sharey=True)
    highest = max(np.max(values[cell]) for cell in CELLS)
    for axis, cell in zip(axes, CELLS, strict=True):
        picture = axis.imshow(values[cell], vmin=0, vmax=highest or 1, cmap="viridis", aspect="auto")
        axis.set_title(CELL_TITLES[cell], loc="left")
        axis.set_xticks(range(len(ops)), [LOOK[op].label for op in ops], rotation=45, ha="right")
        axis.tick_params(length=0)
        axis.grid(False)
        axis.spines[:].set_visible(False)
    axes[0].set_yticks(range(len(edge_list())), [f"{source_name(source)} → {node}" for node, source in edge_list()])
    figure.colorbar(picture, ax=axes, shrink=0.9).outline.set_visible(False)
    return figure


def _colored(active: np.ndarray, available: np.ndarray, ops: list[str]) -> np.ndarray:
    """An RGBA picture, time to the right: a row for each operation of each edge, a transparent one after each edge.

    A row is five pixels high, the last of them transparent, so that 3x3 and 5x5 do not run together.
    """
    picture = np.zeros((active.shape[1], len(ops) + 1, 5, active.shape[0], 4))
    for index, op in enumerate(ops):
        share, there = active[:, :, index].T[:, None], available[:, :, index].T[:, None]
        picture[:, index, :4, :, :3] = np.where(there[..., None], to_rgb(LOOK[op].color), to_rgb(MUTED))
        picture[:, index, :4, :, 3] = np.where(there, share, 0.22)
    return picture.reshape(-1, active.shape[0], 4)


def _label_edges(axis, run: Run, cell: str, ops: list[str]) -> None:
    """The name of each edge beside its rows, and a mark at the operation that the genotype keeps."""
    kept, rows = chosen(run.genotype, cell), len(ops) + 1
    axis.set_yticks(
        [edge * rows + len(ops) / 2 for edge in range(len(edge_list()))],
        [f"{source_name(source)} → {node}" for node, source in edge_list()],
    )
    for edge, (node, source) in enumerate(edge_list()):
        if op := kept.get((node, source)):
            axis.get_yticklabels()[edge].set(color=INK, fontweight="bold")
            axis.plot(
                1.02, edge * rows + ops.index(op) + 0.5, "<", color=LOOK[op].color, markersize=5, clip_on=False,
                transform=axis.get_yaxis_transform(),
            )  # fmt: skip
    for line in run.stages:
        axis.axvline(line + 0.5, color=MUTED, linewidth=0.7, linestyle=":")
    axis.tick_params(axis="y", length=0)
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.xaxis.get_major_locator().set_params(integer=True)


def evolution_gif(run: Run, seconds: float = 15.0) -> bytes | None:
    """An animated GIF of the cells after each epoch, with its accuracy; None without dot."""
    frames, pictures = [], {}
    for epoch, genotype in enumerate(run.genotypes):
        key = str(genotype)
        pictures[key] = cell_image(genotype) if key not in pictures else pictures[key]
        if pictures[key] is None:
            return None
        frames.append(_frame(run, epoch, pictures[key]))
    palette = frames[-1].quantize(255, Image.Quantize.FASTOCTREE)  # each frame has all colours, in its legend
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    pace = int(min(600, max(60, 1000 * seconds / len(frames))))
    buffer = io.BytesIO()
    durations = [pace] * (len(frames) - 1) + [3000]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
    return buffer.getvalue()


def _frame(run: Run, epoch: int, picture: np.ndarray) -> Image.Image:
    """The cells with a line about the epoch above them, and a bar of how far the search is."""
    height, width = picture.shape[:2]
    frame = Image.new("RGB", (width, height + 44), PAPER)
    frame.paste(Image.fromarray(picture), (0, 44))
    pen, line, last = ImageDraw.Draw(frame), run.history[epoch], len(run.history)
    stage = f"stage {line['stage'] + 1}, " if "stage" in line else ""
    text = f"{stage}epoch {line['epoch'] + 1}"
    if line.get("valid_acc") is not None:
        text += f"   validation {line['valid_acc']:.1f} %"
    if epoch:
        changed = round(16 * distance(run.genotypes[epoch - 1], run.genotypes[epoch]))
        text += f"   {changed} of 16 operations changed" if changed else "   unchanged"
    pen.text((24, 12), text, INK, ImageFont.load_default(20))
    pen.rectangle((24, 40, width - 24, 43), LINE)
    pen.rectangle((24, 40, 24 + (width - 48) * (epoch + 1) / last, 43), LOOK["sep_conv_3x3"].color)
    return frame


# ---------------------------------------------------------------------------------------------------------------------
# The report of a run: one page, everything inside
# ---------------------------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """The network that parameters and multiply-adds are counted for; CIFAR and ImageNet as in the papers."""

    init_channels: int = 36
    layers: int = 20
    imagenet: bool = False

    def __str__(self) -> str:
        return f"C={self.init_channels}, {self.layers} layers, {'224' if self.imagenet else '32'} pixels"


CIFAR, IMAGENET = Size(), Size(46, 14, imagenet=True)


def cost(genotype: Genotype, size: Size = CIFAR) -> tuple[float, float]:
    """Parameters and multiply-adds, both in millions, of the discovered network, without auxiliary head."""
    build, classes, pixels = (model.NetworkImageNet, 1000, 224) if size.imagenet else (model.NetworkCIFAR, 10, 32)
    with torch.device("meta"):
        network = build(size.init_channels, classes, size.layers, False, genotype)
        return model.count_parameters(network) / 1e6, model.count_multiply_adds(network, pixels) / 1e6


def count_skips(genotype: Genotype) -> int:
    """Skip connections of the normal cell: many of them make a network that trains fast and ends low."""
    return sum(op == "skip_connect" for op, _ in genotype.normal)


def write_report(run: Run) -> list[Path]:
    """All figures of a run into its folder figures/, and report.html that holds them all. Returns the files."""
    folder, sections = run.folder / "figures", []
    if run.genotype:
        files = draw_cells(run.genotype, folder / "cells")
        if (svg := folder / "cells.svg") in files:
            sections.append(("The cells", CAPTIONS["cells"], _inline(svg.read_text(), "The cells")))
        else:
            sections.append(("The cells", html.escape(NO_DOT), ""))
    if run.kind != "retrain" and (gif := evolution_gif(run)):
        utils.write_whole(folder / "evolution.gif", gif)
        image = f'<img alt="The cells after each epoch" src="data:image/gif;base64,{base64.b64encode(gif).decode()}">'
        sections.append(("How the cells evolved", CAPTIONS["evolution"], image))
    for name, title, figure in _figures(run):
        folder.mkdir(exist_ok=True)
        sections.append((title, CAPTIONS.get(name, ""), _inline(save_figure(figure, folder / name), title)))
    report = run.folder / "report.html"
    utils.write_whole(report, _page(run, sections))
    return [*sorted(folder.iterdir()), report]


def _figures(run: Run):
    """(name, title, figure) of everything matplotlib draws of a run."""
    yield "progress" if run.kind != "retrain" else "curves", "Progress", progress_figure(run)
    if run.kind != "retrain":
        quantity = "saliency" if run.kind == "ddsas" else "probability"
        for cell in CELLS:
            title = f"{quantity.capitalize()}, {CELL_TITLES[cell].lower()}"
            yield f"{quantity}_{cell}", title, trajectory_figure(run, cell)
        yield "subspace", "The subspace over time", subspace_figure(run)


PANELS = "A panel for each edge: a column for each source, a row for each node; shaded if in the genotype."
CAPTIONS = {
    "cells": "A node adds up its two operations; a cell puts out its nodes side by side. Thick lines are 5×5 kernels.",
    "evolution": "The best architecture after each epoch.",
    "progress": "Distance: cosine distance of the one-hot genotypes of consecutive epochs; 0 is the same architecture.",
    "saliency_normal": f"{PANELS} A line ends where its operation leaves the space.",
    "saliency_reduce": f"{PANELS} A line ends where its operation leaves the space.",
    "probability_normal": f"{PANELS} At the end of a stage each edge loses its weakest candidates.",
    "probability_reduce": f"{PANELS} At the end of a stage each edge loses its weakest candidates.",
    "subspace": "Which operations were active when. The stronger the colour, the more of the time.",
}


def _inline(svg: str, label: str) -> str:
    """An SVG as part of a page: colours of text and lines follow the page's theme, the size follows the column."""
    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    head = (
        re.sub(r'\s(width|height|id|xmlns|xmlns:xlink)="[^"]*"', "", head)
        + f' role="img" aria-label="{html.escape(label)}">'
    )
    used = set(re.findall(r"#([\w-]+)", rest))
    rest = re.sub(r'\sid="([^"]*)"', lambda match: match[0] if match[1] in used else "", rest)
    rest = re.sub(r"<metadata>.*?</metadata>|<title>.*?</title>|<!--.*?-->", "", rest, flags=re.DOTALL)
    for color, variable in THEME.items():
        rest = rest.replace(color, variable)
    return head + rest


MOBILE = (
    "--data .data/imagenet --init_channels 46 --layers 14 --batch_size 1024 --epochs 250 --learning_rate 0.5"
    " --weight_decay 3e-5 --lr_scheduler linear --warmup_epochs 5 --label_smooth 0.1 --drop_path_prob 0"
)


def retrain_command(run: Run) -> str:
    """The command that trains the genotype of a search from scratch, with the settings of the papers."""
    given = run.args
    if run.kind == "pdarts":
        parts = ["python train_cifar.py --tmp_data_dir", shlex.quote(str(given.get("tmp_data_dir", "DIR")))]
        parts += ["--cifar100"] if given.get("cifar100") else []
    else:
        dataset = str(given.get("dataset", "cifar10"))
        parts = ["python retrain.py --dataset", shlex.quote(dataset)]
        if dataset == "imagenet":
            parts.append(MOBILE)
        else:
            flags = {"data": ".data", "image_size": None}  # and their defaults
            parts += [f"--{k} {shlex.quote(str(given[k]))}" for k, v in flags.items() if given.get(k, v) != v]
            parts.append("--cutout")
    return " ".join([*parts, "--auxiliary --arch", shlex.quote(str(run.folder))])


def _tiles(run: Run) -> list[tuple[str, str]]:
    """The numbers at the top of the report."""
    tiles = []
    held_out = run.series("test_acc" if run.kind == "retrain" else "valid_acc")
    if np.isfinite(held_out).any():
        last = held_out[np.isfinite(held_out)][-1]
        tiles.append(("test accuracy, last" if run.kind == "retrain" else "validation accuracy", f"{last:.2f} %"))
    if run.kind == "retrain":
        tiles.append(("test accuracy, best", f"{np.nanmax(run.series('best_acc')):.2f} %"))
    if run.genotype:
        size = IMAGENET if run.args.get("dataset") == "imagenet" else CIFAR
        parameters, multiply_adds = cost(run.genotype, size)
        tiles += [(f"parameters at {size.init_channels} channels, {size.layers} layers", f"{parameters:.2f} M")]
        tiles += [("multiply-adds of an image", f"{multiply_adds:.0f} M")]
        tiles += [("skip connections, normal cell", str(count_skips(run.genotype)))]
    if not math.isnan(run.minutes()):
        tiles.append(("training time" if run.kind == "retrain" else "search time", _duration(run.minutes())))
    if not math.isnan(run.memory()):
        tiles.append(("peak memory", f"{run.memory() / 1024:.1f} GB"))
    return tiles


def _duration(minutes: float) -> str:
    if minutes < 1.5:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _page(run: Run, sections: list[tuple[str, str, str]]) -> str:
    """The report as HTML."""
    kind = {"ddsas": "DDSAS search", "pdarts": "P-DARTS search", "retrain": "Retraining"}[run.kind]
    about = [run.args.get("dataset"), run.args.get("space_config"), f"seed {run.args.get('seed')}"]
    about = [str(item) for item in [*about, f"{len(run.history)} epochs", run.args.get("note")] if item]
    tiles = "".join(f"<div><b>{html.escape(value)}</b><span>{label}</span></div>" for label, value in _tiles(run))
    parts = [
        f"<header><p>{kind}</p><h1>{html.escape(run.name)}</h1><p>{html.escape(' · '.join(about))}</p></header>",
        f'<div class="tiles">{tiles}</div>',
    ]
    if run.genotype:
        parts.append(_copyable("Genotype", "To keep it, paste it into genotypes.py under a name.", str(run.genotype)))
    if run.kind != "retrain":
        parts.append(_copyable("Train it from scratch", "", retrain_command(run)))
    for title, caption, picture in sections:
        figure = f'<div class="picture">{picture}</div>' if picture else ""
        parts.append(f"<section><h2>{title}</h2><figure>{figure}<figcaption>{caption}</figcaption></figure></section>")
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in [*sorted(run.args.items()), *run.versions.items()]
    )
    parts.append(_copyable("Command of this run", "", run.command))
    parts.append(f"<details><summary>All arguments, and versions</summary><table>{rows}</table></details>")
    title = html.escape(f"{run.name}: {kind}")
    return PAGE.replace("TITLE", title).replace("BODY", "\n".join(parts))


def _copyable(title: str, hint: str, text: str) -> str:
    """A block of text with a button that copies it."""
    hint = f"<p>{hint}</p>" if hint else ""
    words = " ".join(f"<span>{html.escape(word)}</span>" for word in text.split(" "))  # lines break between words alone
    return (
        f'<section><h2>{title}</h2>{hint}<div class="copy"><pre>{words}</pre>'
        '<button type="button" onclick="copy(this)">Copy</button></div></section>'
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>TITLE</title>
<style>
:root { --ink: #1f2933; --muted: #5f6b7a; --line: #d5dae1; --soft: #f1f4f8; --page: #ffffff; --link: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --muted: #a3aebc; --line: #3b4554; --soft: #222b38; --page: #141a22; --link: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
header p { margin: 0; color: var(--muted); }
header p:first-child { color: var(--link); font-weight: 600; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.15rem; }
section > p { margin: 0 0 .5rem; color: var(--muted); }
.tiles { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; margin-top: 1.5rem; }
@media (min-width: 40rem) { .tiles { grid-template-columns: repeat(3, 1fr); } }
.tiles div { background: var(--soft); border-radius: .6rem; padding: .7rem .9rem; }
.tiles b { display: block; font-size: 1.25rem; }
.tiles span { display: block; color: var(--muted); font-size: .82rem; line-height: 1.3; }
.copy { display: flex; gap: .6rem; align-items: flex-start; padding: .7rem; }
.copy { background: var(--soft); border-radius: .6rem; }
pre { flex: 1; min-width: 0; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
pre span { display: inline-block; max-width: 100%; }
pre { font: .85rem/1.5 ui-monospace, monospace; }
button { font: inherit; font-size: .85rem; color: var(--ink); background: var(--page); border: 1px solid var(--line);
  border-radius: .4rem; padding: .15rem .7rem; cursor: pointer; }
figure { margin: 0; }
.picture { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; padding: .6rem; }
.picture svg, .picture img { display: block; width: 100%; min-width: 34rem; height: auto; }
.picture img { border-radius: .3rem; }
figcaption { margin-top: .5rem; color: var(--muted); font-size: .9rem; }
details { margin-top: 1.2rem; }
summary { cursor: pointer; color: var(--link); }
table { border-collapse: collapse; width: 100%; margin-top: .6rem; font-size: .88rem; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); font-weight: 400;
  overflow-wrap: anywhere; vertical-align: top; }
th { color: var(--muted); white-space: nowrap; }
</style>
</head>
<body>
<main>
BODY
</main>
<script>
async function copy(button) {
  const text = button.previousElementSibling;
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch {  // a page opened from a file may not write to the clipboard: select the text for the reader
    getSelection().selectAllChildren(text);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}
</script>
</body>
</html>
"""


# ---------------------------------------------------------------------------------------------------------------------
# Comparison of runs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A line of the comparison: a search with its retrainings, a retraining of something else, or a genotype."""

    name: str
    genotype: Genotype | None
    letter: str = "–"
    space: str = "–"
    seed: str = "–"
    minutes: float = math.nan  # of the search
    memory: float = math.nan  # MB, of the search
    validation: float = math.nan
    tests: list[float] = field(default_factory=list)  # best test accuracy of each retraining
    parameters: float = math.nan
    multiply_adds: float = math.nan

    @property
    def test(self) -> float:
        return float(np.mean(self.tests)) if self.tests else math.nan

    @property
    def skips(self) -> float:
        return count_skips(self.genotype) if self.genotype else math.nan


NUMBERS = (  # column, attribute of Row, format, whether more is better (None: neither)
    ("skips", "skips", "{:.0f}", None),
    ("params M", "parameters", "{:.2f}", False),
    ("madds M", "multiply_adds", "{:.0f}", False),
    ("search min", "minutes", "{:.1f}", False),
    ("memory GB", "memory", "{:.2f}", False),
    ("valid %", "validation", "{:.2f}", True),
    ("test %", "test", "{:.2f}", True),
)


def compare(targets: list[str], size: Size) -> list[Row]:
    """A row for each run or genotype; the retraining of what one of the searches found joins the row of that search."""
    rows, retrainings = [], []
    for target in targets:
        run = load_run(target) if os.path.isfile(os.path.join(target, "args.json")) else None
        if run is None:
            rows.append(Row(target if len(target) < 40 else "Genotype(...)", _genotype(target)))
        elif run.kind == "retrain":
            retrainings.append(run)
        else:
            space = run.args.get("space_config") or "p-darts"
            valid = run.series("valid_acc")
            valid = valid[np.isfinite(valid)][-1] if np.isfinite(valid).any() else math.nan
            memory = run.memory() / 1024
            rows.append(Row(run.name, run.genotype, "", space, str(run.args.get("seed")), run.minutes(), memory, valid))
    for run in retrainings:
        best = float(np.nanmax(run.series("best_acc")))
        owners = [row for row in rows if run.genotype and row.genotype == run.genotype]
        if not owners:
            rows.append(Row(run.name, run.genotype, seed=str(run.args.get("seed"))))
        for row in owners or rows[-1:]:
            row.tests.append(best)
    letters: dict[str, str] = {}
    for row in rows:
        if row.genotype:
            row.letter = letters.setdefault(str(row.genotype), _letter(row.genotype, len(letters)))
            row.parameters, row.multiply_adds = cost(row.genotype, size)
    return rows


def _letter(genotype: Genotype, index: int) -> str:
    """A short name: that in genotypes.py, else A, B, ... , or a number when letters run out."""
    known = [name for name in genotypes.names() if getattr(genotypes, name) == genotype]
    return known[0] if known else chr(ord("A") + index) if index < 26 else f"#{index + 1}"


def _cells(row: Row) -> list[str]:
    """A row of the table as text."""
    numbers = [(getattr(row, name), shape) for _, name, shape, _ in NUMBERS]
    texts = ["–" if math.isnan(value) else shape.format(value) for value, shape in numbers]
    if len(row.tests) > 1:
        texts[-1] += f" ± {np.std(row.tests, ddof=1):.2f} ({len(row.tests)})"
    return [row.name, row.space, row.seed, row.letter, *texts]


HEADINGS = ["run", "space", "seed", "genotype", *(name for name, *_ in NUMBERS)]


def comparison_table(rows: list[Row]) -> str:
    """The comparison as text that is a table in Markdown too, with the genotypes written out below."""
    table = [HEADINGS, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADINGS))]
    table.insert(1, ["-" * width if i < 4 else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    sides = ["<"] * 4 + [">"] * len(NUMBERS)  # names to the left, numbers to the right
    form = "| " + " | ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True)) + " |"
    lines = [form.format(*line) for line in table]
    found = {row.letter: row.genotype for row in rows if row.genotype}
    return "\n".join([*lines, "", *(f"{letter} = {genotype}" for letter, genotype in found.items())])


def comparison_figure(rows: list[Row], size: Size) -> Figure:
    """The table as a figure: each number above a scale from the lowest to the highest in its column, the best bold."""
    texts = [[_shortened(row.name, 32), *_cells(row)[1:]] for row in rows]
    widths = [max(map(_points, column)) for column in zip(HEADINGS, *texts, strict=True)]
    lefts = np.cumsum([0, *(max(width, 30) + 12 for width in widths)])  # in points
    figure = Figure((lefts[-1] / 72 + 0.1, 0.75 + 0.42 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for column, heading in enumerate(HEADINGS):
        axis.text(lefts[column], -0.75, heading, color=MUTED, fontsize=8, va="center")
        for line, cells in enumerate(texts):
            bold = column >= 4 and _best(rows, column - 4) == getattr(rows[line], NUMBERS[column - 4][1])
            middle = line + (0 if column < 4 else -0.14)
            weight = "bold" if bold else "normal"
            axis.text(lefts[column], middle, cells[column], va="center", fontsize=8, fontweight=weight)
    for column, (_, name, _, _) in enumerate(NUMBERS):
        values = np.array([getattr(row, name) for row in rows], dtype=float)
        _scale(axis, values, lefts[4 + column] + 1, 34)
    axis.set_xlim(-2, lefts[-1])
    axis.set_ylim(len(rows) - 0.4, -1.1)
    axis.axhline(-0.5, color=LINE, linewidth=0.8)
    axis.axis("off")
    note = f"parameters and multiply-adds at {size}; memory and minutes of the search"
    figure.supxlabel(note, fontsize=7, color=MUTED)
    return figure


def _points(text: str) -> float:
    """The width of a text of the table in points."""
    return TextPath((0, 0), text, size=8).get_extents().x1 if text else 0.0


def _scale(axis, values: np.ndarray, left: float, width: float) -> None:
    """A short line under each number of a column, with a point where the number lies between the lowest and highest."""
    known = values[np.isfinite(values)]
    if len(known) == 0 or known.min() == known.max():
        return
    for line, value in enumerate(values):
        if np.isfinite(value):
            axis.plot([left, left + width], [line + 0.24] * 2, color=LINE, linewidth=1.2, solid_capstyle="round")
            place = left + width * (value - known.min()) / (known.max() - known.min())
            axis.plot(place, line + 0.24, "o", color=LOOK["sep_conv_3x3"].color, markersize=3.2)


def _best(rows: list[Row], column: int) -> float:
    """The best number of a column; NaN where none is better, or there are less than two."""
    _, name, _, more = NUMBERS[column]
    values = [getattr(row, name) for row in rows if not math.isnan(getattr(row, name))]
    return math.nan if more is None or len(set(values)) < 2 else max(values) if more else min(values)


def _shortened(text: str, length: int) -> str:
    """The text with its middle left out: names of runs differ at both ends."""
    return text if len(text) <= length else text[: length // 2 - 1] + "…" + text[len(text) - length // 2 :]


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def _genotype(target: str) -> Genotype:
    try:
        return genotypes.load(target)
    except ValueError as error:
        raise utils.UserError(str(error)) from None


def main(args: argparse.Namespace) -> None:
    """Draw what was asked for and print the files that were written."""
    size = IMAGENET if args.imagenet else CIFAR
    size = size._replace(init_channels=args.init_channels or size.init_channels, layers=args.layers or size.layers)
    with matplotlib.rc_context(RC):
        if args.all:
            files = [file for target in args.targets for file in write_report(load_run(target))]
        elif len(args.targets) > 1:
            rows = compare(args.targets, size)
            print(comparison_table(rows) + "\n")
            path = args.out or "comparison"
            save_figure(comparison_figure(rows, size), path)
            files = [_suffixed(path, "svg"), _suffixed(path, "png")]
        else:
            files = _draw(args.targets[0], args.out)
    for file in files:
        print(file)


def _draw(target: str, out: str | None) -> list[Path]:
    """The cells of one genotype: beside the run they come from, else in the current folder under their name."""
    genotype = _genotype(target)
    is_run = os.path.isdir(target)  # False for a text too long for a path
    name = Path(target).resolve().name if is_run else Path(target).stem if target.isidentifier() else "cells"
    files = draw_cells(genotype, out or (Path(target) / "figures" / "cells" if is_run else name), title=name)
    if len(files) == 1:
        raise utils.UserError(f"only {files[0]} was written; with Graphviz, dot -Tsvg -O {files[0]} draws it")
    return files


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "targets", nargs="+", metavar="RUN|GENOTYPE", help="run folder, name, genotype.txt, literal; several: compare"
    )
    parser.add_argument("--all", action="store_true", help="all figures of a run, and its report.html")
    parser.add_argument("--out", metavar="PATH", help="where to draw cells or comparison to, without suffix")
    parser.add_argument("--init_channels", type=int, help="width at which a comparison counts (36; ImageNet: 46)")
    parser.add_argument("--layers", type=int, help="depth at which a comparison counts (20; ImageNet: 14)")
    parser.add_argument("--imagenet", action="store_true", help="count the ImageNet network at 224 pixels")
    return parser


if __name__ == "__main__":
    utils.cli(main, get_parser())
