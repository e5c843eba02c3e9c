"""Tables: the accuracies of NAS-Bench-201's cells, read as data, and rows of text in Markdown."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import pickletools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lib.cli import UserError
from lib.genotype_io import CELL, CELL_OPERATIONS, parse_cell, shorten

DATASETS = ("cifar10", "cifar100", "imagenet16")  # imagenet16: ImageNet16-120, 120 classes of 16x16 pixels
SIZE = len(CELL_OPERATIONS) ** CELL.count("{}")  # 15,625 cells
NO_TABLE = "no table of accuracies: pip install --no-deps analog-nasbench (or --table FILE.csv) brings one"


class Table:
    """Accuracies in percent of cells of NAS-Bench-201's space, all 15,625 or some, on one data set or several.

    ``accuracies`` maps every cell as it is written, |op~0|+..., to its accuracies by data set; cells are asked for as
    genotypes or as text. ``source`` says where the numbers come from.
    """

    def __init__(self, accuracies: dict[str, dict[str, float]], source: str) -> None:
        self.accuracies = accuracies
        self.source = f"{source}, {len(accuracies):,} of {SIZE:,} architectures"
        self.datasets = tuple(next(iter(accuracies.values())))
        self._columns = {name: np.array([row[name] for row in accuracies.values()]) for name in self.datasets}

    def __len__(self) -> int:
        return len(self.accuracies)

    def accuracy(self, genotype: object) -> dict[str, float] | None:
        """Its accuracies by data set; None if the table does not have it."""
        return self.accuracies.get(str(genotype))

    def standing(self, genotype: object, dataset: str = "cifar10") -> tuple[int, int]:
        """The rank of a cell that the table has (1 is the best, equals share the best rank), and how many are worse."""
        own, every = self.accuracies[str(genotype)][dataset], self._columns[dataset]
        return 1 + int((every > own).sum()), int((every < own).sum())


def load_table(path: str | Path | None = None) -> Table | None:
    """The table in a CSV file, or without a path that of the package analog-nasbench; None if that is not installed.

    UserError says in one line what is wrong with a file. Nothing in it is run.
    """
    if path is not None:
        return Table(_read_csv(Path(path)), str(path))
    spec = importlib.util.find_spec("analognasbench")  # finds it, and does not import it
    if spec is None or not spec.submodule_search_locations:
        return None
    return Table(_read_package(Path(spec.submodule_search_locations[0], "data.anb")), "analog-nasbench")


def _read_bytes(path: Path) -> bytes:
    try:
        if path.is_file():
            return path.read_bytes()
        raise UserError(f"{path} cannot be read: expected a file")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{shorten(path)} cannot be read ({getattr(error, 'strerror', error)})") from None


def _read_csv(path: Path) -> dict[str, dict[str, float]]:
    """Rows of a cell and its accuracies in percent; the first may name the columns, otherwise the number is CIFAR-10's.

    Named are ``architecture`` and any data sets of DATASETS, in any order; ``accuracy`` is CIFAR-10's as well.
    """
    accuracies, columns = {}, ["architecture", "cifar10"]
    try:
        rows = csv.reader(io.StringIO(_read_bytes(path).decode("utf-8-sig"), newline=""), strict=True)
        for row in filter(None, rows):
            if not accuracies and "architecture" in row:
                columns = ["cifar10" if name == "accuracy" else name for name in row]
                if len(columns) < 2 or len(set(columns)) < len(columns) or set(columns) - {"architecture", *DATASETS}:
                    expected = f"expected architecture and {' '.join(DATASETS)}"
                    raise ValueError(f"columns {shorten(', '.join(row))}; {expected}")
                continue
            if len(row) != len(columns):
                raise ValueError(f"{len(row)} fields, expected {','.join(columns)}")
            fields = dict(zip(columns, row, strict=True))
            cell = CELL.format(*parse_cell(fields.pop("architecture")))
            if cell in accuracies:
                raise ValueError(f"{cell} stands in the table a second time")
            accuracies[cell] = {name: float(text) for name, text in fields.items()}
            if not all(0 <= value <= 100 for value in accuracies[cell].values()):  # NaN is neither
                raise ValueError(f"accuracy {shorten(', '.join(fields.values()))}, expected numbers from 0 to 100")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; expected lines architecture,accuracy") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from None
    if not accuracies:
        raise UserError(f"{path}: no line architecture,accuracy in it")
    return accuracies


# The package's file: six indices of operations, then CIFAR-10's accuracy in percent, cell by cell
PACKAGE_SHA256 = {"85f3435b877aa2d36268d55ce07f6ff6d73643d17a840f1941745da5eb80db32"}  # of data.anb; release 0.1.3
PACKAGE_OPERATIONS = ["skip_connect", "none", "nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3"]
PACKAGE_EDGES = (0, 1, 3, 2, 4, 5)  # its edges go out from node 0, then 1, then 2; CELL's go into 1, then 2, then 3


def _read_package(path: Path) -> dict[str, dict[str, float]]:
    """The accuracies in data.anb of a known release. Its instructions are listed, and none is followed."""
    data = _read_bytes(path)
    if hashlib.sha256(data).hexdigest() not in PACKAGE_SHA256:
        again = "pip install --force-reinstall --no-deps analog-nasbench==0.1.3, or give --table FILE.csv"
        raise UserError(f"{path}: not the file of analog-nasbench 0.1.3, so not read; {again}")
    accuracies, indices = {}, []
    for instruction, value, _ in pickletools.genops(data):
        if instruction.name == "BININT1":
            indices.append(value)
        elif instruction.name == "BINFLOAT" and indices:  # the first number behind them
            text = CELL.format(*(PACKAGE_OPERATIONS[indices[i]] for i in PACKAGE_EDGES))
            accuracies[text], indices = {"cifar10": value}, []
    return accuracies


NUMBER = re.compile(r"[-+±<>=~≈]*\s*\d.*|[-–—]?|nan")  # also 93.24 ± 0.10, < 0.05, 7 %, and – where there is none


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts, the first with the headings, as an aligned table in Markdown.

    Columns whose texts all begin as numbers, the first column aside, are aligned to the right.
    """
    columns = []
    for number, (heading, *texts) in enumerate(zip(*rows, strict=True)):
        cells = [text.replace("|", r"\|") for text in (heading, *texts)]
        right = number > 0 and all(NUMBER.fullmatch(text) for text in texts)
        width = max(3, *map(len, cells))
        cells.insert(1, "-" * (width - 1) + (":" if right else "-"))
        columns.append([cell.rjust(width) if right else cell.ljust(width) for cell in cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
