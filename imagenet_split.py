"""The two subsets of ImageNet that a search reads: 10 % of each class to train weights, 2.5 % for the architecture.

    python imagenet_split.py --data .data/imagenet --out .data/imagenet_split
    python imagenet_split.py --data .data/imagenet --out .data/imagenet_split --check     # open every image instead

Reads DATA/train/<class>/*.JPEG and makes OUT/train/<class>/ and OUT/val/<class>/, disjoint, as hard links: no image is
stored twice. The papers give the fractions of a class, not its images: the choice is this script's, by a seed, and the
same arguments always pick the same images. A run that was interrupted completes when started again.
"""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np

from lib.checkpoints import write_whole
from lib.cli import Parser, UserError, number, progress, run_script
from lib.images import list_classes, list_names, read_image

PARTS = ("train", "val")
MANIFEST = "split.json"  # written last: it marks a finished split
TEMPORARY = ".part"  # ending of a copy that is under way


def main(args: argparse.Namespace) -> None:
    """Make the split, or with ``--check`` look at every image."""
    data, out = Path(args.data), Path(args.out)
    if not (data / "train").is_dir():
        raise UserError(f"--data {data}: no folder {data / 'train'}; expected {data}/train/<class>/<image>")
    if args.check:
        check(data, out)
    else:
        split(data, out, args)


def split(data: Path, out: Path, args: argparse.Namespace) -> None:
    """Place the picked images of every class; a finished split is left as it is."""
    check_arguments(data, out, args)
    wanted = {"data": os.path.relpath(data.resolve(), out.resolve())}  # relative: both folders may move together
    wanted |= {"train": args.train, "val": args.val, "seed": args.seed, "mode": args.mode}
    if (out / MANIFEST).exists():
        print(f"{out}: finished before, {recognise(out, wanted)}")
        return
    classes = list_classes(data / "train", least=1)
    plan = {name: pick(name, [file for file, _ in files], args) for name, files in classes.items()}
    check_leftovers(out, plan)
    for name, parts in progress(plan.items(), desc=f"{args.mode} images"):
        for part, images in parts.items():
            place(data / "train" / name, out / part / name, images, args.mode)
    counts = {part: sum(len(parts[part]) for parts in plan.values()) for part in PARTS}
    write_whole(out / MANIFEST, json.dumps(wanted | {"classes": len(plan), "images": counts}, indent=2) + "\n")
    print(f"{out}: {described(json.loads((out / MANIFEST).read_text()))}")


def check_arguments(data: Path, out: Path, args: argparse.Namespace) -> None:
    """UserError for fractions or an output folder that no split can have."""
    if not (0 < args.train < 1 and 0 < args.val < 1 and args.train + args.val <= 1):
        raise UserError(f"--train {args.train} --val {args.val}: expected two fractions of a class, together at most 1")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file, expected a folder")
    source, target = (data / "train").resolve(), out.resolve()
    if target == data.resolve() or target == source or source in target.parents:
        raise UserError(f"--out {out}: would mix the split with the images of {source}; give a folder of its own")


def recognise(out: Path, wanted: dict) -> str:
    """A line about the finished split in ``out``; UserError if it was made with other arguments than ``wanted``."""
    try:
        made = json.loads((out / MANIFEST).read_text())
        line = described(made)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{out / MANIFEST}: not written by imagenet_split.py; give another --out") from None
    for name, value in wanted.items():
        if made.get(name) != value:
            found = f"{out} is a finished split with {name} = {made.get(name)}, asked for {value}"
            raise UserError(f"{found}; nothing was changed: give another --out, or remove that folder first")
    return line


def described(manifest: dict) -> str:
    """The contents of a finished split in a line."""
    images = manifest["images"]
    return f"{manifest['classes']} classes, {images['train']} images in train/ and {images['val']} in val/"


def pick(name: str, files: list[str], args: argparse.Namespace) -> dict[str, list[str]]:
    """The images of one class for each part: the given fractions, rounded, at least one each and never the same.

    The generator is seeded with the seed and the name of the class, so that neither the order in which the file system
    lists images nor the other classes change the choice.
    """
    if len(files) < len(PARTS):
        raise UserError(f"class {name}: {len(files)} images, a split needs at least {len(PARTS)} in each class")
    num_train = min(max(1, round(args.train * len(files))), len(files) - 1)
    num_val = min(max(1, round(args.val * len(files))), len(files) - num_train)
    order = np.random.default_rng([args.seed, *os.fsencode(name)]).permutation(len(files))
    chosen = [files[i] for i in order[: num_train + num_val]]
    return {"train": sorted(chosen[:num_train]), "val": sorted(chosen[num_train:])}


def check_leftovers(out: Path, plan: dict[str, dict[str, list[str]]]) -> None:
    """Everything in ``out`` must be part of the split, as an interrupted run left it; UserError otherwise.

    Unfinished copies are removed.
    """
    for part in PARTS:
        planned = {out / part / name / file for name, parts in plan.items() for file in parts[part]}
        for path in (path for path in (out / part).rglob("*") if not path.is_dir()):
            if path.name.endswith(TEMPORARY):
                path.unlink()
            elif path not in planned:
                other = f"{out} holds the files of another one, or of an interrupted run with other arguments"
                raise UserError(f"{path} does not belong to this split: {other}; give an empty --out")


def place(source: Path, target: Path, images: list[str], mode: str) -> None:
    """Link or copy images of a class; those that are there already stay. Each is whole or absent at any moment."""
    for name in images:
        if not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            link((source / name).resolve(), target / name) if mode == "link" else copy(source / name, target / name)


def link(source: Path, target: Path) -> None:
    """A hard link, or a UserError that says what to do where the file system has none."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            apart = f"{source} and {target.parent} lie on different file systems, where no hard links are possible"
            raise UserError(f"{apart}: use --mode copy, or an --out beside the images") from None
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise UserError(f"{source}: cannot be hard-linked ({error.strerror}): use --mode copy") from None
        raise


def copy(source: Path, target: Path) -> None:
    """A copy that has its name only when it is whole."""
    temporary = target.with_name(target.name + TEMPORARY)
    try:
        shutil.copy2(source, temporary)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"disk full at {target}: free space and run the same command again, it completes") from None
        raise
    temporary.replace(target)


def check(data: Path, out: Path) -> None:
    """Open every image of both folders, list the unreadable ones and exit with 1 if there are any."""
    paths = {}  # by file, so that the hard links of a split are not opened again
    for part in (root / part for root in (data, out) for part in PARTS if (root / part).is_dir()):
        for name, files in list_classes(part, least=1).items():
            for path in (part / name / file for file, _ in files):
                status = path.stat() if path.exists() else None
                paths.setdefault((status.st_dev, status.st_ino) if status else path, str(path))
    bad = 0
    with multiprocessing.Pool(2) as pool:
        lines = pool.imap(unreadable, paths.values(), chunksize=32)
        for line in filter(None, progress(lines, total=len(paths), desc="opening")):
            bad += 1
            print(list_names([line]), flush=True)
    print(f"{len(paths)} images opened, {bad} unreadable")
    if bad:
        raise SystemExit(1)


def unreadable(path: str) -> str | None:
    """The path and why no network can be trained on it; None if it is a good image."""
    image = read_image(path)
    return image if isinstance(image, str) else None


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--data", default=".data/imagenet", help="folder with train/<class>/<image>")
    parser.add_argument("--out", default=".data/imagenet_split", help="the split: train/<class>/ and val/<class>/")
    parser.add_argument("--train", type=float, default=0.1, help="fraction of each class that trains the weights")
    parser.add_argument("--val", type=float, default=0.025, help="fraction that trains the architecture")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--mode", choices=("link", "copy"), default="link", help="hard links take no space")
    parser.add_argument("--check", action="store_true", help="make nothing; open every image, list the unreadable ones")
    return parser


if __name__ == "__main__":
    run_script(main, get_parser())
