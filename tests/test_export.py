"""hubconf.py through torch.hub, and evaluate.py --export: the exported files compute what the network computes."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageOps

import evaluate
import genotypes
import model
from lib import cli, export


def hub(name: str, **options) -> model.Network:
    return torch.hub.load(str(ROOT), name, source="local", **options)


def tiny_checkpoint(path, classes: int = 10, auxiliary: bool = False, **more):
    """A checkpoint of a network with 4 channels and 2 cells, its BatchNorms as if trained."""
    torch.manual_seed(0)
    network = model.NetworkCIFAR(4, classes, 2, auxiliary, genotypes.DDSAS_cifar10)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    state = {"state_dict": network.state_dict(), "genotype": str(genotypes.DDSAS_cifar10), "dataset": "fashion_mini"}
    torch.save(state | more, path)
    return network.eval()


@pytest.mark.parametrize(
    ("name", "options", "kind", "C", "layers", "classes"),
    [
        ("ddsas_cifar10", {}, model.NetworkCIFAR, 36, 20, 10),
        ("ddsas_cifar100", {}, model.NetworkCIFAR, 36, 20, 100),
        ("ddsas_imagenet", {}, model.NetworkImageNet, 46, 14, 1000),
        ("pdarts", {"num_classes": 3}, model.NetworkCIFAR, 36, 20, 3),
        ("pdarts", {"dataset": "imagenet"}, model.NetworkImageNet, 48, 14, 1000),
    ],
)
def test_hub_gives_the_published_networks(name, options, kind, C, layers, classes):
    network = hub(name, **options)
    assert type(network).__name__ == kind.__name__ and not network.training
    arch = {"pdarts": "PDARTS"}.get(name, name.replace("ddsas", "DDSAS"))
    with torch.device("meta"):
        expected = kind(C, classes, layers, False, getattr(genotypes, arch)).state_dict()
    found = network.state_dict()
    assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in expected.items()}
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_hub_loads_weights_as_evaluate_py_does_and_strictly(tmp_path):
    network = model.NetworkCIFAR(36, 10, 20, True, genotypes.DDSAS_cifar10).eval()
    weights = network.state_dict()
    torch.save(weights, tmp_path / "good.pt")
    loaded = hub("ddsas_cifar10", weights=tmp_path / "good.pt")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    torch.save({"state_dict": weights, "genotype": str(genotypes.PDARTS)}, tmp_path / "other.pt")

    for name, file, options, message in (
        ("ddsas_cifar10", "good.pt", {"num_classes": 100}, "10 classes, you asked for 100"),
        ("ddsas_cifar10", "other.pt", {}, "another genotype"),
        ("ddsas_imagenet", "good.pt", {}, "36 channels, you asked for 46"),
    ):
        with pytest.raises(Exception, match=message) as error:
            hub(name, weights=tmp_path / file, **options)
        assert type(error.value).__name__ == "UserError"


def evaluated(*arguments):
    return evaluate.main(cli.parse(evaluate.get_parser(), list(map(str, arguments))))


@pytest.fixture
def own_run(tmp_path):
    """(run folder, its network, what the checkpoint knows): for the pictures."""
    known = {"class_names": ["pullover", "shirt", "trouser"], "mean": [0.2, 0.3, 0.4], "std": [0.3, 0.2, 0.1]}
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "checkpoint.pt"
    network = tiny_checkpoint(file, 3, auxiliary=True, dataset="folder", image_size=16, **known)
    return tmp_path / "run", network, known


def raw(path) -> np.ndarray:
    """What the printed line says: float32 (1, 3, 16, 16), the centre square scaled to 16 pixels, RGB in 0..1."""
    with Image.open(path) as image:
        square = ImageOps.fit(image.convert("RGB"), (16, 16), Image.Resampling.BILINEAR)
    return np.asarray(square, np.float32).transpose(2, 0, 1)[None] / 255


def test_onnx_on_raw_pixels_gives_the_labels_of_evaluate(own_run, pictures, tmp_path, capfd):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, _, known = own_run
    file = tmp_path / "model.onnx"
    result = evaluated("--model_path", folder, "--data", pictures, "--export", "onnx", file)
    out, err = capfd.readouterr()
    (line,) = [line for line in out.splitlines() if str(file) in line]
    assert "float32 (batch, 3, 16, 16): the centre square of an image, scaled to 16 x 16 pixels (bilinear)" in line
    assert "RGB in 0..1, minus mean, divided by std" in line and "logits (batch, 3)" in line and err == ""
    assert result["images"] == 24 and result["export"]["largest_difference"] < 1e-5
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert known.items() <= metadata.items() and (metadata["image_size"], metadata["scale"]) == (16, 16)
    paths = sorted((pictures / "test").rglob("*.png"))
    expected = evaluated("--model_path", folder, *paths)
    mean, std = (np.array(metadata[name], np.float32)[:, None, None] for name in ("mean", "std"))
    images = np.concatenate([(raw(path) - mean) / std for path in paths])
    (logits,) = session.run(None, {"input": images})
    assert len(expected) == 24
    assert [metadata["class_names"][k] for k in logits.argmax(1)] == [e["classes"][0]["class"] for e in expected]


def test_pt2_computes_the_logits_and_carries_the_metadata(own_run, pictures, tmp_path):
    folder, network, known = own_run
    evaluated("--model_path", folder, "--data", pictures, "--export", "pt2", tmp_path / "model.pt2")
    metadata = dict.fromkeys(export.KEYS, "")
    program = torch.export.load(tmp_path / "model.pt2", extra_files=metadata)
    metadata = {key: json.loads(value) for key, value in metadata.items()}
    assert known.items() <= metadata.items() and metadata["input"].startswith("float32 (batch, 3, 16, 16)")
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), network(images)[0], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_named_and_not_written(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "tiny.pt")
    given = ("--model_path", tmp_path / "tiny.pt", "--export")
    for kind, file, message in (
        ("tflite", "model", "expected one of onnx, pt2"),
        ("pt2", "nothing/model", "folder that exists"),
        ("pt2", "", "folder that exists"),
    ):
        with pytest.raises(cli.UserError, match=message):
            evaluated(*given, kind, tmp_path / file)
    for change, message in ((lambda x: x + 0.1, "logits are not the network's"), (lambda x: x * torch.nan, "nan off")):
        wrong = {"pt2": lambda network, *_, change=change: (b"", lambda x: change(network(x)))}
        monkeypatch.setattr(export, "FORMATS", wrong)
        with pytest.raises(cli.UserError, match=message):
            evaluated(*given, "pt2", tmp_path / "model")
    monkeypatch.setattr(export, "FORMATS", {"onnx": export.to_onnx})
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(cli.UserError, match="pip install onnx onnxscript onnxruntime"):
        evaluated(*given, "onnx", tmp_path / "model.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.pt"}
