"""Whole scripts that are killed, stopped, out of disk space or diverging go on exactly where they were, when resumed.

Scripts run in processes of their own, forked from one that has imported them already (Python's forkserver), so that
twenty kills do not cost twenty imports of torch. What they are given is their command line, what is looked at is their
exit code, their output and their run folder.
"""

import importlib
import itertools
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from conftest import history, same

from lib import checkpoints, cli, runs

ROOT = Path(__file__).resolve().parent.parent
TINY = "--dataset folder --image_size 8 --init_channels 2 --device cpu --workers 1 --cutout --quiet --layers"
COMMANDS = {  # all that draws random numbers or counts takes part
    "search.py": f"{TINY} 1 --batch_size 9 --epochs 2 --checkpoint_freq 2 --dss_freq 2 --rdss_prob 0.3 --gumbel",
    "retrain.py": f"{TINY} 3 --batch_size 18 --epochs 2 --checkpoint_freq 2 --arch DDSAS_cifar10 --drop_path_prob 0.3",
    "train_search.py": f"{TINY} 1 --batch_size 12 --epochs 1 --checkpoint_freq 2 --eps_no_arch 0 --add_layers 0"
    " --add_layers 0 --dropout_rate 0.1 --dropout_rate 0.3 --dropout_rate 0.5 --note x",
}
EXACT = ("history.jsonl", "genotype.txt", "checkpoint.pt", "best.pt", "genotypes.txt")  # the same in identical runs


# --- scripts in processes ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def server():
    """The context whose processes are forked from one that has imported the scripts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["search", "retrain", "train_search", "visualize", "torch.utils.tensorboard", "torch._dynamo"]
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

    def run(self, script: str, argv: list[str], fault: Callable[[], None] | None = None) -> int:
        """The exit code of `script argv`, minus the signal that ended it; `fault` is called in the process before."""
        process = self.context.Process(target=child, args=(script, argv, str(self.folder / "out"), fault))
        process.start()
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
    importlib.import_module("visualize").epoch_pictures = lambda line: {}  # they take longer than a tiny epoch
    importlib.import_module("fast").find_difference = lambda network: None  # likewise; test_fast.py asks it
    if fault:
        fault()
    cli.run_script(module.main, module.get_parser(), argv)


def suicide(moment: int) -> None:
    """A fault: SIGKILL just before or just after the n-th call that moves a file or makes it last, whatever the file.

    These are the moments between which the state of the disk differs; what chance meets is one of them.
    """
    moments = itertools.count(1)

    def pass_by() -> None:
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(function: Callable) -> Callable:
        def call(*args, **kwargs):
            pass_by()
            try:
                return function(*args, **kwargs)
            finally:
                pass_by()

        return call

    for name in ("fsync", "link", "replace", "unlink"):
        setattr(os, name, wrapped(getattr(os, name)))


def signal_after_checkpoint(epoch: int, number: int = signal.SIGKILL) -> None:
    """A fault: a signal as soon as the first checkpoint inside of an epoch (of all stages) is written.

    A test that watches the folder from outside would miss that moment where the script is quick.
    """
    save, signals = runs.Run._save, iter([number])

    def call(run: runs.Run, best: bool = False) -> None:
        save(run, best)
        if run.epoch == epoch and run.step > 0 and (sent := next(signals, None)):
            os.kill(os.getpid(), sent)

    runs.Run._save = call


def poison(what: str, n: int) -> None:
    """A fault: the n-th loss, or its gradient, is not a number."""
    cross_entropy, losses = torch.nn.functional.cross_entropy, itertools.count(1)

    def poisoned(logits, *args, **kwargs):
        loss = cross_entropy(logits, *args, **kwargs)
        if next(losses) != n:
            return loss
        return loss * float("nan") if what == "loss" else loss + (logits * 0).sum().abs().sqrt()

    torch.nn.functional.cross_entropy = poisoned


@pytest.fixture
def scripts(server, pictures, tmp_path) -> Scripts:
    return Scripts(server, pictures, tmp_path)


@pytest.fixture(scope="session")
def whole(server, pictures, tmp_path_factory):
    """whole(script) -> the run folder of an uninterrupted run, made when first asked for."""
    scripts = Scripts(server, pictures, tmp_path_factory.mktemp("whole"))

    @cache
    def get(script: str) -> Path:
        name = script.removesuffix(".py")
        assert scripts.run(script, scripts.command(script, name)) == 0, scripts.output
        return scripts.find(name)

    return get


def assert_same_runs(a: Path, b: Path) -> None:
    """All results of two runs are bit-identical: history, genotypes, everything in the checkpoints."""
    assert (a / "history.jsonl").exists() and (a / "checkpoint.pt").exists()
    for name in EXACT:
        assert (a / name).exists() == (b / name).exists(), name
        if (a / name).exists():
            read = checkpoints.read_weights if name.endswith(".pt") else Path.read_text
            assert same(read(a / name), read(b / name)), name


# --- SIGKILL ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "script, kills",
    [
        ("search.py", 2),
        ("retrain.py", 2),
        pytest.param("search.py", 20, marks=pytest.mark.long),
        pytest.param("retrain.py", 10, marks=pytest.mark.long),
        pytest.param("train_search.py", 10, marks=pytest.mark.long),
    ],
)
def test_killed_run_is_the_uninterrupted_one(scripts, whole, script, kills):
    """Killed in the midst of operations on files and resumed; as many runs as the kills suffice for are compared."""
    draw = random.Random(kills)
    for number in itertools.count():
        name, code = f"killed{number}", None
        while code != 0:
            fault = partial(suicide, draw.randint(1, 45)) if kills else None
            code = scripts.run(script, scripts.command(script, name), fault)
            assert code in (0, -signal.SIGKILL), scripts.output
            kills -= code != 0
            if (run := scripts.find(name)) and (run / "checkpoint.pt").exists():
                checkpoints.read_weights(run / "checkpoint.pt")  # whole at every moment
        assert_same_runs(whole(script), scripts.find(name))
        assert not list(scripts.find(name).glob(".*"))  # no temporary file is left
        if not kills:
            return


# --- an interrupted search, and what can happen before it is resumed --------------------------------------------------
@pytest.fixture(scope="session")
def interrupted(server, pictures, tmp_path_factory) -> Path:
    """The run folder of a search that was killed in its second epoch."""
    scripts = Scripts(server, pictures, tmp_path_factory.mktemp("interrupted"))
    code = scripts.run("search.py", scripts.command("search.py", "run"), partial(signal_after_checkpoint, 1))
    assert code == -signal.SIGKILL and len(history(scripts.find("run"))) == 1, scripts.output
    return scripts.find("run")


@pytest.fixture
def run(interrupted, tmp_path) -> Path:
    """A copy of it, in which a test can do its damage."""
    return shutil.copytree(interrupted, tmp_path / "logs" / "killed")


def test_damaged_checkpoint_is_replaced_by_the_one_before(scripts, run, whole):
    damage(run / "checkpoint.pt")
    argv = [*scripts.command("search.py", "unused")[:-2], "--resume", "auto"]
    assert scripts.run("search.py", argv, partial(os.chdir, run.parent.parent)) == 0, scripts.output
    assert "warning" in scripts.output and "checkpoint.prev.pt" in scripts.output
    assert_same_runs(whole("search.py"), run)


def test_without_a_good_checkpoint_of_this_network_resuming_is_refused(scripts, run):
    state = checkpoints.read_weights(run / "checkpoint.pt")
    state["state_dict"].pop("classifier.bias")
    checkpoints.save_checkpoint(run / "checkpoint.pt", state)
    assert scripts.run("search.py", ["--resume", str(run)]) == 2
    assert "of another run" in scripts.output.splitlines()[-1] and "Traceback" not in scripts.output
    damage(run / "checkpoint.pt")
    damage(run / "checkpoint.prev.pt")
    before = (run / "checkpoint.pt").read_bytes()
    assert scripts.run("search.py", ["--resume", str(run)]) == 2
    assert "checkpoint.prev.pt: damaged" in scripts.output.splitlines()[-1] and "Traceback" not in scripts.output
    assert (run / "checkpoint.pt").read_bytes() == before


def damage(path: Path) -> None:
    """Lose a block in the middle of a file."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))


# --- signals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "script, epoch, number, code",
    [
        ("search.py", 0, signal.SIGTERM, 143),
        ("retrain.py", 0, signal.SIGINT, 130),
        ("train_search.py", 1, signal.SIGKILL, -9),  # in its second stage: each has one epoch
    ],
)
def test_signal_ends_a_run_with_the_command_that_goes_on(scripts, whole, script, epoch, number, code):
    argv = scripts.command(script, "stopped run")
    assert scripts.run(script, argv, partial(signal_after_checkpoint, epoch, number)) == code, scripts.output
    run, lines = scripts.find("stopped run"), scripts.output.splitlines()
    if number != signal.SIGKILL:
        assert lines[-1] == f"python {script} --resume {shlex.quote(str(run))}"
        assert "stopped by signal" in (run / "log.txt").read_text()
    assert scripts.run(script, ["--resume", str(run)]) == 0, scripts.output
    assert_same_runs(whole(script), run)


# --- full disks -------------------------------------------------------------------------------------------------------
def test_full_disk_ends_a_run_with_its_last_checkpoint_whole(scripts, run, whole):
    """What is full is the space for the checkpoint, then that for TensorBoard's events as well."""
    events = sum(path.stat().st_size for path in run.glob("events*"))
    for size, name in ((2 * events, f"{run}/checkpoint.pt"), (events // 2, "a file")):
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        argv = ["--resume", str(run), "--checkpoint_freq", "2" if size > events else "0"]
        assert scripts.run("search.py", argv, limit) == 1, scripts.output
        *_, last = scripts.output.splitlines()
        assert f"disk full: {name} not written" in last and "Traceback" not in scripts.output
    checkpoints.read_weights(run / "checkpoint.pt")
    assert not list(run.glob(".*"))
    assert scripts.run("search.py", ["--resume", str(run)]) == 0, scripts.output
    assert_same_runs(whole("search.py"), run)


# --- numbers going bad ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script, what", [("search.py", "loss"), ("retrain.py", "gradient")])
def test_bad_numbers_end_a_run_with_its_last_checkpoint_good(scripts, whole, script, what):
    fault = partial(poison, what, 3 if script == "retrain.py" else 6)  # a step of a search has two losses
    assert scripts.run(script, scripts.command(script, "run"), fault) == 1, scripts.output
    *_, last = scripts.output.splitlines()
    assert "epoch 0, step 2: loss" in last and "gradient norm nan" in last and "architecture" in last
    assert ("loss nan" in last) == (what == "loss") and "Traceback" not in scripts.output
    run = scripts.find("run")
    assert checkpoints.read_weights(run / "checkpoint.pt")["step"] == 2  # of the two steps before
    if script == "search.py":
        assert scripts.run(script, scripts.command(script, "run")) == 0, scripts.output
        assert_same_runs(whole(script), run)
