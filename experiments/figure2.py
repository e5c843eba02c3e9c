"""Figure 2: how DDSAS works, drawn from a small simulation of its bandit.

    python -m experiments.figure2     # writes figure/figure2.svg and .png

Alpha and beta follow made-up gradients; the space, the sampling, the saliency and the genotype are those of
model_search.DynamicSpace, shown for the normal cell.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Arc, Circle, FancyArrowPatch, Rectangle

import visualize
from genotypes import CELL_TYPES, PRIMITIVES
from genotypes import EDGE_LIST as EDGES
from model_search import DynamicSpace
from visualize import INK, LINE, LOOK, MUTED, PAPER, SOFT, look

COLORS = [look(op).color for op in PRIMITIVES]
HEIGHT = 6.5  # inches
STEP = 0.26  # between the arcs of two operations on the same edge


def simulate(rounds: int = 60, seed: int = 3) -> DynamicSpace:
    """A space after so many updates and samplings, shrunk twice on the way, some operations better than others."""
    rng = np.random.default_rng(seed)
    quality = {kind: rng.normal(0, 1, (len(EDGES), len(PRIMITIVES))) for kind in CELL_TYPES}
    space = DynamicSpace(PRIMITIVES)
    for step in range(rounds):
        if step in (rounds // 3, 2 * rounds // 3):
            space.shrink(14)
        learned = {kind: value * step / rounds for kind, value in quality.items()}
        weights = {}
        for kind, alpha in learned.items():
            p = np.exp(alpha) * space.active[kind]
            weights[kind] = p / np.maximum(p.sum(1, keepdims=True), 1e-9) / (1 + np.exp(-alpha))
        space.update(weights, learned)
        space.sample()
    return space


def squares(axis: Axes, size: np.ndarray, available: np.ndarray) -> None:
    """A table of 14 edges x 8 operations: the area of a square is its value (0..1), a dot is an unavailable one."""
    for edge in range(len(EDGES)):
        for op, color in enumerate(COLORS):
            if not available[edge, op]:
                axis.add_patch(Circle((op, edge), 0.07, color=LINE))
            elif size[edge, op] > 0:
                side = 0.84 * np.sqrt(size[edge, op])
                axis.add_patch(Rectangle((op - side / 2, edge - side / 2), side, side, color=color, linewidth=0))
    axis.set(xlim=(-0.7, len(COLORS) - 0.3), ylim=(len(EDGES) - 0.3, -0.7), aspect="equal", anchor="C")
    axis.set_yticks(range(len(EDGES)), visualize.EDGE_NAMES["normal"], fontsize=5.5)
    axis.set_xticks(range(len(COLORS)), [look(op).label for op in PRIMITIVES], fontsize=5.5, rotation=90)
    axis.tick_params(length=0, pad=1, labeltop=True, labelbottom=False)
    axis.grid(False)
    axis.spines[:].set_visible(False)


def arcs(axis: Axes, edges: list[tuple[int, int, str]]) -> None:
    """A cell with its nodes in a row and an arc for each (node, source, operation): below those from the inputs."""
    ordinal: dict[tuple[int, int], int] = {}
    for node, source, op in edges:
        index = ordinal[node, source] = ordinal.get((node, source), -1) + 1
        start, end = source, node + 2
        below = source < 2
        height = 0.7 * (end - start) + STEP * index
        angles = {"theta1": 180 * below, "theta2": 180 + 180 * below}
        axis.add_patch(Arc(((start + end) / 2, 0), end - start, 2 * height, **angles, **visualize.line_style(op)))
    for place, name in enumerate(visualize.SOURCES):
        axis.add_patch(Circle((place, 0), 0.34, facecolor=SOFT, edgecolor=MUTED, linewidth=0.7, zorder=3))
        axis.text(place, 0, name, ha="center", va="center", fontsize=6, zorder=4)
    axis.set(xlim=(-0.6, 5.6), ylim=(-4.4, 3.2), aspect="equal")
    axis.axis("off")


def panel(figure: Figure, column: int, row: int, title: str, text: str) -> Axes:
    """A framed panel with a title and what happens in it; returns the axes inside."""
    left, bottom, width, height = 0.012 + 0.344 * column, (0.545, 0.06)[row], 0.288, 0.445
    figure.add_artist(
        matplotlib.patches.FancyBboxPatch(
            (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.012", facecolor=PAPER, edgecolor=LINE,
            linewidth=1, mutation_aspect=visualize.WIDTH / HEIGHT, zorder=-1,
        )
    )  # fmt: skip
    figure.text(left + 0.012, bottom + height - 0.03, title, fontsize=9, fontweight="bold")
    figure.text(left + 0.012, bottom + height - 0.041, text, fontsize=6.8, color=MUTED, va="top", linespacing=1.35)
    return figure.add_axes((left + 0.03, bottom + 0.008, width - 0.04, height - 0.14))


def arrow(figure: Figure, start: tuple, end: tuple, text: str = "", shift: tuple = (0, 0)) -> None:
    figure.add_artist(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=INK, linewidth=1.3))
    if text:
        x, y = (start[0] + end[0]) / 2 + shift[0], (start[1] + end[1]) / 2 + shift[1]
        figure.text(x, y, text, fontsize=6.8, ha="left" if shift[0] else "center", va="center")


def draw() -> Figure:
    """The six steps and the arrows between them."""
    space, figure = simulate(), Figure((visualize.WIDTH, HEIGHT))
    available, active = space.available["normal"], space.active["normal"]
    saliency, ucb = space.saliency["normal"], space.ucb["normal"]
    everything = np.ones_like(ucb)

    squares(
        panel(figure, 0, 0, "1  Space", "14 edges with 8 operations each;\nit may shrink or expand"),
        everything,
        available,
    )
    score = panel(figure, 1, 0, "2  UCB score", r"$\sigma(\beta) + c\,\sqrt{\ln T\;/\;n}$" + "\nof each operation")
    squares(score, (ucb - ucb[available].min()) / np.ptp(ucb[available]), available)
    subspace = panel(figure, 2, 0, "3  Subspace", "the best operation of each edge,\nthen the best of all, 28 in all")
    squares(subspace, active * 1.0, available)
    text = "gradient steps inside the subspace:\n" + r"weights (train), $\alpha$ and $\beta$ (validation)"
    arcs(panel(figure, 2, 1, "4  Search", text), [(*EDGES[e], PRIMITIVES[o]) for e, o in np.argwhere(active) if o])
    text = "running mean of an operation's\n" + r"weight $p_\alpha\,\sigma(\beta)$ while it is active"
    squares(panel(figure, 1, 1, "5  Saliency", text), saliency / saliency.max(), available)
    cell = panel(
        figure, 0, 1, "6  Genotype", "the two edges of highest saliency\nat each node, with their best operation"
    )
    arcs(cell, [(*edge, op) for edge, op in visualize.kept(space.genotype())["normal"]])

    arrow(figure, (0.302, 0.77), (0.354, 0.77))
    arrow(figure, (0.646, 0.77), (0.698, 0.77))
    arrow(figure, (0.844, 0.545), (0.844, 0.505))
    arrow(figure, (0.698, 0.29), (0.646, 0.29))
    arrow(figure, (0.5, 0.505), (0.5, 0.545), "every M steps", (0.012, 0))
    arrow(figure, (0.354, 0.29), (0.302, 0.29), "end", (0, 0.022))
    ops = [op for op in LOOK if op in PRIMITIVES]
    keys = [Line2D([], [], label=look(op).label, **visualize.line_style(op, scale=1)) for op in ops]
    figure.legend(handles=keys, loc="lower center", ncols=len(keys), fontsize=7, handlelength=2.2, columnspacing=1.2)
    return figure


if __name__ == "__main__":
    with matplotlib.rc_context(visualize.RC):
        visualize.save_figure(draw(), Path(__file__).with_suffix(""))
