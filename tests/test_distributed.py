"""Searches and retraining on two processes (torchrun, gloo): the same as on one, and none hangs when one is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import history
from two_processes import twenty_steps

from lib import checkpoints

ROOT = Path(__file__).resolve().parent.parent
TINY = "--dataset folder --image_size 16 --init_channels 2 --layers 3 --batch_size 4 --report_freq 3 --device cpu"


def torchrun(*command) -> subprocess.Popen:
    """Start a script on two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment, pipe = os.environ | {"OMP_NUM_THREADS": "1"}, subprocess.PIPE
    return subprocess.Popen(
        [*launch, *map(str, command)], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def finished(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def pid_of(rank: int, launcher: subprocess.Popen) -> int:
    """The process of a rank, among the children of torchrun (Linux)."""
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise AssertionError(f"no rank {rank}")


def kill_rank(rank: int, process: subprocess.Popen, folder: Path) -> str:
    """Kill a rank once there is a checkpoint; returns what the run wrote to stderr."""
    while not (folder / "checkpoint.prev.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(pid_of(rank, process), signal.SIGKILL)
    _, err = process.communicate(timeout=60)  # the whole run ends within a minute
    assert process.returncode != 0
    return err


def test_two_processes_search_like_one_with_twice_the_batch(tmp_path):
    """BatchNorm in evaluation mode and float64: see two_processes.py; a signal to one of them then ends both."""
    process = torchrun("tests/two_processes.py", "--save", tmp_path / "run")
    one = twenty_steps(8)
    out, err = process.communicate(timeout=240)
    assert [(tmp_path / f"run/stopped{rank}").read_text() for rank in range(2)] == ["3", "3"], err
    assert f"torchrun --nproc_per_node 2 two_processes.py --resume {tmp_path / 'run'}" in out
    assert history(tmp_path / "run") == [{"epoch": 0}]
    two = json.loads((tmp_path / "run/record.json").read_text())
    assert two["active"] == one["active"] and len({str(active) for active in one["active"]}) == 10  # every second step
    assert two["genotype"] == one["genotype"]
    for losses in ("train", "arch"):
        assert len(one[losses]) == 20 and two[losses] == pytest.approx(one[losses], rel=1e-4)


LONG = [("search.py", "", 0), ("retrain.py", "--arch DARTS_V2", 1), ("retrain.py", "--arch DARTS_V2", 0)]


@pytest.mark.parametrize(
    ("script", "more", "rank"), [("search.py", "", 1), *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]
)
def test_a_killed_rank_ends_the_run_and_leaves_a_whole_checkpoint(script, more, rank, pictures, tmp_path):
    folder = tmp_path / "run"
    flags = f"{TINY} --epochs 1000 --checkpoint_freq 1 --quiet".split()
    process = torchrun(script, "--data", pictures, "--save", folder, *flags, *more.split())
    err = kill_rank(rank, process, folder)
    assert f"{script}: lost another process of this run; --resume goes on from its checkpoint" in err
    state = checkpoints.read_weights(folder / "checkpoint.pt")  # would not take the one before
    assert state["epoch"] + state["step"] > 0
    assert json.loads((folder / "args.json").read_text())["script"] == script


@pytest.mark.long
@pytest.mark.parametrize(("script", "more"), [("search.py", "--gumbel"), ("retrain.py", "--arch DARTS_V2")])
def test_a_run_that_lost_a_rank_goes_on_as_if_nothing_had_happened(script, more, pictures, tmp_path):
    flags = [*f"{TINY} --epochs 2 --checkpoint_freq 1".split(), *more.split(), "--data", pictures]
    finished(torchrun(script, "--save", tmp_path / "whole", *flags))
    kill_rank(1, torchrun(script, "--save", tmp_path / "killed", *flags), tmp_path / "killed")
    finished(torchrun(script, "--resume", tmp_path / "killed"))
    histories = [(tmp_path / run / "history.jsonl").read_text().splitlines() for run in ("whole", "killed")]
    assert len(histories[0]) == 2 and histories[0] == histories[1]
    assert (tmp_path / "whole" / "genotype.txt").read_text() == (tmp_path / "killed" / "genotype.txt").read_text()
