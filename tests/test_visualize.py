"""Cells, what a run folder tells, its figures, comparisons, and what happens where nothing can be written."""

import math
import re
import resource
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from made_up_runs import PUBLISHED, nasbench201_run, pdarts_run, retrain_run, search_run
from PIL import Image

import genotypes
import operations
import visualize
from genotypes import CELL_TYPES, PRIMITIVES
from lib import cli, figures, records

needs_dot = pytest.mark.skipif(not shutil.which("dot"), reason="Graphviz is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """A run of each kind; the retraining is of what the DDSAS search found."""
    root = tmp_path_factory.mktemp("logs")
    folders = {"ddsas": search_run(root / "ddsas"), "pdarts": pdarts_run(root / "pdarts")}
    folders["nasbench201"] = nasbench201_run(root / "nasbench201")
    return folders | {"retrain": retrain_run(root / "retrain", visualize.load_run(root / "ddsas").genotype)}


@pytest.fixture
def fail(refused):
    return partial(refused, visualize)


def test_an_operation_of_the_readers_own_is_in_all_pictures_under_its_name(tmp_path, monkeypatch):
    mine = [op.replace("sep_conv_5x5", "my_<op>") for op in PRIMITIVES]
    monkeypatch.setitem(operations.OPS, "my_<op>", operations.OPS["sep_conv_5x5"])
    genotype = genotypes.PDARTS._replace(normal=[("my_<op>", 0), *genotypes.PDARTS.normal[1:]])
    assert visualize.cell_graph(genotype).source.count("my_<op>") == 1
    record = visualize.load_run(search_run(tmp_path / "run", ops=mine))
    legend = figures.trajectory_figure(record, "normal").axes[-1].get_legend()
    assert "my_<op>" in [text.get_text() for text in legend.get_texts()]
    assert "my_<op>" in figures.subspace_figure(record).get_suptitle()


def test_the_graph_has_each_operation_between_its_source_and_its_node():
    genotype = PUBLISHED[0]._replace(normal_concat=[4, 5])
    source = visualize.cell_graph(genotype).source
    for cell in CELL_TYPES:
        names = [f"{cell}_in0", f"{cell}_in1", *(f"{cell}_{node}" for node in range(4))]
        drawn = []
        for box, label in re.findall(rf"({cell}_edge\d+) \[label=(\"[^\"]+\"|\w+)", source):
            tail = re.search(rf"(\w+) -> {box}:w", source)[1]
            head = re.search(rf"{box}:e -> (\w+)", source)[1]
            drawn.append((names.index(head) - 2, names.index(tail), label.strip('"')))
        wanted = [(i // 2, s, figures.style_of(op).label) for i, (op, s) in enumerate(getattr(genotype, cell))]
        assert sorted(drawn) == sorted(wanted)
        joined = re.findall(rf"{cell}_(\d) -> {cell}_out", source)
        assert [int(node) + 2 for node in joined] == list(getattr(genotype, f"{cell}_concat"))


@needs_dot
def test_the_command_draws_a_name_a_file_a_run_and_a_literal(tmp_path, monkeypatch, made, command):
    monkeypatch.chdir(tmp_path)
    file = made["nasbench201"] / "genotype.txt"
    done = [command(visualize, *words) for words in ([file, "--out", "file"], [made["ddsas"]])]
    done.append(command(visualize, genotypes.PDARTS, "--out", "new/<P & DARTS>"))
    assert all((code, errors) == (0, []) for code, _, errors in done)
    assert {"file.png", str(made["ddsas"] / "figures/cells.svg")} <= {*(done[0][1] + done[1][1]).splitlines()}
    svg = (tmp_path / "new/<P & DARTS>.svg").read_text()
    for text in ("Normal cell", "Reduction cell", *(figures.style_of(op).label for op, _ in genotypes.PDARTS.normal)):
        assert text in svg
    width = float(re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+)', svg)[1])
    assert width < 600, "wider than a page column: the labels would become too small"
    assert Image.open("new/<P & DARTS>.png").width > 2 * width


def test_without_dot_the_source_is_written_and_a_line_says_what_to_install(tmp_path, monkeypatch, fail):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install graphviz" in fail("PDARTS", "--out", tmp_path / "cells")
    assert (tmp_path / "cells.gv").read_text().startswith("digraph") and visualize.cell_image(genotypes.PDARTS) is None


@needs_dot
def test_what_is_not_there_or_cannot_be_written_is_one_line(tmp_path, monkeypatch, made, fail):
    assert "NOPE" in fail("NOPE") and "NOPE" in fail("NOPE", "--all") and "NOPE" in fail("PDARTS", "NOPE")
    monkeypatch.setattr(visualize, "draw_figures", lambda record: [])  # which take long
    (tmp_path / "file").touch()
    for name in ("folder.svg", "folder.gv", "run/report.html"):
        (tmp_path / name / "more").mkdir(parents=True)
    for place in (tmp_path / "file/cells", tmp_path / "folder", "/proc/nowhere/cells"):
        assert "cannot be written" in fail("PDARTS", "--out", str(place))
    run = shutil.copytree(made["retrain"], tmp_path / "run", dirs_exist_ok=True)
    assert "report.html cannot be written" in fail(str(run), "--all")
    shutil.rmtree(run / "figures")
    (run / "figures").touch()
    assert "figures" in fail(str(run), "--all")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as on a full disk, in the middle of a file
    try:
        assert "full" in fail("PDARTS", "--out", str(tmp_path / "full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*full*"))


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


def test_trajectories_end_where_an_operation_is_gone(made):
    values, ops = records.trajectory(visualize.load_run(made["ddsas"]), "normal")
    assert values.shape == (6, 14, 8) and ops == PRIMITIVES
    assert np.isfinite(values).sum((1, 2)).tolist() == [112, 112, 98, 98, 84, 84]
    record = visualize.load_run(made["pdarts"])
    values, ops = records.trajectory(record, "normal")
    assert ops == PRIMITIVES and np.isfinite(values[::4]).sum((1, 2)).tolist() == [14 * 8, 14 * 5, 14 * 3]
    line = record.history[5]
    column = PRIMITIVES.index(line["candidates"]["normal"][3][2])
    assert values[5, 3, column] == line["probabilities"]["normal"][3][2]
    axis = figures.trajectory_figure(record, "normal").axes[3]
    curve = next(line for line in axis.lines if np.isfinite(line.get_ydata()).sum() == 12)  # in all three stages
    assert np.isnan(curve.get_ydata()[[4, 9]]).all()  # with a gap before each


def test_the_subspace_is_the_share_of_an_epoch_in_which_an_operation_was_active(made):
    record = visualize.load_run(made["ddsas"])
    shares, ops = records.subspace(record, "reduce")
    for epoch, line in enumerate(record.history):
        masks = [entry["active"]["reduce"] for entry in line["samplings"]]
        counts = [[sum(mask[edge] >> op & 1 for mask in masks) for op in range(8)] for edge in range(14)]
        gone = np.isnan(shares[epoch])
        assert gone.sum() == 14 * (epoch // 2) and shares[epoch][~gone] == pytest.approx(np.array(counts)[~gone] / 3)


def test_a_comparison_joins_searches_and_their_retrainings(made, tmp_path, command, fail, monkeypatch):
    found = visualize.load_run(made["ddsas"]).genotype
    second = retrain_run(tmp_path / "second", found, best=97.4, seed=1)
    other = retrain_run(tmp_path / "other", genotypes.DARTS_V1, best=97.5)
    monkeypatch.setattr(visualize, "measure", lambda *args: (36, 20, 3.6, 500.0))
    targets = [*map(str, made.values()), str(second), str(other), "DDSAS_cifar10"]
    rows = {row["run"]: row for row in visualize.compare(targets)}
    assert list(rows) == ["ddsas", "pdarts", "nasbench201", "DDSAS_cifar10", "other"]
    names = [row["genotype"] for row in rows.values()]
    assert names == ["cell 1", "PDARTS", "cell 2", "DDSAS_cifar10", "DARTS_V1"]
    assert rows["ddsas"]["tests"] == [97.0, 97.4] and rows["ddsas"]["test %"] == pytest.approx(97.2)
    assert [rows["ddsas"][key] for key in ("search", "seed", "minutes")] == ["DDSAS shrink", "0", 3]
    assert rows["pdarts"]["valid %"] == 62.0 and math.isnan(rows["pdarts"]["test %"])
    assert [rows["DDSAS_cifar10"][key] for key in ("skips", "params M")] == [3, 3.6]
    lines = command(visualize, *targets)[1].splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 7 and len(set(map(len, table))) == 1 and "97.20 ± 0.28 (2)" in table[2]
    assert all(heading in table[0] for heading in (*visualize.TEXTS, *visualize.NUMBERS))
    assert f"cell 1 = {found}" in lines
    assert "--out" in fail(*targets, "--out", str(tmp_path / "table"))
