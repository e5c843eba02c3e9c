"""Test a checkpoint, ours or a released one: accuracy, loss, parameters, multiply-adds, speed.

    python evaluate.py --model_path logs/RETRAIN_RUN          # a run folder: its best checkpoint
    python evaluate.py --dataset cifar10 --arch DDSAS_cifar10 --model_path .weights/cifar10-best-97.61.pt
    python evaluate.py --dataset imagenet --data .data/imagenet --arch DDSAS_imagenet --model_path FILE
    torchrun --nproc_per_node 4 evaluate.py --dataset imagenet ...      # each process tests its share
    python evaluate.py --model_path logs/RETRAIN_RUN --export onnx model.onnx       # or pt2
    python evaluate.py --count --dataset imagenet             # no checkpoint: what each genotype's network costs

A checkpoint is data: it is read with weights_only, and must fit the network exactly. What a checkpoint of ours says of
itself (dataset, genotype) need not be repeated; for others --arch is needed, and the rest is what the tensors say.
"""

from __future__ import annotations

import argparse
import inspect
import io
import itertools
import json
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import engine
import torch
from engine import load_genotype
from torch import Tensor, nn

import genotypes
import model
import utils
from genotypes import Genotype
from lib import checkpoints, cli, data, distributed
from lib.cli import UserError, number
from nasbench201 import Architecture
from space import two_edges_a_node

Classifier = Callable[[Tensor], Tensor]  # images -> logits
WEIGHTS = Path(".weights")
RELEASED = {  # (genotype, for large images): the file of its authors, see README's "Released weights"
    ("DDSAS_cifar10", False): "cifar10-best-97.61.pt",
    ("DDSAS_cifar100", False): "best_weights.pt",
    ("DDSAS_imagenet", True): "imagenet-best-76.1.pt",
    ("PDARTS", False): "PDARTS_cifar10.pt",
    ("PDARTS", True): "PDARTS_imagenet.pth.tar",
}
MAX_CELLS = 1000
MAX_IMAGE_SIZE = 1024  # pixels, as a checkpoint may ask for; --image_size may be larger


def main(args: argparse.Namespace) -> dict | list[dict]:
    """Test the checkpoint that the arguments name, or count; prints and returns the results."""
    if args.count:
        return count(args)
    if args.model_path is None:
        args.model_path = released(args)
    device = utils.device_of(args)
    engine.check_common(args, device)
    utils.cuda_settings(args.tf32)
    rank, world_size = distributed.start_distributed(device)
    checkpoint, network = load_network(args)
    dataset, image_size = tested_on(args, checkpoint, network)
    info = data.lookup(dataset, image_size)
    check_fits(args.model_path, network, info, dataset)
    exported = (
        export(*args.export, network, info.image_size, args.json) if args.export and distributed.is_main() else None
    )  # noqa: E501
    test, info = data.test_data(
        dataset,
        args.data,
        batch_size=args.batch_size,
        device=device,
        image_size=image_size,
        workers=args.workers,
        rank=rank,
        world_size=world_size,
        bad_images=args.bad_images,
    )
    check_fits(args.model_path, network, info, dataset)  # now the classes of a folder are known
    result = {
        "dataset": dataset,
        "checkpoint": str(args.model_path),
        "genotype": str(network.genotype),
        "parameters_m": model.count_parameters(network) / 1e6,
        "multiply_adds_m": model.count_multiply_adds(network, info.image_size) / 1e6,
    }
    network = model.fuse(network.to(device).eval())
    started = time.time()
    with engine.autocast(args, device):
        metrics = engine.evaluate(lambda x: network(x)[0], test, device)
    result |= {
        "images": metrics.count,
        "top1": metrics.top1,
        "top5": metrics.top5,
        "loss": metrics.loss if math.isfinite(metrics.loss) else None,
        "images_per_second": metrics.count / (time.time() - started),
    }
    if exported:
        result["export"] = exported
    if distributed.is_main():
        print(json.dumps(result) if args.json else describe(result))
    return result


def released(args: argparse.Namespace) -> str:
    """The file of a released network that --arch names, in .weights/."""
    large = args.dataset == "imagenet" or args.arch == "DDSAS_imagenet"
    if (args.arch, large) not in RELEASED:
        names = ", ".join(dict.fromkeys(name for name, _ in RELEASED))
        raise UserError(
            f"--model_path is missing: name a checkpoint file or a run folder, or with --arch one of {names}"
        )
    return str(WEIGHTS / RELEASED[args.arch, large])


def tested_on(args: argparse.Namespace, checkpoint: dict, network: model.Network) -> tuple[str, int | None]:
    """(dataset, image size) from the arguments, else what the checkpoint was trained on, else what the stem is for."""
    own = checkpoint.get("dataset")
    default = "imagenet" if isinstance(network, model.NetworkImageNet) else "cifar10"
    dataset = args.dataset or (own if isinstance(own, str) and own in data.INFO else default)
    size = args.image_size or (checkpoint.get("image_size") if dataset == own else None)
    if size is not args.image_size and (type(size) is not int or size > MAX_IMAGE_SIZE):
        raise UserError(f"{args.model_path} does not say for images of how many pixels it is: give --image_size")
    return dataset, size


def check_fits(path: str, network: model.Network, info: data.Info, dataset: str) -> None:
    """UserError if the network has other classes than the dataset, or is for other images."""
    large = engine.stem_for(info, dataset) == "imagenet"
    if large != isinstance(network, model.NetworkImageNet):
        raise UserError(
            f"{path}: checkpoint has the network for {'small' if large else 'large'} images,"
            f" {dataset} at {info.image_size} pixels needs the one for {'large' if large else 'small'} ones;"
            " check --dataset and --image_size"
        )
    classes = network.classifier.out_features
    if info.num_classes not in (0, classes):
        raise UserError(f"{path}: checkpoint has {classes} classes, {dataset} has {info.num_classes}")


def describe(result: dict) -> str:
    """The results as lines for people."""
    top5 = "" if result["top5"] is None else f", top-5 {result['top5']:.2f} %"
    loss = "not a finite number" if result["loss"] is None else f"{result['loss']:.4f}"
    return (
        f"{result['checkpoint']} on {result['images']} test images of {result['dataset']}\n"
        f"{result['genotype']}\n"
        f"test accuracy: top-1 {result['top1']:.2f} %{top5}, loss {loss}\n"
        f"parameters {result['parameters_m']:.3f} M, multiply-adds {result['multiply_adds_m']:.1f} M,"
        f" {result['images_per_second']:.1f} images/s"
    )


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def load_network(args: argparse.Namespace) -> tuple[dict, model.Network]:
    """(checkpoint, network with its weights) of --model_path, a file or a run folder; UserError: what does not fit."""
    path = Path(args.model_path)
    if path.is_dir():
        files = [path / name for name in ("best.pt", "checkpoint.pt", "checkpoint.prev.pt") if (path / name).exists()]
        if not files:
            raise UserError(f"{path} holds no checkpoint (best.pt or checkpoint.pt)")
        path = files[0]
    if not path.exists() and path.parent == WEIGHTS:
        raise UserError(f'{path} is not there: README\'s section "Released weights" says where its authors put it')
    checkpoint = checkpoints.read_weights(path)  # not the one before, if it is damaged: that has other weights
    if "architecture" in checkpoint and {"space", "arch_optimizer"} & checkpoint.keys():
        raise UserError(f"{path} is of a search, there is no trained network in it: python retrain.py --arch RUN first")
    weights = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    if not isinstance(weights, dict) or not weights or not all(isinstance(t, Tensor) for t in weights.values()):
        raise UserError(f"{path}: no state dict in it; expected tensors by name, or {{state_dict: ...}}")
    weights = {str(name): tensor for name, tensor in weights.items()}
    if all(name.startswith("module.") for name in weights):  # saved from inside DataParallel
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    if any(name.startswith("alphas_") or re.match(r"cells\.\d+\._ops\.\d+\._ops\.", name) for name in weights):
        raise UserError(f"{path} is of a search, there is no trained network in it{searched(checkpoint | weights)}")
    own = checkpoint.get("genotype")
    arch = args.arch or (own if isinstance(own, str) else "")
    if not args.arch and not arch.startswith(("Genotype(", "|")):  # a stranger's file names no other files
        raise UserError(f"{path} does not say which genotype it is of: give it with --arch, such as DDSAS_cifar10")
    if isinstance(genotype := load_genotype(arch), Architecture):
        C = first_size(t for name, t in weights.items() if name.startswith("stem."))
        classes = first_size(t for name, t in weights.items() if name.startswith("classifier."))
        N = args.layers or checkpoint.get("layers", 5)  # cells without convolutions have no tensors
        if not (C and classes and type(N) is int and 0 < N <= MAX_CELLS):
            raise UserError(f"{path}: not a network of NAS-Bench-201's space")
        return checkpoint, fitted(str(path), weights, arch, genotype, False, C, classes, N, False)
    return checkpoint, build(str(path), weights, arch, args)


def searched(state: dict) -> str:
    """What the file of a search in the DARTS space says of its genotype, from saliency or from alpha and beta."""
    tables = {}
    for kind in genotypes.CELL_TYPES:
        s, alpha, beta = (state.get(f"{name}_{kind}") for name in ("saliency", "alphas", "betas"))
        if isinstance(alpha, Tensor) and s is None:
            s = alpha.softmax(-1) * (torch.sigmoid(beta) if isinstance(beta, Tensor) else 1)
        if not isinstance(s, Tensor) or s.shape != (genotypes.EDGES, len(genotypes.PRIMITIVES)):
            return ": python retrain.py --arch GENOTYPE trains one"
        tables[kind] = s.double().nan_to_num().numpy().copy()
        tables[kind][:, genotypes.PRIMITIVES.index("none")] = -math.inf
    return f'; what it found: python retrain.py --arch "{two_edges_a_node(tables, genotypes.PRIMITIVES)}"'


def build(path: str, weights: dict[str, Tensor], arch: str, args: argparse.Namespace) -> model.Network:
    """The network that the tensors describe, with exactly these weights, without its auxiliary head.

    Width, depth and classes are read off several tensors, so that the message for a single bad one names that one.
    """
    large = any(name.startswith("stem1.") for name in weights)
    stem = first_size(t for name, t in weights.items() if name.startswith("stem1." if large else "stem."))
    heads = [f"{head}classifier.{kind}" for head in ("", "auxiliary_head.") for kind in ("bias", "weight")]
    classes = first_size(weights[name] for name in heads if name in weights)
    cells = {int(m[1]) for m in map(re.compile(r"cells\.(\d{1,4})\.").match, weights) if m}
    layers = next(number for number in itertools.count() if number not in cells)
    C = stem if large else stem // 3
    if not (C and classes and layers):
        raise UserError(f"{path}: not a network of this family (no stem, cells.0 or classifier in it)")
    if layers > len(weights) / 10:  # of the inputs of a cell alone
        raise UserError(f"{path}: {len(weights)} tensors are not enough for the {layers} cells that they name")
    for name, found, asked in (("channels", C, args.init_channels), ("cells", layers, args.layers)):
        if asked is not None and asked != found:
            raise UserError(f"{path}: checkpoint has {found} {name}, you asked for {asked}")
    auxiliary = any(name.startswith("auxiliary_head.") for name in weights)
    return fitted(path, weights, arch, load_genotype(arch), large, C, classes, layers, auxiliary)


def fitted(
    path: str,
    weights: dict[str, Tensor],
    arch: str,
    genotype: Genotype | Architecture,
    large: bool,
    C: int,
    classes: int,
    layers: int,
    auxiliary: bool,
) -> model.Network:
    """The network of this size with exactly these weights, without its auxiliary head; UserError if they do not fit."""
    second_bn = any(name.startswith("auxiliary_head.features.6.") for name in weights)
    try:
        with torch.device("meta"):  # shapes first: nothing is allocated for a network that does not fit
            network = model.network_for(large, C, classes, layers, auxiliary, genotype, second_bn)
    except RuntimeError:
        raise UserError(f"{path}: no network can have {C} channels and {classes} classes") from None
    expected = network.state_dict()
    if not any(name.endswith("num_batches_tracked") for name in weights):  # files of old versions have no counters
        weights |= {name: torch.tensor(0) for name in expected if name.endswith("num_batches_tracked")}
    check_tensors(path, weights, expected, arch if len(arch) < 60 else "its genotype")
    weights = {name: tensor.to(expected[name].dtype) for name, tensor in weights.items()}
    network.load_state_dict(weights, strict=True, assign=True)
    network.genotype = genotype
    if auxiliary:
        del network.auxiliary_head  # training only
    return network.to(memory_format=torch.channels_last)


def first_size(tensors: Iterable[Tensor]) -> int:
    """The commonest first dimension of tensors; 0 if there are none. Those without data can claim any size."""
    return statistics.mode([len(t) for t in tensors if t.ndim and t.numel()] or [0])


def check_tensors(path: str, weights: dict[str, Tensor], expected: dict[str, Tensor], arch: str) -> None:
    """UserError unless the tensors are those expected, by name, shape and kind."""
    missing, foreign = ([name for name in a if name not in b] for a, b in ((expected, weights), (weights, expected)))
    if missing or foreign:
        parts = [
            f"{len(names)} tensor{'s' * (len(names) > 1)} {what} ({names[0]}{', ...' * (len(names) > 1)})"
            for names, what in ((missing, "missing"), (foreign, "unknown"))
            if names
        ]
        raise UserError(f"{path} does not fit the network of {arch}, check --arch: {' and '.join(parts)}")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            have, want = (list(t.shape) for t in (weights[name], tensor))
            raise UserError(
                f"{path} does not fit the network of {arch}, check --arch: {name} has shape {have}, expected {want}"
            )
        if weights[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{path}: {name} is {weights[name].dtype}, expected {tensor.dtype}")


# ---- export --------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """A network that returns its logits alone."""

    def __init__(self, network: model.Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


def as_onnx(network: nn.Module, images: Tensor) -> tuple[bytes, Classifier]:
    """An ONNX file, and what runs it: `input` images, `output` logits, both with a dimension `batch`."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, used by torch.onnx
    except ImportError as error:
        raise UserError(f"--export onnx needs {error.name}: pip install onnx onnxscript onnxruntime") from None
    if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        raise UserError(f"--export onnx needs PyTorch 2.6 or newer, this is {torch.__version__}; pt2 works")
    names = {"input_names": ["input"], "output_names": ["output"], "dynamic_shapes": ({0: "batch"},)}
    program = torch.onnx.export(network, (images,), dynamo=True, verbose=False, **names)
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def as_pt2(network: nn.Module, images: Tensor) -> tuple[bytes, Classifier]:
    """A file for torch.export.load(file).module(), and what runs it."""
    file = io.BytesIO()
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=({0: batch},), strict=False), file)
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


EXPORTS = {"onnx": as_onnx, "pt2": as_pt2}
TOLERANCE = 1e-4  # of an exported network's logits, relative to the largest one


@torch.no_grad()
def export(kind: str, file: str, network: model.Network, image_size: int, quiet: bool = False) -> dict:
    """Write the network, fused, as a file for other programs: images (batch, 3, size, size), normalised, to logits.

    The file is run here on random images, in batches of other sizes than it was made with, and is written if its logits
    are those of the network. UserError: what is wrong with the format, the path, or the logits.
    """
    path = Path(file)
    if kind not in EXPORTS:
        raise UserError(f"--export {kind}: expected one of {', '.join(EXPORTS)}, then the file to write")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--export {kind} {file}: expected the name of a file, in a folder that exists")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(7, 3, image_size, image_size, generator=generator)
    expected = network.eval()(images)[0]
    network = Logits(model.fuse(network))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated, and channels_last weights incomplete
        content, run = EXPORTS[kind](network, images[:2])
        found = torch.cat([run(part) for part in images.split([1, 6])])
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:  # nor NaN
        raise UserError(f"--export {kind} {file}: not written, its logits are not the network's ({difference:.1e} off)")
    checkpoints.write_whole(path, content)
    if not quiet:
        shape, classes = f"(batch, 3, {image_size}, {image_size})", expected.shape[1]
        print(
            f"{file}: {kind}, {len(content) / 1e6:.1f} MB, images {shape} to logits (batch, {classes});"
            f" was run, and its logits differ by {difference:.1e} of the largest"
        )
    return {"format": kind, "file": str(file), "largest_difference": difference}


# ---- counting ------------------------------------------------------------------------------------------------------


def count(args: argparse.Namespace) -> list[dict]:
    """Parameters and multiply-adds of --arch, or of every genotype by name, at the size it is retrained with.

    Prints a table in Markdown: 36 channels and 20 cells for small images, --mobile's channels and 14 cells for large.
    """
    dataset = args.dataset or "cifar10"
    info = data.lookup(dataset, args.image_size)
    large = engine.stem_for(info, dataset) == "imagenet"
    classes, layers = info.num_classes or 1000, args.layers or (14 if large else 20)
    rows = []
    for arch in [args.arch] if args.arch else genotypes.names():
        genotype = load_genotype(arch)
        C = args.init_channels or (model.mobile_channels(genotype, layers, classes) if large else 36)
        with torch.device("meta"):
            network = model.network_for(large, C, classes, layers, False, genotype)
            multiply_adds = model.count_multiply_adds(network, info.image_size)
        rows.append(
            {
                "genotype": arch,
                "dataset": dataset,
                "channels": C,
                "cells": layers,
                "parameters_m": model.count_parameters(network) / 1e6,
                "multiply_adds_m": multiply_adds / 1e6,
            }
        )
    if args.json:
        print(json.dumps(rows))
        return rows
    print("| genotype | dataset | channels | cells | parameters | multiply-adds |\n|---|---|---|---|---|---|")
    for row in rows:
        *names, parameters, multiply_adds = row.values()
        print(f"| {' | '.join(map(str, names))} | {parameters:.3f} M | {multiply_adds:.1f} M |")
    return rows


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    parser.add_argument("--model_path", metavar="FILE|RUN", help="checkpoint file or run folder")
    parser.add_argument("--arch", help="name, genotype.txt, run folder or Genotype(...); default: the checkpoint's own")
    parser.add_argument("--init_channels", type=number(int, 1), metavar="C", help="checked against the checkpoint")
    parser.add_argument("--layers", type=number(int, 1, MAX_CELLS), help="checked against the checkpoint")
    parser.add_argument("--data", default=".data", metavar="DIR", help="folder of the datasets, or of your own images")
    parser.add_argument("--dataset", choices=list(data.INFO), help="default: the checkpoint's own")
    parser.add_argument("--image_size", type=number(int, 8, 10_000), metavar="N", help="for folder and imagenet")
    parser.add_argument("--bad_images", default="stop", choices=["stop", "skip"], help="what unreadable images cause")
    parser.add_argument("--batch_size", type=number(int, 1), default=96)
    parser.add_argument("--workers", type=number(int, 0, 1000), default=2, help="processes that load images from files")
    parser.add_argument("--device", default="auto", help="auto (cuda if there, else cpu), cpu, cuda, cuda:N")
    parser.add_argument("--gpu", type=number(int, 0), metavar="N", help="use GPU number N")
    parser.add_argument("--amp", action="store_true", help="bfloat16 on CUDA")
    engine.add_tf32_argument(parser.add_argument)
    parser.add_argument("--json", action="store_true", help="print the results as one line of json")
    parser.add_argument("--export", nargs=2, metavar=("FORMAT", "FILE"),
                        help="before the test write the network as onnx or pt2")  # fmt: skip
    parser.ignore("--auxiliary", "--drop_path_prob", "--seed", "--report_freq", "--cutout", "--cutout_length")
    parser.ignore("--local_rank", "--local-rank")  # of torch.distributed.launch
    parser.add_argument("--count", action="store_true", help="test nothing: parameters and multiply-adds of genotypes")
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
