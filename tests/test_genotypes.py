"""Genotypes as people write them: what is read, what is refused, and how a search records what it has found."""

import importlib.util
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import genotypes
import operations
from genotypes import PRIMITIVES, Genotype, Genotype201
from lib import cli, genotype_io

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ("DDSAS_cifar10", "DDSAS_cifar100", "DDSAS_imagenet", "PDARTS", "DARTS_V1", "DARTS_V2")
CELL = "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|none~0|skip_connect~1|nor_conv_3x3~2|"


def is_buildable(genotype: Genotype | Genotype201) -> bool:
    """What `parse` promises, written a second time."""
    if isinstance(genotype, Genotype201):
        return len(genotype.ops) == 6 and set(genotype.ops) <= set(genotypes.SPACES["nasbench201"].primitives)
    found = True
    for cell, concat in zip(genotype[::2], map(list, genotype[1::2]), strict=True):
        found &= len(cell) == 8 and 0 < len(concat) == len(set(concat) & {2, 3, 4, 5})
        found &= all(op in operations.OPS and op != "none" for op, _ in cell)
        found &= all(type(source) is int and 0 <= source < 2 + i // 2 for i, (_, source) in enumerate(cell))
    return found


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
CODE = "__import__('os').system('touch i_was_executed')"
HOSTILE = [
    LITERAL.replace("range(2, 6)", CODE, 1),
    LITERAL.replace("0", CODE, 1),
    LITERAL.replace("'skip_connect'", f"({CODE}, 'skip_connect')[1]"),
    f"{LITERAL}; {CODE}",
    f"{CODE}\n{LITERAL}",
    LITERAL.replace("range(2, 6)", "[i for i in range(2, 6)]", 1),
    LITERAL.replace("Genotype(", "Genotype.__class__(", 1),
    LITERAL.replace("range(2, 6)", "range(0, 10**12)", 1),
    LITERAL.replace("0", "9**9**9", 1),
    "Genotype(" + "(" * 4000 + ")" * 4000,
    LITERAL + "\0",
    LITERAL + " " * 10_000 + ";",
    "genotype: = |" * 700 + "~",
    CELL.replace("none", CODE),
    f"Genotype201(ops=[{CODE}] * 6)",
]


def test_code_and_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.time()
    for text in HOSTILE:
        assert text != LITERAL and parse(text) is None
        with pytest.raises(ValueError):
            genotypes.load(text)
    assert time.time() - started < 20 and not list(tmp_path.iterdir())


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([LITERAL, CELL, f"x = {CELL}"]) | st.text())
def test_any_text_is_a_genotype_or_refused(data, text):
    words = ["range", "None", "True", "lambda:", "...", "1e999", "x", "**", "é", "|", "~"]
    tokens = [*PRIMITIVES, *"0123456789()[],='\"-+*.:{} \n\0#", *words]
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 6)))
        text = text[:start] + data.draw(st.sampled_from(["", *tokens])) + text[end:]
    parse(text)


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
    for change in [("avg_pool", "max_pool"), ("~1", "~0"), ("~1", "~\N{SUPERSCRIPT ONE}"), ("+|none~0", "|none~0")]:
        with pytest.raises(ValueError, match=r"expected \|op~0\|\+\|op~0\|op~1\|\+.* with op one of none"):
            genotypes.load(CELL.replace(*change, 1))


def test_names_literals_files_and_run_folders_are_found(tmp_path):
    assert genotypes.names() == [*PUBLISHED] and not genotypes.broken()
    for genotype in [*map(genotypes.load, PUBLISHED), genotypes.PDARTS._replace(normal_concat=[5, 3])]:
        (tmp_path / "genotype.txt").write_text(f"{genotype}\n")
        fields = ", ".join(f"\n    {value!r}" for value in genotype)
        by_hand = f"# my best\nMY_CELL = Genotype({fields},\n)  # by hand"
        for text in (genotype, by_hand, tmp_path, tmp_path / "genotype.txt", f"  {tmp_path}/\n"):
            assert genotypes.load(text) == genotype


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


def test_mistakes_are_named():
    for message, change in {
        "unknown operation 'none'": ("'skip_connect'", "'none'"),
        "unknown operation 'conv'; known are max_pool_3x3": ("'skip_connect'", "'conv'"),
        "source 2 of node 2 must be 0 to 1": ("0)", "2)"),
        "source -1": ("0)", "-1)"),
        "intermediate nodes, 2 to 5": ("range(2, 6)", "range(1, 6)"),
        "each once": ("range(2, 6)", "[2, 2]"),
        "the normal cell needs 8": ("normal=[", "normal=[('skip_connect', 0), "),
        "expected Genotype(normal=": ("normal=", "norm="),
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            genotypes.load(LITERAL.replace(*change, 1))


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of genotypes.py."""
    return Path(shutil.copy(ROOT / "genotypes.py", tmp_path))


def load_copy(path: Path):
    spec = importlib.util.spec_from_file_location("copy_of_genotypes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_genotype_that_cannot_be_built_does_not_break_the_others(copy, monkeypatch):
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
    monkeypatch.setitem(operations.OPS, "my_op", operations.OPS["sep_conv_3x3"])  # its author adds what it needs
    assert ("my_op", 1) in module.load("A").normal


def test_a_recorded_genotype_replaces_the_one_before_even_if_edited_by_hand(copy):
    before = copy.read_text().rstrip()
    genotypes.record("A", genotypes.DARTS_V1, copy)
    genotypes.record("C", genotypes.load(CELL), copy)
    with copy.open("a") as file:
        pairs = ",\n        ".join(map(repr, genotypes.PDARTS.normal))
        file.write(f"# mine\nB = Genotype(\n    normal=[\n        {pairs},\n    ],\n    normal_concat=range(2, 6),\n")
        file.write(f"    reduce={genotypes.PDARTS.reduce},\n    reduce_concat=range(2, 6),\n)\n")
    genotypes.record("A", genotypes.DARTS_V2, copy)
    genotypes.record("B", genotypes.DARTS_V1, copy)
    module, text = load_copy(copy), copy.read_text()
    assert (module.A, module.B, str(module.C)) == (genotypes.DARTS_V2, genotypes.DARTS_V1, CELL)
    assert text.startswith(before) and module.load(text.splitlines()[-1]) == module.B
    assert [text.count(f"\n{line}") for line in ("A = ", "B = ", "# mine\n", f"{genotype_io.FOUND}\n")] == [1] * 4
    module.check_name("A")


def test_a_file_with_a_mistake_is_left_as_it_is_and_windows_needs_no_lock(copy, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows: its import fails
    module = load_copy(ROOT / "lib" / "genotype_io.py")
    module.record("A", genotypes.PDARTS, copy)
    assert module.fcntl is None and load_copy(copy).load("A") == genotypes.PDARTS
    before = copy.read_text() + "B = Genotype(\n"
    copy.write_text(before)
    with pytest.raises(ValueError, match="mistake in line .*A = Genotype"):
        genotypes.record("A", genotypes.PDARTS, copy)
    assert copy.read_text() == before


def record_many(path: Path, letter: str, count: int) -> None:
    for number in range(count):
        genotypes.record(f"{letter}{number % 40}", genotypes.PDARTS, path)


def test_searches_that_end_together_or_are_killed_lose_nothing(copy):
    context, draw, done = multiprocessing.get_context("fork"), random.Random(3), {*PUBLISHED}
    for letter in "AB":
        processes = [context.Process(target=record_many, args=(copy, letter + end, 3)) for end in "XY"]
        victim, before = context.Process(target=record_many, args=(copy, "K", 10_000)), copy.stat().st_mtime_ns
        for process in (*processes, victim):
            process.start()
        while copy.stat().st_mtime_ns == before:  # on a busy machine processes are slow to begin
            time.sleep(0.001)
        time.sleep(0.1 * draw.random())
        os.kill(victim.pid, signal.SIGKILL)
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        done |= {f"{letter}{end}{number}" for end in "XY" for number in range(3)}
        victim.join()
        found = set(load_copy(copy).names())
        assert found >= done
        done = found


def test_names_that_would_break_the_file_are_refused():
    genotypes.check_name("MY_CELL")
    words = ["load", "PRIMITIVES", "Genotype", "range", "print", "_x", "a b", "class", "", "1a", "a\nb"]
    for name in [*PUBLISHED, *words, "genotype_io", "space_config_static", "TAKEN"]:
        with pytest.raises(ValueError, match="--arch"):
            genotypes.check_name(name)
