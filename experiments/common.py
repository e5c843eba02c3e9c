"""What the experiments share: tests of differences, lines of JSON, and where figures go. scipy: pip install scipy."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

import genotypes
import model
from lib import cli, tables
from lib.checkpoints import write_whole
from lib.figures import RC, save_figure
from lib.records import read_json
from lib.report import MUTED

FOLDER = Path(__file__).resolve().parent.parent / "figure"
COLORS = {  # Okabe and Ito's, which the colour-blind tell apart
    "ddsas": "#0072b2",
    "ddsas-random": "#009e73",
    "darts": "#d55e00",
    "gdas": "#cc79a7",
    "rws": "#56b4e9",
    "pdarts": "#e69f00",
    "random": MUTED,
}
LEVEL, POWER = 0.05, 0.8
EXACT, DRAWN = 200_000, 100_000  # splits up to which all are counted; of more, so many are drawn
RESAMPLES = 10_000
NOTES = f"""p: permutation test of the means, two-sided, exact (~: {DRAWN:,} drawn splits); Holm over the secondary rows
interval: bootstrap percentiles of {RESAMPLES:,} resamples; what could not be: with power {POWER} at level {LEVEL}"""


@dataclass
class Comparison:
    """A difference of two means, or a mean held against 0, in points."""

    name: str
    sizes: list[int]
    difference: float
    low: float  # of the bootstrap's 95 % interval
    high: float
    p: float
    exact: bool
    detectable: float  # the smallest difference that is found with probability POWER at level LEVEL


def compare(name: str, first: Iterable[float], second: Iterable[float] | None = None) -> Comparison:
    """Two independent samples, or without ``second`` one of differences held against 0; each of two values or more.

    p: the share of splits into such samples (of signs of the differences) whose means differ as much, either way.
    """
    samples = [np.array(list(values), dtype=float) for values in (first, second) if values is not None]
    sizes = [len(values) for values in samples]
    count = math.comb(sum(sizes), sizes[0]) if second is not None else 2 ** sizes[0]
    p = stats.permutation_test(
        samples,
        lambda *parts, axis: np.abs(difference(*parts, axis=axis)).round(9),  # sums in another order are equal
        permutation_type="independent" if second is not None else "samples",
        n_resamples=math.inf if count <= EXACT else DRAWN,
        batch=10_000,
        alternative="greater",
        rng=np.random.default_rng(0),
    ).pvalue
    low, high = interval(samples, difference)
    return Comparison(
        name, sizes, float(difference(*samples)), low, high, float(p), count <= EXACT, detectable(samples)[0]
    )


def difference(first: np.ndarray, second: np.ndarray | None = None, axis: int = -1) -> np.ndarray:
    """The difference of the means along an axis; the mean of the first alone."""
    return first.mean(axis) - (0 if second is None else second.mean(axis))


def interval(samples: Iterable[np.ndarray], statistic: Callable, paired: bool = False) -> tuple[float, float]:
    """95 % by bootstrap percentiles, with a fixed seed; with few values it is too narrow."""
    options = {"n_resamples": RESAMPLES, "method": "percentile", "paired": paired, "rng": np.random.default_rng(0)}
    return tuple(map(float, stats.bootstrap(samples, statistic, **options).confidence_interval))


def detectable(samples: list[np.ndarray], sizes: Iterable[int] = ()) -> tuple[float, float]:
    """(least difference, deviation): the one standard deviation inside of all samples, and what a t test finds with it.

    Two-sided, (t(1 - LEVEL / 2) + t(POWER)) standard errors, for samples of these sizes, by default those given.
    """
    freedom = sum(map(len, samples)) - len(samples)
    deviation = math.sqrt(sum(((values - values.mean()) ** 2).sum() for values in samples) / freedom)
    error = deviation * math.sqrt(sum(1 / size for size in sizes or map(len, samples)))
    return float(error * stats.t.ppf([1 - LEVEL / 2, POWER], freedom).sum()), deviation


def holm(ps: list[float]) -> list[float]:
    """p values corrected for their number (Holm, 1979): the k-th smallest of m times m - k + 1, never falling."""
    order, corrected = np.argsort(ps), np.empty(len(ps))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.array(ps)[order] * np.arange(len(ps), 0, -1)))
    return corrected.tolist()


def table_of(comparisons: list[Comparison], primary: str) -> str:
    """A row for each, in Markdown; the one named ``primary`` stands alone, Holm's correction is for the others."""
    rows = [["points", "n", "difference", "95 % interval", "p", "p (Holm)", "so"]]
    others = [one for one in comparisons if one.name != primary]
    corrected = dict(zip([one.name for one in others], holm([one.p for one in others]), strict=True))
    for one in comparisons:
        p = corrected.get(one.name, one.p)
        so = "differs" if p < LEVEL else f"not detected; differences below {one.detectable:.2f} could not be"
        row = [one.name + " (primary)" * (one.name == primary), " : ".join(map(str, one.sizes))]
        row += [f"{one.difference:+.2f}", f"{one.low:+.2f} to {one.high:+.2f}"]
        row += [in_digits(one.p) + "~" * (not one.exact), in_digits(p) if one.name in corrected else "–"]
        rows.append([*row, so])
    return tables.markdown_table(rows)


def in_digits(p: float) -> str:
    """A chance with four digits; no chance is 0."""
    return f"{p:.4f}" if p >= 1e-4 else "<0.0001"


def spread(values: Iterable[float], error: bool = False) -> str:
    """Mean ± standard deviation, or the mean's standard error; of one value the mean alone."""
    values = np.array(values)
    deviation = f" ± {values.std(ddof=1) / (math.sqrt(len(values)) if error else 1):.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{deviation}"


def group(objects: Iterable, field: str) -> dict:
    """Lists of the objects by their value of a field, by which they are in order."""
    return {value: list(part) for value, part in itertools.groupby(objects, attrgetter(field))}


def read_retraining(path: Path) -> tuple[dict, genotypes.Genotype, model.Network, float]:
    """Arguments, genotype, network (on meta, for 10 classes) and last test accuracy of a finished retraining."""
    args, genotype = read_json(path / "args.json")["args"], genotypes.load(path)
    with torch.device("meta"):
        network = model.network_for(False, args["init_channels"], 10, args["layers"], False, genotype)
    return args, genotype, network, read_json(path / "history.jsonl")[-1]["test_acc"]


def write_lines(path: Path, objects: list) -> None:
    """Write dataclass objects, a line of JSON for each, without what they do not know."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [{name: value for name, value in asdict(one).items() if value not in (None, [])} for one in objects]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in known))


def read_lines(path: Path, kind: type) -> list:
    """The objects of a dataclass that `write_lines` wrote; UserError if there are none."""
    if found := [kind(**line) for line in read_json(path)]:
        return found
    raise cli.UserError(f"nothing kept in {path}: give the runs it is made from (--help)")


def get_parser(description: str, text: str, name: str = "folder", nargs: str = "?") -> cli.Parser:
    """The command line of an experiment: what its data are made from, and --out."""
    parser = cli.Parser(description)
    parser.add_argument(name, nargs=nargs, type=Path, metavar="FOLDER", help=text)
    out = "of figure and data/; default: the folder that is given, or figure/"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out)
    return parser


def save(draw: Callable[[], Figure], path: Path) -> None:
    """Write the figure that ``draw()`` returns as svg and png, with small text for one column of a paper."""
    with matplotlib.rc_context(RC | {"font.size": 7, "axes.titlesize": 7.5, "legend.fontsize": 6.5}):
        save_figure(draw(), path)
    print(f"figure: {path}.png and .svg")
