"""Runs that are killed, stopped, starved or fed with damaged files go on exactly where they were, or say why not.

Scripts run in processes of their own, forked from one that has imported them already (Python's forkserver), so that
twenty kills do not cost twenty imports of torch. What they are given is their command line, what is looked at is their
exit code, their output and their run folder.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

import search
import utils

ROOT = Path(__file__).resolve().parent.parent
TINY = "--dataset folder --image_size 8 --layers 3 --init_channels 2 --device cpu --workers 1 --cutout --quiet"
COMMANDS = {  # all that draws random numbers or counts takes part
    "search.py": f"{TINY} --batch_size 9 --epochs 2 --checkpoint_freq 2 --dss_freq 2 --rdss_prob 0.3 --gumbel",
    "retrain.py": f"{TINY} --batch_size 18 --epochs 2 --checkpoint_freq 2 --arch DDSAS_cifar10 --drop_path_prob 0.3",
    "train_search.py": f"{TINY} --batch_size 12 --epochs 1 --checkpoint_freq 2 --eps_no_arch 0 --add_layers 0"
    " --add_layers 0 --dropout_rate 0.1 --dropout_rate 0.3 --dropout_rate 0.5 --note x",
}
EXACT = ("history.jsonl", "genotype.txt", "checkpoint.pt", "best.pt", "genotypes.txt")  # the same in identical runs


# --- scripts in processes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def server():
    """The context whose processes are forked from one that has imported the scripts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["search", "retrain", "train_search", "evaluate", "visualize", "torch.utils.tensorboard"]
    )
    first = context.Process(target=int)  # waits for the imports
    first.start()
    first.join()
    return context


class Scripts:
    """Starts scripts on the tiny images, in a folder of its own that holds the run folders."""

    def __init__(self, context: multiprocessing.context.BaseContext, images: Path, folder: Path) -> None:
        self.context, self.images, self.folder = context, images, folder

    def command(self, script: str, name: str) -> list[str]:
        """The arguments that begin a run in folder / name, or go on with it."""
        run = self.find(name)
        if run is not None and (run / "args.json").exists():
            return ["--resume", str(run)]
        prefix = f"{self.folder / name}-" if script == "train_search.py" else str(self.folder / name)
        return [*COMMANDS[script].split(), "--data", str(self.images), "--save", prefix]

    def find(self, name: str) -> Path | None:
        """The run folder called name (P-DARTS adds the note and the time), once it is there."""
        return next(iter([*self.folder.glob(name), *self.folder.glob(f"{name}-search-*")]), None)

    def start(self, script: str, argv: list[str], fault: Callable[[], None] | None = None) -> BaseProcess:
        """A process that runs `script argv`; its output goes to folder / "out", `fault` is called in it before."""
        process = self.context.Process(target=child, args=(script, argv, str(self.folder / "out"), fault))
        process.start()
        return process

    def run(self, script: str, argv: list[str], fault: Callable[[], None] | None = None) -> int:
        """The exit code of a process that is left alone; minus the signal that ended it."""
        process = self.start(script, argv, fault)
        process.join(120)
        assert process.exitcode is not None, "does not end"
        return process.exitcode

    @property
    def output(self) -> str:
        """What the last process printed; stderr in order with stdout."""
        return (self.folder / "out").read_text()


def child(script: str, argv: list[str], output: str, fault: Callable[[], None] | None) -> None:
    """What runs in the process: the script as from a shell, all output in a file."""
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a script of its own
    torch.set_num_threads(1)
    sys.argv = [script, *argv]
    module = importlib.import_module(Path(script).stem)
    if fault:
        fault()
    utils.cli(module.main, module.get_parser(), argv)


class Suicide:
    """A fault: SIGKILL just before or just after the n-th call that moves a file or makes it last, whatever the file.

    These are the moments between which the state of the disk differs; chance alone would seldom meet them.
    """

    def __init__(self, moment: int) -> None:
        self.moment = moment

    def __call__(self) -> None:
        for name in ("fsync", "link", "replace", "unlink"):
            setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, function: Callable) -> Callable:
        def call(*args, **kwargs):
            self.pass_by()
            try:
                return function(*args, **kwargs)
            finally:
                self.pass_by()

        return call

    def pass_by(self) -> None:
        self.moment -= 1
        if self.moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def scripts(server, pictures, tmp_path) -> Scripts:
    return Scripts(server, pictures, tmp_path)


@pytest.fixture(scope="session")
def whole(server, pictures, tmp_path_factory):
    """whole(script) -> (run folder, seconds) of an uninterrupted run, made when first asked for."""
    scripts, runs = Scripts(server, pictures, tmp_path_factory.mktemp("whole")), {}

    def get(script: str) -> tuple[Path, float]:
        if script not in runs:
            name, started = script.removesuffix(".py"), time.time()
            assert scripts.run(script, scripts.command(script, name)) == 0, scripts.output
            runs[script] = scripts.find(name), time.time() - started
        return runs[script]

    return get


def assert_same_runs(a: Path, b: Path) -> None:
    """All results of two runs are bit-identical: history, genotypes, everything in the checkpoints."""
    assert (a / "history.jsonl").exists() and (a / "checkpoint.pt").exists()
    for name in EXACT:
        assert (a / name).exists() == (b / name).exists(), name
        if (a / name).exists():
            if name.endswith(".pt"):
                assert_same(utils.read_weights(a / name), utils.read_weights(b / name), name)
            else:
                assert (a / name).read_text() == (b / name).read_text(), name


def assert_same(a: object, b: object, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8)), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where} {key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where} {index}")
    else:
        assert a == b, where


def wait_for(condition: Callable[[], object], process: BaseProcess) -> None:
    """Until the condition holds; fails if the process ends before."""
    while not condition():
        assert process.is_alive(), "ended too early"
        time.sleep(0.005)


# --- SIGKILL ----------------------------------------------------------------------------------------------------------


def kill_and_resume(scripts: Scripts, whole: tuple[Path, float], script: str, kills: int, seed: int) -> None:
    """Kill a script at random moments and resume it; as many runs as the kills suffice for are compared with `whole`.

    A kill comes in the midst of operations on files, half of which write a checkpoint, or at any moment.
    """
    draw, (uninterrupted, seconds) = random.Random(seed), whole
    for number in itertools.count():
        name, code = f"killed{number}", None
        while code != 0:
            argv, moment = scripts.command(script, name), draw.random()
            if kills and draw.random() < 0.5:
                code = scripts.run(script, argv, Suicide(1 + int(45 * moment)))
            elif kills:
                process = scripts.start(script, argv)
                process.join(0.7 * seconds * moment)
                process.kill()
                process.join()
                code = process.exitcode
            else:
                code = scripts.run(script, argv)
            assert code in (0, -signal.SIGKILL), scripts.output
            kills -= code != 0
            if (run := scripts.find(name)) and (run / "checkpoint.pt").exists():
                utils.read_weights(run / "checkpoint.pt")  # whole at every moment
        assert_same_runs(uninterrupted, scripts.find(name))
        assert not list(scripts.find(name).glob(".*"))  # no temporary file is left
        if not kills:
            return


@pytest.mark.parametrize("script, kills", [("search.py", 3), ("retrain.py", 2)])
def test_killed_run_is_the_uninterrupted_one(scripts, whole, script, kills):
    kill_and_resume(scripts, whole(script), script, kills, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("script, kills", [("search.py", 20), ("retrain.py", 10), ("train_search.py", 10)])
def test_run_killed_many_times_is_the_uninterrupted_one(scripts, whole, script, kills):
    kill_and_resume(scripts, whole(script), script, kills, seed=2)


@pytest.mark.long
def test_killed_search_reads_the_same_images_from_disk(server, pictures, tmp_path, monkeypatch):
    """ImageNet's way: workers decode, crop and flip; the checkpoints inside an epoch are as exact."""
    command = COMMANDS["search.py"].replace("folder", "imagenet").replace("image_size 8", "image_size 32")
    monkeypatch.setitem(COMMANDS, "search.py", command)
    images = tmp_path / "images"
    images.mkdir()
    (images / "train").symlink_to(pictures / "train")
    (images / "val").symlink_to(pictures / "test")
    scripts, started = Scripts(server, images, tmp_path), time.time()
    assert scripts.run("search.py", scripts.command("search.py", "whole")) == 0, scripts.output
    kill_and_resume(scripts, (tmp_path / "whole", time.time() - started), "search.py", kills=5, seed=4)


def test_killed_inside_a_later_stage(scripts, whole):
    process = scripts.start("train_search.py", scripts.command("train_search.py", "killed"))
    wait_for(lambda: history(scripts.find("killed")), process)  # the first stage has one epoch
    checkpoint, state = scripts.find("killed") / "checkpoint.pt", {}
    wait_for(lambda: state.update(utils.read_weights(checkpoint)) or state["epoch"] * state["step"] > 0, process)
    process.kill()
    process.join()
    assert state["epoch"] == 1 and {len(names) for names in state["candidates"]["normal"]} == {5}
    assert scripts.run("train_search.py", scripts.command("train_search.py", "killed")) == 0, scripts.output
    assert_same_runs(whole("train_search.py")[0], scripts.find("killed"))


def history(run: Path | None) -> list[dict]:
    """The lines of history.jsonl so far."""
    path = run / "history.jsonl" if run else None
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


# --- an interrupted search, and what can happen before it is resumed --------------------------------------------------


@pytest.fixture(scope="session")
def interrupted(server, pictures, tmp_path_factory) -> Path:
    """The run folder of a search that was killed in its second epoch."""
    scripts = Scripts(server, pictures, tmp_path_factory.mktemp("interrupted"))
    process = scripts.start("search.py", scripts.command("search.py", "run"))
    run = scripts.folder / "run"
    wait_for(lambda: len(history(run)) == 1 and utils.read_weights(run / "checkpoint.pt")["epoch"] == 1, process)
    process.kill()
    process.join()
    return run


@pytest.fixture
def run(interrupted, tmp_path) -> Path:
    """A copy of it, in which a test can do its damage."""
    return shutil.copytree(interrupted, tmp_path / "logs" / "killed")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("log.txt", "lock")}


def refused(scripts: Scripts, argv: list) -> str:
    """The one line with which a search is refused (exit code 2)."""
    assert scripts.run("search.py", [*map(str, argv)]) == 2, scripts.output
    assert scripts.output.count("\n") == 1, scripts.output
    return scripts.output


def test_resume_auto_takes_the_newest_run_of_this_experiment(scripts, run, whole):
    there = functools.partial(os.chdir, run.parent.parent)  # where logs/ is
    argv = scripts.command("search.py", "unused")[:-2]
    assert scripts.run("search.py", [*argv, "--resume", "auto"], there) == 0, scripts.output
    assert_same_runs(whole("search.py")[0], run)
    assert scripts.run("search.py", [*argv, "--resume", "auto", "--seed", "7"], there) == 2
    assert "no run of search.py with these arguments" in scripts.output


def test_resume_with_other_arguments_is_refused_by_name(scripts, run):
    before = contents(run)
    line = refused(scripts, ["--resume", run, "--batch_size", 6, "--seed", 5, "--gumbel", "--dss_freq", 2])
    assert "--batch_size (was 9, now 6)" in line and "--seed (was 0, now 5)" in line
    assert "--gumbel" not in line and "--dss_freq" not in line  # given, and the same
    line = refused(scripts, ["--resume", run, "--epochs", 5])
    assert "--epochs was 2, now 5" in line and "--learning_rate_min" in line
    assert contents(run) == before
    assert "is a run of search.py" in refused_by(scripts, "retrain.py", run)


def refused_by(scripts: Scripts, script: str, run: Path) -> str:
    assert scripts.run(script, ["--resume", str(run)]) == 2, scripts.output
    return scripts.output


def test_epochs_may_grow_where_no_schedule_depends_on_them(scripts):
    constant = "--batch_size 18 --learning_rate 0.01 --learning_rate_min 0.01"
    argv = [*f"{TINY} {constant} --data".split(), str(scripts.images)]
    for name, epochs in (("grown", "1"), ("whole", "2")):
        folder = str(scripts.folder / name)
        assert scripts.run("search.py", [*argv, "--epochs", epochs, "--save", folder]) == 0, scripts.output
    grown = scripts.folder / "grown"
    assert scripts.run("search.py", ["--resume", str(grown), "--epochs", "2"]) == 0, scripts.output
    assert_same_runs(scripts.folder / "whole", grown)
    assert "--epochs was 2, now 1" in refused(scripts, ["--resume", grown, "--epochs", 1])


@pytest.mark.parametrize(
    "change", ["--learning_rate_min 0.001", "--drop_path_prob 0.1", "--lr_scheduler linear", "--gumbel"]
)
def test_epochs_stay_where_a_schedule_depends_on_them(change):
    script = importlib.import_module("retrain" if "lr_scheduler" in change else "search")
    constant = "--learning_rate 0.01 --learning_rate_min 0.01 --drop_path_prob 0"
    args = script.get_parser().parse_args(constant.split())
    args.epochs = 7
    search.check_epochs(args, {"epochs": 6})
    args = script.get_parser().parse_args(f"{constant} {change}".split())
    search.check_epochs(args, {"epochs": args.epochs})
    with pytest.raises(utils.UserError, match="--epochs was 6"):
        search.check_epochs(args, {"epochs": 6})


def test_a_second_process_in_the_folder_is_refused(scripts, run):
    process = scripts.start("search.py", ["--resume", str(run)])
    wait_for(lambda: "resumed" in (run / "log.txt").read_text(), process)
    other = Scripts(scripts.context, scripts.images, scripts.folder / "other")
    other.folder.mkdir()
    line = refused(other, ["--resume", run])
    assert "in use by another process" in line and process.is_alive()
    process.kill()
    process.join()


def test_damaged_checkpoint_is_replaced_by_the_one_before(scripts, run, whole):
    damage(run / "checkpoint.pt")
    assert scripts.run("search.py", ["--resume", str(run)]) == 0, scripts.output
    assert "warning" in scripts.output and "checkpoint.prev.pt" in scripts.output
    assert_same_runs(whole("search.py")[0], run)


def test_without_a_good_checkpoint_resuming_is_refused(scripts, run):
    damage(run / "checkpoint.pt")
    damage(run / "checkpoint.prev.pt")
    before = contents(run)
    assert scripts.run("search.py", ["--resume", str(run)]) == 2
    assert "checkpoint.prev.pt: damaged" in scripts.output.splitlines()[-1] and "Traceback" not in scripts.output
    assert contents(run).keys() == before.keys() and contents(run)["checkpoint.pt"] == before["checkpoint.pt"]


def test_checkpoint_of_another_network_is_refused(scripts, run):
    state = utils.read_weights(run / "checkpoint.pt")
    state["state_dict"].pop("classifier.bias")
    utils.save_checkpoint(run / "checkpoint.pt", state)
    assert scripts.run("search.py", ["--resume", str(run)]) == 2
    assert "of another run" in scripts.output.splitlines()[-1] and "Traceback" not in scripts.output


def damage(path: Path) -> None:
    """Lose a block in the middle of a file."""
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(4096) + data[middle + 4096 :])


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, number, code",
    [
        ("search.py", signal.SIGTERM, 143),
        ("retrain.py", signal.SIGINT, 130),
        pytest.param("train_search.py", signal.SIGTERM, 143, marks=pytest.mark.long),
    ],
)
def test_signal_ends_a_run_with_the_command_that_goes_on(scripts, whole, script, number, code):
    process = scripts.start(script, scripts.command(script, "stopped run"))
    wait_for(lambda: (run := scripts.find("stopped run")) and (run / "checkpoint.pt").exists(), process)
    os.kill(process.pid, number)
    process.join(60)
    run, lines = scripts.find("stopped run"), scripts.output.splitlines()
    assert process.exitcode == code and lines[-1] == f"python {script} --resume {shlex.quote(str(run))}"
    assert "stopped by signal" in (run / "log.txt").read_text()
    if script == "search.py":  # once as a user would, by pasting the line
        command = [sys.executable, *shlex.split(lines[-1])[1:]]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    else:
        assert scripts.run(script, shlex.split(lines[-1])[2:]) == 0, scripts.output
    assert_same_runs(whole(script)[0], run)


# --- full disks -------------------------------------------------------------------------------------------------------


def test_full_disk_ends_a_run_with_its_last_checkpoint_whole(scripts, run, whole):
    """What is full is the space for the checkpoint, then that for TensorBoard's events as well."""
    events = sum(path.stat().st_size for path in run.glob("events*"))
    for size, name in ((2 * events, f"{run}/checkpoint.pt"), (events // 2, "a file")):
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        argv = ["--resume", str(run), "--checkpoint_freq", "2" if size > events else "0"]
        assert scripts.run("search.py", argv, limit) == 1, scripts.output
        *_, last = scripts.output.splitlines()
        assert f"disk full: {name} not written" in last and "Traceback" not in scripts.output
    utils.read_weights(run / "checkpoint.pt")
    assert not list(run.glob(".*"))
    assert scripts.run("search.py", ["--resume", str(run)]) == 0, scripts.output
    assert_same_runs(whole("search.py")[0], run)


# --- numbers going bad ------------------------------------------------------------------------------------------------


class Poison:
    """A fault: the n-th loss, or its gradient, is not a number."""

    def __init__(self, what: str, n: int) -> None:
        self.what, self.n = what, n

    def __call__(self) -> None:
        cross_entropy = torch.nn.functional.cross_entropy

        def poisoned(logits, *args, **kwargs):
            loss = cross_entropy(logits, *args, **kwargs)
            self.n -= 1
            if self.n:
                return loss
            return loss * float("nan") if self.what == "loss" else loss + (logits * 0).sum().abs().sqrt()

        torch.nn.functional.cross_entropy = poisoned


@pytest.mark.parametrize(
    "script, what",
    [
        ("search.py", "loss"),
        ("retrain.py", "gradient"),
        pytest.param("train_search.py", "gradient", marks=pytest.mark.long),
    ],
)
def test_bad_numbers_end_a_run_with_its_last_checkpoint_good(scripts, whole, script, what):
    fault = Poison(what, 3 if script == "retrain.py" else 6)  # in the third step; a step of a search has two losses
    assert scripts.run(script, scripts.command(script, "run"), fault) == 1, scripts.output
    *_, last = scripts.output.splitlines()
    assert "epoch 0, step 2: loss" in last and "gradient norm nan" in last and "architecture" in last
    assert ("loss nan" in last) == (what == "loss") and "Traceback" not in scripts.output
    run = scripts.find("run")
    assert utils.read_weights(run / "checkpoint.pt")["step"] == 2  # of the two steps before
    assert scripts.run(script, scripts.command(script, "run")) == 0, scripts.output
    assert_same_runs(whole(script)[0], run)


def test_no_checkpoint_has_a_number_that_is_not_finite(scripts):
    argv = [
        *TINY.split(),
        "--data",
        str(scripts.images),
        "--save",
        str(scripts.folder / "run"),
        "--checkpoint_freq",
        "1",
    ]
    assert scripts.run("search.py", [*argv, "--learning_rate", "1e30", "--grad_clip", "0", "--batch_size", "9"]) == 1
    assert scripts.output.splitlines()[-1].startswith("search.py: epoch 0, step ")
    for path in scripts.folder.glob("run/*.pt"):
        assert all(t.isfinite().all() for t in utils.read_weights(path)["state_dict"].values())


# --- damaged and hostile checkpoints ----------------------------------------------------------------------------------


RESULTS = ("top1", "loss", "images", "genotype")


@pytest.fixture
def evaluate(pictures, capsys):
    """evaluate(file) -> (exit code, results or None, lines of stderr) of `python evaluate.py` in this process."""
    module = importlib.import_module("evaluate")

    def run(file: Path, *more: object) -> tuple[int, dict | None, list[str]]:
        code = 0
        try:
            argv = ["--model_path", file, "--data", pictures, "--device", "cpu", "--workers", 1, "--json", *more]
            utils.cli(module.main, module.get_parser(), [*map(str, argv)])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        results = json.loads(out) if out else None
        results = {name: results[name] for name in RESULTS} if results else None
        return code, results, err.splitlines()

    return run


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A file with one to three accidents: cut off, bits turned, blocks lost, repeated, swapped or overwritten."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        if draw.random() < 0.5:  # where the directory of the zip is, and the pickle
            a, b = draw.choice([(0, a // 20), (len(data) - (len(data) - b) // 20, len(data))])
        b = max(b, a + 1)
        kind = draw.choice(["cut", "bit", "bit", "zeros", "noise", "lost", "twice", "append", "swap"])
        if kind == "cut":
            data = data[:a]
        elif kind == "bit" and data:
            at = min(draw.randrange(a, b), len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif kind == "zeros":
            data = data[:a] + bytes(len(data[a:b])) + data[b:]
        elif kind == "noise":
            data = data[:a] + draw.randbytes(len(data[a:b])) + data[b:]
        elif kind == "lost":
            data = data[:a] + data[b:]
        elif kind == "twice":
            data = data[:b] + data[a:]
        elif kind == "append":
            data = data + draw.randbytes(100)
        else:
            middle = (a + b) // 2
            data = data[:a] + data[middle:b] + data[a:middle] + data[b:]
    return data


@pytest.fixture(params=["in this process", pytest.param("in processes", marks=pytest.mark.long)])
def evaluate_somewhere(request, evaluate, scripts, pictures):
    """The fixture `evaluate`, and for the long tests the same with a process for each file."""
    if request.param == "in this process":
        return evaluate

    def run(file: Path) -> tuple[int, dict | None, list[str]]:
        argv = ["--model_path", str(file), "--data", str(pictures), "--device", "cpu", "--workers", "1", "--json"]
        code = scripts.run("evaluate.py", argv)
        results = {name: json.loads(scripts.output)[name] for name in RESULTS} if code == 0 else None
        return code, results, scripts.output.splitlines()

    return run


def test_mutated_checkpoint_is_refused_or_evaluates_as_before(whole, evaluate_somewhere, tmp_path):
    best = whole("retrain.py")[0] / "best.pt"
    code, expected, _ = evaluate_somewhere(best)
    assert code == 0
    file, draw, good, refusals = tmp_path / "best.pt", random.Random(7), best.read_bytes(), 0
    shutil.copy(whole("retrain.py")[0] / "checkpoint.pt", tmp_path / "best.prev.pt")  # other weights, never taken
    for _ in range(200):
        file.write_bytes(mutated(good, draw))
        code, results, lines = evaluate_somewhere(file)
        if code == 0:
            assert results == expected
        else:
            assert code == 2 and results is None and len(lines) == 1 and str(file) in lines[0]
            refusals += 1
    assert 150 < refusals < 200


def claims(name: str, *shape: int) -> Callable[[dict], None]:
    """A tensor without data in place of one, or in addition."""
    return lambda checkpoint: checkpoint["state_dict"].update({name: torch.empty(shape)})


def many_cells(checkpoint: dict) -> None:
    checkpoint["state_dict"] |= {f"cells.{n}.preprocess0.op.1.weight": torch.empty(0) for n in range(10_000)}


HOSTILE = {
    "cells": many_cells,
    "cell 9999": claims("cells.9999.preprocess0.op.1.weight", 0),
    "channels": claims("stem.0.weight", 2**60, 0),
    "channels everywhere": lambda c: [claims(name, 2**60, 0)(c) for name in list(c["state_dict"]) if "stem" in name],
    "classes": lambda c: [claims(f"classifier.{name}", 2**62, 0)(c) for name in ("bias", "weight")],
    "no channels": lambda c: [claims(name, 0)(c) for name in list(c["state_dict"]) if "stem" in name],
    "image size": lambda c: c.update(image_size=10**9),
    "image size of text": lambda c: c.update(image_size="8"),
    "image size below 0": lambda c: c.update(image_size=-8),
    "dataset": lambda c: c.update(dataset="imagenet"),
    "dataset of lists": lambda c: c.update(dataset=[["folder"]]),
    "genotype of code": lambda c: c.update(genotype="Genotype(normal=__import__('os').abort())"),
    "genotype in a file": lambda c: c.update(genotype="/etc/passwd"),
    "genotype by name": lambda c: c.update(genotype="PDARTS"),
    "genotype of lists": lambda c: c.update(genotype=[["PDARTS"]]),
    "other genotype": lambda c: c.update(genotype=str(importlib.import_module("genotypes").PDARTS)),
    "escape codes": claims("\x1b[31mred\n\x07", 1),
    "integers": lambda c: c["state_dict"].update({"classifier.bias": torch.zeros(3, dtype=torch.int64)}),
    "list of weights": lambda c: c.update(state_dict=list(c["state_dict"].values())),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoint_is_refused_before_memory_is_taken(whole, evaluate, tmp_path, name):
    checkpoint = utils.read_weights(whole("retrain.py")[0] / "best.pt")
    HOSTILE[name](checkpoint)
    torch.save(checkpoint, tmp_path / "best.pt")
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    code, results, errors = evaluate(tmp_path / "best.pt")
    assert code == 2 and results is None and len(errors) == 1, (results, errors)
    assert errors[0].isprintable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kB
    assert time.time() - started < 20
