"""Datasets and loaders: one table of datasets, three functions that open them.

    search_data(name, root, ...) -> train, valid, info     the two halves a search sees; never the test set
    train_data(name, root, ...)  -> train, test, info      retraining
    test_data(name, root, ...)   -> test, info             evaluation

Small datasets live as one uint8 tensor on the device, and crop, flip and cutout are done there on whole batches: image
by image through PIL the same takes about 20 times as long, and a small supernet waits for it. Large folders of images
are read by DataLoader workers.

Every batch is a pure function of (seed, epoch, step): its random numbers come from a generator seeded with just these.
So a resumed run needs no state of its loaders, and several processes all draw the same global batch and each takes its
slice of it: two processes with batch B see the images, crops and flips of one process with batch 2B.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import itertools
import logging
import multiprocessing
import os
import signal
import socket
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import v2

from lib.cli import UserError, progress
from lib.distributed import to_device

log = logging.getLogger(__name__)

Arrays = tuple[np.ndarray, np.ndarray]  # images N x H x W x 3 (uint8), labels N (int64)
Batch = tuple[Tensor, Tensor]  # images B x 3 x H x W (float32, normalised, channels_last), labels B (int64)
Sample = tuple[str, int]  # path of an image, label

FASHION_MINI = Path(__file__).parent.parent / "fashion_mini.npz"
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts its files
FASHION_FILES = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


# ---- Reading the datasets that come as arrays ------------------------------------------------------------------------
def read_cifar(dataset: type[datasets.CIFAR10], root: Path, train: bool) -> Arrays:
    """CIFAR-10 or -100 from `root`, downloaded by torchvision if it is not there. Raises UserError if that fails."""
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
@dataclasses.dataclass(frozen=True)
class Info:
    """What is known of a dataset. Means and deviations are of the pixels' values in 0..1, per channel."""

    num_classes: int  # 0: as many as there are class folders
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int = 32
    read: Callable[[Path, bool], Arrays] | None = None  # None: class folders under root
    halved: bool = True  # a search halves the training images; else it takes train/ and the test folder as they are
    test_folders: tuple[str, ...] = ("test", "val")  # the first that is there
    memory_limit: int = 2 << 30  # bytes: fewer images live in memory, and mean and std are those of the training images
    hint: str = ""  # how to get the folder


CIFAR10_MEAN, CIFAR10_STD = (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# of the 60,000 training images at 28 x 28, without the padding; fashion_mini is normalised by the same numbers
FASHION_MEAN, FASHION_STD = (0.28604060,) * 3, (0.35302424,) * 3
IMAGENET_HINT = "; name the folder of ImageNet with --data, for a search the one that imagenet_split.py made"

INFO: dict[str, Info] = {
    "cifar10": Info(10, CIFAR10_MEAN, CIFAR10_STD, read=lambda *a: read_cifar(datasets.CIFAR10, *a)),
    "cifar100": Info(100, CIFAR100_MEAN, CIFAR100_STD, read=lambda *a: read_cifar(datasets.CIFAR100, *a)),
    "fashion_mnist": Info(10, FASHION_MEAN, FASHION_STD, read=read_fashion),
    "fashion_mini": Info(10, FASHION_MEAN, FASHION_STD, read=read_fashion_mini),
    "imagenet": Info(
        *(0, IMAGENET_MEAN, IMAGENET_STD, 224), halved=False, test_folders=("val",), memory_limit=0, hint=IMAGENET_HINT
    ),
    "folder": Info(0, IMAGENET_MEAN, IMAGENET_STD, hint="; name your folder of images with --data"),
}


# ---- Opening a dataset -----------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Options:
    """How images are read, the same for all datasets. Raises UserError for a number that cannot be."""

    batch_size: int  # per process
    seed: int = 0  # of the halves of a search, the order of images and their augmentation
    cutout: int = 0  # side of the square that is cut out of training images, pixels; 0 for none
    device: torch.device | str = "cpu"
    image_size: int | None = None  # pixels, for folder and imagenet; None: the table's
    workers: int = 2  # processes or threads that read image files; 0: the main process
    rank: int = 0
    world_size: int = 1
    bad_images: str = "stop"  # or "skip": they are named and left out
    jitter: bool = False  # colour jitter on training images read from disk
    quiet: bool = False  # no progress bar while images are read

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "seed": 0, "cutout": 0, "workers": 0, "image_size": 8}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{name} is {value}, expected {least} or more")


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
        order = _generator(options.seed, SPLIT).permutation(len(images))
        split = int(train_portion * len(images))
        train, valid = images.take(order[:split]), images.take(order[split:])
    else:
        info, (train, valid) = _open(name, root, options, "train", "test")
    return Loader(train, "training images", options), Loader(valid, "validation images", options, stream=1), info


def train_data(name: str, root: str | Path, **options) -> tuple[Loader, Loader, Info]:
    """(train, test, info) of retraining: all training images, augmented, and the test images.

    Images that are read from disk get colour jitter as well. Arguments and errors as in `search_data`.
    """
    options = Options(**options, jitter=True)
    info, (train, test) = _open(name, root, options, "train", "test")
    return Loader(train, "training images", options), Loader(test, "test images", options, training=False), info


def test_data(name: str, root: str | Path, **options) -> tuple[Loader, Info]:
    """(test, info). Arguments and errors as in `search_data`.

    `folder` reads its training images too, since the mean and deviation that normalise the test images are theirs.
    """
    options = Options(**options)
    info, (test,) = _open(name, root, options, "test")
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


def _open(name: str, root: str | Path, options: Options, *parts: str) -> tuple[Info, list[InMemory | OnDisk]]:
    """The images of the parts ("train", "test"), and the Info completed by what was found."""
    info, root = lookup(name, options.image_size), Path(root).expanduser()
    if info.read:
        return info, [InMemory(*_in_turn(info.read, root, part, options), info, options) for part in parts]
    places = [root / name for name in info.test_folders]
    folders = {"train": root / "train", "test": next((place for place in places if place.is_dir()), places[0])}
    needed = [part for part in folders if part in parts or part == "train" and info.memory_limit]
    classes, samples = {}, {}
    for part in needed:
        classes[part], samples[part] = find_images(folders[part], info.hint)
    if odd := set.symmetric_difference(set(classes[needed[0]]), classes[needed[-1]]):  # labels must mean the same
        one, other = folders.values()
        raise UserError(f"{one} and {other} have different class folders: {_listed(sorted(odd))} in only one of them")
    info = dataclasses.replace(info, num_classes=len(classes[needed[0]]))
    if len(samples.get("train", ())) * info.image_size**2 * 3 >= info.memory_limit:
        return info, [OnDisk(samples[part], info, options) for part in parts]

    arrays = {part: read_images(samples[part], info.image_size, options) for part in needed}
    mean, std = channel_statistics(arrays["train"][0])
    info = dataclasses.replace(info, mean=mean, std=std)
    return info, [InMemory(*arrays[part], info, options) for part in parts]


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


# ---- Folders of images -----------------------------------------------------------------------------------------------
def find_images(folder: Path, hint: str = "") -> tuple[list[str], list[Sample]]:
    """(class names, samples) of the class folders in `folder`; hidden folders and files of other types are passed by.

    Raises UserError for a missing folder, no class folders, and a class folder with no image.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: expected one folder per class with its images in it{hint}")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"{len(classes)} class folder(s) in {folder}: expected at least two, with images in them{hint}")
    labels = {name: label for label, name in enumerate(classes)}
    samples = make_dataset(folder, labels, extensions=IMG_EXTENSIONS, allow_empty=True)
    if empty := set(labels.values()) - {label for _, label in samples}:
        names, kinds = _listed(str(folder / classes[label]) for label in sorted(empty)), " ".join(IMG_EXTENSIONS)
        raise UserError(f"no image in {names}: add some ({kinds}) or remove it")
    return classes, samples


def read_image(path: str) -> Image.Image | str:
    """One image in RGB, or why there is none: the file is no image, is cut short, or would fill the memory."""
    try:
        with Image.open(path) as image:
            if max(image.size) > 1000 * min(image.size):  # scaling the short side up would blow the long one up
                raise ValueError(f"{image.width} x {image.height} pixels")
            if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        return f"{path} ({error})"


def read_images(samples: list[Sample], size: int, options: Options) -> Arrays:
    """All images as one array: the shorter side scaled to `size`, the centre square of it.

    Raises UserError with the list of the unreadable files; with bad_images="skip" they are logged and left out.
    """

    def read(sample: Sample) -> np.ndarray | str:
        image = read_image(sample[0])
        if isinstance(image, str):
            return image
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))

    _refuse_bombs()
    images, labels, bad = np.empty((len(samples), size, size, 3), np.uint8), [], []
    with ThreadPool(max(1, options.workers)) as pool:  # Pillow decodes and scales without Python's lock
        results = progress(pool.imap(read, samples), options.quiet, total=len(samples), desc="reading images")
        for (_, label), image in zip(samples, results, strict=True):
            if isinstance(image, str):
                bad.append(image)
            else:
                images[len(labels)] = image
                labels.append(label)
    _report_bad(bad, options.bad_images)
    if missing := sorted({label for _, label in samples} - set(labels)):
        folders = {Path(path).parent for path, label in samples if label in missing}
        raise UserError(f"no readable image in {_listed(map(str, folders))}: add some or remove it")
    return images[: len(labels)], np.array(labels, dtype=np.int64)


def _refuse_bombs() -> None:
    """Make an error of Pillow's warning about images of 90 to 180 million pixels; beyond, it raises by itself."""
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def _report_bad(bad: list[str], bad_images: str) -> None:
    """Stop with the list of unreadable images, or log each."""
    if bad and bad_images != "skip":
        raise UserError(f"{len(bad)} unreadable image(s): {_listed(bad)}; replace them, or pass --bad_images skip")
    for name in bad:
        log.warning("skipped unreadable image %s", _listed([name]))


def _listed(names: Iterable[str]) -> str:
    """Names in one line, whatever characters they have."""
    return ", ".join(name if name.isprintable() else repr(name) for name in names)


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel of N x H x W x 3 uint8 images, on the scale 0..1; exact, from histograms."""
    values = np.arange(256) / 255
    shares = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)]) / images[..., 0].size
    mean = shares @ values
    std = np.sqrt(((values - mean[:, None]) ** 2 * shares).sum(1))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())  # a constant channel must not divide by 0


# ---- Augmentation of a batch -----------------------------------------------------------------------------------------
def draw_augmentation(numbers: np.ndarray, size: int, padding: int) -> Tensor:
    """B x 5 numbers in [0, 1) -> B x 5 integers: top, left of the crop; flip; row, column of the cutout's centre."""
    counts = [2 * padding + 1, 2 * padding + 1, 2, size, size]
    return torch.from_numpy((numbers * counts).astype(np.int64))


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Crop each of B x H x W x C images out of its zero-padded self at (top, left), and mirror it where flip is 1.

    torchvision's RandomCrop(H, padding) and RandomHorizontalFlip, as one gather of pixels.
    """
    b, h, w, c = images.shape
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    _, height, width, _ = padded.shape
    x = torch.arange(w, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None] == 1, w - 1 - x, x)  # B x W
    rows = top[:, None] + torch.arange(h, device=images.device)  # B x H
    rows += height * torch.arange(b, device=images.device)[:, None]
    pixels = rows[:, :, None] * width + columns[:, None, :]  # B x H x W, into the flat list of pixels
    return padded.view(-1, c).index_select(0, pixels.flatten()).view(b, h, w, c)


def normalise(images: Tensor, info: Info) -> Tensor:
    """uint8 B x H x W x C -> float32 B x C x H x W in channels_last memory: (value / 255 - mean) / std."""
    b, h, w, c = images.shape
    scale, shift = _scale_and_shift(info, w, images.device)
    return images.reshape(b, h, w * c).float().mul_(scale).add_(shift).view(b, h, w, c).permute(0, 3, 1, 2)


@functools.cache
def _scale_and_shift(info: Info, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The normalisation of a row of pixels; rows at once go five times as fast as pixel by pixel."""
    mean, std = torch.tensor(info.mean, dtype=torch.float64), torch.tensor(info.std, dtype=torch.float64)
    return tuple(t.float().repeat(width).to(device) for t in (1 / (255 * std), -mean / std))


def cut_out(x: Tensor, row: Tensor, column: Tensor, length: int) -> Tensor:
    """Zero, in place, a square around (row, column) in each image of a channels_last batch (DeVries and Taylor, 2017).

    As in DARTS: length // 2 pixels before the centre to length // 2 - 1 after it, clipped at the border.
    """
    b, c, h, w = x.shape
    length = min(length, 2 * max(h, w))  # which cuts out all, wherever the centre is
    around = torch.arange(-(length // 2), length // 2, device=x.device)
    rows = (row[:, None] + around).clamp_(0, h - 1)  # B x L; clipped pixels fall on the border, which is cut anyway
    columns = (column[:, None] + around).clamp_(0, w - 1)
    rows += h * torch.arange(b, device=x.device)[:, None]
    pixels = rows[:, :, None] * w + columns[:, None, :]
    x.permute(0, 2, 3, 1).view(-1, c).index_fill_(0, pixels.flatten(), 0)
    return x


# ---- Where images are: in memory or on disk --------------------------------------------------------------------------
# A step: the indices (B) of its images, and B x 5 numbers in [0, 1), the randomness of each; None: no augmentation.
Step = tuple[np.ndarray, np.ndarray | None]


class InMemory:
    """Images as one uint8 tensor on the device; a batch is cropped, flipped and cut out there."""

    def __init__(self, images: np.ndarray | Tensor, labels: np.ndarray | Tensor, info: Info, options: Options):
        self.images = torch.as_tensor(images).to(options.device)  # N x H x W x 3
        self.labels = torch.as_tensor(labels).to(options.device)
        self.info, self.options = info, options

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> InMemory:
        """The images of these indices."""
        indices = torch.from_numpy(indices).to(self.images.device)
        return InMemory(self.images[indices], self.labels[indices], self.info, self.options)

    def batches(self, steps: Iterable[Step]) -> Iterator[Batch]:
        """The batch of each step."""
        device, size = self.images.device, self.info.image_size
        padding = size // 8  # 4 for 32 x 32
        for indices, numbers in steps:
            indices = to_device(torch.from_numpy(indices), device)
            images, labels = self.images.index_select(0, indices), self.labels.index_select(0, indices)
            if numbers is None:
                yield normalise(images, self.info), labels
                continue
            draws = to_device(draw_augmentation(numbers, size, padding), device)
            top, left, flip, row, column = draws.unbind(1)
            x = normalise(crop_and_flip(images, top, left, flip, padding), self.info)
            yield cut_out(x, row, column, self.options.cutout), labels


class OnDisk(torch.utils.data.Dataset):
    """Images read by DataLoader workers, augmented as for ImageNet; normalised, and cut out, on the device."""

    def __init__(self, samples: list[Sample], info: Info, options: Options):
        self.samples, self.info, self.options = samples, info, options
        size = info.image_size
        jitter = [v2.ColorJitter(0.4, 0.4, 0.4, 0.2)] if options.jitter else []
        self.augmented = v2.Compose([v2.RandomResizedCrop(size), v2.PILToTensor(), v2.RandomHorizontalFlip(), *jitter])
        self.centre = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()])
        self.reported: set[str] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, indices: np.ndarray) -> OnDisk:
        """The images of these indices."""
        return OnDisk([self.samples[i] for i in indices], self.info, self.options)

    def __getitem__(self, step: Step) -> tuple[Tensor, Tensor, list[str], Tensor | None]:
        """(images B x 3 x H x W, labels B, unreadable files, draws of the augmentation), in a worker.

        In training an unreadable image is replaced by the next good one, so that a batch stays whole and is the same in
        every run; in order it is left out, so that nothing is counted twice.
        """
        (indices, numbers), size = step, self.info.image_size
        images, labels, bad = [], [], []
        attempts = 1 if numbers is None or self.options.bad_images != "skip" else len(self)
        for i, index in enumerate(indices):
            for attempt in range(attempts):
                path, label = self.samples[(index + attempt) % len(self)]
                image = read_image(path)
                if not isinstance(image, str):
                    images.append(self.centre(image) if numbers is None else self._augment(image, numbers[i]))
                    labels.append(label)
                    break
                bad.append(image)
        stacked = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
        draws = None if numbers is None else draw_augmentation(numbers, size, padding=0)
        return stacked, torch.tensor(labels, dtype=torch.int64), bad, draws

    def _augment(self, image: Image.Image, numbers: np.ndarray) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # the image's own randomness, in whichever worker it is read
            torch.default_generator.manual_seed(int(numbers[0] * 2**53))
            return self.augmented(image)

    def batches(self, steps: Iterable[Step]) -> Iterator[Batch]:
        """The batch of each step; one without a readable image is left out, in training it raises UserError."""
        device = torch.device(self.options.device)
        _refuse_bombs()
        loader = DataLoader(
            self,
            batch_size=None,  # a step is a batch
            sampler=steps,
            num_workers=self.options.workers,
            worker_init_fn=_start_worker,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # leaves the global one alone
        )
        for images, labels, bad, draws in loader:
            _report_bad([name for name in bad if name not in self.reported], self.options.bad_images)
            self.reported.update(bad)
            if not labels.numel():
                if draws is not None:
                    raise UserError(f"no readable image among {len(self)}")
                continue
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            x = normalise(images.permute(0, 2, 3, 1).contiguous(), self.info)
            if draws is not None:
                *_, row, column = draws.to(device, non_blocking=True).unbind(1)
                cut_out(x, row, column, self.options.cutout)
            yield x, labels


def _start_worker(_: int) -> None:
    """Workers ignore Ctrl-C and obey SIGTERM from their parent only.

    Pre-emption and torchrun signal every process of a run; the main one then finishes its step, for which it needs
    batches. Ignoring SIGTERM would not do: Python ends its workers with it, and waits for them.
    """

    def end_with_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    _refuse_bombs()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_parent, daemon=True).start()


# ---- Loaders ---------------------------------------------------------------------------------------------------------
SPLIT, ORDER, EPOCH, RANDOM, ROUND = range(5)  # what random numbers are for
SMALLEST = 2  # images of a process in the last batch of an epoch: batch normalisation needs two


def _generator(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """The generator of one purpose at one position: the same arguments give the same numbers."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *position)))


class Loader:
    """Batches of one set of images for one process. len(loader) is the number of steps of an epoch.

    A step of all processes takes batch_size * world_size images, of which this process has the slice of its rank. Two
    loaders of a run differ in their stream of random numbers. The last batch of an epoch is what is left, shared
    evenly: up to world_size - 1 images are left out, and all where a process would get one. Raises UserError for a
    batch larger than the set.
    """

    def __init__(
        self, images: InMemory | OnDisk, what: str, options: Options, *, stream: int = 0, training: bool = True
    ):
        self.images, self.options, self.stream, self.training = images, options, stream, training
        self.num_images = len(images)
        self.global_batch = options.batch_size * options.world_size
        if training and self.global_batch > self.num_images:
            size = str(options.batch_size) + f" x {options.world_size} processes" * (options.world_size > 1)
            raise UserError(f"batch_size {size} is larger than the {self.num_images} {what}: take a smaller one")

    def __len__(self) -> int:
        if not self.training:
            return -(-len(self._share()) // self.options.batch_size)
        last = self.num_images % self.global_batch // self.options.world_size
        return self.num_images // self.global_batch + (last >= SMALLEST)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on: every image once, in a new order, augmented."""
        order = _generator(self.options.seed, ORDER, self.stream, epoch).permutation(self.num_images)
        steps = (self._step(EPOCH, epoch, step, self._global(order, step)) for step in range(start, len(self)))
        return self.images.batches(steps)

    def random(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Endless: at each step a fresh random batch, without replacement inside the batch, augmented."""
        return self.images.batches(self._step(RANDOM, epoch, step) for step in itertools.count(start))

    def again_and_again(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Endless: the images without replacement in a new order, and in another order when they are used up."""
        return self.images.batches(self._rounds(epoch, start))

    def _rounds(self, epoch: int, start: int) -> Iterator[Step]:
        for step in itertools.count(start):
            number, place = divmod(step, len(self))
            if place == 0 or step == start:
                order = _generator(self.options.seed, ROUND, self.stream, epoch, number).permutation(self.num_images)
            yield self._step(RANDOM, epoch, step, self._global(order, place))

    def in_order(self) -> Iterator[Batch]:
        """Every image once over all processes, not augmented; each reads its share, the last batch may be short."""
        share, size = self._share(), self.options.batch_size
        return self.images.batches((np.array(share[i : i + size]), None) for i in range(0, len(share), size))

    def _share(self) -> range:
        """The images of this process, where each is read once."""
        return range(self.options.rank, self.num_images, self.options.world_size)

    def _global(self, order: np.ndarray, step: int) -> np.ndarray:
        """The images of all processes in a step: the last step takes what is left, as far as it can be shared."""
        images = order[step * self.global_batch : (step + 1) * self.global_batch]
        return images[: len(images) // self.options.world_size * self.options.world_size]

    def _step(self, purpose: int, epoch: int, step: int, indices: np.ndarray | None = None) -> Step:
        """This process's share of a global batch, drawn whole by every process."""
        rng = _generator(self.options.seed, purpose, self.stream, epoch, step)
        if indices is None:
            indices = rng.choice(self.num_images, self.global_batch, replace=False)
        share = len(indices) // self.options.world_size
        mine = slice(self.options.rank * share, (self.options.rank + 1) * share)
        return indices[mine], rng.random((len(indices), 5))[mine]
