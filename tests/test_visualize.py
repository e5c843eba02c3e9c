"""visualize.py on synthetic run folders of all three kinds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import genotypes
import visualize
from genotypes import PRIMITIVES, Genotype

EDGES = visualize.edge_list()


def best_edges(scores: dict[str, np.ndarray]) -> Genotype:
    """Per node the two edges whose best operation other than none scores highest."""
    cells = {}
    for cell, score in scores.items():
        score = np.where(np.array(PRIMITIVES) == "none", -1.0, np.nan_to_num(score, nan=-1.0))
        cells[cell] = []
        for node in range(4):
            edges = [edge for edge, (n, _) in enumerate(EDGES) if n == node]
            for edge in sorted(edges, key=lambda edge: -score[edge].max())[:2]:
                cells[cell].append((PRIMITIVES[int(score[edge].argmax())], EDGES[edge][1]))
    return Genotype(cells["normal"], range(2, 6), cells["reduce"], range(2, 6))


def write_run(folder: Path, script: str, args: dict, history: list[dict], genotype: Genotype) -> Path:
    """A run folder as the scripts write it, without checkpoints."""
    folder.mkdir(parents=True)
    info = {"script": script, "command": f"python {script} --save x", "args": args, "versions": {"python": "3.12"}}
    (folder / "args.json").write_text(json.dumps(info | {"seed": args["seed"]}))
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    times = [{"epoch": line["epoch"], "seconds": 30.0, "images_per_second": 800.0, "peak_memory_mb": 900.0 + line["epoch"]}
             for line in history]  # fmt: skip
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    (folder / "genotype.txt").write_text(str(genotype) + "\n")
    return folder


def search_run(folder: Path, epochs: int = 6, samplings: int = 3, seed: int = 0, shrink: bool = False) -> Path:
    """A made-up DDSAS search: drifting saliencies, subspaces of 28 operations, on demand a shrinking space."""
    rng = np.random.default_rng(seed)
    drift = {cell: rng.normal(0, 1.0, (14, 8)) for cell in visualize.CELLS}
    saliency = {cell: np.full((14, 8), 0.06) for cell in visualize.CELLS}
    available = {cell: np.ones((14, 8), bool) for cell in visualize.CELLS}
    history, genotype = [], None
    for epoch in range(epochs):
        if shrink and epoch and epoch % max(2, epochs // 5) == 0:
            for cell in visualize.CELLS:
                order = np.argsort(np.where(available[cell], saliency[cell], 9).ravel())[:14]
                available[cell].ravel()[order] = False
                available[cell][:, 4] = True
        entries = []
        for step in range(samplings):
            masks = {}
            for cell in visualize.CELLS:
                score = np.where(available[cell], saliency[cell] + rng.gumbel(0, 0.04, (14, 8)), -1)
                active = score >= np.sort(score.ravel())[-28]
                masks[cell] = [int(sum(1 << k for k in range(8) if row[k])) for row in active & available[cell]]
            entries.append({"step": 30 * step, "active": masks, "changed": 10})
        for cell in visualize.CELLS:
            pull = rng.normal(0, 0.015, (14, 8)) + 0.02 * drift[cell] * np.exp(-epoch / (0.3 * epochs))
            saliency[cell] = np.clip(saliency[cell] + pull * 8 / epochs, 0.005, 0.6)
        genotype = best_edges({cell: np.where(available[cell], saliency[cell], np.nan) for cell in visualize.CELLS})
        rise = 1 - np.exp(-3 * (epoch + 1) / epochs)
        history.append(
            {"epoch": epoch, "lr": 0.025, "tau": None, "train_loss": 2.3 - 1.9 * rise, "train_acc": 10 + 82 * rise}
            | {"arch_loss": 2.2, "valid_loss": 2.3 - 1.7 * rise, "valid_acc": 10 + 75 * rise + rng.normal(0, 0.8)}
            | {"genotype": str(genotype), "primitives": PRIMITIVES, "samplings": entries}
            | {"available": {c: [int(sum(1 << k for k in range(8) if row[k])) for row in available[c]] for c in available}}
            | {"saliency": {c: saliency[c].tolist() for c in saliency}, "visits": {c: np.ones((14, 8)).tolist() for c in saliency}}
            | {"alpha_entropy": {"normal": 2.08 - 0.5 * rise, "reduce": 2.08 - 0.3 * rise}, "active_ops": {"normal": 28, "reduce": 28}}
        )
    args = {"dataset": "cifar10", "space_config": "shrink" if shrink else "static", "seed": seed, "epochs": epochs}
    args |= {"batch_size": 64, "note": "a <b>bold</b> note & more", "init_channels": 16, "layers": 8}
    return write_run(folder, "search.py", args, history, genotype)


def pdarts_run(folder: Path, epochs: int = 4, seed: int = 0) -> Path:
    """A made-up P-DARTS search: three stages of ``epochs`` with 8, 5 and 3 candidates an edge."""
    rng = np.random.default_rng(seed)
    history, genotype = [], None
    candidates = {cell: [list(PRIMITIVES) for _ in EDGES] for cell in visualize.CELLS}
    for stage, count in enumerate((8, 5, 3)):
        for cell in visualize.CELLS:
            candidates[cell] = [sorted(rng.permutation(names)[:count], key=PRIMITIVES.index) for names in candidates[cell]]
        target = {cell: rng.normal(0, 1, (14, count)) for cell in visualize.CELLS}
        for epoch in range(epochs):
            weights = {cell: np.exp(target[cell] * epoch / epochs) for cell in visualize.CELLS}
            weights = {cell: w / w.sum(1, keepdims=True) for cell, w in weights.items()}
            full = {cell: np.full((14, 8), np.nan) for cell in visualize.CELLS}
            for cell in visualize.CELLS:
                for edge, names in enumerate(candidates[cell]):
                    full[cell][edge, [PRIMITIVES.index(name) for name in names]] = weights[cell][edge]
            genotype = best_edges(full)
            last = epoch >= epochs - 2
            history.append(
                {"stage": stage, "epoch": epoch, "lr": 0.02, "dropout": 0.1, "train_loss": 2.0 / (epoch + 1), "train_acc": 95 - 50.0 / (epoch + 1)}
                | {"arch_loss": None, "valid_loss": 1.0 if last else None, "valid_acc": 60.0 + stage if last else None}
                | {"candidates": {c: [list(map(str, names)) for names in candidates[c]] for c in candidates}}
                | {"probabilities": {c: [row.tolist() for row in weights[c]] for c in weights}, "genotype": str(genotype)}
                | {"alpha_entropy": {"normal": 2.0 - stage / 2, "reduce": 2.0 - stage / 3}}
            )
    args = {"tmp_data_dir": "data", "seed": seed, "epochs": epochs, "add_layers": [0, 6, 12], "cifar100": False}
    return write_run(folder, "train_search.py", args, history, genotype)


def retrain_run(folder: Path, genotype: Genotype, epochs: int = 5, best: float = 97.0, seed: int = 0) -> Path:
    """A made-up retraining."""
    history = [
        {"epoch": e, "lr": 0.025, "drop_path": 0.2 * e / epochs, "train_loss": 2 / (e + 1), "train_acc": 99 - 50 / (e + 1)}
        | {"test_loss": 2.2 / (e + 1), "test_acc": best - 50 / (e + 1), "test_acc_top5": 99.0, "best_acc": best - 50 / (e + 1)}
        for e in range(epochs - 1)
    ]
    history.append(history[-1] | {"epoch": epochs - 1, "test_acc": best - 0.2, "best_acc": best})
    args = {"dataset": "cifar10", "arch": "x", "seed": seed, "epochs": epochs, "init_channels": 36, "layers": 20}
    return write_run(folder, "retrain.py", args, history, genotype)
