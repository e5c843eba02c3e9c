"""Many searches from one command: shell/lib/, compare_nasbench201.sh, truth.sh, their tables and figure.

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

import search
from experiments import common, figure1
from lib import cli, tables

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


# ---- run_once.sh and run_all.sh -------------------------------------------------------------------------------------
def test_run_once_goes_on_and_never_repeats(work):
    folder, words = work.folder / "a run", ["search.py", "--note", "it's $HOME", "--epochs", "2"]
    work.do.write_text("fail")
    assert work.run("lib/run_once.sh", folder, *words).returncode == 3
    assert not (folder / "finished").exists()
    work.do.write_text("")
    assert work.run("lib/run_once.sh", folder, *words).returncode == 0
    assert work.run("lib/run_once.sh", folder, *words).returncode == 0
    save = ["--save", str(folder)]
    assert work.called() == [[*words, *save], [*words, *save, "--resume", str(folder)]]
    other = work.run("lib/run_once.sh", folder, *words[:-1], "3")
    assert other.returncode == 2 and "other arguments" in other.stderr and len(work.called()) == 2


def test_run_all_runs_so_many_at_a_time_and_names_failures_at_the_end(work):
    log = work.folder / "the log"
    step = f"echo + >>{shlex.quote(str(log))}; sleep 0.4; echo - >>{shlex.quote(str(log))}"
    result = work.run("lib/run_all.sh", 2, text=f"{step}\n\nexit 7\n{step}\n{step}\n{step}")
    assert result.returncode == 1 and result.stdout.count("done: ") == 4
    assert result.stderr.splitlines()[-2:] == ["1 of 5 commands failed:", "exit code 7: exit 7"]
    running = list(itertools.accumulate(1 if sign == "+" else -1 for sign in log.read_text().split()))
    assert max(running) == 2 and running[-1] == 0 and len(running) == 8


@pytest.mark.parametrize(("sent", "to_all", "code"), [("TERM", False, 143), ("INT", True, 130)])
def test_a_signal_reaches_every_search_and_no_more_are_begun(work, sent, to_all, code):
    """SIGTERM to the one process that was started; Ctrl-C, which the terminal sends to all."""
    work.do.write_text("wait")
    process = work.start("lib/run_all.sh", 2)
    process.stdin.write("".join(f"bash shell/lib/run_once.sh {work.folder}/{i} search.py\n" for i in range(4)))
    process.stdin.close()
    end = time.time() + 30
    while not all((work.folder / str(i) / "ready").exists() for i in range(2)):
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)
    (os.killpg if to_all else os.kill)(process.pid, signal.Signals[f"SIG{sent}"])
    assert process.wait(30) == code
    assert [(work.folder / str(i) / "signals").read_text() for i in range(2)] == [f"{sent}\n"] * 2
    assert len(work.called()) == 2 and not list(work.folder.glob("*/finished"))


# ---- compare_nasbench201.sh, search_nasbench201.sh and truth.sh -----------------------------------------------------
def test_list_prints_commands_that_search_py_takes(work):
    out = work.folder / "two words"
    asked = ["ddsas=3-4", "ddsas-random=1", "ddsas-c0=1", "ddsas-L6=1", "ddsas-M30=1", "darts=1", "gdas-240=1"]
    result = work.run("compare_nasbench201.sh", *asked, "--epochs=7", "--list", "--out", out, "--note", "a b")
    lines = {Path(words[3]).name: words for words in map(shlex.split, result.stdout.splitlines())}
    assert result.returncode == 0 and not work.called() and not out.exists()
    assert list(lines) == ["ddsas-3", "ddsas-4", *(f"{word.removesuffix('=1')}-0" for word in asked[1:])]
    found = {}
    for name, words in lines.items():
        assert words[:3] == ["OMP_NUM_THREADS=1", "bash", "shell/lib/run_once.sh"] and words[4] == "search.py"
        args = found[name] = cli.parse(search.get_parser(), words[5:])
        search.check(args)
        assert (args.note, args.seed, args.dataset) == ("a b", int(name[-1]), "fashion_mini")
        assert args.epochs == (240 if "240" in name else 7) and args.rdss_prob == ("random" in name)
    assert found["ddsas-c0-0"].confidence == 0 and found["ddsas-3"].confidence == 1.44
    assert (found["ddsas-L6-0"].dss_max_ops, found["ddsas-M30-0"].dss_freq) == (6, 30)
    planned = work.run("compare_nasbench201.sh", "--list").stdout.splitlines()
    assert len(planned) == 118 and {Path(shlex.split(line)[3]).name[:-2] for line in planned} >= {"rws", "darts"}


def test_compare_runs_what_is_not_finished_and_draws_what_is(work):
    arguments = ["darts=1", "gdas=1", "--epochs", 2, "--jobs", 2, "--out", work.folder / "out", "--table", "t.csv"]
    work.do.write_text("fail")
    assert work.run("compare_nasbench201.sh", *arguments).returncode == 1
    assert [call[0] for call in work.called()] == ["search.py"] * 2, "nothing finished, nothing to draw"
    work.do.write_text("")
    assert work.run("compare_nasbench201.sh", *arguments).returncode == 0
    folders = [str(work.folder / "out" / name) for name in ("darts-0", "gdas-0")]
    drawn = ["-m", "experiments.figure1", *folders, "--table", "t.csv", "--out", str(work.folder / "out")]
    assert len(work.called()) == 5 and work.called()[-1] == drawn
    assert work.run("compare_nasbench201.sh", *arguments).returncode == 0
    assert len(work.called()) == 6 and work.called()[-1] == drawn


def test_a_wrong_command_is_refused_in_one_line(work):
    for command, word in {
        "compare_nasbench201.sh dart=3": "dart is no method",
        "compare_nasbench201.sh --jobs 0": "--jobs 0",
        "compare_nasbench201.sh --meth darts": "--meth is chosen here",  # an abbreviation for argparse
        "study.sh --search_epochs 7": "--search_epochs 7",
        "study.sh --arch PDARTS": "--arch is chosen here",
    }.items():
        result = work.run(*command.split())
        assert result.returncode == 2 and word in result.stderr and len(result.stderr.splitlines()) == 1, command
    assert not work.called()


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """A table of all architectures, with made-up accuracies that rise with the 3x3 convolutions."""
    path, rng = tmp_path_factory.mktemp("table") / "table.csv", np.random.default_rng(0)
    lines = ["architecture,cifar10"]
    for ops in itertools.product(tables.CELL_OPERATIONS, repeat=6):
        lines.append(f"{tables.CELL.format(*ops)},{60 + 5 * ops.count('nor_conv_3x3') + rng.uniform(0, 4):.2f}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_truth_lists_trainings_of_cells_from_all_parts_of_the_table(work, table):
    result = work.run("truth.sh", "--table", table, "--parts", 3, "--list", PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    names = [Path(shlex.split(line)[3]).name for line in result.stdout.splitlines()]
    assert names[:3] == ["part-0", "part-1", "part-2"] and all(name.startswith("found-") for name in names[3:])


# ---- figure1 --------------------------------------------------------------------------------------------------------
CONVS, SKIPS, MIXED = "333333", "111111", "333311"


def text_of(cell: str) -> str:
    return tables.CELL.format(*(tables.CELL_OPERATIONS[int(op)] for op in cell))


def make_run(folder: Path, method: str, seed: int, cells: list[str], **more: object) -> Path:
    folder.mkdir(parents=True)
    args = {"method": method, "seed": seed, "space_config": "nasbench201"}
    (folder / "args.json").write_text(json.dumps({"args": args, "commit": "abc", "processor": "a CPU"}))
    lines = [{"epoch": epoch, "genotype": text_of(cell)} | more for epoch, cell in enumerate(cells)]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "genotype.txt").write_text(text_of(CONVS) + "\n")
    (folder / "timing.jsonl").write_text('{"seconds": 30.0, "cpu_seconds": 24.0}\n' * len(cells))
    return folder


def draw(*arguments: object) -> None:
    figure1.main(figure1.get_parser().parse_args(list(map(str, arguments))))


def rows_of(text: str) -> dict[str, list[str]]:
    """The rows of the tables in Markdown, by what they begin with."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_cells_of_one_function():
    for first, second, same in (
        ("010103", "110013", True),  # x + conv(x), on two ways
        ("012003", "010003", True),  # a convolution of nothing is nothing
        ("300020", "030002", True),  # the node on the way is another
        ("301011", "300310", False),  # twice the output of one convolution, and that of two
        ("301011", "300010", False),  # and once
    ):
        assert (figure1.function_of(first) == figure1.function_of(second)) == same, first


def test_figure1_keeps_what_it_draws_and_draws_it_again_without_a_table(tmp_path, table, capsys, monkeypatch):
    monkeypatch.setattr(figure1, "function_of", lambda cell: cell.count("3"))  # which has its own test, and takes long
    for seed in range(2):
        make_run(tmp_path / f"runs/ddsas-{seed}", "ddsas", seed, [SKIPS, MIXED, CONVS if seed else MIXED])
        make_run(tmp_path / f"runs/ddsas-random-{seed}", "ddsas", seed, [CONVS, SKIPS, MIXED])
    draw(tmp_path / "runs", "--out", tmp_path / "out", "--table", table)
    first, picture = capsys.readouterr().out, (tmp_path / "out/figure1.svg").read_bytes()
    rows, accuracies = rows_of(first), tables.load_table(table).accuracies
    expected = np.mean([accuracies[text_of(cell)]["cifar10"] for cell in (MIXED, CONVS)])
    assert rows["ddsas"][2].split(" ± ")[0] == f"{expected:.2f}"
    assert rows["ddsas"][:2] == ["2", "2"] and rows["ddsas-random"][1] == "1" and rows["ddsas"][-1] == "1.2"
    assert rows["nor_conv_3x3 on every edge"][2] == f"{accuracies[text_of(CONVS)]['cifar10']:.2f}"
    assert "ddsas – ddsas-random (primary)" in rows and "commits: abc" in first and "table.csv" in first
    draw("--out", tmp_path / "out")
    assert (tmp_path / "out/figure1.svg").read_bytes() == picture and capsys.readouterr().out == first
    (values,) = common.read_lines(tmp_path / "out/data/nasbench201.jsonl", figure1.Values)
    assert set(values.cells) == {CONVS, SKIPS, MIXED}, "of the table nothing but what was found"
    same = [row["cifar10"] for text, row in accuracies.items() if text.count("v_3x3") == 4 and "none" not in text]
    assert values.same_convolutions([MIXED])[0, 0] == pytest.approx(np.mean(same), abs=1e-3)
    drawn = np.random.default_rng(0).choice([row["cifar10"] for row in accuracies.values()], (20_000, 8)).max(1)
    assert values.spaces["all"]["best_of"][7] == pytest.approx(drawn.mean(), abs=0.1)


def test_figure1_reads_out_otherwise_and_keeps_probabilities_short(tmp_path):
    probabilities = np.full((6, 5), 0.1)
    probabilities[:, 0], probabilities[:, 4] = 0.5, 0.2
    line = {"probabilities": {"cell": probabilities.tolist()}}
    found = figure1.read_run(make_run(tmp_path / "d", "darts", 0, ["000000"], **line))
    assert (found.other, found.cells) == ("444444", ["000000"])
    assert found.probabilities == ["50001000100010002000" * 6]
    found = figure1.read_run(make_run(tmp_path / "e", "ddsas", 0, [CONVS], saliency=line["probabilities"]))
    assert found.other == "000000"


def test_figure1_refuses_in_one_line(tmp_path):
    with pytest.raises(cli.UserError, match="nothing kept"):
        draw("--out", tmp_path)
    with pytest.raises(cli.UserError, match="no run folder"):
        draw(tmp_path, "--out", tmp_path)
    run = make_run(tmp_path / "x", "darts", 0, [CONVS, SKIPS])
    with pytest.raises(cli.UserError, match="no run folder with a finished epoch"):
        draw(make_run(tmp_path / "z", "darts", 1, []))
    (tmp_path / "x/args.json").write_text('{"args": {"seed": 0}}')  # as of retrain.py
    with pytest.raises(cli.UserError, match="not a search in NAS-Bench-201's space"):
        draw(run, "--out", tmp_path)


# ---- the numbers of the main table, once more -----------------------------------------------------------------------
def test_the_main_table_by_a_few_lines_of_numpy(capsys, tmp_path):
    """Means, deviations, intervals and p of the repository's table, from figure/data alone."""
    data = ROOT / "figure/data"
    known = json.loads((data / "nasbench201.jsonl").read_text())
    values, space = known["cells"], known["spaces"]["without none"]
    found, others, first, as_many = {}, {}, [], []
    for line in map(json.loads, (data / "figure1.jsonl").read_text().splitlines()):
        method, cells = line["method"], line["cells"]
        found.setdefault(method, []).append(values[cells[-1]][0])
        if "other" in line:
            others.setdefault(method, []).append(values[line["other"]][0])
        if method == "ddsas":
            first.append(values[cells[0]][0])
            as_many.append(space["by_3x3"][cells[-1].count("3")][0])
    references = {"itself after one epoch": np.array(first), "nor_conv_3x3 on every edge": values["333333"][0]}
    references |= {"as many 3x3 at random": np.array(as_many), "random without `none`": space["mean"][0]}
    references["the best of 12 of these"] = space["best_of"][11]
    (tmp_path / "data").mkdir()
    for name in ("figure1", "nasbench201"):
        (tmp_path / f"data/{name}.jsonl").write_bytes((data / f"{name}.jsonl").read_bytes())
    draw("--out", tmp_path)
    text, ps = capsys.readouterr().out, {}
    rows, told = rows_of(text), (ROOT / "docs/nasbench201.md").read_text()
    assert all(line in told for line in text.splitlines() if line[:1] == "|"), "bash experiments/make.sh"
    for method, accuracies in found.items():
        assert rows[method][2] == f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}"
    a, rng, draws = np.array(found["ddsas"]), np.random.default_rng(1), 40_000
    rivals = {f"ddsas – {name}": np.array(b) for name, b in found.items()}
    rivals |= {f"ddsas – {name} without `none`": np.array(b) for name, b in others.items() if name != "ddsas"}
    samples = {name: (a, b) for name, b in rivals.items() if name in rows or f"{name} (primary)" in rows}
    samples |= {f"ddsas – {name}": (a - b,) for name, b in references.items()}
    for name, (x, *y) in samples.items():
        row, both = rows.get(name) or rows[f"{name} (primary)"], np.concatenate([x, *y])
        means = [rng.choice(z, (draws, len(z))).mean(1) for z in (x, *y)]
        resampled, difference = means[0] - sum(means[1:]), x.mean() - sum(z.mean() for z in y)
        if y:
            sums = both[np.argsort(rng.random((draws, len(both))), 1)[:, : len(x)]].sum(1)
            drawn = sums / len(x) - (both.sum() - sums) / len(y[0])
        else:
            drawn = (x * rng.choice([-1, 1], (draws, len(x)))).mean(1)
        assert row[1] == f"{difference:+.2f}"
        interval = [float(number) for number in row[2].split(" to ")]
        np.testing.assert_allclose(interval, np.percentile(resampled, [2.5, 97.5]), atol=0.15 * resampled.std() + 0.01)
        ps[name] = np.mean(np.abs(drawn) >= abs(difference) - 1e-9)
        assert float(row[3].strip("<~")) == pytest.approx(ps[name], abs=4 * (ps[name] / draws) ** 0.5 + 1e-3)
    assert len(samples) == sum(name.startswith("ddsas – ") for name in rows)
    secondary = {name: float(rows[name][3].strip("~").replace("<0.0001", "0")) for name in samples if name in rows}
    corrected = 0
    for rank, (name, p) in enumerate(sorted(secondary.items(), key=lambda item: item[1])):
        corrected = max(corrected, p * (len(secondary) - rank))
        assert float(rows[name][4].strip("<")) == pytest.approx(corrected, abs=6e-4)
