"""NAS-Bench-201's space: architecture strings, the supernet against the published one, derivations, the table."""

from __future__ import annotations

import importlib.util
import itertools
import json
import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_arrays import GOLDEN, assert_close, golden
from hypothesis import given
from hypothesis import strategies as st

import genotypes
import methods
import nasbench201
import search
from lib import cli
from model import count_multiply_adds, count_parameters
from nasbench201 import EDGE_LIST, PRIMITIVES, Architecture, Network, Supernet, load_table, parse

TEXT = "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|none~0|skip_connect~1|nor_conv_3x3~2|"
SPACE = [Architecture(ops) for ops in itertools.product(PRIMITIVES, repeat=len(EDGE_LIST))]


def uniform(op: str) -> Architecture:
    return Architecture((op,) * 6)


# ---------------------------------------------------------------------------------------------------------------------
# Architecture strings


def test_an_architecture_is_its_string():
    genotype = parse(f"{TEXT}\n")
    assert str(genotype) == TEXT and genotype == parse(TEXT) and hash(genotype) == hash(parse(TEXT))
    assert genotype.ops[EDGE_LIST.index((2, 1))] == "avg_pool_3x3"
    assert len({str(parse(str(genotype))) for genotype in SPACE}) == nasbench201.SIZE == 15625


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "groups"),
        (TEXT.replace("avg_pool_3x3", "max_pool_3x3"), "unknown operation 'max_pool_3x3' of node 2"),
        (TEXT.replace("avg_pool_3x3~1", "avg_pool_3x3~0"), "source '0' of node 2 where 1"),
        (TEXT.replace("~1", "~\N{SUPERSCRIPT ONE}"), "source"),
        (TEXT.replace("+|none~0", "|none~0"), "2 of the groups"),
        (TEXT + "+|none~0|none~1|none~2|none~3|", "4 of the groups"),
        (TEXT.replace("|nor_conv_1x1~0|", "|"), "node 2 needs 2"),
        (TEXT[1:], "node 1 needs 1"),
        (TEXT.replace("none", "no\x1bne"), "unknown operation"),
        (TEXT * 100, "more than"),
        ("__import__('os').system('true')", "groups"),
    ],
)
def test_anything_else_is_refused_in_one_line(text, reason):
    with pytest.raises(ValueError, match=r"expected \|op~0\|\+\|op~0\|op~1\|\+") as caught:
        parse(text)
    assert reason in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 400


@given(st.lists(st.sampled_from([*"|+~012 \n\0", *PRIMITIVES]), max_size=30).map("".join) | st.text())
def test_no_text_raises_anything_but_a_value_error(text):
    try:
        assert str(parse(text)) == text.strip()
    except ValueError as error:
        assert str(error).isprintable()


def test_operations_that_are_none_of_the_space_make_no_architecture():
    for ops in [("none",) * 5, ("none",) * 7, ("sep_conv_3x3",) * 6]:
        with pytest.raises(ValueError, match="expected 6 operations out of none"):
            Architecture(ops)


# ---------------------------------------------------------------------------------------------------------------------
# The supernet


def published() -> tuple[dict[str, np.ndarray], Supernet]:
    """The golden arrays, and a supernet of their size that holds their weights under the published names."""
    arrays = golden("nasbench201_supernet.npz")
    state = {name[6:]: torch.tensor(array) for name, array in arrays.items() if name.startswith("state_")}
    del state["arch_parameters"]
    cells = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("cells."))
    C, classes, N = len(state["stem.0.weight"]), len(state["classifier.bias"]), (cells - 2) // 3
    network = Supernet(C, classes, N).double()
    network.load_state_dict(state)
    return arrays, network


def test_darts_logits_and_gradients_are_those_of_the_published_supernet():
    arrays, network = published()
    alphas = torch.tensor(arrays["alphas"], requires_grad=True)
    logits = network(torch.tensor(arrays["images"]), {"cell": alphas.softmax(-1)})
    loss = F.cross_entropy(logits, torch.tensor(arrays["labels"]))
    loss.backward()
    actual = {"logits": logits, "loss": loss, "grad_alphas": alphas.grad, "grad_stem": network.stem[0].weight.grad}
    for name, value in actual.items():
        assert_close(value, arrays[name], relative=1e-6, absolute=0)
    assert str(nasbench201.derive(arrays["alphas"])) == str(arrays["arch"])


def test_gdas_computes_one_operation_an_edge_and_passes_all_gradients_on():
    arrays, network = published()
    alphas = torch.tensor(arrays["alphas"], requires_grad=True)
    h, index = nasbench201.gdas_weights(alphas, float(arrays["tau"]), torch.tensor(arrays["gumbel"]))
    active = {"cell": [[k] for k in index.tolist()]}
    network.straight_through = True
    logits = network(torch.tensor(arrays["images"]), {"cell": h}, active)
    F.cross_entropy(logits, torch.tensor(arrays["labels"])).backward()
    assert index.tolist() == arrays["gdas_index"].tolist()
    assert_close(logits, arrays["gdas_logits"], relative=1e-6, absolute=0)
    assert_close(alphas.grad, arrays["gdas_grad_alphas"], relative=1e-6, absolute=0)
    assert computed(network) == {(edge, k) for edge, k in enumerate(index.tolist()) if "conv" in PRIMITIVES[k]}


def computed(network: Supernet) -> set[tuple[int, int]]:
    """The (edge, operation) pairs with a BatchNorm that has counted a call, in any cell."""
    found = set()
    for name, count in network.named_buffers():
        if ".edges." in name and name.endswith("num_batches_tracked") and count > 0:
            edge, o = name.split(".")[3:5]
            found.add((EDGE_LIST.index(tuple(map(int, edge.split("<-")))), int(o)))
    return found


def test_operations_that_are_not_active_are_not_computed():
    network, weights = Supernet(4, 10, 1), {"cell": torch.rand(6, 5)}
    active = [[3], [0, 2], [0], [1, 4], [2, 3], []]
    logits = network(torch.rand(2, 3, 8, 8), weights, {"cell": active})
    assert computed(network) == {(0, 3), (1, 2), (4, 2), (4, 3)} and logits.shape == (2, 10)


@pytest.mark.parametrize("size", [8, 15])
def test_a_network_computes_what_the_supernet_computes_with_one_operation_an_edge(size):
    torch.manual_seed(0)
    supernet, x = Supernet(4, 7, 1).double(), torch.rand(3, 3, size, size, dtype=torch.float64)
    genotype = parse(TEXT)
    chosen = [PRIMITIVES.index(op) for op in genotype.ops]
    network = Network(4, 7, 1, genotype).double()
    state = supernet.state_dict()
    for edge, (node, source) in enumerate(EDGE_LIST):
        prefix = f"edges.{node}<-{source}.{chosen[edge]}."
        state |= {name.replace(prefix, f"layers.{edge}."): state[name] for name in state if prefix in name}
    missing, _ = network.load_state_dict(state, strict=False)
    assert all(".layers." in name and ".op.2." in name for name in missing)  # affine: gains 1, shifts 0
    logits, auxiliary = network(x)
    expected = supernet(x, {"cell": torch.ones(6, 5, dtype=torch.float64)}, {"cell": [[o] for o in chosen]})
    torch.testing.assert_close(logits, expected)
    assert auxiliary is None and network.drop_path_prob == 0.0


def test_a_cell_of_nothing_gives_zeros():
    network = Network(4, 10, 1, uniform("none")).eval()
    logits = network(torch.rand(2, 3, 8, 8))[0]
    torch.testing.assert_close(logits, network(torch.zeros(2, 3, 8, 8))[0])
    assert network.cells[0](torch.rand(2, 4, 8, 8)).count_nonzero() == 0


@pytest.mark.parametrize(
    ("op", "parameters", "multiply_adds"),
    [
        ("nor_conv_3x3", 1_531_546, 220.12),
        ("skip_connect", 73_306, 7.783),
        ("nor_conv_1x1", 241_306, 31.376),
    ],
)
def test_published_sizes(op, parameters, multiply_adds):
    network = Network(16, 10, 5, uniform(op))
    assert count_parameters(network) == parameters
    assert count_multiply_adds(network, 32) / 1e6 == pytest.approx(multiply_adds, abs=6e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Derivations


def cases(name: str) -> list[dict]:
    return json.loads((GOLDEN / name).read_text())


def method(name: str, text: str = "") -> methods.Method:
    args = cli.parse(search.get_parser(), f"--method {name} {text}".split())
    return methods.METHODS[name](args, genotypes.SPACES[args.space_config])


def test_darts_architecture_here_and_genotype_in_its_own_space():
    for case in cases("nasbench201_derive.json"):
        assert str(nasbench201.derive(np.array(case["alphas"]))) == case["architecture"]
    for case in cases("darts_derive.json"):
        darts = method("darts")
        with torch.no_grad():
            for kind, alpha in darts.architecture.items():
                alpha.copy_(torch.tensor(case[f"alphas_{kind}"]))
        assert darts.genotype() == genotypes.parse(case["genotype"])


def test_ddsas_architecture_is_the_best_available_operation_other_than_none():
    saliency, available = np.zeros((6, 5)), np.ones((6, 5), dtype=bool)
    saliency[:, 0] = 9  # none does not count
    saliency[0] = [9, 1, 4, 3, 2]
    available[0, 2] = False
    available[1, 1] = False
    available[2, 1:] = False
    subspace = method("ddsas", "--space_config nasbench201").subspace
    subspace.saliency["cell"][:], subspace.available["cell"][:] = saliency, available
    ops = subspace.genotype().ops
    assert ops[:4] == ("nor_conv_3x3", "nor_conv_1x1", "none", "skip_connect")  # of equals the lower index


def test_gdas_draws_the_largest_perturbed_alpha():
    alphas = torch.zeros(14, 8, requires_grad=True)
    gumbel = -torch.empty(14, 8).exponential_().log()
    h, index = nasbench201.gdas_weights(alphas, 0.1, gumbel)
    assert index.equal(gumbel.argmax(-1)) and h.detach().allclose(F.one_hot(index, 8).float())
    assert (h.detach()[F.one_hot(index, 8) == 0] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# The table


def accuracies() -> dict[Architecture, float]:
    """Made up: every architecture an accuracy of its own, none at the worst end."""
    return {genotype: 10 + 80 * i / len(SPACE) for i, genotype in enumerate(SPACE)}


@pytest.fixture(scope="module")
def pickled() -> bytes:
    """A file as the package's, written with stand-ins for its classes."""
    module = types.ModuleType("analognasbench.data")
    stand_in = type("Architecture", (), {"__module__": module.__name__})
    module.Architecture = stand_in
    content = {}
    for genotype, accuracy in accuracies().items():
        ops = dict(zip(EDGE_LIST, genotype.ops, strict=True))
        entry = stand_in()
        entry.architecture = tuple(
            nasbench201.PACKAGE_OPS.index(ops[edge]) for edge in [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2)]
        )
        entry.baseline_accuracy = accuracy
        content[entry.architecture] = entry
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "analognasbench", types.ModuleType("analognasbench"))
        patch.setitem(sys.modules, module.__name__, module)
        return pickle.dumps(content, protocol=4)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder on the path with a package analognasbench whose code must not be run; its data.anb is for the test."""
    folder = tmp_path / "site" / "analognasbench"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('the package was imported')\n")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_the_package_s_table_is_read_without_its_code(package, pickled):
    (package / "data.anb").write_bytes(pickled)
    table, expected = load_table(), accuracies()
    assert len(table) == 15625 and table.accuracy(parse(TEXT)) == expected[parse(TEXT)]
    assert table.best == SPACE[-1] and table.rank(table.best) == (1, 15625) and table.rank(SPACE[0]) == (15625, 15625)
    assert table.better_than(SPACE[0]) == 0 and "analognasbench" not in sys.modules


class Harmful:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_hostile_file_is_refused_and_nothing_in_it_is_run(package, pickled, tmp_path):
    trace = tmp_path / "trace"
    depth = 10**6
    files = {
        "calls": pickle.dumps({(0,) * 6: Harmful(trace)}),
        "old protocol": pickle.dumps({(0,) * 6: Harmful(trace)}, protocol=0),
        "names a function": b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
        "names another class": pickled.replace(b"Architecture", b"AnalogNASBen"),
        "deep key": b"\x80\x04}" + b"(" * depth + b"t" * depth + b"K\x01s.",
        "large memo": b"\x80\x04}r\xff\xff\xff\x7f.",
        "large string": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
        "not a dict": b"\x80\x04K\x01.",
        "other keys": pickle.dumps({1: 2}),
        "too few": pickle.dumps({}),
        "empty": b"",
    }
    for name, content in files.items():
        (package / "data.anb").write_bytes(content)
        with pytest.raises(cli.UserError, match="not used as the table of accuracies") as caught:
            load_table()
        assert str(caught.value).isprintable() and not trace.exists(), name


def test_a_damaged_file_is_refused(package, pickled):
    path, generator = package / "data.anb", random.Random(0)
    for end in [1, 2, 100, len(pickled) // 2, len(pickled) - 1]:
        path.write_bytes(pickled[:end])
        with pytest.raises(cli.UserError, match="not used"):
            load_table()
    for _ in range(20):  # a digit of an accuracy cannot be told; anything else is, and always in the same way
        content = bytearray(pickled)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        try:
            assert len(load_table()) == 15625
        except cli.UserError as error:
            assert str(error).isprintable()
    path.unlink()
    with pytest.raises(cli.UserError, match="cannot be read"):
        load_table()


def test_a_file_that_is_not_the_one_pip_installed_is_refused(package, pickled):
    (package / "data.anb").write_bytes(pickled)
    info = package.parent / "analog_nasbench-0.1.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: analog-nasbench\nVersion: 0.1.3\n")
    (info / "RECORD").write_text("analognasbench/data.anb,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0\n")
    with pytest.raises(cli.UserError, match="not the file that was installed"):
        load_table()


def test_a_table_of_one_s_own(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(f"architecture,accuracy\n{TEXT},91.5\n{uniform('none')},10\n{uniform('skip_connect')},91.5\r\n\n")
    table = load_table(path)
    assert "3 of 15,625" in table.source and table.best == parse(TEXT)
    assert table.rank(uniform("skip_connect")) == (1, 3) and table.rank(uniform("none")) == (3, 3)
    assert table.accuracy(uniform("nor_conv_1x1")) is None and table.rank(uniform("nor_conv_1x1")) is None
    path.write_text(f"\ufeff{TEXT},91.5")
    assert load_table(path).accuracy(parse(TEXT)) == 91.5


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (f"architecture,accuracy\n{TEXT},91.5\n{TEXT},91.5\n", "line 3: .* a second time"),
        (f"{TEXT},nan\n", "line 1: accuracy 'nan'"),
        (f"{TEXT},100.1\n", "line 1: accuracy"),
        (f"{TEXT},ninety\n", "line 1: "),
        (f"{TEXT}\n", "line 1: 1 fields"),
        (f"{TEXT.replace('none', 'nothing')},91.5\n", "line 1: not an architecture"),
        (f'"{TEXT},91.5\n', "line 1: "),
        (f"{TEXT},91.5\n\0\n", "line 2: "),
        (b"\xff\xfe", "not a text file"),
        ("architecture,accuracy\n", "no line"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_table_of_one_s_own_is_refused_by_line(tmp_path, content, reason):
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(cli.UserError, match=reason) as caught:
        load_table(path)
    assert str(caught.value).isprintable()


def test_a_file_of_absurd_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(nasbench201, "MAX_FILE", 100)
    (tmp_path / "table.csv").write_text(f"{TEXT},91.5\n" * 2)
    with pytest.raises(cli.UserError, match="larger than"):
        load_table(tmp_path / "table.csv")
    with pytest.raises(cli.UserError, match="expected a file"):
        load_table("/dev/zero")


def test_the_published_facts_of_the_package_s_table():
    if importlib.util.find_spec("analognasbench") is None:
        pytest.skip("needs pip install --no-deps analog-nasbench")
    table = load_table()
    values = [table.accuracy(genotype) for genotype in SPACE]
    expected = {"nor_conv_3x3": 93.24, "skip_connect": 60.78, "avg_pool_3x3": 50.29, "none": 10.0}
    assert {op: round(table.accuracy(uniform(op)), 2) for op in expected} == expected
    assert (
        round(max(values), 2) == 94.07 and round(np.mean(values), 2) == 86.77 and round(np.median(values), 2) == 90.41
    )
    cut_off = [genotype for genotype in SPACE if not reaches_output(genotype)]
    assert len(cut_off) == 341 and {g for g in SPACE if table.accuracy(g) == 10} == set(cut_off)


def reaches_output(genotype: Architecture) -> bool:
    """Whether anything gets from node 0 to node 3."""
    reached = {0}
    for (node, source), op in zip(EDGE_LIST, genotype.ops, strict=True):
        if source in reached and op != "none":
            reached.add(node)
    return 3 in reached


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def command(capsys):
    """Runs `python nasbench201.py ...`: (exit code, lines on stdout, stderr)."""

    def run(*argv: str) -> tuple[int, list[str], str]:
        code = 0
        try:
            cli.run_script(nasbench201.main, nasbench201.get_parser(), list(argv))
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def test_the_command_judges_architectures_and_runs(command, tmp_path):
    table, run = tmp_path / "table.csv", tmp_path / "run"
    table.write_text(f"{TEXT},91.5\n{uniform('skip_connect')},60.5\n")
    run.mkdir()
    (run / "genotype.txt").write_text(f"{uniform('skip_connect')}\n")
    arguments = [TEXT, str(run), str(uniform("none")), "--table", str(table)]
    code, lines, _ = command(*arguments)
    assert code == 0 and lines[0] == f"{TEXT}: 91.50 % (rank 1 of 2, better than 50.00 %)"
    assert lines[1] == f"{run}: {uniform('skip_connect')}: 60.50 % (rank 2 of 2, better than 0.00 %)"
    assert "not in the table" in lines[2] and "2 of 15,625" in lines[2]
    records = [json.loads(line) for line in command(*arguments, "--json")[1]]
    assert [record["accuracy"] for record in records] == [91.5, 60.5, None] and records[1]["run"] == str(run)


def test_without_a_table_the_command_says_how_to_get_one(command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load_table() is None
    code, lines, _ = command(TEXT)
    assert code == 0 and lines == [f"{TEXT}: {nasbench201.NO_TABLE}"]
    assert "pip install --no-deps analog-nasbench" in nasbench201.NO_TABLE


def test_mistakes_are_one_line_and_exit_code_2(command, tmp_path):
    (tmp_path / "darts").mkdir()
    (tmp_path / "darts" / "genotype.txt").write_text(str(genotypes.DARTS_V2))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    for text in ["|none~0|", "nor_conv_3x3", "no\0file", "a" * 5000, *map(str, tmp_path.iterdir()), str(tmp_path)]:
        code, lines, error = command(text)
        assert code == 2 and not lines and error.count("\n") == 1, text
