"""report.html of made-up runs of all kinds, made by the command."""

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_runs import nasbench201_run, pdarts_run, retrain_run, search_run
from PIL import Image

import genotypes
import retrain
import train_cifar
import visualize
from lib import cli

CLASSES = ["cat", "<dog>"]
EVALUATION = {"accuracy": 62.5, "classes": CLASSES, "confusion": [[5, 3], [0, 0]]}
EVALUATION["per_class"] = [{"accuracy": 62.5, "images": 8}, {"accuracy": None, "images": 0}]


def write_page(*folders: Path) -> None:
    cli.run_script(visualize.main, visualize.get_parser(), [*map(str, folders), "--all"])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """A run of each kind, with its report; the retraining was tested by evaluate.py."""
    root = tmp_path_factory.mktemp("logs")
    folders = {"ddsas": search_run(root / "ddsas", epochs=3), "pdarts": pdarts_run(root / "pdarts", epochs=1)}
    folders["nasbench201"] = nasbench201_run(root / "nasbench201")
    folders["retrain"] = retrain_run(root / "retrain", genotypes.DARTS_V2)
    (folders["retrain"] / "evaluation.json").write_text(json.dumps(EVALUATION))
    for name in ("confusion", "mistakes"):
        Image.new("RGB", (8, 8)).save(folders["retrain"] / f"{name}.png")
    write_page(folders["ddsas"], folders["retrain"])
    with pytest.MonkeyPatch.context() as patch:  # figures take long, test_visualize.py looks at those of the others
        patch.setattr(visualize, "draw_figures", lambda record: [])
        write_page(folders["pdarts"], folders["nasbench201"])
    return folders


class Page(HTMLParser):
    """The text of a page, and whatever a browser would fetch."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.fetched, self.text = [], ""
        self.source = (folder / "report.html").read_text()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("kind", ["ddsas", "pdarts", "nasbench201", "retrain"])
def test_the_page_is_whole_and_fetches_nothing(made, kind):
    page, record = Page(made[kind]), visualize.load_run(made[kind])
    assert all(link.startswith(("data:", "#")) for link in page.fetched)
    assert "http" not in re.sub(r"data:[^\"]*", "", page.source) and "@import" not in page.source
    assert str(record.genotype) in page.text and record.info["command"] in page.text and record.kind in page.text
    for name, value in (record.info["args"] | record.info["versions"]).items():
        assert name in page.text and str(value) in page.text
    assert "<b>bold</b>" not in page.source  # the note of a run is text
    assert ("61.00 %looked-up test accuracy on cifar100" in page.text) == (kind == "nasbench201")
    if kind in ("ddsas", "pdarts"):  # how to retrain on the same images
        script = {"ddsas": retrain, "pdarts": train_cifar}[kind]
        words = shlex.split(re.search(r"Train it from scratch(python .*?)Copy", page.text)[1])
        args, given = script.get_parser().parse_args(words[2:]), record.info["args"]
        assert words[1] == f"{script.__name__}.py" and args.arch == str(made[kind])
        assert args.dataset == given["dataset"] and args.data == given.get("data", ".data")


@pytest.mark.parametrize(
    ("kind", "names"),
    [("ddsas", ["progress", "saliency_normal", "saliency_reduce", "subspace"]), ("retrain", ["curves"])],
)
def test_the_page_shows_all_figures(made, kind, names):
    dot = bool(shutil.which("dot"))
    files = {file.name for file in (made[kind] / "figures").iterdir()}
    figures = {f"{name}.{suffix}" for name in [*names, *(["cells"] if dot else [])] for suffix in ("svg", "png")}
    assert files - {"cells.gv", "evolution.gif"} == figures
    assert Page(made[kind]).source.count("data:image/svg+xml") == len(names) + dot
    if dot and kind != "retrain":
        with Image.open(made[kind] / "figures/evolution.gif") as gif:
            assert gif.n_frames == len(visualize.load_run(made[kind]).history) and gif.info["loop"] == 0


def test_the_page_of_a_retraining_shows_what_its_test_found(made):
    page = Page(made["retrain"])
    assert "97.00 %test accuracy, best" in page.text and "Train it from scratch" not in page.text
    assert "62.50 % of 8 images" in page.text and "cat62.508" in page.text and "<dog>no image0" in page.text
    assert "cat53" in page.text and len([link for link in page.fetched if "image/png" in link]) == 2
