"""Test a checkpoint, ours or a released one, or say what it sees in images.

    python evaluate.py --model_path logs/RETRAIN_RUN          # a run folder: its last checkpoint; --best: its best one
    python evaluate.py --model_path logs/RETRAIN_RUN photo.jpg more_photos/       # the best classes of each image
    python evaluate.py --dataset cifar10 --arch DDSAS_cifar10 --model_path .weights/cifar10-best-97.61.pt
    torchrun --nproc_per_node 4 evaluate.py --dataset imagenet --data .data/imagenet --arch DDSAS_imagenet ...
    python evaluate.py --model_path logs/RETRAIN_RUN --export onnx model.onnx       # or pt2
    python evaluate.py --count --dataset imagenet             # no checkpoint: what each genotype's network costs

A checkpoint is data: it is read with weights_only, and must fit the network exactly. What a checkpoint of ours says of
itself (genotype, dataset, classes, mean and deviation of the pixels) need not be repeated, and a test/ folder is enough
to test it; for others --arch is needed, and the rest is what the tensors say.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import genotypes
import model
import utils
from genotypes import EDGES, SPACES, Genotype, Genotype201
from lib import checkpoints, cli, data, distributed, predictions, weights
from lib.cli import UserError, number, printable
from lib.export import export_network
from lib.tables import markdown_table
from model_search import MixedOp
from space import two_edges_a_node

WEIGHTS = Path(".weights")
RELEASED = {  # (genotype, for large images): the file of its authors, see README's "Released weights"
    ("DDSAS_cifar10", False): "cifar10-best-97.61.pt",
    ("DDSAS_cifar100", False): "best_weights.pt",
    ("DDSAS_imagenet", True): "imagenet-best-76.1.pt",
    ("PDARTS", False): "PDARTS_cifar10.pt",
    ("PDARTS", True): "PDARTS_imagenet.pth.tar",
}
MAX_IMAGE_SIZE = 1024  # pixels, as a checkpoint may ask for; --image_size may be larger
OF_SEARCH = {"architect", "arch_optimizer"}  # what searches' checkpoints hold, and held in earlier versions
SUPERNET = re.compile(r"cells\.\d+\._ops\.\d+\._ops\.|alphas_")  # what names of its tensors begin with
CHOSEN = "best.pt: the epoch with the highest accuracy on these test images, so not an unbiased number"


def main(args: argparse.Namespace) -> dict | list[dict]:
    """Test the checkpoint that the arguments name, predict images with it, or count; prints and returns the results."""
    if args.count:
        return count(args)
    device = utils.choose_device(args)
    utils.allow_tf32(args.tf32)
    name_checkpoint(args)
    checkpoint, network = load_network(args)
    dataset, image_size = tested_on(args, checkpoint, network)
    own = weights.read_input(args.model_path, checkpoint, network.classifier.out_features)
    info = data.lookup(dataset, image_size)
    check_fits(args.model_path, network, info, dataset)
    said = {name: value or () for name, value in own.items() if value or dataset == "folder"}
    info = dataclasses.replace(info, **said)  # () is unknown: of an earlier version, or of somebody else
    fused = model.fuse(network.eval())
    result = {"dataset": dataset, "checkpoint": str(args.model_path), "genotype": str(network.genotype)}
    if args.export and distributed.is_main():
        result["export"] = export_network(*args.export, network, fused, info, quiet=args.json)
    fused.to(device)

    def logits_of(x: Tensor) -> Tensor:
        with torch.no_grad(), utils.autocast(args, device):
            return fused(x)[0].float()

    if args.images:
        if not info.mean:
            text = "does not say its mean and deviation: only a test with --data is possible"
            raise UserError(f"{args.model_path} {text}")
        return predict(args, logits_of, info, device) if distributed.is_main() else []
    same = {name: getattr(args, name) for name in ("batch_size", "workers", "bad_images")}
    same |= {"rank": distributed.rank(), "world_size": distributed.world_size()}
    loader, info = data.test_data(dataset, args.data, device=device, image_size=image_size, **same, **own)
    check_fits(args.model_path, network, info, dataset)  # now the classes of a folder are known
    if dataset == "folder" and not all(own.values()) and distributed.is_main():
        text = f"{args.model_path} does not say its classes, mean and deviation: those of {args.data} are taken"
        print(f"warning: {text}", file=sys.stderr)
    result["parameters_m"] = model.count_parameters(network) / 1e6
    result["multiply_adds_m"] = model.count_multiply_adds(network, info.image_size) / 1e6
    return test(args, logits_of, loader, info, result)


def test(args: argparse.Namespace, logits_of: Callable, loader: data.Loader, info: data.Info, result: dict) -> dict:
    """Print and return accuracy, loss and speed; accuracy per class, where classes have names, goes into a run folder.

    ``result`` is what else is printed.
    """
    average, started = utils.Average(loader.options.device), time.time()
    answers = predictions.read_answers(logits_of, loader, lambda z, y: average.add(F.cross_entropy(z, y), z, y))
    metrics = average.read()
    result |= {"images": metrics.count, "top1": metrics.top1, "top5": metrics.top5}
    result["loss"] = metrics.loss if math.isfinite(metrics.loss) else None
    result["images_per_second"] = metrics.count / (time.time() - started)
    if weights.find_checkpoint(args.model_path, args.best).name == "best.pt":
        result["chosen"] = CHOSEN
    if not distributed.is_main():
        return result
    counted = predictions.count_confusions(answers, info.class_names) if info.class_names else {}
    result |= {"per_class": counted["per_class"]} if counted else {}
    if args.json:
        print(json.dumps(result))
    else:
        top5 = "" if metrics.top5 is None else f", top-5 {metrics.top5:.2f} %"
        print(f"{args.model_path} on {metrics.count} test images of {result['dataset']}")
        print(*([CHOSEN] if "chosen" in result else []), result["genotype"], sep="\n")
        print(f"test accuracy: top-1 {metrics.top1:.2f} %{top5}, loss {metrics.loss:.4f}")
        costs = f"parameters {result['parameters_m']:.3f} M, multiply-adds {result['multiply_adds_m']:.1f} M"
        print(f"{costs}, {result['images_per_second']:.1f} images/s")
        if counted:
            print(f"\n{predictions.describe_confusions(counted)}")
    if counted and Path(args.model_path).is_dir():
        mistakes, thumbnails = predictions.find_mistakes(answers, loader, info)
        found = {"accuracy": metrics.top1, "data": str(args.data)} | result | counted | {"mistakes": mistakes}
        predictions.write_evaluation(Path(args.model_path), found, thumbnails)
    return result


def predict(args: argparse.Namespace, logits_of: Callable, info: data.Info, device: torch.device) -> list[dict]:
    """Print and return the best classes of every image; unreadable ones are named, and the exit code then is 1."""
    found, bad = [], 0
    for path, answers in predictions.predict(args.images, logits_of, info, device, args.batch_size):
        if isinstance(answers, str):
            print(printable(f"unreadable: {answers}"), file=sys.stderr)
            bad += 1
            continue
        found.append({"image": path, "classes": answers})
        line = ", ".join(f"{answer['class']} {100 * answer['probability']:.1f} %" for answer in answers)
        print(json.dumps(found[-1]) if args.json else printable(f"{path}: {line}"))
    if bad:
        sys.exit(1)
    return found


def name_checkpoint(args: argparse.Namespace) -> None:
    """Fill in args.model_path where it is not given: the first of the other names, or a released file of --arch."""
    if args.model_path is None and args.images:
        first = Path(args.images[0])
        if first.suffix in (".pt", ".pth", ".tar") or any((first / name).exists() for name in weights.RUN_FILES):
            args.model_path = args.images.pop(0)
    if args.model_path is None:
        large = args.dataset == "imagenet" or args.arch == "DDSAS_imagenet"
        if (args.arch, large) not in RELEASED:
            names = ", ".join(dict.fromkeys(name for name, _ in RELEASED))
            wanted = f"name a checkpoint file or a run folder, or with --arch one of {names}"
            raise UserError(f"--model_path is missing: {wanted}")
        args.model_path = str(WEIGHTS / RELEASED[args.arch, large])


def tested_on(args: argparse.Namespace, checkpoint: dict, network: model.Network) -> tuple[str, int | None]:
    """(dataset, image size) from the arguments, else what the checkpoint was trained on, else what the stem is for."""
    own, size = checkpoint.get("dataset"), checkpoint.get("image_size")
    default = "imagenet" if isinstance(network, model.NetworkImageNet) else "cifar10"
    dataset = args.dataset or (own if isinstance(own, str) and own in data.INFO else default)
    if args.image_size or dataset != own and data.INFO[dataset].read:  # which has a size of its own
        return dataset, args.image_size
    if size is not None and (type(size) is not int or size > MAX_IMAGE_SIZE):
        raise UserError(f"{args.model_path} does not say for images of how many pixels it is: give --image_size")
    return dataset, size


def check_fits(path: str, network: model.Network, info: data.Info, dataset: str) -> None:
    """UserError if the network has other classes than the dataset, or is for other images."""
    large = utils.stem_for(info, dataset) == "imagenet"
    if large != isinstance(network, model.NetworkImageNet):
        has, needs = ("small", "large") if large else ("large", "small")
        wanted = f"{dataset} at {info.image_size} pixels needs the one for {needs} ones"
        raise UserError(f"{path}: checkpoint has the network for {has} images, {wanted}; check --dataset, --image_size")
    classes = network.classifier.out_features
    if info.num_classes not in (0, classes):
        raise UserError(f"{path}: checkpoint has {classes} classes, {dataset} has {info.num_classes}")


def load_network(args: argparse.Namespace) -> tuple[dict, model.Network]:
    """(checkpoint, network with its weights, without an auxiliary head) of --model_path; UserError: what is wrong."""
    path = weights.find_checkpoint(args.model_path, args.best)
    if not path.exists() and path.parent == WEIGHTS:
        raise UserError(f'{path} is not there: README\'s section "Released weights" says where its authors put it')
    last = path == Path(args.model_path, "checkpoint.pt")  # of a run: where it is damaged, the one before will do
    checkpoint = checkpoints.load_checkpoint(path) if last else checkpoints.read_weights(path)
    tensors = weights.find_tensors(path, checkpoint)
    if OF_SEARCH & checkpoint.keys() or any(map(SUPERNET.match, tensors)):
        raise UserError(f"{path} is of a search, no trained network is in it; {advise(path, checkpoint, tensors)}")
    own = checkpoint.get("genotype")
    if not args.arch and not isinstance(own, str):
        raise UserError(f"{path} does not say which genotype it is of: give it with --arch, such as DDSAS_cifar10")
    genotype = genotypes.load(args.arch) if args.arch else genotypes.parse(own)  # which names no other file
    cells = args.layers or checkpoint.get("layers", 5) if isinstance(genotype, Genotype201) else None
    size = weights.measure(path, tensors, args, cells)
    second_bn = "auxiliary_head.features.6.weight" in tensors
    arch = args.arch if args.arch and len(args.arch) < 60 else "its genotype"
    network = weights.fill(path, tensors, lambda: model.network_for(*size, genotype, second_bn), arch)
    network.genotype = genotype
    if hasattr(network, "auxiliary_head"):
        del network.auxiliary_head  # training only
    return checkpoint, network


def advise(path: Path, checkpoint: dict, tensors: dict[str, Tensor]) -> str:
    """What a search's checkpoint has found, and the command that trains it."""
    found, beside = derive_genotype(checkpoint, tensors), path.parent / "genotype.txt"
    if not found and OF_SEARCH & checkpoint.keys() and beside.exists():
        found = genotypes.load(str(beside))
    if not found:
        return "it does not tell which cell it found; with one that you know: python retrain.py --arch GENOTYPE"
    large = "--dataset imagenet " if "stem1.1.weight" in tensors else ""
    return f'what it found is trained by: python retrain.py {large}--arch "{found}"'


def derive_genotype(checkpoint: dict, tensors: dict[str, Tensor]) -> Genotype | None:
    """The genotype in DDSAS' checkpoint of a search, published or ours: that of saliency times availability.

    Their columns are in the order of the space's primitives, which a published file does not name: they are those of a
    known space that has the layers of the file. None without saliency, where no space fits, or where several with
    different results do.
    """
    tables, edge = weights.find_saliency(checkpoint, tensors), "cells.0._ops.13."  # the last edge has stride 1
    layers = {name.removeprefix(edge): t.shape[2:] for name, t in tensors.items() if name.startswith(edge)}
    found = set()
    for primitives in (space.primitives for space in SPACES.values() if tables and space.cells == "darts"):
        with torch.device("meta"):
            expected = {name: t.shape[2:] for name, t in MixedOp(4, 1, primitives).state_dict().items()}
        size, none = (EDGES, len(primitives)), np.array(primitives) == "none"
        if layers == expected and all(t.shape == size and np.isfinite(t).all() for t in tables.values()):
            chosen = {kind: np.where(none, -np.inf, table) for kind, table in tables.items()}
            found.add(str(two_edges_a_node(chosen, primitives)))
    return genotypes.parse(found.pop()) if len(found) == 1 else None


def count(args: argparse.Namespace) -> list[dict]:
    """Parameters and multiply-adds of --arch, or of every genotype by name, at the size it is retrained with.

    Prints a table in Markdown: 36 channels and 20 cells for small images, --mobile's channels and 14 cells for large.
    """
    dataset = args.dataset or "cifar10"
    info = data.lookup(dataset, args.image_size)
    large = utils.stem_for(info, dataset) == "imagenet"
    classes, layers = info.num_classes or 1000, args.layers or (14 if large else 20)
    for arch, reason in {} if args.arch else genotypes.broken().items():
        print(f"warning: {arch} in genotypes.py is not counted: {reason}", file=sys.stderr)
    rows, texts = [], ["genotype dataset channels cells parameters multiply-adds".split()]
    for arch in [args.arch] if args.arch else genotypes.names():
        genotype = genotypes.load(arch)
        C = args.init_channels or (model.mobile_channels(genotype, layers, classes) if large else 36)
        with torch.device("meta"):
            network = model.network_for(large, C, classes, layers, False, genotype)
            costs = model.count_parameters(network) / 1e6, model.count_multiply_adds(network, info.image_size) / 1e6
        row = {"genotype": arch, "dataset": dataset, "channels": C, "cells": layers}
        rows.append(row | {"parameters_m": costs[0], "multiply_adds_m": costs[1]})
        texts.append([*map(str, row.values()), f"{costs[0]:.3f} M", f"{costs[1]:.1f} M"])
    print(json.dumps(rows) if args.json else markdown_table(texts))
    return rows


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE|FOLDER", help="say the classes of these instead of a test")
    add = parser.flags("checkpoint")
    add("--model_path", str, None, "checkpoint or run folder; may also stand before the images", metavar="FILE|RUN")
    add("--best", bool, False, "of a run folder the checkpoint of the best test accuracy, not the last one")
    add("--arch", str, None, "name, genotype.txt, run folder or Genotype(...); default: the checkpoint's own")
    add("--init_channels", cli.SIZE, None, "checked against the checkpoint", metavar="C")
    add("--layers", number(int, 1, weights.MAX_CELLS), None, "checked against the checkpoint")
    add = parser.flags("data")
    add("--data", str, ".data", "folder of the datasets, or of your own images", metavar="DIR")
    add("--dataset", list(data.INFO), None, "default: the checkpoint's own")
    add("--image_size", number(int, 8, 10_000), None, "for folder and imagenet", metavar="PIXELS")
    add("--bad_images", ["stop", "skip"], "stop", "what unreadable images cause")
    add("--batch_size", cli.SIZE, 96, "per process")
    add("--workers", number(int, 0, 1000), 2, "processes that load images from files")
    add = parser.flags("how and what")
    add("--device", str, "auto", "auto (cuda if there, else cpu), cpu, cuda, cuda:N")
    add("--gpu", cli.COUNT, None, "use GPU number N", metavar="N")
    add("--amp", bool, False, "bfloat16 on CUDA")
    parser.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True, help="see retrain.py")
    add("--json", bool, False, "print the results as json, a line for each image")
    add("--export", str, None, "before the test write the network as onnx or pt2", nargs=2, metavar=("FORMAT", "FILE"))
    add("--count", bool, False, "test nothing: parameters and multiply-adds of genotypes")
    parser.ignore("--auxiliary", "--drop_path_prob", "--seed", "--report_freq", "--cutout", "--cutout_length")
    parser.ignore("--local_rank", "--local-rank")  # of torch.distributed.launch
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
