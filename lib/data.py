"""Datasets and loaders: one table of datasets, three functions that open them.

    search_data(name, root, ...) -> train, valid, info     the two halves a search sees; never the test set
    train_data(name, root, ...)  -> train, test, info      retraining
    test_data(name, root, ...)   -> test, info             evaluation, by what a checkpoint knows of its classes

Small datasets live as one uint8 tensor on the device, and crop, flip and cutout are done there on whole batches: image
by image through PIL the same takes about 20 times as long, and a small supernet waits for it. Large folders of images
are read by DataLoader workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import os
import socket
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lib.cli import UserError
from lib.images import File, channel_statistics, list_classes, list_names
from lib.loaders import (
    SPLIT,
    Arrays,
    Info,
    InMemory,
    Loader,
    OnDisk,
    Options,
    Sample,
    check_shared_memory,
    generator,
    read_images,
)

FASHION_MINI = Path(__file__).parent.parent / "fashion_mini.npz"
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts its files
FASHION_FILES = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


# ---- Reading the datasets that come as arrays ------------------------------------------------------------------------
def read_cifar(name: str, root: Path, train: bool) -> Arrays:
    """CIFAR10 or CIFAR100 from `root`, downloaded by torchvision if it is not there. Raises UserError if that fails."""
    from torchvision import datasets  # slow to import

    dataset = getattr(datasets, name)
    files = ", ".join(name for name, _ in dataset.train_list + dataset.test_list + [(dataset.meta["filename"], "")])
    advice = f"put {dataset.filename} (from {dataset.url}) or the folder {dataset.base_folder} ({files}) into {root}"
    images = _downloaded(dataset, root, train, advice)
    return images.data, np.asarray(images.targets, dtype=np.int64)


def read_fashion(root: Path, train: bool) -> Arrays:
    """Fashion-MNIST from `root` (torchvision's layout or its four files), Debian's package or a download."""
    names = FASHION_FILES[:2] if train else FASHION_FILES[2:]
    raw = root / "FashionMNIST" / "raw"
    places = (
        [place / f"{name}{end}" for place in (raw, root, FASHION_DEBIAN) for end in ("", ".gz")] for name in names
    )
    files = [next(filter(Path.is_file, paths), None) for paths in places]
    if all(files):
        images, labels = map(_read_idx, files)
    else:
        wanted = ", ".join(f"{name}.gz" for name in FASHION_FILES)
        advice = f"put {wanted} into {raw}, or install Debian's package dataset-fashion-mnist"
        from torchvision import datasets  # slow to import

        images = _downloaded(datasets.FashionMNIST, root, train, advice)
        images, labels = images.data.numpy(), images.targets.numpy()
    return as_rgb(images), labels.astype(np.int64)


def read_fashion_mini(root: Path, train: bool) -> Arrays:
    """The embedded part of Fashion-MNIST: the first 1,000 training and 200 test images of each class, in their order.

    fashion_mini.npz was made with np.savez_compressed of {train,test}_images (N x 28 x 28) and {train,test}_labels, cut
    from the files that `read_fashion` reads. Fashion-MNIST is Zalando Research's (Xiao, Rasul, Vollgraf, 2017), MIT
    licence. `root` is not used.
    """
    part = "train" if train else "test"
    try:
        with np.load(FASHION_MINI, allow_pickle=False) as arrays:
            return as_rgb(arrays[f"{part}_images"]), arrays[f"{part}_labels"].astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, zlib.error) as error:
        advice = f"restore it, git checkout {FASHION_MINI.name}"
        raise UserError(f"cannot read {FASHION_MINI} ({error}): {advice}") from error


def as_rgb(images: np.ndarray) -> np.ndarray:
    """Grey N x 28 x 28 -> N x 32 x 32 x 3: two zero pixels on each side, the same values in three channels."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return np.repeat(padded[..., None], 3, axis=3)


def _read_idx(path: Path) -> np.ndarray:
    """A uint8 array in the idx format of MNIST: 2 zero bytes, type 8, rank, the sizes (big endian), the values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if data[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of bytes")
        rank = data[3]
        shape = np.frombuffer(data, ">u4", count=rank, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read {path} ({error}): delete it and run again, or replace it") from error


def _downloaded(dataset: type, root: Path, train: bool, advice: str):
    """The torchvision dataset in `root`; downloaded if it is missing, and one line of advice if that fails."""
    with contextlib.suppress(OSError, RuntimeError):  # not there, or not whole
        return dataset(root, train, download=False)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)  # seconds without an answer: a machine without a network must not hang
    try:
        return dataset(root, train, download=True)
    except (OSError, RuntimeError, EOFError) as error:  # no network (a URLError), no space, a wrong checksum
        reason = " ".join(str(error).split())  # in one line
        missing = f"no {dataset.__name__} in {root}, and the download failed ({reason})"
        raise UserError(f"{missing}: {advice}, or name another --data") from error
    finally:
        socket.setdefaulttimeout(timeout)


# ---- The table -------------------------------------------------------------------------------------------------------
CIFAR10_MEAN, CIFAR10_STD = (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# of the 60,000 training images at 28 x 28, without the padding; fashion_mini is normalised by the same numbers
FASHION_MEAN, FASHION_STD = (0.28604060,) * 3, (0.35302424,) * 3
CIFAR10_NAMES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
CIFAR100_NAMES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
    """.split()
)
FASHION_NAMES = "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"

INFO: dict[str, Info] = {
    "cifar10": Info(10, CIFAR10_MEAN, CIFAR10_STD, read=partial(read_cifar, "CIFAR10"), class_names=CIFAR10_NAMES),
    "cifar100": Info(
        100, CIFAR100_MEAN, CIFAR100_STD, read=partial(read_cifar, "CIFAR100"), class_names=CIFAR100_NAMES
    ),
    "fashion_mnist": Info(10, FASHION_MEAN, FASHION_STD, read=read_fashion, class_names=FASHION_NAMES),
    "fashion_mini": Info(10, FASHION_MEAN, FASHION_STD, read=read_fashion_mini, class_names=FASHION_NAMES),
    "imagenet": Info(
        *(0, IMAGENET_MEAN, IMAGENET_STD, 224),
        halved=False,
        test_folders=("val",),
        test_scale=256 / 224,
        memory_limit=0,
        hint="; name the folder of ImageNet with --data, for a search the one that imagenet_split.py made",
    ),
    "folder": Info(0, IMAGENET_MEAN, IMAGENET_STD, hint="; name your folder of images with --data"),
}


# ---- Opening a dataset -----------------------------------------------------------------------------------------------
def search_data(name: str, root: str | Path, *, train_portion: float = 0.5, **options) -> tuple[Loader, Loader, Info]:
    """(train, valid, info) of a search: weights are trained on the first, alpha and beta on the second, both augmented.

    A seeded permutation gives `train_portion` of the training images to the first and the rest to the second; the test
    images are not opened. ImageNet has the two subsets ready in train/ and val/ (imagenet_split.py). `options` are
    those of `Options`, batch_size at least. Raises UserError for all that is wrong with the request or the files.
    """
    if not 0 < train_portion < 1:
        raise UserError(f"train_portion is {train_portion}, expected a number between 0 and 1 (both excluded), as 0.5")
    options = Options(**options)
    if lookup(name).halved:
        info, (images,) = _open(name, root, options, "train")
        order = generator(options.seed, SPLIT).permutation(len(images))
        split = int(train_portion * len(images))
        train, valid = images.take(order[:split]), images.take(order[split:])
    else:
        info, (train, valid) = _open(name, root, options, "train", "test")
    check_shared_memory(train, loaders=2)  # both are read in each step
    return Loader(train, "training images", options), Loader(valid, "validation images", options, stream=1), info


def train_data(name: str, root: str | Path, **options) -> tuple[Loader, Loader, Info]:
    """(train, test, info) of retraining: all training images, augmented, and the test images.

    Images that are read from disk get colour jitter as well. Arguments and errors as in `search_data`.
    """
    options = Options(**options, jitter=True)
    info, (train, test) = _open(name, _whole_imagenet(name, root), options, "train", "test")
    check_shared_memory(train)
    return Loader(train, "training images", options), Loader(test, "test images", options, training=False), info


def test_data(name: str, root: str | Path, **options) -> tuple[Loader, Info]:
    """(test, info). Arguments and errors as in `search_data`.

    With the `mean`, `std` and `class_names` that a network was trained with, images are normalised by these, and labels
    are indices into these names, whatever else is in `root`; classes that the network does not know are refused.
    Without them the classes are those found, and `folder` reads its training images too, for their mean and deviation.
    """
    options = Options(**options)
    info, (test,) = _open(name, _whole_imagenet(name, root), options, "test")
    check_shared_memory(test)
    return Loader(test, "test images", options, training=False), info


def lookup(name: str, image_size: int | None = None) -> Info:
    """The table's entry, with another image size where the dataset has no size of its own. Raises UserError."""
    if name not in INFO:
        raise UserError(f"unknown dataset {name!r}: choose one of {', '.join(INFO)}")
    info = INFO[name]
    if image_size in (None, info.image_size):
        return info
    if info.read:
        raise UserError(f"{name} has images of {info.image_size} pixels: --image_size is for folder and imagenet")
    return dataclasses.replace(info, image_size=image_size)


def _whole_imagenet(name: str, root: str | Path) -> Path:
    """The folder of ImageNet: ``root`` with train/ and val/ in it, or its subfolder imagenet/, as P-DARTS has it."""
    root, inside = Path(root).expanduser(), Path(root, "imagenet").expanduser()
    return inside if name == "imagenet" and inside.is_dir() and not (root / "train").is_dir() else root


def _open(name: str, root: str | Path, options: Options, *parts: str) -> tuple[Info, list[InMemory | OnDisk]]:
    """The images of the parts ("train", "test"), and the Info completed by what was found."""
    info, root = lookup(name, options.image_size), Path(root).expanduser()
    options = dataclasses.replace(options, cutout=cutout_length(options.cutout, info.image_size))
    if options.mean is not None:
        info = dataclasses.replace(info, mean=tuple(options.mean), std=tuple(options.std))
    if not info.read:
        return _open_folder(info, root, options, parts)
    arrays = {part: _in_turn(info.read, root, part, options) for part in parts}
    own = info.class_names or tuple(map(str, range(info.num_classes)))
    names = tuple(options.class_names or own)
    _check_known(own, names, name)
    content = [name, *((part, images.shape) for part, (images, _) in arrays.items())]
    info = dataclasses.replace(info, num_classes=len(names), class_names=names, data_hash=_hash(content))
    indices = np.array([names.index(name) for name in own])  # of own labels among the names
    return info, [InMemory(images, indices[labels], info, options) for images, labels in arrays.values()]


def _open_folder(info: Info, root: Path, options: Options, parts: Sequence[str]) -> tuple[Info, list]:
    """`_open` where images are files in class folders."""
    places = [root / name for name in info.test_folders]
    folders = {"train": root / "train", "test": next((place for place in places if place.is_dir()), places[0])}
    statistics = info.memory_limit and options.mean is None  # of the training images are wanted
    needed = [part for part in folders if part in parts or part == "train" and statistics]
    found = {part: list_classes(folders[part], info.hint, 1 if options.class_names else 2) for part in needed}
    names = tuple(options.class_names or found[needed[0]])
    for part in needed:
        _check_known(found[part], names, str(folders[part]))
        if not options.class_names and (missing := set(names) - set(found[part])):
            raise UserError(f"no class folder {list_names(sorted(missing))} in {folders[part]}: {folders['train']} has")
    content = [(part, list(found[part].items())) for part in parts]
    info = dataclasses.replace(info, num_classes=len(names), class_names=names, data_hash=_hash(content))
    samples = {part: _samples(folders[part], found[part], names) for part in needed}
    if max(map(len, samples.values())) * info.image_size**2 * 3 >= info.memory_limit:
        return info, [OnDisk(samples[part], info, options) for part in parts]
    images = {part: read_images(samples[part], info, options) for part in needed}
    if statistics:
        mean, std = channel_statistics(images["train"].images.cpu().numpy())
        info = dataclasses.replace(info, mean=mean, std=std)
        for part in parts:
            images[part].info = info
    return info, [images[part] for part in parts]


def _samples(folder: Path, classes: dict[str, list[File]], names: Sequence[str]) -> list[Sample]:
    """(path, label) of each image; labels are indices into `names`."""
    labels = {name: label for label, name in enumerate(names)}
    return [(os.path.join(folder, name, file), labels[name]) for name, files in classes.items() for file, _ in files]


def cutout_length(length: int | None, image_size: int) -> int:
    """The side of cutout's square, pixels: by default half of the image's, as published. Raises UserError."""
    if length is None:
        return image_size // 2
    if length >= image_size:
        half = f"expected less, or none to take half of it ({image_size // 2})"
        raise UserError(f"cutout of {length} pixels blanks images of {image_size}: {half}")
    return length


def _check_known(found: Iterable[str], known: Sequence[str], where: str) -> None:
    """UserError with both lists if classes were found that the network, or the training folder, does not have."""
    if strange := sorted(set(found) - set(known)):
        raise UserError(f"{where} has classes that are not known: {list_names(strange)}; known: {list_names(known)}")


def _hash(content: list) -> str:
    """SHA-256 of nested lists of strings and numbers."""
    return hashlib.sha256(repr(content).encode("utf-8", "surrogateescape")).hexdigest()


def _in_turn(read: Callable[[Path, bool], Arrays], root: Path, part: str, options: Options) -> Arrays:
    """Read arrays; with several processes the first one goes ahead, so that only one downloads."""
    wait = torch.distributed.barrier if options.world_size > 1 and torch.distributed.is_initialized() else int
    if options.rank > 0:
        wait()
    try:
        return read(root, part == "train")
    finally:
        if options.rank == 0:
            wait()
