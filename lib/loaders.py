"""Loaders: the batches of a set of images that lives in memory or is read from disk by DataLoader workers.

Every batch is a pure function of (seed, epoch, step): its random numbers come from a generator seeded with just these.
So a resumed run needs no state of its loaders, and several processes all draw the same global batch and each takes its
slice of it: two processes with batch B see the images, crops and flips of one process with batch 2B.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from lib.cli import UserError, progress
from lib.distributed import RankLost, to_device
from lib.images import centre_square, crop_and_flip, cut_out, draw_augmentation, list_names, normalise, read_image

log = logging.getLogger(__name__)

Arrays = tuple[np.ndarray, np.ndarray]  # images N x H x W x 3 (uint8), labels N (int64)
Batch = tuple[Tensor, Tensor]  # images B x 3 x H x W (float32, normalised, channels_last), labels B (int64)
Sample = tuple[str, int]  # path of an image, label
# A step: the indices (B) of its images, and B x 5 numbers in [0, 1), the randomness of each; None: no augmentation.
Step = tuple[np.ndarray, np.ndarray | None]


# ---- What is known, and what is asked for ----------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Info:
    """What is known of a dataset. Means and deviations are of the pixels' values in 0..1, per channel."""

    num_classes: int  # 0: as many as there are class folders
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int = 32
    read: Callable[[Path, bool], Arrays] | None = None  # None: class folders under root
    halved: bool = True  # a search halves the training images; else it takes train/ and the test folder as they are
    test_folders: tuple[str, ...] = ("test", "val")  # the first that is there
    test_scale: float = 1.0  # shorter side of a test image, in sides of the centre square that is cut out of it
    memory_limit: int = 2 << 30  # bytes: fewer images live in memory, and mean and std are those of the training images
    hint: str = ""  # how to get the folder
    class_names: tuple[str, ...] = ()  # of each label
    data_hash: str = ""  # of the files that were opened: class, name and size of each


@dataclasses.dataclass(frozen=True)
class Options:
    """How images are read, the same for all datasets. Raises UserError for a number that cannot be."""

    batch_size: int  # per process
    seed: int = 0  # of the halves of a search, the order of images and their augmentation
    cutout: int | None = 0  # side of the square cut out of training images, pixels; None: half the image's; 0: none
    device: torch.device | str = "cpu"
    image_size: int | None = None  # pixels, for folder and imagenet; None: the table's
    workers: int = 2  # processes or threads that read image files; 0: the main process
    rank: int = 0
    world_size: int = 1
    bad_images: str = "stop"  # or "skip": they are named and left out
    jitter: bool = False  # colour jitter on training images read from disk
    quiet: bool = False  # no progress bar while images are read
    mean: Sequence[float] | None = None  # that images are normalised by; None: the dataset's own
    std: Sequence[float] | None = None
    class_names: Sequence[str] | None = None  # labels are indices into these; None: the dataset's own

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "seed": 0, "cutout": 0, "workers": 0, "image_size": 8}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{name} is {value}, expected {least} or more")


# ---- Where images are: in memory or on disk --------------------------------------------------------------------------
class InMemory:
    """Images as one uint8 tensor on the device; a batch is cropped, flipped and cut out there."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, info: Info, options: Options, paths: Sequence[str] = ()):
        self.images = torch.as_tensor(images).to(options.device)  # N x H x W x 3
        self.labels = torch.as_tensor(labels).to(options.device)
        self.rows = torch.arange(len(self.images), device=options.device)  # the images of this set
        self.info, self.options, self.paths = info, options, paths

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: np.ndarray) -> InMemory:
        """The images of these indices; the pixels are shared."""
        part = copy.copy(self)
        part.rows = self.rows[torch.from_numpy(indices).to(self.rows.device)]
        part.paths = [self.paths[i] for i in indices] if self.paths else ()
        return part

    def batches(self, steps: Iterable[Step], while_waiting: Callable[[], None] = bool) -> Iterator[Batch]:
        """The batch of each step."""
        device, info = self.rows.device, self.info
        padding = info.image_size // 8  # 4 for 32 x 32
        for indices, numbers in steps:
            rows = self.rows[to_device(torch.from_numpy(indices), device)]
            images, labels = self.images.index_select(0, rows), self.labels.index_select(0, rows)
            if numbers is None:
                yield normalise(images, info.mean, info.std), labels
                continue
            draws = to_device(draw_augmentation(numbers, info.image_size, padding), device)
            top, left, flip, row, column = draws.unbind(1)
            x = normalise(crop_and_flip(images, top, left, flip, padding), info.mean, info.std)
            yield cut_out(x, row, column, self.options.cutout), labels


SILENCE = 40  # seconds without a word of any worker that end a run: its disk, or the process itself, is gone


class OnDisk(torch.utils.data.Dataset):
    """Images read by DataLoader workers, augmented as for ImageNet; normalised, and cut out, on the device."""

    def __init__(self, samples: list[Sample], info: Info, options: Options):
        from torchvision.transforms import v2  # slow to import

        self.samples, self.info, self.options = samples, info, options
        jitter = [v2.ColorJitter(0.4, 0.4, 0.4, 0.2)] if options.jitter else []
        crop = v2.RandomResizedCrop(info.image_size)
        self.augmented = v2.Compose([crop, v2.PILToTensor(), v2.RandomHorizontalFlip(), *jitter])
        self.images_read = torch.zeros(1, dtype=torch.int64)  # shared with the workers: shows that they live
        self.reported: set[str] = set()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def paths(self) -> list[str]:
        """The file of each image."""
        return [path for path, _ in self.samples]

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
                image = self._read(path, None if numbers is None else numbers[i])
                if not isinstance(image, str):
                    images.append(image)
                    labels.append(label)
                    break
                bad.append(image)
        stacked = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
        if get_worker_info():
            stacked.share_memory_()  # where there is no room for it, here is an error; in DataLoader's thread, silence
        draws = None if numbers is None else draw_augmentation(numbers, size, padding=0)
        return stacked, torch.tensor(labels, dtype=torch.int64), bad, draws

    def _read(self, path: str, numbers: np.ndarray | None) -> Tensor | str:
        """One image, 3 x H x W; augmented by its own randomness, in whichever worker it is read."""
        self.images_read += 1
        if numbers is None:
            pixels = read_pixels(path, self.info)
            return pixels if isinstance(pixels, str) else torch.from_numpy(pixels).permute(2, 0, 1)
        image = read_image(path)
        if isinstance(image, str):
            return image
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(numbers[0] * 2**53))
            return self.augmented(image)

    def batches(self, steps: Iterable[Step], while_waiting: Callable[[], None] = bool) -> Iterator[Batch]:
        """The batch of each step; one without a readable image is left out, in training it raises UserError."""
        device, info = torch.device(self.options.device), self.info
        for images, labels, bad, draws in self._receive(steps, while_waiting):
            report_bad([name for name in bad if name not in self.reported], self.options.bad_images)
            self.reported.update(bad)
            if not labels.numel():
                if draws is not None:
                    raise UserError(f"no readable image among {len(self)}")
                continue
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            x = normalise(images.permute(0, 2, 3, 1).contiguous(), info.mean, info.std)
            if draws is not None:
                *_, row, column = draws.to(device, non_blocking=True).unbind(1)
                cut_out(x, row, column, self.options.cutout)
            yield x, labels

    def _receive(self, steps: Iterable[Step], while_waiting: Callable[[], None]) -> Iterator[tuple]:
        """What __getitem__ returns for each step; RankLost if a worker dies, or none reads an image for SILENCE."""
        loader = DataLoader(
            self,
            batch_size=None,  # a step is a batch
            sampler=steps,
            num_workers=self.options.workers,
            worker_init_fn=_start_worker,
            pin_memory=torch.device(self.options.device).type == "cuda",
            generator=torch.Generator(),  # leaves the global one alone
        )
        if self.options.workers:
            self.images_read.share_memory_()
        others = set(multiprocessing.active_children())
        handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None  # not on Windows
        batches = iter(loader)
        workers = set(multiprocessing.active_children()) - others
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)  # DataLoader's raises wherever the program is, also inside a step
        lost = "lost a process that reads images (%s): --workers 0 reads without them, --resume goes on"
        silence, images_read = 0, -1

        def look_after_workers() -> None:
            nonlocal silence, images_read
            while_waiting()
            silence, images_read = silence + 1 if images_read == self.images_read else 0, int(self.images_read)
            if silence >= SILENCE and workers:
                raise RankLost(lost % f"no image in {SILENCE} seconds")

        try:
            while True:
                with _every_second(look_after_workers):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch
        except (EOFError, ConnectionError):
            raise RankLost(lost % "it is gone") from None
        except RuntimeError as error:
            *_, reason = str(error).splitlines()
            if "DataLoader" not in reason and "shared memory" not in reason:
                raise
            raise RankLost(lost % reason) from None
        finally:
            del batches  # ends the workers, and waits for them a while
            for worker in workers:
                worker.kill()  # one that is stopped obeys nothing else, and Python waits for it at its end


@contextlib.contextmanager
def _every_second(call: Callable[[], None]) -> Iterator[None]:
    """Call something, which may raise, in every second of a wait that has no limit of its own."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield  # not on Windows
        return
    handler = signal.signal(signal.SIGALRM, lambda number, frame: call())
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def _start_worker(_: int) -> None:
    """Workers ignore Ctrl-C and obey SIGTERM from their parent only.

    Pre-emption and torchrun signal every process of a run; the main one then finishes its step, for which it needs
    batches. Ignoring SIGTERM would not do: Python ends its workers with it, and waits for them.
    """

    def end_with_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_parent, daemon=True).start()


def check_shared_memory(images: InMemory | OnDisk, loaders: int = 1) -> None:
    """UserError unless the batches that workers have ready fit into /dev/shm, which is small in containers."""
    options, size = images.options, images.info.image_size
    if isinstance(images, InMemory) or not options.workers or not os.path.isdir("/dev/shm"):
        return
    batch = options.batch_size * (3 * size**2 + 48) + 3 * 4096  # bytes, of three tensors in whole pages
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    need = (2 * options.workers + 1) * batch * loaders * processes  # a worker prepares two batches, one is in use
    if need > (free := shutil.disk_usage("/dev/shm").free):
        batch, need, free = (f"{number / 2**20:.2f} MB" for number in (batch, need, free))
        advice = "--workers 0 needs none, docker run --shm-size=2g gives more"
        raise UserError(f"a batch takes {batch} of shared memory, the workers' {need}, /dev/shm has {free}: {advice}")


def read_pixels(path: str, info: Info) -> np.ndarray | str:
    """An image as a network is tested on it, H x W x 3 (uint8), before `normalise`; or why it is unreadable."""
    image = read_image(path)
    return image if isinstance(image, str) else np.array(centre_square(image, info.image_size, info.test_scale))


def read_images(samples: list[Sample], info: Info, options: Options) -> InMemory:
    """All images, in memory.

    Raises UserError with the list of the unreadable files; with bad_images="skip" they are logged and left out.
    """
    images, good, bad = np.empty((len(samples), info.image_size, info.image_size, 3), np.uint8), [], []
    with ThreadPool(max(1, options.workers)) as pool:  # Pillow decodes and scales without Python's lock
        results = pool.imap(lambda sample: read_pixels(sample[0], info), samples)
        results = progress(results, options.quiet, total=len(samples), desc="reading images")
        for sample, image in zip(samples, results, strict=True):
            if isinstance(image, str):
                bad.append(image)
            else:
                images[len(good)] = image
                good.append(sample)
    report_bad(bad, options.bad_images)
    paths, labels = [path for path, _ in good], np.array([label for _, label in good], dtype=np.int64)
    if missing := {label for _, label in samples} - set(labels.tolist()):
        names = list_names(info.class_names[label] for label in sorted(missing))
        raise UserError(f"no readable image of the class {names}: add some or remove its folder")
    return InMemory(images[: len(good)], labels, info, options, paths)


def report_bad(bad: list[str], bad_images: str) -> None:
    """Stop with the list of unreadable images, or log each."""
    if bad and bad_images != "skip":
        raise UserError(f"{len(bad)} unreadable image(s): {list_names(bad)}; replace them, or pass --bad_images skip")
    for name in bad:
        log.warning("skipped unreadable image %s", list_names([name]))


# ---- Loaders ---------------------------------------------------------------------------------------------------------
SPLIT, ORDER, EPOCH, RANDOM, ROUND = range(5)  # what random numbers are for
SMALLEST = 2  # images of a process in the last batch of an epoch: batch normalisation needs two


def generator(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """The generator of one purpose at one position: the same arguments give the same numbers."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *position)))


class Loader:
    """Batches of one set of images for one process. len(loader) is the number of steps of an epoch.

    A step of all processes takes batch_size * world_size images, of which this process has the slice of its rank. Two
    loaders of a run differ in their stream of random numbers. The last batch of an epoch is what is left, shared
    evenly: up to world_size - 1 images are left out, and all where a process would get one. Raises UserError for a
    batch larger than the set.

    `while_waiting` is called in every second in which the next batch is not there yet, and may raise: a run that got a
    signal need not wait for its disk.
    """

    def __init__(
        self, images: InMemory | OnDisk, what: str, options: Options, *, stream: int = 0, training: bool = True
    ):
        self.images, self.options, self.stream, self.training = images, options, stream, training
        self.num_images = len(images)
        self.while_waiting: Callable[[], None] = bool  # does nothing
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
        order = generator(self.options.seed, ORDER, self.stream, epoch).permutation(self.num_images)
        steps = (self._step(EPOCH, epoch, step, self._global(order, step)) for step in range(start, len(self)))
        return self._batches(steps)

    def random(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Endless: at each step a fresh random batch, without replacement inside the batch, augmented."""
        return self._batches(self._step(RANDOM, epoch, step) for step in itertools.count(start))

    def again_and_again(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Endless: the images without replacement in a new order, and in another order when they are used up."""
        return self._batches(self._rounds(epoch, start))

    def _rounds(self, epoch: int, start: int) -> Iterator[Step]:
        for step in itertools.count(start):
            number, place = divmod(step, len(self))
            if place == 0 or step == start:
                order = generator(self.options.seed, ROUND, self.stream, epoch, number).permutation(self.num_images)
            yield self._step(RANDOM, epoch, step, self._global(order, place))

    def in_order(self) -> Iterator[Batch]:
        """Every image once over all processes, not augmented; each reads its share, the last batch may be short."""
        share, size = self._share(), self.options.batch_size
        return self._batches((np.array(share[i : i + size]), None) for i in range(0, len(share), size))

    def _batches(self, steps: Iterable[Step]) -> Iterator[Batch]:
        return self.images.batches(steps, lambda: self.while_waiting())

    def _share(self) -> range:
        """The images of this process, where each is read once."""
        return range(self.options.rank, self.num_images, self.options.world_size)

    def _global(self, order: np.ndarray, step: int) -> np.ndarray:
        """The images of all processes in a step: the last step takes what is left, as far as it can be shared."""
        images = order[step * self.global_batch : (step + 1) * self.global_batch]
        return images[: len(images) // self.options.world_size * self.options.world_size]

    def _step(self, purpose: int, epoch: int, step: int, indices: np.ndarray | None = None) -> Step:
        """This process's share of a global batch, drawn whole by every process."""
        rng = generator(self.options.seed, purpose, self.stream, epoch, step)
        if indices is None:
            indices = rng.choice(self.num_images, self.global_batch, replace=False)
        share = len(indices) // self.options.world_size
        mine = slice(self.options.rank * share, (self.options.rank + 1) * share)
        return indices[mine], rng.random((len(indices), 5))[mine]
