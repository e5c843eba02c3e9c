"""A run's page, report.html, as one file that fetches nothing: what python visualize.py RUN --all is made of."""

from __future__ import annotations

import base64
import html
import io
import string
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.records import Record, read_json

INK, MUTED, LINE, SOFT, PAPER, BLUE = "#1f2933", "#5f6b7a", "#d5dae1", "#f1f4f8", "#ffffff", "#0072b2"
MANY_CLASSES = 20  # more than these have no confusion matrix in numbers


def build_page(record: Record, tiles: Iterable[tuple[str, str]], sections: list[str]) -> str:
    """The page of a run as HTML: what it is, tiles (number, what it is), and sections that are HTML already."""
    args, name, kind = record.info["args"], html.escape(record.name), html.escape(record.kind)
    about = [args.get("dataset"), args.get("space_config"), f"seed {args.get('seed')}"]
    about = " · ".join(filter(None, [*about, f"{len(record.history)} epochs", args.get("note")]))
    header = f"<header><p>{kind}</p><h1>{name}</h1><p>{html.escape(about)}</p></header>"
    boxes = "".join(
        f"<div><b>{html.escape(number)}</b><span>{html.escape(what)}</span></div>" for number, what in tiles
    )
    body = "\n".join([header, f'<div class="tiles">{boxes}</div>', *sections])
    page = string.Template(Path(__file__).with_name("page.html").read_text())
    return page.substitute(title=f"{name}: {kind}", body=body)


def section(title: str, content: str, caption: str = "") -> str:
    """A section of HTML, and a text below it."""
    return f"<section><h2>{title}</h2>{content}<p>{html.escape(caption)}</p></section>"


def copyable(title: str, text: str) -> str:
    """A section with a text and a button that copies it."""
    button = '<button type="button" onclick="copy(this)">Copy</button>'
    return section(title, f'<div class="copy"><pre>{html.escape(text)}</pre>{button}</div>')


def table(rows: Iterable[Iterable], header: Iterable[str] = ()) -> str:
    """Rows of texts or numbers; the first cell of each names it."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    lines = [[html.escape(f"{cell:.2f}" if isinstance(cell, float) else str(cell)) for cell in row] for row in rows]
    body = "".join(f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in lines)
    return f"<table><tr>{head}</tr>{body}</table>"


def details(title: str, content: str) -> str:
    """HTML that is folded away until a reader asks for it."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def evaluation_section(folder: Path) -> str:
    """What evaluate.py left in a run folder: accuracy per class, confusions and mistakes; "" if it was not run."""
    if not (folder / "evaluation.json").is_file():
        return ""
    found = read_json(folder / "evaluation.json")
    classes, counts = found["classes"], [row["images"] for row in found["per_class"]]
    shares = ["no image" if row["accuracy"] is None else float(row["accuracy"]) for row in found["per_class"]]
    text = f"<p>{found['accuracy']:.2f} % of {sum(counts):,} images</p>"
    text += table(zip(classes, shares, counts, strict=True), ["class", "accuracy (%)", "images"])
    if len(classes) <= MANY_CLASSES:
        rows = [[name, *row] for name, row in zip(classes, found["confusion"], strict=True)]
        text += details("Confusion matrix in numbers", table(rows, ["true, predicted", *classes]))
    titles = {"confusion": "Which class was taken for which", "mistakes": "The most confident mistakes"}
    for name, title in titles.items():
        if (picture := folder / f"{name}.png").is_file():
            text += f"<h3>{title}</h3>{embed(picture, title)}"
    return section("Test", text)


def embed(path: Path, label: str) -> str:
    """A picture file (gif, png, svg) as part of the page."""
    kind, content = path.suffix[1:].replace("svg", "svg+xml"), base64.b64encode(path.read_bytes()).decode()
    return f'<div class="picture"><img alt="{html.escape(label)}" src="data:image/{kind};base64,{content}"></div>'


def animate(pictures: list[np.ndarray], texts: list[str]) -> bytes:
    """An animated GIF, of 15 seconds where it can be, of pictures of one size, a line of text above each."""
    frames = []
    for picture, text in zip(pictures, texts, strict=True):
        frame = Image.fromarray(np.pad(picture, ((44, 0), (0, 0), (0, 0)), constant_values=255))
        ImageDraw.Draw(frame).text((24, 12), text, INK, ImageFont.load_default(20))
        frames.append(frame.quantize(64))
    durations = [min(600, max(60, 15000 // len(frames)))] * (len(frames) - 1) + [3000]
    frames[0].save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return buffer.getvalue()
