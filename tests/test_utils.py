"""Command line, errors, devices, processes, meters."""

import argparse
import errno

import pytest
import torch

import utils
from lib import cli, distributed
from lib.cli import UserError


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


def test_given_arguments_are_those_of_the_command_line():
    args = parse("--add_layers", 6, "--add_layers=12", "--cutout", "--epochs", 4, "--resume_path", "logs/x")
    assert args.given == {"add_layers", "cutout", "epochs", "resume"}
    assert args.add_layers == [0, 6, 12] and args.resume == "logs/x" and args.batch_size == 64
    assert parse("--resume").resume == "auto" and parse().given == set()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--epochs", 0], "0 is out of range: expected at least 1 and at most 9"),
        (["--momentum", 1], "1 is out of range: expected at least 0 and below 1"),
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
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        cli.run_script(lambda args: 1 / 0, get_parser(), [])


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
