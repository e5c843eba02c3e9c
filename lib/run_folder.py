"""Run folders from outside: args.json, which folder is new or newest, what locks one, which commands come next."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import platform
import re
import shlex
import subprocess
from pathlib import Path

import torch

from lib.cli import UserError

try:
    import fcntl
except ImportError:  # Windows: there is no lock
    fcntl = None


def versions() -> dict[str, str]:
    """The versions that decide over last digits."""
    packages = ("torch", "torchvision", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def machine() -> dict[str, str]:
    """The processor and the GPU in use, the number of threads, the code's commit ("+" behind it: changed since)."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    processor = [*names, platform.processor() or platform.machine()][0]
    if torch.cuda.is_initialized():
        processor += f", {torch.cuda.get_device_name()}"
    return {"processor": processor, "threads": torch.get_num_threads(), "commit": commit}


def plain_arguments(args: argparse.Namespace) -> dict:
    """The arguments as they come back from args.json."""
    plain = {name: value for name, value in vars(args).items() if name not in ("given", "resume")}
    return json.loads(json.dumps(plain, default=str))


def read_args(folder: Path) -> dict:
    """args.json of a run folder; UserError if it is none."""
    try:
        record = json.loads((folder / "args.json").read_text())
        if isinstance(record["args"], dict) and "versions" in record and isinstance(record["script"], str):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"--resume {folder}: not a run folder (no readable args.json); expected one like logs/NAME, or auto"
    )


def differences(stored: dict, args: argparse.Namespace, free: set[str]) -> list[str]:
    """The arguments given on the command line that are not the stored ones, as "--epochs (was 50, now 60)"."""
    new = {name: value for name, value in plain_arguments(args).items() if name in args.given - free}
    return [f"--{n} (was {stored.get(n)}, now {v})" for n, v in new.items() if n not in stored or stored[n] != v]


def newest_run(args: argparse.Namespace, script: str, free: set[str]) -> Path:
    """The folder beside --save or in logs/ with the newest checkpoint of this script and the given arguments."""
    root, found = os.path.dirname(args.save or "") or "logs", []
    for checkpoint in Path(root).glob("*/checkpoint*.pt"):
        try:
            record = read_args(checkpoint.parent)
        except UserError:
            continue
        if record["script"] == script and not differences(record["args"], args, free):
            found.append((checkpoint.stat().st_mtime_ns, checkpoint.parent))
    if not found:
        raise UserError(f"--resume auto: {root}/ has no run of {script} with these arguments and a checkpoint")
    return max(found)[1]


def lock_folder(folder: Path) -> io.TextIOBase | None:
    """Lock the folder for this process: a POSIX lock, which forked loader workers do not keep and any death frees."""
    if fcntl is None:
        return None
    file = open(folder / "lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"{folder} is in use by another process: stop that one, or take another --save") from None
    return file


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
        flags = ["train_cifar.py" if pdarts else "retrain.py", "--dataset", dataset]
        flags += ["--data", images] if images not in (None, ".data") else []
        flags += ["--image_size", str(size)] if size else []
        flags.append("--cutout")
    if not str(args.get("space_config")).endswith("nasbench201"):  # whose networks have no auxiliary head
        flags.append("--auxiliary")
    return shlex.join(["python", *flags, "--arch", str(folder)])
