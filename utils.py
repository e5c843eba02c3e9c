"""What every script shares: errors, run folders, checkpoints, signals, processes, meters. No networks, no data."""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pickletools
import platform
import random
import resource
import shlex
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk, a quota and a limit (ulimit -f) say
TIMEOUT = timedelta(seconds=60)  # a collective that waits longer than this for a lost rank ends the run


# ---------------------------------------------------------------------------------------------------------------------
# Command line and errors


class UserError(Exception):
    """A mistake of the user, in one line: what was given, what was expected, what to do. Exit code 2."""


class Diverged(Exception):
    """The numbers went bad (NaN, infinity, ranks that differ); the message says where. Exit code 1."""


class RankLost(Exception):
    """Another process of the run is gone. Exit code 1."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose --help shows the defaults."""

    def __init__(self, description: str | None = None) -> None:
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)
        self.defaults_for: dict[tuple[str, str], dict[str, Any]] = {}

    def set_defaults_for(self, flag: str, value: str, **defaults: Any) -> None:
        """Other defaults where ``flag`` has this value; what stands on the command line counts more (see `parse`)."""
        self.defaults_for[flag, value] = defaults

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (--help lists all arguments)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, and the script's docstring keeps its lines."""


def number(kind: type, low: float, high: float = math.inf, below: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: an int or float with low <= value <= high and value < below."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or not value < below:
            limit = f" and below {below}" if below < math.inf else f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range: expected at least {low}{limit}")
        return value

    convert.__name__ = f"{kind.__name__} value"
    return convert


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every script that makes a run folder. Scripts change a default with parser.set_defaults."""
    add = parser.add_argument_group("run").add_argument
    add("--save", metavar="NAME", help="name of the run folder (default: what is run and the time)")
    add("--note", default="", help="free text for the name of the run folder")
    text = "go on with this run; auto: the newest run of this script with these arguments"
    add("--resume", "--resume_path", metavar="RUN_FOLDER|auto", nargs="?", const="auto", help=text)
    add("--device", default="auto", help="auto (cuda if there, else cpu), cpu, cuda, cuda:N")
    add("--gpu", type=int, metavar="N", help="use GPU number N, the same as --device cuda:N")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=2, help="processes that load images, where images are files")
    add("--report_freq", type=int, default=50, metavar="STEPS", help="steps between two lines of the log")
    text = "also write a checkpoint every so many steps inside an epoch (0: at the end of epochs only)"
    add("--checkpoint_freq", type=int, default=0, metavar="STEPS", help=text)
    add("--quiet", action="store_true", help="no bars, next to nothing on the screen; log.txt stays complete")


# Arguments that a resumed run may change: they move the work elsewhere or show it differently.
HARMLESS = {"resume", "note", "device", "gpu", "workers", "report_freq", "checkpoint_freq", "quiet"}


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """parse_args, and `args.given`: the set of the arguments that stood on the command line (Run.resume needs it)."""
    args = parser.parse_args(argv)
    blank = argparse.Namespace(**dict.fromkeys(vars(args)))  # argparse keeps values that are there: None = not given
    args.given = {name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None}
    for (flag, value), defaults in getattr(parser, "defaults_for", {}).items():
        if getattr(args, flag) == value:
            vars(args).update({name: default for name, default in defaults.items() if name not in args.given})
    return args


def cli(
    main: Callable[[argparse.Namespace], Any], parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> None:
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
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:
        if error.errno in FULL:
            name = error.filename or "a file"
            _fail(f"disk full: {name} not written, the last checkpoint is whole; free space and --resume", 1)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            _fail(f"{error.filename}: {error.strerror}", 2)
        raise
    leave_distributed()


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """Leave it to the main thread to report a full disk: TensorBoard's writes for it, and passes the error on."""
    if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in FULL):
        threading.__excepthook__(args)


def _fail(message: str, code: int) -> None:
    print(f"{Path(sys.argv[0]).name}: {' '.join(_printable(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that --device and --gpu name; under torchrun every process takes the GPU of its local rank."""
    name = args.device if args.gpu is None else f"cuda:{args.gpu}"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
            raise UserError(
                f"{name} is not there: {torch.cuda.device_count()} GPUs found; --device cpu works everywhere"
            )
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); --device cpu works") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def set_seed(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """The state of the global generators, as plain values and tensors that weights_only loading accepts."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None  # of the device that this process uses
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_rng_state(state: dict) -> None:
    """Put back what rng_state() returned; a GPU's state only where there is a GPU."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ---------------------------------------------------------------------------------------------------------------------
# Files and checkpoints


def write_whole(path: Path | str, data: str | bytes | memoryview, previous: Path | None = None) -> None:
    """Write a file whole or not at all: temporary file beside it, fsync, rename. `previous` keeps the one before.

    Killed at any moment, `path` is a whole file, old or new. Raises OSError with the file's name (ENOSPC: disk full).
    """
    path = Path(path)
    temporary, link = (path.with_name(f".{path.name}.{os.getpid()}.{kind}.tmp") for kind in ("new", "old"))
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            try:
                os.link(path, link)  # a second name: there is no moment without a file under the first
            except OSError:  # a file system without hard links: for a moment only `previous` exists
                link = path
            os.replace(link, previous)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
        if link != path:
            link.unlink(missing_ok=True)


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def save_checkpoint(path: Path | str, state: dict) -> None:
    """Write a checkpoint (tensors and plain values) whole; the one before it is kept as NAME.prev.pt."""
    buffer = io.BytesIO()  # serialised first, so that a full disk is a plain OSError; torch's zip has a CRC per record
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer(), previous=_previous(Path(path)))


def load_checkpoint(path: Path | str) -> dict:
    """Read a checkpoint of save_checkpoint, or with a warning the one before if it is damaged. Tensors on the CPU."""
    path = Path(path)
    try:
        return read_weights(path)
    except UserError as error:
        if not _previous(path).exists():
            raise
        print(f"warning: {error}; using {_previous(path).name}, one checkpoint older", file=sys.stderr)
        return read_weights(_previous(path))


def read_weights(path: Path | str) -> dict:
    """Read a file of torch.save (zip or the older format) with a dict of tensors and plain values, as data, on the CPU.

    Nothing in it is executed; checksums (zip) and sizes are checked before memory is taken for tensors. UserError says
    what is wrong with it.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a checkpoint file") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = _checked_zip(data) if data.startswith(b"PK") else _checked_legacy(data)
            for device in ("meta", "cpu"):  # first without memory, to see the shapes
                content = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
                _check_tensors(content, len(data))
    except UserError as error:
        raise UserError(f"{path}: {_printable(error)}") from None
    except (Exception, MemoryError) as error:  # hostile bytes raise anything: KeyError, struct.error, UnicodeError ...
        reason = f"{type(error).__name__} {_printable(error)}"[:100]
        raise UserError(f"{path}: damaged, cut off, or not a checkpoint of torch.save ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict (a state dict or a checkpoint)")
    return content


def _printable(error: Exception | str) -> str:
    """The message without the control characters that a hostile file may have put into it."""
    return "".join(letter if letter.isprintable() else " " for letter in str(error))


# Bytes per element of the storages that a checkpoint may hold, by the class that its pickle names.
BYTES = {8: "Double Long", 4: "Float Int", 2: "Half BFloat16 Short", 1: "Char Byte Bool"}
STORAGES = {f"torch {name}Storage": size for size, names in BYTES.items() for name in names.split()}
STORAGES["torch.storage UntypedStorage"] = 1
# All else that its pickle may name: containers, dtypes, and what puts a tensor on a storage.
PLAIN = {"collections OrderedDict", "collections Counter", "torch Size", "torch device", "_codecs encode"}
PLAIN |= {"__builtin__ set", "builtins set"}
PLAIN |= {f"torch._utils _rebuild_{name}" for name in ("tensor", "tensor_v2", "parameter")}
PLAIN |= {f"torch {name}" for name in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()}
MAX_NESTING = 100  # tuples in tuples; hash() of a million, as the key of a dict, would crash Python


def _storages(file: io.BytesIO) -> dict[str, int]:
    """The storages that the next pickle of a file asks for, key -> bytes; its opcodes are read, none is executed.

    torch.save writes a storage as the tuple ("storage", class, key, location, numel[, None]) and BINPERSID. Here it is
    followed what would lie on the unpickler's stack: tuples and what they are made of. UserError for code.
    """
    sizes: dict[str, int] = {}
    code: set[str] = set()
    stack: list[tuple[Any, int]] = []  # (value, None for all but plain values and tuples; nesting of tuples)
    memo: dict[int, tuple[Any, int]] = {}
    marks: list[int] = []
    for opcode, value, _ in pickletools.genops(file):
        name, before = opcode.name, opcode.stack_before
        if name in ("GLOBAL", "STACK_GLOBAL", "INST") and value not in STORAGES.keys() | PLAIN:
            code.add(str(value or "a class").replace(" ", "."))
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        else:
            marked = pickletools.markobject in before
            start = marks.pop() - before.index(pickletools.markobject) if marked else len(stack) - len(before)
            taken = stack[start:]
            del stack[start:]
            nesting = max((nested for _, nested in taken), default=0)
            if name.startswith("TUPLE"):
                value, nesting = tuple(item for item, _ in taken), nesting + 1
            elif name == "BINPERSID":
                kind, storage, key, _, numel, *view = taken[0][0]
                size = STORAGES[storage] * numel
                if kind != "storage" or view not in ([], [None]) or numel < 0 or sizes.setdefault(key, size) != size:
                    raise UserError(f"damaged: storage {key} makes no sense")
            if nesting > MAX_NESTING:
                raise UserError(f"damaged: tuples are nested more than {MAX_NESTING} deep")
            if opcode.stack_after:
                stack.append((value, nesting))
    if code:
        raise UserError(f"carries code ({', '.join(sorted(code)[:3])}); expected tensors and plain values, not loaded")
    return sizes


def _checked_zip(data: bytes) -> bytes:
    """Check the CRC32 of every record, and that every storage is exactly as large as its record.

    Returns a fresh zip of the checked records for torch to read. In the given one, torch's reader could see other
    things than the checks: one bit of a file attribute makes a record a folder, and its tensor is left uninitialised.
    """
    fresh = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(fresh, "w") as new:
        infos = old.infolist()
        records = {info.filename.lower(): info.file_size for info in infos}  # torch finds names whatever their case
        if len(records) < len(infos) or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise UserError("a zip file, but not as torch.save writes it")
        folder = infos[0].filename.split("/")[0]
        for key, size in _storages(io.BytesIO(old.read(f"{folder}/data.pkl"))).items():
            if records[f"{folder}/data/{key}".lower()] != size:
                raise UserError(f"damaged: storage {key} does not have its {size} bytes")
        for info in infos:
            new.writestr(info.filename, old.read(info))  # raises BadZipFile if the CRC is wrong
    return fresh.getvalue()


def _checked_legacy(data: bytes) -> bytes:
    """Check that after the five pickles of the older format just its storages follow (each: a count in 8 bytes, data).

    It has no checksum: what is damaged inside a tensor cannot be seen.
    """
    file = io.BytesIO(data)
    sizes = [_storages(file) for _ in range(5)][3]  # magic number, protocol, system, the object, keys of the storages
    expected = sum(8 + size for size in sizes.values())
    if expected != len(data) - file.tell():
        raise UserError(f"damaged or cut off: {len(data) - file.tell()} bytes of tensors, expected {expected}")
    return data


def _check_tensors(content: Any, limit: int) -> None:
    """Check that every tensor is dense, no larger than its storage and the file (stride 0 makes 4 bytes a terabyte)."""
    todo, seen = [content], set()
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            size = item.numel() * item.element_size()
            if item.layout != torch.strided or size > min(limit, item.untyped_storage().nbytes()):
                raise UserError(f"damaged: a tensor of shape {tuple(item.shape)} is larger than its data")
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            todo += [*item, *item.values()] if isinstance(item, dict) else item


def _not_finite(state: Any, name: str = "") -> str | None:
    """The name of the first tensor or number in a checkpoint that is NaN or infinite."""
    if isinstance(state, torch.Tensor):
        return name if state.is_floating_point() and not state.isfinite().all() else None
    if isinstance(state, float):
        return None if math.isfinite(state) else name
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return next(filter(None, (_not_finite(value, f"{name} {key}".strip()) for key, value in items)), None)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


class Run:
    """A run folder: log.txt, args.json, genotype.txt, history.jsonl, timing.jsonl, checkpoint.pt, TensorBoard events.

    Made by Run.create or Run.resume. Only rank 0 writes; on the other ranks every method but load() is silent.
    TensorBoard's step is the index of the history line (the epoch, counted over all stages), so that a resumed run
    can take back the events after its checkpoint.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, script: str) -> None:
        self.folder, self.script, self.quiet = folder, script, args.quiet
        self.lines = {"history.jsonl": 0, "timing.jsonl": 0}  # lines written so far
        self._tensorboard: Any = None
        self._purge_step = 0  # TensorBoard forgets what an earlier process wrote from this step on
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder)
            for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()

    @classmethod
    def create(cls, folder: Path | str, args: argparse.Namespace, script: str) -> Run:
        """Make a new run folder, or take that of a run that ended before its first checkpoint.

        UserError if it holds a run already or another process works in it.
        """
        if is_main() and any(Path(folder).glob("checkpoint*.pt")):
            raise UserError(f"{folder} holds a run already: go on with --resume {folder}, or take another --save")
        run = cls(Path(folder), args, script)
        record = {"script": script, "command": _command(), "args": _arguments(args)}
        run._record(record | {"versions": _versions(), "seed": args.seed})
        run.log(f"run folder: {folder}", always=True)
        return run

    @classmethod
    def resume(
        cls,
        folder: Path | str,
        args: argparse.Namespace,
        script: str,
        may_change: Iterable[str] = (),
        root: Path | str = "logs",
        check: Callable[[argparse.Namespace, dict], None] | None = None,
    ) -> Run:
        """Go on with a run folder, or for "auto" with the newest in `root` that has these arguments and a checkpoint.

        Arguments that were not given on the command line take the run's values (args is changed in place). Given ones
        must equal the run's, except those in HARMLESS and `may_change`; UserError names the others.
        `check(args, the run's arguments)` may raise one too: a resumption that is refused leaves the folder as it was.
        """
        free = HARMLESS | set(may_change)
        args.given = getattr(args, "given", set(vars(args)))  # without parse(): take all as given
        folder = _newest(Path(root), args, script, free) if str(folder) == "auto" else Path(folder)
        record = _read_record(folder)
        if record["script"] != script:
            raise UserError(f"{folder} is a run of {record['script']}: python {record['script']} --resume {folder}")
        if differences := _differences(record["args"], args, free):
            raise UserError(f"{folder} goes on only with its own arguments; leave out: {', '.join(differences)}")
        for name, value in record["args"].items():
            if name not in args.given:
                setattr(args, name, value)
        if check:
            check(args, record["args"])
        run = cls(folder, args, script)
        run.log(f"run folder: {folder} (resumed)", always=True)
        if record["versions"] != _versions():
            run.log(f"warning: begun with {record['versions']}, now {_versions()}: last digits may differ", always=True)
        run._record(record | {"args": _arguments(args), "resumed": [*record.get("resumed", []), _command()]})
        return run

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run."""
        python = "python" if world_size() == 1 else f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"
        return f"{python} {self.script} --resume {shlex.quote(str(self.folder))}"

    def log(self, text: str, always: bool = False, screen: bool = True) -> None:
        """One line to log.txt with the time, and with `screen` to it unless --quiet (`always`: even then)."""
        if is_main():
            with open(self.folder / "log.txt", "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            if always or (screen and not self.quiet):
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def history(self, line: dict) -> None:
        """Append a line to history.jsonl: what two identical runs have in common."""
        self._append("history.jsonl", line)

    def timing(self, line: dict) -> None:
        """Append a line to timing.jsonl: seconds, images/s, memory, all that differs between two identical runs."""
        self._append("timing.jsonl", line)

    def genotype(self, text: str) -> None:
        """Write the current best guess, one line, to genotype.txt."""
        if is_main():
            write_whole(self.folder / "genotype.txt", f"{text}\n")

    def checkpoint(self, state: dict, name: str = "checkpoint.pt") -> None:
        """Write a checkpoint (rank 0's state), which remembers how many lines of history belong to it.

        Diverged if a number in it is not finite: the last checkpoint is always one to go on with.
        """
        if is_main():
            if bad := _not_finite(state):
                where = f"epoch {state.get('epoch')}, step {state.get('step')}"
                raise Diverged(f"{where}: {bad} is not finite; the last checkpoint is from before")
            save_checkpoint(self.folder / name, state | {"lines": self.lines})

    def load(self) -> dict | None:
        """The state of the last good checkpoint, None if there is none yet; later lines of history are cut off."""
        path = self.folder / "checkpoint.pt"
        _barrier()  # nobody reads while rank 0 still writes
        state = load_checkpoint(path) if path.exists() or _previous(path).exists() else None
        if state is not None and "lines" not in state:
            raise UserError(f"{path}: not the checkpoint of a run, it has {', '.join(map(str, state))[:80]}")
        self.lines = dict(state["lines"]) if state else dict.fromkeys(self.lines, 0)
        self._purge_step = self.lines["history.jsonl"]
        if is_main():
            for name, count in self.lines.items():
                self._cut(self.folder / name, count)
        _barrier()  # nobody goes on, and writes, while another still reads
        return state

    @property
    def tensorboard(self) -> Any:
        """The SummaryWriter of the run folder, made when first used; one that does nothing on the other ranks."""
        if self._tensorboard is None and is_main():
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._tensorboard = SummaryWriter(str(self.folder), purge_step=self._purge_step)
        return self._tensorboard or _Silent()

    def close(self) -> None:
        """Flush TensorBoard and release the lock (the end of the process does so too)."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if is_main():
            self._lock.close()

    def _record(self, record: dict) -> None:
        if is_main():
            write_whole(self.folder / "args.json", json.dumps(record, indent=1) + "\n")

    def _append(self, name: str, line: dict) -> None:
        if is_main():
            path = self.folder / name
            try:
                with open(path, "ab") as file:  # not as text, which is written in pieces
                    file.write(json.dumps(line, default=lambda value: value.tolist()).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:  # which would not say of which file
                raise OSError(error.errno, error.strerror, str(path)) from None
        self.lines[name] += 1

    def _cut(self, path: Path, count: int) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if len(lines) < count:
            self.log(f"warning: {path} has {len(lines)} lines, its checkpoint was written after {count}", always=True)
        elif len(lines) > count:
            write_whole(path, b"".join(lines[:count]))


class _Silent:
    """Takes any call and does nothing."""

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: None


def _lock(folder: Path) -> io.TextIOBase:
    """Lock the folder for this process: a POSIX lock, which forked loader workers do not keep and any death frees."""
    file = open(folder / "lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"{folder} is in use by another process: stop that one, or take another --save") from None
    return file


def _command() -> str:
    return shlex.join(["python", *sys.argv])


def _versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def _arguments(args: argparse.Namespace) -> dict:
    """The arguments as they come back from args.json."""
    plain = {name: value for name, value in vars(args).items() if name not in ("given", "resume")}
    return json.loads(json.dumps(plain, default=str))


def _read_record(folder: Path) -> dict:
    try:
        record = json.loads((folder / "args.json").read_text())
        if isinstance(record["args"], dict) and "versions" in record and isinstance(record["script"], str):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"--resume {folder}: not a run folder (no readable args.json); expected one like logs/NAME, or auto"
    )


def _differences(stored: dict, args: argparse.Namespace, free: set[str]) -> list[str]:
    """The arguments given on the command line that are not the stored ones, as "--batch_size (was 64, now 32)"."""
    new = {name: value for name, value in _arguments(args).items() if name in args.given - free}
    return [f"--{n} (was {stored.get(n)}, now {v})" for n, v in new.items() if n not in stored or stored[n] != v]


def _newest(root: Path, args: argparse.Namespace, script: str, free: set[str]) -> Path:
    found = []
    for checkpoint in root.glob("*/checkpoint*.pt"):
        try:
            record = _read_record(checkpoint.parent)
        except UserError:
            continue
        if record["script"] == script and not _differences(record["args"], args, free):
            found.append((checkpoint.stat().st_mtime_ns, checkpoint.parent))
    if not found:
        raise UserError(f"--resume auto: {root}/ has no run of {script} with these arguments and a checkpoint")
    return max(found)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Signals


class Stop:
    """Context manager: SIGTERM (pre-emption) or SIGINT (Ctrl-C) ends the loop after its step, the second one at once.

    with Stop() as stop:
        for ...:
            step()
            if stop.agreed():
                run.checkpoint(state)
                stop.exit(run.resume_command)
    """

    def __enter__(self) -> Stop:
        self.signal: int | None = None
        self._pid = os.getpid()
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        self.signal = number
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return  # torchrun repeats signals, and kills what does not end in its own time
        for repeated in self._before:
            signal.signal(repeated, signal.SIG_DFL)
        if os.getpid() == self._pid:  # forked loader workers have this handler too
            os.write(2, b"\nstopping after this step; once more to stop at once\n")

    def agreed(self) -> bool:
        """True if any rank got a signal; the same on all ranks (a collective: all call it at the same step)."""
        if world_size() > 1:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            flag = torch.tensor(self.signal or 0, device=device)
            together(dist.all_reduce, flag, dist.ReduceOp.MAX)
            self.signal = flag.item() or None
        return self.signal is not None

    def exit(self, resume_command: str) -> None:
        """Print how to go on, as the last line, and leave with 143 (SIGTERM) or 130 (SIGINT)."""
        if is_main():
            tqdm.write(f"stopped; this goes on with it:\n{resume_command}", file=sys.stdout)  # above the bars
            sys.stdout.flush()
        leave_distributed()
        sys.exit(128 + self.signal)


# ---------------------------------------------------------------------------------------------------------------------
# Processes (torchrun)


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
    """True for the one process that writes files and talks."""
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


def _barrier() -> None:
    if world_size() > 1:
        together(dist.barrier)


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    if world_size() > 1:
        together(dist.all_reduce, tensor)
    return tensor


def average_gradients(params: Iterable[torch.nn.Parameter]) -> None:
    """Mean over the ranks of the gradients that exist (only active ops have one: the same set on every rank).

    One all_reduce per dtype; without torchrun nothing happens.
    """
    if world_size() == 1:
        return
    grads = [param.grad for param in params if param.grad is not None]
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        group = [grad for grad in grads if grad.dtype == dtype]
        flat = reduce_sum(torch.cat([grad.reshape(-1) for grad in group])) / world_size()
        for grad, part in zip(group, flat.split([grad.numel() for grad in group]), strict=True):
            grad.copy_(part.view(grad.shape))


def share_buffers(network: torch.nn.Module) -> None:
    """Give all ranks the buffers of rank 0: the running statistics of BatchNorm come from each rank's own images."""
    if world_size() == 1:
        return
    buffers = list(network.buffers())
    for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
        group = [buffer for buffer in buffers if buffer.dtype == dtype]
        flat = torch.cat([buffer.reshape(-1) for buffer in group])
        together(dist.broadcast, flat, 0)
        for buffer, part in zip(group, flat.split([buffer.numel() for buffer in group]), strict=True):
            buffer.copy_(part.view(buffer.shape))


def assert_same(named: dict[str, Any]) -> None:
    """Diverged, with the names, if tensors or arrays are not bit-identical on all ranks. Once per epoch is cheap."""
    if world_size() == 1:
        return
    arrays = {
        name: np.ascontiguousarray(torch.as_tensor(value).detach().cpu().numpy()) for name, value in named.items()
    }
    mine = {
        name: hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest() for name, array in arrays.items()
    }
    everyone: list[Any] = [None] * world_size()
    together(dist.all_gather_object, everyone, mine)
    if different := sorted(name for name in mine if any(other.get(name) != mine[name] for other in everyone)):
        raise Diverged(f"the ranks no longer agree on {', '.join(different)}")


# ---------------------------------------------------------------------------------------------------------------------
# Meters


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


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB: of the GPU's tensors, or on the CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
