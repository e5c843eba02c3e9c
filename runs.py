"""Run folders: checkpoints that are whole or refused, resuming with the same arguments, stopping on signals."""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import io
import itertools
import json
import math
import os
import pickletools
import platform
import shlex
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from utils import HARMLESS, Diverged, UserError, barrier, is_main, leave_distributed, printable, together, world_size

# ---- files and checkpoints ------------------------------------------------------------------------------------------


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
    buffer = io.BytesIO()  # serialised first, so that a full disk is a plain OSError
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
    """Read a file of torch.save (zip or the format before PyTorch 1.6) that holds a dict, as data, on the CPU.

    Nothing in it is executed. Checksums (zip only) and sizes are checked before memory is taken for tensors; UserError
    says what is wrong.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a checkpoint file") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = _read_zip(data) if data.startswith(b"PK") else _read_legacy(data)
    except UserError as error:
        raise UserError(f"{path}: {printable(error)}") from None
    except (Exception, MemoryError) as error:  # hostile bytes raise anything: KeyError, struct.error, UnicodeError ...
        reason = f"{type(error).__name__} {printable(error)}"[:100]
        raise UserError(f"{path}: damaged, cut off, or not a checkpoint of torch.save ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict (a state dict or a checkpoint)")
    return content


def _read_zip(data: bytes) -> Any:
    """Read today's format: a zip file with a checksum (CRC32) for each record, one record for each storage.

    PyTorch reads a new zip file of the records whose checksums are right, since in the given one it could see others:
    with one bit of its attributes changed, a record is a folder for PyTorch, and its tensor is left uninitialised.
    """
    fresh = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(fresh, "w") as new:
        infos = old.infolist()
        names = {info.filename.lower() for info in infos}  # PyTorch ignores case
        if len(names) < len(infos) or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise UserError("a zip file, but not as torch.save writes it")
        for info in infos:
            new.writestr(info.filename, old.read(info))  # raises BadZipFile if the checksum is wrong
        _check_instructions(io.BytesIO(old.read(f"{infos[0].filename.split('/')[0]}/data.pkl")))
    return _read_twice(fresh, sum(info.file_size for info in infos if "/data/" in info.filename))


def _read_legacy(data: bytes) -> Any:
    """Read the format before PyTorch 1.6: five objects (the content is the fourth) and storages, without checksums."""
    file = io.BytesIO(data)
    for _ in range(5):
        _check_instructions(file)
    content = _read_twice(file, len(data))
    if rest := len(data) - file.tell():
        raise UserError(f"damaged: {rest} bytes too many")
    return content


def _read_twice(file: io.BytesIO, size: int) -> Any:
    """torch.load, first without memory to see the shapes; UserError if tensors are larger than their data.

    ``size`` bytes are there for all storages together. PyTorch itself refuses storages that do not have the size of
    their data, but not before 2.6. (A stride of 0 makes 4 bytes a terabyte.)
    """
    for device in ("meta", "cpu"):
        file.seek(0)
        content = torch.load(file, map_location=device, weights_only=True)
        todo, seen, storages = [content], set(), {}
        while todo:
            item = todo.pop()
            if isinstance(item, torch.Tensor):
                storage = item.untyped_storage()
                place = storage.data_ptr()  # without memory all are at 0: then the largest counts
                storages[place] = max(storage.nbytes(), storages.get(place, 0))
                if item.numel() * item.element_size() > min(size, storage.nbytes()):
                    raise UserError(f"damaged: a tensor of shape {tuple(item.shape)} is larger than its data")
            elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
                seen.add(id(item))
                todo += [*item, *item.values()] if isinstance(item, dict) else item
        if sum(storages.values()) > size:
            raise UserError(f"damaged: tensors of {sum(storages.values())} bytes, there are {size}")
    return content


# What a checkpoint may name: containers, dtypes, storages, and the functions that put a tensor on a storage.
ALLOWED = {"collections.OrderedDict", "collections.Counter", "builtins.set", "__builtin__.set", "_codecs.encode"}
ALLOWED |= {f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "parameter")}
ALLOWED |= {f"torch.{name}Storage" for name in "Double Float Half BFloat16 Long Int Short Char Byte Bool".split()}
ALLOWED |= {f"torch.{name}" for name in "Size device float64 float32 float16 bfloat16".split()}
ALLOWED |= {f"torch.{name}" for name in "int64 int32 int16 int8 uint8 bool".split()}
MAX_NESTING = 10_000  # of tuples in tuples


def _check_instructions(file: io.BytesIO) -> None:
    """Check the instructions of the next serialised object, which build it on a stack, without following any.

    UserError for two things that weights_only accepts: functions that take memory (bytearray(10**12)), and tuples
    nested so deep that hash() of them, as the key of a dict, crashes Python. The depth is estimated from above: of the
    tuples made since one mark on the stack, each counts as if it contained the one before.
    """
    named: set[str] = set()
    depths, saved = [0], {}  # of the tuples since each open mark; of the objects that are used again, by number
    for opcode, value, _ in pickletools.genops(file):
        match opcode.name:
            case "GLOBAL" | "STACK_GLOBAL" | "INST":
                named.add(str(value or "a class").replace(" ", "."))
            case "MARK":
                depths.append(0)
            case "SETITEMS" | "APPENDS":
                depths.pop()
            case "TUPLE":
                inner = depths.pop()
                depths[-1] = max(depths[-1], inner + 1)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                depths[-1] += 1
            case "BINPUT" | "LONG_BINPUT":
                saved[value] = depths[-1]
            case "BINGET" | "LONG_BINGET":
                depths[-1] = max(depths[-1], saved[value])
        if depths[-1] > MAX_NESTING:
            raise UserError(f"damaged: tuples are nested more than {MAX_NESTING} deep")
    if code := sorted(named - ALLOWED):
        raise UserError(f"carries code ({', '.join(code[:3])}); expected tensors and plain values, not loaded")


def _not_finite(state: Any, name: str = "") -> str | None:
    """The name of the first tensor or number in a checkpoint that is NaN or infinite."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return next(filter(None, (_not_finite(value, f"{name} {key}".strip()) for key, value in items)), None)
    if isinstance(state, torch.Tensor):
        return name if state.is_floating_point() and not state.isfinite().all() else None
    return name if isinstance(state, float) and not math.isfinite(state) else None


# ---- the run folder -------------------------------------------------------------------------------------------------


class RunFolder:
    """log.txt, args.json, genotype.txt, history.jsonl, timing.jsonl, checkpoint.pt and TensorBoard events of a run.

    Made by create_run and resume_run. Only rank 0 writes; on the other ranks every method but load() is silent.
    TensorBoard's step is the index of the history line (the epoch, counted over all stages), so that a resumed run
    can remove the events after its checkpoint.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, script: str) -> None:
        self.folder, self.script, self.quiet = folder, script, args.quiet
        self.lines = {"history.jsonl": 0, "timing.jsonl": 0}  # lines written so far
        self._tensorboard: Any = None
        self._purge_step = 0  # TensorBoard ignores what an earlier process wrote from this step on
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder)
            for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()

    @classmethod
    def create(cls, folder: Path | str, args: argparse.Namespace, script: str) -> RunFolder:
        """Make a new run folder, or take that of a run that ended before its first checkpoint.

        UserError if it holds a run already or another process works in it.
        """
        if is_main() and any(Path(folder).glob("checkpoint*.pt")):
            raise UserError(f"{folder} holds a run already: go on with --resume {folder}, or take another --save")
        run = cls(Path(folder), args, script)
        record = {"script": script, "command": shlex.join(["python", *sys.argv]), "args": _arguments(args)}
        run._write_record(record | {"versions": _versions(), "seed": args.seed})
        run.log(f"run folder: {folder}", always=True)
        return run

    @classmethod
    def resume(
        cls,
        folder: Path | str,
        args: argparse.Namespace,
        script: str,
        may_change: Iterable[str] = (),
        check: Callable[[argparse.Namespace, dict], None] = lambda args, stored: None,
    ) -> RunFolder:
        """Go on with a run folder, or for "auto" with the newest that has these arguments and a checkpoint.

        Arguments that were not given on the command line take the run's values (args is changed in place). Given ones
        must equal the run's, except those in HARMLESS and `may_change`; UserError names the others.
        `check(args, the run's arguments)` may raise one too: a resumption that is refused leaves the folder as it was.
        """
        free = HARMLESS | set(may_change)
        args.given = getattr(args, "given", set(vars(args)))  # without parse(): take all as given
        folder = _newest(args, script, free) if str(folder) == "auto" else Path(folder)
        record = _read_record(folder)
        if record["script"] != script:
            raise UserError(f"{folder} is a run of {record['script']}: python {record['script']} --resume {folder}")
        if differences := _differences(record["args"], args, free):
            raise UserError(f"{folder} goes on only with its own arguments; leave out: {', '.join(differences)}")
        vars(args).update({name: value for name, value in record["args"].items() if name not in args.given})
        check(args, record["args"])
        run = cls(folder, args, script)
        run.log(f"run folder: {folder} (resumed)", always=True)
        if record["versions"] != _versions():
            run.log(f"warning: begun with {record['versions']}, now {_versions()}: last digits may differ", always=True)
        resumed = [*record.get("resumed", []), shlex.join(["python", *sys.argv])]
        run._write_record(record | {"args": _arguments(args), "resumed": resumed})
        return run

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run."""
        python = "python" if world_size() == 1 else f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"
        return f"{python} {self.script} --resume {shlex.quote(str(self.folder))}"

    def log(self, text: str, always: bool = False, screen: bool = True) -> None:
        """One line to log.txt with the time, and to the screen if `screen` and not --quiet, or if `always`."""
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
        """Write a checkpoint (rank 0's state) and, in it, the number of lines of history that belong to it.

        Diverged if a number in it is not finite, which losses and gradients do not show: they precede the step that
        changed the weights.
        """
        if is_main():
            if bad := _not_finite(state):
                where = f"epoch {state.get('epoch')}, step {state.get('step')}"
                raise Diverged(f"{where}: {bad} is not finite; the last checkpoint is from before")
            save_checkpoint(self.folder / name, state | {"lines": self.lines})

    def load(self) -> dict | None:
        """The state of the last good checkpoint, None if there is none yet; later lines of history are cut off."""
        path = self.folder / "checkpoint.pt"
        barrier()  # nobody reads while rank 0 still writes
        state = load_checkpoint(path) if path.exists() or _previous(path).exists() else None
        if state is not None and "lines" not in state:
            raise UserError(f"{path}: not the checkpoint of a run, it has {', '.join(map(str, state))[:80]}")
        self.lines = dict(state["lines"]) if state else dict.fromkeys(self.lines, 0)
        self._purge_step = self.lines["history.jsonl"]
        if is_main():
            for name, count in self.lines.items():
                self._cut(self.folder / name, count)
        barrier()  # nobody goes on, and writes, while another still reads
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

    def _write_record(self, record: dict) -> None:
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


def _newest(args: argparse.Namespace, script: str, free: set[str]) -> Path:
    """The folder beside --save or in logs/ with the newest checkpoint of this script and the given arguments."""
    root, found = os.path.dirname(args.save or "") or "logs", []
    for checkpoint in Path(root).glob("*/checkpoint*.pt"):
        try:
            record = _read_record(checkpoint.parent)
        except UserError:
            continue
        if record["script"] == script and not _differences(record["args"], args, free):
            found.append((checkpoint.stat().st_mtime_ns, checkpoint.parent))
    if not found:
        raise UserError(f"--resume auto: {root}/ has no run of {script} with these arguments and a checkpoint")
    return max(found)[1]


def resume_run(args: argparse.Namespace, script: str, may_change: Iterable[str] = ("epochs",)) -> RunFolder | None:
    """The run that --resume names, whose arguments ``args`` takes over; None without --resume."""
    if args.resume is None:
        return None
    return RunFolder.resume(args.resume, args, script, may_change, check_epochs)


def create_run(args: argparse.Namespace, script: str, name: str) -> RunFolder:
    """A new run folder: --save, below logs/ if it is a plain name, or one named after what is run and the time."""
    if args.save:
        folder = Path(args.save) if "/" in args.save else Path("logs") / args.save
    else:
        folder = new_folder(f"logs/{name}-{args.note}" if args.note else f"logs/{name}")
    return RunFolder.create(folder, args, script)


def new_folder(stem: str) -> Path:
    """STEM-TIME, or STEM-TIME-2, ... where another run began in the same second."""
    stem = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(path for n in itertools.count(1) if not (path := Path(stem if n == 1 else f"{stem}-{n}")).exists())


def check_epochs(args: argparse.Namespace, stored: dict) -> None:
    """A resumed run keeps its number of epochs, unless nothing before depends on it: then more may be asked for."""
    epochs = stored["epochs"]
    if args.epochs == epochs:
        return
    constant = args.learning_rate_min == args.learning_rate and getattr(args, "lr_scheduler", "cosine") == "cosine"
    drop_path = hasattr(args, "lr_scheduler") and args.drop_path_prob  # in a search it has no effect
    falling_tau = getattr(args, "gumbel", False) or getattr(args, "method", "") == "gdas"
    scaled = getattr(args, "scale_space", False)
    if args.epochs < epochs or not constant or falling_tau or drop_path or scaled:
        raise UserError(
            f"--epochs was {epochs}, now {args.epochs}: the schedule of the epochs already run depends on it; only a"
            " run with a constant learning rate (--learning_rate_min equal to --learning_rate), --drop_path_prob 0 and"
            " without --gumbel, --scale_space or GDAS can be made longer"
        )


def retrain_command(script: str, args: dict, folder: str | Path) -> str:
    """The command that trains the genotype of a search from scratch, with the settings of the papers.

    ``script`` ("search.py" or "train_search.py") and ``args`` are the search's, as args.json has them; ``folder`` is
    its run folder.
    """
    dataset, images, size = (args.get(name) for name in ("dataset", "data", "image_size"))
    pdarts = script == "train_search.py"
    if dataset == "imagenet":  # all of it, where a search has seen a part
        flags = ["train_imagenet.py"] if pdarts else ["retrain.py", "--dataset", dataset, "--data", ".data/imagenet"]
    else:
        flags = ["train_cifar.py"] if pdarts else ["retrain.py"]
        short = {"cifar10": [], "cifar100": ["--cifar100"]} if pdarts else {}
        flags += short.get(dataset, ["--dataset", dataset])
        flags += ["--tmp_data_dir" if pdarts else "--data", images] if images not in (None, ".data") else []
        flags += ["--image_size", str(size)] if size else []
        flags.append("--cutout")
    return shlex.join(["python", *flags, "--auxiliary", "--arch", str(folder)])


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
            return  # torchrun sends a signal more than once, and kills what does not end in its own time
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
