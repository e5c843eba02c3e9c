"""P-DARTS: pruning between the stages, derivation, restriction of skip connections, the supernet, whole searches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import history
from golden_arrays import GOLDEN, assert_close, load_weights
from golden_arrays import golden as read_golden

import genotypes
import retrain
import train_cifar
import train_imagenet
import train_search
from genotypes import CELL_TYPES, PRIMITIVES
from lib import cli
from model_search import Network

STAGES = json.loads((GOLDEN / "pdarts_stages.json").read_text())
FULL = {cell: [PRIMITIVES] * genotypes.EDGES for cell in CELL_TYPES}


def assert_same_cells(genotype: genotypes.Genotype, golden: dict) -> None:
    """The same two (op, input) pairs in each node, the lower input first."""
    for cell in CELL_TYPES:
        pairs = sorted(enumerate(map(tuple, golden[cell])), key=lambda pair: (pair[0] // 2, pair[1][1]))
        assert list(getattr(genotype, cell)) == [pair for _, pair in pairs]


@pytest.mark.parametrize("case", STAGES["cases"])
def test_golden_stages(case):
    alphas = [{cell: np.array(stage[f"alphas_{cell}"]) for cell in CELL_TYPES} for stage in case["stages"]]
    candidates = FULL
    for stage, number in ((0, 3), (1, 2)):
        candidates = train_search.drop_candidates(candidates, alphas[stage], number)
        assert candidates == {cell: case["stages"][stage][f"kept_{cell}"] for cell in CELL_TYPES}
    genotype = train_search.derive(candidates, alphas[2])
    assert_same_cells(genotype, case["genotype"])
    assert genotypes.load(str(genotype)) == genotype  # valid
    restricted = train_search.restrict_skips(candidates, alphas[2])
    assert {str(most) for most in restricted} == set(case["restricted"])
    for most, genotype in restricted.items():
        assert_same_cells(genotype, case["restricted"][str(most)])
        assert genotypes.count_skips(genotype) <= most


def test_drops_must_leave_an_operation():
    alphas = {cell: np.zeros((14, 8)) for cell in CELL_TYPES}
    with pytest.raises(ValueError, match="cannot drop 8 of the 8"):
        train_search.drop_candidates(FULL, alphas, 8)
    only_none = {cell: [["none"]] * 14 for cell in CELL_TYPES}
    with pytest.raises(ValueError, match="besides none"):
        train_search.derive(only_none, {cell: np.zeros((14, 1)) for cell in CELL_TYPES})
    skips = {cell: [["none", "skip_connect"]] * 14 for cell in CELL_TYPES}  # no other candidate is left
    assert train_search.restrict_skips(skips, {cell: np.zeros((14, 2)) for cell in CELL_TYPES}) == {}


@pytest.mark.parametrize("name", ["full", "kept5"])
def test_golden_supernet(name):
    golden = read_golden(f"pdarts_supernet_{name}.npz")
    candidates = {
        cell: [[op for op, on in zip(PRIMITIVES, row, strict=True) if on] for row in golden[f"switches_{cell}"]]
        for cell in CELL_TYPES
    }
    network = Network(4, 10, 5, candidates)
    load_weights(network, golden)
    alphas = {cell: torch.tensor(golden[f"w/alphas_{cell}"], requires_grad=True) for cell in CELL_TYPES}
    logits = network(torch.from_numpy(golden["x"]), {cell: a.softmax(dim=-1) for cell, a in alphas.items()}, None)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(golden["y"]))
    loss.backward()
    assert_close(logits, golden["logits"])
    assert_close(loss, golden["loss"])
    for cell, alpha in alphas.items():
        assert_close(alpha.grad, golden[f"grad/alphas_{cell}"])


def small_search(pictures: Path, prefix: str, *more: str) -> list[str]:
    stages = "--layers 1 --add_layers 0 --add_layers 1 --dropout_rate 0.1 --dropout_rate 0.4 --dropout_rate 0.7"
    small = "--epochs 2 --eps_no_arch 1 --init_channels 2 --batch_size 18 --device cpu --quiet"
    data = f"--dataset folder --image_size 8 --tmp_data_dir {pictures} --save {prefix} --note small"
    return [*f"{stages} {small} {data}".split(), *more]


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory) -> Path:
    """The run folder of a search from beginning to end."""
    words = small_search(pictures, f"{tmp_path_factory.mktemp('runs')}/")
    return train_search.main(cli.parse(train_search.get_parser(), words))


def test_three_stages(whole):
    lines = history(whole)
    assert whole.name.startswith("search-small-")
    assert [line["stage"] for line in lines] == [0, 0, 1, 1, 2, 2]
    assert [{len(edge) for edge in line["candidates"]["normal"]} for line in lines] == [{8}, {8}, {5}, {5}, {3}, {3}]
    for before, after in zip(lines, lines[1:], strict=False):
        for old, new in zip(before["candidates"]["reduce"], after["candidates"]["reduce"], strict=True):
            assert set(new) <= set(old)
    assert [line["dropout"] for line in lines] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.35, 0.7])
    assert [line["lr"] for line in lines] == pytest.approx([0.025, 0.0125] * 3)
    assert all(f"{depth} cells, {ops} operations" in (whole / "log.txt").read_text() for depth, ops in ((1, 8), (2, 3)))
    # after the weight-only epoch alpha is still the draw 1e-3 * N(0, 1), and differs from it one epoch later
    assert [line["arch_loss"] is None for line in lines] == [True, False] * 3
    for line, num_ops in zip(lines, (8, 8, 5, 5, 3, 3), strict=True):
        spread = np.abs(np.array(line["probabilities"]["normal"]) - 1 / num_ops).max()
        assert spread < 1e-3 if line["arch_loss"] is None else spread > 1e-4


def test_recorded_genotype_and_those_beside_it(whole):
    recorded = genotypes.load(str(whole))
    assert genotypes.count_skips(recorded) <= 2
    first, *others = (whole / "genotypes.txt").read_text().splitlines()
    last = history(whole)[-1]
    assert first == f"unrestricted {last['genotype']}"
    alphas = {cell: np.log(last["probabilities"][cell]) for cell in CELL_TYPES}  # softmax takes any such
    restricted = train_search.restrict_skips(last["candidates"], alphas)
    assert others == [f"M={most} {genotype}" for most, genotype in restricted.items()]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--add_layers", "3"], "--add_layers 0 1 3: expected 2 values"),
        (["--dropout_rate", "0.5"], "expected 3 values"),
        (["--epochs", "1"], "--eps_no_arch 1"),
        (["--num_to_keep", "5", "3", "0"], "out of range"),
        (["--num_to_keep", "8", "3", "1"], "must become fewer"),
        (["--num_to_keep", "5", "3", "2"], "down to 1"),
    ],
)
def test_bad_arguments_get_one_line_and_no_folder(pictures, tmp_path, refused, more, message):
    assert message in refused(train_search, *small_search(pictures, f"{tmp_path}/", *more))
    assert not list(tmp_path.iterdir())


def test_skip_dropout_schedule():
    """The published schedule at 25 epochs, 10 of them for weights alone: linear, then reset, then exponential."""
    rates = [train_search.skip_dropout(epoch, 25, 10, 0.4) for epoch in range(25)]
    assert rates[0] == pytest.approx(0.4 * 24 / 25) and rates[9] == pytest.approx(0.4 * 15 / 25)
    assert rates[10] == pytest.approx(0.4) and rates[24] == pytest.approx(0.4 * np.exp(-2.8))


def test_published_commands_and_defaults(monkeypatch, tmp_path):
    """The flags of P-DARTS' README are understood, with its defaults."""
    text = "--tmp_data_dir DIR --save LOG --add_layers 6 --add_layers 12 --dropout_rate 0.1 --dropout_rate 0.4"
    args = cli.parse(train_search.get_parser(), f"{text} --dropout_rate 0.7 --note NOTE --cifar100".split())
    assert (args.data, args.dataset, args.add_layers) == ("DIR", "cifar100", [6, 12])
    train_search.check(args)
    expected = dict(workers=2, batch_size=96, learning_rate=0.025, learning_rate_min=0, momentum=0.9, weight_decay=3e-4)
    expected |= dict(report_freq=50, epochs=25, init_channels=16, layers=5, drop_path_prob=0.3, seed=2, grad_clip=5)
    expected |= dict(train_portion=0.5, arch_learning_rate=6e-4, arch_weight_decay=1e-3)
    assert expected.items() <= vars(args).items()
    cli.prefix_save(args, "search")
    assert args.save.startswith("./LOGsearch-NOTE-")

    cifar = dict(dataset="cifar10", batch_size=128, drop_path_prob=0.3, epochs=600, init_channels=36, layers=20)
    imagenet = dict(dataset="imagenet", batch_size=256, learning_rate=0.1, weight_decay=3e-5, epochs=250, layers=14)
    imagenet |= dict(init_channels=48, label_smooth=0.1, drop_path_prob=0, lr_scheduler="linear")
    imagenet |= dict(auxiliary_second_bn=None)
    for script, expected in ((train_cifar, cifar), (train_imagenet, imagenet)):
        args = cli.parse(script.get_parser(), "--tmp_data_dir DIR --auxiliary --save LOG --note NOTE".split())
        expected |= dict(data="DIR", arch="PDARTS", seed=0, auxiliary=True)
        assert expected.items() <= vars(args).items()


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        (train_imagenet, "", True),
        (train_imagenet, "--arch DARTS_V2", True),
        (train_imagenet, "--arch DDSAS_imagenet", False),
        (train_imagenet, "--arch DDSAS_imagenet --auxiliary_second_bn", True),
        (train_imagenet, "--no-auxiliary_second_bn", False),
        (retrain, "--dataset imagenet --arch PDARTS", True),
        (retrain, "--dataset imagenet --arch DARTS_V2", False),
    ],
)
def test_the_auxiliary_head_is_that_of_the_genotypes_authors(script, flags, expected):
    args = cli.parse(script.get_parser(), flags.split())
    assert retrain.has_second_bn(args, genotypes.load(args.arch)) == expected
