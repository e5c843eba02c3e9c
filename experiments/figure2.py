"""Figure 2: how DDSAS works, drawn from a small simulation of its bandit.

    python -m experiments.figure2     # writes figure/figure2.svg and .png

Alpha and beta follow made-up gradients; the space, the sampling, the saliency and the genotype are those of
space.DynamicSpace, shown for the normal cell.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Arc, Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

from experiments import common
from genotypes import CELL_TYPES, EDGE_LIST, PRIMITIVES
from lib.figures import EDGE_NAMES, SOURCES, WIDTH, line_style, list_edges, style_of
from lib.report import INK, LINE, MUTED, PAPER, SOFT
from space import DynamicSpace

HEIGHT = 6.5  # inches
ARROWS = [  # between the panels, from 1 to 6, and from 5 back to 2
    ((0.302, 0.77), (0.354, 0.77)),
    ((0.646, 0.77), (0.698, 0.77)),
    ((0.844, 0.545), (0.844, 0.505)),
    ((0.698, 0.29), (0.646, 0.29)),
    ((0.354, 0.29), (0.302, 0.29)),
    ((0.5, 0.505), (0.5, 0.545)),
]
LEFT, BOTTOM = (0.012, 0.356, 0.700), (0.545, 0.06)  # of the panels' columns and rows, in shares of the figure


def simulate(rounds: int = 60, seed: int = 3) -> DynamicSpace:
    """A space after so many updates and samplings, shrunk twice on the way, some operations better than others."""
    rng, space = np.random.default_rng(seed), DynamicSpace(PRIMITIVES)
    quality = {kind: rng.normal(0, 1, (len(EDGE_LIST), len(PRIMITIVES))) for kind in CELL_TYPES}
    for step in range(rounds):
        if step in (rounds // 3, 2 * rounds // 3):
            space.shrink(14)
        learned = {kind: value * step / rounds for kind, value in quality.items()}
        p = {kind: np.exp(alpha) * space.active[kind] for kind, alpha in learned.items()}
        p = {kind: value / np.maximum(value.sum(1, keepdims=True), 1e-9) for kind, value in p.items()}
        space.update({kind: p[kind] / (1 + np.exp(-learned[kind])) for kind in CELL_TYPES}, learned)
        space.sample()
    return space


def draw_squares(axis: Axes, size: np.ndarray, available: np.ndarray) -> None:
    """A table of 14 edges x 8 operations: the area of a square is its value (0..1), a dot is an unavailable one."""
    for (edge, op), value in np.ndenumerate(size):
        side, color = 0.84 * np.sqrt(value), style_of(PRIMITIVES[op]).color
        square = Rectangle((op - side / 2, edge - side / 2), side, side, color=color, linewidth=0)
        axis.add_patch(square if available[edge, op] else Circle((op, edge), 0.07, color=LINE))
    edges, ops = size.shape
    axis.set(xlim=(-0.7, ops - 0.3), ylim=(edges - 0.3, -0.7), aspect="equal", anchor="C")
    axis.set_yticks(range(edges), EDGE_NAMES["normal"], fontsize=5.5)
    axis.set_xticks(range(ops), [style_of(op).label for op in PRIMITIVES], fontsize=5.5, rotation=90)
    axis.tick_params(length=0, pad=1, labeltop=True, labelbottom=False)
    axis.grid(False)
    axis.spines[:].set_visible(False)


def draw_arcs(axis: Axes, edges: list[tuple[tuple[int, int], str]]) -> None:
    """A cell with its nodes in a row and an arc for each ((node, source), operation): below those from the inputs."""
    for index, ((node, source), op) in enumerate(edges):
        before = sum(edge == (node, source) for edge, _ in edges[:index])  # arcs of one edge lie side by side
        start, end, below = source, node + 2, source < 2
        size = end - start, 2 * (0.7 * (end - start) + 0.26 * before)
        angles = {"theta1": 180 * below, "theta2": 180 + 180 * below}
        axis.add_patch(Arc(((start + end) / 2, 0), *size, **angles, **line_style(op)))
    for place, name in enumerate(SOURCES):
        axis.add_patch(Circle((place, 0), 0.34, facecolor=SOFT, edgecolor=MUTED, linewidth=0.7, zorder=3))
        axis.text(place, 0, name, ha="center", va="center", fontsize=6, zorder=4)
    axis.set(xlim=(-0.6, 5.6), ylim=(-4.4, 3.2), aspect="equal")
    axis.axis("off")


def add_panel(figure: Figure, column: int, row: int, title: str, text: str) -> Axes:
    """A framed panel with a title and what happens in it; returns the axes inside."""
    left, bottom, width, height = LEFT[column], BOTTOM[row], 0.288, 0.445
    shape = {"boxstyle": "round,pad=0,rounding_size=0.012", "mutation_aspect": WIDTH / HEIGHT, "linewidth": 1}
    frame = FancyBboxPatch((left, bottom), width, height, facecolor=PAPER, edgecolor=LINE, zorder=-1, **shape)
    figure.add_artist(frame)
    figure.text(left + 0.012, bottom + height - 0.03, title, fontsize=9, fontweight="bold")
    figure.text(left + 0.012, bottom + height - 0.041, text, fontsize=6.8, color=MUTED, va="top", linespacing=1.35)
    return figure.add_axes((left + 0.03, bottom + 0.008, width - 0.04, height - 0.14))


def draw() -> Figure:
    """The six steps and the arrows between them."""
    space, figure = simulate(), Figure((WIDTH, HEIGHT))
    available, active = space.available["normal"], space.active["normal"]
    saliency, ucb = space.saliency["normal"], space.ucb["normal"]
    score = ((ucb - ucb[available].min()) / np.ptp(ucb[available])).clip(0)

    text = "14 edges with 8 operations each;\nit may shrink or expand"
    draw_squares(add_panel(figure, 0, 0, "1  Space", text), np.ones_like(ucb), available)
    text = r"$\sigma(\beta) + c\,\sqrt{\ln T\;/\;n}$" + "\nof each operation"
    draw_squares(add_panel(figure, 1, 0, "2  UCB score", text), score, available)
    text = "the best operation of each edge,\nthen the best of all, 28 in all"
    draw_squares(add_panel(figure, 2, 0, "3  Subspace", text), active * 1.0, available)
    text = "gradient steps inside the subspace:\n" + r"weights (train), $\alpha$ and $\beta$ (validation)"
    edges = [(EDGE_LIST[edge], PRIMITIVES[op]) for edge, op in np.argwhere(active) if op]
    draw_arcs(add_panel(figure, 2, 1, "4  Search", text), edges)
    text = "running mean of an operation's\n" + r"weight $p_\alpha\,\sigma(\beta)$ while it is active"
    draw_squares(add_panel(figure, 1, 1, "5  Saliency", text), saliency / saliency.max(), available)
    text = "the two edges of highest saliency\nat each node, with their best operation"
    draw_arcs(add_panel(figure, 0, 1, "6  Genotype", text), list_edges(space.genotype())["normal"])

    head = {"arrowstyle": "-|>", "mutation_scale": 10, "color": INK, "linewidth": 1.3}
    for start, end in ARROWS:
        figure.add_artist(FancyArrowPatch(start, end, **head))
    figure.text(0.512, 0.525, "every M steps", fontsize=6.8, va="center")
    figure.text(0.328, 0.312, "end", fontsize=6.8, ha="center", va="center")
    keys = [Line2D([], [], label=style_of(op).label, **line_style(op, scale=1)) for op in PRIMITIVES]
    figure.legend(handles=keys, loc="lower center", ncols=len(keys), fontsize=7, handlelength=2.2, columnspacing=1.2)
    return figure


if __name__ == "__main__":
    common.save(draw, common.FOLDER / "figure2", small=False)
