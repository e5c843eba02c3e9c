"""What a run folder tells once training is over, or while it goes on: arguments, history, times, as arrays."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.cli import UserError


@dataclass
class Record:
    """A run folder. NaN is unknown."""

    folder: Path
    info: dict  # args.json
    history: list[dict]  # of each epoch
    quantity: str | None  # what ranks operations, "saliency" or "probabilities"; None: a retraining, or random search
    cells: list[str]  # the cell types of that quantity
    genotype: Any
    genotypes: list[Any]  # after each epoch; empty for a retraining
    minutes: float  # of computing
    memory_gb: float  # at its peak

    @property
    def stages(self) -> np.ndarray:
        """The lines of the history at which a new stage begins (P-DARTS), without the first."""
        return np.flatnonzero(np.diff(self.series("stage")) > 0) + 1

    @property
    def name(self) -> str:
        """That of the folder."""
        return self.folder.resolve().name

    @property
    def kind(self) -> str:
        """What the run did, such as "DDSAS search"."""
        if not self.genotypes:
            return "Retraining"
        method = "P-DARTS" if self.info["script"] == "train_search.py" else self.info["args"].get("method", "ddsas")
        return "Random search" if method == "random" else f"{method.upper()} search"

    def series(self, key: str, part: str | None = None) -> np.ndarray:
        """A number of each epoch, NaN where there is none; ``part`` is a key of it where it is a dict."""
        values = [line.get(key) for line in self.history]
        return np.array([value.get(part) if part and value else value for value in values], dtype=float)

    def parts(self, key: str) -> list[str]:
        """The keys of a number that is a dict, such as the data sets of ``table_acc``."""
        return list(next((line[key] for line in self.history if line.get(key)), []))

    def last(self, key: str, part: str | None = None) -> float:
        """The last finite number of a series, NaN if it has none."""
        return next((value for value in self.series(key, part)[::-1] if np.isfinite(value)), math.nan)


def read_run(folder: str | Path, load: Callable[[str | Path], Any]) -> Record:
    """Read a run folder; ``load`` makes a genotype of a text or a file and raises ValueError.

    UserError when it is no run folder, has no finished epoch, or holds a damaged line.
    """
    folder = Path(folder)
    if not (folder / "args.json").is_file():
        raise UserError(f"{folder} is not a run folder (it has no args.json); give a folder that a search made")
    info, history, timing = (read_json(folder / name) for name in ("args.json", "history.jsonl", "timing.jsonl"))
    if not history:
        raise UserError(f"{folder} has no finished epoch in history.jsonl yet; look again after the first one")
    try:
        quantity = next((name for name in ("saliency", "probabilities") if name in history[0]), None)
        cells = list(history[0][quantity]) if quantity else []
        found = [load(line["genotype"]) for line in history if "genotype" in line]
        genotype = load(folder / "genotype.txt") if (folder / "genotype.txt").is_file() else found[-1]
        minutes = sum(line["seconds"] for line in timing) / 60 if timing else math.nan
        memory = max((line.get("peak_memory_mb") or 0 for line in timing), default=0) / 1024 or math.nan
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} cannot be read: {error!r}") from None
    return Record(folder, info, history, quantity, cells, genotype, found, minutes, memory)


def read_json(path: Path) -> Any:
    """The content of a .json file, or the lines of a .jsonl file (none if it is missing, nor one that has no end)."""
    try:
        text = path.read_text() if path.is_file() else ""
        if path.suffix == ".jsonl":
            text = "[" + text.rpartition("\n")[0].replace("\n", ",\n") + "]"
        return json.loads(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # which says the line
        raise UserError(f"{path} is damaged: {error}") from None


# ---- operations over the epochs ------------------------------------------------------------------------------------


def operations(line: dict) -> list[str]:
    """The operations of an epoch, a column each; P-DARTS has its own on every edge: all that occur."""
    if "primitives" in line:
        return line["primitives"]
    return list(dict.fromkeys(op for edges in line["candidates"].values() for ops in edges for op in ops))


def values_of(line: dict, key: str, cell: str, ops: list[str]) -> np.ndarray:
    """A number of each operation (saliency, visits, probabilities), edges x operations; NaN where it is gone."""
    if "candidates" in line:
        edges = [dict(zip(*pair, strict=True)) for pair in zip(line["candidates"][cell], line[key][cell], strict=True)]
        return np.array([[edge.get(op, math.nan) for op in ops] for edge in edges])
    values = np.array(line[key][cell], dtype=float)
    return np.where(unpack(line["available"][cell], len(ops)), values, math.nan) if "available" in line else values


def trajectory(record: Record, cell: str) -> tuple[np.ndarray, list[str]]:
    """The record's quantity of each operation, epochs x edges x operations, NaN where it is gone; and their names."""
    ops = operations(record.history[0])
    return np.stack([values_of(line, record.quantity, cell, ops) for line in record.history]), ops


def unpack(masks: list, ops: int) -> np.ndarray:
    """Active or available operations as bools from integers: one more dimension, bit k stands for operation k."""
    return np.array(masks)[..., None] >> np.arange(ops) & 1 == 1


def subspace(record: Record, cell: str) -> tuple[np.ndarray, list[str]]:
    """The share of each epoch in which an operation was active, epochs x edges x operations, NaN where it is gone."""
    values, ops = trajectory(record, cell)
    shares = np.where(np.isnan(values), math.nan, 1.0)
    for share, line in zip(shares, record.history, strict=True):
        if "samplings" in line:
            masks = [unpack(sampling["active"][cell], len(ops)) for sampling in line["samplings"]]
            share *= np.mean(masks, axis=0) if masks else 0
    return shares, ops
