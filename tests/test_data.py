"""Datasets and loaders: augmentation held to its plain formulation, halves of a search, resume, shares, bad files."""

from __future__ import annotations

import gzip
import io
import logging
import multiprocessing
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from lib import data
from lib.cli import UserError
from lib.data import INFO, InMemory, Loader, Options

CIFAR = INFO["cifar10"]


# ---- Small trees of class folders ------------------------------------------------------------------------------------


def write_tree(
    root: Path, parts: dict[str, int], classes: int = 3, size: tuple[int, int] = (40, 30), kind="png"
) -> Path:
    """`parts`: folder name -> images per class. The classes differ in their colour, so that labels can be checked."""
    rng = np.random.default_rng(0)
    for part, count in parts.items():
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (size[1], size[0], 3))
                pixels[..., label] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.{kind}")
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path, {"train": 6, "val": 4}, kind="jpg")


def bomb() -> bytes:
    """A png of few bytes that says it has 10,000 x 10,000 pixels."""
    out = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(out, "png")
    return out.getvalue()


def cut_short() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(out, "jpeg")
    return out.getvalue()[:-400]


BAD_FILES = {
    "cut_short.jpg": cut_short,
    "text.jpg": lambda: b"this is no image\n",
    "empty.png": lambda: b"",
    "bomb.png": bomb,
}


def collect(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def same(first, second) -> bool:
    """Whether two lists of batches are equal, bit by bit."""
    first, second = list(first), list(second)
    return len(first) == len(second) > 0 and all(
        torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )


def take(iterator, count: int) -> list:
    return [next(iterator) for _ in range(count)]


# ---- Augmentation ----------------------------------------------------------------------------------------------------


def plain_crop_and_flip(image: np.ndarray, top: int, left: int, flip: int, padding: int) -> np.ndarray:
    """torchvision's RandomCrop(size, padding) and flip on one PIL image, at given numbers."""
    height, width = image.shape[:2]
    padded = transforms.functional.pad(Image.fromarray(image), padding)
    cropped = transforms.functional.crop(padded, top, left, height, width)
    return np.asarray(transforms.functional.hflip(cropped) if flip else cropped)


def plain_cutout(image: torch.Tensor, y: int, x: int, length: int) -> torch.Tensor:
    """DARTS' Cutout on one normalised 3 x H x W image, at a given centre."""
    _, h, w = image.shape
    mask = np.ones((h, w), np.float32)
    y1, y2 = np.clip(y - length // 2, 0, h), np.clip(y + length // 2, 0, h)
    x1, x2 = np.clip(x - length // 2, 0, w), np.clip(x + length // 2, 0, w)
    mask[y1:y2, x1:x2] = 0.0
    return image * torch.from_numpy(mask)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(8, 40),
    padding=st.integers(0, 6),
    length=st.integers(0, 50),
    b=st.integers(1, 7),
)
def test_augmenting_a_batch_is_augmenting_each_image(seed, size, padding, length, b):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (b, size, size, 3), dtype=np.uint8)
    top, left, flip, row, column = data.draw_augmentation(rng.random((b, 5)), size, padding).unbind(1)
    x = data.normalise(data.crop_and_flip(torch.from_numpy(images), top, left, flip, padding), CIFAR)
    data.cut_out(x, row, column, length)
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CIFAR.mean, CIFAR.std)])
    for i in range(b):
        expected = normalise(plain_crop_and_flip(images[i], int(top[i]), int(left[i]), int(flip[i]), padding).copy())
        torch.testing.assert_close(x[i], plain_cutout(expected, int(row[i]), int(column[i]), length), rtol=0, atol=2e-6)


def test_draws_cover_crops_flips_and_centres_evenly():
    numbers = np.random.default_rng(0).random((40_000, 5))
    draws = data.draw_augmentation(numbers, 32, 4).numpy()
    for column, values in enumerate([9, 9, 2, 32, 32]):
        counts = np.bincount(draws[:, column], minlength=values)
        assert len(counts) == values
        assert np.all(np.abs(counts / 40_000 - 1 / values) < 0.1 / values + 0.004)
    assert data.draw_augmentation(np.full((1, 5), np.nextafter(1, 0)), 32, 4).tolist() == [[8, 8, 1, 31, 31]]


def test_images_of_a_batch_are_augmented_independently():
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8).repeat(64, 0)
    options = Options(64, cutout=16)
    loader = Loader(InMemory(images, np.zeros(64, np.int64), CIFAR, options), "images", options)
    (x, _), *_ = loader.epoch(0)
    assert len(torch.unique(x.flatten(1), dim=0)) > 60


def test_batches_are_float_and_channels_last():
    train, test, _ = data.train_data("fashion_mini", ".data", batch_size=8, cutout=16)
    for x, y in (next(train.epoch(0)), next(train.random(0)), next(test.in_order())):
        assert x.shape == (8, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_batch_augmentation_is_many_times_faster_than_image_by_image():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (640, 32, 32, 3), np.uint8)
    options = Options(64, cutout=16)
    loader = Loader(InMemory(images, np.zeros(640, np.int64), CIFAR, options), "images", options)
    steps = transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()
    one_by_one = transforms.Compose([*steps, transforms.Normalize(CIFAR.mean, CIFAR.std)])

    def seconds(work) -> float:
        start = time.process_time()  # of this process: other work on the machine does not count
        work()
        return time.process_time() - start

    batch = min(seconds(lambda: list(loader.epoch(0))) for _ in range(5))
    pil = min(
        seconds(lambda: [plain_cutout(one_by_one(Image.fromarray(i)), 5, 9, 16) for i in images]) for _ in range(2)
    )
    assert pil / batch > 8, f"{pil / batch:.1f} times faster"  # about 20 on one thread


# ---- The datasets ----------------------------------------------------------------------------------------------------


def test_fashion_mini_is_balanced_small_and_padded_with_zeros():
    assert data.FASHION_MINI.stat().st_size <= 6 * 2**20
    for train, count in ((True, 1000), (False, 200)):
        images, labels = data.read_fashion_mini(Path(), train)
        assert np.bincount(labels).tolist() == [count] * 10
        assert images.shape == (10 * count, 32, 32, 3) and images.dtype == np.uint8
        border = np.ones((32, 32), bool)
        border[2:30, 2:30] = False
        assert not images[:, border].any() and images[:, 2:30, 2:30].any()
        assert np.array_equal(images[..., 0], images[..., 1]) and np.array_equal(images[..., 0], images[..., 2])


@pytest.mark.skipif(not data.FASHION_DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mini_is_the_first_images_of_each_class(tmp_path):
    for train, count in ((True, 1000), (False, 200)):
        images, labels = data.read_fashion(tmp_path, train)
        first = np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)]))
        mini_images, mini_labels = data.read_fashion_mini(Path(), train)
        assert np.array_equal(mini_images, images[first]) and np.array_equal(mini_labels, labels[first])


@pytest.mark.skipif(not data.FASHION_DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_statistics_are_those_of_the_training_images():
    images = data._read_idx(data.FASHION_DEBIAN / "train-images-idx3-ubyte.gz")
    statistics = data.channel_statistics(np.broadcast_to(images[..., None], (*images.shape, 3)))
    np.testing.assert_allclose(statistics, (INFO["fashion_mnist"].mean, INFO["fashion_mnist"].std), atol=1e-7)


def test_fashion_mnist_is_read_from_its_four_files(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FASHION_DEBIAN", tmp_path / "nowhere")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(5 * 28 * 28, dtype=np.uint8).reshape(5, 28, 28)
    for name in data.FASHION_FILES:
        values = pixels if "images" in name else np.arange(5, dtype=np.uint8)
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
        (raw / f"{name}.gz").write_bytes(gzip.compress(header + values.tobytes()))
    images, labels = data.read_fashion(tmp_path, True)
    assert np.array_equal(images[:, 2:30, 2:30, 1], pixels) and labels.tolist() == [0, 1, 2, 3, 4]
    damaged = raw / "train-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz"):
        data.read_fashion(tmp_path, True)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_a_dataset_that_cannot_be_downloaded_says_which_files_go_where(name, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr(data, "FASHION_DEBIAN", tmp_path / "nowhere")
    with pytest.raises(UserError) as error:
        data.train_data(name, tmp_path / "none", batch_size=8)
    message = str(error.value)
    files = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
    assert files.get(name, "t10k-labels-idx1-ubyte.gz") in message and str(tmp_path / "none") in message
    assert "\n" not in message


def test_cifar_comes_from_torchvision(tmp_path):
    class Stored:
        """A torchvision CIFAR dataset that is already there."""

        filename, url, base_folder = "cifar.tar.gz", "https://example.org", "cifar"
        train_list, test_list, meta = [("a", "")], [("b", "")], {"filename": "c"}

        def __init__(self, root, train, download):
            assert not download
            self.data = np.full((4 if train else 2, 32, 32, 3), 7, np.uint8)
            self.targets = list(range(len(self.data)))

    images, labels = data.read_cifar(Stored, tmp_path, True)
    assert images.shape == (4, 32, 32, 3) and labels.tolist() == [0, 1, 2, 3] and labels.dtype == np.int64


def test_folder_is_scaled_cropped_and_normalised_by_its_own_statistics(tmp_path):
    write_tree(tmp_path, {"train": 6, "test": 2, "val": 4}, size=(40, 30))
    train, test, info = data.train_data("folder", tmp_path, batch_size=4, image_size=16)
    assert (info.num_classes, info.image_size, train.num_images, test.num_images) == (3, 16, 18, 6)
    x, y = collect(train.in_order())
    assert x.shape == (18, 3, 16, 16) and y.tolist() == sorted(y.tolist())
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-4, rtol=0)
    images, labels = collect(test.in_order())
    assert torch.equal(images.mean((2, 3)).argmax(1), labels)  # the classes differ in their colour
    again, same_info = data.test_data("folder", tmp_path, batch_size=4, image_size=16)
    assert same_info == info and same(test.in_order(), again.in_order())


def test_folder_images_keep_their_centre(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200  # the centre square
    for part in ("train", "val"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(wide).save(tmp_path / part / name / "0.png")
    images, _ = data.read_images(data.find_images(tmp_path / "train")[1], 10, Options(1))
    assert np.all(images[:, 1:-1, 1:-1] == 200)  # the filter looks one pixel over the border


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_every_mode_become_rgb(tmp_path, mode):
    grey = np.full((9, 9), 128, np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"))
    (path,) = tmp_path.iterdir()
    pixels = np.asarray(data.read_image(str(path)))
    assert pixels.shape == (9, 9, 3)
    assert mode == "1" or np.all(np.abs(pixels.astype(int) - 128) <= 2)


def test_hidden_folders_and_other_files_are_passed_by(tree):
    (tree / "train" / ".ipynb_checkpoints").mkdir()
    (tree / "train" / "notes.txt").write_text("notes")
    (tree / "train" / "class0" / "notes.txt").write_text("notes")
    classes, samples = data.find_images(tree / "train")
    assert classes == ["class0", "class1", "class2"] and len(samples) == 18


# ---- The halves of a search ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("portion", [0.5, 0.8])
def test_a_search_splits_the_training_images_and_never_opens_the_test_set(monkeypatch, portion):
    pixels = np.zeros((100, 32, 32, 3), np.uint8)
    pixels[:, 16, 16, 0] = np.arange(100)  # each image carries its number

    def read(root, train):
        assert train, "the search opened the test set"
        return pixels, np.arange(100)

    monkeypatch.setitem(INFO, "cifar10", data.dataclasses.replace(CIFAR, read=read))

    def halves(seed):
        train, valid, _ = data.search_data("cifar10", ".data", batch_size=10, train_portion=portion, seed=seed)
        seen = set(collect(train.epoch(0))[1].tolist()), set(collect(valid.in_order())[1].tolist())
        assert seen[0] | set(collect(train.in_order())[1].tolist()) == seen[0]
        assert set(take(valid.random(0), 1)[0][1].tolist()) <= seen[1]
        return seen

    train, valid = halves(0)
    assert len(train) == round(100 * portion) and train.isdisjoint(valid) and train | valid == set(range(100))
    assert halves(0) == (train, valid) != halves(1)


def test_a_search_on_a_folder_needs_no_test_images(tmp_path):
    write_tree(tmp_path, {"train": 4})
    train, valid, info = data.search_data("folder", tmp_path, batch_size=6, image_size=16)
    assert (train.num_images, valid.num_images, info.num_classes) == (6, 6, 3)


def test_the_imagenet_search_takes_its_two_subsets_as_they_are(tree):
    options = dict(batch_size=4, image_size=16, workers=0)
    train, valid, info = data.search_data("imagenet", tree, train_portion=0.9, **options)
    assert (train.num_images, valid.num_images, info.num_classes) == (18, 12, 3)
    assert info.mean == INFO["imagenet"].mean
    (x, _), (again, _) = next(valid.random(0)), next(valid.random(1))
    assert x.shape == (4, 3, 16, 16) and not torch.equal(x, again)


# ---- Every batch a function of (seed, epoch, step) -------------------------------------------------------------------


def loaders(kind: str, root: Path, seed: int = 0, batch_size: int = 4, **options) -> tuple[Loader, Loader]:
    """(train, test) of the tree, in memory or from disk."""
    name = {"memory": "folder", "disk": "imagenet"}[kind]
    options = dict(image_size=16, workers=0, cutout=4) | options
    train, test, _ = data.train_data(name, root, batch_size=batch_size, seed=seed, **options)
    return train, test


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_an_epoch_resumed_in_the_middle_goes_on_as_it_would_have(tree, kind):
    train, _ = loaders(kind, tree)
    whole = list(train.epoch(3))
    assert len(whole) == len(train) == 5 and [len(y) for _, y in whole] == [4, 4, 4, 4, 2]
    torch.manual_seed(123)  # the global generators have no say
    np.random.seed(123)
    resumed, _ = loaders(kind, tree)
    assert same(resumed.epoch(3, start=2), whole[2:])
    assert same(take(resumed.random(1, start=3), 2), take(train.random(1), 5)[3:])
    if kind == "memory":  # on disk the workers of an endless iterator would live on
        assert same(take(resumed.again_and_again(1, start=6), 5), take(train.again_and_again(1), 11)[6:])
    assert list(train.epoch(0, start=5)) == []


def test_the_last_batch_is_what_is_left_shared_evenly(tree):
    """CIFAR's searches and retrainings have as many steps an epoch as published; two processes get 5 each of 11."""

    def sizes(num_images: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[int]:
        options = Options(batch_size, rank=rank, world_size=world_size)
        images = InMemory(np.zeros((num_images, 8, 8, 3), np.uint8), np.arange(num_images), CIFAR, options)
        loader = Loader(images, "images", options)
        found = [len(y) for _, y in loader.epoch(0)]
        assert len(found) == len(loader)
        return found

    assert sizes(25000, 64) == [64] * 390 + [40]
    assert sizes(25000, 96) == [96] * 260 + [40]
    assert len(sizes(50000, 96)) == 521 and len(sizes(50000, 128)) == 391
    assert sizes(11, 8) == [8, 3] and sizes(9, 8) == [8] and sizes(16, 8) == [8, 8]
    for rank in (0, 1):
        assert sizes(27, 8, rank, 2) == [8, 5] and sizes(19, 8, rank, 2) == [8]


def test_images_run_through_without_replacement_and_in_another_order_afterwards():
    options = Options(4)
    loader = Loader(InMemory(np.zeros((10, 8, 8, 3), np.uint8), np.arange(10), CIFAR, options), "images", options)
    rounds = np.split(np.concatenate([y for _, y in take(loader.again_and_again(0), 9)]), 3)
    assert all(sorted(labels) == list(range(10)) for labels in rounds)
    assert len({tuple(labels) for labels in rounds}) == 3


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_epochs_steps_and_seeds_differ(tree, kind):
    train, _ = loaders(kind, tree)
    other, _ = loaders(kind, tree, seed=1)
    assert same(train.epoch(0), train.epoch(0))
    assert not same(train.epoch(0), train.epoch(1))
    assert not same(train.epoch(0), other.epoch(0))
    first, second = take(train.random(0), 2)
    assert not same([first], [second]) and not same([first], take(train.random(1), 1))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_reading_leaves_the_global_generators_alone(tree, kind):
    train, test = loaders(kind, tree)
    before = torch.get_rng_state()
    list(train.epoch(0)), list(test.in_order()), take(train.random(0), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_from_disk_do_not_depend_on_the_number_of_workers(tree):
    alone = list(loaders("disk", tree)[0].epoch(0))
    for workers in (1, 2):
        train, test = loaders("disk", tree, workers=workers)
        assert same(train.epoch(0), alone)
        assert same(take(train.random(0), 3), take(loaders("disk", tree)[0].random(0), 3))
        assert same(test.in_order(), loaders("disk", tree)[1].in_order())


def test_workers_live_through_signals_that_are_for_the_main_process(tree):
    """Pre-emption signals every process; the main one still has a step to finish."""
    train, _ = loaders("disk", tree, batch_size=2, workers=2)
    expected = list(loaders("disk", tree, batch_size=2)[0].epoch(0))
    batches = train.epoch(0)
    seen = take(batches, 2)  # one of each worker: both have begun
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    pids = [str(worker.pid) for worker in workers]
    for number in ("INT", "TERM"):
        subprocess.run(["kill", f"-{number}", *pids], check=True)  # not from the main process
    assert same(seen + list(batches), expected)
    del batches
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_a_worker_ends_when_the_main_process_says_so(tree):
    train, _ = loaders("disk", tree, batch_size=2, workers=1)
    batches = train.epoch(0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for (Z) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_end_with_the_main_process(tree):
    """Also where its batches are still held, as by a traceback, and where it is killed."""
    lines = [
        "import data, multiprocessing, os, sys",
        f"test, _ = data.test_data('imagenet', {str(tree)!r}, batch_size=1, image_size=16, workers=2)",
        "batches = test.in_order()",
        "next(batches)",
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True)",
    ]
    mains, pids = [], []
    for end in ("sys.exit(3)", "os.kill(os.getpid(), 9)"):
        command = [sys.executable, "-c", "\n".join([*lines, end])]
        mains.append(subprocess.Popen(command, cwd=data.FASHION_MINI.parent, stdout=subprocess.PIPE, text=True))
    for main in mains:
        with main:
            pids += [int(pid) for pid in main.stdout.readline().split()]
    assert len(pids) == 4 and [main.wait(30) for main in mains] == [3, -9]
    deadline = time.time() + 20
    while any(map(is_alive, pids)):
        assert time.time() < deadline
        time.sleep(0.1)


def test_an_epoch_holds_every_image_once_and_a_random_batch_no_image_twice():
    labels = np.arange(50)
    options = Options(10)
    loader = Loader(InMemory(np.zeros((50, 32, 32, 3), np.uint8), labels, CIFAR, options), "images", options)
    assert sorted(collect(loader.epoch(0))[1].tolist()) == labels.tolist()
    for _, y in take(loader.random(0), 20):
        assert len(set(y.tolist())) == 10


# ---- Shares of several processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_two_processes_see_the_batches_of_one_with_twice_the_batch_size(tree, kind):
    alone, _ = loaders(kind, tree, batch_size=6)
    shares = [loaders(kind, tree, batch_size=3, rank=rank, world_size=2)[0] for rank in range(2)]
    assert len(alone) == len(shares[0]) == len(shares[1]) == 3
    for batches in (lambda s: list(s.epoch(2)), lambda s: take(s.random(2), 3)):
        joined = [
            tuple(torch.cat(parts) for parts in zip(*step, strict=True))
            for step in zip(*(batches(share) for share in shares), strict=True)
        ]
        assert same(batches(alone), joined)


@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_test_image_is_counted_once_over_all_processes(tree, kind, world_size):
    _, alone = loaders(kind, tree, batch_size=12)
    x, y = collect(alone.in_order())
    for rank in range(world_size):
        _, share = loaders(kind, tree, batch_size=3, rank=rank, world_size=world_size)
        mine, labels = collect(share.in_order())
        assert torch.equal(mine, x[rank::world_size]) and torch.equal(labels, y[rank::world_size])
        assert len(share) == len(list(share.in_order()))


def test_images_from_disk_are_tested_as_torchvision_does_it(tmp_path):
    write_tree(tmp_path, {"train": 1, "val": 2}, size=(70, 50))
    info = INFO["imagenet"]
    test, _ = data.test_data("imagenet", tmp_path, batch_size=6, image_size=28, workers=0)
    steps = transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor()
    reference = transforms.Compose([*steps, transforms.Normalize(info.mean, info.std)])
    ((x, _),) = test.in_order()
    for image, path in zip(x, sorted((tmp_path / "val").rglob("*.png")), strict=True):
        torch.testing.assert_close(image, reference(Image.open(path)), atol=1e-5, rtol=0)


def test_a_folder_too_big_for_memory_is_read_from_disk(tree, monkeypatch):
    monkeypatch.setitem(INFO, "folder", data.dataclasses.replace(INFO["folder"], memory_limit=1000))
    train, valid, info = data.search_data("folder", tree, batch_size=3, image_size=16, workers=0)
    assert isinstance(train.images, data.OnDisk) and train.num_images == valid.num_images == 9
    assert {path for path, _ in train.images.samples}.isdisjoint(path for path, _ in valid.images.samples)
    x, _ = next(train.epoch(0))
    assert x.shape == (3, 3, 16, 16) and info.num_classes == 3


@pytest.mark.parametrize(("rank", "expected"), [(0, ["read", "wait"]), (1, ["wait", "read"])])
def test_the_first_process_downloads_before_the_others_look(monkeypatch, rank, expected):
    order = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: order.append("wait"))

    def read(root, train):
        order.append("read")
        raise UserError("offline")  # the others must not wait for ever for a process that failed

    monkeypatch.setitem(INFO, "cifar10", data.dataclasses.replace(CIFAR, read=read))
    with pytest.raises(UserError, match="offline"):
        data.search_data("cifar10", ".data", batch_size=4, rank=rank, world_size=2)
    assert order == expected


# ---- What bad files and bad requests get -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_bad_images_stop_with_their_list(tree, kind):
    for name, content in BAD_FILES.items():
        (tree / "train" / "class1" / name).write_bytes(content())
    with pytest.raises(UserError) as error:
        train, _ = loaders(kind, tree, batch_size=22)
        list(train.in_order())
    message = str(error.value)
    assert all(name in message for name in BAD_FILES) and "--bad_images skip" in message and "\n" not in message


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_bad_images_are_named_and_skipped(tree, kind, caplog):
    clean = list(loaders(kind, tree)[1].in_order())
    for name, content in BAD_FILES.items():
        (tree / "val" / "class1" / name).write_bytes(content())
    with caplog.at_level(logging.WARNING):
        _, test = loaders(kind, tree, bad_images="skip")
        images, labels = collect(test.in_order())
        list(test.in_order())
    assert torch.equal(images, collect(clean)[0]) and torch.equal(labels, collect(clean)[1])
    assert len(caplog.records) == len(BAD_FILES)  # each named once
    assert all(sum(name in record.getMessage() for record in caplog.records) == 1 for name in BAD_FILES)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_in_training_is_replaced_by_the_next_good_one(tree, workers):
    (tree / "train" / "class0" / "0.jpg").write_bytes(b"no image")
    train, _ = loaders("disk", tree, bad_images="skip", workers=workers)
    batches = list(train.epoch(0))
    assert [len(y) for _, y in batches] == [4, 4, 4, 4, 2]
    assert same(train.epoch(0), batches)
    stopping, _ = loaders("disk", tree, workers=workers)
    with pytest.raises(UserError, match=r"class0/0\.jpg"):
        for epoch in range(3):  # the epoch may drop it
            list(stopping.epoch(epoch))


def test_a_set_with_no_readable_image_ends(tmp_path):
    write_tree(tmp_path, {"train": 2, "val": 2})
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="no readable image"):
        list(loaders("disk", tmp_path, bad_images="skip")[0].epoch(0))
    with pytest.raises(UserError, match="no readable image"):
        loaders("memory", tmp_path, bad_images="skip")


def test_a_needle_of_an_image_is_bad(tmp_path):
    Image.new("RGB", (5000, 1)).save(tmp_path / "needle.png")
    assert "(5000 x 1 pixels)" in data.read_image(str(tmp_path / "needle.png"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(name="cifar"), ["'cifar'", "cifar10", "fashion_mini", "folder"]),
        (dict(batch_size=2000), ["2000", "1000 training images"]),
        (dict(batch_size=600, world_size=2), ["600 x 2", "1000 training images"]),
        (dict(batch_size=0), ["batch_size"]),
        (dict(train_portion=0.0), ["train_portion", "0.0"]),
        (dict(train_portion=1.0), ["train_portion"]),
        (dict(train_portion=1.5), ["train_portion"]),
        (dict(train_portion=float("nan")), ["train_portion"]),
        (dict(train_portion=0.999), ["validation images"]),
        (dict(image_size=64), ["image_size", "32"]),
        (dict(cutout=-1), ["cutout"]),
        (dict(workers=-1), ["workers"]),
        (dict(seed=-1), ["seed"]),
    ],
)
def test_a_bad_request_gets_one_line(monkeypatch, change, words):
    arrays = np.zeros((2000, 32, 32, 3), np.uint8), np.zeros(2000, np.int64)
    monkeypatch.setitem(INFO, "fashion_mini", data.dataclasses.replace(CIFAR, read=lambda root, train: arrays))
    arguments = dict(name="fashion_mini", root=".data", batch_size=64) | change
    with pytest.raises(UserError) as error:
        data.search_data(**arguments)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_missing_and_empty_folders_are_named(tmp_path, name):
    def message() -> str:
        with pytest.raises(UserError) as error:
            data.train_data(name, tmp_path, batch_size=2, image_size=16, workers=0)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert f"no folder {tmp_path / 'train'}" in message()
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert f"class folder(s) in {tmp_path / 'train'}" in message()
    write_tree(tmp_path / "x", {"train": 2, "val": 2})
    (tmp_path / "train").rmdir()
    (tmp_path / "x" / "train").rename(tmp_path / "train")
    (tmp_path / "train" / "class_without").mkdir()
    assert f"no image in {tmp_path / 'train' / 'class_without'}" in message()
    (tmp_path / "train" / "class_without").rmdir()
    (tmp_path / "val").rmdir()
    assert f"no folder {tmp_path / ('test' if name == 'folder' else 'val')}" in message()
    (tmp_path / "x" / "val").rename(tmp_path / "val")
    (tmp_path / "val" / "class2").rename(tmp_path / "val" / "klass2")
    assert "class2, klass2" in message()
    (tmp_path / "val" / "klass2").rename(tmp_path / "val" / "class2")
    data.train_data(name, tmp_path, batch_size=2, image_size=16, workers=0)


def test_imagenet_is_tested_without_its_training_images(tmp_path):
    write_tree(tmp_path, {"val": 2})
    test, info = data.test_data("imagenet", tmp_path, batch_size=4, image_size=16, workers=0)
    assert test.num_images == 6 and info.num_classes == 3
