"""Genotypes, primitives and search spaces: data that people read, paste and edit by hand.

A genotype describes the two cells of a network. Each of the four intermediate nodes of a cell sums two operations, so
a cell is a list of eight (operation, source) pairs, node by node; sources 0 and 1 are the outputs of the two cells
before, 2..5 the intermediate nodes. To train a cell of your own, add a line ``MY_CELL = Genotype(...)`` at the end of
this file and run ``python retrain.py --arch MY_CELL``.
"""

from __future__ import annotations

import ast
import builtins
import keyword
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")

NODES = 4  # intermediate nodes of a cell
EDGES = 14  # node i has 2 + i incoming edges
EDGE_LIST = [(node, source) for node in range(NODES) for source in range(2 + node)]
CELL_TYPES = ("normal", "reduce")

PRIMITIVES = [
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
]


class Space(NamedTuple):
    """A search space: its primitives in order, and how the set of available ones changes over the epochs.

    ``shrink`` maps an epoch to the number of operations removed per cell type when it starts, ``expand`` to the number
    of leading primitives that are available from it on (DDSAS, section 3).
    """

    primitives: list[str]
    shrink: dict[int, int] = {}
    expand: dict[int, int] = {}
    cells: str = "darts"  # how a cell is built: see methods.CELLS

    def describe(self) -> str:
        """What is available when, in words; nothing for a space that stays as it is."""
        changes = [f"{num} operations per cell type fewer from epoch {epoch}" for epoch, num in self.shrink.items()]
        changes += [f"{', '.join(self.primitives[:num])} from epoch {epoch}" for epoch, num in self.expand.items()]
        return "; ".join(changes)


space_config_static = Space(PRIMITIVES)

space_config_shrink = Space(PRIMITIVES, shrink={10: 14, 20: 14, 30: 14, 40: 14, 50: 14})

space_config_expand = Space(
    [
        "none",
        "skip_connect",
        "sep_conv_3x3",
        "max_pool_3x3",
        "dil_conv_3x3",
        "avg_pool_3x3",
        "sep_conv_5x5",
        "dil_conv_5x5",
    ],
    expand={0: 3, 10: 4, 20: 5, 30: 6, 40: 7, 50: 8},
)

space_config_imagenet = Space(
    [
        "sep_conv_3x3",
        "dil_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_5x5",
        "none",
        "skip_connect",
        "max_pool_3x3",
        "avg_pool_3x3",
    ],
    expand={0: 4, 40: 8},
)

space_config_nasbench201 = Space(
    ["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"], cells="nasbench201"
)

SPACES = {
    "static": space_config_static,
    "shrink": space_config_shrink,
    "expand": space_config_expand,
    "imagenet": space_config_imagenet,
}
SPACES["nasbench201"] = space_config_nasbench201
SPACES |= {f"space_config_{name}": space for name, space in SPACES.items()}  # the published names

# DDSAS (Yang et al., ACML 2021): searched on CIFAR-10, CIFAR-100 and ImageNet
DDSAS_cifar10 = Genotype(
    normal=[
        ("sep_conv_3x3", 0),
        ("skip_connect", 1),
        ("sep_conv_3x3", 2),
        ("skip_connect", 0),
        ("sep_conv_5x5", 0),
        ("skip_connect", 1),
        ("sep_conv_5x5", 1),
        ("sep_conv_5x5", 3),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("sep_conv_5x5", 1),
        ("sep_conv_5x5", 0),
        ("max_pool_3x3", 1),
        ("sep_conv_5x5", 0),
        ("max_pool_3x3", 0),
        ("dil_conv_5x5", 2),
        ("max_pool_3x3", 0),
        ("sep_conv_5x5", 2),
    ],
    reduce_concat=range(2, 6),
)

DDSAS_cifar100 = Genotype(
    normal=[
        ("skip_connect", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("dil_conv_5x5", 1),
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 2),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("sep_conv_3x3", 0),
        ("sep_conv_5x5", 1),
        ("sep_conv_3x3", 2),
        ("skip_connect", 1),
        ("sep_conv_3x3", 2),
        ("sep_conv_3x3", 3),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 3),
    ],
    reduce_concat=range(2, 6),
)

DDSAS_imagenet = Genotype(
    normal=[
        ("sep_conv_3x3", 0),
        ("sep_conv_5x5", 1),
        ("skip_connect", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 3),
        ("skip_connect", 2),
        ("sep_conv_5x5", 3),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("sep_conv_5x5", 1),
        ("sep_conv_5x5", 0),
        ("sep_conv_5x5", 1),
        ("sep_conv_3x3", 0),
        ("sep_conv_5x5", 0),
        ("sep_conv_5x5", 2),
        ("skip_connect", 2),
        ("sep_conv_5x5", 3),
    ],
    reduce_concat=range(2, 6),
)

# P-DARTS (Chen et al., ICCV 2019)
PDARTS = Genotype(
    normal=[
        ("skip_connect", 0),
        ("dil_conv_3x3", 1),
        ("skip_connect", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 3),
        ("sep_conv_3x3", 0),
        ("dil_conv_5x5", 4),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("avg_pool_3x3", 0),
        ("sep_conv_5x5", 1),
        ("sep_conv_3x3", 0),
        ("dil_conv_5x5", 2),
        ("max_pool_3x3", 0),
        ("dil_conv_3x3", 1),
        ("dil_conv_3x3", 1),
        ("dil_conv_5x5", 3),
    ],
    reduce_concat=range(2, 6),
)

# DARTS (Liu et al., ICLR 2019), first and second order
DARTS_V1 = Genotype(
    normal=[
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("skip_connect", 0),
        ("sep_conv_3x3", 1),
        ("skip_connect", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("skip_connect", 2),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("max_pool_3x3", 0),
        ("max_pool_3x3", 1),
        ("skip_connect", 2),
        ("max_pool_3x3", 0),
        ("max_pool_3x3", 0),
        ("skip_connect", 2),
        ("skip_connect", 2),
        ("avg_pool_3x3", 0),
    ],
    reduce_concat=range(2, 6),
)

DARTS_V2 = Genotype(
    normal=[
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1),
        ("skip_connect", 0),
        ("skip_connect", 0),
        ("dil_conv_3x3", 2),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("max_pool_3x3", 0),
        ("max_pool_3x3", 1),
        ("skip_connect", 2),
        ("max_pool_3x3", 1),
        ("max_pool_3x3", 0),
        ("skip_connect", 2),
        ("skip_connect", 2),
        ("max_pool_3x3", 1),
    ],
    reduce_concat=range(2, 6),
)


def count_skips(genotype):
    return sum(op == "skip_connect" for op, _ in genotype.normal)


def load(text: str) -> Genotype:
    """A genotype from whatever a user has at hand.

    ``text`` is a name in this file, the path of a genotype.txt or of a run folder that holds one, or a literal
    ``Genotype(normal=[...], ...)``. Nothing in it is executed. Raises ValueError that says what was expected.
    """
    text = str(text).strip()
    if isinstance(globals().get(text), Genotype):
        return validate(globals()[text])
    if text.startswith("Genotype("):
        return parse(text)
    try:
        path = Path(text)
        path = path / "genotype.txt" if path.is_dir() else path
        if path.is_file():
            with path.open("rb") as file:
                return parse(file.read(2 * MAX_LITERAL).decode())
    except (
        OSError,
        UnicodeDecodeError,
        ValueError,
    ) as error:  # a name too long for a path, a folder not ours, not text
        raise ValueError(f"no genotype in {shown(text)}: {getattr(error, 'strerror', None) or error}") from None
    raise ValueError(
        f"no genotype {shown(text)}: expected one of {', '.join(names())}, a genotype.txt, a run folder that holds one,"
        " or a literal Genotype(...)"
    )


def names() -> list[str]:
    """The names of all genotypes in this file."""
    return [name for name, value in globals().items() if isinstance(value, Genotype)]


MAX_LITERAL = 10_000  # characters; a real genotype has about 500


def parse(text: str) -> Genotype:
    """The genotype written as ``[NAME =] Genotype(normal=[(op, source), ...], normal_concat=range(2, 6), ...)``.

    Only literals and ``range(a, b)`` are understood; ValueError for all else, and for a genotype that cannot be built.
    """
    if len(text) > MAX_LITERAL:
        raise ValueError(f"a genotype of more than {MAX_LITERAL} characters is none")
    try:
        statements = ast.parse(text.strip()).body
        call = statements[0].value  # of an expression or an assignment
        if len(statements) != 1 or call.func.id != "Genotype" or len(call.args) + len(call.keywords) != 4:
            raise ValueError
        fields = dict(zip(Genotype._fields, call.args, strict=False))
        fields |= {k.arg: k.value for k in call.keywords}
        genotype = Genotype(**{name: _literal(node) for name, node in fields.items()})
    except (SyntaxError, ValueError, TypeError, AttributeError, IndexError, RecursionError, MemoryError):
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
    for kind in ("normal", "reduce"):
        edges, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
        if not isinstance(edges, (list, tuple)) or len(edges) != 2 * NODES:
            raise ValueError(f"the {kind} cell needs {2 * NODES} (operation, source) pairs, two for each node")
        for index, edge in enumerate(edges):
            if not isinstance(edge, (list, tuple)) or len(edge) != 2:
                raise ValueError(f"{kind} pair {index}: expected (operation, source), got {shown(repr(edge))}")
            op, source = edge
            if op == "none" or op not in PRIMITIVES:
                known = ", ".join(PRIMITIVES[1:])
                raise ValueError(f"{kind} pair {index}: unknown operation {shown(repr(op))}; known are {known}")
            node = 2 + index // 2
            if type(source) is not int or not 0 <= source < node:
                raise ValueError(
                    f"{kind} pair {index}: source {shown(repr(source))} of node {node} must be 0 to {node - 1}"
                )
        if not isinstance(concat, (list, tuple, range)) or not concat or len(set(map(repr, concat))) != len(concat):
            raise ValueError(f"{kind}_concat must list the nodes that form the output, each once, such as range(2, 6)")
        if any(type(node) is not int or not 2 <= node < 2 + NODES for node in concat):
            raise ValueError(
                f"{kind}_concat must list intermediate nodes, 2 to {1 + NODES}; got {shown(str(list(concat)))}"
            )
    plain = [[(op, source) for op, source in edges] for edges in (genotype.normal, genotype.reduce)]
    return Genotype(plain[0], _concat(genotype.normal_concat), plain[1], _concat(genotype.reduce_concat))


def _concat(nodes) -> range | list[int]:
    nodes = list(nodes)
    whole = range(2, 2 + NODES)
    return whole if nodes == list(whole) else nodes


def shown(text: str) -> str:
    """The text as it appears in a message: one line, not longer than 60 characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= 60 else line[:57] + "..."


FOUND = "# Found by searches of this repository (search.py --arch NAME writes below this line):"


def check_name(name: str) -> None:
    """ValueError unless a search may record its result in this file as ``name``."""
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise ValueError(f"--arch {shown(name)}: a search records its genotype under a Python name, such as MY_CELL")
    published = Path(__file__).read_text().split(f"\n{FOUND}\n")[0]
    taken = name in globals() and (f"\n{name} = " in published or name not in names())
    if taken or hasattr(builtins, name):  # range = Genotype(...) would be the end of this file
        raise ValueError(f"--arch {name}: this name is taken in genotypes.py; choose one of your own")


def record(name: str, genotype: Genotype, path: str | Path = __file__) -> None:
    """Write ``name = Genotype(...)`` at the end of genotypes.py; what has that name below the line FOUND is replaced.

    The file is replaced as a whole, so a reader never sees half of it.
    """
    import fcntl
    import os

    from utils import write_whole

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
        write_whole(path, "\n".join([*lines, f"{name} = {genotype}"]) + "\n")
    except SyntaxError as error:
        raise ValueError(f"{path} has a mistake in line {error.lineno}: {name} = {genotype} not recorded") from None
    finally:
        os.close(folder)


# Found by searches of this repository (search.py --arch NAME writes below this line):
