"""What a trained network says of images: of a whole test set, and of files that somebody names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import data, distributed
from lib.cli import UserError
from lib.images import list_images, normalise
from lib.loaders import read_pixels

Classifier = Callable[[Tensor], Tensor]  # images -> logits


def read_answers(logits_of: Classifier, loader: data.Loader, add: Callable) -> np.ndarray:
    """A row (index, label, answer, probability) for each image of the loader, over all processes.

    ``add(logits, labels)`` is called with each batch. An index is -1 where unreadable images were left out.
    """
    rows = []
    for x, y in loader.in_order():
        logits = logits_of(x)
        add(logits, y)
        probability, answer = logits.double().softmax(1).max(1)
        rows.append(torch.stack([y.double(), answer.double(), probability.nan_to_num()], 1))
    answers = torch.cat(rows).cpu().numpy() if rows else np.empty((0, 3))
    share = np.arange(loader.options.rank, loader.num_images, loader.options.world_size)
    mine = np.column_stack([share if len(share) == len(answers) else np.full(len(answers), -1), answers])
    everyone = [mine] * distributed.world_size()
    if len(everyone) > 1:
        distributed.together(torch.distributed.all_gather_object, everyone, mine)
    return np.concatenate(everyone)


def find_mistakes(answers: np.ndarray, loader: data.Loader, info: data.Info, most: int = 12) -> tuple[list, list]:
    """(mistakes in words, their images as the network saw them, H x W x 3 uint8), the most confident first."""
    wrong = answers[answers[:, 1] != answers[:, 2]]
    wrong = wrong[np.argsort(-wrong[:, 3], kind="stable")][:most]
    paths, names, mistakes = loader.images.paths, info.class_names, []
    for (index, label, answer), probability in zip(wrong[:, :3].astype(int), wrong[:, 3].tolist(), strict=True):
        image = paths[index] if paths and index >= 0 else int(index)
        mistakes.append(dict(image=image, true=names[label], predicted=names[answer], probability=probability))
    if not mistakes or wrong[:, 0].min() < 0:
        return mistakes, []
    ((x, _),) = loader.images.batches([(wrong[:, 0].astype(int), None)])
    mean, std = (torch.tensor(numbers, device=x.device)[:, None, None] for numbers in (info.mean, info.std))
    return mistakes, list((255 * (x * std + mean)).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())


def predict(
    names: Iterable[str], logits_of: Classifier, info: data.Info, device: torch.device, batch_size: int
) -> Iterator[tuple[str, list[dict] | str]]:
    """(path, the up to five best classes, each with its probability) of every image; a text where it is unreadable."""
    paths = list(find_files(names))
    for start in range(0, len(paths), batch_size):
        images = [(path, read_pixels(path, info)) for path in paths[start : start + batch_size]]
        yield from (pair for pair in images if isinstance(pair[1], str))
        good = [pair for pair in images if not isinstance(pair[1], str)]
        if not good:
            continue
        x = normalise(torch.from_numpy(np.stack([image for _, image in good])).to(device), info.mean, info.std)
        probabilities, classes = logits_of(x).double().softmax(1).sort(descending=True)
        for (path, _), row, best in zip(good, probabilities.tolist(), classes.tolist(), strict=True):
            named = [info.class_names[k] if info.class_names else f"class {k}" for k in best[:5]]
            yield path, [{"class": name, "probability": p} for name, p in zip(named, row, strict=False)]


def find_files(names: Iterable[str]) -> Iterator[str]:
    """The files of these names, and the images in the folders among them and below, in the order of their names."""
    for name in names:
        if not os.path.isdir(name):
            yield name
        elif found := list_images(Path(name)):
            yield from (os.path.join(name, file) for file, _ in found)
        else:
            raise UserError(f"no image in {name}: expected files such as .jpg or .png in it")
