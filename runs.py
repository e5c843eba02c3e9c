"""Run folders (stand-in: the functions of utils.py, until they move here)."""

from __future__ import annotations

import argparse
import itertools
import os
import time
from pathlib import Path

from utils import Run, Run as RunFolder, Stop, write_whole, read_weights, save_checkpoint, load_checkpoint, UserError  # noqa


def resume_run(args: argparse.Namespace, script: str, may_change: tuple[str, ...] = ("epochs",)) -> Run | None:
    """The run that --resume names, whose arguments ``args`` takes over; None without --resume."""
    if not args.resume:
        return None
    root = os.path.dirname(args.save or "") or "logs"  # where `auto` looks
    return Run.resume(args.resume, args, script, may_change, root, check_epochs)


def create_run(args: argparse.Namespace, script: str, name: str) -> Run:
    """A new run folder: --save, below logs/ if it is a plain name, or one named after what is run and the time."""
    if args.save:
        folder = Path(args.save) if "/" in args.save else Path("logs") / args.save
    else:
        folder = new_folder(f"logs/{name}-{args.note}" if args.note else f"logs/{name}")
    return Run.create(folder, args, script)


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
    if args.epochs < epochs or not constant or getattr(args, "gumbel", False) or args.drop_path_prob:
        raise UserError(
            f"--epochs was {epochs}, now {args.epochs}: the schedule of the epochs already run depends on it; only a"
            " run with a constant learning rate (--learning_rate_min equal to --learning_rate), --drop_path_prob 0 and"
            " without --gumbel can be made longer"
        )


def retrain_command(script, args, folder):
    return f"python retrain.py --dataset {args['dataset']} --arch {folder}"
