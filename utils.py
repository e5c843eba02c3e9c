"""What every script shares: errors, the command line, devices, seeds, processes, meters. No networks, no data."""

from __future__ import annotations

import argparse
import errno
import hashlib
import math
import os
import random
import resource
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit on file sizes (ulimit -f)
OF_A_RUN = {"log.txt", "args.json", "genotype.txt", "history.jsonl", "timing.jsonl", "checkpoint.pt", "best.pt"}
SMALLER = "a smaller --batch_size needs less"
TIMEOUT = timedelta(seconds=60)  # a collective that waits longer than this for a lost rank ends the run
# Arguments that a resumed run may change: they move the work to another device or show it differently.
HARMLESS = {"resume", "note", "device", "gpu", "workers", "report_freq", "checkpoint_freq", "quiet"}


class UserError(Exception):
    """A mistake of the user, in one line: what was given, what was expected, what to do. Exit code 2."""


class Diverged(Exception):
    """A loss, gradient or weight is not finite, or the ranks differ; the message says where. Exit code 1."""


class OutOfMemory(Exception):
    """The GPU's memory is too small; the message says what fits. Exit code 1."""


class RankLost(Exception):
    """Another process of the run is gone. Exit code 1."""


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
NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")  # what PyTorch says on a CPU


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


def cli(main: Callable[[argparse.Namespace], Any], parser: Parser, argv: list[str] | None = None) -> None:
    """Parse, run main(args), and turn what users can cause into one line on stderr and an exit code."""
    args = parse(parser, argv)
    threading.excepthook = _thread_failed
    try:
        main(args)
    except UserError as error:
        _fail(str(error), 2)
    except (Diverged, RankLost, OutOfMemory) as error:
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


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that --device and --gpu name; under torchrun every process takes the GPU of its local rank.

    --device cpu counts more than --gpu, so that it can be put behind any command.
    """
    name = args.device if args.gpu is None or args.device == "cpu" else f"cuda:{args.gpu}"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and not 0 <= (device.index or 0) < (count := torch.cuda.device_count()):
            raise UserError(f"{name} is not there: {count} GPUs found; --device cpu works everywhere")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); --device cpu works") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def cuda_settings(tf32: bool) -> None:
    """How a GPU computes; without effect on a CPU. Once, before the first step.

    cuDNN tries its algorithms when it meets a new shape and keeps the fastest. ``tf32``: convolutions and matrix
    products of float32 on tensor cores (Ampere and later), which read 10 bits of each number's fraction instead of 23.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device; to a GPU from pinned memory, so that nothing waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def set_seed(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """The state of the global generators, as plain values and tensors that weights_only loading accepts."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None  # of the device that this process uses
    state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    return state | {"torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict) -> None:
    """Restore what rng_state() returned; a GPU's state only where there is a GPU."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def start_distributed(device: torch.device) -> tuple[int, int]:
    """Join the processes of torchrun (nccl on cuda, gloo on cpu); (rank, world size), which is (0, 1) without it."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return dist.get_rank(), dist.get_world_size()


def leave_distributed() -> None:
    """Leave what start_distributed joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes that work together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True for rank 0, the one process that writes files and prints."""
    return os.environ.get("RANK", "0") == "0"


def together(collective: Callable, *args: Any) -> Any:
    """Call a collective of torch.distributed, or what contains one; RankLost if another rank does not answer."""
    try:
        return collective(*args)
    except RuntimeError as error:
        if world_size() == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:150]
        raise RankLost(f"lost another process of this run; --resume goes on from its checkpoint ({reason})") from None


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        together(dist.barrier)


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    if world_size() > 1:
        together(dist.all_reduce, tensor)
    return tensor


def average_gradients(params: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradients that exist by their mean over the ranks.

    Only active operations have a gradient, and these are the same on every rank.
    """
    grads = [param.grad for param in params if param.grad is not None]
    _in_one_call(grads, lambda flat: reduce_sum(flat).div_(world_size()))


def share_buffers(network: torch.nn.Module) -> None:
    """Give all ranks the buffers of rank 0: each rank's BatchNorm has statistics of its own images."""
    _in_one_call(list(network.buffers()), lambda flat: together(dist.broadcast, flat, 0))


def _in_one_call(tensors: list[torch.Tensor], collective: Callable[[torch.Tensor], Any]) -> None:
    """Change tensors by an in-place collective that sees all of one dtype as one flat tensor: one call per dtype."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str) if world_size() > 1 else ():
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        collective(flat)
        parts = zip(group, flat.split([tensor.numel() for tensor in group]), strict=True)
        torch._foreach_copy_(group, [part.view(tensor.shape) for tensor, part in parts])


def assert_same(named: dict[str, Any]) -> None:
    """Diverged, with the names, if tensors or arrays are not bit-identical on all ranks. Once per epoch is cheap."""
    if world_size() == 1:
        return
    arrays = {name: torch.as_tensor(value).detach().cpu().numpy() for name, value in named.items()}
    mine = {name: hashlib.sha256(str(a.shape).encode() + a.tobytes()).hexdigest() for name, a in arrays.items()}
    everyone: list[Any] = [None] * world_size()
    together(dist.all_gather_object, everyone, mine)
    if different := sorted(name for name in mine if any(other.get(name) != mine[name] for other in everyone)):
        raise Diverged(f"the ranks no longer agree on {', '.join(different)}")


class Metrics(NamedTuple):
    """Means over the images: loss, accuracies in percent (top5 is None for up to 5 classes); number of images."""

    loss: float
    top1: float
    top5: float | None
    count: int


class Average:
    """Running loss and accuracy. The sums stay on the device; only read() waits for it."""

    def __init__(self, device: torch.device | str) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
        self.has_top5 = True

    def add(self, loss: torch.Tensor, logits: torch.Tensor, y: torch.Tensor) -> None:
        """Add a batch: its mean loss, logits (N, classes), labels (N)."""
        self.has_top5 = logits.shape[1] > 5
        hits = logits.detach().topk(5 if self.has_top5 else 1).indices.eq(y[:, None])
        batch = [loss.detach() * len(y), hits[:, 0].sum(), hits.sum(), torch.full_like(self.sums[3], len(y))]
        self.sums += torch.stack([value.double() for value in batch])

    def state(self) -> torch.Tensor:
        """The sums over all ranks, for a checkpoint (a collective under torchrun)."""
        return reduce_sum(self.sums.clone())

    def load(self, sums: torch.Tensor) -> None:
        """Go on from what state() returned; rank 0 holds it alone, so that it counts once."""
        self.sums.copy_(sums if is_main() else torch.zeros_like(sums))

    def read(self) -> Metrics:
        """The means so far, over all ranks (a collective under torchrun)."""
        loss, top1, top5, count = self.state().tolist()
        n = max(count, 1)
        return Metrics(loss / n, 100 * top1 / n, 100 * top5 / n if self.has_top5 else None, int(count))


def progress(iterable: Iterable, quiet: bool = False, **kwargs: Any) -> tqdm:
    """A tqdm bar on a terminal; without one, with --quiet and on other ranks just the items. Has set_postfix(...)."""
    disable = True if quiet or not is_main() else None  # None: off unless stderr is a terminal
    return tqdm(iterable, disable=disable, dynamic_ncols=True, leave=False, **kwargs)


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process can have for tensors: what is free, and what it holds already."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB: of the GPU's tensors, or on the CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
