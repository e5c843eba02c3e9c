"""Genotypes as text: read without running anything in it, checked, and recorded in genotypes.py."""

from __future__ import annotations

import ast
import builtins
import keyword
import os
import re
from collections import namedtuple
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lib.checkpoints import write_whole
from lib.cli import UserError, printable

try:
    import fcntl
except ImportError:  # native Windows: results are recorded without a lock
    fcntl = None

NODES = 4  # intermediate nodes of a cell of DARTS' space
CELL = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|"  # one of NAS-Bench-201's, node by node: operation~source
CELL_OPERATIONS = ["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]
CELL_PATTERN = re.compile(re.escape(CELL).replace(re.escape("{}"), f"({'|'.join(CELL_OPERATIONS)})"))
FOUND = "# Found by searches of this repository (search.py --arch NAME writes below this line):"
MAX_TEXT = 10_000  # characters; a genotype has about 500
START = re.compile(r"^(?:#[^\n]*\n)*(?:[^\n]*?[=: \t])??(?=\|\w+~|Genotype(?:201)?\()")  # NAME = , INFO ... genotype:

Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")


class Genotype201(NamedTuple):
    """A cell of NAS-Bench-201's space: the operations of its six edges. str() is ``|op~0|+|op~0|op~1|+...``."""

    ops: tuple[str, ...]  # in the order of nasbench201.EDGE_LIST

    def __str__(self) -> str:
        return CELL.format(*self.ops)


class GenotypeError(UserError, ValueError):
    """No genotype, or none that a network can be built of: one line that says what was given and expected."""


def shorten(text: object) -> str:
    """The text as a message may hold it: one line of printable characters, at most 60."""
    line = " ".join(printable(text).split())
    return line if len(line) <= 60 else line[:57] + "..."


def load(text: str, values: Mapping[str, Any], operations: Collection[str]) -> Genotype | Genotype201:
    """The genotype of this name among the values, in the text, or in a genotype.txt or run folder of this path.

    ``operations`` are those that a genotype may have. GenotypeError if there is none.
    """
    if isinstance(values.get(text), (Genotype, Genotype201)):
        return validate(values[text], operations)
    if "Genotype" in text and "(" in text or "|" in text and "~" in text:
        return parse(text, operations)
    try:
        path = Path(text) / "genotype.txt" if Path(text).is_dir() else Path(text)
        if path.is_file():
            with path.open("rb") as file:
                return parse(file.read(2 * MAX_TEXT).decode(), operations)
    except (OSError, ValueError) as error:  # a name too long for a path, a folder of somebody else, bytes, no genotype
        raise GenotypeError(f"no genotype in {shorten(text)}: {getattr(error, 'strerror', None) or error}") from None
    names = ", ".join(find_faults(values, operations))
    others = f"a genotype.txt, a run folder that holds one, a literal Genotype(...), or {CELL.format(*['op'] * 6)}"
    raise GenotypeError(f"no genotype {shorten(text)}: expected one of {names}, {others}")


def parse(text: str, operations: Collection[str]) -> Genotype | Genotype201:
    """The genotype in a text such as ``INFO genotype = Genotype(normal=[...], ...)`` or ``|op~0|+...``.

    Only literals and ``range(a, b)`` are understood; GenotypeError for all else, and for what cannot be built.
    """
    text = text.strip()
    if len(text) > MAX_TEXT:
        raise GenotypeError(f"not a genotype: longer than {MAX_TEXT} characters")
    literal = START.sub("", text, count=1)
    if "|" in literal and "~" in literal:
        return Genotype201(parse_cell(re.sub(r"\s\(.*", "", literal)))  # a search's log goes on: (cifar10 93.76 %; ...
    try:
        call = ast.parse(literal, mode="eval").body
        kind = {"Genotype": Genotype, "Genotype201": Genotype201}[call.func.id]
        fields = {argument.arg: evaluate(argument.value) for argument in call.keywords}
        genotype = kind(*map(evaluate, call.args), **fields)
    except (SyntaxError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError):
        expected = "normal=[(op, source), ...], normal_concat=range(2, 6), reduce=[...], reduce_concat=range(2, 6)"
        raise GenotypeError(f"not a genotype: {shorten(text)}; expected Genotype({expected})") from None
    return validate(genotype, operations)


def evaluate(node: ast.expr) -> Any:
    """The value of a literal or of range(a, b) with small numbers."""
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    bounds = [ast.literal_eval(argument) for argument in node.args]
    if node.func.id != "range" or node.keywords or any(type(b) is not int or abs(b) > 100 for b in bounds):
        raise ValueError
    return range(*bounds)


def parse_cell(text: str) -> tuple[str, ...]:
    """The six operations of a cell of NAS-Bench-201's space as it is written; GenotypeError if it is none."""
    match = CELL_PATTERN.fullmatch(text.strip())
    if not match:
        expected = f"{CELL.format(*['op'] * 6)} with op one of {', '.join(CELL_OPERATIONS)}"
        raise GenotypeError(f"not a cell of NAS-Bench-201: {shorten(text)}; expected {expected}")
    return match.groups()


def validate(genotype: Genotype | Genotype201, operations: Collection[str]) -> Genotype | Genotype201:
    """The genotype with plain lists of pairs; GenotypeError unless a network can be built of it.

    That takes operations among the known ones other than `none`, sources that come before their node, and two a node.
    """
    if isinstance(genotype, Genotype201):
        ops = genotype.ops
        if not isinstance(ops, (list, tuple)) or len(ops) != 6 or any(op not in CELL_OPERATIONS for op in ops):
            raise GenotypeError(f"expected six of {', '.join(CELL_OPERATIONS)}; got {shorten(repr(ops))}")
        return Genotype201(tuple(ops))
    all_nodes, fields = list(range(2, 2 + NODES)), {}
    for kind in ("normal", "reduce"):
        pairs, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
        if not isinstance(pairs, (list, tuple)) or len(pairs) != 2 * NODES:
            raise GenotypeError(f"the {kind} cell needs {2 * NODES} (operation, source) pairs, two for each node")
        for index, pair in enumerate(pairs):
            check_pair(f"{kind} pair {index}", pair, 2 + index // 2, operations)
        nodes = list(concat) if isinstance(concat, (list, tuple, range)) else []
        known = all(type(node) is int and node in all_nodes for node in nodes)
        if not nodes or not known or len(set(nodes)) < len(nodes):
            expected = f"intermediate nodes, 2 to {1 + NODES}, each once, such as range(2, 6)"
            raise GenotypeError(f"{kind}_concat must list {expected}; got {shorten(repr(concat))}")
        fields[kind] = [tuple(pair) for pair in pairs]
        fields[f"{kind}_concat"] = range(2, 2 + NODES) if nodes == all_nodes else nodes
    return Genotype(**fields)


def check_pair(where: str, pair: Any, node: int, operations: Collection[str]) -> None:
    """GenotypeError unless it is an (operation, source) pair that ``node`` may have."""
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise GenotypeError(f"{where}: expected (operation, source), got {shorten(repr(pair))}")
    op, source = pair
    if not isinstance(op, str) or op == "none" or op not in operations:
        known = ", ".join(name for name in operations if name != "none")
        raise GenotypeError(f"{where}: unknown operation {shorten(repr(op))}; known are {known}")
    if type(source) is not int or not 0 <= source < node:
        raise GenotypeError(f"{where}: source {shorten(repr(source))} of node {node} must be 0 to {node - 1}")


def find_faults(values: Mapping[str, Any], operations: Collection[str]) -> dict[str, str]:
    """For every genotype among the values its name, and why no network can be built of it ("": one can)."""
    faults = {name: "" for name, value in values.items() if isinstance(value, (Genotype, Genotype201))}
    for name in faults:
        try:
            validate(values[name], operations)
        except GenotypeError as error:
            faults[name] = str(error)
    return faults


def check_name(name: str, taken: Collection[str]) -> None:
    """GenotypeError unless a search may record its result as ``name``; ``range`` would break all of genotypes.py."""
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise GenotypeError(f"--arch {shorten(name)}: expected a Python name to record the genotype under, as MY_CELL")
    if name in taken or hasattr(builtins, name):
        raise GenotypeError(f"--arch {name}: this name is taken in genotypes.py; choose one of your own")


def record(name: str, genotype: Genotype | Genotype201, path: Path) -> None:
    """Write ``name = Genotype(...)`` at the end of genotypes.py; what has that name below the line FOUND is replaced.

    The file is replaced as a whole, so a reader never sees half of it. GenotypeError if it is not valid Python now.
    """
    folder = os.open(path.parent, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(folder, fcntl.LOCK_EX)  # searches that end together all keep their line
        text = path.read_text().rstrip()
        lines = text.split("\n") if FOUND in text else [*text.split("\n"), "", "", FOUND]
        for node in reversed(ast.parse(text).body):  # one may be of many lines, formatted or written by hand
            below = isinstance(node, ast.Assign) and node.lineno > lines.index(FOUND)
            if below and ast.unparse(node.targets[0]) == name:
                del lines[node.lineno - 1 : node.end_lineno]
        write_whole(path, "\n".join([*lines, f"{name} = {genotype!r}"]) + "\n")
    except SyntaxError as error:
        raise GenotypeError(f"{path} has a mistake in line {error.lineno}: {name} = {genotype} not recorded") from None
    finally:
        if fcntl:
            os.close(folder)
