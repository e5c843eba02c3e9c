"""Time and memory at the papers' sizes: bash shell/bench.sh [--quick] [--device cuda] [--against FOLDER]

Each row computes the same step in three ways, in turn in this process, and gives the least seconds of each: the
definition (model_search.py, model.py, operations.py) as published, with images in NCHW and gradients of everything; the
same in channels_last, the strongest baseline without our code; and ours. Ratios are against that baseline. Peak memory
is that of one step in a process of its own, above what it held before (on a GPU: of its tensors, in this process).
A second table has the DDSAS search step without each of fast.py's tricks. Writes results.json.

--against FOLDER: the steps of another checkout and of this one in alternation, each tree in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from steps import (
    TRICKS,
    Setting,
    Step,
    Way,
    evaluation,
    measure_peak,
    measure_seconds,
    retraining_step,
    search_step,
    use_tf32,
)
from torchvision import transforms

import genotypes
from genotypes import CELL_TYPES
from lib import data
from space import DynamicSpace

HERE = Path(__file__).resolve().parent

# ---- what is measured ------------------------------------------------------------------------------------------------

WAYS = {
    "published": Way(),
    "channels_last": Way(channels_last=True),
    "ours": Way(channels_last=True, frozen=True, fast=True),
}


def augmentation(at: Setting) -> Step:
    """20 batches: ours on whole batches, otherwise torchvision's transforms image by image through PIL."""
    train, _, info = data.train_data(
        "fashion_mini", ".data", batch_size=at.batch, seed=0, cutout=16, device=at.device.type
    )
    with np.load(HERE.parent / "fashion_mini.npz") as arrays:
        pictures = [Image.fromarray(np.pad(a, 2)).convert("RGB") for a in arrays["train_images"][: at.batch]]
    chain = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(info.mean, info.std),
            transforms.RandomErasing(1.0, scale=(0.25, 0.25), ratio=(1, 1), value=0),  # cutout 16 of 32
        ]
    )

    def one_by_one() -> torch.Tensor:
        return [torch.stack([chain(picture) for picture in pictures]) for _ in range(20)][-1]

    def whole() -> torch.Tensor:
        return [x for _, (x, _) in zip(range(20), train.epoch(0), strict=False)][-1]

    return whole if at.way.fast else one_by_one


WORK: dict[str, tuple[int, Callable[[Setting], Step]]] = {  # batch, and what builds the step
    "DDSAS search step": (64, search_step),
    "P-DARTS stage-1 step": (96, partial(search_step, layers=5, max_ops=None)),
    "retraining step": (96, retraining_step),
    "evaluation": (96, evaluation),
    "20 augmented batches": (96, augmentation),
}
WITH_MEMORY = list(WORK)[:3]
SAME = {("20 augmented batches", "channels_last"): "published"}


def ours(name: str, batch: int) -> Step:
    """The step as the scripts compute it; another checkout's run.py asks this one for it."""
    return WORK[name][1](Setting(batch, WAYS["ours"]))


# ---- without one trick -----------------------------------------------------------------------------------------------

NO_GRADIENTS = "no gradients that a step does not use"  # of weights in the step on alpha, of alpha in the other
WITHOUT = {name: WAYS["ours"] for name in TRICKS} | {
    NO_GRADIENTS: WAYS["ours"]._replace(frozen=False),
    "all of fast.py (--plain)": WAYS["ours"]._replace(fast=False),
}


def build(name: str, which: str, at: Setting) -> Step:
    """The step ``name`` in one of WAYS; or ours without one of WITHOUT."""
    step = WORK[name][1](at._replace(way=(WAYS | WITHOUT)[which]))

    def without() -> torch.Tensor:
        with TRICKS[which]():
            return step()

    return without if which in TRICKS else step


# ---- measuring -------------------------------------------------------------------------------------------------------


def in_turn(steps: dict[str, Step], repetitions: int, device: torch.device) -> dict[str, float]:
    """Least seconds of each, A B A B ..., after one of each that does not count."""
    times = [{name: measure_seconds(step, device) for name, step in steps.items()} for _ in range(repetitions + 1)][1:]
    return {name: min(row[name] for row in times) for name in steps}


def memory(name: str, which: str, at: Setting) -> float:
    """measure_peak of the first step; on a CPU in a process of its own."""
    if at.device.type == "cuda":
        return measure_peak(build(name, which, at), at.device)
    command = [sys.executable, str(HERE / "run.py"), "--memory", name, which]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def space_ms() -> float:
    """Milliseconds of one update and sample of the dynamic space."""
    rng, space = np.random.default_rng(0), DynamicSpace(genotypes.PRIMITIVES)
    arrays = [{kind: rng.random((14, 8)) for kind in CELL_TYPES} for _ in range(2)]

    def one() -> None:
        space.update(*arrays)
        space.sample()

    return 1000 * min(measure_seconds(one, torch.device("cpu")) for _ in range(200))


# ---- another checkout ------------------------------------------------------------------------------------------------

WORKER = """
import sys
sys.path.insert(0, "benchmarks")
import time, run
name, batch = sys.argv[1], int(sys.argv[2])
step = run.ours(name, batch) if hasattr(run, "ours") else run.WORK[name][1](batch)[1]  # (plain, ours), once
step()
for _ in sys.stdin:
    started = time.perf_counter()
    step()
    print(time.perf_counter() - started, flush=True)
"""


def compare(other: Path, quick: bool, repetitions: int) -> dict[str, dict[str, float]]:
    """Least seconds of our step in the other tree and in this one, A B A B ..., in two processes that live on."""
    found = {}
    print("| work | batch | there | here | here / there |\n|---|---|---|---|---|")
    for name, (batch, _) in WORK.items():
        batch = batch // 4 if quick else batch
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", WORKER, name, str(batch)]
        trees = {"there": other, "here": HERE.parent}
        workers = {tree: subprocess.Popen(command, cwd=folder, **pipes) for tree, folder in trees.items()}
        times: dict[str, list[float]] = {tree: [] for tree in trees}
        for _ in range(repetitions):
            for tree, worker in workers.items():
                worker.stdin.write("\n")
                worker.stdin.flush()
                times[tree].append(float(worker.stdout.readline()))
        for worker in workers.values():
            worker.communicate()
        there, here = (min(times[tree]) for tree in trees)
        found[name] = {"there_s": there, "here_s": here, "ratio": here / there}
        print(f"| {name} | {batch} | {there:.3f} s | {here:.3f} s | {here / there:.2f} |", flush=True)
    return found


# ---- output ----------------------------------------------------------------------------------------------------------


def compare_ways(quick: bool, repetitions: int, device: torch.device) -> dict[str, dict[str, float]]:
    """The first table, printed row by row."""
    found = {}
    print("| work | batch | published | channels_last | ours | ratio | peaks | ratio |\n" + "|---" * 8 + "|")
    for name, (batch, _) in WORK.items():
        at = Setting(batch // 4 if quick else batch, device=device)
        steps = {way: build(name, way, at) for way in WAYS if (name, way) not in SAME}
        row = in_turn(steps, repetitions, device)
        row |= {way: row[SAME[name, way]] for way in WAYS if way not in row}
        cells = [name, str(at.batch), *(f"{row[way]:.3f} s" for way in WAYS)]
        cells += [f"{row['channels_last'] / row['ours']:.2f}x"]
        if name in WITH_MEMORY and not quick:
            peaks = {way: memory(name, SAME.get((name, way), way), at) for way in WAYS}
            row |= {f"{way}_mb": peak for way, peak in peaks.items()}
            cells += [" / ".join(f"{peak:.0f}" for peak in peaks.values()) + " MB"]
            cells += [f"{peaks['ours'] / peaks['channels_last']:.2f}"]
        print("| " + " | ".join(cells + [""] * (8 - len(cells))) + " |", flush=True)
        found[name] = row
    found["space"] = {"update_and_sample_ms": space_ms()}
    print(f"| update and sample of the space | | | | {found['space']['update_and_sample_ms']:.2f} ms | | | |")
    return found


def compare_tricks(quick: bool, repetitions: int, device: torch.device) -> dict[str, dict[str, float]]:
    """The second table: seconds of the DDSAS search step without a trick over those with all, likewise peaks."""
    name, found = next(iter(WORK)), {}
    at = Setting(WORK[name][0] // (4 if quick else 1), device=device)
    print(f"\n| {name} without | seconds, of ours | peak, of ours |\n|---|---|---|")
    peak = None if quick else memory(name, "ours", at)
    for trick in WITHOUT:
        times = in_turn({which: build(name, which, at) for which in ("ours", trick)}, repetitions, device)
        row = found[trick] = {"seconds": times[trick] / times["ours"]}
        if peak:
            row["peak"] = memory(name, trick, at) / peak
        print(f"| {trick} | " + " | ".join(f"{ratio:.2f}" for ratio in row.values()) + " |", flush=True)
    return found


def main(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    use_tf32(True)
    repetitions = args.repetitions or (1 if args.quick else 5)
    if args.memory:
        name, which = args.memory
        print(measure_peak(build(name, which, Setting(WORK[name][0])), torch.device("cpu")))
        return
    if args.against:
        compare(args.against, args.quick, repetitions)
        return
    name = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"PyTorch {torch.__version__}, {name}, {'float32' if device.type == 'cpu' else 'TF32'}\n")
    results = {"steps": compare_ways(args.quick, repetitions, device)}
    results["without"] = compare_tricks(args.quick, repetitions, device)
    if not args.quick:
        (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwritten: {HERE.name}/results.json")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of each batch, once; no memory, no file")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--repetitions", type=int, help="of each step, whose least counts; default: 5, once if --quick")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout of this project")
    parser.add_argument("--memory", nargs=2, metavar=("WORK", "WAY"), help="print the MB of one step on the CPU")
    return parser


if __name__ == "__main__":
    main(get_parser().parse_args())
