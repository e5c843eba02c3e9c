# ruff: noqa: E501, a cell is one line
# fmt: off
"""Genotypes, primitives and search spaces: data that people read, paste and edit by hand.

A genotype describes the two cells of a network. Each of the four intermediate nodes of a cell sums two operations, so
a cell is a list of eight (operation, source) pairs, node by node; sources 0 and 1 are the outputs of the two cells
before, 2..5 the intermediate nodes. To train a cell of your own, add a line ``MY_CELL = Genotype(...)`` at the end of
this file and run ``python retrain.py --arch MY_CELL``. Its operations are any entries of OPS in operations.py.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lib import genotype_io
from lib.genotype_io import NODES, Genotype, Genotype201  # Genotype(normal, normal_concat, reduce, reduce_concat)
from operations import OPS

CELL_TYPES = ("normal", "reduce")
EDGE_LIST = [(node, source) for node in range(NODES) for source in range(2 + node)]  # the order of every table
EDGES = len(EDGE_LIST)  # 14: node i has 2 + i incoming edges
PRIMITIVES = "none max_pool_3x3 avg_pool_3x3 skip_connect sep_conv_3x3 sep_conv_5x5 dil_conv_3x3 dil_conv_5x5".split()
WRITTEN_FOR = 60  # epochs of a search: the schedules of SPACES


class Space(NamedTuple):
    """A search space; those that shrink or expand are the dynamic ones of DDSAS (Yang et al., ACML 2021)."""
    primitives: list[str]  # in the order of the columns of every table
    shrink: dict[int, int] = {}  # epoch -> number of operations removed per cell type when it starts
    expand: dict[int, int] = {}  # epoch -> number of leading primitives that are available from it on
    cells: str = "darts"  # how a cell is built: see methods.CELLS

    def scale(self, epochs: int) -> Space:
        """The space with its schedule in proportion to ``epochs``; none is removed in epoch 0."""
        shrink = Counter()  # what falls into one epoch is removed together
        for epoch, num in self.shrink.items():
            shrink[max(1, epoch * epochs // WRITTEN_FOR)] += num
        expand = {epoch * epochs // WRITTEN_FOR: num for epoch, num in self.expand.items()}
        return self._replace(shrink=dict(shrink), expand=expand)

    def describe(self) -> str:
        """What is available when, in words; nothing for a space that stays as it is."""
        changes = [f"{num} operations per cell type fewer from epoch {epoch}" for epoch, num in self.shrink.items()]
        changes += [f"{', '.join(self.primitives[:num])} from epoch {epoch}" for epoch, num in self.expand.items()]
        return "; ".join(changes)


space_config_static = Space(PRIMITIVES)
space_config_shrink = Space(PRIMITIVES, shrink={10: 14, 20: 14, 30: 14, 40: 14, 50: 14})
space_config_expand = Space(
    "none skip_connect sep_conv_3x3 max_pool_3x3 dil_conv_3x3 avg_pool_3x3 sep_conv_5x5 dil_conv_5x5".split(),
    expand={0: 3, 10: 4, 20: 5, 30: 6, 40: 7, 50: 8})
space_config_imagenet = Space(
    "sep_conv_3x3 dil_conv_3x3 sep_conv_5x5 dil_conv_5x5 none skip_connect max_pool_3x3 avg_pool_3x3".split(),
    expand={0: 4, 40: 8})
space_config_nasbench201 = Space(genotype_io.CELL_OPERATIONS, cells="nasbench201")
SPACES = {"static": space_config_static, "shrink": space_config_shrink, "expand": space_config_expand,
          "imagenet": space_config_imagenet, "nasbench201": space_config_nasbench201}
SPACES |= {f"space_config_{name}": space for name, space in SPACES.items()}  # the published names

# DDSAS (Yang et al., ACML 2021): searched on CIFAR-10, CIFAR-100 and ImageNet
DDSAS_cifar10 = Genotype(normal=[("sep_conv_3x3", 0), ("skip_connect", 1), ("sep_conv_3x3", 2), ("skip_connect", 0), ("sep_conv_5x5", 0), ("skip_connect", 1), ("sep_conv_5x5", 1), ("sep_conv_5x5", 3)], normal_concat=range(2, 6),
    reduce=[("sep_conv_5x5", 1), ("sep_conv_5x5", 0), ("max_pool_3x3", 1), ("sep_conv_5x5", 0), ("max_pool_3x3", 0), ("dil_conv_5x5", 2), ("max_pool_3x3", 0), ("sep_conv_5x5", 2)], reduce_concat=range(2, 6))
DDSAS_cifar100 = Genotype(normal=[("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("dil_conv_5x5", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 2)], normal_concat=range(2, 6),
    reduce=[("sep_conv_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_3x3", 2), ("skip_connect", 1), ("sep_conv_3x3", 2), ("sep_conv_3x3", 3), ("sep_conv_3x3", 1), ("sep_conv_3x3", 3)], reduce_concat=range(2, 6))
DDSAS_imagenet = Genotype(normal=[("sep_conv_3x3", 0), ("sep_conv_5x5", 1), ("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 1), ("sep_conv_3x3", 3), ("skip_connect", 2), ("sep_conv_5x5", 3)], normal_concat=range(2, 6),
    reduce=[("sep_conv_5x5", 1), ("sep_conv_5x5", 0), ("sep_conv_5x5", 1), ("sep_conv_3x3", 0), ("sep_conv_5x5", 0), ("sep_conv_5x5", 2), ("skip_connect", 2), ("sep_conv_5x5", 3)], reduce_concat=range(2, 6))
# P-DARTS (Chen et al., ICCV 2019): searched on CIFAR-10
PDARTS = Genotype(normal=[("skip_connect", 0), ("dil_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 1), ("sep_conv_3x3", 3), ("sep_conv_3x3", 0), ("dil_conv_5x5", 4)], normal_concat=range(2, 6),
    reduce=[("avg_pool_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_3x3", 0), ("dil_conv_5x5", 2), ("max_pool_3x3", 0), ("dil_conv_3x3", 1), ("dil_conv_3x3", 1), ("dil_conv_5x5", 3)], reduce_concat=range(2, 6))
# DARTS (Liu et al., ICLR 2019): first and second order, searched on CIFAR-10
DARTS_V1 = Genotype(normal=[("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 0), ("sep_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 2)], normal_concat=range(2, 6),
    reduce=[("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 0), ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("avg_pool_3x3", 0)], reduce_concat=range(2, 6))
DARTS_V2 = Genotype(normal=[("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2)], normal_concat=range(2, 6),
    reduce=[("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1), ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1)], reduce_concat=range(2, 6))


def names() -> list[str]:
    """The names of the genotypes in this file, without those that are `broken`."""
    return [name for name, fault in genotype_io.find_faults(globals(), OPS).items() if not fault]


def broken() -> dict[str, str]:
    """The genotypes in this file that no network can be built of, and why: name -> reason."""
    return {name: fault for name, fault in genotype_io.find_faults(globals(), OPS).items() if fault}


def count_skips(genotype: Genotype | Genotype201) -> int:
    """Skip connections of the normal (or only) cell: many of them make a network that trains fast and ends low."""
    ops = genotype.ops if isinstance(genotype, Genotype201) else [op for op, _ in genotype.normal]
    return ops.count("skip_connect")


def edges_of(genotype: Genotype | Genotype201) -> dict[str, list[tuple[int, str]]]:
    """Per cell type (edge, operation) of what a genotype keeps; edges are rows of the tables of alpha."""
    if isinstance(genotype, Genotype201):
        return {"cell": list(enumerate(genotype.ops))}
    cells = {kind: enumerate(getattr(genotype, kind)) for kind in CELL_TYPES}
    return {
        kind: [(EDGE_LIST.index((index // 2, source)), op) for index, (op, source) in pairs]
        for kind, pairs in cells.items()
    }


def load(text: str | Path) -> Genotype | Genotype201:
    """A genotype from what a user has at hand: a name in this file, a genotype.txt, a run folder, or what `parse` takes.

    Nothing in it is executed. Raises ValueError (which is a UserError, too) of one line that says what was expected.
    """
    return genotype_io.load(str(text).strip(), globals(), OPS)


def parse(text: str) -> Genotype | Genotype201:
    """The genotype in a line such as ``NAME = Genotype(...)`` or ``... INFO genotype: |op~0|+...``; ValueError if none."""
    return genotype_io.parse(text, OPS)


def check_name(name: str) -> None:
    """ValueError unless a search may record its result in this file as ``name``."""
    genotype_io.check_name(name, TAKEN)


def record(name: str, genotype: Genotype | Genotype201, path: str | Path = __file__) -> None:
    """Write ``name = Genotype(...)`` at the end of this file, in the place of an earlier one of that name there."""
    genotype_io.record(name, genotype, Path(path))


TAKEN = {*globals(), "TAKEN"}

# Found by searches of this repository (search.py --arch NAME writes below this line):
