"""Test a checkpoint, ours or a released one: accuracy, loss, parameters, multiply-adds, speed.

    python evaluate.py --model_path logs/RETRAIN_RUN          # a run folder: its best checkpoint
    python evaluate.py --dataset cifar10 --arch DDSAS_cifar10 --model_path .weights/cifar10-best-97.61.pt
    python evaluate.py --dataset imagenet --data .data/imagenet --arch DDSAS_imagenet --model_path FILE

A checkpoint is data: it is read with weights_only, and must fit the network exactly. What a checkpoint of ours says of
itself (dataset, genotype) need not be repeated; for others --arch is needed, and the rest is what the tensors say.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
from torch import Tensor

import data
import model
import search
import utils
from genotypes import Genotype
from retrain import load_genotype
from utils import UserError, number


def main(args: argparse.Namespace) -> dict:
    """Test the checkpoint that the arguments name; prints and returns the results."""
    device = utils.device_of(args)
    rank, world_size = utils.start_distributed(device)
    checkpoint, network = load_network(args)
    dataset = args.dataset or checkpoint.get("dataset", "cifar10")
    test, info = data.test_data(
        dataset,
        args.data,
        batch_size=args.batch_size,
        device=device,
        image_size=args.image_size or (checkpoint.get("image_size") if dataset == "folder" else None),
        workers=args.workers,
        rank=rank,
        world_size=world_size,
        bad_images=args.bad_images,
    )
    large = search.stem_for(info, dataset) == "imagenet"
    if large != isinstance(network, model.NetworkImageNet):
        raise UserError(f"{args.model_path} holds a {type(network).__name__}, which {dataset} images do not fit")
    classes = network.classifier.out_features
    if classes != info.num_classes:
        raise UserError(f"{args.model_path}: checkpoint has {classes} classes, {dataset} has {info.num_classes}")
    parameters = model.count_parameters(network)
    multiply_adds = model.count_multiply_adds(network, info.image_size)
    network = network.to(device).eval()
    started = time.time()
    with search.autocast(args, device):
        metrics = search.validate(network, test, lambda x: network(x)[0], device)
    seconds = time.time() - started
    result = {
        "dataset": dataset,
        "checkpoint": str(args.model_path),
        "genotype": str(network.genotype),
        "images": metrics.count,
        "top1": metrics.top1,
        "top5": metrics.top5,
        "loss": metrics.loss,
        "parameters_m": parameters / 1e6,
        "multiply_adds_m": multiply_adds / 1e6,
        "images_per_second": metrics.count / seconds,
    }
    if utils.is_main():
        print(json.dumps(result) if args.json else describe(result))
    return result


def describe(result: dict) -> str:
    """The results as lines for people."""
    top5 = "" if result["top5"] is None else f", top-5 {result['top5']:.2f} %"
    return (
        f"{result['checkpoint']} on {result['images']} test images of {result['dataset']}\n"
        f"test accuracy: top-1 {result['top1']:.2f} %{top5}, loss {result['loss']:.4f}\n"
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
    checkpoint = utils.load_checkpoint(path)
    weights = checkpoint.get("state_dict", checkpoint)
    if not isinstance(weights, dict) or not weights or not all(isinstance(t, Tensor) for t in weights.values()):
        raise UserError(f"{path}: no state dict in it; expected tensors by name, or {{state_dict: ...}}")
    weights = {str(name).removeprefix("module."): tensor for name, tensor in weights.items()}
    arch = args.arch or checkpoint.get("genotype")
    if arch is None:
        raise UserError(f"{path} does not say which genotype it is of: give it with --arch, such as DDSAS_cifar10")
    network = build(str(path), weights, load_genotype(str(arch)), args)
    return checkpoint, network


def build(path: str, weights: dict[str, Tensor], genotype: Genotype, args: argparse.Namespace) -> model.Network:
    """The network that the tensors describe, with these weights, loaded strictly (the auxiliary head is left out)."""
    layers = 1 + max((int(m[1]) for m in map(re.compile(r"cells\.(\d{1,4})\.").match, weights) if m), default=-1)
    large = "stem0.0.weight" in weights
    stem, classifier = weights.get("stem0.3.weight" if large else "stem.0.weight"), weights.get("classifier.weight")
    if layers == 0 or stem is None or classifier is None or stem.ndim != 4 or classifier.ndim != 2:
        raise UserError(f"{path}: not a network of this family (no stem, cells.N or classifier in it)")
    C = stem.shape[0] if large else stem.shape[0] // 3
    for name, found, asked in (("channels", C, args.init_channels), ("cells", layers, args.layers)):
        if asked is not None and asked != found:
            raise UserError(f"{path}: checkpoint has {found} {name}, you asked for {asked}")
    with torch.device("meta"):  # shapes first: nothing is allocated for a network that does not fit
        network = (model.NetworkImageNet if large else model.NetworkCIFAR)(
            C, classifier.shape[0], layers, False, genotype
        )
    network.genotype = genotype
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("auxiliary_head.")}
    expected = network.state_dict()
    for name in expected:  # files without counters are as good: they are used nowhere
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, torch.tensor(0))
    missing, foreign = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or foreign:
        what = f"{len(missing)} tensors missing" if missing else f"{len(foreign)} tensors unknown"
        raise UserError(f"{path}: does not fit the genotype, check --arch: {what} ({(missing or foreign)[0]}, ...)")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            have, want = (list(t.shape) for t in (weights[name], tensor))
            raise UserError(f"{path}: {name} has shape {have}, the network needs {want}; check --arch")
        if weights[name].dtype != tensor.dtype:
            raise UserError(f"{path}: {name} is {weights[name].dtype}, the network needs {tensor.dtype}")
    network.load_state_dict(weights, strict=True, assign=True)
    return network.to(memory_format=torch.channels_last)


def get_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(__doc__)
    parser.add_argument("--model_path", required=True, metavar="FILE|RUN", help="checkpoint file or run folder")
    parser.add_argument("--arch", help="name, genotype.txt, run folder or Genotype(...); default: the checkpoint's own")
    parser.add_argument("--init_channels", type=number(int, 1), metavar="C", help="checked against the checkpoint")
    parser.add_argument("--layers", type=number(int, 1), help="checked against the checkpoint")
    parser.add_argument("--data", default=".data", metavar="DIR", help="folder of the datasets, or of your own images")
    parser.add_argument("--dataset", choices=list(data.INFO), help="default: the checkpoint's own, else cifar10")
    parser.add_argument("--image_size", type=number(int, 8), metavar="N", help="for folder and imagenet")
    parser.add_argument("--bad_images", default="stop", choices=["stop", "skip"], help="what unreadable images cause")
    parser.add_argument("--batch_size", type=number(int, 1), default=96)
    parser.add_argument("--workers", type=number(int, 0), default=2, help="processes that load images from files")
    parser.add_argument("--device", default="auto", help="auto (cuda if there, else cpu), cpu, cuda, cuda:N")
    parser.add_argument("--gpu", type=int, metavar="N", help="use GPU number N")
    parser.add_argument("--amp", action="store_true", help="bfloat16 on CUDA")
    parser.add_argument("--json", action="store_true", help="print the results as one line of json")
    return parser


if __name__ == "__main__":
    utils.cli(main, get_parser())
