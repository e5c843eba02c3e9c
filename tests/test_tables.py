"""Tables of accuracies, of one's own and the package's, the command that looks cells up, and tables in Markdown."""

import hashlib
import importlib.util
import itertools
import json
import pickle
import sys
import types

import pytest

import nasbench201
from genotypes import Genotype201
from lib import cli, tables
from lib.tables import load_table
from nasbench201 import EDGE_LIST, PRIMITIVES

TEXT = "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|none~0|skip_connect~1|nor_conv_3x3~2|"
SPACE = [Genotype201(ops) for ops in itertools.product(PRIMITIVES, repeat=len(EDGE_LIST))]
NONE, SKIPS = (str(Genotype201((op,) * 6)) for op in ("none", "skip_connect"))


def test_a_table_of_one_s_own(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(f"architecture,accuracy\n{TEXT},91.5\n{NONE},10\n{SKIPS},91.5\r\n\n")
    table = load_table(path)
    assert table.source == f"{path}, 3 of 15,625 architectures" and table.datasets == ("cifar10",) and len(table) == 3
    assert table.accuracy(Genotype201(("none",) * 6)) == {"cifar10": 10} and table.accuracy(SPACE[7]) is None
    assert table.standing(SKIPS) == table.standing(TEXT) == (1, 1) and table.standing(NONE) == (3, 0)
    path.write_text(f"\ufeff{TEXT},91.5")
    assert load_table(path).accuracy(TEXT) == {"cifar10": 91.5}

    path.write_text(f"cifar100,architecture,cifar10\n70.5,{TEXT},93\n1,{NONE},10\n69,{SKIPS},94\n")
    table = load_table(path)
    assert table.accuracy(TEXT) == {"cifar100": 70.5, "cifar10": 93}
    assert table.standing(TEXT) == (2, 1) and table.standing(TEXT, "cifar100") == (1, 2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (f"architecture,accuracy\n{TEXT},91.5\n{TEXT},91.5\n", "line 3: .* a second time"),
        (f"{TEXT},nan\n", "line 1: accuracy nan"),
        (f"{TEXT},100.1\n", "line 1: accuracy"),
        (f"{TEXT}\n", "line 1: 1 fields"),
        (f"architecture,cifar10,cifar100\n{TEXT},91.5\n", "line 2: 2 fields, expected architecture,cifar10,cifar100"),
        (f"architecture,mnist\n{TEXT},91.5\n", "line 1: columns architecture, mnist; expected architecture and"),
        (f"{TEXT.replace('none', 'nothing')},91.5\n", "line 1: not a cell"),
        (f'"{TEXT},91.5\n', "line 1: "),
        (f"{TEXT},91.5\n\0\n", "line 2: "),
        (b"\xff\xfe", "not a text file"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_table_is_refused_by_line(tmp_path, content, reason):
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(cli.UserError, match=reason) as caught:
        load_table(path)
    assert str(caught.value).isprintable()
    with pytest.raises(cli.UserError, match="expected a file"):
        load_table("/dev/zero")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder on the path with a package analognasbench whose code must not be run; its data.anb is for the test."""
    folder = tmp_path / "site" / "analognasbench"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('the package was imported')\n")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def pickled(accuracies: dict[Genotype201, float], monkeypatch) -> bytes:
    """A file as the package's, written with a stand-in for its class; its edges are sorted by their sources."""
    module, content = types.ModuleType("analognasbench.data"), {}
    module.Architecture = type("Architecture", (), {"__module__": module.__name__})
    for genotype, accuracy in accuracies.items():
        ops = dict(zip(EDGE_LIST, genotype.ops, strict=True))
        edges = [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2)]
        content[tuple(tables.PACKAGE_OPERATIONS.index(ops[edge]) for edge in edges)] = entry = module.Architecture()
        entry.baseline_accuracy = accuracy
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "analognasbench", types.ModuleType("analognasbench"))
        patch.setitem(sys.modules, module.__name__, module)
        return pickle.dumps(content)


class Harmful:
    def __reduce__(self):
        return (open, ("trace", "w"))


def test_the_package_s_table_is_read_without_its_code(package, tmp_path, monkeypatch):
    accuracies = {genotype: 10 + 80 * i / len(SPACE) for i, genotype in enumerate(SPACE)}
    data = pickled(accuracies, monkeypatch)
    monkeypatch.chdir(tmp_path)
    (package / "data.anb").write_bytes(data)
    monkeypatch.setattr(tables, "PACKAGE_SHA256", {hashlib.sha256(data).hexdigest()})
    table = load_table()
    assert len(table) == 15625 and all(table.accuracy(g)["cifar10"] == accuracies[g] for g in SPACE[::50])
    assert table.standing(SPACE[-1]) == (1, 15624) and table.standing(SPACE[0]) == (15625, 0)
    assert "analognasbench" not in sys.modules

    harmful = pickle.dumps({(0,) * 6: Harmful()})
    deep = b"\x80\x04}" + b"(" * 10**6 + b"t" * 10**6 + b"K\x01s."  # which ends Python itself
    for content in (harmful, deep, data[:-1], data[:1000], b"", bytes([*data[:-9], data[-9] ^ 1, *data[-8:]])):
        (package / "data.anb").write_bytes(content)
        with pytest.raises(cli.UserError, match="not the file of analog-nasbench .*--table FILE.csv") as caught:
            load_table()
        assert str(caught.value).isprintable()
    (package / "data.anb").write_bytes(harmful)
    tables.PACKAGE_SHA256.add(hashlib.sha256(harmful).hexdigest())  # even if it had the right checksum
    assert tables._read_package(package / "data.anb") == {}
    assert not (tmp_path / "trace").exists()


@pytest.mark.skipif(not importlib.util.find_spec("analognasbench"), reason="pip install --no-deps analog-nasbench")
def test_the_published_facts_of_the_package_s_table():
    table = load_table()
    expected = {"nor_conv_3x3": 93.24, "skip_connect": 60.78, "avg_pool_3x3": 50.29, "none": 10.0}
    assert {op: round(table.accuracy(Genotype201((op,) * 6))["cifar10"], 2) for op in expected} == expected
    values = [table.accuracy(genotype)["cifar10"] for genotype in SPACE]
    assert round(max(values), 2) == 94.07 and round(sum(values) / len(values), 2) == 86.77 and values.count(10) == 341


def test_the_command_judges_cells_and_runs(command, refused, tmp_path, monkeypatch):
    table, run = tmp_path / "table.csv", tmp_path / "run"
    table.write_text(f"architecture,cifar10,imagenet16\n{TEXT},91.5,40\n{SKIPS},60.5,41\n")
    run.mkdir()
    (run / "genotype.txt").write_text(f"{SKIPS}\n")
    arguments = [TEXT, run, NONE, "--table", table]
    code, out, _ = command(nasbench201, *arguments)
    first, second, third = out.splitlines()
    found = "cifar10: 91.50 % (rank 1 of 2, better than 50.00 %), imagenet16: 40.00 % (rank 2 of 2, better than 0.00 %)"
    assert code == 0 and first == f"{TEXT}: {found}" and second.startswith(f"{run}: {SKIPS}: cifar10: 60.50 %")
    assert "not known: " in third and "2 of 15" in third
    record = json.loads(command(nasbench201, *arguments, "--json")[1].splitlines()[1])
    assert record["run"] == str(run) and list(record["imagenet16"].values()) == [41, 1, 2, 50]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command(nasbench201, TEXT)[1] == f"{TEXT}: not known: {tables.NO_TABLE}\n" and load_table() is None
    assert refused(nasbench201, "|none~0|")
