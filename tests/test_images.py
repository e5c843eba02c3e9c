"""Images: which files of a folder count, what a file becomes, and augmentation held to its plain formulation."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from lib import images
from lib.cli import UserError
from lib.data import INFO

CIFAR = INFO["cifar10"]


def draw(path: Path, size: tuple[int, int] = (8, 8), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 50).save(path, **options)


def test_folders_with_hidden_names_links_loops_and_other_files(tmp_path, caplog):
    root = tmp_path / "train"
    for name in "cat/1.png cat/2.JPEG cat/old/3.jfif dog/1.bmp .cache/x/1.png cat/.ipynb_checkpoints/4.png".split():
        draw(root / name, format="jpeg" if name.endswith("jfif") else None)
    draw(tmp_path / "elsewhere" / "5.gif")
    (root / "cat" / "._1.png").write_bytes(b"AppleDouble")
    (root / "cat" / "notes.txt").write_text("notes")
    (root / "dog" / "1.xyz").write_text("unknown")
    (root / "file.png").write_text("no class")
    for link, target in {
        "dog/here": "../dog",  # itself
        "dog/up": "..",  # dogs must not become cats
        "dog/far": str(tmp_path),
        "dog/a": str(tmp_path / "elsewhere"),  # counts, and once
        "dog/b": str(tmp_path / "elsewhere"),
        "dog/circle": "circle",
        "dog/gone.png": "nowhere.png",
        "all": "..",
        "puppy": "dog",  # the same images under another name are somebody's choice
    }.items():
        (root / link).symlink_to(target)
    with caplog.at_level(logging.WARNING):
        found = images.list_classes(root)
    names = {name: [file for file, _ in files] for name, files in found.items()}
    dogs = ["1.bmp", "circle", "gone.png", "a/5.gif"]
    assert names == {"cat": ["1.png", "2.JPEG", "old/3.jfif"], "dog": dogs, "puppy": dogs}
    assert dict(found["cat"])["1.png"] == (root / "cat/1.png").stat().st_size
    (record,) = caplog.records
    assert "3 file(s)" in record.getMessage() and "1 .txt, 2 .xyz" in record.getMessage()
    assert "link to nowhere.png, which is not there" in images.read_image(str(root / "dog/gone.png"))
    for name in ("cat/1.png", "cat/old/3.jfif"):
        assert images.read_image(str(root / name)).size == (8, 8)
    (root / "gone").symlink_to("nowhere")
    with pytest.raises(UserError, match="train/gone: link to nothing"):
        images.list_classes(root)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I", "F", "I/8"])
def test_images_of_every_mode_become_rgb(tmp_path, mode):
    grey, wide = np.full((9, 9), 128, np.uint8), {"I;16": np.uint16, "I": np.int32, "F": np.float32, "I/8": np.int32}
    if mode in wide:
        image = Image.fromarray((grey * (1.0 if mode == "I/8" else 256.0)).astype(wide[mode]))
        assert image.mode == mode.split("/")[0]
    else:
        image = Image.fromarray(grey).convert(mode)
    image.save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.tif"))
    (path,) = tmp_path.iterdir()
    pixels = np.asarray(images.read_image(str(path)))
    assert pixels.shape == (9, 9, 3)
    assert mode == "1" or np.all(np.abs(pixels.astype(int) - 128) <= 2)


def test_unreadable_files_say_why(tmp_path):
    """Among them pixels of an unknown scale, and images that would fill the memory."""
    for values in ([0, 0.5, 1], [-1, 7, 9], [0, 70000, 5], [0, np.nan, 300]):
        Image.fromarray(np.array([values], np.float32)).save(tmp_path / "x.tif")
        assert "(mode F with values from" in images.read_image(str(tmp_path / "x.tif"))
    for size, reason in (((5000, 3), "5000x3: too far from square"), ((10_000, 10_000), "more than 89 million pixels")):
        Image.new("1", size).save(tmp_path / "x.png")
        assert reason in images.read_image(str(tmp_path / "x.png"))
    draw(tmp_path / "whole.jpg", (64, 64))
    for name, content, reason in [
        ("short.jpg", (tmp_path / "whole.jpg").read_bytes()[:-400], "truncated"),
        ("text.jpg", b"text\n", "not an image that Pillow reads"),
        ("program.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert reason in images.read_image(str(tmp_path / name))
    assert "No such file" in images.read_image(str(tmp_path / "none.jpg"))


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_photos_are_turned_as_their_camera_was_held(tmp_path, ending):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = 200  # the right half is light
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the light half goes down
    options = {"lossless": True} if ending == "webp" else {}
    Image.fromarray(pixels).save(tmp_path / f"x.{ending}", exif=exif, **options)
    turned = np.asarray(images.read_image(str(tmp_path / f"x.{ending}")))
    assert turned.shape == (32, 16, 3) and turned[:15].mean() < 5 and turned[17:].mean() > 195


def plain_crop_and_flip(image: np.ndarray, top: int, left: int, flip: int, padding: int) -> np.ndarray:
    """torchvision's RandomCrop(size, padding) and flip on one PIL image, at given numbers."""
    height, width = image.shape[:2]
    padded = transforms.functional.pad(Image.fromarray(image), padding)
    cropped = transforms.functional.crop(padded, top, left, height, width)
    return np.array(transforms.functional.hflip(cropped) if flip else cropped)


def plain_cutout(image: torch.Tensor, y: int, x: int, length: int) -> torch.Tensor:
    """DARTS' Cutout on one normalised 3 x H x W image, at a given centre."""
    _, h, w = image.shape
    mask = np.ones((h, w), np.float32)
    y1, y2 = np.clip(y - length // 2, 0, h), np.clip(y + length // 2, 0, h)
    x1, x2 = np.clip(x - length // 2, 0, w), np.clip(x + length // 2, 0, w)
    mask[y1:y2, x1:x2] = 0.0
    return image * torch.from_numpy(mask)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(8, 40), st.integers(0, 6), st.integers(0, 50), st.integers(1, 7))
def test_augmenting_a_batch_is_augmenting_each_image(seed, size, padding, length, b):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (b, size, size, 3), dtype=np.uint8)
    top, left, flip, row, column = images.draw_augmentation(rng.random((b, 5)), size, padding).unbind(1)
    cropped = images.crop_and_flip(torch.from_numpy(pixels), top, left, flip, padding)
    x = images.cut_out(images.normalise(cropped, CIFAR.mean, CIFAR.std), row, column, length)
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CIFAR.mean, CIFAR.std)])
    for i in range(b):
        expected = normalise(plain_crop_and_flip(pixels[i], int(top[i]), int(left[i]), int(flip[i]), padding))
        torch.testing.assert_close(x[i], plain_cutout(expected, int(row[i]), int(column[i]), length), rtol=0, atol=2e-6)


def test_draws_cover_crops_flips_and_centres_evenly():
    draws = images.draw_augmentation(np.random.default_rng(0).random((40_000, 5)), 32, 4).numpy()
    for column, values in enumerate([9, 9, 2, 32, 32]):
        counts = np.bincount(draws[:, column], minlength=values)
        assert len(counts) == values
        assert np.all(np.abs(counts / 40_000 - 1 / values) < 0.1 / values + 0.004)
    assert images.draw_augmentation(np.full((1, 5), np.nextafter(1, 0)), 32, 4).tolist() == [[8, 8, 1, 31, 31]]
