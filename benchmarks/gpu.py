"""What a step asks of a GPU, counted without one (predict.py): bash shell/bench.sh --gpu

    python benchmarks/gpu.py            # launches, synchronisations and memory, plain and ours; writes gpu.json
    python benchmarks/gpu.py --batches  # which batch fits 8, 12, 16 and 24 GB
    python benchmarks/gpu.py --check    # the same prediction for the CPU against the memory that a step is seen to take

The works are those of run.py at the papers' sizes. "pass" is one forward and backward pass into alpha, beta and weights
(evaluation: a forward pass), a step has all passes, clipping and optimizers. A launch is an operation that is no view.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import run  # puts the project's root on the path
import torch

import data
import engine
import genotypes
import predict
import retrain
import search
import train_search
import utils
from engine import Training

MIB = 2**20
PUBLISHED = {  # the published code's launches of a pass, counted in the same way
    "DDSAS search": 4854,
    "P-DARTS, stage 1": 8364,
    "P-DARTS, stage 3": 12046,
    "retraining": 2902,
    "evaluation": 1026,
}
WORK: dict[str, tuple[int, Callable[[int], run.Pair]]] = {
    "DDSAS search": (64, lambda batch: run.search_step(batch, 8, 28)),
    "P-DARTS, stage 1": (96, lambda batch: run.search_step(batch, 5, None)),
    "P-DARTS, stage 2": (96, lambda batch: run.search_step(batch, 11, None, 5)),
    "P-DARTS, stage 3": (96, lambda batch: run.search_step(batch, 17, None, 3)),
    "retraining": (96, run.retraining_step),
    "evaluation": (96, run.evaluation),
}


# ---- launches, synchronisations, memory -----------------------------------------------------------------------------


def counted(name: str, which: int) -> dict[str, float]:
    """The row of a work, 0 plain or 1 ours."""
    batch, build = WORK[name]
    with predict.as_on_cuda(), predict.Memory() as memory:
        with torch.device("meta"):
            work = build(batch)[which]
        with predict.Launches() as once:
            result, kept = predict.kept_for_backward(work.forward, work.network)
            if result.requires_grad:
                result.backward()
        work()  # what waits for the device raises here
        memory.peak = memory.now
        with predict.Launches() as step:
            work()
    return {
        "launches_pass": once.total,
        "launches_step": step.total,
        "synchronisations": step.synchronisations,
        "copies": step.copies,
        "kept_mib": kept / MIB,
        "peak_mib": memory.peak / MIB,
    }


def table() -> None:
    print("| work | batch | launches in a pass: published, plain, ours | in a step: plain, ours | waits for the GPU |"
          " kept for backward: plain, ours | predicted peak: plain, ours |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    results = {}
    for name, (batch, _) in WORK.items():
        plain, ours = results[name] = [counted(name, which) for which in (0, 1)]
        pair = "{:,.0f}, **{:,.0f}**".format
        published = f"{PUBLISHED[name]:,}" if name in PUBLISHED else "-"
        cells = [
            f"{published}, " + pair(plain["launches_pass"], ours["launches_pass"]),
            pair(plain["launches_step"], ours["launches_step"]),
            str(ours["synchronisations"]),
            pair(plain["kept_mib"], ours["kept_mib"]) + " MiB" if ours["kept_mib"] else "",
            pair(plain["peak_mib"], ours["peak_mib"]) + " MiB",
        ]
        print("| " + " | ".join([name, str(batch), *cells]) + " |", flush=True)
    (run.HERE / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten: {run.HERE.name}/gpu.json")


# ---- which batch fits -----------------------------------------------------------------------------------------------

META = torch.device("meta")


def arguments(script, text: str) -> argparse.Namespace:
    return utils.parse(script.get_parser(), text.split())


def ddsas(text: str = "") -> Training:
    args = arguments(search, text)
    searching = search.Search(args, info_of(args), None, search.Judge(args), META)
    if args.method == "ddsas":
        searching.method.subspace.sample_random(run.np.random.default_rng(0))
    return searching


def pdarts(stage: int, text: str = "") -> Training:
    """P-DARTS in the last epoch of a stage, with random candidates."""
    args, rng = arguments(train_search, text), run.np.random.default_rng(0)
    searching = train_search.ProgressiveSearch(args, info_of(args), None, META)
    for kept in args.num_to_keep[: stage - 1]:
        num_ops = len(searching.candidates["normal"][0])
        noise = {kind: rng.random((genotypes.EDGES, num_ops)) for kind in genotypes.CELL_TYPES}
        searching.candidates = train_search.drop_candidates(searching.candidates, noise, num_ops - kept)
    searching.epoch = stage * args.epochs - 1
    searching.build_stage()
    return searching


def retraining(text: str = "") -> Training:
    args = arguments(retrain, f"--auxiliary --cutout {text}")
    training = retrain.Retraining(args, genotypes.load(args.arch), info_of(args), None, META)
    training.epoch = args.epochs // 2
    return training


def info_of(args: argparse.Namespace) -> data.Info:
    info = data.lookup(args.dataset)
    return info if info.num_classes else data.dataclasses.replace(info, num_classes=1000)


TRAININGS: dict[str, Callable[[], Training]] = {
    "DDSAS search, CIFAR": ddsas,
    "P-DARTS, stage 1": lambda: pdarts(1),
    "P-DARTS, stage 2": lambda: pdarts(2),
    "P-DARTS, stage 3": lambda: pdarts(3),
    "DDSAS search, ImageNet": lambda: ddsas("--dataset imagenet --batch_size 64"),
    "retraining, CIFAR": retraining,
    "retraining, ImageNet": lambda: retraining("--dataset imagenet --arch DDSAS_imagenet --batch_size 64"),
}
GIGABYTES = 8, 12, 16, 24


def batches() -> None:
    print("Predicted, not measured: the largest --batch_size per GPU (see predict.py for what is left free).\n")
    print("| work | flags |" + "".join(f" {size} GB |" for size in GIGABYTES))
    print("|---|---|" + "---|" * len(GIGABYTES))
    for name, build in TRAININGS.items():
        training = build()
        for checkpoint_cells in (False, True) if hasattr(training.args, "checkpoint_cells") else (False,):
            for amp in (False, True):
                flags = {"checkpoint_cells": checkpoint_cells, "amp": amp}
                args, on_device = training.args, 0 if training.args.dataset == "imagenet" else 50_000
                peak, state = engine.predicted_memory(training, on_device, **flags)
                free = [size * 2**30 - predict.CONTEXT for size in GIGABYTES]
                fits = [predict.largest_batch(size, args.batch_size, peak, state) for size in free]
                words = " ".join(f"`--{flag}`" for flag, on in flags.items() if on)
                print("| " + " | ".join([name, words, *map(str, fits)]) + " |", flush=True)


# ---- against what is measured ---------------------------------------------------------------------------------------


def check() -> None:
    """The memory that the first step takes on a CPU above what was there, predicted and measured by run.py."""
    print("| work, on the CPU | predicted | measured | ratio |\n|---|---|---|---|")
    for name in run.WITH_MEMORY:
        batch, build = run.WORK[name]
        for which, measured in enumerate(run.memory(name)):
            with predict.Memory("cpu") as memory:
                work = build(batch)[which]
                before = memory.now
                memory.peak = before
                work()
            predicted = (memory.peak - before) / MIB
            row = f"{name}, {('plain', 'ours')[which]} | {predicted:,.0f} MiB | {measured:,.0f} MiB"
            print(f"| {row} | {predicted / measured:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--batches", dest="main", action="store_const", const=batches, default=table)
    group.add_argument("--check", dest="main", action="store_const", const=check)
    parser.parse_args().main()
