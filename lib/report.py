"""A run's page, report.html, as one file that fetches nothing: what python visualize.py RUN --all is made of."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import string
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.cli import UserError
from lib.records import Record, read_json

INK, MUTED, LINE, SOFT, PAPER, BLUE = "#1f2933", "#5f6b7a", "#d5dae1", "#f1f4f8", "#ffffff", "#0072b2"
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", SOFT: "var(--soft)", PAPER: "none"}
COLUMN = 518.4  # points: a picture of this width, figures.WIDTH, fills the column
MANY_CLASSES = 20  # more than these have no confusion matrix in numbers


def build_page(record: Record, tiles: Iterable[tuple[str, str]], sections: list[str]) -> str:
    """The page of a run as HTML: what it is, tiles (number, what it is), and sections that are HTML already."""
    args, name = record.info["args"], html.escape(record.name)
    about = [args.get("dataset"), args.get("space_config"), f"seed {args.get('seed')}"]
    about += [f"{len(record.history)} epochs", args.get("note")]
    about = html.escape(" · ".join(str(item) for item in about if item))
    header = f"<header><p>{html.escape(record.kind)}</p><h1>{name}</h1><p>{about}</p></header>"
    boxes = [f"<div><b>{html.escape(number)}</b><span>{html.escape(what)}</span></div>" for number, what in tiles]
    body = "\n".join([header, f'<div class="tiles">{"".join(boxes)}</div>', *sections])
    page = string.Template(Path(__file__).with_name("page.html").read_text())
    return page.substitute(title=f"{name}: {html.escape(record.kind)}", body=body)


def list_results(record: Record) -> Iterator[tuple[str, str]]:
    """The tiles of what a run reached: accuracies, in the looked-up ones the rank too."""
    search = bool(record.genotypes)
    numbers = [("valid_acc", "validation accuracy")] if search else [("test_acc", "test accuracy, last")]
    for key, what in [*numbers, ("best_acc", "test accuracy, best")]:
        if not math.isnan(last := record.last(key)):
            yield f"{last:.2f} %", what
    for name in record.parts("table_acc"):
        if not math.isnan(last := record.last("table_acc", name)):
            what, rank = f"looked-up test accuracy{' on ' * bool(name)}{name}", record.last("table_rank", name)
            yield f"{last:.2f} %", what + (f", rank {rank:,.0f} among all" if rank > 0 else "")


def list_costs(record: Record) -> Iterator[tuple[str, str]]:
    """The tiles of what a run took: time and memory."""
    if not math.isnan(minutes := record.minutes):
        text = f"{60 * minutes:.0f} s" if minutes < 1.5 else f"{minutes:.0f} min" if minutes < 90 else ""
        yield text or f"{minutes / 60:.1f} h", "search time" if record.genotypes else "training time"
    if not math.isnan(record.memory_gb):
        yield f"{record.memory_gb:.1f} GB", "peak memory"


def section(title: str, picture: str, caption: str = "") -> str:
    """A section with a picture, which is HTML, and a text below it."""
    frame = f'<div class="picture">{picture}</div>' if picture else ""
    return f"<section><h2>{title}</h2><figure>{frame}<figcaption>{html.escape(caption)}</figcaption></figure></section>"


def copyable(title: str, text: str, hint: str = "") -> str:
    """A section with a text and a button that copies it."""
    words = " ".join(f"<span>{html.escape(word)}</span>" for word in text.split(" "))  # lines break between words only
    button = '<button type="button" onclick="copy(this)">Copy</button>'
    hint = f"<p>{html.escape(hint)}</p>" if hint else ""
    return f'<section><h2>{title}</h2>{hint}<div class="copy"><pre>{words}</pre>{button}</div></section>'


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
    file = folder / "evaluation.json"
    if not file.is_file():
        return ""
    try:
        found = read_json(file)
        classes, counts = found["classes"], [row["images"] for row in found["per_class"]]
        shares = ["no image" if row["accuracy"] is None else float(row["accuracy"]) for row in found["per_class"]]
        text = f"<p>{float(found['accuracy']):.2f} % of {sum(counts):,} images</p>"
        text += table(zip(classes, shares, counts, strict=True), ["class", "accuracy (%)", "images"])
        if len(classes) <= MANY_CLASSES:
            rows = [[name, *row] for name, row in zip(classes, found["confusion"], strict=True)]
            text += details("Confusion matrix in numbers", table(rows, ["true, predicted", *classes]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error!r}); run evaluate.py again") from None
    titles = {"confusion": "Which class was taken for which", "mistakes": "The most confident mistakes"}
    for name, title in titles.items():
        if (picture := folder / f"{name}.png").is_file():
            text += f'<h3>{title}</h3><div class="picture">{embed(picture.read_bytes(), title)}</div>'
    return f"<section><h2>Test</h2>{text}</section>"


def embed(picture: bytes, label: str) -> str:
    """A GIF or PNG as part of the page."""
    kind = "gif" if picture.startswith(b"GIF") else "png"
    return f'<img alt="{html.escape(label)}" src="data:image/{kind};base64,{base64.b64encode(picture).decode()}">'


def embed_svg(file: Path, label: str) -> str:
    """An SVG as part of the page: colours of text and lines follow the page's theme, the size follows the column."""
    head, width, rest = re.search(r'(<svg[^>]*?width="([\d.]+)pt".*?)>(.*)', file.read_text(), re.DOTALL).groups()
    head = re.sub(r'\s(width|height|id|xmlns|xmlns:xlink)="[^"]*"', "", head)
    head += f' style="max-width: {float(width) / COLUMN:.0%}"'  # all pictures at one scale
    used = set(re.findall(r"#([\w-]+)", rest))
    rest = re.sub(r'\sid="([^"]*)"', lambda match: match[0] if match[1] in used else "", rest)
    rest = re.sub(r"<metadata>.*?</metadata>|<title>.*?</title>|<!--.*?-->", "", rest, flags=re.DOTALL)
    for color, variable in THEME.items():
        rest = rest.replace(color, variable)
    return f'{head} role="img" aria-label="{html.escape(label)}">{rest}'


def animate(pictures: list[np.ndarray], texts: list[str], seconds: float = 15.0) -> bytes:
    """An animated GIF of pictures of one size, each with a line of text above it and a bar of how far it is."""
    palette = Image.fromarray(np.vstack(pictures[:: max(1, len(pictures) // 4)])).quantize(255)
    shares = np.arange(1, len(texts) + 1) / len(texts)
    frames = [_frame(*parts) for parts in zip(pictures, texts, shares, strict=True)]
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [int(min(600, max(60, 1000 * seconds / len(frames))))] * (len(frames) - 1) + [3000]
    options = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0, "optimize": True}
    frames[0].save(buffer := io.BytesIO(), "GIF", **options)
    return buffer.getvalue()


def _frame(picture: np.ndarray, text: str, share: float) -> Image.Image:
    height, width = picture.shape[:2]
    frame = Image.new("RGB", (width, height + 44), PAPER)
    frame.paste(Image.fromarray(picture), (0, 44))
    pen = ImageDraw.Draw(frame)
    pen.text((24, 12), text, INK, ImageFont.load_default(20))
    pen.rectangle((24, 40, width - 24, 43), LINE)
    pen.rectangle((24, 40, 24 + (width - 48) * share, 43), BLUE)
    return frame
