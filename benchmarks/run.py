"""Time and memory at the papers' sizes, with fast.py and without (--plain): bash shell/bench.sh [--quick]

Each row times the plain formulation (the definitions in operations.py, model_search.py and model.py) and ours in turn
in this process and gives the ratio of the medians; peak memory is that of one step in a process of its own, above what
it held before the step. Prints tables, writes results.json and growth.png beside this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import bilevel  # noqa: E402
import data  # noqa: E402

import fast  # noqa: E402
import genotypes  # noqa: E402
import model  # noqa: E402
from genotypes import CELL_TYPES  # noqa: E402
from model_search import Architecture, DynamicSpace, Network  # noqa: E402
from retrain import gradient_step  # noqa: E402


class Step(NamedTuple):
    """A whole step with optimizers, to be called; and its forward pass, to the loss (in evaluation to the logits)."""

    network: torch.nn.Module
    forward: Callable[[], torch.Tensor]
    step: Callable[[], object]

    def __call__(self) -> None:
        self.step()


Pair = tuple[Callable[[], object], Callable[[], object]]  # (plain, ours)


# ---- what is measured ----------------------------------------------------------------------------------------------


def images(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))


def plain_copy(network: torch.nn.Module) -> torch.nn.Module:
    return fast.switch_off(copy.deepcopy(network))


def search_step(batch: int, layers: int, max_ops: int | None, candidates: int = 8) -> Pair:
    """An architecture step and a weight step; max_ops None: softmax of alpha over ``candidates`` an edge (P-DARTS)."""
    torch.manual_seed(0)
    rng, P = np.random.default_rng(0), genotypes.PRIMITIVES
    chosen = {
        kind: [[P[k] for k in sorted(rng.choice(8, candidates, replace=False))] for _ in range(genotypes.EDGES)]
        for kind in CELL_TYPES
    }
    network = Network(16, 10, layers, chosen)
    architecture, active = Architecture(genotypes.EDGES, candidates), None
    if not max_ops:
        architecture = torch.nn.ParameterDict(architecture.alphas())
    if max_ops:
        space = DynamicSpace(genotypes.PRIMITIVES, max_ops=max_ops)
        space.sample_random(np.random.default_rng(0))
        active = space.active_ops()
    x, y = images(batch)

    def weights() -> dict[str, torch.Tensor]:
        if max_ops:
            return architecture.weights(active)
        return {kind: alpha.softmax(-1) for kind, alpha in architecture.items()}

    def optimizers(network: torch.nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        sgd = torch.optim.SGD(network.parameters(), 0.025, 0.9, weight_decay=3e-4)
        return sgd, torch.optim.Adam(architecture.parameters(), 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)

    plain = plain_copy(network)
    (plain_sgd, plain_adam), (sgd, adam) = optimizers(plain), optimizers(network)

    def loss_of(network: torch.nn.Module) -> torch.Tensor:
        return F.cross_entropy(network(x, weights(), active), y)

    def plain_step() -> None:
        plain_adam.zero_grad()
        loss_of(plain).backward()  # into everything
        plain_adam.step()
        plain_sgd.zero_grad()
        loss_of(plain).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 5)
        plain_sgd.step()

    def our_step() -> None:
        bilevel.architecture_backward(network, sgd, weights(), active, x, y)
        bilevel.clip_and_step(architecture, adam, 0)
        with torch.no_grad():
            w = weights()
        bilevel.backward_clip_and_step(sgd, F.cross_entropy(network(x, w, active), y), 5)

    return Step(plain, lambda: loss_of(plain), plain_step), Step(network, lambda: loss_of(network), our_step)


def retraining_step(batch: int) -> Pair:
    torch.manual_seed(0)
    network = model.NetworkCIFAR(36, 10, 20, True, genotypes.load("DDSAS_cifar10"))
    network.drop_path_prob = 0.1
    x, y = images(batch)

    def step(network: torch.nn.Module) -> Step:
        sgd = torch.optim.SGD(network.parameters(), 0.025, 0.9, weight_decay=3e-4)

        def loss() -> torch.Tensor:
            logits, auxiliary_logits = network(x)
            return F.cross_entropy(logits, y) + 0.4 * F.cross_entropy(auxiliary_logits, y)

        return Step(network, loss, lambda: gradient_step(network, sgd, loss(), 5))

    return step(plain_copy(network)), step(network)


def evaluation(batch: int) -> Pair:
    torch.manual_seed(0)
    network = model.NetworkCIFAR(36, 10, 20, False, genotypes.load("DDSAS_cifar10")).eval()
    plain, fused = plain_copy(network), model.fuse(network)
    x, _ = images(batch)

    def run(network: torch.nn.Module, mode: Callable) -> Step:
        def one() -> torch.Tensor:
            with mode():
                return network(x)[0]

        return Step(network, one, one)

    return run(plain, torch.no_grad), run(fused, torch.inference_mode)


def augmentation(batch: int) -> Pair:
    """20 batches: torchvision's transforms image by image through PIL, and data.py's on whole batches."""
    train, _, info = data.train_data("fashion_mini", ".data", batch_size=batch, seed=0, cutout=16, device="cpu")
    with np.load(HERE.parent / "fashion_mini.npz") as arrays:
        pictures = [Image.fromarray(np.pad(a, 2)).convert("RGB") for a in arrays["train_images"][: 2 * batch]]
    chain = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(info.mean, info.std),
            transforms.RandomErasing(1.0, scale=(0.25, 0.25), ratio=(1, 1), value=0),  # cutout 16 of 32
        ]
    )

    def one_by_one() -> None:
        for part in (pictures[:batch], pictures[batch:]) * 10:
            torch.stack([chain(picture) for picture in part])

    def whole() -> None:
        for _, _ in zip(range(20), train.epoch(0), strict=False):
            pass

    return one_by_one, whole


WORK: dict[str, tuple[int, Callable[[int], Pair]]] = {  # batch, and the pair for a batch
    "DDSAS search step": (64, lambda batch: search_step(batch, 8, 28)),
    "P-DARTS stage-1 step": (96, lambda batch: search_step(batch, 5, None)),
    "retraining step": (96, retraining_step),
    "evaluation": (96, evaluation),
    "20 augmented batches": (96, augmentation),
}
WITH_MEMORY = list(WORK)[:3]


# ---- measuring -----------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turn(pair: Pair, repetitions: int) -> tuple[float, float]:
    """Median seconds of both, A B A B ..., after one of each that does not count."""
    times = [[seconds(work) for work in pair] for _ in range(repetitions + 1)][1:]
    return tuple(statistics.median(column) for column in zip(*times, strict=True))


def memory_of_one_step(name: str, which: int) -> float:
    """MB that the first step takes above what the process held before it (Linux: the peak can be reset)."""
    batch, build = WORK[name]
    work = build(batch)[which]
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def memory(name: str) -> list[float]:
    """Peak MB of (plain, ours), each in a process of its own."""
    command = [sys.executable, str(HERE / "run.py"), "--memory", name]
    outputs = [subprocess.run([*command, which], check=True, capture_output=True, text=True) for which in ("0", "1")]
    return [float(output.stdout.split()[-1]) for output in outputs]


def space_ms() -> float:
    """Milliseconds of one update and sample of the dynamic space."""
    rng, space = np.random.default_rng(0), DynamicSpace(genotypes.PRIMITIVES)
    arrays = [{kind: rng.random((14, 8)) for kind in CELL_TYPES} for _ in range(2)]

    def one() -> None:
        space.update(*arrays)
        space.sample()

    return 1000 * statistics.median(seconds(one) for _ in range(200))


def growth() -> dict[str, dict[int, float]]:
    """Seconds of our DDSAS search step against max_ops, layers and batch, the others at the paper's values."""
    paper = {"batch": 64, "layers": 8, "max_ops": 28}
    values = {"max_ops": (14, 28, 56, 98), "layers": (5, 8, 12, 20), "batch": (16, 32, 64, 128)}
    found = {}
    for name, sizes in values.items():
        found[name] = {}
        for size in sizes:
            step = search_step(**(paper | {name: size}))[1]
            step()
            found[name][size] = min(seconds(step) for _ in range(2))
    return found


KINDS = {
    "convolution": ("convolution", "conv2d"),
    "matrix product": ("mm", "addmm", "addmv", "bmm", "mv", "dot"),
    "batch normalisation": ("batch_norm",),
    "pooling": ("pool",),
    "copy and layout": ("copy", "cat", "contiguous", "clone", "fill", "zero", "pad", "empty"),
    "elementwise and sums": ("add", "mul", "relu", "threshold", "sum", "lerp", "div", "sub", "clamp"),
}


def summary() -> tuple[dict[str, float], float, float]:
    """Milliseconds of our DDSAS step per kind of operation, GFLOP of the plain one, GFLOP/s of a matrix product."""
    plain_step, step = search_step(64, 8, 28)
    step()
    with FlopCounterMode(display=False) as counter:
        plain_step()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    spent: dict[str, float] = {}
    for event in trace.key_averages():
        kind = next((k for k, words in KINDS.items() if any(w in event.key for w in words)), "all else, Python")
        spent[kind] = spent.get(kind, 0) + event.self_cpu_time_total / 1000
    a = torch.randn(2048, 2048)
    rate = 2 * 2048**3 / min(seconds(lambda: a @ a) for _ in range(5)) / 1e9
    return dict(sorted(spent.items(), key=lambda item: -item[1])), counter.get_total_flops() / 1e9, rate


# ---- output --------------------------------------------------------------------------------------------------------


def plot(found: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"max_ops": "active operations per cell type", "layers": "cells", "batch": "batch size"}
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True, layout="constrained")
    for axis, (name, times) in zip(axes, found.items(), strict=True):
        axis.plot(list(times), list(times.values()), "o-", color="#0072B2")
        axis.set(xlabel=titles[name], xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds per search step")
    figure.savefig(path, dpi=150)


def main(args: argparse.Namespace) -> None:
    if args.memory:
        print(memory_of_one_step(args.memory[0], int(args.memory[1])))
        return
    results: dict[str, dict] = {}
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    print(
        "| work | batch | plain | ours | ratio | plain, peak | ours, peak | ratio |\n|---|---|---|---|---|---|---|---|"
    )
    for name, (batch, build) in WORK.items():
        batch = batch // 4 if args.quick else batch
        slow, fast = in_turn(build(batch), 1 if args.quick else args.repetitions)
        row = results[name] = {"plain_s": slow, "ours_s": fast, "speedup": slow / fast}
        cells = [str(batch), f"{slow:.2f} s", f"{fast:.3f} s", f"{slow / fast:.1f}x"]
        if name in WITH_MEMORY and not args.quick:
            row["plain_mb"], row["ours_mb"] = memory(name)
            cells += [
                f"{row['plain_mb']:.0f} MB",
                f"{row['ours_mb']:.0f} MB",
                f"{row['ours_mb'] / row['plain_mb']:.2f}",
            ]
        print("| " + " | ".join([name, *cells, *[""] * (7 - len(cells))]) + " |", flush=True)
    results["space"] = {"update_and_sample_ms": space_ms()}
    print(f"| update and sample of the space | | | {results['space']['update_and_sample_ms']:.2f} ms | | | | |")

    spent, gflop, rate = summary()
    results["profile"] = {"ms": spent, "gflop": gflop, "matmul_gflop_per_s": rate}
    print(
        f"\nDDSAS search step, plain: {gflop:.0f} GFLOP, at {rate:.0f} GFLOP/s of a matrix product {gflop / rate:.2f} s"
    )
    print("| kind of operation | ms |\n|---|---|")
    for kind, ms in spent.items():
        print(f"| {kind} | {ms:.0f} |")
    if not args.quick:
        results["growth"] = growth()
        plot(results["growth"], HERE / "growth.png")
        for name, times in results["growth"].items():
            print(f"\nsearch step against {name}: " + ", ".join(f"{size}: {s:.2f} s" for size, s in times.items()))
        (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwritten: {HERE.name}/results.json, {HERE.name}/growth.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of the batch, once; no memory, no growth, nothing written"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--memory", nargs=2, metavar=("WORK", "0|1"), help="print the MB of one step (0 plain, 1 ours)")
    main(parser.parse_args())
