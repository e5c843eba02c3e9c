"""evaluate.py: files like the released checkpoints load strictly, and what does not fit is named."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
import torch
from golden_arrays import GOLDEN
from PIL import Image

import evaluate
import genotypes
import model
from lib import cli, data

LISTINGS = {  # the key listing of each released checkpoint: genotype, channels, cells, classes
    "ddsas_cifar10": ("DDSAS_cifar10", 36, 20, 10),
    "ddsas_cifar100": ("DDSAS_cifar100", 36, 20, 100),
    "ddsas_imagenet": ("DDSAS_imagenet", 46, 14, 1000),
    "pdarts_cifar": ("PDARTS", 36, 20, 10),
    "pdarts_imagenet": ("PDARTS", 48, 14, 1000),
}


def random_weights(listing: str, classes: int | None = None) -> dict[str, torch.Tensor]:
    """Random tensors with the keys and shapes of a listing, scaled as initial weights are; other ``classes`` if given.

    Running variances are positive, as they are in a file that was trained.
    """
    shapes = json.loads((GOLDEN / f"checkpoint_keys_{listing}.json").read_text())
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
            continue
        if classes and "classifier" in name:
            shape = [classes, *shape[1:]]
        values = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        weights[name] = values.abs() + 0.5 if name.endswith("running_var") else values
    return weights


def plain(weights):
    return weights


def parallel(weights):
    """As DDSAS and P-DARTS save ImageNet networks."""
    prefixed = {f"module.{name}": tensor for name, tensor in weights.items()}
    momentum = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.5, "params": [0]}]}
    return {"epoch": 250, "state_dict": prefixed, "best_acc_top1": 76.1, "optimizer": momentum}


def arguments(*more):
    return cli.parse(evaluate.get_parser(), [str(text) for text in more])


@pytest.fixture
def run(capsys):
    """Runs the command line inside this process: exit code, standard output, lines of standard error."""

    def run(*more) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        code = 0
        try:
            cli.run_script(evaluate.main, evaluate.get_parser(), [str(text) for text in more])
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


@pytest.fixture
def few_images(monkeypatch):
    """Datasets cifar10 and cifar100 with six random test images."""

    def read(classes):
        rng = np.random.default_rng(classes)
        return rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), rng.integers(0, classes, 6)

    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        info = data.Info(classes, (0.5,) * 3, (0.2,) * 3, read=lambda root, train, n=classes: read(n))
        monkeypatch.setitem(data.INFO, name, info)


def image_tree(root, classes: int, size: int, images: int = 1):
    """train/ and val/ with images of noise."""
    for part in ("train", "val"):
        for number in range(classes * images):
            path = root / part / f"class{number % classes:03d}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((size, size), 60).convert("RGB").save(path)
    return root


# ---- files like the released ones ----------------------------------------------------------------------------------


@pytest.mark.parametrize("listing", LISTINGS)
def test_every_released_checkpoint_loads_strictly(listing, tmp_path):
    """In the form that it does not have; the tests below take the other one."""
    form = plain if "imagenet" in listing else parallel
    arch, C, layers, classes = LISTINGS[listing]
    weights = random_weights(listing)
    torch.save(form(weights), tmp_path / "file.pt")
    given = arguments("--model_path", tmp_path / "file.pt", "--arch", arch, "--init_channels", C, "--layers", layers)
    _, network = evaluate.load_network(given)
    assert network.classifier.out_features == classes
    assert not hasattr(network, "auxiliary_head")
    loaded = network.state_dict()
    assert loaded.keys() == {name for name in weights if not name.startswith("auxiliary_head.")}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("listing", [name for name in LISTINGS if "imagenet" not in name])
def test_released_cifar_checkpoints_evaluate_end_to_end(listing, tmp_path, run, few_images):
    arch, C, layers, classes = LISTINGS[listing]
    weights = random_weights(listing)
    torch.save(weights, tmp_path / "file.pt")
    code, out, errors = run(
        *("--model_path", tmp_path / "file.pt", "--arch", arch, "--dataset", f"cifar{classes}", "--json")
    )
    assert (code, errors) == (0, [])
    result = json.loads(out)

    network = model.NetworkCIFAR(C, classes, layers, True, genotypes.load(arch))
    network.load_state_dict(weights, strict=True)
    test, _ = data.test_data(f"cifar{classes}", ".", batch_size=6)
    (x, y), *_ = test.in_order()
    with torch.no_grad():
        logits = network.eval()(x)[0]
    assert result["images"] == 6
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-3)
    ranks = (logits > logits.gather(1, y[:, None])).sum(1)
    assert result["top1"] == pytest.approx(100 * (ranks < 1).float().mean().item())
    assert result["top5"] == pytest.approx(100 * (ranks < 5).float().mean().item())
    assert result["parameters_m"] == pytest.approx({"PDARTS": 3.434, "DDSAS_cifar10": 3.6}.get(arch, 4.215), abs=5e-4)
    assert result["multiply_adds_m"] > 500 and result["images_per_second"] > 0


@pytest.mark.parametrize("listing", [name for name in LISTINGS if "imagenet" in name])
def test_released_imagenet_checkpoints_evaluate_end_to_end(listing, tmp_path, run):
    """With seven of the thousand classes."""
    arch, C, layers, _ = LISTINGS[listing]
    torch.save(parallel(random_weights(listing, classes=7)), tmp_path / "file.pt")
    tree = image_tree(tmp_path / "images", classes=7, size=40)
    code, out, errors = run(
        *("--model_path", tmp_path / "file.pt", "--arch", arch, "--data", tree, "--workers", 0, "--batch_size", 4),
        *("--init_channels", C, "--layers", layers),
    )
    assert (code, errors) == (0, [])
    assert "7 test images of imagenet" in out and "top-5" in out and "multiply-adds" in out


def test_files_without_counters_and_in_half_precision_are_as_good(tmp_path):
    weights = random_weights("ddsas_cifar10")
    old = {name: t.half() for name, t in weights.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    _, network = evaluate.load_network(arguments("--model_path", tmp_path / "old.pt", "--arch", "DDSAS_cifar10"))
    assert all(p.dtype == torch.float32 for p in network.parameters())
    torch.testing.assert_close(network.classifier.weight.data, weights["classifier.weight"], atol=1e-3, rtol=1e-3)


def test_own_run_folder_needs_no_other_argument(tmp_path, run):
    tree = image_tree(tmp_path / "images", classes=3, size=8, images=4)
    genotype = genotypes.load("DARTS_V2")
    network = model.NetworkCIFAR(2, 3, 3, True, genotype)
    best = {"state_dict": network.state_dict(), "genotype": str(genotype), "dataset": "folder", "image_size": 8}
    (tmp_path / "run").mkdir()
    torch.save(best, tmp_path / "run" / "best.pt")
    code, out, errors = run("--model_path", tmp_path / "run", "--data", tree)
    assert (code, errors) == (0, []) and "12 test images of folder" in out
    assert "top-5" not in out  # of three classes


def test_five_classes_have_no_top5(tmp_path, run):
    tree = image_tree(tmp_path / "images", classes=3, size=8)
    network = model.NetworkCIFAR(2, 3, 3, False, genotypes.load("DARTS_V2"))
    torch.save(network.state_dict(), tmp_path / "file.pt")
    given = ("--model_path", tmp_path / "file.pt", "--arch", "DARTS_V2", "--dataset", "folder", "--data", tree)
    code, out, _ = run(*given, "--image_size", 8, "--json")
    assert code == 0 and json.loads(out)["top5"] is None


# ---- what does not fit ---------------------------------------------------------------------------------------------


def small_file(folder, change=lambda weights: weights):
    """A file of a 2-channel, 3-cell, 10-class DARTS_V2 network with auxiliary head, after ``change``."""
    weights = model.NetworkCIFAR(2, 10, 3, True, genotypes.load("DARTS_V2")).state_dict()
    torch.save(change(dict(weights)) or weights, folder / "file.pt")
    return folder / "file.pt"


def without(*names):
    return lambda weights: {name: t for name, t in weights.items() if name not in names}


def renamed(old, new):
    return lambda weights: {new if name == old else name: tensor for name, tensor in weights.items()}


def reshaped(name, *shape):
    return lambda weights: weights | {name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("cells.1.preprocess0.op.1.weight"), "1 tensor missing (cells.1.preprocess0.op.1.weight)"),
        (without("stem.0.weight"), "1 tensor missing (stem.0.weight)"),
        (without("classifier.bias"), "1 tensor missing (classifier.bias)"),
        (without("stem.1.num_batches_tracked"), "1 tensor missing (stem.1.num_batches_tracked)"),
        (without("auxiliary_head.features.3.bias"), "1 tensor missing (auxiliary_head.features.3.bias)"),
        (renamed("stem.1.bias", "stem.1.shift"), "1 tensor missing (stem.1.bias) and 1 tensor unknown (stem.1.shift)"),
        (renamed("classifier.weight", "cells.7.weight"), "unknown (cells.7.weight)"),
        (renamed("stem.1.bias", "module.stem.1.bias"), "unknown (module.stem.1.bias)"),
        (reshaped("stem.0.weight", 7, 3, 3, 3), "stem.0.weight has shape [7, 3, 3, 3], expected [6, 3, 3, 3]"),
        (reshaped("classifier.weight", 11, 32), "classifier.weight has shape [11, 32], expected [10, 32]"),
        (reshaped("auxiliary_head.classifier.bias", 9), "auxiliary_head.classifier.bias has shape [9], expected [10]"),
        (reshaped("stem.1.bias"), "stem.1.bias has shape [], expected [6]"),
        (lambda weights: weights | {"stem.1.bias": torch.zeros(6, dtype=torch.int64)},
         "stem.1.bias is torch.int64, expected torch.float32"),
        (lambda weights: {"state_dict": list(weights.values())}, "no state dict in it"),
        (lambda weights: {"state_dict": {}}, "no state dict in it"),
        (lambda weights: {"weight": torch.zeros(3)}, "not a network of this family"),
        (lambda weights: {"epoch": 3, "space": {}, "architecture": {}, "state_dict": weights}, "is of a search"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_gets_a_line_of_its_own(change, message, tmp_path, run, few_images):
    file = small_file(tmp_path, change)
    code, out, errors = run("--model_path", file, "--arch", "DARTS_V2", "--dataset", "cifar10")
    assert code == 2 and out == "" and len(errors) == 1
    assert str(file) in errors[0] and message in errors[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--arch DARTS_V1", "does not fit the network of DARTS_V1, check --arch"),
        ("--arch DARTS_V2 --init_channels 16", "checkpoint has 2 channels, you asked for 16"),
        ("--arch DARTS_V2 --layers 20", "checkpoint has 3 cells, you asked for 20"),
        ("--arch DARTS_V2 --dataset cifar100", "checkpoint has 10 classes, cifar100 has 100"),
        ("--arch DARTS_V2 --dataset imagenet", "checkpoint has the network for small images"),
        ("--arch DARTS_V3", "no genotype DARTS_V3: expected one of DDSAS_cifar10"),
        ("", "give it with --arch"),
        ("--arch DARTS_V2 --amp", "--amp needs a CUDA device"),
    ],
)
def test_what_was_asked_for_and_is_not_there_is_named(given, message, tmp_path, run):
    code, out, errors = run("--model_path", small_file(tmp_path), "--device", "cpu", *given.split())
    assert code == 2 and out == "" and len(errors) == 1 and message in errors[0]


def test_a_folder_with_other_classes_is_named(tmp_path, run):
    tree = image_tree(tmp_path / "images", classes=3, size=32)
    file = small_file(tmp_path)
    code, _, errors = run("--model_path", file, "--arch", "DARTS_V2", "--dataset", "folder", "--data", tree)
    assert code == 2 and len(errors) == 1 and "checkpoint has 10 classes, folder has 3" in errors[0]


class Code:
    """Would print a line when unpickled."""

    def __reduce__(self):
        return print, ("executed",)


def test_truncated_and_hostile_files_get_one_line(tmp_path, run, few_images):
    file = small_file(tmp_path)
    good, given = file.read_bytes(), ("--model_path", file, "--arch", "DARTS_V2", "--dataset", "cifar10")
    for bad in (good[: len(good) // 2], b"", good[:100], good[:5000] + struct.pack("<d", 3.0) + good[5008:]):
        file.write_bytes(bad)
        code, out, errors = run(*given)
        assert code == 2 and out == "" and len(errors) == 1 and str(file) in errors[0]
    torch.save({"state_dict": {"stem.0.weight": torch.zeros(3)}, "note": Code()}, file)
    code, out, errors = run(*given)
    assert code == 2 and out == "" and len(errors) == 1 and "carries code" in errors[0]
    code, _, errors = run("--model_path", tmp_path / "absent.pt", "--arch", "DARTS_V2")
    assert code == 2 and len(errors) == 1 and "No such file" in errors[0]
    code, _, errors = run("--model_path", tmp_path)
    assert code == 2 and len(errors) == 1 and "holds no checkpoint" in errors[0]
    code, _, errors = run()
    assert code == 2 and len(errors) == 1 and "--model_path is missing" in errors[0]


# ---- counting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "parameters", "multiply_adds"),
    [
        ("--arch DDSAS_cifar10", 3.600, 568.3),
        ("--arch DDSAS_cifar100 --dataset cifar100", 4.215, 633.5),
        ("--arch DDSAS_imagenet --dataset imagenet --init_channels 46", 5.334, 581.5),
        ("--arch PDARTS", 3.434, 532.2),
        ("--arch PDARTS --dataset imagenet --init_channels 48", 4.944, 542.8),
    ],
)
def test_count_gives_the_papers_numbers(given, parameters, multiply_adds, run):
    code, out, _ = run("--count", *given.split())
    assert code == 0
    *_, found_parameters, found_multiply_adds = out.splitlines()[-1].strip("| ").split(" | ")
    assert (found_parameters, found_multiply_adds) == (f"{parameters:.3f} M", f"{multiply_adds:.1f} M")
