"""The path of ImageNet on a small tree of real JPEGs: split, search, retrain, evaluate; alone and with torchrun."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import history, run_script
from PIL import Image

import evaluate
import genotypes
import imagenet_split
import retrain
import search
import utils
from lib import checkpoints, cli, data

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--image_size 64 --init_channels 4 --layers 3 --workers 1 --device cpu"
RUN = "--epochs 1 --report_freq 2 --quiet"
NUM_TEST = 33


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """An ImageNet of ten classes: 15 training images each and 33 validation images, 64x64 to 80x64 JPEGs."""
    root = tmp_path_factory.mktemp("imagenet")
    with np.load(ROOT / "fashion_mini.npz") as arrays:
        parts = {"train": (arrays["train_images"], arrays["train_labels"], 150)}
        parts["val"] = (arrays["test_images"], arrays["test_labels"], NUM_TEST)
    for part, (images, labels, total) in parts.items():
        seen = [0] * 10
        for index, label in enumerate(labels):
            if seen[label] < total // 10 + (label < total % 10):
                seen[label] += 1
                path = root / part / f"n{label:08d}" / f"{part}_{index}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                width = 64 + 8 * (index % 3)
                Image.fromarray(images[index]).convert("RGB").resize((width, 64), Image.BICUBIC).save(path, quality=90)
        assert sum(seen) == total
    run_script(imagenet_split, "--train 0.4 --val 0.2", "--data", root, "--out", root / "split")
    assert len(list((root / "split").glob("train/*/*"))) == 60 and len(list((root / "split").glob("val/*/*"))) == 30
    return root


def two_processes(script: str, arguments: str) -> str:
    """A shell script under torchrun, from another folder; returns what it printed."""
    environment = {"PYTHON": sys.executable, "TORCHRUN": "--standalone --nproc_per_node 2", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "shell" / script), *arguments.split()]
    result = subprocess.run(command, env=os.environ | environment, cwd="/", capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def check(folder: Path, tree: Path) -> None:
    """A search and a retraining in folder; and that two processes find the numbers of one in the test."""
    (line,) = history(folder / "search")
    primitives = genotypes.SPACES["imagenet"].primitives
    assert line["primitives"] == primitives and len(line["samplings"]) == 3  # in five steps
    for cell in ("normal", "reduce"):  # the first four primitives are available, and 28 of 56 active
        assert line["available"][cell] == [0b1111] * 14 and line["active_ops"][cell] == 28
    assert {op for op, _ in genotypes.load(str(folder / "search")).normal} <= set(primitives[:4])
    (line,) = history(folder / "retrain")
    assert line["drop_path"] == 0 and 0 <= line["test_acc"] <= line["test_acc_top5"] <= 100
    best, last = (checkpoints.load_checkpoint(folder / "retrain" / name) for name in ("best.pt", "checkpoint.pt"))
    assert best["epoch"] == last["epoch"] == 1 and best["best"]["top1"] == line["test_acc"]
    assert "auxiliary_head.classifier.weight" in last["state_dict"]
    assert "auxiliary_head.features.6.weight" not in last["state_dict"]  # as in DDSAS
    test = f"{SMALL} --data {tree} --model_path {folder / 'retrain'} --arch {folder / 'search'} --batch_size 5"
    two = json.loads(two_processes("eval_imagenet.sh", f"{test} --json"))
    one = run_script(evaluate, f"{test} --dataset imagenet")
    assert two["images"] == one["images"] == NUM_TEST  # an odd number: 17 and 16, none twice
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert (two["top1"], two["top5"]) == pytest.approx((one["top1"], one["top5"]))
    assert line["test_acc"] == pytest.approx(one["top1"]) and line["test_loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert one["genotype"] == (folder / "search/genotype.txt").read_text().strip()


def test_from_the_split_to_the_test(tree, tmp_path):
    files = f"--dataset imagenet --data {tree / 'split'} --save {tmp_path / 'search'}"
    run_script(search, f"{SMALL} {RUN} {files} --space_config imagenet --batch_size 12 --dss_freq 2")
    files = f"--dataset imagenet --data {tree} --save {tmp_path / 'retrain'} --arch {tmp_path / 'search'}"
    recipe = "--auxiliary --label_smooth 0.1 --lr_scheduler linear --drop_path_prob 0 --batch_size 16"
    run_script(retrain, f"{SMALL} {RUN} {files} {recipe}")
    check(tmp_path, tree)


@pytest.mark.long
def test_from_the_split_to_the_test_on_two_processes(tree, tmp_path):
    searched = f"{SMALL} {RUN} --data {tree / 'split'} --save {tmp_path / 'search'} --batch_size 6 --dss_freq 2"
    two_processes("search_imagenet.sh", searched)
    files = f"--data {tree} --save {tmp_path / 'retrain'} --arch {tmp_path / 'search'}"
    two_processes("retrain_imagenet.sh", f"{SMALL} {RUN} {files} --batch_size 8")
    check(tmp_path, tree)


def parse_script(*more: str) -> argparse.Namespace:
    """The arguments of retrain_imagenet.sh, and more."""
    text = (ROOT / "shell" / "retrain_imagenet.sh").read_text().replace("\\\n", " ")
    words = text[text.index("--dataset") : text.index('"$@"')].split()
    return cli.parse(retrain.get_parser(), [*words, *more])


def test_the_settings_of_the_script_are_the_published_ones():
    args = parse_script()
    assert (args.epochs, args.batch_size, args.learning_rate, args.lr_scheduler) == (250, 1024, 0.5, "linear")
    assert (args.momentum, args.weight_decay, args.grad_clip) == (0.9, 3e-5, 5)
    assert (args.label_smooth, args.auxiliary, args.auxiliary_weight, args.drop_path_prob) == (0.1, True, 0.4, 0)
    schedule = retrain.SCHEDULES[args.lr_scheduler]
    rates = [utils.warmed_up(schedule(e, args.epochs, 0.5, args.learning_rate_min), e, args) for e in range(250)]
    linear = [0.5 * (245 - e) / 245 for e in range(245)] + [0.5 * left / (245 * 5) for left in (5, 4, 3, 2, 1)]
    assert rates == pytest.approx([rate * min(1, (e + 1) / 5) for e, rate in enumerate(linear)])
    small = parse_script("--mobile", "--dataset", "folder")
    with pytest.raises(cli.UserError, match="--mobile is for large images"):
        retrain.build_network(small, genotypes.DDSAS_imagenet, data.Info(7, (0.5,) * 3, (0.2,) * 3, image_size=64))


def test_training_images_are_jittered_and_test_images_are_not(tree):
    train, _, info = data.train_data("imagenet", tree, batch_size=8, workers=0, image_size=64)
    jitter = train.images.augmented.transforms[-1]
    assert [jitter.brightness, jitter.contrast, jitter.saturation] == [(0.6, 1.4)] * 3
    assert jitter.hue == (-0.2, 0.2)
    halves = data.search_data("imagenet", tree / "split", batch_size=8, workers=0, image_size=64, train_portion=0.9)[:2]
    assert [half.num_images for half in halves] == [60, 30]  # as imagenet_split made them
    for searched in halves:
        assert not any(isinstance(t, type(jitter)) for t in searched.images.augmented.transforms)
    assert info.num_classes == 10
