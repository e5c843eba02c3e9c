"""The study: the commands of shell/study.sh, its statistics, table and figure.

The shell script mostly runs with the stand-in for Python of test_compare.py.
"""

import itertools
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_runs import PUBLISHED, retrain_run
from test_compare import ROOT, Workplace, rows_of

import genotypes
import retrain
import search
import train_search
from experiments import common, figure1, study, truth
from experiments.common import compare
from lib import cli, data

METHODS = ["ddsas", "ddsas-shrink", "ddsas-expand", "ddsas-random", "darts", "gdas", "pdarts"]
CELLS = ["DDSAS_cifar10", "PDARTS", "DARTS_V2"]


@pytest.fixture
def work(tmp_path) -> Workplace:
    return Workplace(tmp_path)


def listed(work: Workplace, *arguments: object, **more: str) -> dict[str, list[list[str]]]:
    """What --list prints: the words after run_once.sh of the one or two trainings of each cell, by its name."""
    result = work.run("study.sh", *arguments, "--list", **more)
    assert result.returncode == 0, result.stderr
    cells = {}
    for line in result.stdout.splitlines():
        words = shlex.split(line)
        assert words[:3] == ["OMP_NUM_THREADS=1", "bash", "shell/lib/run_once.sh"]
        parts = [list(part) for is_then, part in itertools.groupby(words[3:], lambda w: w == "--then") if not is_then]
        cells[Path(parts[0][0]).parent.name] = parts
    assert len(cells) == len(result.stdout.splitlines()), "a folder for each cell"
    return cells


def test_list_prints_a_search_and_its_retraining_for_each_cell(work):
    out = work.folder / "two words"
    cells = listed(work, "--out", out, "--data", "my images")
    assert not work.called() and not out.exists()
    expected = {f"{method}-{seed}" for method in METHODS for seed in range(4)} | {f"{cell}-0" for cell in CELLS}
    assert set(cells) == expected | {f"random-{seed}" for seed in range(8)} and len(cells) == 39
    protocols = set()
    for name, (*found, (folder, script, *words)) in cells.items():
        method, seed = name.rsplit("-", 1)
        args = cli.parse(retrain.get_parser(), words)
        assert (folder, script, args.seed, args.data) == (f"{out}/{name}/retrain", "retrain.py", int(seed), "my images")
        assert args.arch == (f"{out}/{name}/search" if found else method)
        protocols.add(str(vars(args) | {"arch": "", "seed": 0}))
        for place, program, *flags in found:
            module = train_search if method == "pdarts" else search
            searched = cli.parse(module.get_parser(), flags)
            module.check(searched)
            assert (place, program) == (args.arch, f"{module.__name__}.py") and searched.seed == int(seed)
            assert searched.device == args.device == "cpu" and searched.dataset == "fashion_mini"
            assert getattr(searched, "scale_space", False) == (method in ("ddsas-shrink", "ddsas-expand"))
    assert len(protocols) == 1, "one protocol for all"


def test_a_retraining_waits_for_its_search_and_finds_the_genotype_of_pdarts(work):
    line = [work.folder / "a b/search", "search.py", "--seed", 1, "--then", work.folder / "a b/retrain", "retrain.py"]
    work.do.write_text("fail")
    assert work.run("lib/run_once.sh", *line).returncode == 3
    assert [call[0] for call in work.called()] == ["search.py"]
    work.do.write_text("")
    assert work.run("lib/run_once.sh", *line).returncode == 0
    assert [call[0] for call in work.called()[1:]] == ["search.py", "retrain.py"]
    made = work.folder / "search/search-x-2026"
    made.mkdir(parents=True)
    (made / "checkpoint.pt").touch()
    (made / "genotype.txt").write_text(f"{PUBLISHED[3]}\n")
    assert work.run("lib/run_once.sh", work.folder / "search", "train_search.py").returncode == 0
    assert genotypes.load(str(work.folder / "search")) == PUBLISHED[3]


def test_a_small_study_to_its_end(work, pictures):
    work.environment["PYTHON"] = sys.executable
    small = "--seeds 1 --jobs 2 --search_epochs 3 --epochs 1 --dataset folder --image_size 16 --batch_size 12"
    arguments = [*small.split(), "--workers", 0, "--data", pictures, "--out", work.folder / "out"]
    flags = {
        "SEARCH": "--init_channels 1 --layers 1 --epochs 1",
        "RETRAIN": "--init_channels 2 --layers 3 --train_portion 0.25",
    }
    result = work.run("study.sh", *arguments, METHODS="gdas", **flags)
    assert result.returncode == 0, result.stderr
    assert rows_of(result.stdout)["gdas"][0] == "1"
    assert {path.name for path in (work.folder / "out").iterdir()} >= {"study.png", "study.svg", "data"}


def test_a_portion_of_the_training_images_is_the_same_for_every_seed(pictures):
    parts = []
    for seed in (0, 0, 1):
        train, *_ = data.train_data("folder", pictures, seed=seed, batch_size=12, image_size=16, workers=0)
        parts.append(retrain.part_of(train, 0.25))
    assert [part.num_images for part in parts] == [18] * 3 and len(parts[0]) == 2
    assert torch.equal(parts[0].images.images, parts[2].images.images)
    order = [next(part.epoch(0))[1] for part in parts]
    assert torch.equal(order[0], order[1]) and not torch.equal(order[0], order[2])


def test_permutation_test_counts_splits_and_holm_corrects():
    low, high = [1.0, 2.0, 3.0], [11.0, 12.0, 13.0, 14.0]
    assert compare("", low, high).p == 1 / 35, "no other split of 7 is as extreme on either side"
    assert compare("", low, [value + 10 for value in low]).p == 2 / 20, "with equal sizes the mirrored split is"
    assert compare("", [88.3, 88.1, 88.2], [88.2, 88.3, 88.1]).p == 1, "decimals that tie"
    assert compare("", [1.0, 2.0, 4.0]).p == 2 / 8 and compare("", [-1.0, 1.0]).p == 1, "signs of differences"
    np.testing.assert_allclose(common.holm([0.04, 0.01, 0.03, 0.9]), [0.09, 0.04, 0.09, 0.9])
    assert common.holm([0.6, 0.7]) == [1.0, 1.0] and common.holm([]) == []


def made_up_study(folder: Path, means: dict[str, float], count: int = 4) -> Path:
    """Finished cells around these mean accuracies, 2 * count random ones; and one that is not finished."""
    for method, mean in means.items():
        for seed in range(1 if method[0].isupper() else 2 * count if method == "random" else count):
            made_up_cell(folder, method, seed, mean + 0.2 * (-1) ** seed)
    retrain_run(folder / "gdas-9/retrain", PUBLISHED[0])
    return folder


def made_up_cell(folder: Path, method: str, seed: int, accuracy: float, **other: object) -> None:
    run = retrain_run(folder / f"{method}-{seed}/retrain", PUBLISHED[seed % 4], best=accuracy, seed=seed)
    info = json.loads((run / "args.json").read_text())
    info["args"] |= {"init_channels": 4, "layers": 3, "epochs": 3, "train_portion": 0.25, "arch": method} | other
    (run / "args.json").write_text(json.dumps(info))
    (run / "finished").touch()
    if method in METHODS:
        place = folder / f"{method}-{seed}/search" / ("search-x" if method == "pdarts" else "")
        place.parent.mkdir(exist_ok=True)
        retrain_run(place, PUBLISHED[seed % 4])  # as far as minutes and memory go, a search is no other


def draw(*arguments: object) -> None:
    study.main(study.get_parser().parse_args(list(map(str, arguments))))


def test_a_known_difference_is_found_and_none_where_there_is_none(tmp_path, capsys):
    means = {"ddsas": 89.0, "ddsas-random": 88.0, "darts": 86.0, "pdarts": 88.0, "random": 88.0, "PDARTS": 90.0}
    draw(made_up_study(tmp_path / "study", means), "--out", tmp_path / "out")
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert [rows[method][0] for method in means] == ["4", "4", "4", "4", "8", "1"]
    assert rows["pdarts"][5:] == ["1.5", "0.88"] and rows["random"][5:] == ["–", "–"]
    skips = np.mean([genotypes.count_skips(found) for found in PUBLISHED])
    assert rows["darts"][1:4] == ["86.00 ± 0.12", "85.80 to 86.20", f"{skips:.1f}"]
    assert rows["darts – random"][1] == "-2.00" and rows["darts – random"][-1] == "differs"
    assert rows["pdarts – random"][1] == "+0.00" and rows["pdarts – random"][-1].startswith("not detected; differences")
    assert rows["ddsas – ddsas-random (primary)"][:2] == ["4 : 4", "+1.00"]
    assert rows["ddsas – ddsas-random (primary)"][3:5] == ["0.0286", "–"], "2 of the 70 splits of eight cells"
    assert "25 cells" in text and "1 more have begun" in text and "4 against 8 cells tell" in text


def test_study_figure_refuses_in_one_line(tmp_path):
    with pytest.raises(cli.UserError, match="nothing kept"):
        draw("--out", tmp_path)
    for folder in (tmp_path, tmp_path / "mistyped"):
        with pytest.raises(cli.UserError, match="no finished cell"):
            draw(folder)
    assert not list(tmp_path.iterdir())
    made_up_cell(tmp_path, "gdas", 0, 80.0)
    made_up_cell(tmp_path, "gdas", 1, 80.0, epochs=600)
    with pytest.raises(cli.UserError, match="another --epochs than gdas-0"):
        study.collect(tmp_path)


def test_the_pilot_tells_which_protocol_tells_cells_apart(tmp_path, capsys):
    for cell, seed in itertools.product(range(4), range(2)):
        for protocol, noise in (("now", 3.0), ("images", 0.1)):
            run = tmp_path / f"random-{cell}/{protocol}-{seed}"
            retrain_run(run, PUBLISHED[0], best=80 + cell + noise * (-1) ** (cell + seed))
            (run / "finished").touch()
    draw(tmp_path, "--pilot")
    rows = rows_of(capsys.readouterr().out)
    assert rows["images"][:2] == ["4", "2"] and float(rows["images"][2]) > 0.95 > 0.5 > float(rows["now"][2])
    assert float(rows["images"][4]) == pytest.approx(float(rows["images"][2]) / 1.5, abs=0.01)


def test_truth_correlates_ranks_and_holds_methods_against_random_search():
    trained = [truth.Trained(f"{k:06}", 90.0 - k, 2.0, part=k) for k in range(20)]
    trained.append(truth.Trained("333333", 89.5, 2.0))
    searches = [figure1.Search("ddsas", seed, 8.0, ["333333"]) for seed in range(2)]
    text = truth.report(trained, common.group(searches, "method"))
    assert "20 drawn cells, 1 found" in text and ": 1.00, 95 % interval 1.00 to 1.00" in text
    drawn = np.random.default_rng(0).choice(90.0 - np.arange(20), (100_000, figure1.TRAININGS)).max(1)
    regret, cells = rows_of(text)["ddsas"][2].split(" (")
    assert rows_of(text)["ddsas"][1] == "0.50 ± 0.00" and cells == f"{figure1.TRAININGS} cells)"
    assert float(regret) == pytest.approx(90 - drawn.mean(), abs=0.05)


def test_the_documents_hold_the_tables_that_are_printed(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/study.jsonl").write_bytes((ROOT / "figure/data/study.jsonl").read_bytes())
    draw("--out", tmp_path)
    told, text = (ROOT / "docs/study.md").read_text(), capsys.readouterr().out
    assert all(line in told for line in text.splitlines() if not line.startswith("figure:")), "bash experiments/make.sh"
    assert "5 against 10 cells tell 0.69 points apart" in text and "* ddsas-shrink: searched before a fault" in text
