"""Images: finding them in folders, reading them from files, cropping, flipping and normalising them in batches."""

from __future__ import annotations

import collections
import functools
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lib.cli import UserError

log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", module=r"PIL\b")  # odd EXIF data in good images; too many pixels: read_image refuses

NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows, but does not decode; EPS is a program
File = tuple[str, int]  # path below its class folder, bytes


# ---- Folders ---------------------------------------------------------------------------------------------------------
def list_classes(folder: Path, hint: str = "", least: int = 2) -> dict[str, list[File]]:
    """The images of each class folder in `folder`, at any depth below it, all in the order of their names.

    Names with a leading dot never count. Links are followed, but a link to a folder above itself is a loop and is
    passed over, and each real folder counts once per class. Links to nothing are listed, so that their reader names
    them. Files that Pillow does not read are counted in one warning. `hint` says how to get the folder.

    Raises UserError for a missing folder, fewer class folders than `least`, and a class folder without an image.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: expected one folder per class with its images in it{hint}")
    above = _with_parents(folder)
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if gone := [name for name in names if not os.path.exists(folder / name)]:
        raise UserError(f"{list_names(str(folder / name) for name in gone)}: link to nothing, restore or remove it")
    names = [name for name in names if os.path.isdir(folder / name) and os.path.realpath(folder / name) not in above]
    if len(names) < least:
        wanted = "at least two" if least > 1 else "one or more"
        raise UserError(f"{len(names)} class folder(s) in {folder}: expected {wanted}, with images in them{hint}")
    others: collections.Counter[str] = collections.Counter()
    classes = {name: list_images(folder / name, others, above) for name in names}
    if others:
        kinds = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in sorted(others.items()))
        log.warning("%s: passed over %d file(s) that Pillow does not read (%s)", folder, others.total(), kinds)
    if empty := [str(folder / name) for name, files in classes.items() if not files]:
        raise UserError(f"no image in {list_names(empty)}: add some or remove it")
    return classes


def list_images(
    folder: Path, others: collections.Counter[str] | None = None, above: frozenset[str] = frozenset()
) -> list[File]:
    """The images in a folder and those below it, in the order of their names; see `list_classes`.

    `others` counts by their endings the files that are no images; links to the folders `above` are passed over.
    """
    found = sorted(_walk(folder, "", above, set(), collections.Counter() if others is None else others))
    return [(os.path.join(*place), size) for place, size in found]


def _walk(
    root: Path, below: str, above: frozenset[str], seen: set[str], others: collections.Counter[str]
) -> Iterator[tuple[tuple[str, str], int]]:
    """((folder below root, name), bytes) of each image; what is no image is counted in `others` by its ending."""
    real = os.path.realpath(root / below)
    if real in above or real in seen:
        return
    seen.add(real)
    above |= _with_parents(real)
    for entry in sorted(os.scandir(root / below), key=lambda entry: entry.name):
        ending = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path):
            yield from _walk(root, os.path.join(below, entry.name), above, seen, others)
        elif ending in _readable()[0] or not ending and not os.path.exists(entry.path):
            yield (below, entry.name), entry.stat().st_size if os.path.exists(entry.path) else 0
        else:
            others[ending] += 1


def _with_parents(folder: Path | str) -> frozenset[str]:
    """The real path of a folder and of all folders above it."""
    real = Path(os.path.realpath(folder))
    return frozenset(map(str, (real, *real.parents)))


@functools.cache
def _readable() -> tuple[set[str], list[str]]:
    """File endings and kinds of images that Pillow reads here, the kinds in its order."""
    endings = Image.registered_extensions()  # loads all of Pillow's decoders
    kinds = [kind for kind in Image.ID if kind not in NO_IMAGES]
    return {ending for ending, kind in endings.items() if kind in kinds}, kinds


def list_names(names: Iterable[str], most: int = 20) -> str:
    """Names in one line, whatever characters they have, and the number of those that are too many."""
    shown = [name if name.isprintable() else repr(name) for name in names]
    return ", ".join(shown[:most]) + f" and {len(shown) - most} more" * (len(shown) > most)


# ---- Files -----------------------------------------------------------------------------------------------------------
def read_image(path: str) -> Image.Image | str:
    """One image in RGB, turned as its EXIF orientation says; or, as text, its path and why it is unreadable.

    Images of 16 bits are scaled to 8. Unreadable is what Pillow cannot decode to the end, what has more pixels than
    Pillow takes for harmless (90 million), and what is 1,000 times as long as wide: scaled, it would fill the memory.
    """
    try:
        with Image.open(path, formats=_readable()[1]) as image:
            size = f"{image.width}x{image.height}"
            if max(image.size) > 1000 * min(image.size):
                raise ValueError(f"{size}: too far from square")
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 2**62):
                raise ValueError(f"{size}: more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels")
            image.load()
            try:
                ImageOps.exif_transpose(image, in_place=True)
            except Exception as error:  # damaged EXIF data do not make a good image bad
                log.debug("EXIF data of %s: %s", path, error)
            return _eight_bits(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = "not an image that Pillow reads" if isinstance(error, UnidentifiedImageError) else str(error)
        if isinstance(error, OSError) and error.strerror:
            gone = os.path.islink(path) and not os.path.exists(path)
            reason = f"link to {os.readlink(path)}, which is not there" if gone else error.strerror
        return f"{path} ({' '.join(reason.split()) or type(error).__name__})"


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 or 32 bits with 8: Pillow would clip it at 255. Raises ValueError where the scale is unknown."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or low >= 0 and 255 < high <= 65535:
        values = values.astype(np.uint16) >> 8
    elif not (low >= 0 and high <= 255 and (high > 1 or high == 0 or image.mode == "I")):  # F in 0..1 would be black
        raise ValueError(f"mode {image.mode} with values from {low:g} to {high:g}: expected 0..255 or 0..65535")
    return Image.fromarray(values.astype(np.uint8))


def centre_square(image: Image.Image, size: int, scale: float) -> Image.Image:
    """The centre square of `size` pixels, after the shorter side has been scaled to `scale` times as many."""
    if scale == 1:
        return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    from torchvision.transforms.functional import InterpolationMode, center_crop, resize  # slow to import

    return center_crop(resize(image, round(size * scale), InterpolationMode.BILINEAR), size)


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel of N x H x W x 3 uint8 images, on the scale 0..1; exact, from histograms."""
    counts = np.zeros((3, 256), np.int64)
    for block in (images[i : i + 256] for i in range(0, len(images), 256)):  # bincount takes 8 bytes a pixel
        counts += [np.bincount(block[..., channel].ravel(), minlength=256) for channel in range(3)]
    shares, values = counts / images[..., 0].size, np.arange(256) / 255
    mean = shares @ values
    std = np.sqrt(((values - mean[:, None]) ** 2 * shares).sum(1))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())  # a constant channel must not divide by 0


# ---- Batches ---------------------------------------------------------------------------------------------------------
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


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 B x H x W x C -> float32 B x C x H x W in channels_last memory: (value / 255 - mean) / std."""
    b, h, w, c = images.shape
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), w, images.device)
    return images.reshape(b, h, w * c).float().mul_(scale).add_(shift).view(b, h, w, c).permute(0, 3, 1, 2)


@functools.cache
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The normalisation of a row of pixels; rows at once go five times as fast as pixel by pixel."""
    mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return tuple(t.float().repeat(width).to(device) for t in (1 / (255 * std), -mean / std))


def cut_out(x: Tensor, row: Tensor, column: Tensor, length: int) -> Tensor:
    """Zero, in place, a square around (row, column) in each image of a channels_last batch (DeVries and Taylor, 2017).

    As in DARTS: length // 2 pixels before the centre to length // 2 - 1 after it, clipped at the border.
    """
    b, c, h, w = x.shape
    around = torch.arange(-(length // 2), length // 2, device=x.device)
    rows = (row[:, None] + around).clamp_(0, h - 1)  # B x L; clipped pixels fall on the border, which is cut anyway
    columns = (column[:, None] + around).clamp_(0, w - 1)
    rows += h * torch.arange(b, device=x.device)[:, None]
    pixels = rows[:, :, None] * w + columns[:, None, :]
    x.permute(0, 2, 3, 1).view(-1, c).index_fill_(0, pixels.flatten(), 0)
    return x
