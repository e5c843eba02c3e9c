"""The page of a run, report.html, with every figure inside: python visualize.py RUN --all."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import string
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

import genotypes
import visualize
from lib import checkpoints, runs
from visualize import INK, LINE, MUTED, PAPER, SOFT, Record

SEARCHES = {"saliency": "DDSAS search", "probability": "P-DARTS search", None: "Retraining"}
PANELS = "A panel for each edge: a column for each source, a row for each node; shaded if in the genotype."
CAPTIONS = {
    "cells": "A node adds up its two operations; a cell puts out its nodes side by side. Thick lines are 5×5 kernels.",
    "evolution": "The best architecture after each epoch.",
    "progress": "Distance: cosine distance of the one-hot genotypes of consecutive epochs; 0 is the same architecture.",
    "saliency": f"{PANELS} A line ends where its operation leaves the space.",
    "probability": f"{PANELS} At the end of a stage each edge loses its weakest candidates.",
    "subspace": "Which operations were active when. The stronger the colour, the more of the time.",
    "curves": "",
}
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", SOFT: "var(--soft)", PAPER: "none"}


def write_report(run: str | Path) -> list[Path]:
    """All figures of a run into its folder figures/, and report.html that holds them all. Returns the files."""
    record = visualize.load_run(run)
    folder, page, sections = record.folder / "figures", record.folder / "report.html", []
    folder.mkdir(exist_ok=True)
    if record.genotype:
        drawn = len(visualize.draw_cells(record.genotype, folder / "cells")) > 1
        picture = inlined(folder / "cells.svg", "The cells") if drawn else ""
        sections.append(("The cells", CAPTIONS["cells"] if drawn else html.escape(visualize.NO_DOT), picture))
    if record.genotypes and (gif := evolution_gif(record)):
        checkpoints.write_whole(folder / "evolution.gif", gif)
        picture = f'<img alt="The cells after each epoch" src="data:image/gif;base64,{base64.b64encode(gif).decode()}">'
        sections.append(("How the cells evolved", CAPTIONS["evolution"], picture))
    for name, title, caption, figure in figures(record):
        svg, _ = visualize.save_figure(figure, folder / name)
        sections.append((title, CAPTIONS[caption], inlined(svg, title)))
    checkpoints.write_whole(page, page_of(record, sections))
    return [*sorted(folder.iterdir()), page]


def figures(record: Record) -> Iterator[tuple[str, str, str, Figure]]:
    """(name of the file, title, key of the caption, figure) of everything that matplotlib draws of a run."""
    name = "progress" if record.quantity else "curves"
    yield name, "Progress", name, visualize.progress_figure(record)
    for cell in record.cells:
        title = f"{record.quantity.capitalize()}, {visualize.CELL_TITLES[cell].lower()}"
        yield f"{record.quantity}_{cell}", title, record.quantity, visualize.trajectory_figure(record, cell)
    if record.quantity:
        yield "subspace", "The subspace over time", "subspace", visualize.subspace_figure(record)


def evolution_gif(record: Record, seconds: float = 15.0) -> bytes | None:
    """An animated GIF of the cells after each epoch, with its accuracy; None without dot."""
    pictures = {text: visualize.cell_image(genotypes.parse(text)) for text in dict.fromkeys(map(str, record.genotypes))}
    if any(picture is None for picture in pictures.values()):
        return None
    frames = [_frame(record, epoch, pictures[str(genotype)]) for epoch, genotype in enumerate(record.genotypes)]
    palette = frames[-1].quantize(255, Image.Quantize.FASTOCTREE)  # each frame has all colours, in its legend
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [int(min(600, max(60, 1000 * seconds / len(frames))))] * (len(frames) - 1) + [3000]
    options = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0, "optimize": True}
    frames[0].save(buffer := io.BytesIO(), "GIF", **options)
    return buffer.getvalue()


def _frame(record: Record, epoch: int, picture: np.ndarray) -> Image.Image:
    """The cells with a line about the epoch above them, and a bar of how far the search is."""
    height, width = picture.shape[:2]
    frame = Image.new("RGB", (width, height + 44), PAPER)
    frame.paste(Image.fromarray(picture), (0, 44))
    line, genotype = record.history[epoch], record.genotypes[epoch]
    text = f"stage {line['stage'] + 1}, " if "stage" in line else ""
    text += f"epoch {line['epoch'] + 1}"
    if line.get("valid_acc") is not None:
        text += f"   validation {line['valid_acc']:.1f} %"
    if epoch:
        size = visualize.one_hot(genotype).total()
        changed = round(size * visualize.distance(record.genotypes[epoch - 1], genotype))
        text += f"   {changed} of {size} operations changed" if changed else "   unchanged"
    pen = ImageDraw.Draw(frame)
    pen.text((24, 12), text, INK, ImageFont.load_default(20))
    pen.rectangle((24, 40, width - 24, 43), LINE)
    pen.rectangle((24, 40, 24 + (width - 48) * (epoch + 1) / len(record.history), 43), visualize.BLUE)
    return frame


def inlined(path: Path, label: str) -> str:
    """An SVG as part of a page: colours of text and lines follow the page's theme, the size follows the column."""
    head, rest = re.search(r"(<svg.*?)>(.*)", path.read_text(), re.DOTALL).groups()
    head = re.sub(r'\s(width|height|id|xmlns|xmlns:xlink)="[^"]*"', "", head)
    used = set(re.findall(r"#([\w-]+)", rest))
    rest = re.sub(r'\sid="([^"]*)"', lambda match: match[0] if match[1] in used else "", rest)
    rest = re.sub(r"<metadata>.*?</metadata>|<title>.*?</title>|<!--.*?-->", "", rest, flags=re.DOTALL)
    for color, variable in THEME.items():
        rest = rest.replace(color, variable)
    return f'{head} role="img" aria-label="{html.escape(label)}">{rest}'


def facts(record: Record) -> Iterator[tuple[str, str]]:
    """(number, what it is) of the tiles at the top of the page."""
    search = bool(record.quantity)
    if not math.isnan(last := record.last("valid_acc" if search else "test_acc")):
        yield f"{last:.2f} %", "validation accuracy" if search else "test accuracy, last"
    if not search:
        yield f"{np.nanmax(record.series('best_acc')):.2f} %", "test accuracy, best"
    if not math.isnan(last := record.last("table_acc")):
        yield f"{last:.2f} %", f"looked-up test accuracy, rank {record.last('table_rank'):,.0f} among all"
    if record.genotype:
        size = visualize.IMAGENET if record.info["args"].get("dataset") == "imagenet" else visualize.CIFAR
        channels, layers, _ = size = visualize.size_for(record.genotype, size)
        parameters, multiply_adds = visualize.cost(record.genotype, size)
        layers_are, cell = ("cells a stage", "") if size == visualize.NASBENCH201 else ("layers", ", normal cell")
        yield f"{parameters:.2f} M", f"parameters at {channels} channels, {layers} {layers_are}"
        yield f"{multiply_adds:.0f} M", "multiply-adds of an image"
        yield str(genotypes.count_skips(record.genotype)), f"skip connections{cell}"
    if not math.isnan(minutes := record.minutes):
        text = f"{60 * minutes:.0f} s" if minutes < 1.5 else f"{minutes:.0f} min" if minutes < 90 else ""
        yield text or f"{minutes / 60:.1f} h", "search time" if search else "training time"
    if not math.isnan(record.memory_gb):
        yield f"{record.memory_gb:.1f} GB", "peak memory"


def page_of(record: Record, sections: list[tuple[str, str, str]]) -> str:
    """The report as HTML; a section is a title, a caption and a picture."""
    name, kind, args = html.escape(record.folder.resolve().name), SEARCHES[record.quantity], record.info["args"]
    about = [args.get("dataset"), args.get("space_config"), f"seed {args.get('seed')}"]
    about = [str(item) for item in [*about, f"{len(record.history)} epochs", args.get("note")] if item]
    tiles = "".join(f"<div><b>{html.escape(number)}</b><span>{what}</span></div>" for number, what in facts(record))
    parts = [f"<header><p>{kind}</p><h1>{name}</h1><p>{html.escape(' · '.join(about))}</p></header>"]
    parts.append(f'<div class="tiles">{tiles}</div>')
    if record.genotype:
        hint = "<p>To keep it, paste it into genotypes.py under a name.</p>"
        parts.append(copyable("Genotype", str(record.genotype), hint))
    if record.quantity:
        command = runs.retrain_command(record.info["script"], args, record.folder)
        parts.append(copyable("Train it from scratch", command))
    for title, caption, picture in sections:
        figure = f'<div class="picture">{picture}</div>' if picture else ""
        parts.append(f"<section><h2>{title}</h2><figure>{figure}<figcaption>{caption}</figcaption></figure></section>")
    parts.append(copyable("Command of this run", record.info["command"]))
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in [*sorted(args.items()), *record.info["versions"].items()]
    )
    parts.append(f"<details><summary>All arguments, and versions</summary><table>{rows}</table></details>")
    return PAGE.substitute(title=f"{name}: {kind}", body="\n".join(parts))


def copyable(title: str, text: str, hint: str = "") -> str:
    """A block of text with a button that copies it."""
    words = " ".join(f"<span>{html.escape(word)}</span>" for word in text.split(" "))  # lines break between words only
    button = '<button type="button" onclick="copy(this)">Copy</button>'
    return f'<section><h2>{title}</h2>{hint}<div class="copy"><pre>{words}</pre>{button}</div></section>'


PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
:root { --ink: #1f2933; --muted: #5f6b7a; --line: #d5dae1; --soft: #f1f4f8; --page: #ffffff; --link: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --muted: #a3aebc; --line: #3b4554; --soft: #222b38; --page: #141a22; --link: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
header p { margin: 0; color: var(--muted); }
header p:first-child { color: var(--link); font-weight: 600; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.15rem; }
section > p { margin: 0 0 .5rem; color: var(--muted); }
.tiles { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; margin-top: 1.5rem; }
@media (min-width: 40rem) { .tiles { grid-template-columns: repeat(3, 1fr); } }
.tiles div { background: var(--soft); border-radius: .6rem; padding: .7rem .9rem; }
.tiles b { display: block; font-size: 1.25rem; }
.tiles span { display: block; color: var(--muted); font-size: .82rem; line-height: 1.3; }
.copy { display: flex; gap: .6rem; align-items: flex-start; padding: .7rem; }
.copy { background: var(--soft); border-radius: .6rem; }
pre { flex: 1; min-width: 0; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
pre span { display: inline-block; max-width: 100%; }
pre { font: .85rem/1.5 ui-monospace, monospace; }
button { font: inherit; font-size: .85rem; color: var(--ink); background: var(--page); border: 1px solid var(--line);
  border-radius: .4rem; padding: .15rem .7rem; cursor: pointer; }
figure { margin: 0; }
.picture { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; padding: .6rem; }
.picture svg, .picture img { display: block; width: 100%; min-width: 34rem; height: auto; }
.picture img { border-radius: .3rem; }
figcaption { margin-top: .5rem; color: var(--muted); font-size: .9rem; }
details { margin-top: 1.2rem; }
summary { cursor: pointer; color: var(--link); }
table { border-collapse: collapse; width: 100%; margin-top: .6rem; font-size: .88rem; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); font-weight: 400;
  overflow-wrap: anywhere; vertical-align: top; }
th { color: var(--muted); white-space: nowrap; }
</style>
</head>
<body>
<main>
$body
</main>
<script>
async function copy(button) {
  const text = button.previousElementSibling;
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch {  // a page opened from a file may not write to the clipboard: select the text for the reader
    getSelection().selectAllChildren(text);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}
</script>
</body>
</html>
""")
