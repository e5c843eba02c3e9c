"""Run folders, checkpoints, signals, processes: what must hold when things go wrong."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from utils import Run, UserError

ROOT = Path(__file__).resolve().parent.parent


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser()
    utils.add_run_arguments(p)
    p.add_argument("--batch_size", type=int, default=64, help="50% of what fits".replace("%", "%%"))
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--add_layers", action="append", type=int, default=[0])
    p.add_argument("--cutout", action="store_true")
    p.add_argument("--crash", type=int)
    return p


def parse(*argv: object) -> argparse.Namespace:
    return utils.parse(parser(), [str(a) for a in argv])


def content() -> dict:
    """A small checkpoint with everything that ours hold."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    bandit = np.random.default_rng(3).bit_generator.state
    plain = {"epoch": 3, "lr": 0.1, "note": "é", "best": None, "args": {"a": [1, (2, True)]}}
    return plain | {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "half": torch.ones(3).bfloat16(),
        "mask": torch.tensor([True, False]),
        "rng": utils.rng_state(),
        "bandit": bandit,
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def fork(function: Callable[[], object], output: Path) -> int:
    """Run a function in a child process, its stdout and stderr in a file; the child's id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
            function()
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    """What a shell would call the exit code of a child: negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_checkpoint_comes_back_exactly(tmp_path, zipped):
    state = content()
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    assert same(utils.read_weights(tmp_path / "c.pt"), state)


def test_shared_and_strided_tensors_load(tmp_path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    state = OrderedDict(a=weight, b=weight, row=weight[1:], p=torch.nn.Parameter(weight.clone()), none=torch.empty(0))
    for zipped in (True, False):
        torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
        loaded = utils.read_weights(tmp_path / "c.pt")
        assert all(torch.equal(loaded[key], state[key]) for key in state)
        assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


def test_generators_go_on_where_they_were(tmp_path):
    def draw() -> list:
        return [random.random(), np.random.rand(), torch.rand(2).tolist(), generator.integers(10**9)]

    generator = np.random.default_rng(7)
    utils.set_seed(1)
    utils.save_checkpoint(tmp_path / "c.pt", {"rng": utils.rng_state(), "bandit": generator.bit_generator.state})
    expected = draw()
    state = utils.load_checkpoint(tmp_path / "c.pt")
    utils.set_rng_state(state["rng"])
    generator = np.random.default_rng()
    generator.bit_generator.state = state["bandit"]  # 128-bit integers
    assert draw() == expected


def mutate(data: bytes, draw: Callable) -> bytes:
    """Cut the file off, or flip up to three bits."""
    if draw(st.booleans()):
        return data[: draw(st.integers(0, len(data) - 1))]
    mutated = bytearray(data)
    for place in draw(st.lists(st.integers(0, 8 * len(data) - 1), min_size=1, max_size=3)):
        mutated[place // 8] ^= 1 << place % 8
    return bytes(mutated)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_zip_is_refused_or_is_the_same(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.pt"
    path.write_bytes(mutate(ZIPPED, data.draw))
    try:
        assert same(utils.read_weights(path), STATE)
    except UserError as error:
        assert str(error).isprintable() and str(path) in str(error)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_legacy_file_is_refused_or_loads_its_size(tmp_path_factory, data):
    """The older format has no checksum: no crash and no other sizes is all that can be had."""
    path = tmp_path_factory.getbasetemp() / "mutated_legacy.pt"
    mutated = mutate(LEGACY, data.draw)
    path.write_bytes(mutated)
    try:
        assert isinstance(utils.read_weights(path), dict) and len(mutated) == len(LEGACY)
    except UserError as error:
        assert str(error).isprintable()


def test_no_byte_of_the_directory_can_change_the_weights(tmp_path):
    """Among them are file attributes: to torch a record with the folder bit has no data."""
    with zipfile.ZipFile(io.BytesIO(ZIPPED)) as file:
        start, infos = file.start_dir, file.infolist()
    assert len(infos) > 10
    for place in range(start, len(ZIPPED), 7):  # 7 and 46 + the lengths of names: all fields come up
        mutated = bytearray(ZIPPED)
        mutated[place] ^= 0x10
        (tmp_path / "c.pt").write_bytes(mutated)
        try:
            assert same(utils.read_weights(tmp_path / "c.pt"), STATE)
        except UserError as error:
            assert str(error).isprintable()


def saved(state: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


utils.set_seed(0)
STATE = content()
ZIPPED, LEGACY = saved(STATE), saved(STATE, zipped=False)


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("i_was_executed",)


def huge(zipped: bool, place: int, numel: int) -> bytes:
    """A file that claims `numel` floats: in its storage (place 0) or in its tensor (place 1); it holds 300."""

    def claim(pickled: bytes) -> bytes:
        parts = pickled.split(b"M\x2c\x01", 2)  # BININT2 300
        small, big = b"M\x2c\x01", b"\x8a\x08" + numel.to_bytes(8, "little")
        return parts[0] + (big if place == 0 else small) + parts[1] + (big if place == 1 else small) + parts[2]

    data = saved({"a": torch.arange(300.0)}, zipped)
    return with_pickle(data, claim) if zipped else claim(data)


def with_pickle(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A checkpoint in a zip with another pickle, and right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return out.getvalue()


def nested(depth: int) -> bytes:
    """A dict with a key of tuples in tuples: hash() needs a stack of that depth."""
    return b"\x80\x02})" + b"\x85" * depth + b"K\x01s."


def deflated() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ZIPPED)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


class Hoard:
    """Asks for memory without any data: allowed by weights_only."""

    def __reduce__(self) -> tuple:
        return bytearray, (10**12,)


HOSTILE = {
    "code": (lambda: saved({"a": Evil()}), "carries code (posix.mkdir)"),
    "code_legacy": (lambda: saved({"a": Evil()}, zipped=False), "carries code (posix.mkdir)"),
    "code_pickle2": (lambda: pickle.dumps({"a": Evil()}, protocol=2), "carries code (posix.mkdir)"),
    "code_pickle5": (lambda: pickle.dumps({"a": Evil()}, protocol=5), "carries code"),
    "whole_module": (lambda: saved(torch.nn.Linear(2, 2)), "carries code (torch.nn.modules.linear.Linear)"),
    "code_with_escapes": (lambda: b"\x80\x02cos\x1b[31m\x07\nsystem\n.", "carries code (os [31m .system)"),
    "bytearray": (lambda: saved({"a": Hoard()}), "bytearray"),
    "huge_storage": (lambda: huge(True, 0, 10**13), "damaged"),
    "huge_tensor": (lambda: huge(True, 1, 10**13), "damaged"),
    "huge_storage_legacy": (lambda: huge(False, 0, 10**13), "damaged"),
    "huge_tensor_legacy": (lambda: huge(False, 1, 10**13), "damaged"),
    "zero_strides": (lambda: saved({"a": torch.zeros(1).as_strided((10**6, 10**6), (0, 0))}), "larger than its data"),
    "sparse": (lambda: saved({"a": torch.eye(3).to_sparse()}), "torch._utils._rebuild_sparse_tensor"),
    "deflated": (deflated, "not as torch.save writes it"),
    "nested_key": (lambda: with_pickle(ZIPPED, lambda _: nested(10**6)), "nested more than 100 deep"),
    "nested_key_legacy": (lambda: saved({}, zipped=False)[:-20] + nested(10**6), "damaged"),
    "tensor_alone": (lambda: saved(torch.ones(2)), "holds a Tensor, expected a dict"),
    "empty": (lambda: b"", "damaged, cut off, or not a checkpoint"),
    "text": (lambda: b"Genotype(normal=[])\n" * 100, "damaged, cut off, or not a checkpoint"),
    "zip": (lambda: b"PK\x05\x06" + bytes(18), "damaged, cut off, or not a checkpoint"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make, expected = HOSTILE[name]
    Path("c.pt").write_bytes(make())
    with pytest.raises(UserError) as refused:
        utils.read_weights("c.pt")
    assert expected in str(refused.value) and str(refused.value).isprintable() and "c.pt" in str(refused.value)
    assert not Path("i_was_executed").exists()


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing.pt"):
        with pytest.raises(UserError, match="cannot be read"):
            utils.read_weights(path)


def test_previous_checkpoint_serves_when_the_last_is_damaged(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    for epoch in range(3):
        utils.save_checkpoint(path, {"epoch": epoch})
    assert utils.load_checkpoint(path) == {"epoch": 2} and not capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.prev.pt", "checkpoint.pt"]
    path.write_bytes(path.read_bytes()[:-30])
    assert utils.load_checkpoint(path) == {"epoch": 1}
    assert "warning" in capsys.readouterr().err
    path.unlink()
    assert utils.load_checkpoint(path) == {"epoch": 1}
    (tmp_path / "checkpoint.prev.pt").write_bytes(b"")
    with pytest.raises(UserError):
        utils.load_checkpoint(path)


def test_killed_while_writing_leaves_a_good_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"

    def write() -> None:
        epoch = 0
        while True:
            epoch += 1
            utils.save_checkpoint(path, {"epoch": epoch, "weights": torch.full((200_000,), epoch)})

    draw, last = random.Random(5), 0
    for _ in range(15):
        pid = fork(write, tmp_path / "out")
        time.sleep(0.03 + 0.05 * draw.random())
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL
        if path.exists():
            for name in ("checkpoint.pt", "checkpoint.prev.pt"):
                if (tmp_path / name).exists():
                    state = utils.read_weights(tmp_path / name)
                    last = max(last, state["epoch"])
                    assert (state["weights"] == state["epoch"]).all()
    assert last > 0


@pytest.mark.parametrize("step", ["fsync", "link", "replace"])
def test_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, capsys, step):
    path = tmp_path / "checkpoint.pt"
    utils.save_checkpoint(path, {"epoch": 0})
    utils.save_checkpoint(path, {"epoch": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(SystemExit) as stop:
        utils.cli(lambda args: [utils.save_checkpoint(path, {"epoch": 2}), full()], parser(), [])
    monkeypatch.undo()
    message = capsys.readouterr().err
    assert stop.value.code == 1 and message.count("\n") == 1 and "disk full" in message
    assert utils.load_checkpoint(path)["epoch"] >= 1
    assert not list(tmp_path.glob(".*"))


# --- command line -----------------------------------------------------------------------------------------------------


def test_given_arguments_are_those_of_the_command_line():
    args = parse("--add_layers", 6, "--add_layers=12", "--cutout", "--epochs", 4, "--resume_path", "logs/x")
    assert args.given == {"add_layers", "cutout", "epochs", "resume"}
    assert args.add_layers == [0, 6, 12] and args.resume == "logs/x" and args.batch_size == 64
    assert parse("--resume").resume == "auto" and parse().given == set()


def test_help_prints(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "50% of what fits" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "error, code, text",
    [
        (UserError("data: 3 given,\n expected 4"), 2, "data: 3 given, expected 4"),
        (utils.Diverged("loss is nan in epoch 3, step 4"), 1, "loss is nan"),
        (utils.RankLost("lost"), 1, "lost"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(errno.EACCES, "Permission denied", "logs"), 2, "logs: Permission denied"),
    ],
)
def test_errors_are_one_line_and_a_code(capsys, error, code, text):
    def main(args: argparse.Namespace) -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        utils.cli(main, parser(), [])
    message = capsys.readouterr().err
    assert stop.value.code == code and text in message and message.count("\n") == 1


def test_bugs_keep_their_traceback():
    with pytest.raises(FileNotFoundError):
        utils.cli(lambda args: open("/not/there"), parser(), [])


def test_device_that_is_not_there_is_named():
    assert utils.device_of(parse("--device", "cpu")) == torch.device("cpu")
    assert utils.device_of(parse()).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for argv in (["--gpu", 99], ["--device", "cuda:99"], ["--device", "toaster"], ["--gpu", -1]):
        with pytest.raises(UserError, match="cpu"):
            utils.device_of(parse(*argv))


# --- run folders ------------------------------------------------------------------------------------------------------


def test_run_folder_tells_everything(tmp_path, capsys):
    run = Run.create(tmp_path / "a", parse("--seed", 3, "--quiet"), "search.py")
    run.log("hidden by --quiet")
    run.genotype("Genotype(...)")
    run.history({"epoch": 0, "loss": np.float64(0.5), "visits": np.ones(2), "alpha": torch.zeros(1)})
    assert capsys.readouterr().out == f"run folder: {tmp_path / 'a'}\n"
    assert "hidden by --quiet" in (run.folder / "log.txt").read_text()
    assert (run.folder / "genotype.txt").read_text() == "Genotype(...)\n"
    line = {"epoch": 0, "loss": 0.5, "visits": [1.0, 1.0], "alpha": [0.0]}
    assert json.loads((run.folder / "history.jsonl").read_text()) == line
    record = json.loads((run.folder / "args.json").read_text())
    assert record["script"] == "search.py" and record["seed"] == 3 and record["command"].startswith("python ")
    assert set(record["versions"]) == {"python", "torch", "torchvision", "numpy"}
    assert record["args"]["batch_size"] == 64 and not {"given", "resume"} & set(record["args"])
    run.close()


def test_a_run_is_never_overwritten(tmp_path):
    Run.create(tmp_path, parse("--epochs", 3), "search.py").close()
    run = Run.create(tmp_path, parse(), "search.py")  # the first one did nothing yet, a typing error perhaps
    assert json.loads((tmp_path / "args.json").read_text())["args"]["epochs"] == 4
    run.checkpoint({})
    run.close()
    with pytest.raises(UserError, match="--resume .* --save"):
        Run.create(tmp_path, parse(), "search.py")


def test_a_folder_in_use_is_refused_until_its_process_dies(tmp_path):
    folder, ready = tmp_path / "run", tmp_path / "ready"

    def hold() -> None:
        run = Run.create(folder, parse(), "search.py")
        if os.fork():  # a loader worker, forked, outlives its killed parent for seconds: it must not keep the lock
            ready.touch()
        time.sleep(5)
        run.close()

    pid = fork(hold, tmp_path / "out")
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="in use by another process"):
        Run.resume(folder, parse(), "search.py")
    os.kill(pid, signal.SIGKILL)
    exit_code(pid)
    Run.resume(folder, parse(), "search.py").close()


def test_resume_takes_the_stored_arguments_and_refuses_others_by_name(tmp_path):
    Run.create(tmp_path, parse("--batch_size", 32, "--add_layers", 6, "--workers", 1), "search.py").close()
    args = parse("--batch_size", 32, "--workers", 4, "--epochs", 9, "--quiet")
    Run.resume(tmp_path, args, "search.py", may_change=["epochs"]).close()
    assert (args.batch_size, args.add_layers, args.workers, args.epochs, args.quiet) == (32, [0, 6], 4, 9, True)
    assert json.loads((tmp_path / "args.json").read_text())["args"]["epochs"] == 9
    with pytest.raises(UserError) as refused:
        Run.resume(tmp_path, parse("--batch_size", 64, "--cutout", "--seed", 0), "search.py")
    assert "--batch_size (was 32, now 64), --cutout (was False, now True)" in str(refused.value)
    assert "--seed" not in str(refused.value)
    with pytest.raises(UserError, match="a run of search.py"):
        Run.resume(tmp_path, parse(), "retrain.py")
    for text in ("", "[]", '{"args": 3}'):
        (tmp_path / "args.json").write_text(text)
        with pytest.raises(UserError, match="not a run folder"):
            Run.resume(tmp_path, parse(), "search.py")


def test_auto_is_the_newest_run_of_this_experiment(tmp_path):
    for age, (name, script, argv) in enumerate(
        [
            ("new", "search.py", ["--batch_size", 32]),
            ("old", "search.py", ["--batch_size", 32]),
            ("other_batch", "search.py", []),
            ("other_script", "retrain.py", ["--batch_size", 32]),
            ("no_checkpoint", "search.py", ["--batch_size", 32]),
        ]
    ):
        run = Run.create(tmp_path / name, parse(*argv), script)
        if name != "no_checkpoint":
            run.checkpoint({})
            os.utime(run.folder / "checkpoint.pt", (1e9 - age * (1 if name in ("new", "old") else -1),) * 2)
        run.close()
    run = Run.resume("auto", parse("--batch_size", 32), "search.py", root=tmp_path)
    assert run.folder == tmp_path / "new"
    run.close()
    with pytest.raises(UserError, match="--resume auto"):
        Run.resume("auto", parse("--batch_size", 31), "search.py", root=tmp_path)


def test_history_after_the_checkpoint_is_cut_off(tmp_path):
    run = Run.create(tmp_path, parse(), "search.py")
    assert run.load() is None
    run.history({"epoch": 0})
    run.timing({"epoch": 0})
    run.checkpoint({"epoch": 1})
    run.history({"epoch": 1})
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"epo')  # killed in the middle of a line
    (tmp_path / ".checkpoint.pt.123.new.tmp").write_bytes(b"half")
    run.close()
    run = Run.resume(tmp_path, parse(), "search.py")
    assert run.load()["epoch"] == 1
    assert (tmp_path / "history.jsonl").read_text() == (tmp_path / "timing.jsonl").read_text() == '{"epoch": 0}\n'
    assert not list(tmp_path.glob(".*"))
    run.history({"epoch": 1})
    assert (tmp_path / "history.jsonl").read_text() == '{"epoch": 0}\n{"epoch": 1}\n'
    torch.save({"state_dict": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="not the checkpoint of a run"):
        run.load()
    run.close()


def test_tensorboard_events_do_not_double(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run.create(tmp_path, parse(), "search.py")
    for epoch in range(3):
        run.tensorboard.add_scalar("loss", epoch, epoch)
        run.history({"epoch": epoch})
        if epoch == 1:
            run.checkpoint({"epoch": 2})
    run.close()
    run = Run.resume(tmp_path, parse(), "search.py")
    run.load()
    run.tensorboard.add_scalar("loss", 20, 2)
    run.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(0, 0), (1, 1), (2, 20)]


def toy(args: argparse.Namespace) -> None:
    """A run of 4 epochs of 20 steps that draws random numbers: stands for a search."""
    run = Run.resume(args.resume, args, "toy.py") if args.resume else Run.create(args.save, args, "toy.py")
    utils.set_seed(args.seed)
    weights, start, first = torch.zeros(5, dtype=torch.float64), 0, 0
    if state := run.load():
        weights, start, first = state["weights"], state["epoch"], state["step"]
        utils.set_rng_state(state["rng"])
    with utils.Stop() as stop:
        for epoch in range(start, args.epochs):
            for step in range(first, 20):
                weights = weights * 0.9 + torch.randn(5, dtype=torch.float64) + random.random()
                time.sleep(0.005)
                state = {"weights": weights, "epoch": epoch, "step": step + 1, "rng": utils.rng_state()}
                if step % 5 == 4:
                    run.checkpoint(state)
                if stop.agreed():
                    run.checkpoint(state)
                    stop.exit(run.resume_command)
            first = 0
            run.history({"epoch": epoch, "sum": weights.sum().item()})
            run.checkpoint(state | {"epoch": epoch + 1, "step": 0})
    run.close()


def start_toy(tmp_path: Path, folder: Path) -> int:
    argv = ["--resume", str(folder)] if (folder / "args.json").exists() else ["--save", str(folder)]
    return fork(lambda: utils.cli(toy, parser(), argv), tmp_path / "out")


def test_killed_and_resumed_run_is_the_uninterrupted_one(tmp_path):
    assert exit_code(start_toy(tmp_path, tmp_path / "whole")) == 0
    draw, kills, code = random.Random(2), 0, None
    while code != 0:
        pid = start_toy(tmp_path, tmp_path / "killed")
        time.sleep(0.02 + 0.15 * draw.random())
        number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        os.kill(pid, number)
        code = exit_code(pid)
        kills += code != 0
        assert code in (0, -signal.SIGKILL, -signal.SIGTERM, 143), (tmp_path / "out").read_text()
    assert kills >= 3
    for name in ("history.jsonl",):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()
    states = [utils.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed")]
    assert same(*states)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_the_run_with_the_command_to_go_on(tmp_path, number, code):
    folder = tmp_path / "run"
    pid = start_toy(tmp_path, folder)
    while not (folder / "checkpoint.pt").exists():
        time.sleep(0.01)
    os.kill(pid, number)
    assert exit_code(pid) == code
    assert (tmp_path / "out").read_text().splitlines()[-1] == f"python toy.py --resume {folder}"
    assert utils.load_checkpoint(folder / "checkpoint.pt")["epoch"] < 4


def test_second_signal_stops_at_once(tmp_path):
    def stubborn() -> None:
        with utils.Stop() as stop:
            while not stop.signal:
                time.sleep(0.01)
            (tmp_path / "first").touch()
            time.sleep(60)

    pid = fork(stubborn, tmp_path / "out")
    time.sleep(0.1)
    os.kill(pid, signal.SIGINT)
    while not (tmp_path / "first").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    assert exit_code(pid) == -signal.SIGINT


# --- processes --------------------------------------------------------------------------------------------------------

RANKS = """
import os, signal, sys, time, torch, utils, argparse
from pathlib import Path

def main(args):
    rank, size = utils.start_distributed(torch.device("cpu"))
    assert (rank, size) == (int(os.environ["RANK"]), 2) and utils.is_main() == (rank == 0)
    run = utils.Run.create(args.save, args, "ranks.py")
    params = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)] + [torch.nn.Parameter(torch.zeros(4).double())]
    params[0].grad, params[2].grad = torch.full((2, 3), rank + 1.0), torch.full((3, 2), float(rank)).t()
    params[3].grad = torch.full((4,), rank * 2.0).double()
    utils.average_gradients(params)
    grads = [p.grad.unique().tolist() for p in params if p.grad is not None]
    assert params[1].grad is None and grads == [[1.5], [0.5], [1.0]], grads
    assert utils.reduce_sum(torch.tensor([rank + 1])).item() == 3
    utils.assert_same({"alpha": torch.ones(3), "active": [[True, False]]})
    try:
        utils.assert_same({"alpha": torch.ones(3), "beta": torch.tensor(float(rank))})
        raise SystemExit("not seen")
    except utils.Diverged as error:
        assert "beta" in str(error) and "alpha" not in str(error)
    average = utils.Average("cpu")
    logits = torch.arange(10.0, 0, -1).expand(5, 10)
    average.add(torch.tensor(float(rank)), logits, torch.tensor([0, 0, 0, 4, 9 * rank]))
    assert average.read() == (0.5, 70.0, 90.0, 10), average.read()
    run.tensorboard.add_scalar("loss", 1, 1)
    run.history({"epoch": 0})
    run.checkpoint({"rank": rank})
    assert run.load()["rank"] == 0
    with utils.Stop() as stop:
        for step in range(10**9):
            if step == 3 and rank == 1 and args.note == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            if step == 3 and rank == 1 and args.note == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if stop.agreed():
                Path(args.save, f"stopped{rank}").write_text(str(step))
                stop.exit(run.resume_command)

parser = argparse.ArgumentParser()
utils.add_run_arguments(parser)
utils.cli(main, parser)
"""


def torchrun(tmp_path: Path, *argv: str) -> subprocess.CompletedProcess:
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(tmp_path / "ranks.py"), "--save", str(tmp_path / "run"), *argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )


def test_two_processes_agree_and_stop_at_the_same_step(tmp_path):
    result = torchrun(tmp_path, "--note", "stop")
    steps = [(tmp_path / "run" / f"stopped{rank}") for rank in range(2)]
    assert all(step.exists() for step in steps), result.stderr
    assert steps[0].read_text() == steps[1].read_text() == "3"
    assert f"torchrun --nproc_per_node 2 ranks.py --resume {tmp_path / 'run'}" in result.stdout
    assert (tmp_path / "run" / "history.jsonl").read_text() == '{"epoch": 0}\n'


def test_killed_rank_ends_the_run_with_a_message(tmp_path):
    begin = time.time()
    result = torchrun(tmp_path, "--note", "die")
    assert result.returncode != 0 and time.time() - begin < 60
    assert "lost another process of this run" in result.stderr, result.stderr
    assert utils.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["rank"] == 0


def test_without_torchrun_there_is_one_process():
    assert utils.start_distributed(torch.device("cpu")) == (0, 1)
    assert utils.is_main() and utils.world_size() == 1
    param = torch.nn.Parameter(torch.ones(1))
    param.grad = torch.ones(1)
    utils.average_gradients([param])
    utils.assert_same({"a": torch.ones(1)})
    assert param.grad.item() == 1 and utils.reduce_sum(torch.tensor(2)).item() == 2


# --- meters -----------------------------------------------------------------------------------------------------------


def test_average_is_over_images_not_batches():
    average = utils.Average("cpu")
    assert average.read().count == 0
    logits = torch.arange(10.0, 0, -1).expand(3, 10)
    average.add(torch.tensor(1.0), logits, torch.tensor([0, 0, 4]))
    average.add(torch.tensor(5.0), logits[:1], torch.tensor([9]))
    assert average.read() == (2.0, 50.0, 75.0, 4)
    few = utils.Average("cpu")
    few.add(torch.tensor(1.0), torch.eye(3), torch.tensor([0, 1, 0]))
    assert few.read().top5 is None and few.read().top1 == pytest.approx(200 / 3)


def test_progress_is_silent_without_a_terminal(capfd):
    bar = utils.progress(range(3), desc="epoch 1")
    for _ in bar:
        bar.set_postfix(loss=1)
    assert capfd.readouterr().err == ""
    assert utils.peak_memory_mb(torch.device("cpu")) > 10
