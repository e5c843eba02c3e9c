"""NAS-Bench-201's space: the cell, the supernet, the network of one cell, and what accuracy it reaches.

What a search in this space found is judged without training it:
    python nasbench201.py '|nor_conv_3x3~0|+|skip_connect~0|nor_conv_3x3~1|+|skip_connect~0|none~1|nor_conv_3x3~2|'
    python nasbench201.py logs/RUN_A logs/RUN_B --json
    python nasbench201.py logs/RUN --table my_accuracies.csv

A cell (Dong and Yang, ICLR 2020) has the nodes 0 (its input) to 3 (its output) and an edge from every node to every
later one; a node is the sum of its incoming edges. With five operations an edge there are 5^6 = 15,625 cells. A cell is
a `genotypes.Genotype201`, written |op~0|+|op~0|op~1|+|op~0|op~1|op~2|: a group for each node, ~ and the source.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

import genotypes
import model_search
from genotypes import Genotype201
from lib import cli, tables

PRIMITIVES = genotypes.SPACES["nasbench201"].primitives
NONE = PRIMITIVES.index("none")
NODES = (1, 2, 3)  # node 0 is the cell's input
EDGE_LIST = [(node, source) for node in NODES for source in range(node)]  # (1, 0) (2, 0) (2, 1) (3, 0) (3, 1) (3, 2)

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

    straight_through = False  # as model_search.MixedOp's: GDAS

    def __init__(self, C: int) -> None:
        super().__init__(OPS[primitive](C, affine=False) for primitive in PRIMITIVES)

    def forward(self, x: Tensor, weights: list[Tensor], active: list[int]) -> Tensor:
        """sum of w_o * op_o(x) over the active operations (DARTS, equation 2); `none` adds nothing."""
        terms = [weights[o] * self[o](x) for o in active if o != NONE]
        if self.straight_through:
            terms += [w for o, w in enumerate(weights) if o not in active]
        return total(terms, x)


class SearchCell(nn.Module):
    """A cell of the supernet: each node sums what its incoming edges compute."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.edges = nn.ModuleDict({f"{node}<-{source}": MixedOp(C) for node, source in EDGE_LIST})

    def forward(self, x: Tensor, weights: list[list[Tensor]], active: list[list[int]]) -> Tensor:
        nodes = [x]
        for node in NODES:
            incoming = [(e, source) for e, (end, source) in enumerate(EDGE_LIST) if end == node]
            edges = [self.edges[f"{node}<-{source}"](nodes[source], weights[e], active[e]) for e, source in incoming]
            nodes.append(total(edges, x))
        return nodes[-1]


class Cell(nn.Module):
    """The cell of one genotype: an operation on each edge."""

    def __init__(self, C: int, genotype: Genotype201) -> None:
        super().__init__()
        self.layers = nn.ModuleList(OPS[op](C, affine=True) for op in genotype.ops)

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


class Supernet(_Skeleton, model_search.Supernet):
    """All 15,625 networks in one. It holds network weights only: alpha and the active operations come with each call.

    Its cells' BatchNorms are not affine and their convolutions have a bias.
    """

    candidates = {"cell": [PRIMITIVES] * len(EDGE_LIST)}

    def __init__(self, C: int, num_classes: int, N: int) -> None:
        super().__init__(C, num_classes, N, SearchCell)

    def forward(
        self, x: Tensor, weights: dict[str, Tensor], active: dict[str, list[list[int]]] | None = None
    ) -> Tensor:
        """Logits (N, classes) of images x (N, 3, H, W).

        ``weights["cell"]`` (6, 5) are the operations' weights, ``active["cell"]`` six lists of operation indices; the
        operations not listed are not computed. None: all are active.
        """
        active = active or model_search.all_active(self.candidates)
        return self._forward(x, model_search.split(weights["cell"]), active["cell"])


class Network(_Skeleton):
    """The network of one cell, to train on its own: affine BatchNorms, convolutions without bias.

    Published: C = 16, N = 5. ``drop_path_prob`` is there for the training loop, and not used: no edge is dropped here.
    """

    def __init__(self, C: int, num_classes: int, N: int, genotype: Genotype201) -> None:
        super().__init__(C, num_classes, N, lambda C: Cell(C, genotype))
        self.drop_path_prob = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Logits (N, classes) of images (N, 3, H, W); None stands where other networks have auxiliary logits."""
        return self._forward(x), None


def one_op_an_edge(scores: dict[str, np.ndarray], primitives: list[str]) -> Genotype201:
    """On each edge the operation of highest score, of equals the first: DARTS' and GDAS' genotype, `none` included.

    ``scores["cell"]`` (6, o), -inf for operations that cannot be chosen.
    """
    return Genotype201(tuple(primitives[o] for o in scores["cell"].argmax(axis=1)))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def look_up(genotype: Genotype201, table: tables.Table | None) -> dict[str, object]:
    """What the table knows of a cell: accuracy in percent, rank and better_than (%) on each of its data sets."""
    record = {"architecture": str(genotype), "source": table.source if table else tables.NO_TABLE}
    for name in table.datasets if table and table.accuracy(genotype) else ():
        accuracy, (rank, worse) = table.accuracy(genotype)[name], table.standing(genotype, name)
        better_than = round(100 * worse / len(table), 2)
        record[name] = {"accuracy": accuracy, "rank": rank, "count": len(table), "better_than": better_than}
    return record


def in_words(record: dict[str, object]) -> str:
    """A record of `look_up` as a line of text."""
    text = "{}: {accuracy:.2f} % (rank {rank:,} of {count:,}, better than {better_than:.2f} %)"
    found = [text.format(name, **numbers) for name, numbers in record.items() if name in tables.DATASETS]
    return f"{record['architecture']}: {', '.join(found) or 'not known: ' + record['source']}"


def main(args: argparse.Namespace) -> None:
    found = [genotypes.load(text) for text in args.architecture]
    for text, genotype in zip(args.architecture, found, strict=True):
        if not isinstance(genotype, Genotype201):
            raise cli.UserError(f"{text}: a genotype of DARTS' space, of which no table is known; expected |op~0|+...")
    table = tables.load_table(args.table)
    for text, genotype in zip(args.architecture, found, strict=True):
        record = ({} if text.strip() == str(genotype) else {"run": text}) | look_up(genotype, table)
        print(json.dumps(record) if args.json else f"{text}: " * ("run" in record) + in_words(record))


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("architecture", nargs="+", metavar="CELL|RUN", help="|op~0|+..., or a run folder whose genotype.txt has it")
    text = "columns architecture,cifar10,cifar100,imagenet16 (default: analog-nasbench, if installed)"
    add("--table", metavar="FILE.csv", help=text)
    add("--json", action="store_true", help="one JSON object a line")
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
