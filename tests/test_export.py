"""hubconf.py through torch.hub, and evaluate.py --export: the exported files compute what the network computes."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import warnings

import pytest
import torch
from conftest import ROOT

import evaluate
import genotypes
import hubconf
import model
from lib import cli, data


def hub(name: str, **options) -> model.Network:
    return torch.hub.load(str(ROOT), name, source="local", **options)


def tiny_checkpoint(path, auxiliary: bool = False, **more):
    """A checkpoint of a network with 4 channels and 3 cells for fashion_mini, its BatchNorms as if trained."""
    torch.manual_seed(0)
    network = model.NetworkCIFAR(4, 10, 3, auxiliary, genotypes.DDSAS_cifar10)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    state = {"state_dict": network.state_dict(), "genotype": str(genotypes.DDSAS_cifar10), "dataset": "fashion_mini"}
    torch.save(state | more, path)
    return network.eval()


# ---- torch.hub -----------------------------------------------------------------------------------------------------


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
    assert len(network.cells) == layers and network.classifier.out_features == classes
    arch = {"pdarts": "PDARTS"}.get(name, name.replace("ddsas", "DDSAS"))
    with torch.device("meta"):
        expected = kind(C, classes, layers, False, getattr(genotypes, arch)).state_dict()
    found = network.state_dict()
    assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in expected.items()}
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_hub_sees_the_networks_and_nothing_else():
    public = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert public == {"ddsas_cifar10", "ddsas_cifar100", "ddsas_imagenet", "pdarts"}
    assert all(getattr(hubconf, name).__doc__ for name in public)
    assert all(importlib.util.find_spec(name) for name in hubconf.dependencies)


def test_hub_loads_weights_strictly(tmp_path):
    """One cell would be quicker, but the published sizes are what it is about."""
    network = model.NetworkCIFAR(36, 10, 20, True, genotypes.DDSAS_cifar10).eval()
    weights = network.state_dict()
    torch.save(weights, tmp_path / "good.pt")
    loaded = hub("ddsas_cifar10", weights=tmp_path / "good.pt")
    assert not loaded.training
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x)[0], network(x)[0], rtol=0, atol=0)

    torch.save({"state_dict": weights, "genotype": str(genotypes.PDARTS)}, tmp_path / "other.pt")
    torch.save({key: t for key, t in weights.items() if key != "classifier.bias"}, tmp_path / "missing.pt")
    for name, file, options, message in (
        ("ddsas_cifar10", "good.pt", {"num_classes": 100}, "10 classes, you asked for 100"),
        ("ddsas_cifar10", "other.pt", {}, "another genotype"),
        ("ddsas_cifar10", "missing.pt", {}, "classifier.bias"),
        ("pdarts", "good.pt", {}, "does not fit the network of PDARTS"),
        ("ddsas_cifar10", "nothing.pt", {}, "cannot be read"),
        ("ddsas_imagenet", "good.pt", {}, "36 channels, you asked for 46"),
    ):
        with pytest.raises(Exception, match=message) as error:
            hub(name, weights=tmp_path / file, **options)
        assert type(error.value).__name__ == "UserError"


# ---- evaluate.py --export ------------------------------------------------------------------------------------------


def run_exported(kind: str, path, images: torch.Tensor) -> torch.Tensor:
    """The file's logits, as another program would compute them."""
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (given,), (returned,) = session.get_inputs(), session.get_outputs()
        assert given.shape == ["batch", 3, 32, 32] and returned.shape == ["batch", 10]
        return torch.from_numpy(session.run(None, {given.name: images.numpy()})[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        return torch.export.load(path).module()(images)


@pytest.fixture
def few_images(monkeypatch):
    """fashion_mini with eight images."""
    info = data.INFO["fashion_mini"]
    images, labels = info.read("", False)
    monkeypatch.setitem(
        data.INFO, "fashion_mini", data.dataclasses.replace(info, read=lambda *_: (images[:8], labels[:8]))
    )


def evaluated(*arguments):
    return evaluate.main(cli.parse(evaluate.get_parser(), list(map(str, arguments))))


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_exported_file_computes_the_logits(kind, tmp_path, few_images, capsys):
    if kind == "onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        pytest.skip("onnx, onnxscript, onnxruntime are not installed")
    if kind == "onnx" and "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        with pytest.raises(cli.UserError, match="needs PyTorch 2.6"):
            evaluate.export(kind, str(tmp_path / "x"), tiny_checkpoint(tmp_path / "tiny.pt"), 32)
        return
    network = tiny_checkpoint(tmp_path / "tiny.pt", auxiliary=True)
    file = tmp_path / f"model.{kind}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluated("--model_path", tmp_path / "tiny.pt", "--export", kind, file)
    assert result["images"] == 8 and result["export"]["largest_difference"] < 1e-5
    lines = [line for line in capsys.readouterr().out.splitlines() if str(file) in line]
    assert len(lines) == 1 and "differ by" in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.pt", file.name}
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            expected = network(images)[0]
        torch.testing.assert_close(run_exported(kind, file, images), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_named_and_not_written(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "tiny.pt")
    for kind, file, message in (
        ("tflite", "model", "expected one of onnx, pt2"),
        ("pt2", "nothing/model", "folder that exists"),
        ("pt2", "", "folder that exists"),
    ):
        with pytest.raises(cli.UserError, match=message):
            evaluated("--model_path", tmp_path / "tiny.pt", "--export", kind, tmp_path / file)
    wrong = {"pt2": lambda network, images: (b"", lambda x: network(x) + 0.1)}
    monkeypatch.setattr(evaluate, "EXPORTS", wrong)
    with pytest.raises(cli.UserError, match="logits are not the network's"):
        evaluated("--model_path", tmp_path / "tiny.pt", "--export", "pt2", tmp_path / "model")
    monkeypatch.setattr(evaluate, "EXPORTS", {"pt2": lambda *_: (b"", lambda x: torch.full((len(x), 10), torch.nan))})
    with pytest.raises(cli.UserError, match="nan off"):
        evaluated("--model_path", tmp_path / "tiny.pt", "--export", "pt2", tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.pt"}


def test_onnx_says_what_to_install(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "tiny.pt")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(cli.UserError, match="pip install onnx onnxscript onnxruntime"):
        evaluated("--model_path", tmp_path / "tiny.pt", "--export", "onnx", tmp_path / "model.onnx")
