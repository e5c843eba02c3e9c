"""report.html of made-up runs of all three kinds, made by the command."""

from __future__ import annotations

import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_runs import pdarts_run, retrain_run, search_run
from PIL import Image

import genotypes
import retrain
import train_cifar
import visualize
from lib import cli


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """A run of each kind, with its report."""
    root = tmp_path_factory.mktemp("logs")
    folders = {"ddsas": search_run(root / "ddsas"), "pdarts": pdarts_run(root / "pdarts")}
    folders["retrain"] = retrain_run(root / "retrain", genotypes.DARTS_V2)
    cli.run_script(visualize.main, visualize.get_parser(), [*map(str, folders.values()), "--all"])
    return folders


class Page(HTMLParser):
    """Checks that tags are balanced; collects the text and whatever a browser would fetch."""

    VOID = {"meta", "link", "img", "br", "hr", "input"}

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.open, self.fetched, self.text = [], [], ""
        self.source = (folder / "report.html").read_text()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attributes)

    def handle_startendtag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("kind", ["ddsas", "pdarts", "retrain"])
def test_the_report_is_whole_and_fetches_nothing(made, kind):
    page, record = Page(made[kind]), visualize.load_run(made[kind])
    assert not page.open
    assert all(link.startswith(("data:", "#")) for link in page.fetched)
    assert "http" not in re.sub(r"data:[^\"]*", "", page.source) and "@import" not in page.source
    assert str(record.genotype) in page.text and record.info["command"] in page.text
    for name, value in (record.info["args"] | record.info["versions"]).items():
        assert name in page.text and str(value) in page.text
    assert "<b>bold</b>" not in page.source  # the note of a run is text
    assert all(color not in page.source.split("</style>", 1)[1] for color in (visualize.INK, visualize.LINE))


@pytest.mark.parametrize(("kind", "quantity"), [("ddsas", "saliency"), ("pdarts", "probability")])
def test_the_report_of_a_search_shows_all_figures(made, kind, quantity):
    names = {file.name for file in (made[kind] / "figures").iterdir()}
    for figure in ("progress", f"{quantity}_normal", f"{quantity}_reduce", "subspace"):
        assert {f"{figure}.svg", f"{figure}.png"} <= names
    dot = bool(shutil.which("dot"))
    assert len(re.findall(r"<svg\b", Page(made[kind]).source)) == 4 + dot
    if dot:
        with Image.open(made[kind] / "figures" / "evolution.gif") as gif:
            assert gif.n_frames == len(visualize.load_run(made[kind]).history) and gif.info["loop"] == 0


def test_the_report_of_a_retraining_shows_its_curves(made):
    assert {"curves.svg", "curves.png"} <= {file.name for file in (made["retrain"] / "figures").iterdir()}
    text = Page(made["retrain"]).text
    assert "97.00 %test accuracy, best" in text and "subspace" not in text and "Train it from scratch" not in text


@pytest.mark.parametrize(("kind", "script"), [("ddsas", retrain), ("pdarts", train_cifar)])
def test_the_report_says_how_to_retrain_on_the_same_images(made, kind, script):
    command = re.search(r"Train it from scratch(python .*?)Copy", Page(made[kind]).text)[1]
    words, given = shlex.split(command), visualize.load_run(made[kind]).info["args"]
    args = script.get_parser().parse_args(words[2:])
    assert words[1] == f"{script.__name__}.py" and args.arch == str(made[kind])
    assert args.dataset == given["dataset"] and args.data == given.get("data", ".data")


def test_without_dot_the_report_shows_the_rest(tmp_path, monkeypatch):
    folder = search_run(tmp_path / "run", epochs=2)
    monkeypatch.setenv("PATH", str(tmp_path))
    cli.run_script(visualize.main, visualize.get_parser(), [str(folder), "--all"])
    text = Page(folder).text
    assert "apt install graphviz" in text and "The subspace over time" in text


def test_the_report_of_another_space_counts_its_network(tmp_path, monkeypatch):
    text = "|nor_conv_3x3~0|+|nor_conv_3x3~0|skip_connect~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"
    folder = retrain_run(tmp_path / "run", genotypes.load(text))
    monkeypatch.setenv("PATH", str(tmp_path))
    cli.run_script(visualize.main, visualize.get_parser(), [str(folder), "--all"])
    page = Page(folder).text
    assert "parameters at 16 channels, 5 cells a stage" in page and "2skip connections" in page
    assert "36 channels" not in page and "normal cell" not in page
