"""What a network confuses on a test set: per class, as a matrix, and its most confident mistakes; text and pictures."""

from __future__ import annotations

import io
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lib.checkpoints import write_whole
from lib.cli import printable
from lib.tables import markdown_table

FEW = 20  # classes whose whole matrix is shown
WORST = 10  # classes, and pairs of classes, that are shown of more


def count_confusions(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> dict:
    """Plain values from N labels and N predicted labels: ``classes``, ``per_class`` and ``confusion``.

    ``confusion`` has a row for each true class and a column for each predicted one, of numbers of images; ``per_class``
    is in the order of the classes, with the accuracy in percent (None where there is no image).
    """
    matrix = np.zeros((len(names), len(names)), int)
    np.add.at(matrix, (labels, predicted), 1)
    images = matrix.sum(1).tolist()
    per_class = [
        {"class": name, "accuracy": 100 * right / count if count else None, "images": count}
        for name, right, count in zip(names, matrix.diagonal().tolist(), images, strict=True)
    ]
    return {"classes": list(names), "per_class": per_class, "confusion": matrix.tolist()}


def describe_confusions(counted: dict) -> str:
    """One table for up to 20 classes; of more the classes and the confusions that cost the most accuracy."""
    classes, matrix = [printable(name) for name in counted["classes"]], np.array(counted["confusion"])
    shares = ["no image" if c["accuracy"] is None else f"{c['accuracy']:.1f} %" for c in counted["per_class"]]
    if len(classes) <= FEW:
        heading = ["class", "accuracy", *(f"as {k}" for k in range(len(classes)))]
        rows = [[f"{k} {name}", shares[k], *map(str, matrix[k])] for k, name in enumerate(classes)]
        return markdown_table([heading, *rows])
    accuracy = [math.inf if c["accuracy"] is None else c["accuracy"] for c in counted["per_class"]]
    worst = np.argsort(accuracy, kind="stable")[:WORST]
    rows = [["worst classes", "accuracy", "images"], *([classes[k], shares[k], str(matrix[k].sum())] for k in worst)]
    np.fill_diagonal(matrix, 0)
    commonest = np.argsort(-matrix, axis=None, kind="stable")[:WORST]
    pairs = [
        [classes[k // len(classes)], classes[k % len(classes)], str(matrix.flat[k])]
        for k in commonest
        if matrix.flat[k]
    ]
    return f"{markdown_table(rows)}\n\n{markdown_table([['true class', 'taken for', 'images'], *pairs])}"


def write_evaluation(folder: Path, found: dict, thumbnails: Sequence[np.ndarray]) -> None:
    """Write evaluation.json (all that was found), confusion.png and mistakes.png, or one line that says why not."""
    try:
        write_whole(folder / "evaluation.json", json.dumps(found) + "\n")
        write_whole(folder / "confusion.png", draw_confusions(found))
        write_whole(folder / "mistakes.png", draw_mistakes(found["mistakes"], thumbnails))
    except OSError as error:
        print(f"warning: {error.filename} not written ({error.strerror})", file=sys.stderr)


def draw_confusions(counted: dict) -> bytes:
    """The matrix as a PNG: the share of each true class, with the numbers of images where there are few classes."""
    from matplotlib.figure import Figure  # slow to import

    matrix, n = np.array(counted["confusion"]), len(counted["classes"])
    side = max(4.0, min(10.0, 2 + 0.5 * n))
    figure = Figure((side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(matrix / np.maximum(matrix.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class")
    if n <= FEW:
        names = [shorten(name) for name in counted["classes"]]
        axes.set_xticks(range(n), names, rotation=90, parse_math=False)
        axes.set_yticks(range(n), names, parse_math=False)
        for (row, column), images in np.ndenumerate(matrix):
            dark = images > matrix[row].sum() / 2
            axes.text(
                column, row, str(images), ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )
    return as_png(figure)


def draw_mistakes(mistakes: list[dict], thumbnails: Sequence[np.ndarray]) -> bytes:
    """Images (H, W, 3; uint8) as a PNG, each under its true class -> the predicted one, and the probability of that."""
    from matplotlib.figure import Figure

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
    return as_png(figure)


def shorten(name: str) -> str:
    """A class's name as a picture has room for it."""
    return printable(name) if len(name) <= 18 else printable(name[:17]) + "…"


def as_png(figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font does not have
        figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
