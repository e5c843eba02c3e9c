"""NAS-Bench-201's space: the cell, the supernet, the network of an architecture, and the table of all accuracies.

What a search in this space found is judged without training it:
    python nasbench201.py '|nor_conv_3x3~0|+|skip_connect~0|nor_conv_3x3~1|+|skip_connect~0|none~1|nor_conv_3x3~2|'
    python nasbench201.py logs/RUN_A logs/RUN_B --json
    python nasbench201.py logs/RUN --table my_accuracies.csv

A cell (Dong and Yang, ICLR 2020) has the nodes 0 (its input) to 3 (its output) and an edge from every node to every
later one; a node is the sum of its incoming edges. With five operations an edge there are 5^6 = 15,625 cells.
"""

from __future__ import annotations

import argparse
import base64
import csv
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import pickle  # this is the one file where it may be used, in `_Reader` alone: no class and no function is looked up
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import cli

# ---------------------------------------------------------------------------------------------------------------------
# The space

PRIMITIVES = ["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]
NONE = PRIMITIVES.index("none")
NODES = (1, 2, 3)  # node 0 is the cell's input
EDGE_LIST = [(node, source) for node in NODES for source in range(node)]  # (1, 0) (2, 0) (2, 1) (3, 0) (3, 1) (3, 2)
SIZE = len(PRIMITIVES) ** len(EDGE_LIST)
MAX_TEXT = 200  # characters; the longest architecture has 102


@dataclass(frozen=True)
class Architecture:
    """A genotype of this space: the operations of its six edges, in the order of EDGE_LIST. str() is its normal form.

    ValueError unless there are six known operations.
    """

    ops: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.ops) != len(EDGE_LIST) or any(op not in PRIMITIVES for op in self.ops):
            shown = _shown(str(self.ops))
            raise ValueError(f"expected {len(EDGE_LIST)} operations out of {', '.join(PRIMITIVES)}; got {shown}")

    def __str__(self) -> str:
        return to_string(self.ops)


def to_string(ops: tuple[str, ...] | list[str]) -> str:
    """The normal form |op~0|+|op~0|op~1|+|op~0|op~1|op~2|: a group for each of the nodes 1 to 3, ~ and the source."""
    terms = {edge: f"{op}~{edge[1]}" for edge, op in zip(EDGE_LIST, ops, strict=True)}
    return "+".join(f"|{'|'.join(terms[node, source] for source in range(node))}|" for node in NODES)


def parse(text: str) -> Architecture:
    """The architecture that `to_string` writes so. Nothing in the text is executed; ValueError says what is wrong."""
    text = text.strip(" \t\r\n")
    try:
        if len(text) > MAX_TEXT:
            raise ValueError(f"more than {MAX_TEXT} characters")
        groups = text.split("+")
        if len(groups) != len(NODES):
            raise ValueError(f"{len(groups)} of the groups that + separates, not {len(NODES)}")
        ops = [op for node, group in zip(NODES, groups, strict=True) for op in _operations(node, group)]
        return Architecture(tuple(ops))
    except ValueError as error:
        raise ValueError(
            f"not an architecture of NAS-Bench-201: {_shown(text)} ({error}); "
            f"expected {to_string(['op'] * len(EDGE_LIST))} with op one of {', '.join(PRIMITIVES)}"
        ) from None


def _operations(node: int, group: str) -> list[str]:
    """The operations in a node's group |op~0|...|; ValueError if it is not one."""
    terms = group[1:-1].split("|")
    if len(group) < 2 or group[0] + group[-1] != "||" or len(terms) != node:
        raise ValueError(f"the group of node {node} needs {node} op~source between bars")
    for source, (op, _, end) in enumerate(term.partition("~") for term in terms):
        if op not in PRIMITIVES:
            raise ValueError(f"unknown operation {_shown(op)} of node {node}")
        if end != str(source):
            raise ValueError(f"source {_shown(end)} of node {node} where {source} is expected")
    return [term.partition("~")[0] for term in terms]


def _shown(text: str) -> str:
    """The text as a message may hold it: quoted, one line of printable characters, not long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


# ---------------------------------------------------------------------------------------------------------------------
# The networks. Parameters have their published names.


class ReLUConvBN(nn.Module):
    """ReLU, convolution, BatchNorm. The convolution has a bias where the BatchNorm is not affine."""

    def __init__(self, C_in: int, C_out: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel, stride, padding=kernel // 2, bias=not affine),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Zero(nn.Module):
    """`none`: in its place among the operations, and never called."""


OPS = {
    "none": lambda C, affine: Zero(),
    "skip_connect": lambda C, affine: nn.Identity(),
    "nor_conv_1x1": lambda C, affine: ReLUConvBN(C, C, 1, 1, affine),
    "nor_conv_3x3": lambda C, affine: ReLUConvBN(C, C, 3, 1, affine),
    "avg_pool_3x3": lambda C, affine: nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
}


class MixedOp(nn.ModuleList):
    """An edge of the supernet: all operations, of which the active ones are computed."""

    def __init__(self, C: int) -> None:
        super().__init__(OPS[primitive](C, affine=False) for primitive in PRIMITIVES)

    def terms(self, x: Tensor, weights: list[Tensor], active: list[int]) -> list[Tensor]:
        """w_o * op_o(x) of every active operation o; their sum is the edge (DARTS, equation 2). `none` adds nothing."""
        return [weights[o] * self[o](x) for o in active if o != NONE]


class SearchCell(nn.Module):
    """A cell of the supernet: each node sums what its incoming edges compute."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.edges = nn.ModuleDict({f"{node}<-{source}": MixedOp(C) for node, source in EDGE_LIST})

    def forward(self, x: Tensor, weights: list[list[Tensor]], active: list[list[int]], rest: dict) -> Tensor:
        nodes = [x]
        for node in NODES:
            terms = [rest[node]] if rest else []
            for edge, (end, source) in enumerate(EDGE_LIST):
                if end == node:
                    op = self.edges[f"{node}<-{source}"]
                    terms += op.terms(nodes[source], weights[edge], active[edge])
            nodes.append(total(terms, x))
        return nodes[-1]


class Cell(nn.Module):
    """The cell of one architecture: an operation on each edge."""

    def __init__(self, C: int, architecture: Architecture) -> None:
        super().__init__()
        self.layers = nn.ModuleList(OPS[op](C, affine=True) for op in architecture.ops)

    def forward(self, x: Tensor) -> Tensor:
        nodes = [x]
        for node in NODES:
            incoming = [(op, source) for op, (end, source) in zip(self.layers, EDGE_LIST, strict=True) if end == node]
            nodes.append(total([op(nodes[source]) for op, source in incoming if not isinstance(op, Zero)], x))
        return nodes[-1]


def total(terms: list[Tensor], x: Tensor) -> Tensor:
    """The sum of terms that are shaped as x or scalars; zeros as x if there are none."""
    if all(term.dim() == 0 for term in terms):
        terms = [torch.zeros_like(x), *terms]
    return functools.reduce(torch.add, terms)


class ResidualBlock(nn.Module):
    """From C_in to C_out channels at half the resolution."""

    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.conv_a = ReLUConvBN(C_in, C_out, 3, 2, affine=True)
        self.conv_b = ReLUConvBN(C_out, C_out, 3, 1, affine=True)
        pool = nn.AvgPool2d(2, stride=2, ceil_mode=True)  # rounds an odd size up, as the convolution does
        self.downsample = nn.Sequential(pool, nn.Conv2d(C_in, C_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x) + self.conv_b(self.conv_a(x))


class _Skeleton(nn.Module):
    """What both networks share: the stem, three stages of N cells with a residual block between, and the classifier."""

    def __init__(self, C: int, num_classes: int, N: int, make_cell: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
        self.cells = nn.ModuleList(make_cell(C) for _ in range(N))
        for C_in in (C, 2 * C):
            self.cells.append(ResidualBlock(C_in, 2 * C_in))
            self.cells.extend(make_cell(2 * C_in) for _ in range(N))
        self.lastact = nn.Sequential(nn.BatchNorm2d(4 * C), nn.ReLU())
        self.classifier = nn.Linear(4 * C, num_classes)

    def _forward(self, x: Tensor, *arguments) -> Tensor:
        x = self.stem(x.contiguous(memory_format=torch.channels_last) if x.is_cpu else x)  # the fastest order
        for cell in self.cells:
            x = cell(x) if isinstance(cell, ResidualBlock) else cell(x, *arguments)
        return self.classifier(self.lastact(x).mean((2, 3)))


class Supernet(_Skeleton):
    """All 15,625 networks in one. It holds network weights only: alpha and the active operations come with each call.

    Its cells' BatchNorms are not affine and their convolutions have a bias.
    """

    straight_through = False

    def __init__(self, C: int, num_classes: int, N: int) -> None:
        super().__init__(C, num_classes, N, SearchCell)

    def forward(
        self,
        x: Tensor,
        weights: dict[str, Tensor],
        active: dict[str, list[list[int]]] | None = None,
    ) -> Tensor:
        """Logits (N, classes) of images x (N, 3, H, W).

        ``weights["cell"]`` (6, 5) are the operations' weights, ``active["cell"]`` six lists of operation indices; the
        operations not listed are not computed. None: all are active.

        ``straight_through`` is for GDAS, whose weights h come from `gdas_weights`, with active = its index: the weights
        of the operations that are not active are added to the edge as the plain numbers h_j that they are. These are 0,
        so the output is h_k op_k(x) as before; but their gradient reaches the alphas of operations not computed.
        """
        flat, o = weights["cell"].flatten().unbind(), len(PRIMITIVES)
        scalars = [list(flat[i : i + o]) for i in range(0, len(flat), o)]  # in one step of the graph
        chosen = active["cell"] if active is not None else [list(range(o))] * len(EDGE_LIST)
        rest: dict[int, Tensor] = {}  # node -> the sum of h_j over its edges and their operations that are not active
        if self.straight_through:
            for (node, _), h, ops in zip(EDGE_LIST, scalars, chosen, strict=True):
                rest[node] = sum((h[j] for j in range(o) if j not in ops), rest.get(node, x.new_zeros(())))
        return self._forward(x, scalars, chosen, rest)


class Network(_Skeleton):
    """The network of one architecture, to train on its own: affine BatchNorms, convolutions without bias.

    Published: C = 16, N = 5. ``drop_path_prob`` is there for the training loop, and not used: no edge is dropped here.
    """

    def __init__(self, C: int, num_classes: int, N: int, genotype: Architecture) -> None:
        super().__init__(C, num_classes, N, lambda C: Cell(C, genotype))
        self.drop_path_prob = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Logits (N, classes) of images (N, 3, H, W); None stands where other networks have auxiliary logits."""
        return self._forward(x), None


# ---------------------------------------------------------------------------------------------------------------------
# Architecture parameters


def gdas_weights(alphas: Tensor, tau: float, gumbel: Tensor) -> tuple[Tensor, Tensor]:
    """One operation an edge, drawn by the Gumbel-softmax (GDAS: Dong and Yang, CVPR 2019, section 3.2).

    p = softmax((log_softmax(alpha) + g) / tau), k the largest, h = one_hot(k) - p.detach() + p. ``gumbel`` is
    g = -log(E) with E ~ Exp(1), as alphas (edges, operations). Returns h of that shape and k (edges). In value h is
    one_hot(k) (up to rounding at k, exactly 0 elsewhere); its gradient is that of p.
    """
    p = torch.softmax((torch.log_softmax(alphas, dim=-1) + gumbel) / tau, dim=-1)
    k = p.argmax(dim=-1)
    h = F.one_hot(k, p.shape[-1]).to(p) - p.detach() + p
    return h, k


def derive(alphas: np.ndarray) -> Architecture:
    """DARTS' and GDAS' architecture: on each edge the operation of largest alpha (6, 5), `none` included."""
    return Architecture(tuple(PRIMITIVES[o] for o in np.argmax(alphas, axis=1)))


# ---------------------------------------------------------------------------------------------------------------------
# The table of accuracies

NO_TABLE = "no table of accuracies: pip install --no-deps analog-nasbench (or --table FILE.csv) brings one"
MAX_FILE = 16_000_000  # bytes; the package's file has 5.6 million


class Table:
    """CIFAR-10 accuracies in percent of architectures, all 15,625 or some. ``source`` names where they come from."""

    def __init__(self, accuracies: dict[Architecture, float], source: str) -> None:
        self.source = f"{source}, {len(accuracies):,} of {SIZE:,} architectures"
        self._accuracies = accuracies
        self._sorted = sorted(accuracies.values())

    def __len__(self) -> int:
        return len(self._accuracies)

    @property
    def best(self) -> Architecture:
        """The architecture of highest accuracy, of equals the first in the table."""
        return max(self._accuracies, key=self._accuracies.get)

    def accuracy(self, genotype: Architecture) -> float | None:
        """Its accuracy in percent, None if the table does not have it."""
        return self._accuracies.get(genotype)

    def rank(self, genotype: Architecture) -> tuple[int, int] | None:
        """(rank, number of architectures in the table): 1 is the best, equals share the best rank. None as above."""
        accuracy = self.accuracy(genotype)
        if accuracy is None:
            return None
        return 1 + len(self) - bisect_right(self._sorted, accuracy), len(self)

    def better_than(self, genotype: Architecture) -> float | None:
        """The share of the table's architectures that are worse, in percent. None as above."""
        accuracy = self.accuracy(genotype)
        return None if accuracy is None else 100 * bisect_left(self._sorted, accuracy) / len(self)


def load_table(path: str | Path | None = None) -> Table | None:
    """The table in a CSV file of lines architecture,accuracy, or without a path that of the package analog-nasbench.

    None if the package is not installed (`NO_TABLE` says how to get it). Files are read as data, and nothing in them
    is run; UserError says in one line what is wrong with a file.
    """
    if path is not None:
        return Table(_read_csv(Path(path)), str(path))
    spec = importlib.util.find_spec("analognasbench")  # finds it, and does not import it
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "data.anb"
    try:
        return Table(_read_package(path), "analog-nasbench")
    except cli.UserError as error:
        again = "pip install --force-reinstall --no-deps analog-nasbench"
        raise cli.UserError(f"{path}: not used as the table of accuracies: {error}; {again}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise cli.UserError(f"{path}: expected a file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise cli.UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_FILE:
        raise cli.UserError(f"{path}: larger than {MAX_FILE:,} bytes, no table is")
    return data


def _read_csv(path: Path) -> dict[Architecture, float]:
    """Lines architecture,accuracy with accuracies in percent; one line of just these words may stand first."""
    accuracies: dict[Architecture, float] = {}
    try:
        lines = csv.reader(io.StringIO(_read_bytes(path).decode("utf-8-sig"), newline=""), strict=True)
        for row in lines:
            if not row or (row == ["architecture", "accuracy"] and not accuracies):  # an empty line, the header
                continue
            if len(row) != 2:
                raise ValueError(f"{len(row)} fields, expected architecture,accuracy")
            architecture = parse(row[0])
            if architecture in accuracies:
                raise ValueError(f"{architecture} stands in the table a second time")
            accuracies[architecture] = _percent(float(row[1]))
    except UnicodeDecodeError:
        raise cli.UserError(f"{path}: not a text file; expected lines architecture,accuracy") from None
    except (ValueError, csv.Error) as error:
        raise cli.UserError(f"{path}, line {lines.line_num}: {error}") from None
    if not accuracies:
        raise cli.UserError(f"{path}: no line architecture,accuracy in it")
    return accuracies


def _percent(value: object) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 100:  # NaN is neither
        raise ValueError(f"accuracy {_shown(str(value))}, expected a number from 0 to 100")
    return float(value)


# The package's file is a pickled dict: six numbers -> an object whose baseline_accuracy is the accuracy in percent.
PACKAGE_EDGES = [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2)]
PACKAGE_OPS = ["skip_connect", "none", "nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3"]
PACKAGE_CLASSES = {("analognasbench.data", name): type(name, (), {}) for name in ("Architecture", "DriftMeasurement")}


class _Reader(pickle.Unpickler):
    """Knows a blank class for each of the package's two, and nothing else."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in PACKAGE_CLASSES:
            raise pickle.UnpicklingError(f"it names {_shown(f'{module}.{name}')}, which is not run")
        return PACKAGE_CLASSES[module, name]


def _read_package(path: Path) -> dict[Architecture, float]:
    """The accuracies of data.anb, all of them; UserError for anything else than that file."""
    data = _read_bytes(path)
    _check_record(path, data)
    try:
        content = _Reader(io.BytesIO(data)).load()
    except (Exception, MemoryError) as error:  # damaged bytes raise anything: KeyError, struct.error, IndexError ...
        raise cli.UserError(f"damaged or cut off ({type(error).__name__} {_shown(str(error))})") from None
    accuracies = {}
    try:
        for indices, entry in content.items():
            if len(indices) != len(PACKAGE_EDGES) or not all(type(i) is int for i in indices) or min(indices) < 0:
                raise ValueError(f"key {_shown(str(indices))}")
            ops = {edge: PACKAGE_OPS[i] for edge, i in zip(PACKAGE_EDGES, indices, strict=True)}
            architecture = Architecture(tuple(ops[edge] for edge in EDGE_LIST))
            accuracies[architecture] = _percent(vars(entry).get("baseline_accuracy"))
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise cli.UserError(f"its content is not six numbers -> accuracy ({error})") from None
    if len(accuracies) != SIZE:
        raise cli.UserError(f"{len(accuracies):,} architectures, expected {SIZE:,}")
    return accuracies


def _check_record(path: Path, data: bytes) -> None:
    """UserError if pip noted another checksum when it installed the file; a copy that pip does not know passes."""
    try:
        files = importlib.metadata.files("analog-nasbench") or []
    except importlib.metadata.PackageNotFoundError:
        return
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
    for file in files:
        known = file.hash is not None and file.hash.mode == "sha256"
        if known and Path(file.locate()).resolve() == path.resolve() and file.hash.value != digest:
            raise cli.UserError("damaged: it is not the file that was installed")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def load(text: str) -> Architecture:
    """The architecture in a string, a genotype.txt, or a run folder that holds one. ValueError says what is wrong."""
    if text.lstrip().startswith("|"):
        return parse(text)
    try:
        path = Path(text)
        path = path / "genotype.txt" if path.is_dir() else path
        if not path.is_file():
            raise ValueError("not there; expected an architecture |op~0|+... or a run folder with its genotype.txt")
        with path.open("rb") as file:
            return parse(file.read(10 * MAX_TEXT).decode())
    except (OSError, ValueError) as error:  # not readable, not text, a name that no file can have, no architecture
        raise ValueError(f"{_shown(text)}: {getattr(error, 'strerror', None) or error}") from None


def judge(architecture: Architecture, table: Table | None) -> dict[str, object]:
    """What the table knows of an architecture: accuracy, rank, count, better_than; `missing` says why they are None."""
    found = table is not None and table.accuracy(architecture) is not None
    record = {"architecture": str(architecture), "accuracy": None, "rank": None, "count": None, "better_than": None}
    if not found:
        return record | {"missing": NO_TABLE if table is None else f"not in the table ({table.source})"}
    rank, count = table.rank(architecture)
    accuracy, better_than = table.accuracy(architecture), round(table.better_than(architecture), 2)
    return record | {"accuracy": accuracy, "rank": rank, "count": count, "better_than": better_than}


def main(args: argparse.Namespace) -> None:
    try:
        architectures = [load(text) for text in args.architecture]
    except ValueError as error:
        raise cli.UserError(str(error)) from None
    table = load_table(args.table)
    for text, architecture in zip(args.architecture, architectures, strict=True):
        record = judge(architecture, table)
        if text.strip() != str(architecture):
            record = {"run": text} | record
        print(json.dumps(record) if args.json else in_words(record))


def in_words(record: dict[str, object]) -> str:
    """A record of `judge` as a line of text."""
    head = f"{record['run']}: " if "run" in record else ""
    if record["accuracy"] is None:
        return f"{head}{record['architecture']}: {record['missing']}"
    rank = f"rank {record['rank']:,} of {record['count']:,}, better than {record['better_than']:.2f} %"
    return f"{head}{record['architecture']}: {record['accuracy']:.2f} % ({rank})"


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    text = "an architecture string, or a run folder whose genotype.txt holds one"
    parser.add_argument("architecture", nargs="+", metavar="ARCHITECTURE|RUN", help=text)
    text = "lines architecture,accuracy (default: the table of analog-nasbench, if installed)"
    parser.add_argument("--table", metavar="FILE.csv", help=text)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
