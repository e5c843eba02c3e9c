"""visualize.py on made-up run folders of all three kinds."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

import genotypes
import utils
import visualize
from figure import figure1, figure2
from genotypes import PRIMITIVES, Genotype

EDGES = visualize.edge_list()
PUBLISHED = [genotypes.DDSAS_cifar10, genotypes.DDSAS_cifar100, genotypes.DDSAS_imagenet, genotypes.PDARTS]
needs_dot = pytest.mark.skipif(not shutil.which("dot"), reason="Graphviz is not installed")


def best_edges(scores: dict[str, np.ndarray]) -> Genotype:
    """Per node the two edges whose best operation other than none scores highest."""
    cells = {}
    for cell, score in scores.items():
        score = np.where(np.array(PRIMITIVES) == "none", -1.0, np.nan_to_num(score, nan=-1.0))
        cells[cell] = []
        for node in range(4):
            edges = [edge for edge, (n, _) in enumerate(EDGES) if n == node]
            for edge in sorted(edges, key=lambda edge: -score[edge].max())[:2]:
                cells[cell].append((PRIMITIVES[int(score[edge].argmax())], EDGES[edge][1]))
    return Genotype(cells["normal"], range(2, 6), cells["reduce"], range(2, 6))


def write_run(folder: Path, script: str, args: dict, history: list[dict], genotype: Genotype) -> Path:
    """A run folder as the scripts write it, without checkpoints."""
    folder.mkdir(parents=True)
    info = {"script": script, "command": f"python {script} --save x", "args": args, "versions": {"python": "3.12"}}
    (folder / "args.json").write_text(json.dumps(info | {"seed": args["seed"]}))
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    times = [{"epoch": e["epoch"], "seconds": 30.0, "peak_memory_mb": 900.0 + e["epoch"]} for e in history]
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    (folder / "genotype.txt").write_text(str(genotype) + "\n")
    return folder


def search_run(folder: Path, epochs: int = 6, samplings: int = 3, seed: int = 0, shrink: bool = False) -> Path:
    """A made-up DDSAS search: drifting saliencies, subspaces of 28 operations, on demand a shrinking space."""
    rng = np.random.default_rng(seed)
    drift = {cell: rng.normal(0, 1.0, (14, 8)) for cell in visualize.CELLS}
    saliency = {cell: np.full((14, 8), 0.06) for cell in visualize.CELLS}
    available = {cell: np.ones((14, 8), bool) for cell in visualize.CELLS}
    history, genotype = [], None
    for epoch in range(epochs):
        if shrink and epoch and epoch % max(2, epochs // 5) == 0:
            for cell in visualize.CELLS:
                order = np.argsort(np.where(available[cell], saliency[cell], 9).ravel())[:14]
                available[cell].ravel()[order] = False
                available[cell][:, 4] = True
        entries = []
        for step in range(samplings):
            masks = {}
            for cell in visualize.CELLS:
                score = np.where(available[cell], saliency[cell] + rng.gumbel(0, 0.04, (14, 8)), -1)
                active = score >= np.sort(score.ravel())[-28]
                masks[cell] = [int(sum(1 << k for k in range(8) if row[k])) for row in active & available[cell]]
            entries.append({"step": 30 * step, "active": masks, "changed": 10})
        for cell in visualize.CELLS:
            pull = rng.normal(0, 0.015, (14, 8)) + 0.02 * drift[cell] * np.exp(-epoch / (0.3 * epochs))
            saliency[cell] = np.clip(saliency[cell] + pull * 8 / epochs, 0.005, 0.6)
        genotype = best_edges({cell: np.where(available[cell], saliency[cell], np.nan) for cell in visualize.CELLS})
        rise = 1 - np.exp(-3 * (epoch + 1) / epochs)
        masks = {c: [int(sum(1 << k for k in range(8) if row[k])) for row in available[c]] for c in visualize.CELLS}
        history.append(
            {"epoch": epoch, "lr": 0.025, "tau": None, "train_loss": 2.3 - 1.9 * rise, "train_acc": 10 + 82 * rise}
            | {"arch_loss": 2.2, "valid_loss": 2.3 - 1.7 * rise, "valid_acc": 10 + 75 * rise + rng.normal(0, 0.8)}
            | {"genotype": str(genotype), "primitives": PRIMITIVES, "samplings": entries, "available": masks}
            | {"saliency": {c: saliency[c].tolist() for c in saliency}}
            | {"visits": {c: np.ones((14, 8)).tolist() for c in saliency}}
            | {"alpha_entropy": {"normal": 2.08 - 0.5 * rise, "reduce": 2.08 - 0.3 * rise}}
            | {"active_ops": {"normal": 28, "reduce": 28}}
        )
    args = {"dataset": "cifar10", "space_config": "shrink" if shrink else "static", "seed": seed, "epochs": epochs}
    args |= {"batch_size": 64, "note": "a <b>bold</b> note & more", "init_channels": 16, "layers": 8}
    return write_run(folder, "search.py", args, history, genotype)


def pdarts_run(folder: Path, epochs: int = 4, seed: int = 0) -> Path:
    """A made-up P-DARTS search: three stages of ``epochs`` with 8, 5 and 3 candidates an edge."""
    rng = np.random.default_rng(seed)
    history, genotype = [], None
    candidates = {cell: [list(PRIMITIVES) for _ in EDGES] for cell in visualize.CELLS}
    for stage, count in enumerate((8, 5, 3)):
        for cell in visualize.CELLS:
            kept = [rng.permutation(names)[:count].tolist() for names in candidates[cell]]
            candidates[cell] = [sorted(names, key=PRIMITIVES.index) for names in kept]
        target = {cell: rng.normal(0, 1, (14, count)) for cell in visualize.CELLS}
        for epoch in range(epochs):
            weights = {cell: np.exp(target[cell] * epoch / epochs) for cell in visualize.CELLS}
            weights = {cell: w / w.sum(1, keepdims=True) for cell, w in weights.items()}
            full = {cell: np.full((14, 8), np.nan) for cell in visualize.CELLS}
            for cell in visualize.CELLS:
                for edge, names in enumerate(candidates[cell]):
                    full[cell][edge, [PRIMITIVES.index(name) for name in names]] = weights[cell][edge]
            genotype = best_edges(full)
            last = epoch >= epochs - 2
            history.append(
                {"stage": stage, "epoch": epoch, "lr": 0.02, "dropout": 0.1, "arch_loss": None}
                | {"train_loss": 2.0 / (epoch + 1), "train_acc": 95 - 50.0 / (epoch + 1)}
                | {"valid_loss": 1.0 if last else None, "valid_acc": 60.0 + stage if last else None}
                | {"candidates": dict(candidates), "probabilities": {c: weights[c].tolist() for c in weights}}
                | {"alpha_entropy": {"normal": 2.0 - stage / 2, "reduce": 2.0 - stage / 3}, "genotype": str(genotype)}
            )
    args = {"tmp_data_dir": "data", "seed": seed, "epochs": epochs, "add_layers": [0, 6, 12], "cifar100": False}
    return write_run(folder, "train_search.py", args, history, genotype)


def retrain_run(folder: Path, genotype: Genotype, epochs: int = 5, best: float = 97.0, seed: int = 0) -> Path:
    """A made-up retraining."""
    history = []
    for epoch in range(epochs):
        test = best - 50 * (epochs - 1 - epoch) / epochs
        history.append(
            {"epoch": epoch, "lr": 0.025, "drop_path": 0.2 * epoch / epochs, "train_loss": 2 / (epoch + 1)}
            | {"train_acc": test + 1, "test_loss": 2.2 / (epoch + 1), "test_acc": test, "test_acc_top5": 99.0}
            | {"best_acc": test}
        )
    args = {"dataset": "cifar10", "arch": "x", "seed": seed, "epochs": epochs, "init_channels": 36, "layers": 20}
    return write_run(folder, "retrain.py", args, history, genotype)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """One run of each kind; the retraining is of what the DDSAS search found."""
    root = tmp_path_factory.mktemp("logs")
    made = {"ddsas": search_run(root / "ddsas", shrink=True), "pdarts": pdarts_run(root / "pdarts")}
    made["retrain"] = retrain_run(root / "retrain", visualize.load_run(made["ddsas"]).genotype)
    return made


@pytest.fixture(scope="module")
def reports(runs) -> dict[str, str]:
    """The reports of the three runs, made by the command."""
    for folder in runs.values():
        command(str(folder), "--all")
    return {kind: (folder / "report.html").read_text() for kind, folder in runs.items()}


def command(*arguments: str) -> None:
    utils.cli(visualize.main, visualize.get_parser(), list(arguments))


def without_dot(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


# The language of the figures


def test_edges_are_listed_node_by_node_source_by_source():
    assert len(EDGES) == genotypes.EDGES
    assert EDGES[:5] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)] and EDGES[-1] == (3, 4)


def test_every_primitive_has_a_look_and_a_kind_has_one_colour_and_one_line():
    assert set(visualize.LOOK) == set(PRIMITIVES)
    kinds = {look.kind: (look.color, look.dashes) for look in visualize.LOOK.values()}
    assert all((look.color, look.dashes) == kinds[look.kind] for look in visualize.LOOK.values())
    assert len({color for color, _ in kinds.values()}) == len({dashes for _, dashes in kinds.values()}) == len(kinds)


def test_the_tint_behind_a_label_is_light_enough_to_read_black_on_it():
    for look in visualize.LOOK.values():
        red, green, blue = to_rgb(visualize.tint(look.color))
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.8


def test_distance_counts_operations_not_their_order():
    first = genotypes.DDSAS_cifar10
    assert visualize.distance(first, first) == pytest.approx(0)
    swapped = first._replace(normal=[first.normal[1], first.normal[0], *first.normal[2:]])
    assert visualize.distance(first, swapped) == pytest.approx(0)
    other = first._replace(reduce=[("skip_connect", 1), *first.reduce[1:]])
    assert visualize.distance(first, other) == pytest.approx(1 / 16)
    pools = [("avg_pool_3x3", 0), ("avg_pool_3x3", 1)] * 4
    assert visualize.distance(first, first._replace(normal=pools, reduce=pools)) == pytest.approx(1)


# Cells


@pytest.mark.parametrize("genotype", PUBLISHED)
def test_the_graph_has_each_operation_between_its_source_and_its_node(genotype):
    source = visualize.cell_graph(genotype).source
    for cell in visualize.CELLS:
        names = [f"{cell}_in0", f"{cell}_in1", *(f"{cell}_{node}" for node in range(4))]
        drawn = []
        for box, label in re.findall(rf"({cell}_edge\d+) \[label=(\"[^\"]+\"|\w+)", source):
            tail = re.search(rf"(\w+) -> {box}:w", source)[1]
            head = re.search(rf"{box}:e -> (\w+)", source)[1]
            drawn.append((names.index(head) - 2, names.index(tail), label.strip('"')))
        wanted = [(i // 2, s, visualize.LOOK[op].label) for i, (op, s) in enumerate(getattr(genotype, cell))]
        assert sorted(drawn) == sorted(wanted)
        assert len(re.findall(rf"{cell}_\d -> {cell}_out", source)) == 4


def test_the_output_joins_the_nodes_of_concat_alone():
    source = visualize.cell_graph(genotypes.PDARTS._replace(normal_concat=[4, 5])).source
    assert re.findall(r"normal_(\d) -> normal_out", source) == ["2", "3"]


def test_the_legend_names_the_kinds_that_occur():
    source = visualize.cell_graph(genotypes.DDSAS_cifar100).source
    assert "separable conv" in source and "dilated conv" in source and "max pool" not in source


@needs_dot
def test_cells_are_drawn_as_svg_and_png(tmp_path):
    files = visualize.draw_cells(genotypes.PDARTS, tmp_path / "new" / "v1.2", title="<P & DARTS>")
    assert {file.name for file in files} == {"v1.2.svg", "v1.2.png", "v1.2.gv"}
    svg = (tmp_path / "new" / "v1.2.svg").read_text()
    for cell in visualize.CELLS:
        for op, _ in getattr(genotypes.PDARTS, cell):
            assert visualize.LOOK[op].label in svg
    assert "&lt;P &amp; DARTS&gt;" in svg and "Normal cell" in svg and "Reduction cell" in svg
    width, height = map(float, re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"', svg).groups())
    assert width < 600, "wider than a page column: the labels would become too small"
    assert Image.open(tmp_path / "new" / "v1.2.png").width > 2 * width


@needs_dot
def test_pictures_of_a_search_keep_everything_at_its_place():
    places = []
    for genotype in PUBLISHED:
        plain = visualize.cell_graph(genotype, steady=True).pipe("plain").decode()
        places.append(dict(re.findall(r"node (\w+_(?:in0|in1|\d|out)) ([\d.]+ [\d.]+)", plain)))
    assert len(places[0]) == 14 and all(place == places[0] for place in places)
    pictures = [visualize.cell_image(genotype) for genotype in PUBLISHED[:2]]
    assert pictures[0].dtype == np.uint8 and pictures[0].shape == pictures[1].shape and pictures[0].shape[2] == 3
    assert (pictures[0] != pictures[1]).any()


def test_without_dot_the_source_is_written_and_a_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    without_dot(monkeypatch, tmp_path)
    assert visualize.draw_cells(genotypes.PDARTS, tmp_path / "cells") == [tmp_path / "cells.gv"]
    assert "install" in capsys.readouterr().err
    assert (tmp_path / "cells.gv").read_text().startswith("digraph")
    assert visualize.cell_image(genotypes.PDARTS) is None
    with pytest.raises(SystemExit) as stop:
        command("PDARTS", "--out", str(tmp_path / "again"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "apt install graphviz" in error and "Traceback" not in error
    assert (tmp_path / "again.gv").is_file()


@needs_dot
def test_the_command_draws_a_name_a_file_a_run_and_a_literal(tmp_path, monkeypatch, runs, capsys):
    monkeypatch.chdir(tmp_path)
    command("DDSAS_cifar10")
    assert (tmp_path / "DDSAS_cifar10.svg").is_file() and (tmp_path / "DDSAS_cifar10.png").is_file()
    command(str(genotypes.PDARTS), "--out", "literal")
    command(str(runs["ddsas"] / "genotype.txt"), "--out", "file")
    command(str(runs["ddsas"]))
    assert {"literal.png", "file.png"} <= {file.name for file in tmp_path.iterdir()}
    assert str(runs["ddsas"] / "figures" / "cells.svg") in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["NOPE"], ["NOPE", "--all"], ["PDARTS", "NOPE"]])
def test_what_is_neither_run_nor_genotype_is_a_line_on_stderr(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "NOPE" in error and len(error.splitlines()) == 1


# Runs


def test_kinds_of_runs_are_told_apart(runs):
    for kind, folder in runs.items():
        run = visualize.load_run(folder)
        assert run.kind == kind and run.genotype
    assert len(visualize.load_run(runs["pdarts"]).history) == 12
    assert visualize.load_run(runs["pdarts"]).stages == [4, 8]
    assert visualize.load_run(runs["ddsas"]).minutes() == pytest.approx(3.0)
    assert visualize.load_run(runs["ddsas"]).memory() == 905


def test_a_line_that_was_never_finished_is_left_out_and_a_damaged_one_is_named(tmp_path):
    folder = search_run(tmp_path / "run", epochs=3)
    history = folder / "history.jsonl"
    whole = history.read_text()
    history.write_text(whole[:-40])
    assert len(visualize.load_run(folder).history) == 2
    history.write_text(whole.replace('"epoch": 1', '"epoch" 1', 1))
    with pytest.raises(utils.UserError, match="line 2"):
        visualize.load_run(folder)
    history.write_text("")
    with pytest.raises(utils.UserError, match="no finished epoch"):
        visualize.load_run(folder)


def test_a_search_that_is_still_running_shows_the_genotype_of_its_last_epoch(tmp_path):
    folder = search_run(tmp_path / "run", epochs=3)
    (folder / "genotype.txt").unlink()
    run = visualize.load_run(folder)
    assert run.genotype == run.genotypes[-1]


def test_a_loss_that_is_not_a_number_leaves_a_gap(tmp_path):
    folder = retrain_run(tmp_path / "run", genotypes.PDARTS, epochs=3)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    lines[1]["train_loss"], lines[2]["train_loss"] = math.nan, None
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    losses = visualize.load_run(folder).series("train_loss")
    assert losses[0] == 2 and np.isnan(losses[1:]).all()


def test_trajectories_end_where_an_operation_is_gone(runs):
    for kind in ("ddsas", "pdarts"):
        run = visualize.load_run(runs[kind])
        values, ops = visualize.trajectory(run, "normal")
        assert values.shape == (len(run.history), 14, 8) and ops == PRIMITIVES
    assert [np.isfinite(values[epoch]).sum() for epoch in (0, 4, 8)] == [14 * 8, 14 * 5, 14 * 3]
    line = run.history[5]
    edge, name = 3, line["candidates"]["normal"][3][2]
    assert values[5, edge, PRIMITIVES.index(name)] == line["probabilities"]["normal"][edge][2]


def test_the_subspace_shows_each_sampling(runs):
    run = visualize.load_run(runs["ddsas"])
    active, available, ops = visualize.subspace(run, "reduce")
    assert active.shape == available.shape == (6 * 3, 14, 8)
    for column in range(18):
        masks = run.history[column // 3]["samplings"][column % 3]["active"]["reduce"]
        expected = [[mask >> op & 1 for op in range(8)] for mask in masks]
        assert (active[column] == expected).all()
    assert available[0].all() and (~available[-1]).sum() >= 14
    assert not active[~available].any()


def test_samplings_that_do_not_fit_are_averaged(runs):
    run = visualize.load_run(runs["ddsas"])
    fine, _, _ = visualize.subspace(run, "normal")
    coarse, _, _ = visualize.subspace(run, "normal", columns=6)
    assert coarse.shape[0] == 6
    assert coarse == pytest.approx(fine.reshape(6, 3, 14, 8).mean(axis=1))


def test_a_sampled_operation_has_its_colour_at_its_row(runs):
    run = visualize.load_run(runs["ddsas"])
    active, available, ops = visualize.subspace(run, "normal")
    picture = visualize._colored(active, available, ops)
    assert picture.shape == (14 * 9 * 5, 18, 4)
    column, edge, op = map(int, np.argwhere(active == 1)[0])
    pixel = picture[(edge * 9 + op) * 5, column]
    assert tuple(pixel) == (*to_rgb(visualize.LOOK[ops[op]].color), 1.0)


@needs_dot
def test_the_gif_has_a_frame_for_each_epoch(runs, reports):
    for kind, epochs in (("ddsas", 6), ("pdarts", 12)):
        with Image.open(runs[kind] / "figures" / "evolution.gif") as gif:
            assert gif.n_frames == epochs and gif.info["loop"] == 0


# The report


class Page(HTMLParser):
    """Checks that tags are balanced; collects the text and whatever a browser would fetch."""

    VOID = {"meta", "link", "img", "br", "hr", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.fetched, self.text, self.ids = [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attributes)

    def handle_startendtag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("kind", ["ddsas", "pdarts", "retrain"])
def test_the_report_is_whole_and_fetches_nothing(runs, reports, kind):
    page = Page(reports[kind])
    assert not page.open
    assert all(link.startswith(("data:", "#")) for link in page.fetched)
    assert "http" not in re.sub(r"data:[^\"]*", "", reports[kind]) and "@import" not in reports[kind]
    run = visualize.load_run(runs[kind])
    assert str(run.genotype) in page.text and run.command in page.text
    for name, value in (run.args | run.versions).items():
        assert name in page.text and str(value) in page.text
    assert all(color not in reports[kind].split("</style>", 1)[1] for color in (visualize.INK, visualize.LINE))


def test_the_report_says_how_to_retrain(runs, reports):
    expected = f"python retrain.py --dataset cifar10 --cutout --auxiliary --arch {runs['ddsas']}"
    assert expected in Page(reports["ddsas"]).text
    expected = f"python train_cifar.py --tmp_data_dir data --auxiliary --arch {runs['pdarts']}"
    assert expected in Page(reports["pdarts"]).text
    assert "Train it from scratch" not in reports["retrain"]


def test_retrain_understands_the_command_of_the_report(runs):
    retrain = pytest.importorskip("retrain")
    run = visualize.load_run(runs["ddsas"])
    own_images = {"dataset": "folder", "data": "my images", "image_size": 48}
    for changes in ({}, own_images, {"dataset": "imagenet", "data": ".data/split"}):
        run.args = run.args | changes
        words = shlex.split(visualize.retrain_command(run))
        args = retrain.get_parser().parse_args(words[2:])
        assert words[:2] == ["python", "retrain.py"] and args.auxiliary and args.arch == str(runs["ddsas"])
        assert args.dataset == run.args["dataset"]
        assert args.data == {"folder": "my images", "imagenet": ".data/imagenet"}.get(args.dataset, ".data")


def test_text_of_a_run_is_text_in_the_report(reports):
    assert "<b>bold</b>" not in reports["ddsas"] and "<b>bold</b>" in Page(reports["ddsas"]).text


def test_the_report_of_a_search_shows_all_figures(runs, reports):
    for kind, quantity in (("ddsas", "saliency"), ("pdarts", "probability")):
        names = {file.name for file in (runs[kind] / "figures").iterdir()}
        for figure in ("progress", f"{quantity}_normal", f"{quantity}_reduce", "subspace"):
            assert {f"{figure}.svg", f"{figure}.png"} <= names
        assert len(re.findall(r"<svg\b", reports[kind])) == 4 + bool(shutil.which("dot"))
    assert {file.name for file in (runs["retrain"] / "figures").iterdir()} >= {"curves.svg", "curves.png"}
    assert "subspace" not in reports["retrain"]


def test_without_dot_the_report_shows_the_rest(tmp_path, monkeypatch):
    folder = search_run(tmp_path / "run", epochs=2)
    without_dot(monkeypatch, tmp_path)
    command(str(folder), "--all")
    page = Page((folder / "report.html").read_text())
    assert "apt install graphviz" in page.text and "The subspace over time" in page.text


# Comparison


def test_a_comparison_joins_searches_and_their_retrainings(runs, tmp_path):
    found = visualize.load_run(runs["ddsas"]).genotype
    second = retrain_run(tmp_path / "second", found, best=97.4, seed=1)
    other = retrain_run(tmp_path / "other", genotypes.PDARTS, best=97.5)
    targets = [*map(str, runs.values()), str(second), str(other), "DDSAS_cifar10"]
    rows = {row.name: row for row in visualize.compare(targets, visualize.Size())}
    assert list(rows) == ["ddsas", "pdarts", "DDSAS_cifar10", "other"]
    assert rows["ddsas"].tests == [97.0, 97.4] and rows["ddsas"].test == pytest.approx(97.2)
    assert rows["ddsas"].letter == "A" and rows["pdarts"].letter == "B" and rows["other"].letter == "PDARTS"
    assert (rows["ddsas"].space, rows["ddsas"].seed, rows["ddsas"].minutes) == ("shrink", "0", pytest.approx(3))
    assert rows["pdarts"].validation == 62.0 and math.isnan(rows["pdarts"].test)
    assert rows["DDSAS_cifar10"].skips == 3 and rows["DDSAS_cifar10"].parameters == pytest.approx(3.6, abs=0.05)


def test_the_printed_table_is_aligned_and_names_the_genotypes(runs, tmp_path, capsys):
    command(*map(str, runs.values()), "PDARTS", "--out", str(tmp_path / "table"))
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 5 and len(set(map(len, table))) == 1
    assert all(heading in table[0] for heading in visualize.HEADINGS)
    assert f"A = {visualize.load_run(runs['ddsas']).genotype}" in lines
    assert (tmp_path / "table.svg").is_file() and Image.open(tmp_path / "table.png").width > 800


def test_multiply_adds_follow_the_width_and_imagenet_is_the_mobile_setting():
    narrow, wide = (visualize.cost(genotypes.PDARTS, visualize.Size(width)) for width in (18, 36))
    assert narrow[0] < wide[0] / 3 and narrow[1] < wide[1] / 3
    parameters, multiply_adds = visualize.cost(genotypes.DDSAS_imagenet, visualize.IMAGENET)
    assert 4 < parameters < 6.5 and 400 < multiply_adds < 700


def test_the_module_runs_as_a_program(tmp_path):
    root = Path(visualize.__file__).parent
    shown = subprocess.run([sys.executable, "visualize.py", "--help"], cwd=root, capture_output=True, text=True)
    assert shown.returncode == 0 and "report.html" in shown.stdout


# The figures of figure/


def test_figure1_groups_seeds_and_keeps_what_it_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(figure1, "FOLDER", tmp_path)
    for seed in range(2):
        search_run(tmp_path / f"run{seed}", epochs=4 + seed, seed=seed)
    pairs = [f"static-{seed}={tmp_path / f'run{seed}'}" for seed in range(2)]
    figure1.main(figure1.get_parser().parse_args(["--add", pairs[0], "--add", pairs[1], "--out", str(tmp_path / "f")]))
    assert (tmp_path / "f.svg").is_file() and (tmp_path / "f.png").is_file()
    found = figure1.groups(sorted((tmp_path / "data").iterdir()))
    assert list(found) == ["static"] and [len(accuracies) for _, accuracies in found["static"]] == [4, 5]
    run = visualize.load_run(tmp_path / "run1")
    assert found["static"][1][0][2] == visualize.distance(run.genotypes[2], run.genotypes[3])
    assert len(figure1.draw(found).axes[1].lines[0].get_xdata()) == 4


def test_figure1_without_runs_says_how_to_keep_some(tmp_path, monkeypatch):
    monkeypatch.setattr(figure1, "FOLDER", tmp_path)
    with pytest.raises(utils.UserError, match="--add"):
        figure1.main(figure1.get_parser().parse_args([]))


def test_figure2_shows_a_subspace_of_28_operations_and_a_genotype():
    space = figure2.simulate()
    counted = space.active["normal"] & space.counted
    assert counted.sum() == 28 and counted.any(axis=1).all() and (~space.available["normal"]).sum() == 28
    texts = [text.get_text() for text in figure2.draw().texts]
    assert {"1  Space", "2  UCB score", "3  Subspace", "4  Search", "5  Saliency", "6  Genotype"} <= set(texts)
