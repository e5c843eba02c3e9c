"""Cells, what a run folder tells, comparisons, and the figures of figure/, on made-up run folders."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_up_runs import PUBLISHED, pdarts_run, retrain_run, search_run
from matplotlib.colors import to_rgb
from PIL import Image

import genotypes
import visualize
from experiments import figure2
from genotypes import CELL_TYPES, EDGE_LIST, PRIMITIVES
from lib import cli

needs_dot = pytest.mark.skipif(not shutil.which("dot"), reason="Graphviz is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """A run of each kind; the retraining is of what the DDSAS search found."""
    root = tmp_path_factory.mktemp("logs")
    folders = {"ddsas": search_run(root / "ddsas"), "pdarts": pdarts_run(root / "pdarts")}
    return folders | {"retrain": retrain_run(root / "retrain", visualize.load_run(root / "ddsas").genotype)}


def command(*arguments: str) -> None:
    cli.run_script(visualize.main, visualize.get_parser(), list(arguments))


# ---- the look of operations ----------------------------------------------------------------------------------------


def test_every_primitive_has_a_look_and_a_kind_has_one_colour_and_one_line():
    assert set(visualize.LOOK) >= {*PRIMITIVES, "nor_conv_1x1", "nor_conv_3x3"}
    looks = [*visualize.LOOK.values(), visualize.look("mine")]
    kinds = {look.kind: (look.color, look.dashes) for look in looks}
    assert all((look.color, look.dashes) == kinds[look.kind] for look in looks)
    assert len({color for color, _ in kinds.values()}) == len({dashes for _, dashes in kinds.values()}) == len(kinds)
    for look in looks:  # and its label is read in black on a light tint
        assert to_rgb(visualize.tint(look.color)) @ np.array([0.2126, 0.7152, 0.0722]) > 0.8


def test_an_operation_of_the_readers_own_is_in_all_pictures_under_its_name(tmp_path, monkeypatch):
    mine = [op.replace("sep_conv_5x5", "my_<op>") for op in PRIMITIVES]
    monkeypatch.setattr(genotypes, "PRIMITIVES", mine)
    genotype = genotypes.PDARTS._replace(normal=[("my_<op>", 0), *genotypes.PDARTS.normal[1:]])
    assert visualize.cell_graph(genotype).source.count("my_<op>") == 1  # and once escaped, in the legend
    record = visualize.load_run(search_run(tmp_path / "run", ops=mine))
    for figure in (visualize.trajectory_figure(record, "normal"), visualize.subspace_figure(record)):
        legend = [*figure.legends, *(axis.get_legend() for axis in figure.axes)]
        assert "my_<op>" in [text.get_text() for part in legend if part for text in part.get_texts()]
    columns = visualize.heat_figure(record.history[0]["saliency"], mine).axes[0].get_xticklabels()
    assert "my_<op>" in [text.get_text() for text in columns]
    if shutil.which("dot"):
        assert visualize.cell_image(genotype).ndim == 3


# ---- cells ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("genotype", PUBLISHED)
def test_the_graph_has_each_operation_between_its_source_and_its_node(genotype):
    source = visualize.cell_graph(genotype).source
    for cell in CELL_TYPES:
        names = [f"{cell}_in0", f"{cell}_in1", *(f"{cell}_{node}" for node in range(4))]
        drawn = []
        for box, label in re.findall(rf"({cell}_edge\d+) \[label=(\"[^\"]+\"|\w+)", source):
            tail = re.search(rf"(\w+) -> {box}:w", source)[1]
            head = re.search(rf"{box}:e -> (\w+)", source)[1]
            drawn.append((names.index(head) - 2, names.index(tail), label.strip('"')))
        wanted = [(i // 2, s, visualize.look(op).label) for i, (op, s) in enumerate(getattr(genotype, cell))]
        assert sorted(drawn) == sorted(wanted)
        assert len(re.findall(rf"{cell}_\d -> {cell}_out", source)) == 4


def test_the_output_joins_the_nodes_of_concat_only_and_the_legend_names_the_kinds_that_occur():
    source = visualize.cell_graph(genotypes.PDARTS._replace(normal_concat=[4, 5])).source
    assert re.findall(r"normal_(\d) -> normal_out", source) == ["2", "3"]
    source = visualize.cell_graph(genotypes.DDSAS_cifar100).source
    assert "separable conv" in source and "dilated conv" in source and "max pool" not in source


@needs_dot
def test_cells_are_drawn_as_svg_and_png(tmp_path):
    files = visualize.draw_cells(genotypes.PDARTS, tmp_path / "new" / "v1.2", title="<P & DARTS>")
    assert {file.name for file in files} == {"v1.2.svg", "v1.2.png", "v1.2.gv"}
    svg = (tmp_path / "new" / "v1.2.svg").read_text()
    for cell in CELL_TYPES:
        assert all(visualize.look(op).label in svg for op, _ in getattr(genotypes.PDARTS, cell))
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
    first, second = (visualize.cell_image(genotype) for genotype in PUBLISHED[:2])
    assert first.dtype == np.uint8 and first.shape == second.shape and first.shape[2] == 3
    assert (first != second).any()


def test_without_dot_the_source_is_written_and_a_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visualize.cell_image(genotypes.PDARTS) is None
    with pytest.raises(SystemExit) as stop:
        command("PDARTS", "--out", str(tmp_path / "cells"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "apt install graphviz" in error and "Traceback" not in error
    assert (tmp_path / "cells.gv").read_text().startswith("digraph")


@needs_dot
def test_the_command_draws_a_name_a_file_a_run_and_a_literal(tmp_path, monkeypatch, made, capsys):
    monkeypatch.chdir(tmp_path)
    command("DDSAS_cifar10")
    assert (tmp_path / "DDSAS_cifar10.svg").is_file() and (tmp_path / "DDSAS_cifar10.png").is_file()
    command(str(genotypes.PDARTS), "--out", "literal")
    command(str(made["ddsas"] / "genotype.txt"), "--out", "file")
    command(str(made["ddsas"]))
    assert {"literal.png", "file.png"} <= {file.name for file in tmp_path.iterdir()}
    assert str(made["ddsas"] / "figures" / "cells.svg") in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["NOPE"], ["NOPE", "--all"], ["PDARTS", "NOPE"]])
def test_what_is_neither_run_nor_genotype_is_a_line_on_stderr(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "NOPE" in error and len(error.splitlines()) == 1


def test_distance_counts_operations_not_their_order():
    first = genotypes.DDSAS_cifar10
    swapped = first._replace(normal=[first.normal[1], first.normal[0], *first.normal[2:]])
    assert visualize.distance(first, swapped) == visualize.distance(first, first) == pytest.approx(0)
    other = first._replace(reduce=[("skip_connect", 1), *first.reduce[1:]])
    assert visualize.distance(first, other) == pytest.approx(1 / 16)
    pools = [("avg_pool_3x3", 0), ("avg_pool_3x3", 1)] * 4
    assert visualize.distance(first, first._replace(normal=pools, reduce=pools)) == pytest.approx(1)


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_kinds_of_runs_are_told_apart(made):
    records = {kind: visualize.load_run(folder) for kind, folder in made.items()}
    quantities = {"ddsas": "saliency", "pdarts": "probability", "retrain": None}
    assert {kind: record.quantity for kind, record in records.items()} == quantities
    assert records["ddsas"].cells == ["normal", "reduce"] and records["retrain"].cells == []
    assert list(records["pdarts"].stages) == [4, 8] and records["ddsas"].stages.size == 0
    assert records["ddsas"].minutes == 3 and records["ddsas"].memory_gb == 905 / 1024


def test_a_line_that_was_never_finished_is_left_out_and_a_damaged_one_is_named(tmp_path):
    folder = search_run(tmp_path / "run", epochs=3)
    (folder / "genotype.txt").unlink()  # as while a search is in its first epochs
    history = folder / "history.jsonl"
    whole = history.read_text()
    history.write_text(whole[:-40])
    record = visualize.load_run(folder)
    assert len(record.history) == 2 and record.genotype == record.genotypes[-1]
    history.write_text(whole.replace('"epoch": 1', '"epoch" 1', 1))
    with pytest.raises(cli.UserError, match="history.jsonl.*line 2"):
        visualize.load_run(folder)
    history.write_text("")
    with pytest.raises(cli.UserError, match="no finished epoch"):
        visualize.load_run(folder)


def test_a_loss_that_is_not_a_number_leaves_a_gap(tmp_path):
    record = visualize.load_run(retrain_run(tmp_path / "run", genotypes.PDARTS, losses=(2, math.nan, None)))
    assert record.series("train_loss")[0] == 2 and np.isnan(record.series("train_loss")[1:]).all()
    assert record.last("train_loss") == 2 and math.isnan(record.last("no such"))


def test_trajectories_end_where_an_operation_is_gone(made):
    values, ops = visualize.trajectory(visualize.load_run(made["ddsas"]), "normal")
    assert values.shape == (6, 14, 8) and ops == PRIMITIVES
    assert np.isfinite(values).sum((1, 2)).tolist() == [112, 112, 98, 98, 84, 84]
    record = visualize.load_run(made["pdarts"])
    values, ops = visualize.trajectory(record, "normal")
    assert ops == PRIMITIVES and np.isfinite(values[::4]).sum((1, 2)).tolist() == [14 * 8, 14 * 5, 14 * 3]
    line = record.history[5]
    column = PRIMITIVES.index(line["candidates"]["normal"][3][2])
    assert values[5, 3, column] == line["probabilities"]["normal"][3][2]


def test_the_subspace_shows_each_sampling_and_averages_those_that_do_not_fit(made):
    record = visualize.load_run(made["ddsas"])
    fine, available, ops = visualize.subspace(record, "reduce")
    assert fine.shape == available.shape == (6 * 3, 14, 8)
    for column in range(18):
        masks = record.history[column // 3]["samplings"][column % 3]["active"]["reduce"]
        assert (fine[column] == [[mask >> op & 1 for op in range(8)] for mask in masks]).all()
    assert available[0].all() and (~available[-1]).sum() == 28 and not fine[~available].any()
    coarse, _, _ = visualize.subspace(record, "reduce", columns=6)
    assert coarse == pytest.approx(fine.reshape(6, 3, 14, 8).mean(axis=1))

    picture = visualize._colored(fine, available, ops)  # a sampled operation has its colour at its row
    column, edge, op = map(int, np.argwhere(fine == 1)[0])
    assert picture.shape == (14 * 9 * 5, 18, 4)
    assert tuple(picture[(edge * 9 + op) * 5, column]) == (*to_rgb(visualize.look(ops[op]).color), 1.0)


# ---- comparison ----------------------------------------------------------------------------------------------------


def test_a_comparison_joins_searches_and_their_retrainings(made, tmp_path):
    found = visualize.load_run(made["ddsas"]).genotype
    second = retrain_run(tmp_path / "second", found, best=97.4, seed=1)
    other = retrain_run(tmp_path / "other", genotypes.DARTS_V1, best=97.5)
    targets = [*map(str, made.values()), str(second), str(other), "DDSAS_cifar10"]
    rows = {row["run"]: row for row in visualize.compare(targets)}
    assert list(rows) == ["ddsas", "pdarts", "DDSAS_cifar10", "other"]
    assert [row["genotype"] for row in rows.values()] == ["A", "PDARTS", "DDSAS_cifar10", "DARTS_V1"]
    assert rows["ddsas"]["tests"] == [97.0, 97.4] and rows["ddsas"]["test %"] == pytest.approx(97.2)
    assert [rows["ddsas"][key] for key in ("space", "seed", "search min")] == ["shrink", "0", 3]
    assert rows["pdarts"]["valid %"] == 62.0 and math.isnan(rows["pdarts"]["test %"])
    assert rows["DDSAS_cifar10"]["skips"] == 3
    assert rows["DDSAS_cifar10"]["params M"] == pytest.approx(3.6, abs=0.05)


def test_the_printed_table_is_aligned_and_names_the_genotypes(made, tmp_path, capsys):
    command(*map(str, made.values()), "DARTS_V2", "--out", str(tmp_path / "table"))
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 5 and len(set(map(len, table))) == 1
    assert all(heading in table[0] for heading in (*visualize.NAMES, *visualize.NUMBERS))
    assert f"A = {visualize.load_run(made['ddsas']).genotype}" in lines
    assert (tmp_path / "table.svg").is_file() and Image.open(tmp_path / "table.png").width > 800


def test_multiply_adds_follow_the_width_and_imagenet_is_the_mobile_setting():
    narrow, wide = (visualize.cost(genotypes.PDARTS, (width, 20, False)) for width in (18, 36))
    assert narrow[0] < wide[0] / 3 and narrow[1] < wide[1] / 3
    parameters, multiply_adds = visualize.cost(genotypes.DDSAS_imagenet, visualize.IMAGENET)
    assert 4 < parameters < 6.5 and 400 < multiply_adds < 700


def test_the_module_runs_as_a_program():
    root = Path(visualize.__file__).parent
    shown = subprocess.run([sys.executable, "visualize.py", "--help"], cwd=root, capture_output=True, text=True)
    assert shown.returncode == 0 and "report.html" in shown.stdout


# ---- the figures of figure/ ----------------------------------------------------------------------------------------


def test_figure2_shows_a_subspace_of_28_operations_and_a_genotype():
    space = figure2.simulate()
    counted = space.active["normal"] & space.counted
    assert counted.sum() == 28 and counted.any(axis=1).all() and (~space.available["normal"]).sum() == 28
    texts = [text.get_text() for text in figure2.draw().texts]
    assert {"1  Space", "2  UCB score", "3  Subspace", "4  Search", "5  Saliency", "6  Genotype"} <= set(texts)
    assert len(figure2.EDGES) == len(EDGE_LIST) == 14
