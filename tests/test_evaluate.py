"""evaluate.py: files like the released checkpoints load strictly, and what does not fit is named."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_arrays import GOLDEN
from PIL import Image

import evaluate
import genotypes
import model
import model_search
import space
from lib import cli, data, predictions

LISTINGS = {  # the key listing of each released checkpoint: genotype, channels, cells, classes
    "ddsas_cifar10": ("DDSAS_cifar10", 36, 20, 10),
    "ddsas_cifar100": ("DDSAS_cifar100", 36, 20, 100),
    "ddsas_imagenet": ("DDSAS_imagenet", 46, 14, 1000),
    "pdarts_cifar": ("PDARTS", 36, 20, 10),
    "pdarts_imagenet": ("PDARTS", 48, 14, 1000),
}


def random_weights(listing: str) -> dict[str, torch.Tensor]:
    """Random tensors with the keys and shapes of a listing."""
    shapes = json.loads((GOLDEN / f"checkpoint_keys_{listing}.json").read_text())
    counters = {name: torch.tensor(7) for name in shapes if name.endswith("num_batches_tracked")}
    return {name: torch.rand(shape) for name, shape in shapes.items()} | counters


def parallel(weights):
    """As DDSAS and P-DARTS save ImageNet networks."""
    prefixed = {f"module.{name}": tensor for name, tensor in weights.items()}
    momentum = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.5, "params": [0]}]}
    return {"epoch": 250, "state_dict": prefixed, "best_acc_top1": 76.1, "optimizer": momentum}


def arguments(*more):
    return cli.parse(evaluate.get_parser(), [str(text) for text in more])


@pytest.fixture
def run(command):
    return partial(command, evaluate)


@pytest.fixture
def fail(refused):
    return partial(refused, evaluate)


@pytest.fixture
def few_images(monkeypatch):
    """cifar10 is six random test images."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 6)
    monkeypatch.setitem(data.INFO, "cifar10", data.Info(10, (0.5,) * 3, (0.2,) * 3, read=lambda root, train: images))


# ---- files like the released ones ----------------------------------------------------------------------------------
@pytest.mark.parametrize("listing", LISTINGS)
def test_every_released_checkpoint_loads_strictly(listing, tmp_path):
    arch, C, layers, classes = LISTINGS[listing]
    weights = random_weights(listing)
    torch.save(parallel(weights) if "imagenet" in listing else weights, tmp_path / "file.pt")
    given = arguments("--model_path", tmp_path / "file.pt", "--arch", arch, "--init_channels", C, "--layers", layers)
    _, network = evaluate.load_network(given)
    assert network.classifier.out_features == classes
    assert not hasattr(network, "auxiliary_head")
    loaded = network.state_dict()
    assert loaded.keys() == {name for name in weights if not name.startswith("auxiliary_head.")}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())


def test_results_are_those_of_the_network(tmp_path, tested, few_images):
    result = tested("--model_path", small_file(tmp_path), "--arch", "DARTS_V2", "--dataset", "cifar10")
    network = model.NetworkCIFAR(2, 10, 3, True, genotypes.load("DARTS_V2"))
    network.load_state_dict(torch.load(tmp_path / "file.pt"), strict=True)
    (x, y), *_ = data.test_data("cifar10", ".", batch_size=6)[0].in_order()
    with torch.no_grad():
        logits = network.eval()(x)[0]
    assert result["images"] == 6 and result["images_per_second"] > 0
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-3)
    ranks = (logits > logits.gather(1, y[:, None])).sum(1)
    assert result["top1"] == pytest.approx(100 * (ranks < 1).float().mean().item())
    assert result["top5"] == pytest.approx(100 * (ranks < 5).float().mean().item())
    assert result["parameters_m"] == model.count_parameters(network) / 1e6


def test_files_without_counters_and_in_half_precision_are_as_good(tmp_path):
    file = small_file(tmp_path, lambda w: {name: w[name].half() for name in w if "num_batches" not in name})
    weights = torch.load(file)
    torch.save(weights, file, _use_new_zipfile_serialization=False)
    _, network = evaluate.load_network(arguments("--model_path", file, "--arch", "DARTS_V2"))
    assert all(p.dtype == torch.float32 and torch.equal(p.half(), weights[n]) for n, p in network.named_parameters())


# ---- runs of one's own images --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """trained(**changes) -> a run folder with a checkpoint of a small network that has seen the pictures."""
    train, _, info = data.train_data("folder", pictures, batch_size=24, image_size=16)
    torch.manual_seed(0)
    network = model.NetworkCIFAR(4, 3, 3, False, genotypes.DARTS_V2)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for epoch in range(4):
        for x, y in train.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(network(x)[0], y).backward()
            optimizer.step()
    state = {"state_dict": network.state_dict(), "genotype": str(genotypes.DARTS_V2), "dataset": "folder"}
    state |= {"image_size": 16, "mean": list(info.mean), "std": list(info.std)}
    state |= {"class_names": ["pullover", "shirt", "trouser"]}

    def make(name="checkpoint.pt", **changes):
        folder = tmp_path_factory.mktemp("run")
        torch.save({key: value for key, value in (state | changes).items() if value is not None}, folder / name)
        return folder

    return make


@pytest.fixture
def tested(run):
    """The results of a test, which has to succeed without a warning."""

    def tested(*more) -> dict:
        code, out, errors = run(*more, "--json")
        assert (code, errors) == (0, [])
        return json.loads(out)

    return tested


def test_a_run_folder_means_its_last_checkpoint(trained, pictures, run, monkeypatch):
    monkeypatch.setattr(predictions, "write_evaluation", lambda *_: None)  # pictures take their time
    folder = trained()
    best = trained("best.pt", mean=[0.1] * 3)
    shutil.copy(best / "best.pt", folder)
    data_flag = ("--data", pictures)
    (_, last, _), (_, chosen, _), (_, alone, _) = (
        run("--model_path", folder, *data_flag), run(folder, "--best", *data_flag), run(best, *data_flag)
    )  # fmt: skip
    assert "24 test images of folder" in last and evaluate.CHOSEN not in last and "top-5" not in last
    assert evaluate.CHOSEN in chosen and evaluate.CHOSEN in alone
    assert last.split("loss")[1].split()[0] != chosen.split("loss")[1].split()[0]
    (folder / "checkpoint.pt").rename(folder / "checkpoint.prev.pt")
    (folder / "checkpoint.pt").write_bytes(b"cut off")
    code, out, (error,) = run(folder, *data_flag)
    assert code == 0 and out.split("top-1")[1].split("parameters")[0] == last.split("top-1")[1].split("parameters")[0]
    assert "one checkpoint older" in error and run(folder / "checkpoint.pt", *data_flag)[0] == 2


def test_a_checkpoint_alone_tests_a_folder_of_fewer_classes(trained, pictures, tmp_path, tested):
    folder = trained() / "checkpoint.pt"
    result = tested(folder, "--data", pictures)
    shutil.copytree(pictures / "test", tmp_path / "test")
    assert tested(folder, "--data", tmp_path)["loss"] == pytest.approx(result["loss"])  # test/ alone
    shutil.rmtree(tmp_path / "test" / "pullover")
    fewer = tested(folder, "--data", tmp_path)["per_class"]
    assert fewer[0] == {"class": "pullover", "accuracy": None, "images": 0} and fewer[1:] == result["per_class"][1:]


def test_a_checkpoint_of_an_earlier_version_takes_the_folder_and_says_so(trained, pictures, tested, run, fail):
    expected = tested(trained() / "checkpoint.pt", "--data", pictures)["loss"]
    old = trained(mean=None, std=None, class_names=None) / "checkpoint.pt"
    code, out, (error,) = run(old, "--data", pictures, "--json")
    assert code == 0 and json.loads(out)["loss"] == pytest.approx(expected)
    assert "does not say its classes, mean and deviation" in error
    assert "does not say its mean" in fail(old, pictures / "test")


def test_what_a_checkpoint_says_of_its_input_is_checked(trained, pictures, fail):
    for changes, message in (
        ({"std": None}, "must be finite"),
        ({"std": [0.1, 0.1, 0.0]}, "std above 0"),
        ({"mean": [0.1, math.nan, 0.1]}, "must be finite"),
        ({"class_names": ["a", "b"]}, "class_names in it must be 3 values of kind str"),
        ({"class_names": ["a", "b", "b"]}, "a name twice"),
    ):
        assert message in fail(trained(**changes), "--data", pictures)


def test_what_is_confused_is_shown_and_kept_in_the_run_folder(trained, pictures, run):
    folder = trained()
    code, out, _ = run(folder, "--data", pictures)
    found = json.loads((folder / "evaluation.json").read_text())
    matrix = np.array(found["confusion"])
    assert code == 0 and matrix.sum() == 24 and found["accuracy"] == pytest.approx(100 * matrix.trace() / 24)
    assert all(f"| {k} {name} " in out for k, name in enumerate(found["classes"]))
    assert [c["accuracy"] for c in found["per_class"]] == (100 * matrix.diagonal() / 8).tolist()
    wrong = found["mistakes"]
    assert 0 < len(wrong) == min(12, 24 - matrix.trace())
    assert wrong == sorted(wrong, key=lambda m: -m["probability"])
    for mistake in wrong:
        code, out, _ = run(folder, mistake["image"], "--json")
        (line,) = out.splitlines()
        assert json.loads(line)["classes"][0]["class"] == mistake["predicted"] != mistake["true"]
        assert mistake["true"] in mistake["image"]
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200 and len(picture.convert("L").getcolors()) > 20
    (folder / "evaluation.json").unlink()
    (folder / "evaluation.json").mkdir()
    code, _, (error,) = run(folder, "--data", pictures)
    assert code == 0 and "evaluation.json not written" in error


def test_images_are_predicted_as_the_test_sees_them(trained, pictures, tmp_path, run, fail):
    folder = trained()
    file = sorted((pictures / "test" / "shirt").iterdir())[0]
    code, out, errors = run("--model_path", folder, file)
    assert (code, errors) == (0, []) and out.startswith(f"{file}: ") and out.count(" %") == 3
    many = tmp_path / "many"
    (many / ".cache").mkdir(parents=True)
    shutil.copy(file, many / "b.png")
    shutil.copy(file, many / ".cache" / "hidden.png")
    shutil.copy(file, many / "._a.png")
    (many / "notes.txt").write_text("no image")
    with Image.open(file) as image:  # stored lying down, with the note that it is to be turned
        turned, note = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
        note[0x0112] = 6
        turned.save(many / "a.png", exif=note)
    code, out, errors = run(folder, many, file, "--json", "--batch_size", 2)
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, errors) == (0, []) and [Path(line["image"]).name for line in lines] == ["a.png", "b.png", file.name]
    for line in lines:
        assert [c["class"] for c in line["classes"]] == [c["class"] for c in lines[0]["classes"]]
        shares = [c["probability"] for c in line["classes"]]
        assert shares == pytest.approx([c["probability"] for c in lines[0]["classes"]], abs=1e-5)
        assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    code, out, errors = run(folder, tmp_path / "nothing.png", many / "notes.txt", file)
    assert code == 1 and out.count("\n") == 1 and len(errors) == 2
    assert "nothing.png (No such file" in errors[0] and "notes.txt (" in errors[1]
    (tmp_path / "empty").mkdir()
    assert "no image in" in fail(folder, tmp_path / "empty")


def test_large_images_lose_their_border_as_they_do_when_read_from_disk(tmp_path, tested, run):
    """A network for ImageNet's pixels, whose images are scaled to 8/7 of its size."""
    torch.manual_seed(0)
    network = model.NetworkImageNet(4, 3, 3, False, genotypes.DARTS_V2)
    state = {"state_dict": network.state_dict(), "genotype": str(genotypes.DARTS_V2), "dataset": "imagenet"}
    state |= {"image_size": 32, "mean": list(data.IMAGENET_MEAN), "std": list(data.IMAGENET_STD)}
    (tmp_path / "run").mkdir()
    torch.save(state | {"class_names": ["x", "y", "z"]}, tmp_path / "run" / "checkpoint.pt")
    for part in "xyz":
        (tmp_path / "images" / "val" / part).mkdir(parents=True)
        Image.effect_noise((50, 40), 60).convert("RGB").save(tmp_path / "images" / "val" / part / "image.png")
    tested(tmp_path / "run", "--data", tmp_path / "images", "--workers", 0)
    wrong = json.loads((tmp_path / "run" / "evaluation.json").read_text())["mistakes"]
    assert wrong
    for mistake in wrong:
        _, out, _ = run(tmp_path / "run", mistake["image"], "--json")
        best = json.loads(out)["classes"][0]
        assert best["class"] == mistake["predicted"]
        assert best["probability"] == pytest.approx(mistake["probability"], abs=1e-5)


# ---- checkpoints of searches ---------------------------------------------------------------------------------------
SEARCHED = json.loads((GOLDEN / "published_search.json").read_text())


def test_a_published_search_checkpoint_says_its_genotype(fail):
    for name, genotype in SEARCHED.items():
        error = fail("--model_path", GOLDEN / f"published_search_{name}.pt")
        dataset = "--dataset imagenet " if name == "imagenet" else ""
        assert "is of a search" in error and f'python retrain.py {dataset}--arch "{genotype}"' in error


def test_a_search_checkpoint_in_which_no_genotype_is_certain_names_none(tmp_path, fail):
    tensors = torch.load(GOLDEN / "published_search_cifar_static.pt", weights_only=True)["model"]
    for changed in (
        tensors | {"_op_saliency_normal": torch.full((14, 8), math.nan)},
        tensors | {"_op_avail_reduce": torch.zeros(3, 8)},
        tensors | {"cells.0._ops.13._ops.3.op.1.weight": torch.zeros(2, 1, 7, 7)},
        {name: t for name, t in tensors.items() if not name.startswith("_op_")},
        {name.replace("_ops.7.", "_ops.8."): t for name, t in tensors.items()},  # no space has nine operations
    ):
        torch.save({"model": changed}, tmp_path / "changed.pt")
        assert "it does not tell which cell it found" in fail("--model_path", tmp_path / "changed.pt")


def test_a_search_checkpoint_of_ours_says_its_genotype(tmp_path, fail):
    found = space.DynamicSpace(genotypes.SPACES["expand"].primitives)
    rng = np.random.default_rng(0)
    for kind in genotypes.CELL_TYPES:
        found.saliency[kind][:] = rng.random((14, 8))
    network = model_search.Network(2, 10, 3, genotypes.SPACES["expand"].primitives)
    state = {"architect": {}, "state_dict": network.state_dict()}
    torch.save(state | {"method": {"space": found.state_dict()}}, tmp_path / "checkpoint.pt")
    assert f'--arch "{found.genotype()}"' in fail(tmp_path)
    torch.save(state, tmp_path / "checkpoint.pt")  # of another method
    (tmp_path / "genotype.txt").write_text(f"{genotypes.DARTS_V1}\n")
    assert f'--arch "{genotypes.load("DARTS_V1")}"' in fail(tmp_path)


# ---- what does not fit ---------------------------------------------------------------------------------------------
def small_file(folder, change=lambda weights: weights):
    """A file of a 2-channel, 3-cell, 10-class DARTS_V2 network with auxiliary head, after ``change``."""
    weights = model.NetworkCIFAR(2, 10, 3, True, genotypes.load("DARTS_V2")).state_dict()
    torch.save(change(dict(weights)), folder / "file.pt")
    return folder / "file.pt"


COUNTER = "stem.1.num_batches_tracked"
MISFITS = [
    (lambda w: {name: w[name] for name in w if name != "classifier.bias"}, "1 tensor missing (classifier.bias)"),
    (lambda w: {name: w[name] for name in w if name != COUNTER}, f"1 tensor missing ({COUNTER})"),
    (lambda w: w | {"stem.1.shift": w.pop("stem.1.bias")}, "(stem.1.bias) and 1 tensor unknown (stem.1.shift)"),
    (lambda w: w | {"stem.0.weight": torch.zeros(7, 3, 3, 3)}, "[7, 3, 3, 3], expected [6, 3, 3, 3]"),
    (lambda w: w | {"stem.1.bias": torch.zeros(())}, "stem.1.bias has shape [], expected [6]"),
    (lambda w: w | {"stem.1.bias": torch.zeros(6, dtype=torch.int64)}, "torch.int64, expected torch.float"),
    (lambda w: {"state_dict": list(w.values())}, "no state dict in it"),
    (lambda w: {"weight": torch.zeros(3)}, "not a network of this family"),
    (lambda w: {"epoch": 3, "architect": {}, "state_dict": w}, "is of a search"),
    (lambda w: w | {"cells.0._ops.0._ops.1.1.running_mean": torch.zeros(2)}, "is of a search"),
]
UNFULFILLED = {
    "--arch DARTS_V1": "does not fit the network of DARTS_V1, check --arch",
    "--arch DARTS_V2 --init_channels 16": "checkpoint has 2 channels, you asked for 16",
    "--arch DARTS_V2 --layers 20": "checkpoint has 3 cells, you asked for 20",
    "--arch DARTS_V2 --dataset cifar100": "checkpoint has 10 classes, cifar100 has 100",
    "--arch DARTS_V2 --dataset imagenet": "checkpoint has the network for small images",
    "--arch DARTS_V3": "no genotype DARTS_V3: expected one of DDSAS_cifar10",
    "": "give it with --arch",
    "--arch DARTS_V2 --amp": "--amp needs a CUDA device",
}


def test_what_does_not_fit_and_what_is_not_there_gets_a_line_of_its_own(tmp_path, run, fail, few_images):
    assert "--model_path is missing" in fail() and "holds no checkpoint" in fail("--model_path", tmp_path)
    assert "No such file" in fail("--model_path", tmp_path / "absent.pt", "--arch", "DARTS_V2")
    for change, message in MISFITS:
        file = small_file(tmp_path, change)
        code, out, (error,) = run("--model_path", file, "--arch", "DARTS_V2", "--dataset", "cifar10")
        assert (code, out) == (2, "") and str(file) in error and message in error
    file = small_file(tmp_path)
    for given, message in UNFULFILLED.items():
        assert message in fail("--model_path", file, "--device", "cpu", *given.split())


# ---- counting ------------------------------------------------------------------------------------------------------
def test_count_names_a_genotype_that_is_not_supported_and_counts_the_others(run, monkeypatch):
    wrong = genotypes.DARTS_V1._replace(normal=[("mystery_conv", 0), *genotypes.DARTS_V1.normal[1:]])
    monkeypatch.setattr(genotypes, "DARTS_V1", wrong)
    code, out, (error,) = run("--count", "--layers", 3)
    assert code == 0 and "DARTS_V1" in error and "mystery_conv" in error
    assert "DARTS_V2" in out and "PDARTS" in out and "DARTS_V1" not in out
