"""Genotypes as people write them: what is read, what is refused, and how a search records what it has found."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import genotypes
import operations
from genotypes import NODES, PRIMITIVES, Genotype, Genotype201
from lib import cli, genotype_io

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ("DDSAS_cifar10", "DDSAS_cifar100", "DDSAS_imagenet", "PDARTS", "DARTS_V1", "DARTS_V2")
CELL = "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|none~0|skip_connect~1|nor_conv_3x3~2|"

OPS = st.sampled_from(list(operations.OPS)[1:])
CELLS = st.tuples(*(st.tuples(OPS, st.integers(0, 1 + index // 2)) for index in range(2 * NODES))).map(list)
CONCATS = st.one_of(
    st.just(range(2, 6)),
    st.lists(st.integers(2, 5), min_size=1, max_size=4, unique=True).filter(lambda c: c != [2, 3, 4, 5]),
)
GENOTYPES = st.builds(Genotype, CELLS, CONCATS, CELLS, CONCATS)


def is_buildable(genotype: Genotype | Genotype201) -> bool:
    """What `parse` promises, written a second time."""
    if isinstance(genotype, Genotype201):
        return len(genotype.ops) == 6 and set(genotype.ops) <= set(genotypes.SPACES["nasbench201"].primitives)
    concats = [list(genotype.normal_concat), list(genotype.reduce_concat)]
    cells = genotype.normal, genotype.reduce
    pairs = [(op, source, 2 + i // 2) for cell in cells for i, (op, source) in enumerate(cell)]
    return (
        [*map(len, cells)] == [8, 8]
        and all(concat and set(concat) <= {2, 3, 4, 5} and len(set(concat)) == len(concat) for concat in concats)
        and {op for op, _, _ in pairs} <= set(operations.OPS) - {"none"}
        and all(type(source) is int and 0 <= source < node for _, source, node in pairs)
    )


# --- nothing is executed ----------------------------------------------------------------------------------------------

executed: list[str] | None = None  # while it is a list: what Python does beside parsing


def watch(event: str, args: tuple) -> None:
    parsing = event == "compile" or event == "open" and args[0] == "<unknown>"  # the line of a syntax error
    if executed is not None and not parsing:
        executed.append(event)


sys.addaudithook(watch)


def parse(text: str) -> Genotype | Genotype201 | None:
    """The genotype, None if it is refused with a ValueError of one line; fails if anything is executed."""
    global executed
    executed = []
    try:
        genotype = genotypes.parse(text)
    except ValueError as error:
        genotype, message = None, str(error)
        assert message.isprintable() and len(message) < 400 and isinstance(error, cli.UserError)
    finally:
        events, executed = executed, None
    assert not events
    assert genotype is None or is_buildable(genotype)
    return genotype


LITERAL = str(genotypes.DDSAS_cifar10)
CODE = "__import__('os').system('touch /tmp/executed')"
HOSTILE = {
    "call": LITERAL.replace("range(2, 6)", CODE, 1),
    "source": LITERAL.replace("0", CODE, 1),
    "operation": LITERAL.replace("'skip_connect'", f"({CODE}, 'skip_connect')[1]"),
    "after": f"{LITERAL}; {CODE}",
    "before": f"{CODE}\n{LITERAL}",
    "comprehension": LITERAL.replace("range(2, 6)", "[i for i in range(2, 6)]", 1),
    "f-string": LITERAL.replace("'skip_connect'", f'f"{{{CODE}}}"', 1),
    "star": "Genotype(*[1, 2, 3, 4])",
    "attribute": LITERAL.replace("Genotype(", "Genotype.__class__(", 1),
    "other name": LITERAL.replace("Genotype(", "eval(", 1),
    "walrus": f"(Genotype := {CODE})",
    "huge range": LITERAL.replace("range(2, 6)", "range(0, 10**12)", 1),
    "huge number": LITERAL.replace("0", "9" * 5000, 1),
    "power": LITERAL.replace("0", "9**9**9", 1),
    "deep": "Genotype(" + "(" * 4000 + ")" * 4000,
    "deep list": LITERAL.replace("range(2, 6)", "[" * 150 + "2" + "]" * 150, 1),
    "plus": LITERAL.replace("0", "+".join("1" * 2000), 1),
    "zero byte": LITERAL + "\0",
    "long": LITERAL + " " * 10_000 + ";",
    "many starts": "genotype: = |" * 700 + "~",
    "true as a source": LITERAL.replace("0", "True", 1),
    "cell": CELL.replace("none", CODE),
    "operations": f"Genotype201(ops=[{CODE}] * 6)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_code_and_bombs_are_refused(name):
    started = time.time()
    text = HOSTILE[name]
    assert text != LITERAL and parse(text) is None
    with pytest.raises(ValueError):
        genotypes.load(text)
    assert time.time() - started < 2 and not Path("/tmp/executed").exists()


SIGNS = st.lists(st.sampled_from([*"|+~012 \n\0:=", "none", "x"]), max_size=30).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text().map("x = Genotype({})".format) | SIGNS)
def test_any_text_is_a_genotype_or_refused(text):
    parse(text)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([LITERAL, CELL]))
def test_mutated_literal_is_a_genotype_or_refused(data, text):
    words = ["range", "None", "True", "lambda:", "...", "1e999", "x", "**", "é", "|", "~"]
    tokens = [*PRIMITIVES, *"0123456789()[],='\"-+*.:{} \n\0#", *words]
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 6)))
        text = text[:start] + data.draw(st.sampled_from(["", *tokens])) + text[end:]
    parse(text)


# --- what people have at hand -----------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(GENOTYPES)
def test_a_genotype_survives_the_round_trip(genotype):
    assert genotypes.parse(str(genotype)) == genotype == genotypes.load(str(genotype))
    fields = ", ".join(f"\n    {value!r}" for value in genotype)
    assert genotypes.parse(f"# my best\nMY_CELL = Genotype({fields},\n)  # by hand") == genotype


@pytest.mark.parametrize("literal", [LITERAL, CELL])
def test_a_pasted_line_of_a_log_is_a_genotype(literal):
    expected = genotypes.load(literal)
    starts = ["", "genotype = ", "genotype: ", "NAME = ", "2026-01-01 12:00:00 INFO something genotype = ", "epoch 3: "]
    for start in [*starts, "12/31 11:59:59 PM | INFO | genotype = ", "unrestricted "]:
        assert genotypes.load(f" {start}{literal}\n") == expected
    for text in (f"{literal} {literal}", f"{literal} and more", f"x{literal}"):
        with pytest.raises(ValueError, match="not a "):
            genotypes.load(text)


def test_a_cell_of_nasbench201_is_its_string():
    genotype = genotypes.load(f"{CELL}\n")
    assert str(genotype) == CELL and genotype == Genotype201(genotype.ops) == genotypes.parse(repr(genotype))
    assert genotypes.parse(f"epoch 0: {CELL} (cifar10 91.50 %; rank 7 of 15,625)") == genotype
    for change in [("avg_pool", "max_pool"), ("~1", "~0"), ("~1", "~\N{SUPERSCRIPT ONE}"), ("+|none~0", "|none~0")]:
        with pytest.raises(ValueError, match=r"expected \|op~0\|\+\|op~0\|op~1\|\+.* with op one of none"):
            genotypes.load(CELL.replace(*change, 1))


def test_names_files_and_run_folders_are_found(tmp_path):
    assert genotypes.names() == [*PUBLISHED] and not genotypes.broken()
    assert [genotypes.load(name) for name in PUBLISHED] == [getattr(genotypes, name) for name in PUBLISHED]
    (tmp_path / "genotype.txt").write_text(f"{genotypes.PDARTS}\n")
    for place in (tmp_path, tmp_path / "genotype.txt", f"  {tmp_path}/\n"):
        assert genotypes.load(place) == genotypes.PDARTS


def test_what_holds_no_genotype_is_named(tmp_path):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "empty").mkdir()
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(50 << 30)  # sparse
    os.mkfifo(tmp_path / "pipe")
    paths = [str(path) for path in tmp_path.iterdir()]
    for text in (*paths, "", "DDSAS", "PRIMITIVES", "load", "Genotype", "ast", "a\0b", "x" * 5000, "é/\ud800", "."):
        with pytest.raises(ValueError, match="no genotype|not a genotype") as refused:
            genotypes.load(text)
        assert str(refused.value).isprintable() and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "change, message",
    [
        (("'skip_connect'", "'none'"), "unknown operation 'none'"),
        (("'skip_connect'", "'conv'"), "unknown operation 'conv'; known are max_pool_3x3"),
        (("0)", "2)"), "source 2 of node 2 must be 0 to 1"),
        (("0)", "-1)"), "source -1"),
        (("range(2, 6)", "range(1, 6)"), "intermediate nodes, 2 to 5"),
        (("range(2, 6)", "[2, 2]"), "each once"),
        (("normal=[", "normal=[('skip_connect', 0), "), "the normal cell needs 8"),
        (("normal=", "norm="), "expected Genotype(normal="),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError) as refused:
        genotypes.load(LITERAL.replace(*change, 1))
    assert message in str(refused.value)


def test_primitives_spaces_and_edges():
    published = "none max_pool_3x3 avg_pool_3x3 skip_connect sep_conv_3x3 sep_conv_5x5 dil_conv_3x3 dil_conv_5x5"
    assert PRIMITIVES == published.split() and set(PRIMITIVES) <= set(operations.OPS)
    for space in (space for space in genotypes.SPACES.values() if space.cells == "darts"):
        assert sorted(space.primitives) == sorted(PRIMITIVES)
    edges = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert genotypes.EDGE_LIST == [*edges, *((3, source) for source in range(5))]
    assert genotypes.EDGES == 14 and genotypes.CELL_TYPES == ("normal", "reduce")
    assert [genotypes.count_skips(genotypes.load(name)) for name in [*PUBLISHED, CELL]] == [3, 1, 2, 2, 3, 2, 1]


def test_a_new_operation_is_an_entry_of_operations_alone(monkeypatch):
    text = LITERAL.replace("skip_connect", "conv_1x1")
    with pytest.raises(ValueError, match="unknown operation 'conv_1x1'"):
        genotypes.load(text)
    monkeypatch.setitem(operations.OPS, "conv_1x1", operations.OPS["sep_conv_3x3"])
    assert genotypes.load(text).normal[1] == ("conv_1x1", 1)


# --- recording --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of genotypes.py."""
    path = tmp_path / "genotypes.py"
    path.write_bytes((ROOT / "genotypes.py").read_bytes())
    return path


def load_copy(path: Path):
    spec = importlib.util.spec_from_file_location("copy_of_genotypes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_genotype_that_cannot_be_built_does_not_break_the_others(copy):
    unknown = LITERAL.replace("skip_connect", "my_op", 1)
    with copy.open("a") as file:
        file.write(f"A = {unknown}\nB = Genotype([], None, 3, [9])\nC = {LITERAL}\n")
        file.write("D = Genotype201(('none',) * 5)\nE = Genotype201(3)\n")
    module = load_copy(copy)
    assert module.names() == [*PUBLISHED, "C"] and module.load("C") == genotypes.DDSAS_cifar10
    assert list(module.broken()) == ["A", "B", "D", "E"] and "unknown operation 'my_op'" in module.broken()["A"]
    for name in module.broken():
        with pytest.raises(cli.UserError):
            module.load(name)


def test_a_recorded_genotype_is_there_beside_the_others(copy):
    before = copy.read_text().rstrip()
    genotypes.record("MY_CELL", genotypes.DARTS_V1, copy)
    genotypes.record("OTHER", genotypes.PDARTS._replace(normal_concat=[4, 5]), copy)
    genotypes.record("SMALL", genotypes.load(CELL), copy)
    assert copy.read_text().startswith(before)
    module = load_copy(copy)
    assert module.load("MY_CELL") == genotypes.DARTS_V1 and module.load("OTHER").normal_concat == [4, 5]
    assert str(module.load("SMALL")) == CELL and all(module.load(name) == genotypes.load(name) for name in PUBLISHED)
    assert module.load(copy.read_text().splitlines()[-1]) == module.SMALL


def test_a_name_recorded_again_is_replaced_even_if_edited_by_hand(copy):
    genotypes.record("A", genotypes.DARTS_V1, copy)
    with copy.open("a") as file:
        pairs = ",\n        ".join(map(repr, genotypes.PDARTS.normal))
        file.write(f"# mine\nB = Genotype(\n    normal=[\n        {pairs},\n    ],\n    normal_concat=range(2, 6),\n")
        file.write(f"    reduce={genotypes.PDARTS.reduce},\n    reduce_concat=range(2, 6),\n)\n")
    genotypes.record("A", genotypes.DARTS_V2, copy)
    genotypes.record("B", genotypes.DARTS_V1, copy)
    module = load_copy(copy)
    assert (module.A, module.B) == (genotypes.DARTS_V2, genotypes.DARTS_V1)
    text = copy.read_text()
    assert [text.count(f"\n{line}") for line in ("A = ", "B = ", "# mine\n", f"{genotype_io.FOUND}\n")] == [1] * 4
    module.check_name("A")


def test_a_file_with_a_mistake_is_left_as_it_is(copy):
    with copy.open("a") as file:
        file.write("B = Genotype(\n")
    before = copy.read_bytes()
    with pytest.raises(ValueError, match="mistake in line .*A = Genotype"):
        genotypes.record("A", genotypes.PDARTS, copy)
    assert copy.read_bytes() == before


def test_without_fcntl_results_are_recorded_as_well(copy, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows: its import fails
    module = load_copy(ROOT / "lib" / "genotype_io.py")
    module.record("A", genotypes.PDARTS, copy)
    assert module.fcntl is None and load_copy(copy).load("A") == genotypes.PDARTS


def record_many(path: Path, letter: str, count: int) -> None:
    for number in range(count):
        genotypes.record(f"{letter}{number % 40}", genotypes.PDARTS, path)


def test_killed_while_recording_leaves_a_whole_file_with_all_before(copy):
    draw, context, done = random.Random(3), multiprocessing.get_context("fork"), set()
    for _ in range(5):
        process, before = context.Process(target=record_many, args=(copy, "C", 10_000)), copy.stat().st_mtime_ns
        process.start()
        while copy.stat().st_mtime_ns == before:  # on a busy machine the process is slow to begin
            time.sleep(0.001)
        time.sleep(0.1 * draw.random())
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = set(load_copy(copy).names())
        assert found >= done | {*PUBLISHED}
        done = found
    assert len(done) > len(PUBLISHED)


def test_searches_that_end_together_all_keep_their_lines(copy):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=record_many, args=(copy, letter, 4)) for letter in "ABCD"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {f"{letter}{number}" for letter in "ABCD" for number in range(4)} <= set(load_copy(copy).names())


def test_names_that_would_break_the_file_are_refused():
    genotypes.check_name("MY_CELL")
    words = ["load", "PRIMITIVES", "Genotype", "range", "print", "_x", "a b", "class", "", "1a", "a\nb"]
    for name in [*PUBLISHED, *words, "genotype_io", "space_config_static", "TAKEN"]:
        with pytest.raises(ValueError, match="--arch"):
            genotypes.check_name(name)
