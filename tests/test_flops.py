"""experiments/flops.py on folders as shell/study.sh leaves them, and the reference of docs/own-images.md."""

import json
from pathlib import Path

import pytest

import genotypes
import model
from experiments import flops, resnet18
from lib import cli

CHEAP = genotypes.load("PDARTS")
DEAR = genotypes.load("DDSAS_cifar10")


def finished(folder: Path, name: str, genotype, weight: float, accuracy: float | None = None) -> None:
    """A cell of the study: what its search found, and unless ``accuracy`` is None its retraining."""
    for part, more in (("search", {"flops_weight": weight}), ("retrain", {"init_channels": 4, "layers": 3})):
        if part == "search" or accuracy is not None:
            (place := folder / name / part).mkdir(parents=True)
            (place / "args.json").write_text(json.dumps({"args": {"image_size": 16} | more}))
            (place / "history.jsonl").write_text(json.dumps({"epoch": 0, "test_acc": accuracy}) + "\n")
            (place / "genotype.txt").write_text(str(genotype))
            (place / "finished").touch()


def test_weights_in_order_with_the_cost_of_their_networks(tmp_path, capsys):
    for seed in range(2):
        finished(tmp_path / "1", f"ddsas-{seed}", CHEAP, 1.0, 70 + seed)
        finished(tmp_path / "0", f"ddsas-{seed}", DEAR, 0.0, 80 + seed)
        finished(tmp_path / "random", f"random-{seed}", DEAR, 0.0, 60.0)
    finished(tmp_path / "1", "ddsas-2", CHEAP, 1.0)  # not retrained
    (tmp_path / "0/ddsas-2/search").mkdir(parents=True)  # not finished
    with pytest.raises(cli.UserError, match="nothing kept"):
        flops.main(flops.get_parser().parse_args(["--out", str(tmp_path)]))
    flops.main(flops.get_parser().parse_args([str(tmp_path)]))
    cells = flops.common.read_lines(tmp_path / "data/flops.jsonl", flops.Found)
    assert [(one.weight, one.seed) for one in cells] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (None, 0), (None, 1)]
    network = model.NetworkCIFAR(4, 10, 3, False, CHEAP)
    assert (
        cells[2].multiply_adds == cells[4].multiply_adds == pytest.approx(model.count_multiply_adds(network, 16) / 1e6)
    )
    printed = capsys.readouterr().out
    assert "| random cells" in printed and "70.50 ± 0.71" in printed
    assert "over 5 searches: -1.00" in printed and (tmp_path / "flops.png").exists()


def test_the_reference_learns(pictures, capsys):
    words = f"--dataset folder --data {pictures} --image_size 16 --batch_size 12 --epochs 2 --quiet --device cpu"
    resnet18.main(cli.parse(resnet18.get_parser(), words.split()))
    size, *epochs = capsys.readouterr().out.splitlines()
    losses = [float(line.split("train loss ")[1].split(",")[0]) for line in epochs]
    assert size == "11.178 M parameters" and len(losses) == 2 and losses[-1] < losses[0]
