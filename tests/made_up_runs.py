"""Run folders of all kinds as the scripts write them, with made-up numbers and without checkpoints."""

import json
from pathlib import Path

import numpy as np

import genotypes
import nasbench201
from genotypes import CELL_TYPES, EDGES, PRIMITIVES, Genotype
from model_search import DynamicSpace

PUBLISHED = [genotypes.DDSAS_cifar10, genotypes.DDSAS_cifar100, genotypes.DDSAS_imagenet, genotypes.PDARTS]


def write_run(folder: Path, script: str, args: dict, history: list[dict], genotype: Genotype) -> Path:
    folder.mkdir(parents=True)
    info = {"script": script, "command": f"python {script} --save x", "args": args, "versions": {"python": "3.12"}}
    (folder / "args.json").write_text(json.dumps(info | {"seed": args["seed"]}))
    write_lines(folder / "history.jsonl", history)
    times = [{"epoch": e["epoch"], "seconds": 30.0, "peak_memory_mb": 900.0 + e["epoch"]} for e in history]
    write_lines(folder / "timing.jsonl", times)
    (folder / "genotype.txt").write_text(str(genotype) + "\n")
    return folder


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def bits(masks: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {cell: (mask @ (1 << np.arange(mask.shape[1]))).tolist() for cell, mask in masks.items()}


def search_run(folder: Path, epochs: int = 6, samplings: int = 3, seed: int = 0, ops: list = PRIMITIVES) -> Path:
    """A DDSAS search that shrinks twice."""
    rng, space, history = np.random.default_rng(seed), DynamicSpace(ops), []
    for epoch in range(epochs):
        entries = []
        for step in range(samplings):
            tables = [{cell: rng.random((EDGES, len(ops))) for cell in CELL_TYPES} for _ in range(2)]
            space.update(*tables)
            space.sample()
            entries.append({"step": 30 * step, "active": bits(space.active), "changed": 10})
        numbers = {f"{part}_{key}": 10.0 + epoch for part in ("train", "valid") for key in ("acc", "loss")}
        history.append(
            {"epoch": epoch, "genotype": str(space.genotype()), "primitives": ops, "samplings": entries, **numbers}
            | {"available": bits(space.available), "alpha_entropy": dict.fromkeys(CELL_TYPES, 2.0)}
            | {"saliency": {cell: space.saliency[cell].tolist() for cell in CELL_TYPES}}
        )
        if epoch in (1, 3):
            space.shrink(14)
    args = {"dataset": "cifar10", "space_config": "shrink", "seed": seed, "note": "a <b>bold</b> note & more"}
    return write_run(folder, "search.py", args, history, space.genotype())


def pdarts_run(folder: Path, epochs: int = 4) -> Path:
    """A P-DARTS search: three stages of ``epochs`` with 8, 5 and 3 candidates an edge."""
    rng, history = np.random.default_rng(0), []
    for stage, count in enumerate((8, 5, 3)):
        edges = [sorted(rng.permutation(PRIMITIVES)[:count].tolist(), key=PRIMITIVES.index) for _ in range(EDGES)]
        for epoch in range(epochs):
            valid = 60.0 + stage if epoch == epochs - 1 else None
            history.append(
                {"stage": stage, "epoch": epoch, "train_loss": 2.0, "train_acc": 50.0, "valid_acc": valid}
                | {"valid_loss": valid, "candidates": dict.fromkeys(CELL_TYPES, edges)}
                | {"probabilities": {cell: rng.random((EDGES, count)).tolist() for cell in CELL_TYPES}}
                | {"alpha_entropy": dict.fromkeys(CELL_TYPES, 2.0 - stage), "genotype": str(PUBLISHED[epoch % 4])}
            )
    args = {"dataset": "fashion_mini", "data": "my data", "image_size": None, "seed": 0}
    return write_run(folder, "train_search.py", args, history, PUBLISHED[-1])


def nasbench201_run(folder: Path, epochs: int = 2) -> Path:
    """A DARTS search in NAS-Bench-201's space whose cells were looked up."""
    rng, history, ops = np.random.default_rng(0), [], nasbench201.PRIMITIVES
    for epoch in range(epochs):
        cell = str(genotypes.Genotype201(tuple(rng.choice(ops, 6))))
        history.append(
            {"epoch": epoch, "genotype": cell, "primitives": ops, "valid_acc": 30.0, "alpha_entropy": {"cell": 1.0}}
            | {"probabilities": {"cell": rng.dirichlet(np.ones(5), 6).tolist()}}
            | {"table_acc": dict.fromkeys(("cifar10", "cifar100"), 60.0 + epoch), "table_rank": 900 - epoch}
        )
    args = {"dataset": "fashion_mini", "method": "darts", "space_config": "nasbench201", "seed": 0}
    return write_run(folder, "search.py", args, history, genotypes.load(cell))


def retrain_run(folder: Path, genotype: Genotype, best: float = 97.0, seed: int = 0, losses: tuple = (3, 2, 1)) -> Path:
    history = [
        {"epoch": epoch, "train_loss": loss, "train_acc": 90.0, "test_loss": loss, "test_acc": best - 2 + epoch}
        | {"best_acc": best - 2 + epoch}
        for epoch, loss in enumerate(losses)
    ]
    return write_run(folder, "retrain.py", {"dataset": "cifar10", "seed": seed}, history, genotype)
