"""The command line that every script has: errors in one line, numbers with limits, common flags, a progress bar."""

from __future__ import annotations

import argparse
import errno
import math
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lib.distributed import Diverged, RankLost, is_main, leave_distributed

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit on file sizes (ulimit -f)
OF_A_RUN = {"log.txt", "args.json", "genotype.txt", "history.jsonl", "timing.jsonl", "checkpoint.pt", "best.pt"}
SMALLER = "a smaller --batch_size needs less"
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

    def ignore(self, *flags: str) -> None:
        """Take these flags of the published scripts, with or without a value, and say that they have no effect."""
        for flag in flags:
            self.add_argument(flag, dest="ignored", nargs="?", action=_Ignored, help=argparse.SUPPRESS)

    def refuse(self, message: str, *flags: str) -> None:
        """Stop with this message if one of these flags is given."""
        for flag in flags:
            self.add_argument(flag, dest="refused", nargs="?", action=_Refused, const=message, help=argparse.SUPPRESS)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (--help lists all arguments)\n")


class _Ignored(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or []), option_string])


class _Resume(argparse.Action):
    """Stores its value; a bare --resume beside --resume_path FOLDER, as DDSAS' commands have them, means FOLDER."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if values != self.const or not getattr(namespace, self.dest, None):
            setattr(namespace, self.dest, values)


class _Refused(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        parser.error(f"{option_string}: {self.const}")


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


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every script that makes a run folder."""
    add = parser.add_argument_group("run").add_argument
    add("--save", metavar="NAME", help="name of the run folder (default: what is run and the time)")
    add("--note", default="", help="free text for the name of the run folder")
    text = "go on with this run; auto: the newest run of this script with these arguments"
    folder = {"metavar": "RUN_FOLDER|auto", "nargs": "?", "const": "auto", "action": _Resume}
    add("--resume", "--resume_path", **folder, help=text)
    add("--device", default="auto", help="auto (cuda if there, else cpu), cpu, cuda, cuda:N")
    add("--gpu", type=number(int, 0), metavar="N", help="use GPU number N, the same as --device cuda:N")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0)
    add("--workers", type=number(int, 0, 1000), default=2, help="processes that load images, where images are files")
    add("--report_freq", type=number(int, 1), default=50, metavar="STEPS", help="steps between two lines of the log")
    text = "also write a checkpoint every so many steps inside an epoch (0: at the end of epochs only)"
    add("--checkpoint_freq", type=number(int, 0), default=0, metavar="STEPS", help=text)
    add("--quiet", action="store_true", help="no bars, next to nothing on the screen; log.txt stays complete")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """parse_args; `args.given` is the set of arguments that were on the command line (resuming a run needs it)."""
    args = parser.parse_args(argv)
    blank = argparse.Namespace(**dict.fromkeys(vars(args)))  # argparse keeps values that are there: None = not given
    args.given = {name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None}
    for (flag, value), defaults in getattr(parser, "defaults_for", {}).items():
        if getattr(args, flag) == value:
            vars(args).update({name: default for name, default in defaults.items() if name not in args.given})
    if (ignored := vars(args).pop("ignored", None)) and is_main():
        print(f"warning: of the published scripts, without effect here: {' '.join(ignored)}", file=sys.stderr)
    vars(args).pop("refused", None)
    args.given -= {"ignored", "refused"}
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
        _fail(f"out of GPU memory, {SMALLER} ({error})", 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in NO_MEMORY):
            raise
        _fail(f"out of memory, a smaller --batch_size or network needs less ({error})", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:
        if error.errno in DISK_FULL:
            name = error.filename or "a file"
            _fail(f"disk full: {name} not written, the last checkpoint is whole; free space and --resume", 1)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            _fail(f"{error.filename}: {error.strerror}", 2)
        if error.errno == errno.ENOENT and Path(error.filename or "").name in OF_A_RUN:
            _fail(f"{error.filename} is not there any more: was the run folder deleted during the run?", 1)
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
