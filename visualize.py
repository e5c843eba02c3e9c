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
from collections.abc import Iterable, Iterator
from pathlib import Path

import graphviz
import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

import genotypes
import model
from genotypes import Genotype
from lib import cli, data, figures, records, report, run_folder, tables
from lib.figures import CELL_TITLES, EDGES, list_edges, style_of, write
from lib.records import Record
from lib.report import INK, LINE, MUTED, PAPER, SOFT

NO_DOT = "no cell can be drawn without a working dot: apt install graphviz, brew install graphviz, or graphviz.org"


def load_run(folder: str | Path) -> Record:
    """Read a run folder. UserError when it is none, has no finished epoch, or holds a damaged line."""
    return records.read_run(folder, genotypes.load)


def cell_graph(genotype: Genotype, title: str = "", steady: bool = False) -> graphviz.Digraph:
    """Both cells of a genotype, operations as boxes on their edges; ``steady`` reserves a place for all other edges."""
    font = {"fontname": ",".join([*figures.FONTS[:2], "sans-serif"]), "fontcolor": INK}
    graph = graphviz.Digraph(
        graph_attr={"rankdir": "LR", "newrank": "true", "nodesep": "0.11", "ranksep": "0.21", "pad": "0.1"}
        | {"bgcolor": PAPER, "label": graphviz.escape(title), "labelloc": "t", "labeljust": "l", **font},
        node_attr={"shape": "box", "style": "rounded,filled", "color": LINE, "fillcolor": SOFT, "fontsize": "12"}
        | {"height": "0.3", "width": "0.3", "margin": "0.08,0.03", **font},
        edge_attr={"arrowsize": "0.6", "penwidth": "1.4", **font},
    )
    cells = list_edges(genotype)
    for cell, edges in reversed(cells.items()):  # from left to right, dot puts the first cluster at the bottom
        absent = [(edge, None) for edge in EDGES[cell] if steady and edge not in dict(edges)]
        with graph.subgraph(name=f"cluster_{cell}") as part:
            part.attr(label=CELL_TITLES[cell], labeljust="l", color=LINE, style="rounded", fontsize="12", margin="10")
            _draw_cell(part, cell, getattr(genotype, f"{cell}_concat", ()), edges + absent, steady)
    for end in ("in0", "in1", "out") if len(cells) == 2 else ():  # both cells begin and end at the same place
        graph.body.append(f"\t{{rank=same; normal_{end}; reduce_{end}}}\n")
    return graph


def _draw_cell(part: graphviz.Digraph, cell: str, concat: Iterable[int], edges: list, steady: bool) -> None:
    """Draw inputs, nodes, output, and each operation as a box on its edge, or the room it would take (None)."""
    inputs = [] if cell == "cell" else [f"{cell}_in0", f"{cell}_in1"]  # of NAS-Bench-201, node 0 is the input
    nodes = [f"{cell}_{node}" for node in range(4)]
    output = '<c<sub><font point-size="9">{}</font></sub>>'  # of a cell, by its place in the network
    for point in reversed(inputs):
        part.node(point, output.format("k-1" if point == inputs[1] else "k-2"))
    for node, point in enumerate(nodes):
        part.node(point, str(node), shape="circle", margin="0")
    if inputs:
        part.node(f"{cell}_out", output.format("k"))
    for index in concat:
        part.edge(nodes[index - 2], f"{cell}_out", color=MUTED, penwidth="0.8", arrowsize="0.5")
    size = {"width": "0.66", "fixedsize": "true"} if steady else {}
    size |= {"height": "0.23", "margin": "0.06,0.02", "penwidth": "1.2", "fontsize": "10.5"}
    for index, ((node, source), op) in enumerate(sorted(edges, key=lambda edge: edge[0])):
        box, style, hidden = f"{cell}_edge{index}", style_of(op or "none"), {} if op else {"style": "invis"}
        tint = to_hex(1 - 0.16 * (1 - np.array(to_rgb(style.color))))  # the colour in much white
        colors = {"color": style.color, "fillcolor": tint, "fontcolor": "#111111"}
        part.node(box, style.label if op else "", **colors, **size, **hidden)
        line = {"color": style.color, "style": style.line, "penwidth": str(style.width)} | hidden
        room = "2" if source < 2 else "1"  # an edge that leaves an input must not cross the other input
        part.edge([*inputs, *nodes][source], f"{box}:w", arrowhead="none", minlen=room, **line)
        part.edge(f"{box}:e", nodes[node], **line)


def draw_cells(genotype: Genotype, path: str | Path, title: str = "") -> list[Path]:
    """Draw both cells as ``path`` + .svg and .png, with dot's source as .gv; without dot, the .gv alone is written."""
    graph = cell_graph(genotype, title)
    contents = {"svg": _run_dot(graph, "svg"), "png": _run_dot(graph, "png", dpi="180"), "gv": graph.source}
    return [write(f"{path}.{suffix}", content) for suffix, content in contents.items() if content is not None]


def cell_image(genotype: Genotype) -> np.ndarray | None:
    """Both cells as a picture (height x width x 3, uint8), an edge always at the same place; None without dot."""
    png = _run_dot(cell_graph(genotype, steady=True), "png", dpi="110")
    return None if png is None else np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _run_dot(graph: graphviz.Digraph, kind: str, **attributes: str) -> bytes | None:
    """What dot makes of the graph; None if it is not installed or fails."""
    graph = graph.copy()
    graph.attr(**attributes)
    try:
        return graph.pipe(kind, quiet=True)
    except (OSError, subprocess.CalledProcessError, graphviz.ExecutableNotFound):
        return None


@matplotlib.rc_context(figures.RC)
def epoch_pictures(line: dict) -> dict[str, Figure | np.ndarray]:
    """What TensorBoard shows of a search's epoch, by name: heat maps as figures, and "cells" as by `cell_image`.

    ``line`` is the epoch's line of history.jsonl. Without dot there are no cells; of a retraining there is nothing.
    """
    keys = ("saliency", "visits", "probabilities")
    pictures: dict[str, Figure | np.ndarray] = {key: figures.heat_figure(line, key) for key in keys if key in line}
    if "genotype" in line and (image := cell_image(genotypes.parse(line["genotype"]))) is not None:
        pictures["cells"] = image
    return pictures


TRAJECTORY = """A panel for each edge: a column for each source, a row for each node; shaded if in the genotype. \
A line ends where its operation leaves the space."""
PROGRESS = "Distance: cosine distance of the one-hot genotypes of consecutive epochs; 0 is the same architecture."
SUBSPACE = "Which operations were active when; grey: not available."
DARTS = "A node adds up its two operations; a cell puts out its nodes side by side. Thick lines are 5×5 kernels."
NASBENCH201 = "A node adds up its operations; the last one is the output."


def write_report(folder: str | Path) -> list[Path]:
    """All pictures of a run, in its folder figures/, and its page report.html that holds them. Returns the files."""
    record, out = load_run(folder), Path(folder, "figures")
    info, args = record.info, record.info["args"]
    files = draw_cells(record.genotype, out / "cells")
    sections = [report.copyable("Genotype", str(record.genotype))]
    if record.genotypes:
        command = run_folder.retrain_command(info["script"], args, record.folder)
        sections.append(report.copyable("Train it from scratch", command))
    if len(files) > 1:
        caption = DARTS if isinstance(record.genotype, Genotype) else NASBENCH201
        sections.append(report.section("The cells", report.embed(files[0], "The cells"), caption))
    else:
        sections.append(report.section("The cells", "", NO_DOT))
    if gif := evolution_gif(record):
        files.append(write(out / "evolution.gif", gif))
        sections.append(report.section("After each epoch", report.embed(files[-1], "The cells after each epoch")))
    for name, title, caption, figure in draw_figures(record):
        drawn = figures.save_figure(figure, out / name)
        files += drawn
        sections.append(report.section(title, report.embed(drawn[0], title), caption))
    sections += [report.evaluation_section(record.folder), report.copyable("Command of this run", info["command"])]
    rows = sorted(args.items()) + list(info["versions"].items())
    sections.append(report.details("All arguments, and versions", report.table(rows)))
    return [*files, write(record.folder / "report.html", report.build_page(record, list_facts(record), sections))]


def draw_figures(record: Record) -> Iterator[tuple[str, str, str, Figure]]:
    """(name of the file, title, caption, figure) of everything that matplotlib draws of a run."""
    name, caption = ("progress", PROGRESS) if record.genotypes else ("curves", "")
    yield name, "Progress", caption, figures.progress_figure(record)
    for cell in record.cells:
        title = f"{record.quantity.capitalize()}, {CELL_TITLES[cell].lower()}"
        yield f"{record.quantity}_{cell}", title, TRAJECTORY, figures.trajectory_figure(record, cell)
    if {"samplings", "candidates"} & record.history[0].keys():
        yield "subspace", "The subspace over time", SUBSPACE, figures.subspace_figure(record)


def evolution_gif(record: Record) -> bytes | None:
    """An animated GIF of the cells after each epoch; None without dot, and for a retraining."""
    distinct = {str(genotype): genotype for genotype in record.genotypes}
    images = {text: cell_image(genotype) for text, genotype in distinct.items()}
    if not images or any(image is None for image in images.values()):
        return None
    stages = [f"stage {line['stage'] + 1}, " if "stage" in line else "" for line in record.history]
    texts = [f"{stage}epoch {line['epoch'] + 1}" for stage, line in zip(stages, record.history, strict=True)]
    return report.animate([images[str(genotype)] for genotype in record.genotypes], texts)


def list_facts(record: Record) -> Iterator[tuple[str, str]]:
    """(number, what it is) of the tiles at the top of the page."""
    args, search = record.info["args"], bool(record.genotypes)
    names = {"valid_acc": "validation accuracy"} if search else {"test_acc": "test accuracy, last"}
    for key, what in {**names, "best_acc": "test accuracy, best"}.items():
        if not math.isnan(accuracy := record.last(key)):
            yield f"{accuracy:.2f} %", what
    for name in record.parts("table_acc"):
        yield f"{record.last('table_acc', name):.2f} %", f"looked-up test accuracy on {name}"
    images = {key: args.get(key) for key in ("dataset", "image_size")}  # the rest of a search's is of its supernet
    channels, layers, parameters, multiply_adds = measure(record.genotype, images if search else args)
    yield f"{parameters:.2f} M", f"parameters at {channels} channels, --layers {layers}"
    yield f"{multiply_adds:.0f} M", "multiply-adds of an image"
    yield str(genotypes.count_skips(record.genotype)), "skip connections"
    yield f"{record.minutes:.1f} min", f"{'search' if search else 'training'} time"
    yield f"{record.memory_gb:.1f} GB", "peak memory"


def measure(genotype: Genotype, args: dict) -> tuple[int, int, float, float]:
    """Channels, layers, parameters and multiply-adds (in millions, without auxiliary head) of a genotype's network.

    ``args`` are those of a retraining; of what is not in it, the size of the papers is taken.
    """
    info = data.INFO.get(args.get("dataset") or "cifar10", data.INFO["folder"])
    pixels = args.get("image_size") or info.image_size
    large = pixels >= 96
    channels, layers = (16, 5) if not isinstance(genotype, Genotype) else (46, 14) if large else (36, 20)
    channels, layers = args.get("init_channels") or channels, args.get("layers") or layers
    classes = info.num_classes or (1000 if large else 10)
    with torch.device("meta"):
        network = model.network_for(large, channels, classes, layers, False, genotype)
        multiply_adds = model.count_multiply_adds(network, pixels) / 1e6
    return channels, layers, model.count_parameters(network) / 1e6, multiply_adds


TEXTS = ("run", "search", "seed", "genotype")
NUMBERS = {"skips": ".0f", "params M": ".2f", "madds M": ".0f", "minutes": ".1f", "memory GB": ".2f"}
NUMBERS |= {"valid %": ".2f", "test %": ".2f"}


def compare(targets: list[str]) -> list[dict]:
    """A row {column: value} for each run or genotype, with the genotype as "found".

    A retraining of what one of the searches found joins the row of that search; "tests" are the best accuracies of all.
    Networks have the size of the papers: that for ImageNet if one of the runs is of ImageNet.
    """
    rows, retrainings, images = [], [], {}
    for target in targets:
        row = dict.fromkeys(TEXTS, "–") | dict.fromkeys(NUMBERS, math.nan) | {"tests": []}
        if not os.path.isfile(os.path.join(target, "args.json")):  # Path.is_file raises on a text too long for a path
            name = target if len(target) < 40 else "Genotype(...)"
            rows.append(row | {"run": name, "found": genotypes.load(target)})
            continue
        record = load_run(target)
        args = record.info["args"]
        images |= {"dataset": "imagenet"} if args.get("dataset") == "imagenet" else {}
        row |= {"run": record.name, "seed": str(args.get("seed")), "found": record.genotype}
        if record.genotypes:
            row["search"] = f"{record.kind.removesuffix(' search')} {args.get('space_config', '')}".strip()
            row |= {"minutes": record.minutes, "memory GB": record.memory_gb, "valid %": record.last("valid_acc")}
            rows.append(row)
        else:
            retrainings.append(row | {"tests": [record.last("best_acc")]})
    for training in retrainings:
        owners = [row for row in rows if row["found"] == training["found"]]
        for row in owners:
            row["tests"] += training["tests"]
        rows += [] if owners else [training]
    known = {str(getattr(genotypes, name)): name for name in genotypes.names()}
    published = len(known)
    for row in rows:
        found = row["found"]
        row["test %"] = float(np.mean(row["tests"])) if row["tests"] else math.nan
        row["genotype"] = known.setdefault(str(found), f"cell {len(known) - published + 1}")
        row["skips"] = genotypes.count_skips(found)
        _, _, row["params M"], row["madds M"] = measure(found, images)
    return rows


def comparison_table(rows: list[dict]) -> str:
    """The comparison as a table in Markdown, with the genotypes written out below."""
    texts = [[*TEXTS, *NUMBERS]]
    for row in rows:
        numbers = ["–" if math.isnan(row[name]) else format(row[name], form) for name, form in NUMBERS.items()]
        if len(row["tests"]) > 1:
            numbers[-1] += f" ± {np.std(row['tests'], ddof=1):.2f} ({len(row['tests'])})"
        texts.append([row[name] for name in TEXTS] + numbers)
    found = {row["genotype"]: row["found"] for row in rows}
    return "\n".join([tables.markdown_table(texts), "", *(f"{name} = {genotype}" for name, genotype in found.items())])


def main(args: argparse.Namespace) -> None:
    """Draw what was asked for and print the files that were written."""
    several = len(args.targets) > 1
    if args.out and (several or args.all):
        raise cli.UserError("--out is where to draw the cells of one genotype; give one target, without --all")
    if several and not args.all:
        print(comparison_table(compare(args.targets)))
        return
    with matplotlib.rc_context(figures.RC):
        for target in args.targets:
            print(*(write_report(target) if args.all else draw(target, args.out)), sep="\n")


def draw(target: str, out: str | None) -> list[Path]:
    """The cells of one genotype: beside the run they come from, else in the current folder under their name."""
    is_run = os.path.isdir(target)  # False for a text too long for a path
    name = Path(target).resolve().name if is_run else Path(target).stem if target.isidentifier() else "cells"
    files = draw_cells(genotypes.load(target), out or (Path(target, "figures/cells") if is_run else name), title=name)
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
