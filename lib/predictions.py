"""What a trained network says of images: of a whole test set, what it confuses there, and of files that somebody names.

What is confused is told per class, as a matrix, and by the most confident mistakes; as text and as pictures.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import data, distributed
from lib.checkpoints import write_whole
from lib.cli import UserError, printable
from lib.images import list_images, normalise
from lib.loaders import read_pixels
from lib.tables import markdown_table

Classifier = Callable[[Tensor], Tensor]  # images -> logits
FEW = 20  # classes whose whole matrix is shown
WORST = 10  # classes, and pairs of classes, that are shown of more
MISTAKES = 12  # that are shown


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


def count_confusions(answers: np.ndarray, names: Sequence[str]) -> dict:
    """``classes``, ``per_class`` (accuracy in percent, None without an image) and ``confusion`` as plain values.

    ``confusion`` has a row for each true class and a column for each predicted one, of numbers of images.
    """
    matrix = np.zeros((len(names), len(names)), int)
    np.add.at(matrix, tuple(answers[:, 1:3].astype(int).T), 1)
    numbers = zip(names, matrix.diagonal().tolist(), matrix.sum(1).tolist(), strict=True)
    per_class = [{"class": name, "accuracy": 100 * right / n if n else None, "images": n} for name, right, n in numbers]
    return {"classes": list(names), "per_class": per_class, "confusion": matrix.tolist()}


def describe_confusions(counted: dict) -> str:
    """One table for up to 20 classes; of more the classes and the confusions that cost the most accuracy."""
    classes, matrix = [printable(name) for name in counted["classes"]], np.array(counted["confusion"])
    accuracy = [math.inf if c["accuracy"] is None else c["accuracy"] for c in counted["per_class"]]
    shares = ["no image" if share == math.inf else f"{share:.1f} %" for share in accuracy]
    if len(classes) <= FEW:
        heading = ["class", "accuracy", *(f"as {k}" for k in range(len(classes)))]
        rows = [[f"{k} {name}", shares[k], *map(str, matrix[k])] for k, name in enumerate(classes)]
        return markdown_table([heading, *rows])
    worst = np.argsort(accuracy, kind="stable")[:WORST]
    rows = [["worst classes", "accuracy", "images"], *([classes[k], shares[k], str(matrix[k].sum())] for k in worst)]
    np.fill_diagonal(matrix, 0)
    pairs = [["true class", "taken for", "images"]]
    for k in np.argsort(-matrix, axis=None, kind="stable")[: min(WORST, np.count_nonzero(matrix))]:
        pairs.append([classes[k // len(classes)], classes[k % len(classes)], str(matrix.flat[k])])
    return f"{markdown_table(rows)}\n\n{markdown_table(pairs)}"


def find_mistakes(answers: np.ndarray, loader: data.Loader, info: data.Info) -> tuple[list, list]:
    """(mistakes in words, their images as the network saw them, H x W x 3 uint8), the most confident first."""
    wrong = answers[answers[:, 1] != answers[:, 2]]
    wrong = wrong[np.argsort(-wrong[:, 3], kind="stable")][:MISTAKES]
    paths, names, mistakes = loader.images.paths, info.class_names, []
    for (index, label, answer), probability in zip(wrong[:, :3].astype(int), wrong[:, 3].tolist(), strict=True):
        image = paths[index] if paths and index >= 0 else int(index)
        mistakes.append(dict(image=image, true=names[label], predicted=names[answer], probability=probability))
    if not mistakes or wrong[:, 0].min() < 0:
        return mistakes, []
    ((x, _),) = loader.images.batches([(wrong[:, 0].astype(int), None)])
    mean, std = (torch.tensor(numbers, device=x.device)[:, None, None] for numbers in (info.mean, info.std))
    return mistakes, list((255 * (x * std + mean)).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())


def write_evaluation(folder: Path, found: dict, thumbnails: Sequence[np.ndarray]) -> None:
    """Write evaluation.json (all that was found), confusion.png and mistakes.png, or one line that says why not."""
    try:
        write_whole(folder / "evaluation.json", json.dumps(found) + "\n")
        for name, figure in (("confusion", draw_confusions(found)), ("mistakes", draw_mistakes(found, thumbnails))):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of letters that the font does not have
                figure.savefig(file := io.BytesIO(), format="png", dpi=100)
            write_whole(folder / f"{name}.png", file.getvalue())
    except OSError as error:
        print(f"warning: {error.filename} not written ({error.strerror})", file=sys.stderr)


def draw_confusions(found: dict):
    """The matrix as a figure: the share of each true class, with the numbers of images where there are few classes."""
    from matplotlib.figure import Figure  # slow to import

    matrix, n = np.array(found["confusion"]), len(found["classes"])
    side = max(4.0, min(10.0, 2 + 0.5 * n))
    figure = Figure((side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(matrix / np.maximum(matrix.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class")
    if n <= FEW:
        names = [shorten(name) for name in found["classes"]]
        axes.set_xticks(range(n), names, rotation=90, parse_math=False)
        axes.set_yticks(range(n), names, parse_math=False)
        for (row, column), images in np.ndenumerate(matrix):
            color = "white" if images > matrix[row].sum() / 2 else "black"
            axes.text(column, row, str(images), ha="center", va="center", fontsize=8, color=color)
    return figure


def draw_mistakes(found: dict, thumbnails: Sequence[np.ndarray]):
    """Images (H, W, 3; uint8), each under its true class -> the predicted one, and the probability of that."""
    from matplotlib.figure import Figure

    mistakes = found["mistakes"]
    rows = max(1, math.ceil(len(mistakes) / 4))
    figure = Figure((10, 2.8 * rows), layout="constrained")
    if not thumbnails:
        figure.text(0.5, 0.5, "their images are not known" if mistakes else "no mistakes", ha="center")
    for place, (mistake, image) in enumerate(zip(mistakes, thumbnails, strict=False)):
        axes = figure.add_subplot(rows, 4, place + 1)
        axes.imshow(image)
        axes.axis("off")
        title = f"{shorten(mistake['true'])} → {shorten(mistake['predicted'])}\n{100 * mistake['probability']:.0f} %"
        axes.set_title(title, fontsize=9, parse_math=False)
    return figure


def shorten(name: str) -> str:
    """A class's name as a picture has room for it."""
    return printable(name) if len(name) <= 18 else printable(name[:17]) + "…"


def predict(
    names: Iterable[str], logits_of: Classifier, info: data.Info, device: torch.device, batch_size: int
) -> Iterator[tuple[str, list[dict] | str]]:
    """(path, the up to five best classes with their probabilities) of every image; a text where it is unreadable.

    Images are the files of these names, and those in the folders among them and below, in the order of their names.
    """
    paths = []
    for name in names:
        found = [os.path.join(name, file) for file, _ in list_images(Path(name))] if os.path.isdir(name) else [name]
        if not found:
            raise UserError(f"no image in {name}: expected files such as .jpg or .png in it")
        paths += found
    for start in range(0, len(paths), batch_size):
        images = [(path, read_pixels(path, info)) for path in paths[start : start + batch_size]]
        yield from (pair for pair in images if isinstance(pair[1], str))
        if good := [pair for pair in images if not isinstance(pair[1], str)]:
            x = normalise(torch.from_numpy(np.stack([image for _, image in good])).to(device), info.mean, info.std)
            probabilities, classes = (t[:, :5].tolist() for t in logits_of(x).double().softmax(1).sort(descending=True))
            for (path, _), row, best in zip(good, probabilities, classes, strict=True):
                known = [info.class_names[k] if info.class_names else f"class {k}" for k in best]
                yield path, [{"class": name, "probability": p} for name, p in zip(known, row, strict=True)]
