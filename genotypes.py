# ruff: noqa: E501, a cell is one line
"""Genotypes, primitives and search spaces: data that people read, paste and edit by hand.

A genotype describes the two cells of a network. Each of the four intermediate nodes of a cell sums two operations, so
a cell is a list of eight (operation, source) pairs, node by node; sources 0 and 1 are the outputs of the two cells
before, 2..5 the intermediate nodes. To train a cell of your own, add a line ``MY_CELL = Genotype(...)`` at the end of
this file and run ``python retrain.py --arch MY_CELL``. A new operation is an entry of OPS in operations.py.
"""

from __future__ import annotations

import ast
import builtins
import fcntl
import keyword
import os
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import nasbench201
from lib.checkpoints import write_whole
from nasbench201 import Architecture
from operations import OPS

Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")
CELL_TYPES = ("normal", "reduce")
NODES = 4  # intermediate nodes of a cell
EDGE_LIST = [(node, source) for node in range(NODES) for source in range(2 + node)]  # the order of every table
EDGES = len(EDGE_LIST)  # 14: node i has 2 + i incoming edges
PRIMITIVES = list(OPS)[:8]
WRITTEN_FOR = 60  # epochs of a search: the schedules of SPACES


class Space(NamedTuple):
    """A search space: its primitives in order, and how the set of available ones changes over the epochs.

    ``shrink`` maps an epoch to the number of operations removed per cell type when it starts, ``expand`` to the number
    of leading primitives that are available from it on: the dynamic spaces of DDSAS (Yang et al., ACML 2021).
    """

    primitives: list[str]
    shrink: dict[int, int] = {}
    expand: dict[int, int] = {}
    cells: str = "darts"  # how a cell is built: see methods.CELLS

    def scaled(self, epochs: int) -> Space:
        """The space with its schedule, which is written for 60 epochs, in the same proportions for ``epochs``.

        Nothing is removed in epoch 0, when no saliency is known; what falls into one epoch is removed together.
        """
        shrink: dict[int, int] = {}
        for epoch, num in self.shrink.items():
            at = max(1, epoch * epochs // WRITTEN_FOR)
            shrink[at] = shrink.get(at, 0) + num
        expand = {epoch * epochs // WRITTEN_FOR: num for epoch, num in self.expand.items()}
        return self._replace(shrink=shrink, expand=expand)

    def describe(self) -> str:
        """What is available when, in words; nothing for a space that stays as it is."""
        changes = [f"{num} operations per cell type fewer from epoch {epoch}" for epoch, num in self.shrink.items()]
        changes += [f"{', '.join(self.primitives[:num])} from epoch {epoch}" for epoch, num in self.expand.items()]
        return "; ".join(changes)


def names() -> list[str]:
    """The names of all genotypes in this file."""
    return [name for name, value in globals().items() if isinstance(value, (Genotype, Architecture))]


def count_skips(genotype: Genotype | Architecture) -> int:
    """Skip connections of the normal (or only) cell: many of them make a network that trains fast and ends low."""
    ops = genotype.ops if isinstance(genotype, Architecture) else [op for op, _ in genotype.normal]
    return ops.count("skip_connect")


def shown(text: str) -> str:
    """The text as it appears in a message: one line, not longer than 60 characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= 60 else line[:57] + "..."


MAX_LITERAL = 10_000  # characters; a real genotype has about 500


def load(text: str) -> Genotype | Architecture:
    """A genotype from whatever a user has at hand.

    ``text`` is a name in this file, the path of a genotype.txt or of a run folder that holds one, a literal
    ``Genotype(normal=[...], ...)``, or an architecture of NAS-Bench-201's space, ``|op~0|+...``. Nothing in it is
    executed. Raises ValueError that says what was expected.
    """
    text = str(text).strip()
    if isinstance(globals().get(text), Architecture):
        return globals()[text]
    if isinstance(globals().get(text), Genotype):
        return validate(globals()[text])
    if text.startswith(("Genotype(", "|")):
        return parse(text)
    try:
        path = Path(text) / "genotype.txt" if Path(text).is_dir() else Path(text)
        if path.is_file():
            with path.open("rb") as file:
                return parse(file.read(2 * MAX_LITERAL).decode())
    except (OSError, ValueError) as error:  # a name too long for a path, a folder of somebody else, bytes, no genotype
        raise ValueError(f"no genotype in {shown(text)}: {getattr(error, 'strerror', None) or error}") from None
    raise ValueError(
        f"no genotype {shown(text)}: expected one of {', '.join(names())}, a genotype.txt, a run folder that holds one,"
        " a literal Genotype(...), or |op~0|+|op~0|op~1|+|op~0|op~1|op~2|"
    )


def parse(text: str) -> Genotype | Architecture:
    """The genotype written as ``[NAME =] Genotype(normal=[(op, source), ...], normal_concat=range(2, 6), ...)``, or the
    architecture of NAS-Bench-201's space written as ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``.

    Only literals and ``range(a, b)`` are understood; ValueError for all else, and for a genotype that cannot be built.
    """
    if text.lstrip().startswith("|"):
        return nasbench201.parse(text)
    if len(text) > MAX_LITERAL:
        raise ValueError(f"not a genotype: longer than {MAX_LITERAL} characters")
    try:
        (statement,) = ast.parse(text.strip()).body
        call = statement.value  # an expression or an assignment
        if call.func.id != "Genotype" or len(call.args) + len(call.keywords) != len(Genotype._fields):
            raise ValueError
        fields = dict(zip(Genotype._fields, call.args, strict=False)) | {k.arg: k.value for k in call.keywords}
        genotype = Genotype(**{name: _literal(node) for name, node in fields.items()})
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        raise ValueError(
            f"not a genotype: {shown(text)}; expected Genotype(normal=[(op, source), ...], normal_concat=range(2, 6),"
            " reduce=[...], reduce_concat=range(2, 6))"
        ) from None
    return validate(genotype)


def _literal(node: ast.expr):
    """The value of a literal or of range(a, b) with small numbers."""
    if isinstance(node, ast.Call) and node.func.id == "range" and not node.keywords:
        bounds = [ast.literal_eval(argument) for argument in node.args]
        if any(type(b) is not int or abs(b) > 100 for b in bounds):
            raise ValueError
        return range(*bounds)
    return ast.literal_eval(node)


def validate(genotype: Genotype) -> Genotype:
    """The genotype with plain lists of pairs, or ValueError: known operations, existing sources, right counts."""
    checked, all_nodes = {}, range(2, 2 + NODES)
    for cell in CELL_TYPES:
        pairs, concat = getattr(genotype, cell), getattr(genotype, f"{cell}_concat")
        if not isinstance(pairs, (list, tuple)) or len(pairs) != 2 * NODES:
            raise ValueError(f"the {cell} cell needs {2 * NODES} (operation, source) pairs, two for each node")
        for index, pair in enumerate(pairs):
            where, node = f"{cell} pair {index}", 2 + index // 2
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ValueError(f"{where}: expected (operation, source), got {shown(repr(pair))}")
            op, source = pair
            if op == "none" or op not in PRIMITIVES:
                known = ", ".join(name for name in PRIMITIVES if name != "none")
                raise ValueError(f"{where}: unknown operation {shown(repr(op))}; known are {known}")
            if type(source) is not int or not 0 <= source < node:
                raise ValueError(f"{where}: source {shown(repr(source))} of node {node} must be 0 to {node - 1}")
        if not isinstance(concat, (list, tuple, range)) or not concat or len(set(map(repr, concat))) != len(concat):
            raise ValueError(f"{cell}_concat must list the nodes that form the output, each once, such as range(2, 6)")
        if any(type(node) is not int or node not in all_nodes for node in concat):
            raise ValueError(f"{cell}_concat must list intermediate nodes, 2 to {1 + NODES}: {shown(str([*concat]))}")
        checked[cell] = [tuple(pair) for pair in pairs]
        checked[f"{cell}_concat"] = all_nodes if list(concat) == list(all_nodes) else list(concat)
    return Genotype(**checked)


FOUND = "# Found by searches of this repository (search.py --arch NAME writes below this line):"


def check_name(name: str) -> None:
    """ValueError unless a search may record its result in this file as ``name``; ``range`` would break all of it."""
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise ValueError(f"--arch {shown(name)}: a search records its genotype under a Python name, such as MY_CELL")
    published = f"\n{name} = " in Path(__file__).read_text().split(f"\n{FOUND}\n")[0]
    if hasattr(builtins, name) or name in globals() and (published or name not in names()):
        raise ValueError(f"--arch {name}: this name is taken in genotypes.py; choose one of your own")


def record(name: str, genotype: Genotype | Architecture, path: str | Path = __file__) -> None:
    """Write ``name = Genotype(...)`` at the end of genotypes.py; what has that name below the line FOUND is replaced.

    The file is replaced as a whole, so a reader never sees half of it. ValueError if it is not valid Python now.
    """
    path = Path(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # searches that end together all keep their line
        text = path.read_text().rstrip()
        lines = text.split("\n")
        if FOUND not in lines:
            lines += ["", "", FOUND]
        for node in reversed(ast.parse(text).body):  # one may be of many lines, formatted or written by hand
            own = isinstance(node, ast.Assign) and node.lineno > lines.index(FOUND)
            if own and ast.unparse(node.targets[0]) == name:
                del lines[node.lineno - 1 : node.end_lineno]
        write_whole(path, "\n".join([*lines, f"{name} = {genotype!r}"]) + "\n")
    except SyntaxError as error:
        raise ValueError(f"{path} has a mistake in line {error.lineno}: {name} = {genotype} not recorded") from None
    finally:
        os.close(folder)


# ---- the data --------------------------------------------------------------------------------------------------------
# fmt: off
space_config_static = Space(PRIMITIVES)
space_config_shrink = Space(PRIMITIVES, shrink={10: 14, 20: 14, 30: 14, 40: 14, 50: 14})
space_config_expand = Space(
    "none skip_connect sep_conv_3x3 max_pool_3x3 dil_conv_3x3 avg_pool_3x3 sep_conv_5x5 dil_conv_5x5".split(),
    expand={0: 3, 10: 4, 20: 5, 30: 6, 40: 7, 50: 8})
space_config_imagenet = Space(
    "sep_conv_3x3 dil_conv_3x3 sep_conv_5x5 dil_conv_5x5 none skip_connect max_pool_3x3 avg_pool_3x3".split(),
    expand={0: 4, 40: 8})
space_config_nasbench201 = Space(nasbench201.PRIMITIVES, cells="nasbench201")
SPACES = {"static": space_config_static, "shrink": space_config_shrink, "expand": space_config_expand,
          "imagenet": space_config_imagenet, "nasbench201": space_config_nasbench201}
SPACES |= {f"space_config_{name}": space for name, space in SPACES.items()}  # the published names

# DDSAS (Yang et al., ACML 2021): searched on CIFAR-10, CIFAR-100 and ImageNet
DDSAS_cifar10 = Genotype(
    normal=[("sep_conv_3x3", 0), ("skip_connect", 1), ("sep_conv_3x3", 2), ("skip_connect", 0), ("sep_conv_5x5", 0), ("skip_connect", 1), ("sep_conv_5x5", 1), ("sep_conv_5x5", 3)], normal_concat=range(2, 6),
    reduce=[("sep_conv_5x5", 1), ("sep_conv_5x5", 0), ("max_pool_3x3", 1), ("sep_conv_5x5", 0), ("max_pool_3x3", 0), ("dil_conv_5x5", 2), ("max_pool_3x3", 0), ("sep_conv_5x5", 2)], reduce_concat=range(2, 6),
)
DDSAS_cifar100 = Genotype(
    normal=[("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("dil_conv_5x5", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 2)], normal_concat=range(2, 6),
    reduce=[("sep_conv_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_3x3", 2), ("skip_connect", 1), ("sep_conv_3x3", 2), ("sep_conv_3x3", 3), ("sep_conv_3x3", 1), ("sep_conv_3x3", 3)], reduce_concat=range(2, 6),
)
DDSAS_imagenet = Genotype(
    normal=[("sep_conv_3x3", 0), ("sep_conv_5x5", 1), ("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 1), ("sep_conv_3x3", 3), ("skip_connect", 2), ("sep_conv_5x5", 3)], normal_concat=range(2, 6),
    reduce=[("sep_conv_5x5", 1), ("sep_conv_5x5", 0), ("sep_conv_5x5", 1), ("sep_conv_3x3", 0), ("sep_conv_5x5", 0), ("sep_conv_5x5", 2), ("skip_connect", 2), ("sep_conv_5x5", 3)], reduce_concat=range(2, 6),
)

# P-DARTS (Chen et al., ICCV 2019): searched on CIFAR-10
PDARTS = Genotype(
    normal=[("skip_connect", 0), ("dil_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 1), ("sep_conv_3x3", 3), ("sep_conv_3x3", 0), ("dil_conv_5x5", 4)], normal_concat=range(2, 6),
    reduce=[("avg_pool_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_3x3", 0), ("dil_conv_5x5", 2), ("max_pool_3x3", 0), ("dil_conv_3x3", 1), ("dil_conv_3x3", 1), ("dil_conv_5x5", 3)], reduce_concat=range(2, 6),
)

# DARTS (Liu et al., ICLR 2019): first and second order, searched on CIFAR-10
DARTS_V1 = Genotype(
    normal=[("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 0), ("sep_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 2)], normal_concat=range(2, 6),
    reduce=[("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 0), ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("avg_pool_3x3", 0)], reduce_concat=range(2, 6),
)
DARTS_V2 = Genotype(
    normal=[("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2)], normal_concat=range(2, 6),
    reduce=[("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1), ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1)], reduce_concat=range(2, 6),
)

# Found by searches of this repository (search.py --arch NAME writes below this line):
