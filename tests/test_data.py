"""Datasets and loaders: classes and their names, halves of a search, resume, shares, lost workers, bad files."""

import gzip
import hashlib
import itertools
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from lib import data, loaders
from lib.cli import UserError
from lib.data import INFO, InMemory, Loader, Options
from lib.distributed import RankLost

CIFAR = INFO["cifar10"]
BAD_FILES = {"text.jpg": b"this is no image\n", "empty.png": b""}


def write_tree(root: Path, parts: dict[str, int], classes: str = "012", size=(40, 30), kind="png", dark=0) -> Path:
    """`parts`: folder name -> images per class. The classes differ in their colour, so that labels can be checked."""
    rng = np.random.default_rng(0)
    for part, count in parts.items():
        for name in classes:
            folder = root / part / f"class{name}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (size[1], size[0], 3))
                pixels[..., int(name)] += 150 - dark
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.{kind}")
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path, {"train": 6, "val": 4}, kind="jpg")


def open_tree(kind: str, root: Path, seed: int = 0, batch_size: int = 4, **options) -> tuple[Loader, Loader]:
    """(train, test) of the tree, in memory or from disk."""
    name = {"memory": "folder", "disk": "imagenet"}[kind]
    options = dict(image_size=16, workers=0, cutout=4) | options
    train, test, _ = data.train_data(name, root, batch_size=batch_size, seed=seed, **options)
    return train, test


def numbered(count: int, batch_size: int, **options) -> Loader:
    """A loader of black images whose labels are their numbers."""
    options = Options(batch_size, **options)
    return Loader(InMemory(np.zeros((count, 8, 8, 3), np.uint8), np.arange(count), CIFAR, options), "images", options)


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
    return list(itertools.islice(iterator, count))


def error_of(call, *arguments, **options) -> str:
    """The one line of the UserError that a call ends in."""
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- The datasets ----------------------------------------------------------------------------------------------------
def test_the_first_batches_of_a_search_are_what_they_always_were():
    def digest(batches) -> str:
        total = hashlib.sha256()
        for x, y in itertools.islice(batches, 3):
            total.update(x.permute(0, 2, 3, 1).contiguous().numpy().tobytes() + y.numpy().tobytes())
        return total.hexdigest()[:16]

    options = dict(batch_size=64, seed=3, cutout=16)
    train, valid, _ = data.search_data("fashion_mini", ".data", **options)
    found = [digest(b) for b in (train.epoch(1), train.epoch(1, 78), valid.random(1), valid.again_and_again(1))]
    assert found == ["80541fa5bd0765d4", "6a7c06f93688cf6d", "cf2163303e263f82", "c48160934ec63ea0"]
    train, test, _ = data.train_data("fashion_mini", ".data", **options)
    assert [digest(train.epoch(0)), digest(test.in_order())] == ["3f78a8389cba02c5", "ec354e9185dc201a"]
    for x, y in (next(train.epoch(0)), next(train.random(0)), next(test.in_order())):
        assert x.shape == (64, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.is_contiguous(memory_format=torch.channels_last)
    for part, count in ((True, 1000), (False, 200)):
        assert np.bincount(data.read_fashion_mini(Path(), part)[1]).tolist() == [count] * 10


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
    assert "train-images-idx3-ubyte.gz" in error_of(data.read_fashion, tmp_path, True)


def test_a_dataset_that_cannot_be_downloaded_says_which_files_go_where(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr(data, "FASHION_DEBIAN", tmp_path / "nowhere")
    for name, file in (("cifar10", "cifar-10-python.tar.gz"), ("fashion_mnist", "t10k-labels-idx1-ubyte.gz")):
        message = error_of(data.train_data, name, tmp_path / "none", batch_size=8)
        assert file in message and str(tmp_path / "none") in message


# ---- Folders, their classes, and what a checkpoint knows of them -----------------------------------------------------
def test_folder_is_scaled_cropped_and_normalised_by_its_own_statistics(tmp_path):
    write_tree(tmp_path, {"train": 6, "test": 2, "val": 4})
    train, test, info = data.train_data("folder", tmp_path, batch_size=4, image_size=16)
    assert (info.num_classes, info.image_size, train.num_images, test.num_images) == (3, 16, 18, 6)
    assert info.class_names == ("class0", "class1", "class2")
    x, y = collect(train.in_order())
    assert x.shape == (18, 3, 16, 16) and y.tolist() == sorted(y.tolist())
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-4, rtol=0)
    images, labels = collect(test.in_order())
    assert torch.equal(images.mean((2, 3)).argmax(1), labels)  # the classes differ in their colour
    again, _ = data.test_data("folder", tmp_path, batch_size=4, image_size=16)
    assert same(test.in_order(), again.in_order())


@pytest.mark.parametrize("disk", [False, True])
def test_a_checkpoint_is_tested_by_what_it_knows_on_test_images_alone(tmp_path, monkeypatch, disk):
    if disk:
        monkeypatch.setitem(INFO, "folder", data.dataclasses.replace(INFO["folder"], memory_limit=0))
    write_tree(tmp_path / "own", {"train": 6, "test": 2})
    trained, own, info = data.train_data("folder", tmp_path / "own", batch_size=4, image_size=16, workers=0)
    x, y = collect(own.in_order())
    options = dict(batch_size=4, image_size=16, workers=0, mean=list(info.mean), std=list(info.std))

    def tested(root: Path, names=info.class_names):
        loader, found = data.test_data("folder", root, class_names=names, **options)
        assert (found.class_names, found.mean, found.num_classes) == (tuple(names), info.mean, 3)
        return collect(loader.in_order())

    shutil.copytree(tmp_path / "own" / "test", tmp_path / "alone" / "val")
    assert same([tested(tmp_path / "alone")], [(x, y)])
    write_tree(tmp_path / "alone", {"train": 6}, dark=100)  # of no concern
    assert same([tested(tmp_path / "alone")], [(x, y)])
    images, labels = tested(tmp_path / "alone", ["class2", "class1", "class0"])
    assert torch.equal(images, x) and torch.equal(labels, 2 - y)
    shutil.rmtree(tmp_path / "alone" / "val" / "class0"), shutil.rmtree(tmp_path / "alone" / "val" / "class1")
    images, labels = tested(tmp_path / "alone")
    assert torch.equal(images, x[4:]) and labels.tolist() == [2, 2]
    (tmp_path / "alone" / "val" / "class2").rename(tmp_path / "alone" / "val" / "klass2")
    message = error_of(tested, tmp_path / "alone")
    assert f"{tmp_path}/alone/val" in message and "klass2; known: class0, class1, class2" in message


def test_the_hash_is_of_the_files_that_were_opened(tmp_path):
    write_tree(tmp_path, {"train": 2, "test": 1})

    def found() -> str:
        return data.search_data("folder", tmp_path, batch_size=2, image_size=16)[2].data_hash

    before, image = found(), tmp_path / "train" / "class1" / "0.png"
    os.utime(image, (0, 0))
    shutil.copy(image, tmp_path / "test" / "class0" / "new.png")  # not of the search
    assert len(before) == 64 and found() == before != data.train_data("folder", tmp_path, batch_size=2)[2].data_hash
    hashes = {before}
    for change in (
        lambda: shutil.copy(image, tmp_path / "train" / "class0" / "new.png"),
        lambda: image.write_bytes(image.read_bytes() + b"\0"),
        lambda: image.rename(tmp_path / "train" / "class2" / "00.png"),
    ):
        change()
        hashes.add(found())
    assert len(hashes) == 4


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_cutout_takes_half_of_the_side_and_never_all(tree, kind):
    def cut(cutout: int | None) -> float:
        """The largest share of an image that is zero."""
        x, _ = collect(open_tree(kind, tree, batch_size=18, cutout=cutout)[0].epoch(0))
        return (x == 0).all(1).float().mean((1, 2)).max().item()

    assert 0 < cut(None) == cut(8) <= 0.25 and cut(0) < 0.02
    assert "cutout of 16 pixels blanks images of 16" in error_of(cut, 16)
    train, _, _ = data.train_data("fashion_mini", ".data", batch_size=8, cutout=None)
    assert train.images.options.cutout == 16


# ---- The halves of a search ------------------------------------------------------------------------------------------
def test_a_search_splits_the_training_images_and_never_opens_the_test_set(monkeypatch):
    def read(root, train):
        assert train, "the search opened the test set"
        return np.zeros((100, 32, 32, 3), np.uint8), np.arange(100)

    monkeypatch.setitem(INFO, "cifar10", data.Info(100, CIFAR.mean, CIFAR.std, read=read))

    def halves(seed):
        train, valid, _ = data.search_data("cifar10", ".data", batch_size=10, train_portion=0.8, seed=seed)
        seen = set(collect(train.epoch(0))[1].tolist()), set(collect(valid.in_order())[1].tolist())
        assert seen[0] | set(collect(train.in_order())[1].tolist()) == seen[0]
        assert set(take(valid.random(0), 1)[0][1].tolist()) <= seen[1]
        return seen

    train, valid = halves(0)
    assert len(train) == 80 and train.isdisjoint(valid) and train | valid == set(range(100))
    assert halves(0) == (train, valid) != halves(1)


def test_a_search_on_a_folder_needs_no_test_images(tmp_path, monkeypatch):
    write_tree(tmp_path, {"train": 4})
    train, valid, info = data.search_data("folder", tmp_path, batch_size=6, image_size=16)
    assert (train.num_images, valid.num_images, info.num_classes) == (6, 6, 3)
    paths = set(train.images.paths), set(valid.images.paths)
    monkeypatch.setitem(INFO, "folder", data.dataclasses.replace(INFO["folder"], memory_limit=1000))
    train, valid, _ = data.search_data("folder", tmp_path, batch_size=3, image_size=16, workers=0)  # now from disk
    assert paths == (set(train.images.paths), set(valid.images.paths)) and paths[0].isdisjoint(paths[1])
    assert isinstance(train.images, data.OnDisk) and next(train.epoch(0))[0].shape == (3, 3, 16, 16)


# ---- Every batch a function of (seed, epoch, step) -------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_batch_is_what_seed_epoch_and_step_say_so_that_an_epoch_can_be_resumed(tree, kind):
    train, _ = open_tree(kind, tree)
    whole = list(train.epoch(3))
    assert len(whole) == len(train) == 5 and [len(y) for _, y in whole] == [4, 4, 4, 4, 2]
    torch.manual_seed(123)  # the global generators have no say
    np.random.seed(123)
    before = torch.get_rng_state()
    resumed, _ = open_tree(kind, tree)
    assert same(resumed.epoch(3, start=2), whole[2:])
    assert same(take(resumed.random(1, start=3), 2), take(train.random(1), 5)[3:])
    assert same(take(resumed.again_and_again(1, start=6), 5), take(train.again_and_again(1), 11)[6:])
    assert list(train.epoch(0, start=5)) == []
    assert torch.equal(torch.get_rng_state(), before)  # and are left alone
    other, _ = open_tree(kind, tree, seed=1)
    assert same(train.epoch(3), whole) and not same(train.epoch(0), whole) and not same(other.epoch(3), whole)
    first, second = take(train.random(0), 2)
    assert not same([first], [second]) and not same([first], take(train.random(1), 1))
    one = (tree / "train" / "class0" / "0.jpg").read_bytes()
    for path in (tree / "train").rglob("*.jpg"):
        path.write_bytes(one)
    x, _ = collect(open_tree(kind, tree)[0].epoch(0))  # one image eighteen times
    assert len(torch.unique(x.flatten(1), dim=0)) == 18


def test_the_last_batch_is_what_is_left_shared_evenly():
    """CIFAR's searches and retrainings have as many steps an epoch as published; two processes get 5 each of 11."""
    assert [len(numbered(*counts)) for counts in ((25000, 64), (50000, 96), (50000, 128))] == [391, 521, 391]
    for num_images, world_size, expected in (
        (11, 1, [8, 3]), (9, 1, [8]), (16, 1, [8, 8]), (27, 2, [8, 5]), (19, 2, [8])
    ):  # fmt: skip
        for rank in range(world_size):
            loader = numbered(num_images, 8, rank=rank, world_size=world_size)
            assert [len(y) for _, y in loader.epoch(0)] == expected and len(loader) == len(expected)


def test_images_run_through_without_replacement_and_in_another_order_afterwards():
    loader = numbered(10, 4)
    rounds = np.split(np.concatenate([y for _, y in take(loader.again_and_again(0), 9)]), 3)
    assert all(sorted(labels) == list(range(10)) for labels in rounds)
    assert len({tuple(labels) for labels in rounds}) == 3
    assert sorted(collect(loader.epoch(0))[1].tolist()) == list(range(10))
    assert all(len(set(y.tolist())) == 4 for _, y in take(loader.random(0), 20))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_processes_share_the_batches_of_one_with_all_their_images_and_each_test_image_is_counted_once(tree, kind):
    alone, _ = open_tree(kind, tree, batch_size=6)
    shares = [open_tree(kind, tree, batch_size=3, rank=rank, world_size=2)[0] for rank in range(2)]
    assert len(alone) == len(shares[0]) == len(shares[1]) == 3
    for batches in (lambda s: list(s.epoch(2)), lambda s: take(s.random(2), 3)):
        steps = zip(*(batches(share) for share in shares), strict=True)
        assert same(batches(alone), [tuple(map(torch.cat, zip(*step, strict=True))) for step in steps])

    x, y = collect(open_tree(kind, tree, batch_size=12)[1].in_order())
    for rank in range(5):
        _, share = open_tree(kind, tree, batch_size=2, rank=rank, world_size=5)
        mine, labels = collect(share.in_order())
        assert torch.equal(mine, x[rank::5]) and torch.equal(labels, y[rank::5])
        assert len(share) == len(list(share.in_order()))


def test_images_from_disk_are_tested_as_torchvision_does_it(tmp_path):
    write_tree(tmp_path, {"val": 2}, size=(70, 50))
    info = INFO["imagenet"]
    test, _ = data.test_data("imagenet", tmp_path, batch_size=6, image_size=28, workers=0)
    steps = transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor()
    reference = transforms.Compose([*steps, transforms.Normalize(info.mean, info.std)])
    ((x, _),) = test.in_order()
    for image, path in zip(x, sorted((tmp_path / "val").rglob("*.png")), strict=True):
        torch.testing.assert_close(image, reference(Image.open(path)), atol=1e-5, rtol=0)


def test_the_first_process_downloads_before_the_others_look(monkeypatch):
    order = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: order.append("wait"))

    def read(root, train):
        order.append("read")
        raise UserError("offline")  # the others must not wait for ever for a process that failed

    monkeypatch.setitem(INFO, "cifar10", data.dataclasses.replace(CIFAR, read=read))
    for rank in (0, 1):
        assert error_of(data.search_data, "cifar10", ".data", batch_size=4, rank=rank, world_size=2) == "offline"
    assert order == ["read", "wait", "wait", "read"]


# ---- Workers ---------------------------------------------------------------------------------------------------------
def test_batches_from_disk_do_not_depend_on_the_number_of_workers(tree):
    alone = list(open_tree("disk", tree)[0].epoch(0))
    train, test = open_tree("disk", tree, workers=2)
    assert same(train.epoch(0), alone)
    assert same(take(train.random(0), 3), take(open_tree("disk", tree)[0].random(0), 3))
    assert same(test.in_order(), open_tree("disk", tree)[1].in_order())
    sent = pickle.loads(pickle.dumps(train.images))  # as to workers that are started anew, not forked
    assert same([sent[np.arange(3), None][:2]], [train.images[np.arange(3), None][:2]])


def test_workers_live_through_signals_that_are_for_the_main_process(tree):
    """Pre-emption signals every process; the main one still has a step to finish."""
    train, _ = open_tree("disk", tree, batch_size=2, workers=2)
    expected = list(open_tree("disk", tree, batch_size=2)[0].epoch(0))
    batches = train.epoch(0)
    seen = take(batches, 2)  # one of each worker: both have begun
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for number in ("INT", "TERM"):  # not from the main process
        subprocess.run(["kill", f"-{number}", *(str(worker.pid) for worker in workers)], check=True)
    assert same(seen + list(batches), expected)
    del batches
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


@pytest.mark.parametrize(
    ("sent", "leaves", "expected", "words"),
    [
        (signal.SIGKILL, False, RankLost, "lost a process that reads images.*(exited|gone).*--workers 0"),
        (signal.SIGSTOP, False, RankLost, "lost a process that reads images.*no image in 2 seconds.*--workers 0"),
        (signal.SIGSTOP, True, SystemExit, "143"),  # a signal to the main process, while it waits
    ],
)
def test_a_lost_or_silent_worker_ends_the_run_and_a_signal_the_wait(tree, monkeypatch, sent, leaves, expected, words):
    monkeypatch.setattr(loaders, "SILENCE", 2)
    train, _ = open_tree("disk", tree, batch_size=2, workers=1)
    train.while_waiting = lambda: sys.exit(143) if leaves else None
    batches = train.random(0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, sent)
    with pytest.raises(expected, match=words):
        take(batches, 20)  # a few are ready
    worker.join(10)
    assert not worker.is_alive()


def test_a_small_shared_memory_is_refused_in_numbers(tree, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**16, 0, 2**16))
    message = error_of(open_tree, "disk", tree, workers=2)
    assert "a batch takes 0.01 MB of shared memory, the workers' 0.07 MB, /dev/shm has 0.06 MB" in message
    assert "--workers 0" in message and "--shm-size" in message
    open_tree("disk", tree, workers=0), open_tree("memory", tree, workers=2)


CAN_UNSHARE = shutil.which("unshare") and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not CAN_UNSHARE, reason="needs to mount a file system")
def test_a_shared_memory_that_is_filled_in_the_run_ends_it(tree):
    lines = [
        "import shutil; from lib import data, distributed",
        "shutil.disk_usage = lambda path, usage=shutil.disk_usage(path='/'): usage",  # somebody else fills it later
        f"train, _, _ = data.train_data('imagenet', {str(tree)!r}, batch_size=8, image_size=64, workers=2)",
        "try: list(train.epoch(0))",
        "except distributed.RankLost as error: print(error)",
    ]
    mount = f'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "{sys.executable}" -c "$0"'
    command = ["unshare", "-m", "bash", "-c", mount, "\n".join(lines)]
    done = subprocess.run(command, cwd=data.FASHION_MINI.parent, capture_output=True, text=True, timeout=60)
    assert "lost a process that reads images" in done.stdout and "shared memory" in done.stdout, done.stderr


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for (Z) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_end_with_the_main_process(tree):
    """Also where its batches are still held, as by a traceback, and where it is killed."""
    lines = [
        "import multiprocessing, os, sys; from lib import data",
        "parent = os.fork()",  # two processes from one import
        f"test, _ = data.test_data('imagenet', {str(tree)!r}, batch_size=1, image_size=16, workers=2)",
        "batches = test.in_order()",
        "next(batches)",
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True)",
        "sys.exit(3) if parent and os.waitstatus_to_exitcode(os.wait()[1]) == -9 else os.kill(os.getpid(), 9)",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    ended = subprocess.run(command, cwd=data.FASHION_MINI.parent, stdout=subprocess.PIPE, text=True, timeout=60)
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 4 and ended.returncode == 3
    deadline = time.time() + 20
    while any(map(is_alive, pids)):
        assert time.time() < deadline
        time.sleep(0.1)


# ---- What bad files and bad requests get -----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_bad_images_stop_with_their_list_or_are_named_and_skipped(tree, kind, caplog):
    clean = list(open_tree(kind, tree)[1].in_order())
    for name, content in BAD_FILES.items():
        (tree / "val" / "class1" / name).write_bytes(content)
    message = error_of(lambda: list(open_tree(kind, tree, batch_size=18)[1].in_order()))
    assert all(name in message for name in BAD_FILES) and "--bad_images skip" in message
    with caplog.at_level(logging.WARNING):
        _, test = open_tree(kind, tree, bad_images="skip")
        images, labels = collect(test.in_order())
        list(test.in_order())
    assert torch.equal(images, collect(clean)[0]) and torch.equal(labels, collect(clean)[1])
    assert len(caplog.records) == len(BAD_FILES)  # each named once
    assert all(sum(name in record.getMessage() for record in caplog.records) == 1 for name in BAD_FILES)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_in_training_is_replaced_by_the_next_good_one(tree, workers):
    (tree / "train" / "class0" / "0.jpg").write_bytes(b"no image")
    train, _ = open_tree("disk", tree, bad_images="skip", workers=workers)
    batches = list(train.epoch(0))
    assert [len(y) for _, y in batches] == [4, 4, 4, 4, 2]
    assert same(train.epoch(0), batches)
    stopping, _ = open_tree("disk", tree, workers=workers)
    assert "class0/0.jpg" in error_of(lambda: [list(stopping.epoch(epoch)) for epoch in range(3)])  # one may drop it


def test_a_bad_request_gets_one_line(monkeypatch):
    arrays = np.zeros((2000, 32, 32, 3), np.uint8), np.zeros(2000, np.int64)
    monkeypatch.setitem(INFO, "fashion_mini", data.dataclasses.replace(CIFAR, read=lambda root, train: arrays))
    for change, *words in (
        (dict(name="cifar"), "'cifar'", "cifar10", "fashion_mini", "folder"),
        (dict(batch_size=600, world_size=2), "600 x 2", "1000 training images"),
        (dict(batch_size=0), "batch_size"),
        (dict(train_portion=float("nan")), "train_portion"),
        (dict(train_portion=0.999), "validation images"),
        (dict(image_size=64), "image_size", "32"),
        (dict(cutout=-1), "cutout"),
        (dict(cutout=32), "cutout of 32 pixels", "half of it (16)"),
        (dict(seed=-1), "seed"),
    ):
        message = error_of(data.search_data, **dict(name="fashion_mini", root=".data", batch_size=64) | change)
        assert all(word in message for word in words), change


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_missing_and_empty_folders_are_named(tmp_path, name):
    def message() -> str:
        return error_of(data.train_data, name, tmp_path, batch_size=2, image_size=16, workers=0)

    train, val, test = tmp_path / "train", tmp_path / "val", "test" if name == "folder" else "val"
    assert f"no folder {train}" in message()
    train.mkdir(), val.mkdir()
    assert f"class folder(s) in {train}" in message()
    train.rmdir(), val.rmdir()
    write_tree(tmp_path, {"train": 2})
    assert f"no folder {tmp_path / test}" in message()
    write_tree(tmp_path, {"val": 2})
    (train / "class_without").mkdir()
    assert f"no image in {train / 'class_without'}" in message()
    (train / "class_without").rmdir()
    (val / "class2").rename(val / "klass2")
    assert "klass2; known: class0, class1, class2" in message()
    shutil.rmtree(val / "klass2")
    assert f"no class folder class2 in {val}" in message()
