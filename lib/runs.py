"""A run: its folder, its progress, and what it takes to stop anywhere and go on to the same bits.

run = Run(args, "search.py", "search-cifar10")          # with --resume: the arguments become that run's
run.keep({"state_dict": network, "optimizer": sgd})     # makes the folder, or restores all from its checkpoint
for epoch in range(run.epoch, args.epochs):
    for x, y in run.steps(train):
        ...
        run.after_step(meter, loss, norm)
    run.end_epoch({"epoch": epoch, ...})
run.close()
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from lib.checkpoints import checkpoint_exists, first_not_finite, load_checkpoint, save_checkpoint, write_whole
from lib.cli import HARMLESS, UserError, new_folder, progress
from lib.distributed import Diverged, is_main, leave_distributed, peak_memory_mb, together, world_size
from lib.run_folder import differences, lock_folder, machine, newest_run, plain_arguments, read_args, versions
from lib.tensorboard import TensorBoard


class Run:
    """A training that can be stopped and resumed, and its folder. Only rank 0 writes.

    ``epoch`` and ``step`` are the next ones to do; ``saved`` is the checkpoint that a resumed run goes on from.
    ``stages`` trainings of --epochs epochs follow each other (P-DARTS); epochs count through all of them.
    """

    def __init__(self, args: argparse.Namespace, script: str, name: str, stages: int = 1) -> None:
        """Take over the arguments of the run that --resume names, or choose a folder for a new one.

        A resumed run keeps its arguments; given ones must equal them, except HARMLESS ones. UserError names others; the
        folder is left as it was.
        """
        self.args, self.script, self.stages = args, script, stages
        self.epoch = self.step = 0
        self.saved: dict = {}
        self._kept: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._signals: Signals | None = None
        self._started, self._cpu_started = time.time(), time.process_time()
        self._first_step, self._num_steps, self._num_images = 0, 1, 0
        self._lines = {"history.jsonl": 0, "timing.jsonl": 0}  # that the checkpoint knows, or written since
        self.resumed = args.resume is not None
        if self.resumed:
            free = HARMLESS | {"batch_size"}  # the checkpoint says which batch sizes go on
            self.folder = newest_run(args, script, free) if str(args.resume) == "auto" else Path(args.resume)
            self._known = read_args(self.folder)
            if self._known["script"] != script:
                other = self._known["script"]
                raise UserError(f"{self.folder} is a run of {other}: python {other} --resume {self.folder}")
            stored = self._known["args"]
            if different := differences(stored, args, free):
                raise UserError(f"{self.folder} goes on only with its own arguments; leave out: {', '.join(different)}")
            vars(args).update({name: value for name, value in stored.items() if name not in args.given})
            self.saved = self._read_checkpoint()
            self.epoch, self.step = self.saved.get("epoch", 0), self.saved.get("step", 0)
        elif args.save:
            self.folder = Path(args.save) if "/" in args.save else Path("logs") / args.save
        else:
            self.folder = new_folder(f"logs/{name}-{args.note}" if args.note else f"logs/{name}")

    # ---- what checkpoints hold ----

    def keep(self, objects: dict[str, Any], facts: dict[str, Any] | None = None) -> None:
        """Let checkpoints hold these objects' state_dict(), and ``facts`` as they are (plain values).

        The first call makes the run folder; in a resumed run it restores the objects and the random generators from the
        last checkpoint. Later calls (a new stage) replace what has the same name.
        """
        self._kept |= objects
        self._facts |= facts or {}
        if self._signals is None:
            self._open()
        if self.saved:
            self._restore()
            self.saved = {}

    def _open(self) -> None:
        if is_main():
            if not self.resumed and checkpoint_exists(self.folder / "checkpoint.pt"):
                raise UserError(
                    f"{self.folder} holds a run already: go on with --resume {self.folder}, or take another --save"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.folder)
            for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
        command, arguments = shlex.join(["python", *sys.argv]), plain_arguments(self.args)
        if self.resumed:
            self.log(f"run folder: {self.folder} (resumed)", always=True)
            if self._known["versions"] != versions():
                was, now = self._known["versions"], versions()
                self.log(f"warning: begun with {was}, now {now}: last digits may differ", always=True)
            record = self._known | {"args": arguments, "resumed": [*self._known.get("resumed", []), command]}
        else:
            record = {"script": self.script, "command": command, "args": arguments, "versions": versions()}
            record |= {"seed": self.args.seed} | machine()
        if is_main():
            write_whole(self.folder / "args.json", json.dumps(record, indent=1) + "\n")
        if not self.resumed:
            self.log(f"run folder: {self.folder}", always=True)
        self._lines |= self.saved.get("lines", {})
        self.tensorboard = TensorBoard(self.folder, first_step=self._lines["history.jsonl"])
        self._signals = Signals()
        total = self.stages * self.args.epochs
        self._epochs_bar = self._bar(None, "epochs", total, self.epoch) if total > self.epoch else None

    def _read_checkpoint(self) -> dict:
        """The last good checkpoint, {} if there is none yet."""
        path = self.folder / "checkpoint.pt"
        if not checkpoint_exists(path):
            return {}
        saved = load_checkpoint(path)
        if not {"lines", "epoch", "step", "rng", "global_batch"} <= saved.keys():
            raise UserError(f"{path}: not the checkpoint of a run of this version, it cannot go on; start a new run")
        processes, batch = saved["processes"], saved["global_batch"]
        if batch != self.args.batch_size * world_size() or saved["step"] and processes != world_size():
            raise UserError(
                f"{self.folder} had {processes} processes of {batch // processes} images a step, now {world_size()} of"
                f" {self.args.batch_size}: only between two epochs another number can go on, with as many images in all"
            )
        return saved

    def _restore(self) -> None:
        if self._facts.get("data_hash") != self.saved.get("data_hash"):
            raise UserError(
                f"{self.folder}: the images are not those that the run began with (files were added, removed or"
                " changed), and it goes on with those only: restore them, or start a new run"
            )
        try:
            for name, kept in self._kept.items():
                kept.load_state_dict(self.saved[name])
            set_rng_state(self.saved["rng"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:60]
            raise UserError(f"{self.folder}: its checkpoint is of another run or another version ({reason})") from None

    def _save(self, best: bool = False) -> None:
        """Write a checkpoint.

        Diverged if a number in it is not finite, which losses and gradients do not show: they precede the step.
        """
        state = {name: kept.state_dict() for name, kept in self._kept.items()} | self._facts  # collectives: all ranks
        if is_main():
            if bad := first_not_finite(state):
                where = f"epoch {self.epoch}, step {self.step}"
                raise Diverged(f"{where}: {bad} is not finite; the last checkpoint is from before")
            state |= {"epoch": self.epoch, "step": self.step, "rng": rng_state(), "lines": self._lines}
            state |= {"processes": world_size(), "global_batch": self.args.batch_size * world_size()}
            if best:
                save_checkpoint(self.folder / "best.pt", state)
            save_checkpoint(self.folder / "checkpoint.pt", state)

    # ---- steps ----

    def steps(self, loader: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of this epoch that are left, under a progress bar."""
        self._started, self._cpu_started = time.time(), time.process_time()
        self._first_step, self._pending = self.step, []
        self._num_images, self._num_steps = loader.num_images, len(loader)
        if world_size() == 1:
            loader.while_waiting = self._leave_if_asked  # images that do not come must not hold up a signal
        batches = loader.epoch(self.epoch, self.step)
        self._steps_bar = self._bar(batches, f"epoch {self.epoch}", len(loader), self.step)
        for batch in self._steps_bar:
            if not is_main():  # dropout and drop path of its own; what must agree has generators of its own
                place = int(os.environ["RANK"]), self.epoch, self.step
                torch.manual_seed(int(np.random.SeedSequence(self.args.seed, spawn_key=place).generate_state(1)[0]))
            yield batch

    def after_step(
        self,
        meter: Any,
        loss: torch.Tensor,
        norm: torch.Tensor,
        arch_norm: torch.Tensor | None = None,
        note: str = "",
    ) -> None:
        """Count the step, report ``meter``, leave if a signal came, write a checkpoint if one is due.

        Diverged if loss or gradient norms are not finite: at once on a CPU, on a GPU with the next report, since a look
        at every step would make it wait.
        """
        values = [value.detach() for value in (loss, norm, arch_norm) if value is not None]
        self._pending.append((self.step, torch.stack([value.float() for value in values])))
        on_cpu = not loss.is_cuda
        if on_cpu:
            self._check_numbers()
        self.step += 1
        args, bar = self.args, self._steps_bar
        due = self.step % args.report_freq == 0 or self.step == self._num_steps
        if due or (on_cpu and world_size() == 1 and not bar.disable):
            self._report(meter, note, due)
        if world_size() == 1 or self.step % args.report_freq == 0:
            self._leave_if_asked()
        if args.checkpoint_freq and self.step % args.checkpoint_freq == 0:
            self._check_numbers()
            self._save()

    def _leave_if_asked(self) -> None:
        """After a signal, write a checkpoint and end the process; a collective under torchrun."""
        if self._signals.arrived():
            self._check_numbers()
            self._save()
            self.log(f"stopped by signal {self._signals.number} at epoch {self.epoch}, step {self.step}")
            self.close()
            self._signals.leave(self.resume_command)

    def _report(self, meter: Any, note: str, due: bool) -> None:
        if due:
            self._check_numbers()
        train, bar = meter.read(), self._steps_bar
        images = (self.step - self._first_step) * self.args.batch_size * world_size()
        speed = f"{images / (time.time() - self._started):.0f} images/s"
        bar.set_postfix_str(f"loss {train.loss:.3f}, acc {train.top1:.1f}%, {speed}{note}", refresh=False)
        if due:  # on a terminal the bar says it
            text = f"epoch {self.epoch} step {self.step}/{self._num_steps}: loss {train.loss:.4f}"
            text += f", accuracy {train.top1:.2f} %{note}, {speed}"
            self.log(text, screen=bar.disable or not sys.stdout.isatty())

    def _check_numbers(self) -> None:
        for step, values in self._pending:
            if not values.isfinite().all():
                loss, norm, arch_norm = (values.tolist() + [0.0])[:3]
                saved = checkpoint_exists(self.folder / "checkpoint.pt")
                advice = "the last checkpoint is from before: --resume it, or " if saved else ""
                raise Diverged(
                    f"epoch {self.epoch}, step {step}: loss {loss:.4g}, gradient norm {norm:.4g} (architecture"
                    f" {arch_norm:.4g}); {advice}start with a lower --learning_rate"
                )
        self._pending.clear()

    def end_epoch(self, line: dict, pictures: Callable[[], dict] = dict, best: bool = False) -> None:
        """Append the epoch's line to history.jsonl, its timing, its TensorBoard events, and write the checkpoint.

        ``pictures()`` are figures and images by name, for TensorBoard; ``best``: the checkpoint is also best.pt.
        """
        seconds = time.time() - self._started
        images = (1 - self._first_step / self._num_steps) * self._num_images
        timing = {key: line[key] for key in ("stage", "epoch") if key in line}
        timing |= {"seconds": round(seconds, 2), "cpu_seconds": round(time.process_time() - self._cpu_started, 2)}
        timing |= {"images_per_second": round(images / seconds, 1), "peak_memory_mb": round(peak_memory_mb(), 1)}
        self._append("history.jsonl", line)  # what two identical runs have in common
        self._append("timing.jsonl", timing)  # all that differs
        last = self.epoch + 1 == self.stages * self.args.epochs
        if is_main():
            self.tensorboard.write(line, pictures(), plain_arguments(self.args) if last else None)
        self.epoch, self.step = self.epoch + 1, 0
        self._save(best)
        words = {"valid_acc": "validation accuracy", "test_acc": "test accuracy", "best_acc": "best"}
        shown = [f"{text} {line[name]:.1f}%" for name, text in words.items() if line.get(name) is not None]
        self._epochs_bar.set_postfix_str(", ".join(shown), refresh=False)
        self._epochs_bar.update()

    # ---- the folder ----

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run."""
        python = "python" if world_size() == 1 else f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"
        return f"{python} {self.script} --resume {shlex.quote(str(self.folder))}"

    def log(self, text: str, always: bool = False, screen: bool = True) -> None:
        """One line to log.txt with the time, and to the screen if ``screen`` and not --quiet, or if ``always``."""
        if is_main():
            with open(self.folder / "log.txt", "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            if always or (screen and not self.args.quiet):
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def write(self, name: str, text: str) -> None:
        """Write a small file of the folder, such as genotype.txt, whole."""
        if is_main():
            write_whole(self.folder / name, f"{text}\n")

    def close(self) -> None:
        """Take down bars and signal handlers, flush TensorBoard, release the lock."""
        if self._epochs_bar is not None:
            self._epochs_bar.close()
        self._signals.restore()
        self.tensorboard.close()
        if is_main() and self._lock is not None:
            self._lock.close()

    def _append(self, name: str, line: dict) -> None:
        """Write a line behind those that the checkpoint knows; what a killed process wrote after it is gone."""
        if is_main():
            path = self.folder / name
            known = path.read_bytes().splitlines(keepends=True)[: self._lines[name]] if path.exists() else []
            text = json.dumps(line, default=lambda value: value.tolist())
            write_whole(path, b"".join(known) + text.encode() + b"\n")
        self._lines[name] += 1

    def _bar(self, iterable: Iterable | None, name: str, total: int, initial: int) -> tqdm:
        """A progress bar that fits into 80 columns."""
        shape = "{desc} {bar} {n_fmt}/{total_fmt}, {remaining} left{postfix}"
        return progress(iterable, self.args.quiet, desc=name, total=total, initial=initial, bar_format=shape)


# ---- random generators ----------------------------------------------------------------------------------------------


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


# ---- signals --------------------------------------------------------------------------------------------------------


class Signals:
    """SIGTERM (pre-emption) or SIGINT (Ctrl-C) ends a run after its step, the second one at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._pid = os.getpid()
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        self.number = number
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return  # torchrun sends a signal more than once, and kills what does not end in its own time
        for repeated in self._before:
            signal.signal(repeated, signal.SIG_DFL)
        if os.getpid() == self._pid:  # forked loader workers have this handler too
            os.write(2, b"\nstopping after this step; once more to stop at once\n")

    def arrived(self) -> bool:
        """True if any rank got a signal; the same on all ranks (a collective: all call it at the same step)."""
        if world_size() > 1:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            flag = torch.tensor(self.number or 0, device=device)
            together(dist.all_reduce, flag, dist.ReduceOp.MAX)
            self.number = flag.item() or None
        return self.number is not None

    def leave(self, resume_command: str) -> None:
        """Print how to go on, as the last line, and leave with 143 (SIGTERM) or 130 (SIGINT)."""
        if is_main():
            tqdm.write(f"stopped; this goes on with it:\n{resume_command}", file=sys.stdout)  # above the bars
            sys.stdout.flush()
        leave_distributed()
        sys.exit(128 + self.number)
