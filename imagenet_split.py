"""The two subsets of ImageNet that a search reads: 10 % of each class to train weights, 2.5 % for the architecture.

    python imagenet_split.py --data .data/imagenet --out .data/imagenet_split

Reads DATA/train/<class>/*.JPEG and makes OUT/train/<class>/ and OUT/val/<class>/, disjoint, as hard links, or symbolic
ones on another file system: no image is stored twice. The papers give the fractions of a class, not its images: the
choice is this script's, by a seed, and the same arguments always pick the same images. A run that was interrupted
completes when started again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np

from lib.checkpoints import write_whole
from lib.cli import Parser, UserError, number, progress, run_script
from lib.images import list_classes
from lib.records import read_json

MANIFEST = "split.json"  # written first


def main(args: argparse.Namespace) -> None:
    """Place the picked images of every class, those of them that are not there yet."""
    data, out = Path(args.data), Path(args.out)
    if not (data / "train").is_dir():
        raise UserError(f"--data {data}: no folder {data / 'train'}; expected {data}/train/<class>/<image>")
    if not (0 < args.train < 1 and 0 < args.val < 1 and args.train + args.val <= 1):
        raise UserError(f"--train {args.train} --val {args.val}: expected two fractions of a class, together at most 1")
    source, target = (data / "train").resolve(), out.resolve()
    if target == data.resolve() or source in (target, *target.parents):
        raise UserError(f"--out {out}: would mix the split with the images of {source}; give a folder of its own")
    classes = list_classes(data / "train", least=1)
    plan = {name: pick(name, [file for file, _ in files], args) for name, files in classes.items()}
    images = {part: sum(len(parts[part]) for parts in plan.values()) for part in ("train", "val")}
    manifest = {"data": os.path.relpath(data.resolve(), target)}  # relative: both folders may move together
    manifest |= {"train": args.train, "val": args.val, "seed": args.seed, "classes": len(plan), "images": images}
    claim(out, manifest)
    for name, parts in progress(plan.items(), desc="link images"):
        for part, files in parts.items():
            place(data / "train" / name, out / part / name, files)
    print(f"{out}: {len(plan)} classes, {images['train']} images in train/ and {images['val']} in val/")


def claim(out: Path, manifest: dict) -> None:
    """Make the folder of a split, or find it as an earlier run has left it; UserError if it is anything else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file, expected a folder")
    if not (out / MANIFEST).exists():
        if out.is_dir() and os.listdir(out):
            raise UserError(f"--out {out}: holds files, none of them {MANIFEST}; give an empty --out")
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    made = read_json(out / MANIFEST)
    for name, value in manifest.items():
        if made.get(name) != value:
            found = f"{out} is a split with {name} = {made.get(name)}, asked for {value}"
            raise UserError(f"{found}; nothing was changed: give another --out, or remove that folder first")


def pick(name: str, files: list[str], args: argparse.Namespace) -> dict[str, list[str]]:
    """The images of one class for each part: the given fractions, rounded, at least one each and never the same.

    The generator is seeded with the seed and the name of the class, so that neither the order in which the file system
    lists images nor the other classes change the choice.
    """
    if len(files) < 2:
        raise UserError(f"class {name}: {len(files)} images, a split needs at least 2 in each class")
    num_train = min(max(1, round(args.train * len(files))), len(files) - 1)
    num_val = min(max(1, round(args.val * len(files))), len(files) - num_train)
    order = np.random.default_rng([args.seed, *os.fsencode(name)]).permutation(len(files))
    chosen = [files[i] for i in order[: num_train + num_val]]
    return {"train": sorted(chosen[:num_train]), "val": sorted(chosen[num_train:])}


def place(source: Path, target: Path, images: list[str]) -> None:
    """Link the images of a class; those that are there already stay."""
    for name in images:
        original, link = (source / name).resolve(), target / name
        if not os.path.lexists(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(original, link)
            except OSError:  # on another file system, or on one that has no hard links
                os.symlink(original, link)


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--data", default=".data/imagenet", help="folder with train/<class>/<image>")
    parser.add_argument("--out", default=".data/imagenet_split", help="the split: train/<class>/ and val/<class>/")
    parser.add_argument("--train", type=float, default=0.1, help="fraction of each class that trains the weights")
    parser.add_argument("--val", type=float, default=0.025, help="fraction that trains the architecture")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    return parser


if __name__ == "__main__":
    run_script(main, get_parser())
