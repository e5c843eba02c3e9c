"""Many searches from one command: run_once.sh, run_all.sh, compare_nasbench201.sh, and the table and figure of them.

The shell scripts mostly run with a stand-in for Python, which writes down what it is called with.
"""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import nasbench201
import search
from experiments import figure1
from lib import cli

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = """#!/bin/bash
# One line of $CALLS for a call; makes a checkpoint; then fails, waits for a signal, or is done, as the file $DO says.
printf '%q ' "$@" >>"$CALLS"; echo >>"$CALLS"
while [ $# -gt 1 ]; do if [ "$1" = --save ]; then mkdir -p "$2"; save=$2; touch "$2/checkpoint.pt"; fi; shift; done
case $(cat "$DO" 2>/dev/null) in
    fail) exit 3 ;;
    wait)
        trap 'echo TERM >>"$save/signals"; exit 143' TERM
        trap 'echo INT >>"$save/signals"; exit 130' INT
        touch "$save/ready"
        while :; do sleep 0.05; done ;;
    slow) sleep 0.5 ;;
esac
"""


class Workplace:
    """A folder with a stand-in for Python, and what was called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.do = folder, folder / "calls", folder / "do"
        python = folder / "python"
        python.write_text(STAND_IN)
        python.chmod(0o755)
        self.environment = {"PYTHON": str(python), "CALLS": str(self.calls), "DO": str(self.do)}
        self.environment |= {"PATH": os.environ["PATH"]}

    def start(self, script: str, *arguments: object, **options) -> subprocess.Popen:
        command = ["bash", f"shell/{script}", *map(str, arguments)]
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        environment = self.environment | options.pop("more", {})
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **pipes)

    def run(self, script: str, *arguments: object, text: str = "", **more: str) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, more=more)
        out, err = process.communicate(text, timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def called(self) -> list[list[str]]:
        return [shlex.split(line) for line in self.calls.read_text().splitlines()] if self.calls.exists() else []


@pytest.fixture
def work(tmp_path) -> Workplace:
    return Workplace(tmp_path)


def wait_for(condition, seconds: float = 30) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)


# ---- run_once.sh ----------------------------------------------------------------------------------------------------


def test_run_once_goes_on_and_never_repeats(work):
    folder, words = work.folder / "a run", ["search.py", "--note", "it's $HOME", "--epochs", "2"]
    work.do.write_text("fail")
    assert work.run("run_once.sh", folder, *words).returncode == 3
    assert not (folder / "finished").exists()
    work.do.write_text("")
    assert work.run("run_once.sh", folder, *words).returncode == 0
    assert work.run("run_once.sh", folder, *words).returncode == 0
    save = ["--save", str(folder)]
    assert work.called() == [[*words, *save], [*words, *save, "--resume", str(folder)]]
    assert (folder / "finished").exists()


def test_run_once_refuses_other_arguments_once_there_is_a_checkpoint(work):
    folder = work.folder / "run"
    assert work.run("run_once.sh", folder, "search.py", "--epochs", 2).returncode == 0
    other = work.run("run_once.sh", folder, "search.py", "--epochs", 3)
    assert other.returncode == 2 and "other arguments" in other.stderr and len(work.called()) == 1
    for name in ("checkpoint.pt", "finished"):
        (folder / name).unlink()
    assert work.run("run_once.sh", folder, "search.py", "--epochs", 3).returncode == 0, "a mistake can be mended"


def test_run_once_takes_nothing_for_finished_that_left_no_checkpoint(work):
    """As search.py --help, which ends with code 0."""
    Path(work.environment["PYTHON"]).write_text("#!/bin/bash\n")
    result = work.run("run_once.sh", work.folder / "run", "search.py", "--help")
    assert result.returncode == 1 and "left no checkpoint" in result.stderr
    assert not (work.folder / "run/finished").exists()


def test_run_once_finds_the_folder_that_pdarts_makes_inside(work):
    folder = work.folder / "run"
    (folder / "search-x-2026").mkdir(parents=True)
    (folder / "search-x-2026/checkpoint.pt").touch()
    assert work.run("run_once.sh", folder, "train_search.py").returncode == 0
    assert work.called() == [["train_search.py", "--save", f"{folder}/", "--resume", f"{folder}/search-x-2026"]]


def test_two_at_a_time_in_one_folder_run_it_once(work):
    work.do.write_text("slow")
    both = [work.start("run_once.sh", work.folder / "run", "search.py") for _ in range(2)]
    assert [process.wait(30) for process in both] == [0, 0] and len(work.called()) == 1


# ---- run_all.sh -----------------------------------------------------------------------------------------------------


def test_run_all_runs_so_many_at_a_time_and_names_failures_at_the_end(work):
    log = work.folder / "the log"
    step = f"echo + >>{shlex.quote(str(log))}; sleep 0.4; echo - >>{shlex.quote(str(log))}"
    result = work.run("run_all.sh", 2, text=f"{step}\n\nexit 7\n{step}\n{step}\n{step}")
    assert result.returncode == 1 and result.stdout.count("done: ") == 4
    assert result.stderr.splitlines()[-2:] == ["1 of 5 commands failed:", "exit code 7: exit 7"]
    running = list(itertools.accumulate(1 if sign == "+" else -1 for sign in log.read_text().split()))
    assert max(running) == 2 and running[-1] == 0 and len(running) == 8


@pytest.mark.parametrize(("sent", "to_all", "code"), [("TERM", False, 143), ("INT", True, 130)])
def test_a_signal_reaches_every_search_and_no_more_are_begun(work, sent, to_all, code):
    """SIGTERM to the one process that was started; Ctrl-C, which the terminal sends to all."""
    work.do.write_text("wait")
    lines = "".join(f"bash shell/run_once.sh {work.folder}/{i} search.py\n" for i in range(4))
    process = work.start("run_all.sh", 2)
    process.stdin.write(lines)
    process.stdin.close()
    wait_for(lambda: all((work.folder / str(i) / "ready").exists() for i in range(2)))
    (os.killpg if to_all else os.kill)(process.pid, signal.Signals[f"SIG{sent}"])
    assert process.wait(30) == code
    assert [(work.folder / str(i) / "signals").read_text() for i in range(2)] == [f"{sent}\n"] * 2
    assert len(work.called()) == 2 and not list(work.folder.glob("*/finished"))


# ---- compare_nasbench201.sh and search_nasbench201.sh ---------------------------------------------------------------


def test_list_prints_commands_that_search_py_takes(work):
    out = work.folder / "two words"
    result = work.run("compare_nasbench201.sh", "--seeds", "3-4", "--epochs=7", "--list", "--out", out, "--note", "a b")
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0 and not work.called() and not out.exists()
    assert [Path(line[3]).name for line in lines] == [
        f"{method}-{seed}" for seed in (3, 4) for method in ("ddsas", "ddsas-random", "darts", "gdas", "random")
    ]
    for line in lines:
        assert line[:3] == ["OMP_NUM_THREADS=1", "bash", "shell/run_once.sh"] and line[4] == "search.py"
        args = cli.parse(search.get_parser(), line[5:])
        search.check(args, torch.device("cpu"))
        assert (args.epochs, args.note, args.seed) == (7, "a b", int(line[3][-1])) and args.dataset == "fashion_mini"
        assert args.rdss_prob == ("ddsas-random" in line[3])


def test_a_line_of_the_list_runs_by_itself(work):
    arguments = ["--seeds", 1, "--out", work.folder / "two words", "--note", "a b"]
    line = work.run("compare_nasbench201.sh", *arguments, "--list", METHODS="gdas").stdout.strip()
    subprocess.run(["xargs", "-d", "\\n", "-n", "1", "bash", "-c"], input=line, text=True, check=True, cwd=ROOT,
                   env=work.environment, timeout=300)  # fmt: skip
    assert work.called()[0][-2:] == ["--save", str(work.folder / "two words/gdas-0")]
    assert work.run("compare_nasbench201.sh", *arguments, METHODS="gdas").returncode == 0
    assert len(work.called()) == 2 and work.called()[1][:2] == ["-m", "experiments.figure1"]


def test_compare_runs_what_is_not_finished_and_draws_what_is(work):
    arguments = ["--seeds", 1, "--epochs", 2, "--jobs", 2, "--out", work.folder / "out"]
    work.do.write_text("fail")
    assert work.run("compare_nasbench201.sh", *arguments).returncode == 1
    assert [call[0] for call in work.called()] == ["search.py"] * 5, "nothing finished, nothing to draw"
    work.do.write_text("")
    assert work.run("compare_nasbench201.sh", *arguments).returncode == 0
    names = ["ddsas-0", "ddsas-random-0", "darts-0", "gdas-0", "random-0"]
    folders = [str(work.folder / "out" / name) for name in names]
    drawn = ["-m", "experiments.figure1", *folders, "--out", str(work.folder / "out")]
    assert len(work.called()) == 11 and work.called()[-1] == drawn
    assert work.run("compare_nasbench201.sh", *arguments).returncode == 0
    assert len(work.called()) == 12 and work.called()[-1] == drawn


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--seeds", "x"], "--seeds x"),
        (["--epochs"], "needs a value"),
        (["--jobs", "0"], "--jobs 0"),
        (["--seed", "3"], "--seed is chosen here"),
        (["--seeds=3-2"], "--seeds 3-2: expected the smaller first"),
        (["--epochs=x"], "--epochs x"),
        (["--seeds", "00-01"], "--seeds 00-01"),
        (["--out="], "--out is empty"),
        (["--meth", "darts"], "--meth is chosen here"),  # an abbreviation for argparse
        (["--list=yes"], "--list=yes is chosen here"),
    ],
)
def test_compare_refuses_in_one_line(work, arguments, word):
    result = work.run("compare_nasbench201.sh", *arguments)
    assert result.returncode == 2 and word in result.stderr and len(result.stderr.splitlines()) == 1
    assert not work.called()


@pytest.mark.parametrize("script", ["compare_nasbench201.sh", "study.sh", "demo.sh", "demo_pdarts.sh"])
def test_help_explains_and_runs_nothing(work, script):
    result = work.run(script, "--help")
    comment = (ROOT / "shell" / script).read_text().splitlines()[1].removeprefix("# ")
    assert result.returncode == 0 and result.stdout.startswith(comment) and "set -" not in result.stdout
    assert not work.called() and not result.stderr


@pytest.mark.parametrize("method", ["ddsas", "darts", "gdas", "random"])
def test_search_nasbench201_takes_a_method(work, method):
    assert work.run("search_nasbench201.sh", "--seed", 5, METHOD=method).returncode == 0
    (call,) = work.called()
    args = cli.parse(search.get_parser(), call[1:])
    search.check(args, torch.device("cpu"))
    assert (args.method, args.seed, args.dataset, args.init_channels, args.layers) == (method, 5, "cifar10", 16, 5)


# ---- real searches --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """A table of all architectures, with made-up accuracies."""
    path = tmp_path_factory.mktemp("table") / "table.csv"
    rng = np.random.default_rng(0)
    every = itertools.product(nasbench201.PRIMITIVES, repeat=6)
    lines = [f"{nasbench201.Architecture(ops)},{rng.uniform(50, 94):.2f}" for ops in every]
    path.write_text("\n".join(lines) + "\n")
    return path


def real(work: Workplace, pictures: Path, table: Path, out: str, seeds: int, epochs: int) -> list[object]:
    """The arguments of a small comparison, and the real Python."""
    work.environment["PYTHON"] = sys.executable
    small = "--jobs 2 --dataset folder --image_size 16 --init_channels 2 --batch_size 12 --workers 0"
    more = ["--seeds", seeds, "--epochs", epochs, "--out", work.folder / out, "--data", pictures, "--table", table]
    return [*small.split(), *more]


def table_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_a_comparison_prints_its_table_and_draws_its_figure(work, pictures, table):
    arguments = real(work, pictures, table, "out", seeds=1, epochs=2)
    result = work.run("compare_nasbench201.sh", *arguments, METHODS="darts random")
    assert result.returncode == 0, result.stderr
    assert [line.split()[1] for line in table_of(result.stdout)[2:]] == ["darts", "random", "every", "those"]
    assert {path.name for path in (work.folder / "out").iterdir()} >= {"figure1.png", "figure1.svg", "data"}


@pytest.mark.long
def test_killed_and_started_again_it_ends_with_the_same_table(work, pictures, table):
    whole = work.run("compare_nasbench201.sh", *real(work, pictures, table, "whole", seeds=1, epochs=3))
    arguments = real(work, pictures, table, "cut", seeds=1, epochs=3)
    process = work.start("compare_nasbench201.sh", *arguments)
    wait_for(lambda: list((work.folder / "cut").glob("ddsas*/checkpoint.pt")), 120)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    again = work.run("compare_nasbench201.sh", *arguments)
    assert again.returncode == 0 and "resumed" in again.stdout
    assert table_of(again.stdout) == table_of(whole.stdout) and len(table_of(whole.stdout)) == 9


# ---- figure1 --------------------------------------------------------------------------------------------------------

CONVS, SKIPS = (nasbench201.Architecture((op,) * 6) for op in ("nor_conv_3x3", "skip_connect"))
MIXED = nasbench201.Architecture(("nor_conv_3x3",) * 4 + ("skip_connect",) * 2)


def make_run(
    folder: Path, method: str, seed: int, found: list, accuracies: list | None = None, rdss: float = 0
) -> Path:
    folder.mkdir(parents=True)
    args = {"method": method, "rdss_prob": rdss, "seed": seed, "table": None}
    (folder / "args.json").write_text(json.dumps({"args": args}))
    lines = [{"epoch": epoch, "genotype": str(genotype)} for epoch, genotype in enumerate(found)]
    for line, accuracy in zip(lines, accuracies or [], strict=False):
        line |= {"table_acc": accuracy, "table_rank": int(1000 - accuracy)}
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "timing.jsonl").write_text('{"seconds": 30.0}\n' * len(found))
    return folder


@pytest.fixture
def no_table(monkeypatch):
    monkeypatch.setattr(nasbench201, "load_table", lambda path=None: None)


def draw(*arguments: object) -> None:
    figure1.main(figure1.get_parser().parse_args([str(argument) for argument in arguments]))


def make_runs(folder: Path, looked_up: bool) -> Path:
    known = [90.0, 70.0, 60.0] if looked_up else None
    for seed in range(2):
        make_run(folder / f"a{seed}", "ddsas", seed, [CONVS, MIXED, MIXED], known)
        make_run(folder / f"b{seed}", "ddsas", seed, [CONVS, SKIPS, MIXED], known, rdss=1)
        make_run(folder / f"c{seed}", "random", seed, [CONVS], [80.0 + 4 * seed] if looked_up else None)
    return folder


def test_distance_is_the_share_of_edges_that_changed():
    search = figure1.Search("darts", 0, 1.0, [str(CONVS), str(MIXED), str(SKIPS), str(SKIPS)], None, None)
    np.testing.assert_allclose(search.distances(), [2 / 6, 4 / 6, 0])


def test_figure1_with_accuracies_has_both_panels_and_keeps_what_it_draws(tmp_path, no_table, capsys):
    make_runs(tmp_path / "runs", looked_up=True)
    draw(tmp_path / "runs", "--out", tmp_path / "out")
    first = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table_of(first)]
    assert rows[2] == ["ddsas", "2", "3", "60.00 ± 0.00", "60.00", "60.00", "940", "–", "0.167"]
    assert rows[3] == ["ddsas-random", "2", "3", "60.00 ± 0.00", "60.00", "60.00", "940", "–", "0.833"]
    assert rows[4] == ["random", "2", "–", "82.00 ± 2.83", "84.00", "80.00", "918", "–", "–"]
    assert "ddsas 1.5, ddsas-random 1.5" in first
    figure = figure1.draw(*figure1.kept(tmp_path / "out/data"))
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines] == [[2, 3]] * 2
    assert figure.axes[1].lines[0].get_ydata().tolist() == [90, 70, 60] and len(figure.axes) == 2
    assert set(figure.axes[1].lines[2].get_ydata()) == {82.0}, "random search"
    picture = (tmp_path / "out/figure1.svg").read_bytes()
    draw("--out", tmp_path / "out")
    assert (tmp_path / "out/figure1.svg").read_bytes() == picture and capsys.readouterr().out == first


def test_figure1_without_a_table_shows_distances_and_says_how_to_get_one(tmp_path, no_table, capsys):
    make_runs(tmp_path / "runs", looked_up=False)
    draw(tmp_path / "runs", "--out", tmp_path / "out")
    assert nasbench201.NO_TABLE in capsys.readouterr().out and (tmp_path / "out/figure1.png").is_file()
    assert len(figure1.draw(*figure1.kept(tmp_path / "out/data")).axes) == 1


def test_figure1_looks_up_what_the_searches_did_not(tmp_path, monkeypatch, table):
    accuracies = nasbench201.load_table(table)
    monkeypatch.setattr(nasbench201, "load_table", lambda path=None: accuracies)
    make_runs(tmp_path / "runs", looked_up=False)
    found, (space, without_none) = figure1.collect([tmp_path / "runs"])
    assert found["ddsas"][0].table_acc == [accuracies.accuracy(one) for one in (CONVS, MIXED, MIXED)]
    assert space.count == 15625 and without_none.count == 4096
    table_rows = [line.split("|") for line in table_of(figure1.markdown(found, [space, without_none]))]
    chances = {row[1].strip(): row[-3].strip() for row in table_rows}
    for name, own, other in (("ddsas", without_none, space), ("random", space, without_none)):
        last = [one.table_acc[-1] for one in found[name]]
        assert chances[name] == f"{100 * own.chance(last):.1f}" != f"{100 * other.chance(last):.1f}"
    lines = figure1.draw(found, [space, without_none]).axes[1].lines
    assert [set(line.get_ydata()) for line in lines[2:]] == [{without_none.mean}, {space.mean}]


def test_spaces_that_random_cells_are_drawn_from(table):
    """Against counting by hand: all cells, and those without none, among which DDSAS chooses."""
    accuracies = nasbench201.load_table(table)
    for space, primitives in zip(figure1.spaces_of(accuracies), (5, 4), strict=True):
        cells = map(nasbench201.Architecture, itertools.product(nasbench201.PRIMITIVES[-primitives:], repeat=6))
        values = np.array([accuracies.accuracy(cell) for cell in cells])
        assert space.count == len(values) == primitives**6
        assert (space.mean, space.std) == pytest.approx((values.mean(), values.std()), abs=1e-4)
        for percent in (0, 50, 95, 100):
            assert space.quantile(percent) == pytest.approx(np.percentile(values, percent), abs=0.005)
        drawn = np.random.default_rng(0).choice(values, (100_000, figure1.DRAWS))
        assert space.best_drawn == pytest.approx(drawn.max(1).mean(), abs=0.01 * values.std())
        bound = values.mean() + 0.7 * values.std()
        assert space.chance([bound] * 4) == pytest.approx((drawn.mean(1) >= bound).mean(), abs=0.01)
    assert nasbench201.PRIMITIVES[0] == "none"


def test_figure1_is_written_where_the_runs_are_and_never_over_the_repository_s(tmp_path, no_table):
    runs = make_runs(tmp_path / "runs", looked_up=True)
    before = [(path, path.stat().st_mtime_ns) for path in figure1.FOLDER.rglob("*")]
    draw(runs)
    assert {path.name for path in (runs / "data").iterdir()} == {"figure1.jsonl", "space.jsonl"}
    assert (runs / "figure1.png").is_file()
    with pytest.raises(cli.UserError, match="--out FOLDER is missing"):
        draw(runs / "a0", runs / "b0")
    assert [(path, path.stat().st_mtime_ns) for path in figure1.FOLDER.rglob("*")] == before


def test_figure1_refuses_in_one_line(tmp_path, no_table):
    with pytest.raises(cli.UserError, match="nothing kept"):
        draw("--out", tmp_path)
    with pytest.raises(cli.UserError, match="no run folder"):
        draw(tmp_path, "--out", tmp_path)
    runs = [make_run(tmp_path / name, "darts", 0, [CONVS, SKIPS]) for name in ("x", "y")]
    with pytest.raises(cli.UserError, match="second run of darts with seed 0"):
        draw(*runs, "--out", tmp_path)
    begun = make_run(tmp_path / "z", "darts", 1, [])
    with pytest.raises(cli.UserError, match="no run folder with a finished epoch"):
        draw(begun)
    make_run(tmp_path / "others/a", "darts", 1, [CONVS])
    (tmp_path / "others/a/args.json").write_text('{"args": {"seed": 0}}')  # as of retrain.py
    with pytest.raises(cli.UserError, match="not a search in NAS-Bench-201's space"):
        draw(tmp_path / "others")
    (tmp_path / "x/history.jsonl").write_text('{"epoch": 0, "genotype": "Genotype(normal=[])"}\n')
    with pytest.raises(cli.UserError, match="not a search in NAS-Bench-201's space"):
        draw(runs[0], "--out", tmp_path)
