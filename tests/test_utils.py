"""Command line, errors, devices, processes, meters."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import utils
from lib import cli, distributed
from lib.cli import UserError

ROOT = Path(__file__).resolve().parent.parent


def get_parser() -> cli.Parser:
    parser = cli.Parser()
    cli.add_run_arguments(parser)
    parser.set_defaults(amp=False, tf32=True)
    parser.add_argument("--batch_size", type=int, default=64, help="50%% of what fits")
    parser.add_argument("--epochs", type=cli.number(int, 1, 9), default=4)
    parser.add_argument("--momentum", type=cli.number(float, 0, below=1), default=0.9)
    parser.add_argument("--add_layers", action="append", type=int, default=[0])
    parser.add_argument("--cutout", action="store_true")
    return parser


def parse(*argv: object) -> argparse.Namespace:
    return cli.parse(get_parser(), [str(a) for a in argv])


# ---- command line ---------------------------------------------------------------------------------------------------


def test_given_arguments_are_those_of_the_command_line():
    args = parse("--add_layers", 6, "--add_layers=12", "--cutout", "--epochs", 4, "--resume_path", "logs/x")
    assert args.given == {"add_layers", "cutout", "epochs", "resume"}
    assert args.add_layers == [0, 6, 12] and args.resume == "logs/x" and args.batch_size == 64
    assert parse("--resume").resume == "auto" and parse().given == set()


def test_help_prints(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "50% of what fits (default: 64)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--epochs", 0], "0 is out of range: expected at least 1 and at most 9"),
        (["--momentum", 1], "1 is out of range: expected at least 0 and below 1"),
        (["--epochs", "x"], "invalid int value: 'x'"),
        (["--btch", 3], "unrecognized arguments: --btch 3"),
    ],
)
def test_wrong_argument_gets_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and message in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    "error, code, text",
    [
        (UserError("data: 3 given,\n expected 4"), 2, "data: 3 given, expected 4"),
        (distributed.Diverged("loss is nan in epoch 3, step 4"), 1, "loss is nan"),
        (distributed.RankLost("lost"), 1, "lost"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(errno.EACCES, "Permission denied", "logs"), 2, "logs: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "best.pt"), 1, "disk full: best.pt not written"),
        (torch.OutOfMemoryError("tried to allocate"), 1, "a smaller --batch_size needs less"),
    ],
)
def test_errors_are_one_line_and_a_code(capsys, error, code, text):
    def main(args: argparse.Namespace) -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run_script(main, get_parser(), [])
    message = capsys.readouterr().err
    assert stop.value.code == code and text in message and message.count("\n") == 1


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run_script(lambda args: 1 / 0, get_parser(), [])


def test_device_that_is_not_there_is_named():
    assert utils.choose_device(parse("--device", "cpu")) == torch.device("cpu")
    assert utils.choose_device(parse()).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for argv in (["--gpu", 99], ["--device", "cuda:99"], ["--device", "toaster"]):
        with pytest.raises(UserError, match="cpu"):
            utils.choose_device(parse(*argv))


# ---- processes -------------------------------------------------------------------------------------------------------

RANKS = """
import os, signal, torch, utils
from lib import cli, distributed, runs
from pathlib import Path

def main(args):
    distributed.start_distributed(torch.device("cpu"))
    rank, size = distributed.rank(), distributed.world_size()
    assert (rank, size) == (int(os.environ["RANK"]), 2) and distributed.is_main() == (rank == 0)
    run = runs.Run(args, "ranks.py", "x")
    run.keep({"average": utils.Average("cpu")})
    params = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)] + [torch.nn.Parameter(torch.zeros(4).double())]
    params[0].grad, params[2].grad = torch.full((2, 3), rank + 1.0), torch.full((3, 2), float(rank)).t()
    params[3].grad = torch.full((4,), rank * 2.0).double()
    distributed.average_gradients(params)
    grads = [p.grad.unique().tolist() for p in params if p.grad is not None]
    assert params[1].grad is None and grads == [[1.5], [0.5], [1.0]], grads
    assert distributed.reduce_sum(torch.tensor([rank + 1])).item() == 3
    distributed.assert_same({"alpha": torch.ones(3), "active": [[True, False]]})
    try:
        distributed.assert_same({"alpha": torch.ones(3), "beta": torch.tensor(float(rank))})
        raise SystemExit("not seen")
    except distributed.Diverged as error:
        assert "beta" in str(error) and "alpha" not in str(error)
    average = utils.Average("cpu")
    logits = torch.arange(10.0, 0, -1).expand(5, 10)
    average.add(torch.tensor(float(rank)), logits, torch.tensor([0, 0, 0, 4, 9 * rank]))
    assert average.read() == (0.5, 70.0, 90.0, 10), average.read()
    run.end_epoch({"epoch": 0})
    try:
        distributed.together(torch.nn.functional.relu, "not a tensor of the network")
    except TypeError:
        pass
    try:
        distributed.together(torch.mm, torch.ones(2, 3), torch.ones(2, 3))
    except RuntimeError as error:
        assert not isinstance(error, distributed.RankLost)  # an error of the network's is no lost process
    for step in range(10**9):
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if run._signals.arrived():
            Path(args.save, f"stopped{rank}").write_text(str(step))
            run._signals.leave(run.resume_command)

parser = cli.Parser()
cli.add_run_arguments(parser)
parser.set_defaults(epochs=4, batch_size=2)
cli.run_script(main, parser)
"""


def test_two_processes_agree_and_stop_at_the_same_step(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(tmp_path / "ranks.py"), "--save", str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,
    )
    steps = [(tmp_path / "run" / f"stopped{rank}") for rank in range(2)]
    assert all(step.exists() for step in steps), result.stderr
    assert steps[0].read_text() == steps[1].read_text() == "3"
    assert f"torchrun --nproc_per_node 2 ranks.py --resume {tmp_path / 'run'}" in result.stdout
    assert (tmp_path / "run" / "history.jsonl").read_text() == '{"epoch": 0}\n'


def test_without_torchrun_there_is_one_process():
    distributed.start_distributed(torch.device("cpu"))
    assert distributed.rank() == 0
    assert distributed.is_main() and distributed.world_size() == 1
    param = torch.nn.Parameter(torch.ones(1))
    param.grad = torch.ones(1)
    distributed.average_gradients([param])
    distributed.assert_same({"a": torch.ones(1)})
    assert param.grad.item() == 1 and distributed.reduce_sum(torch.tensor(2)).item() == 2


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
    bar = cli.progress(range(3), desc="epoch 1")
    for _ in bar:
        bar.set_postfix(loss=1)
    assert capfd.readouterr().err == ""
    assert distributed.peak_memory_mb() > 10


# --- schedules --------------------------------------------------------------------------------------------------------


def test_learning_rates():
    assert utils.cosine_rate(0, 50, 0.025, 0.001) == 0.025
    assert utils.cosine_rate(25, 50, 0.025, 0.001) == pytest.approx(0.013)
    rates = [utils.linear_rate(epoch, 250, 0.5) for epoch in (0, 245, 249)]
    assert rates == pytest.approx([0.5, 0.5 / 245, 0.5 / 1225])


def test_retrainings_ramp_on_imagenet_multiplies_the_scheduled_rate():
    args = argparse.Namespace(warmup_epochs=5, batch_size=1024)
    rates = [utils.warmed_up(utils.linear_rate(epoch, 250, 0.5), epoch, args) for epoch in range(6)]
    assert rates == pytest.approx([0.1, 0.19918, 0.29755, 0.39510, 0.49184, 0.48980], abs=5e-6)
    args.batch_size = 256
    assert utils.warmed_up(0.5, 0, args) == 0.5
