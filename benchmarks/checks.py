"""Whether the networks compute the published numbers on a device, and whether every script runs there to its end.

gpu.py and tests/test_cuda.py ask this. As a command it starts a script where few packages are: see `launch`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import itertools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import IO
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


class Bar:
    """Instead of a progress bar: passes on the items, prints what is written beside it, and does nothing else."""

    disable = True

    def __init__(self, iterable: Iterable = (), total: int = 0, **_: object) -> None:
        self.items, self.total = iterable, total

    def __iter__(self) -> Iterator:
        return iter(self.items)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> MagicMock:
        return MagicMock()

    @staticmethod
    def write(text: str, file: IO | None = None, **_: object) -> None:
        print(text, file=file)


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds these packages and their modules: whatever is called in them does nothing."""

    packages = {"graphviz", "matplotlib", "tensorboard", "tqdm"}

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        known = name.partition(".")[0] in self.packages
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> MagicMock:
        return MagicMock(tqdm=Bar)

    def exec_module(self, module: MagicMock) -> None:
        pass


sys.meta_path.append(StandIns())  # behind all others: only what is not installed is replaced


from golden_arrays import active_lists, golden, load_weights  # noqa: E402
from steps import use_tf32  # noqa: E402

import fast  # noqa: E402
import genotypes  # noqa: E402
import model  # noqa: E402
from genotypes import CELL_TYPES, PRIMITIVES  # noqa: E402
from model_search import Architecture, Network  # noqa: E402


def golden_errors(device: torch.device) -> dict[str, float]:
    """How far the networks are from the published ones in float32, relative to the largest entry of each array."""
    use_tf32(False)
    errors = {}

    def compare(name: str, ours: torch.Tensor, expected: np.ndarray) -> None:
        error = np.abs(ours.detach().cpu().numpy() - expected).max() / np.abs(expected).max()
        errors[name] = max(errors.get(name, 0.0), float(error))

    arrays = golden("supernet_simple_norm.npz")
    x, y = (torch.tensor(arrays[name], device=device) for name in ("x", "y"))
    active = active_lists({kind: arrays[f"active_{kind}"] for kind in CELL_TYPES})
    for way in ("definition", "fast.py"):
        network, architecture = Network(4, 10, 3, PRIMITIVES), Architecture(14, 8)
        load_weights(network, arrays)
        network, architecture = network.to(device), architecture.to(device)
        with torch.no_grad():
            for name, parameter in architecture.named_parameters():
                parameter.copy_(torch.tensor(arrays[name]))
        forward = partial(fast.supernet_forward, network) if way == "fast.py" else network
        logits = forward(x, architecture.weights(active), active)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        compare(f"supernet, {way}: logits", logits, arrays["logits"])
        compare(f"supernet, {way}: loss", loss, arrays["loss"])
        for name, parameter in architecture.named_parameters():
            compare(f"supernet, {way}: gradients of alpha and beta", parameter.grad, arrays[f"grad/{name}"])
    for name in ("DDSAS_cifar10", "DDSAS_cifar100", "PDARTS"):
        arrays = golden(f"network_{name}.npz")
        network = model.NetworkCIFAR(4, 7, 5, False, genotypes.load(name)).eval()
        load_weights(network, arrays)
        network = network.to(device)
        with torch.no_grad():
            for folded, net in (("", network), (", folded", model.fuse(network))):
                compare(f"{name}{folded}", net(torch.tensor(arrays["x"], device=device))[0], arrays["logits"])
    return errors


def run(command: list[str], log: IO, seconds: float, **options: object) -> int:
    """A command's exit code; after so many seconds it is ended, and what it has started with it."""
    process = subprocess.Popen(command, stdout=log, stderr=log, **options)
    try:
        return process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        try:
            return process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


TINY = "--dataset folder --image_size 16 --init_channels 4 --layers 3 --batch_size 12 --epochs 1 --quiet --no-tf32"
STAGES = "--layers 2 --add_layers 1 --add_layers 2 --dropout_rate 0.1 --dropout_rate 0.4 --dropout_rate 0.7"
METHODS = {
    "ddsas": f"search.py {TINY} --gumbel --dss_freq 2 --cutout",
    "darts": f"search.py {TINY} --method darts",
    "gdas": f"search.py {TINY} --method gdas",
    "pdarts": f"train_search.py {TINY} {STAGES} --eps_no_arch 0",
    "retraining": f"retrain.py {TINY} --arch DDSAS_cifar10 --auxiliary --drop_path_prob 0.2",
}


class Scripts:
    """The scripts as their users start them, on a few tiny images, and what is in their run folders afterwards."""

    def __init__(self, device: torch.device, folder: Path, left: Callable[[], float] = lambda: 600.0) -> None:
        """``left()``: the seconds that a script may take from now on."""
        self.device, self.folder, self.left = device, folder, left
        self.data, self.number = make_pictures(folder / "pictures"), itertools.count()

    def start(self, words: str, prefix: tuple[str, ...] = (), environment: dict[str, str] | None = None) -> Path:
        """Start a script with its arguments and see it to its end; its run folder."""
        folder = self.folder / f"run{next(self.number)}-"
        self.see_through([*prefix, *self.command(words, folder)], environment)
        return next(path.parent for path in self.folder.glob(f"{folder.name}*/history.jsonl"))

    def go_on(self, words: str) -> None:
        """Resume a run; the words say where it is."""
        script, *arguments = words.split()
        self.see_through([str(HERE / "checks.py"), script, *arguments])

    def see_through(self, arguments: list[str], environment: dict[str, str] | None = None) -> str:
        """Run Python with these arguments; what it printed. RuntimeError with its last words if it fails."""
        with tempfile.TemporaryFile("w+") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})  # several run side by side
            code = run([sys.executable, *arguments], log, self.left(), env=environment)
            log.seek(0)
            printed = log.read()
        if code:
            raise RuntimeError(f"exit code {code}: {' / '.join(printed.strip().splitlines()[-2:])}")
        return printed

    def command(self, words: str, folder: Path) -> list[str]:
        """Python's arguments that start a script, with pictures, device and run folder before its own words."""
        script, *arguments = words.split()
        where = ["--data", str(self.data), "--device", str(self.device), "--save", str(folder)]
        return [str(HERE / "checks.py"), script, *where, *arguments]

    def epoch(self, method: str, more: str = "") -> dict:
        """An epoch (P-DARTS: three stages of one) of a method."""
        folder = self.start(f"{METHODS[method]} {more}")
        losses = [line["train_loss"] for line in lines(folder / "history.jsonl")]
        return {"ok": all(0 < loss < 20 for loss in losses), "train_loss": losses}

    def resume(self, script: str, more: str) -> dict:
        """Three epochs at once, and killed after the first and resumed: the losses of both."""
        words = f"{script} {TINY.replace('--epochs 1', '--epochs 3')} --checkpoint_freq 1 {more}"
        whole, folder = self.start(words), self.folder / f"killed{next(self.number)}"
        null = subprocess.DEVNULL
        command, environment = [sys.executable, *self.command(words, folder)], os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=null, stderr=null, env=environment)
        while not (folder / "history.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
        before = len(lines(folder / "history.jsonl"))
        self.go_on(f"{script} --resume {folder}")
        losses = [[line["train_loss"] for line in lines(run / "history.jsonl")] for run in (whole, folder)]
        error = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
        return {
            "ok": before < 3 and error <= (2e-2 if self.device.type == "cuda" else 0),
            "epochs before": before,
            "largest relative difference": error,
            "train_loss": losses,
        }

    def two_processes(self) -> dict:
        """Two processes of torchrun on one device, by gloo, which accepts that; the scripts check that they agree."""
        torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
        losses = [
            line["train_loss"]
            for method in ("ddsas", "retraining")
            for line in lines(self.start(METHODS[method], torchrun) / "history.jsonl")
        ]
        return {"ok": all(0 < loss < 20 for loss in losses), "train_loss": losses}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def make_pictures(root: Path) -> Path:
    """A folder of real images: 3 classes, 16x16 pixels, 24 training and 8 test images each, of fashion_mini."""
    with np.load(ROOT / "fashion_mini.npz") as arrays:
        for part, count in (("train", 24), ("test", 8)):
            for label in range(3):
                (folder := root / part / f"class{label}").mkdir(parents=True)
                for i in np.flatnonzero(arrays[f"{part}_labels"] == label)[:count]:
                    Image.fromarray(arrays[f"{part}_images"][i]).resize((16, 16)).save(folder / f"{i}.png")
    return root


def launch(script: str, *arguments: str) -> None:
    """Run a script in this process, as its command line does, without what a machine for computing need not have.

    That draws and shows: its packages are replaced by ones that do nothing. nccl refuses two processes on one GPU, gloo
    takes them. With COUNT_WAITS a file's name, it gets how often each line has waited for the GPU.
    """
    sys.meta_path.insert(0, StandIns())
    sys.modules["torch.utils.tensorboard"] = MagicMock()
    importlib.import_module("visualize").epoch_pictures = lambda line: {}
    if "WORLD_SIZE" in os.environ:
        start = dist.init_process_group
        dist.init_process_group = lambda backend, **options: start("gloo", **options)
    sys.argv = [script, *arguments]
    with count_waits(os.environ["COUNT_WAITS"]) if "COUNT_WAITS" in os.environ else nullcontext():
        runpy.run_path(str(ROOT / script), run_name="__main__")


@contextmanager
def count_waits(path: str) -> Iterator[None]:
    """Write to the file how often each line of Python has made the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits = [w for w in caught if "synchroniz" in str(w.message)]
            counts = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
            Path(path).write_text(json.dumps(dict(counts.most_common())))


if __name__ == "__main__":
    launch(*sys.argv[1:])
