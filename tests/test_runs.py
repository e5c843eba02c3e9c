"""Whole files, checkpoints from anywhere, run folders, signals: what must hold when things go wrong."""

import argparse
import errno
import io
import json
import os
import pickle
import random
import resource
import shlex
import signal
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import same

import evaluate
import genotypes
import model
import retrain
import search
import train_cifar
import train_imagenet
import train_search
import utils
from lib import checkpoints, cli, distributed, run_folder, runs
from lib.cli import UserError
from lib.runs import Run
from utils import Average


def parse(*argv: object) -> argparse.Namespace:
    parser = cli.Parser()
    cli.add_run_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--add_layers", action="append", type=int, default=[0])
    parser.add_argument("--cutout", action="store_true")
    return cli.parse(parser, [str(a) for a in argv])


def fork(function: Callable[[], object]) -> int:
    """Run a function in a child process; the child's id."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(1)
    return pid


def exit_code(pid: int) -> int:
    """The exit code of a child; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


# ---- checkpoints of our own -----------------------------------------------------------------------------------------
def content() -> dict:
    """A small checkpoint with everything that ours hold."""
    utils.set_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    plain = {"epoch": 3, "lr": 0.1, "note": "é", "best": None, "args": {"a": [1, (2, True)]}}
    return plain | {
        "state_dict": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "half": torch.ones(3).bfloat16(),
        "mask": torch.tensor([True, False]),
        "rng": runs.rng_state(),
        "bandit": np.random.default_rng(3).bit_generator.state,
    }


def saved(state: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


STATE = content()
ZIPPED, LEGACY = saved(STATE), saved(STATE, zipped=False)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_checkpoint_comes_back_exactly(tmp_path, zipped):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    shared = OrderedDict(a=weight, b=weight, row=weight[1:], p=torch.nn.Parameter(weight.clone()), none=torch.empty(0))
    (tmp_path / "c.pt").write_bytes(saved(STATE | {"shared": shared}, zipped))
    state = checkpoints.read_weights(tmp_path / "c.pt")
    loaded = state.pop("shared")
    assert same(state, STATE)
    assert all(torch.equal(loaded[key], shared[key]) for key in shared)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


def test_killed_while_writing_leaves_a_good_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"

    def write() -> None:
        epoch = 0
        while True:
            epoch += 1
            checkpoints.save_checkpoint(path, {"epoch": epoch, "weights": torch.full((200_000,), epoch)})

    draw, last = random.Random(5), 0
    for _ in range(5):
        pid = fork(write)
        time.sleep(0.03 + 0.05 * draw.random())
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL
        for file in tmp_path.glob("*.pt"):
            state = checkpoints.read_weights(file)
            last = max(last, state["epoch"])
            assert (state["weights"] == state["epoch"]).all()
        assert path.exists() or not last
    assert last > 0


@pytest.mark.parametrize("step", ["fsync", "link", "replace"])
def test_write_that_fails_anywhere_leaves_the_last_checkpoint(tmp_path, monkeypatch, step):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, {"epoch": 0})
    checkpoints.save_checkpoint(path, {"epoch": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        try:
            checkpoints.save_checkpoint(path, {"epoch": 2})  # can do without hard links
        except OSError as error:
            assert error.filename == str(path) and step != "link"
    assert checkpoints.load_checkpoint(path)["epoch"] == (2 if step == "link" else 1)
    assert not list(tmp_path.glob(".*"))


# ---- damaged and hostile files --------------------------------------------------------------------------------------
class Calls:
    """Asks to call a function when it is read."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


EVIL = {"a": Calls(os.mkdir, "i_was_executed")}
HOSTILE_FILES = {
    "code": lambda: saved(EVIL),
    "code_legacy": lambda: saved(EVIL, zipped=False),
    "code_pickle5": lambda: pickle.dumps(EVIL, protocol=5),
    "whole_module": lambda: saved(torch.nn.Linear(2, 2)),
    "storage": lambda: saved({"a": Calls(torch.UntypedStorage, 10**12)}),
    "tensor_alone": lambda: saved(torch.ones(2)),
    "empty": lambda: b"",
    "zip": lambda: b"PK\x05\x06" + bytes(18),
}


def test_hostile_files_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, make in HOSTILE_FILES.items():
        Path(name).write_bytes(make())
        with pytest.raises(UserError, match=f"{name}.*(not a checkpoint|holds a Tensor)") as refused:
            checkpoints.read_weights(name)
        assert str(refused.value).isprintable()
    for path in (tmp_path, tmp_path / "missing.pt"):
        with pytest.raises(UserError, match="cannot be read"):
            checkpoints.read_weights(path)
    assert not Path("i_was_executed").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kB


def test_no_byte_of_the_directory_can_change_the_weights(tmp_path):
    """Among them are file attributes: to PyTorch a record with the folder bit has no data."""
    with zipfile.ZipFile(io.BytesIO(ZIPPED)) as file:
        start, infos = file.start_dir, file.infolist()
    assert len(infos) > 10
    for place in range(start, len(ZIPPED), 29):  # 29 and 46 + the lengths of names: all fields come up
        changed = bytearray(ZIPPED)
        changed[place] ^= 0x10
        (tmp_path / "c.pt").write_bytes(changed)
        try:
            assert same(checkpoints.read_weights(tmp_path / "c.pt"), STATE)
        except UserError as error:
            assert str(error).isprintable()


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A file with one to three accidents: cut off, bits turned, blocks lost, repeated, swapped or overwritten."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        if draw.random() < 0.5:  # where the directory of the zip is, and the instructions
            a, b = draw.choice([(0, a // 20), (len(data) - (len(data) - b) // 20, len(data))])
        b = max(b, a + 1)
        middle, noise = (a + b) // 2, draw.randbytes(len(data[a:b]))
        bit = draw.randrange(8 * a, 8 * b)
        kinds = {
            "cut": data[:a],
            "bit": data[: bit // 8] + bytes(x ^ 1 << bit % 8 for x in data[bit // 8 :][:1]) + data[bit // 8 + 1 :],
            "zeros": data[:a] + bytes(len(noise)) + data[b:],
            "noise": data[:a] + noise + data[b:],
            "lost": data[:a] + data[b:],
            "twice": data[:b] + data[a:],
            "append": data + noise[:100],
            "swap": data[:a] + data[middle:b] + data[a:middle] + data[b:],
        }
        data = kinds[draw.choice(["bit", *kinds])]
    return data


@pytest.mark.parametrize("count", [60, pytest.param(20_000, marks=pytest.mark.long)])
def test_damaged_legacy_file_is_refused_in_one_line_or_is_a_dict(tmp_path, count):
    """That format has no checksums: that nothing crashes is all that can be had, but for a file that is cut off."""
    path, draw = tmp_path / "c.pt", random.Random(count)
    for number in range(count):
        cut = LEGACY[: number * len(LEGACY) // count]
        path.write_bytes(cut if number % 2 else mutated(LEGACY, draw))
        try:
            assert isinstance(checkpoints.read_weights(path), dict) and not number % 2
        except UserError as error:
            assert str(error).isprintable() and str(path) in str(error)


# ---- damaged and hostile checkpoints in evaluate.py -----------------------------------------------------------------
@pytest.fixture(scope="module")
def best() -> dict:
    """What best.pt of a retraining holds, with random weights."""
    torch.manual_seed(0)
    genotype = genotypes.load("DDSAS_cifar10")
    network = model.NetworkCIFAR(2, 3, 3, False, genotype)
    shape = {"network": "NetworkCIFAR", "init_channels": 2, "layers": 3, "num_classes": 3, "image_size": 8}
    return {"state_dict": network.state_dict(), "genotype": str(genotype), "dataset": "folder", **shape}


@pytest.fixture
def evaluated(pictures, command):
    """evaluated(file) -> (exit code, results or None, lines of stderr) of `python evaluate.py` in this process."""

    def run(file: Path) -> tuple[int, dict | None, list[str]]:
        words = "--model_path", file, "--data", pictures, "--device", "cpu", "--workers", 1, "--json"
        code, out, errors = command(evaluate, *words)
        results = {name: json.loads(out)[name] for name in ("top1", "loss", "images", "genotype")} if out else None
        return code, results, errors

    return run


@pytest.mark.parametrize("count", [30, pytest.param(5000, marks=pytest.mark.long)])
def test_mutated_checkpoint_is_refused_or_evaluates_as_before(best, evaluated, tmp_path, count):
    file, good, draw, refusals = tmp_path / "best.pt", saved(best), random.Random(count), 0
    file.write_bytes(good)
    code, expected, _ = evaluated(file)
    assert code == 0
    torch.save({"state_dict": {}}, tmp_path / "best.prev.pt")  # other weights, never taken
    for _ in range(count):
        file.write_bytes(mutated(good, draw))
        code, results, lines = evaluated(file)
        if code == 0:
            assert results == expected
        else:
            assert code == 2 and results is None and len(lines) == 1 and str(file) in lines[0]
            refusals += 1
    assert 0.7 * count < refusals < count


def claims(name: str, *shape: int) -> Callable[[dict], None]:
    """A tensor without data in place of one, or in addition."""
    return lambda checkpoint: checkpoint["state_dict"].update({name: torch.empty(shape)})


def many_cells(checkpoint: dict) -> None:
    checkpoint["state_dict"] |= {f"cells.{n}.preprocess0.op.1.weight": torch.empty(0) for n in range(2_000)}


HOSTILE_CHECKPOINTS = {
    "cells": many_cells,
    "channels": claims("stem.0.weight", 2**60, 0),
    "channels everywhere": lambda c: [claims(name, 2**60, 0)(c) for name in list(c["state_dict"]) if "stem" in name],
    "classes": lambda c: [claims(f"classifier.{name}", 2**62, 0)(c) for name in ("bias", "weight")],
    "no channels": lambda c: [claims(name, 0)(c) for name in list(c["state_dict"]) if "stem" in name],
    "image size": lambda c: c.update(image_size=10**9),
    "image size below 0": lambda c: c.update(image_size=-8),
    "dataset": lambda c: c.update(dataset="imagenet"),
    "genotype of code": lambda c: c.update(genotype="Genotype(normal=__import__('os').abort())"),
    "genotype in a file": lambda c: c.update(genotype="/etc/passwd"),
    "genotype of lists": lambda c: c.update(genotype=[["PDARTS"]]),
    "other genotype": lambda c: c.update(genotype=str(genotypes.PDARTS)),
    "escape codes": claims("\x1b[31mred\n\x07", 1),
    "integers": lambda c: c["state_dict"].update({"classifier.bias": torch.zeros(3, dtype=torch.int64)}),
    "list of weights": lambda c: c.update(state_dict=list(c["state_dict"].values())),
}


def test_hostile_checkpoints_are_refused_before_memory_is_taken(best, evaluated, tmp_path):
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    for name, change in HOSTILE_CHECKPOINTS.items():
        checkpoint = best | {"state_dict": dict(best["state_dict"])}
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "best.pt")
        code, results, errors = evaluated(tmp_path / "best.pt")
        assert code == 2 and results is None and len(errors) == 1 and errors[0].isprintable(), (name, errors)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kB
    assert time.time() - started < 60


# ---- run folders ----------------------------------------------------------------------------------------------------
class Loader:
    """Four batches an epoch."""

    num_images = 4

    def __len__(self) -> int:
        return 4

    def epoch(self, epoch: int, start: int = 0):
        return ((torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)) for _ in range(start, 4))


def train(*argv: object, stop_at: int | None = None, facts: dict | None = None, script="search.py", **options) -> Run:
    """A training that counts its steps; it breaks off after ``stop_at`` of them."""
    utils.set_seed(0)
    run = Run(parse(*argv), script, "counted", **options)
    counter, meter = torch.nn.Module(), Average("cpu")
    counter.register_buffer("value", torch.zeros(1))
    run.keep({"counter": counter, "meter": meter}, facts)
    for epoch in range(run.epoch, run.args.epochs):
        for _ in run.steps(Loader()):
            counter.value += torch.rand(1)
            loss, logits = counter.value.sum(), torch.zeros(1, 3)
            meter.add(loss, logits, torch.zeros(1, dtype=torch.int64))
            run.after_step(meter, loss, loss)
            if epoch * 4 + run.step == stop_at:
                run.close()
                return run
        line = {"epoch": epoch, "train_loss": meter.read().loss, "value": counter.value}
        meter.reset()
        run.end_epoch(line)
    run.close()
    return run


def test_run_folder_tells_everything(tmp_path, capsys):
    run = train("--seed", 3, "--quiet", "--save", tmp_path / "a", "--epochs", 1, facts={"mean": [0.5]})
    assert capsys.readouterr().out == f"run folder: {tmp_path / 'a'}\n"
    run.log("hidden by --quiet")
    run.write("genotype.txt", "Genotype(...)")
    assert "hidden by --quiet" in (run.folder / "log.txt").read_text()
    assert (run.folder / "genotype.txt").read_text() == "Genotype(...)\n"
    (line,) = map(json.loads, (run.folder / "history.jsonl").read_text().splitlines())
    assert line["epoch"] == 0 and isinstance(line["value"], list)
    timing = json.loads((run.folder / "timing.jsonl").read_text())
    assert {"epoch", "seconds", "cpu_seconds", "images_per_second", "peak_memory_mb"} == timing.keys()
    record = json.loads((run.folder / "args.json").read_text())
    assert record["script"] == "search.py" and record["seed"] == 3 and record["command"].startswith("python ")
    assert set(record["versions"]) == {"python", "torch", "torchvision", "numpy"}
    assert record["processor"] and record["commit"] and record["threads"] == 1
    assert record["args"]["batch_size"] == 64 and not {"given", "resume"} & set(record["args"])
    state = checkpoints.read_weights(run.folder / "checkpoint.pt")
    assert state["mean"] == [0.5] and (state["epoch"], state["step"]) == (1, 0)


def test_a_run_is_never_overwritten(tmp_path, monkeypatch):
    train("--epochs", 3, "--save", tmp_path / "run", stop_at=1)
    train("--save", tmp_path / "run", stop_at=5)  # the first one did nothing yet, a typing error perhaps
    assert json.loads((tmp_path / "run/args.json").read_text())["args"]["epochs"] == 4
    with pytest.raises(UserError, match="--resume .* --save"):
        train("--save", tmp_path / "run")
    monkeypatch.chdir(tmp_path)  # runs without a name that begin in the same second
    monkeypatch.setattr(cli.time, "strftime", lambda *_: "NOW")
    names = [train("--note", "try", stop_at=1).folder.name for _ in range(3)]
    assert names == ["counted-try-NOW", "counted-try-NOW-2", "counted-try-NOW-3"]


def test_a_second_process_in_the_folder_is_refused(tmp_path):
    folder, ready = tmp_path / "run", tmp_path / "ready"

    def hold() -> None:
        run = Run(parse("--save", folder), "search.py", "x")
        run.keep({})
        if os.fork():  # a loader worker, forked, outlives its killed parent for seconds: it must not keep the lock
            ready.touch()
        time.sleep(5)
        run.close()

    pid = fork(hold)
    wait_for(ready)
    with pytest.raises(UserError, match="in use by another process"):
        train("--resume", folder)
    os.kill(pid, signal.SIGKILL)
    exit_code(pid)
    train("--resume", folder, stop_at=1)


def test_resume_takes_the_stored_arguments_and_refuses_others_by_name(tmp_path):
    folder = tmp_path / "run"
    train("--batch_size", 32, "--add_layers", 6, "--workers", 1, "--save", folder, stop_at=5)
    args = parse("--batch_size", 32, "--workers", 4, "--quiet", "--resume", folder)
    Run(args, "search.py", "x").keep({})
    assert (args.batch_size, args.add_layers, args.workers, args.quiet) == (32, [0, 6], 4, True)
    assert json.loads((folder / "args.json").read_text())["args"]["workers"] == 4
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError) as refused:
        Run(parse("--add_layers", 7, "--cutout", "--seed", 0, "--resume", folder), "search.py", "x")
    assert "--add_layers (was [0, 6], now [0, 7]), --cutout (was False, now True)" in str(refused.value)
    assert "--seed" not in str(refused.value)
    with pytest.raises(UserError, match="a run of search.py"):
        Run(parse("--resume", folder), "retrain.py", "x")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    for text in ("", "[]", '{"args": 3}'):
        (folder / "args.json").write_text(text)
        with pytest.raises(UserError, match="not a run folder"):
            Run(parse("--resume", folder), "search.py", "x")


def test_other_images_are_not_what_a_run_goes_on_with(tmp_path):
    train("--save", tmp_path / "run", stop_at=5, facts={"data_hash": "a"})
    with pytest.raises(UserError, match="the images are not those that the run began with"):
        train("--resume", tmp_path / "run", facts={"data_hash": "b"})
    train("--resume", tmp_path / "run", facts={"data_hash": "a"})


def test_the_number_of_processes_may_change_between_epochs_where_batches_stay(tmp_path, monkeypatch):
    """In the middle of an epoch it may not: the processes have counted steps of another share of the images."""
    for name, stop_at, more in (("inside", 6, ["--checkpoint_freq", 2]), ("between", 5, [])):
        train("--save", tmp_path / name, *more, "--batch_size", 8, "--epochs", 2, stop_at=stop_at)
    monkeypatch.setattr(runs, "world_size", lambda: 2)
    with pytest.raises(UserError, match="had 1 processes of 8 images a step, now 2 of 4: only between two epochs"):
        Run(parse("--resume", tmp_path / "inside", "--batch_size", 4), "search.py", "x")
    with pytest.raises(UserError, match="had 1 processes of 8 images a step, now 2 of 8"):
        Run(parse("--resume", tmp_path / "between"), "search.py", "x")
    assert Run(parse("--resume", tmp_path / "between", "--batch_size", 4), "search.py", "x").epoch == 1


def test_auto_is_the_newest_run_of_this_experiment(tmp_path):
    for name, layers, script in (
        ("1_old", 3, "search.py"), ("2_new", 3, "search.py"), ("3_other", 4, "search.py"), ("4_other", 3, "retrain.py")
    ):  # fmt: skip
        folder = train("--add_layers", layers, "--save", tmp_path / name, stop_at=5, script=script).folder
        os.utime(folder / "checkpoint.pt", (int(name[0]),) * 2)
    train("--add_layers", 3, "--save", tmp_path / "without_checkpoint", stop_at=1)

    def find(layers: int) -> Run:
        args = parse("--add_layers", layers, "--save", tmp_path / "x", "--resume")
        args.given -= {"save"}
        return Run(args, "search.py", "x")

    assert find(3).folder == tmp_path / "2_new"
    with pytest.raises(UserError, match="--resume auto: .* has no run of search.py with these arguments"):
        find(31)


def test_history_after_the_checkpoint_is_cut_off(tmp_path):
    whole = train("--save", tmp_path / "whole", "--epochs", 3).folder
    folder = train("--save", tmp_path / "run", "--epochs", 3, stop_at=9).folder
    with open(folder / "history.jsonl", "a") as file:
        file.write('{"epoch": 2}\n{"epo')  # killed in the middle of a line
    (folder / ".checkpoint.pt.123.new.tmp").write_bytes(b"half")
    train("--resume", folder)
    assert (folder / "history.jsonl").read_text() == (whole / "history.jsonl").read_text()
    assert len((folder / "timing.jsonl").read_text().splitlines()) == 3
    assert not list(folder.glob(".*"))
    torch.save({"state_dict": {}}, folder / "checkpoint.pt")
    with pytest.raises(UserError, match="not the checkpoint of a run of this version"):
        train("--resume", folder)


def test_a_checkpoint_with_a_number_that_is_not_finite_is_not_written(tmp_path):
    finite = {"lr": 0.1, "step": 10**400, "mask": torch.tensor([True]), "best": None, "rng": (3, (1, 2.0))}
    assert checkpoints.first_not_finite(finite) is None
    wrong = {"optimizer": {"state": [{"step": 1}, {"momentum": torch.tensor([1.0, np.nan])}]}}
    assert checkpoints.first_not_finite(wrong) == "optimizer state 1 momentum"
    with pytest.raises(distributed.Diverged, match="epoch 1, step 0: mean 0 is not finite"):
        train("--save", tmp_path / "run", facts={"mean": [float("nan")]})
    assert not (tmp_path / "run/checkpoint.pt").exists()


# ---- commands and signals -------------------------------------------------------------------------------------------
def test_retrain_command_says_what_was_searched_and_for_imagenet_the_published_settings():
    for script, words, retraining in (
        (search, "--dataset cifar10", retrain),
        (search, "--dataset folder --data 'my images' --image_size 32 --batch_size 9", retrain),
        (train_search, "--dataset fashion_mini --tmp_data_dir elsewhere", train_cifar),
        (train_search, "--dataset imagenet", train_imagenet),
    ):
        given = script.get_parser().parse_args(shlex.split(words))
        command = run_folder.retrain_command(f"{script.__name__}.py", vars(given), "logs/a run")
        program, name, *flags = shlex.split(command)
        assert (program, name) == ("python", f"{retraining.__name__}.py")
        parsed = retraining.get_parser().parse_args(flags)
        assert (parsed.dataset, parsed.arch, parsed.auxiliary) == (given.dataset, "logs/a run", True)
        if given.dataset != "imagenet":
            assert (parsed.data, parsed.image_size, parsed.cutout) == (given.data, given.image_size, True)
    args = {"dataset": "imagenet", "data": ".data/imagenet_split", "image_size": None}
    _, _, *flags = shlex.split(run_folder.retrain_command("search.py", args, "logs/run"))
    parser, script = retrain.get_parser(), (Path(retrain.__file__).parent / "shell/retrain_imagenet.sh").read_text()
    _, *published, _ = shlex.split(script[script.index("retrain.py \\") :].replace("\\\n", ""))
    expected, parsed = vars(cli.parse(parser, published)), vars(cli.parse(parser, flags))
    assert {name for name in parsed if parsed[name] != expected[name]} == {"arch", "workers", "given"}


def test_second_signal_stops_at_once(tmp_path):
    def stubborn() -> None:
        signals = runs.Signals()
        (tmp_path / "ready").touch()
        while not signals.number:
            time.sleep(0.01)
        (tmp_path / "first").touch()
        time.sleep(60)

    pid = fork(stubborn)
    wait_for(tmp_path / "ready")
    os.kill(pid, signal.SIGINT)
    wait_for(tmp_path / "first")
    os.kill(pid, signal.SIGINT)
    assert exit_code(pid) == -signal.SIGINT
