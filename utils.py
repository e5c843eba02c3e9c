"""What every script shares: errors, run folders, checkpoints, signals, processes, meters. Knows nothing of networks or data."""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import pickletools
import random
import resource
import shlex
import signal
import sys
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

TIMEOUT = timedelta(seconds=60)  # a collective that waits longer than this for a lost rank ends the run


# ---------------------------------------------------------------------------------------------------------------------
# Command line and errors


class UserError(Exception):
    """A mistake of the user, in one line: what was given, what was expected, what to do. Exit code 2."""


class Diverged(Exception):
    """The numbers went bad (NaN, infinity, ranks that differ); the message says where. Exit code 1."""


class RankLost(Exception):
    """Another process of the run is gone. Exit code 1."""


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every script that makes a run folder. Scripts change a default with parser.set_defaults."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--save", metavar="NAME", help="name of the run folder (default: made of what is run and the time)"
    )
    group.add_argument("--note", default="", help="free text for the name of the run folder and the log")
    group.add_argument(
        "--resume",
        "--resume_path",
        metavar="RUN_FOLDER|auto",
        nargs="?",
        const="auto",
        help="go on with this run; auto: the newest run of this script with these arguments",
    )
    group.add_argument("--device", default="auto", help="auto (cuda if there, else cpu), cpu, cuda, cuda:N")
    group.add_argument("--gpu", type=int, metavar="N", help="use GPU number N, the same as --device cuda:N")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--workers", type=int, default=2, help="processes that load images, where images are files")
    group.add_argument(
        "--report_freq", type=int, default=50, metavar="STEPS", help="steps between two lines of the log"
    )
    group.add_argument(
        "--checkpoint_freq",
        type=int,
        default=0,
        metavar="STEPS",
        help="also write a checkpoint every so many steps inside an epoch",
    )
    group.add_argument(
        "--quiet", action="store_true", help="no bars, next to nothing on the screen; log.txt stays complete"
    )


# Arguments that a resumed run may change: they move the work elsewhere or show it differently.
HARMLESS = {"resume", "note", "device", "gpu", "workers", "report_freq", "checkpoint_freq", "quiet"}


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """parse_args, and `args.given`: the set of the arguments that stood on the command line (Run.resume needs it)."""
    args = parser.parse_args(argv)
    blank = argparse.Namespace(
        **dict.fromkeys(vars(args))
    )  # argparse leaves values that are there, so None = not given
    args.given = {name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None}
    return args


def cli(
    main: Callable[[argparse.Namespace], Any], parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> None:
    """Parse, run main(args), and turn what users can cause into one line on stderr and an exit code."""
    args = parse(parser, argv)
    try:
        main(args)
    except UserError as error:
        _fail(str(error), 2)
    except (Diverged, RankLost) as error:
        _fail(str(error), 1)
    except torch.OutOfMemoryError as error:
        _fail(f"out of GPU memory, a smaller --batch_size needs less: {str(error).splitlines()[0]}", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(
                f"disk full, {error.filename or 'a file'} not written; the last checkpoint is whole: free space and --resume",
                1,
            )
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            _fail(f"{error.filename}: {error.strerror}", 2)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _fail(message: str, code: int) -> None:
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
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
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_rng_state(state: dict) -> None:
    """Put back what rng_state() returned; on a machine with other GPUs, as far as they go."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for index, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, index)


# ---------------------------------------------------------------------------------------------------------------------
# Files and checkpoints


def write_whole(path: Path | str, data: str | bytes | memoryview, previous: Path | None = None) -> None:
    """Write a file whole or not at all: temporary file beside it, fsync, rename. The old one stays as `previous` if given.

    Killed at any moment, `path` or `previous` is a whole file. Raises OSError with the file's name (ENOSPC: disk full).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
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


def _keep(path: Path, previous: Path) -> None:
    """Give the file a second name, so that there is no moment without it under the first."""
    link = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links: one moment in which only `previous` exists
        link = path
    os.replace(link, previous)


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def save_checkpoint(path: Path | str, state: dict) -> None:
    """Write a checkpoint (tensors and plain values) whole; the one before it is kept as NAME.prev.pt."""
    buffer = (
        io.BytesIO()
    )  # serialised first: a full disk then is a plain OSError, and torch's zip carries a CRC per record
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer(), previous=_previous(Path(path)))


def load_checkpoint(path: Path | str) -> dict:
    """Read a checkpoint of save_checkpoint, or, if it is damaged, the one before it, with a warning. Tensors on the CPU."""
    path = Path(path)
    try:
        return read_weights(path)
    except UserError as error:
        if not _previous(path).exists():
            raise
        print(f"warning: {error}; using {_previous(path).name}, one checkpoint older", file=sys.stderr)
        return read_weights(_previous(path))


def read_weights(path: Path | str) -> dict:
    """Read any file of torch.save (zip or the old format) that holds a dict of tensors and plain values, as data, on the CPU.

    Nothing in it is executed, checksums and sizes are checked before memory is taken for tensors. UserError says what is wrong.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a checkpoint file") from None
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            _check_zip(data)
        else:
            _check_legacy(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        _check_tensors(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (
        Exception,
        MemoryError,
    ) as error:  # hostile bytes raise anything: KeyError, struct.error, UnicodeDecodeError ...
        reason = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: damaged, cut off, or not a checkpoint of torch.save ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, expected a dict of tensors (a state dict or a checkpoint)"
        )
    return content


# Bytes per element of the storages that a checkpoint may hold, by the class that its pickle names.
STORAGES = {
    "Double": 8,
    "Float": 4,
    "Half": 2,
    "BFloat16": 2,
    "Long": 8,
    "Int": 4,
    "Short": 2,
    "Char": 1,
    "Byte": 1,
    "Bool": 1,
}
STORAGES = {f"torch {name}Storage": size for name, size in STORAGES.items()} | {"torch.storage UntypedStorage": 1}
# All else that its pickle may name: containers and the functions that put a tensor on a storage.
PLAIN = {"collections OrderedDict", "collections Counter", "torch Size", "torch device", "_codecs encode"}
PLAIN |= {"torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
PLAIN |= {f"torch {name}" for name in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()}


def _storages(file: io.BytesIO) -> dict[str, int]:
    """The storages that a pickle asks for, key -> bytes, read from its opcodes without executing any (pickletools).

    torch.save writes a storage as MARK "storage" CLASS key location numel [None] TUPLE BINPERSID, values also from the memo.
    """
    sizes: dict[str, int] = {}
    foreign: set[str] = set()
    memo: dict[int, Any] = {}
    stack: list | None = None  # the values since the last MARK; None after an opcode that is of no interest here
    for opcode, value, _ in pickletools.genops(file):
        if opcode.name == "MARK":
            stack = []
        elif opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1] if stack else None
        elif opcode.name == "TUPLE" and stack is not None:
            stack = [tuple(stack)]
        elif opcode.name == "BINPERSID":
            kind, storage, key, _, numel, *view = stack[-1] if stack else ()
            size = STORAGES[storage] * numel
            if (
                kind != "storage"
                or not isinstance(key, str)
                or numel < 0
                or any(view)
                or sizes.setdefault(key, size) != size
            ):
                raise ValueError(f"storage {key} makes no sense")
            stack = None
        elif (
            opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
            and value not in STORAGES.keys() | PLAIN
        ):
            foreign.add(str(value).replace(" ", "."))
        elif stack is not None:
            atoms = (
                "GLOBAL",
                "BINUNICODE",
                "SHORT_BINSTRING",
                "BININT",
                "BININT1",
                "BININT2",
                "LONG1",
                "NONE",
                "BINGET",
                "LONG_BINGET",
            )
            stack = stack + [memo.get(value) if "BINGET" in opcode.name else value] if opcode.name in atoms else None
    if foreign:
        raise UserError(
            f"carries code ({', '.join(sorted(foreign)[:3])}), expected tensors and plain values only; not loaded"
        )
    return sizes


def _check_zip(data: bytes) -> None:
    """Check the CRC of every record, and that every storage is exactly as large as its record."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        records = {
            info.filename.lower(): info.file_size for info in file.infolist()
        }  # torch finds names whatever their case
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in file.infolist())
        if not stored or len(records) != len(file.infolist()) or sum(records.values()) > len(data):
            raise ValueError("not a zip file as torch.save writes it")
        if file.testzip() is not None:
            raise ValueError(f"checksum of {file.testzip()} is wrong")
        folder = file.infolist()[0].filename.split("/")[0]
        sizes = _storages(io.BytesIO(file.read(f"{folder}/data.pkl")))
    for key, size in sizes.items():
        if records[f"{folder}/data/{key}".lower()] != size:
            raise ValueError(f"storage {key} should have {size} bytes")


def _check_legacy(data: bytes) -> None:
    """Check that the bytes after the five pickles of the old format are exactly its storages (each: a count of 8 bytes, data)."""
    file = io.BytesIO(data)
    for _ in range(3):  # magic number, protocol, system
        _storages(file)
    sizes = _storages(file)
    _storages(file)  # the keys
    if sum(8 + size for size in sizes.values()) != len(data) - file.tell():
        raise ValueError(
            f"{len(data) - file.tell()} bytes of tensors, expected {sum(8 + size for size in sizes.values())}"
        )


def _check_tensors(content: Any) -> None:
    """Every tensor is dense and no larger than its storage (no strides of 0 that turn four bytes into terabytes)."""
    todo, seen = [content], set()
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            if item.layout != torch.strided or item.numel() * item.element_size() > item.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {tuple(item.shape)} is larger than its data")
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            todo += [*item, *item.values()] if isinstance(item, dict) else item


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


class Run:
    """A run folder: log.txt, args.json, genotype.txt, history.jsonl, timing.jsonl, checkpoint.pt, TensorBoard events.

    Made by Run.create or Run.resume. Only rank 0 writes; on the other ranks every method but load() is silent.
    TensorBoard's step is the index of the history line (the epoch, counted over all stages), so that a resumed run
    can remove the events after its checkpoint.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, script: str) -> None:
        self.folder, self.script = folder, script
        self.quiet = getattr(args, "quiet", False)
        self.lines = {"history.jsonl": 0, "timing.jsonl": 0}  # lines written so far
        self._tensorboard = None
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder)

    @classmethod
    def create(cls, folder: Path | str, args: argparse.Namespace, script: str) -> Run:
        """Make a new run folder; UserError if it holds a run already or another process works in it."""
        run = cls(Path(folder), args, script)
        if is_main():
            if (run.folder / "args.json").exists():
                raise UserError(f"{folder} holds a run already: go on with --resume {folder}, or take another --save")
            run._record(
                {
                    "script": script,
                    "command": _command(),
                    "args": _arguments(args),
                    "versions": _versions(),
                    "seed": args.seed,
                }
            )
        run.log(f"run folder: {run.folder}", always=True)
        return run

    @classmethod
    def resume(
        cls,
        folder: Path | str,
        args: argparse.Namespace,
        script: str,
        may_change: Iterable[str] = (),
        root: Path | str = "logs",
    ) -> Run:
        """Go on with a run folder, or with "auto" with the newest one below `root` that has these arguments and a checkpoint.

        Arguments that were not given on the command line take the run's values (args is changed in place). Given ones must
        be the run's, except those in `may_change` and HARMLESS; UserError names the others.
        """
        free = HARMLESS | set(may_change)
        folder = _newest(Path(root), args, script, free) if str(folder) == "auto" else Path(folder)
        record = _read_record(folder)
        if record["script"] != script:
            raise UserError(
                f"{folder} is a run of {record['script']}, not of {script}: python {record['script']} --resume {folder}"
            )
        if differences := _differences(record["args"], args, free):
            raise UserError(
                f"{folder} cannot go on with other arguments: {'; '.join(differences)}. Leave them out or start a new run"
            )
        given = getattr(args, "given", set(vars(args)))
        for name, value in record["args"].items():
            if name not in given:
                setattr(args, name, value)
        run = cls(folder, args, script)
        if is_main():
            for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
            run.log(f"run folder: {folder} (resumed)", always=True)
            if record["versions"] != _versions():
                run.log(
                    f"warning: written with {record['versions']}, now {_versions()}: results may differ in the last digits"
                )
            run._record(record | {"args": _arguments(args), "resumed": [*record.get("resumed", []), _command()]})
        return run

    def _record(self, record: dict) -> None:
        write_whole(self.folder / "args.json", json.dumps(record, indent=1) + "\n")

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run."""
        python = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', 1)}" if world_size() > 1 else "python"
        return f"{python} {self.script} --resume {shlex.quote(str(self.folder))}"

    def log(self, text: str, always: bool = False) -> None:
        """One line to log.txt with the time, and to the screen unless --quiet (`always`: even then)."""
        if is_main():
            with open(self.folder / "log.txt", "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            if always or not self.quiet:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def history(self, line: dict) -> None:
        """Append a line to history.jsonl: what two identical runs have in common."""
        self._append("history.jsonl", line)

    def timing(self, line: dict) -> None:
        """Append a line to timing.jsonl: seconds, images/s, memory, all that differs between two identical runs."""
        self._append("timing.jsonl", line)

    def _append(self, name: str, line: dict) -> None:
        self.lines[name] += 1
        if is_main():
            with open(self.folder / name, "a") as file:
                file.write(json.dumps(line, default=lambda value: value.tolist()) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def genotype(self, text: str) -> None:
        """Write the current best guess, one line, to genotype.txt."""
        if is_main():
            write_whole(self.folder / "genotype.txt", f"{text}\n")

    def checkpoint(self, state: dict, name: str = "checkpoint.pt") -> None:
        """Write a checkpoint that knows how many lines of history belong to it."""
        if is_main():
            save_checkpoint(self.folder / name, state | {"lines": self.lines})

    def load(self) -> dict | None:
        """The state of the last good checkpoint, or None if there is none yet; later lines of history are cut off."""
        path = self.folder / "checkpoint.pt"
        state = load_checkpoint(path) if path.exists() or _previous(path).exists() else None
        self.lines = dict(state["lines"]) if state else dict.fromkeys(self.lines, 0)
        if is_main():
            for name, count in self.lines.items():
                self._cut(self.folder / name, count)
        if world_size() > 1:
            dist.barrier()  # nobody goes on, and writes, while another still reads
        return state

    def _cut(self, path: Path, count: int) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if len(lines) > count:
            write_whole(path, b"".join(lines[:count]))
        elif len(lines) < count:
            self.log(f"warning: {path} has {len(lines)} lines, the checkpoint was written after {count}")

    @property
    def tensorboard(self) -> Any:
        """The SummaryWriter of the run folder, made when first used; one that does nothing on the other ranks."""
        if self._tensorboard is None and not is_main():
            self._tensorboard = _Silent()
        elif self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            step = self.lines["history.jsonl"]
            self._tensorboard = SummaryWriter(str(self.folder), purge_step=step if step else None)
        return self._tensorboard

    def close(self) -> None:
        """Flush TensorBoard and release the lock (the end of the process does so too)."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if is_main():
            self._lock.close()


class _Silent:
    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: None


def _lock(folder: Path) -> io.TextIOBase:
    """Lock the folder for this process alone. A POSIX lock: forked loader workers do not inherit it, any death releases it."""
    file = open(folder / "lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(
            f"{folder} is in use by another process: wait for it, stop it, or take another --save"
        ) from None
    return file


def _command() -> str:
    return shlex.join(["python", *sys.argv])


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    return {"python": sys.version.split()[0], **packages}


def _arguments(args: argparse.Namespace) -> dict:
    return json.loads(
        json.dumps({name: value for name, value in vars(args).items() if name not in ("given", "resume")}, default=str)
    )


def _read_record(folder: Path) -> dict:
    try:
        record = json.loads((folder / "args.json").read_text())
        if (
            isinstance(record["args"], dict)
            and isinstance(record["versions"], dict)
            and isinstance(record["script"], str)
        ):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"--resume {folder}: not a run folder (no readable args.json); expected one like logs/NAME, or auto"
    )


def _differences(stored: dict, args: argparse.Namespace, free: set[str]) -> list[str]:
    """Arguments given on the command line that are not the stored ones, as "--batch_size was 64, now 32"."""
    given = getattr(args, "given", set(vars(args)))
    new = {name: value for name, value in _arguments(args).items() if name in given and name not in free}
    return [
        f"--{n} was {stored.get(n, 'unknown')}, now {v}" for n, v in new.items() if n not in stored or stored[n] != v
    ]


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
        raise UserError(
            f"--resume auto: no run of {script} with these arguments and a checkpoint in {root}/; start without --resume"
        )
    return max(found)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Signals


class Stop:
    """Context manager: SIGTERM (pre-emption) and SIGINT (Ctrl-C) ask the loop to end after its step; the second ends at once.

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
        """True if any rank got a signal: the same answer on all ranks (a collective: call it on all, at the same step)."""
        if world_size() > 1:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            self.signal = int(_all_reduce(torch.tensor(self.signal or 0, device=device), dist.ReduceOp.MAX)) or None
        return self.signal is not None

    def exit(self, resume_command: str) -> None:
        """Print how to go on, as the last line, and leave with 143 (SIGTERM) or 130 (SIGINT)."""
        if is_main():
            print(f"stopped; go on with:\n{resume_command}", flush=True)
        sys.exit(128 + self.signal)


# ---------------------------------------------------------------------------------------------------------------------
# Processes (torchrun)


def start_distributed(device: torch.device) -> tuple[int, int]:
    """Join the processes that torchrun started (nccl on cuda, gloo on cpu); (rank, world size), (0, 1) without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return dist.get_rank(), dist.get_world_size()


def world_size() -> int:
    """Number of processes that work together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True for the one process that writes files and talks."""
    return os.environ.get("RANK", "0") == "0"


def _all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    try:
        dist.all_reduce(tensor, op)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:150]
        raise RankLost(
            f"another process of this run is gone; --resume goes on from the last checkpoint ({reason})"
        ) from None
    return tensor


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    return _all_reduce(tensor) if world_size() > 1 else tensor


def average_gradients(params: Iterable[torch.nn.Parameter]) -> None:
    """Mean over the ranks of the gradients that exist (only active ops have one: the same set on every rank).

    One all_reduce per dtype; without torchrun nothing happens.
    """
    if world_size() == 1:
        return
    grads = [param.grad for param in params if param.grad is not None]
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        group = [grad for grad in grads if grad.dtype == dtype]
        flat = _all_reduce(torch.cat([grad.reshape(-1) for grad in group])) / world_size()
        for grad, part in zip(group, flat.split([grad.numel() for grad in group]), strict=True):
            grad.copy_(part.view(grad.shape))


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
    dist.all_gather_object(everyone, mine)
    if different := sorted(name for name in mine if any(other.get(name) != mine[name] for other in everyone)):
        raise Diverged(f"the ranks no longer agree on {', '.join(different)}")


# ---------------------------------------------------------------------------------------------------------------------
# Meters


class Metrics(NamedTuple):
    """Means over the images: loss, top-1 and top-5 accuracy in percent (top5 None for up to 5 classes), number of images."""

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

    def read(self) -> Metrics:
        """The means so far, over all ranks (a collective under torchrun)."""
        loss, top1, top5, count = reduce_sum(self.sums.clone()).tolist()
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
