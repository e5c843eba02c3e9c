"""What the experiments share: tests of differences, lines of JSON, tables, and the style of figures.

scipy is needed: pip install scipy (1.15 or newer).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

import visualize
from lib import cli
from lib.checkpoints import write_whole

FOLDER = Path(__file__).resolve().parent.parent / "figure"
COLORS = {  # Okabe and Ito's, which the colour-blind tell apart
    "ddsas": "#0072b2",
    "ddsas-random": "#009e73",
    "darts": "#d55e00",
    "gdas": "#cc79a7",
    "pdarts": "#e69f00",
    "rws": "#56b4e9",
}
LEVEL, POWER = 0.05, 0.8
EXACT = 200_000  # splits or signs up to which all are counted; of more, DRAWN are drawn
DRAWN = 100_000
RESAMPLES = 10_000  # of the bootstrap

# ---- statistics -----------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """A difference of two means, or a mean held against 0, in points; with one value on a side there is no test."""

    name: str
    sizes: str
    difference: float
    low: float = math.nan  # of the bootstrap's 95 % interval
    high: float = math.nan
    p: float = math.nan
    exact: bool = True
    detectable: float = math.nan  # the smallest difference that is found with probability POWER at level LEVEL


def compare(name: str, first: Iterable[float], second: Iterable[float] | None = None) -> Comparison:
    """Hold two independent samples against each other, or without ``second`` one sample of differences against 0.

    p: permutation test of the means, two-sided: the share of splits (of signs) whose difference is as large as this one.
    Interval: percentiles of RESAMPLES bootstrap differences; with few values it is too narrow.
    """
    samples = [np.array(list(values), dtype=float) for values in (first, second) if values is not None]
    sizes = [len(values) for values in samples]
    result = Comparison(name, " : ".join(map(str, sizes)), float(difference(*samples)))
    if min(sizes) < 2:
        return result
    count = math.comb(sum(sizes), sizes[0]) if second is not None else 2 ** sizes[0]
    result.exact = count <= EXACT
    result.p = stats.permutation_test(
        samples,
        lambda *parts, axis: np.abs(difference(*parts, axis=axis)).round(9),  # sums in another order are equal
        permutation_type="independent" if second is not None else "samples",
        vectorized=True,
        n_resamples=math.inf if result.exact else DRAWN,
        batch=10_000,
        alternative="greater",
        rng=np.random.default_rng(0),
    ).pvalue
    rng = np.random.default_rng(0)
    options = {"n_resamples": RESAMPLES, "method": "percentile", "rng": rng}
    result.low, result.high = stats.bootstrap(samples, difference, **options).confidence_interval
    result.detectable = detectable(sizes, *pooled_deviation(samples))
    return result


def difference(first: np.ndarray, second: np.ndarray | None = None, axis: int = -1) -> np.ndarray:
    """The difference of the means along an axis; the mean of the first alone."""
    return first.mean(axis) - (0 if second is None else second.mean(axis))


def pooled_deviation(samples: list[np.ndarray]) -> tuple[float, int]:
    """The standard deviation inside of the samples, taken as one, and its degrees of freedom."""
    freedom = sum(map(len, samples)) - len(samples)
    return math.sqrt(sum(((values - values.mean()) ** 2).sum() for values in samples) / freedom), freedom


def detectable(sizes: list[int], deviation: float, freedom: int) -> float:
    """The difference that a two-sided t test of such samples finds with probability POWER at level LEVEL.

    (t(1 - LEVEL / 2) + t(POWER)) times the standard error of the difference.
    """
    error = deviation * math.sqrt(sum(1 / size for size in sizes))
    return float(error * (stats.t.ppf(1 - LEVEL / 2, freedom) + stats.t.ppf(POWER, freedom)))


def holm(ps: list[float]) -> list[float]:
    """p values corrected for their number (Holm, 1979): the k-th smallest of m times m - k + 1, never falling."""
    order = np.argsort(ps)
    corrected = np.empty(len(ps))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.array(ps)[order] * np.arange(len(ps), 0, -1)))
    return corrected.tolist()


def table_of_comparisons(primary: list[Comparison], secondary: list[Comparison]) -> str:
    """A Markdown table with a row for each; the primary hypothesis stands alone, Holm corrects the secondary ones."""
    rows = [["difference of means", "n", "points", "95 % interval", "p", "p (Holm)", "detectable"]]
    corrected = holm([one.p for one in secondary])
    for one, holm_p in [*((one, None) for one in primary), *zip(secondary, corrected, strict=True)]:
        name = f"{one.name} (primary)" if holm_p is None else one.name
        p = f"{one.p:.3f}{'' if one.exact else '~'}" if one.p >= 0.0005 else "< 0.0005"
        row = [name, one.sizes, f"{one.difference:+.2f}", f"[{one.low:+.2f}, {one.high:+.2f}]", p]
        rows.append([*row, "–" if holm_p is None else f"{holm_p:.3f}", f"{one.detectable:.2f}"])
    return markdown_table(rows)


def sentences(primary: list[Comparison], secondary: list[Comparison]) -> str:
    """What was detected, and what could not have been."""
    ps = [one.p for one in primary] + holm([one.p for one in secondary])
    lines = []
    for one, p in zip([*primary, *secondary], ps, strict=True):
        if p < LEVEL:
            lines.append(f"{one.name}: {one.difference:+.2f} points, p = {p:.3f}")
        else:
            lines.append(f"{one.name}: not detected (p = {p:.3f}); differences below {one.detectable:.2f} could not be")
    return "\n".join(lines)


NOTES = f"""p: permutation test of the means, two-sided, exact (~: of {DRAWN:,} drawn splits); Holm over the secondary rows
interval: bootstrap percentiles, {RESAMPLES:,} resamples; detectable: with power {POWER} at level {LEVEL}, uncorrected"""

# ---- files, tables, figures -----------------------------------------------------------------------------------------


def write_lines(path: Path, objects: list) -> None:
    """Write dataclass objects, a line of JSON for each, without what they do not know."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [{name: value for name, value in asdict(one).items() if value is not None} for one in objects]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in known))


def read_lines(path: Path, kind: type) -> list:
    """The objects of a dataclass that `write_lines` wrote; none if the file is not there."""
    try:
        return [kind(**line) for line in visualize.read_json(path)]
    except TypeError as error:
        raise cli.UserError(f"{path}: not written by this script ({error}): draw it anew from the runs") from None


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of texts, the first with the headings, as a table; all columns but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *rows[1:]]
    aligned = [
        [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)] for row in rows
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)


def folder_for(given: list[Path], out: Path | None) -> Path:
    """Where figure and data are written: --out, or the one folder that is given, or figure/ without any."""
    if out is None and len(given) > 1:
        raise cli.UserError("--out FOLDER is missing: where the figure and data of several folders are written")
    return out or (given[0] if given else FOLDER)


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    """The flag of `folder_for`."""
    text = f"of {what} and data/; default: the one folder that is given, figure/ without any"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as svg and png, and say so."""
    visualize.save_figure(figure, path)
    print(f"figure: {path}.png and .svg")


def style() -> object:
    """The context in which figures are drawn."""
    return matplotlib.rc_context(visualize.RC)
