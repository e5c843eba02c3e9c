"""The command line that every script has: errors in one line, numbers with limits, common flags, a progress bar."""

from __future__ import annotations

import argparse
import errno
import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lib.distributed import Diverged, RankLost, is_main, leave_distributed, rank, world_size

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit on file sizes (ulimit -f)
# Arguments that a resumed run may change: they move the work to another device or show it differently.
HARMLESS = {"resume", "note", "device", "gpu", "workers", "report_freq", "checkpoint_freq", "quiet"}
NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")  # what PyTorch says on a CPU


class UserError(Exception):
    """A mistake of the user, in one line: what was given, what was expected, what to do. Exit code 2."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose --help shows the defaults."""

    def __init__(self, description: str | None = None) -> None:
        super().__init__(description=description, formatter_class=_Help)
        self.defaults_for: dict[tuple[str, str], dict[str, Any]] = {}

    def set_defaults_for(self, flag: str, value: str, **defaults: Any) -> None:
        """Other defaults where ``flag`` has this value; what stands on the command line counts more (see `parse`)."""
        self.defaults_for[flag, value] = defaults

    def ignore(self, *flags: str, refusal: str | None = None) -> None:
        """Take these flags of the published scripts, with or without a value, and say that they have no effect."""
        for flag in flags:
            self.add_argument(flag, dest="ignored", nargs="?", action=_Ignored, const=refusal, help=argparse.SUPPRESS)

    def refuse(self, message: str, *flags: str) -> None:
        """Stop with this message if one of these flags is given."""
        self.ignore(*flags, refusal=message)

    def flags(self, title: str) -> Callable[..., None]:
        """A function that adds a flag to the group of this title: add(name, kind, default, help, ...).

        ``kind`` is bool (a switch), a list (of choices), or a type such as `number` makes; ``default`` its value if the
        flag is not given.
        """
        group = self.add_argument_group(title)

        def add(name: str, kind: Any, default: Any, text: str, **more: Any) -> None:
            values = {"choices" if isinstance(kind, list) else "type": kind, "default": default}
            more |= {"action": "store_true"} if kind is bool else values
            group.add_argument(*name.split(), help=text, **more)

        return add

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (--help lists all arguments)\n")


class _Ignored(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if self.const:
            parser.error(f"{option_string}: {self.const}")
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or []), option_string])


class _Resume(argparse.Action):
    """Stores its value; a bare --resume beside --resume_path FOLDER, as DDSAS' commands have them, means FOLDER."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if values != self.const or not getattr(namespace, self.dest, None):
            setattr(namespace, self.dest, values)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something, and keeps the lines of the script's docstring."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False, ""):
            return action.help or ""
        return super()._get_help_string(action) if action.help else "(default: %(default)s)"


LARGEST = {int: 2**32 - 1, float: 1e30}  # that any flag takes: steps of optimizers must fit float32


def number(kind: type, low: float, high: float = math.inf, below: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: an int (10.0 is one too) or float with low <= value <= high and value < below."""

    def convert(text: str) -> Any:
        value = kind(float(text)) if kind is int and float(text).is_integer() else kind(text)
        if not low <= value <= min(high, LARGEST[kind]) or not value < below:
            limit = f" and below {below}" if below < math.inf else f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range: expected at least {low}{limit}")
        return value

    convert.__name__ = kind.__name__
    return convert


# kinds of numbers that flags take
SIZE, COUNT = number(int, 1), number(int, 0)
RATE, SHARE, PROBABILITY = number(float, 0), number(float, 0, 1), number(float, 0, below=1)


def add_data_arguments(parser: Parser, datasets: list[str]) -> None:
    """Which images, and how they are read and augmented."""
    add = parser.flags("data")
    folder = "folder of the datasets, or of your own images"
    add("--data --tmp_data_dir", str, ".data", folder, dest="data", metavar="DIR")
    add("--dataset", datasets, "cifar10", "which images")
    add("--image_size", number(int, 8, 10_000), None, "for folder and imagenet", metavar="PIXELS")
    add("--bad_images", ["stop", "skip"], "stop", "what unreadable images cause")
    add("--cutout", bool, False, "erase a random square of every training image")
    add("--cutout_length", SIZE, None, "its side; default: half of the image's, 16 for CIFAR", metavar="PIXELS")


def add_training_arguments(parser: Parser) -> None:
    """Size of a network, and how its weights are trained."""
    add = parser.flags("network and training")
    add("--init_channels", SIZE, 16, "channels of the first cells", metavar="C")
    add("--layers", number(int, 1, 1000), 8, "number of cells")
    add("--batch_size", number(int, 2), 64, "per process")
    add("--epochs", SIZE, 50, "passes over the training images")
    add("--learning_rate", RATE, 0.025, "of SGD, at epoch 0")
    add("--learning_rate_min", RATE, 0.0, "of SGD, where the cosine ends")
    add("--momentum", PROBABILITY, 0.9, "of SGD")
    add("--weight_decay", RATE, 3e-4, "of SGD")
    add("--grad_clip", RATE, 5.0, "largest norm of the weights' gradient; 0: any")
    add("--warmup_epochs", COUNT, 0, "used with batches of more than 256")
    add("--amp", bool, False, "bfloat16 on CUDA (less memory, not the same digits)")
    text = "on CUDA compute float32 as TF32, as PyTorch's convolutions do; --no-tf32: in full"
    parser.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True, help=text)


def add_search_arguments(parser: Parser) -> None:
    """How the architecture parameters of a supernet are trained."""
    add = parser.flags("training of the architecture")
    add("--arch_learning_rate", RATE, 3e-4, "of Adam")
    add("--arch_weight_decay", RATE, 1e-3, "of Adam")
    add("--arch_grad_clip", RATE, 0.0, "largest norm of the gradient of alpha, and of that of beta; 0: any")
    add("--unrolled", bool, False, "second-order gradient of the architecture (DARTS), 3x slower")
    add("--train_portion", SHARE, 0.5, "of the training images, for the weights; the rest is for the architecture")
    add("--drop_path_prob", PROBABILITY, 0.0, "of the published commands; without effect, a supernet has none")
    add("--flops_weight", RATE, 0.0, "weight of the expected multiply-adds in the loss", metavar="LAMBDA")
    add("--checkpoint_cells", bool, False, "nearly half the memory: cells are computed again in the backward pass")
    add("--plain", bool, False, "compute as the definitions say, without fast.py: slower, the same up to rounding")


def add_run_arguments(parser: Parser) -> None:
    """Where a run is kept, where it computes, what it says."""
    add = parser.flags("run")
    add("--save", str, None, "name of the run folder (default: what is run and the time)", metavar="NAME")
    add("--note", str, "", "free text for the name of the run folder")
    text = "go on with this run; auto: the newest run of this script with these arguments"
    folder = {"metavar": "RUN_FOLDER|auto", "nargs": "?", "const": "auto", "action": _Resume, "dest": "resume"}
    add("--resume --resume_path", str, None, text, **folder)
    add("--device", str, "auto", "auto (cuda if there, else cpu), cpu, cuda, cuda:N")
    add("--gpu", COUNT, None, "use GPU number N, the same as --device cuda:N", metavar="N")
    add("--seed", number(int, 0, 2**32 - 1), 0, "of all random numbers")
    add("--workers", number(int, 0, 1000), 2, "processes that load images, where images are files")
    add("--report_freq", SIZE, 50, "steps between two lines of the log", metavar="STEPS")
    text = "also write a checkpoint every so many steps inside an epoch (0: at the end of epochs only)"
    add("--checkpoint_freq", COUNT, 0, text, metavar="STEPS")
    add("--quiet", bool, False, "no bars, next to nothing on the screen; log.txt stays complete")


def add_cifar100(parser: Parser) -> None:
    """P-DARTS' name for CIFAR-100."""
    text = "same as --dataset cifar100"
    parser.add_argument(
        "--cifar100", dest="dataset", action="store_const", const="cifar100", default=argparse.SUPPRESS, help=text
    )


def data_arguments(args: argparse.Namespace, device: torch.device) -> dict:
    """What the functions of lib/data.py that open a dataset are told by the arguments that all scripts have."""
    same = ("batch_size", "seed", "image_size", "workers", "bad_images", "quiet")
    cutout = args.cutout_length if args.cutout else 0
    given = {"name": args.dataset, "root": args.data, "cutout": cutout, "device": device}
    given |= {"rank": rank(), "world_size": world_size()}
    return given | {name: getattr(args, name) for name in same}


def new_folder(stem: str) -> Path:
    """STEM-TIME, or STEM-TIME-2, ... where another run began in the same second."""
    stem = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(path for n in itertools.count(1) if not (path := Path(stem if n == 1 else f"{stem}-{n}")).exists())


def prefix_save(args: argparse.Namespace, kind: str) -> None:
    """P-DARTS' --save is the beginning of the run folder's name: make it SAVE + kind-NOTE-TIME."""
    if args.resume is not None:
        args.given -= {"save"}  # the run keeps the folder it has
    else:
        folder = str(new_folder(f"{args.save}{kind}-{args.note}"))
        args.save = folder if "/" in folder else f"./{folder}"


def parse(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """parse_args; `args.given` is the set of arguments that were on the command line (resuming a run needs it)."""
    args = parser.parse_args(argv)
    blank = argparse.Namespace(**dict.fromkeys(vars(args)))  # argparse keeps values that are there: None = not given
    args.given = {name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None}
    for (flag, value), defaults in parser.defaults_for.items():
        if getattr(args, flag) == value:
            vars(args).update({name: default for name, default in defaults.items() if name not in args.given})
    if (ignored := vars(args).pop("ignored", None)) and is_main():
        print(f"warning: of the published scripts, without effect here: {' '.join(ignored)}", file=sys.stderr)
    args.given -= {"ignored"}
    return args


def run_script(main: Callable[[argparse.Namespace], Any], parser: Parser, argv: list[str] | None = None) -> None:
    """Parse, run main(args), and turn what users can cause into one line on stderr and an exit code."""
    args = parse(parser, argv)
    threading.excepthook = _thread_failed
    try:
        main(args)
    except UserError as error:
        _fail(str(error), 2)
    except (Diverged, RankLost) as error:
        _fail(str(error), 1)
    except torch.OutOfMemoryError as error:
        _fail(f"out of GPU memory, a smaller --batch_size needs less ({error})", 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in NO_MEMORY):
            raise
        _fail(f"out of memory, a smaller --batch_size or network needs less ({error})", 1)
    except BrokenPipeError:  # who reads the output has seen enough, as `| head` has
        sys.stdout = None
        sys.exit(1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:
        if error.errno in DISK_FULL:
            name = error.filename or "a file"
            _fail(f"disk full: {name} not written, the last checkpoint is whole; free space and --resume", 1)
        if error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            _fail(f"{error.filename}: {error.strerror}", 2)
        raise
    leave_distributed()


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """Say nothing of a full disk: TensorBoard's thread passes that error on to the main thread, which reports it."""
    if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in DISK_FULL):
        threading.__excepthook__(args)


def _fail(message: str, code: int) -> None:
    print(f"{Path(sys.argv[0]).name}: {' '.join(printable(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def printable(text: object) -> str:
    """The text without control characters, which a hostile file may have put into an error message."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def progress(iterable: Iterable, quiet: bool = False, **kwargs: Any) -> tqdm:
    """A tqdm bar on a terminal; without one, with --quiet and on other ranks just the items. Has set_postfix(...)."""
    disable = True if quiet or not is_main() else None  # None: off unless stderr is a terminal
    return tqdm(iterable, disable=disable, dynamic_ncols=True, leave=False, **kwargs)
