"""Run folders: checkpoints that are whole or refused, resuming with the same arguments, stopping on signals."""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import io
import itertools
import json
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from lib.checkpoints import _previous, load_checkpoint, not_finite, save_checkpoint, write_whole
from lib.cli import HARMLESS, UserError
from lib.distributed import Diverged, barrier, is_main, leave_distributed, together, world_size

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
            if bad := not_finite(state):
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
