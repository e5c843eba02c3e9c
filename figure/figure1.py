"""Figure 1: how far the architecture still moves, and how well it does, over the epochs of searches with several seeds.

    python -m figure.figure1                               # figure/figure1.svg and .png from figure/data/*.jsonl
    python -m figure.figure1 --add static-0=logs/RUN ...   # first keeps a run's numbers as figure/data/static-0.jsonl

A file is named GROUP-SEED.jsonl; a group (a search space, say) is a line, the mean of its seeds, in a band of one
standard deviation. Left, as in figure 1a of the paper: cosine distance of the one-hot genotypes of consecutive epochs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import genotypes
import utils
import visualize

FOLDER = Path(__file__).resolve().parent
STYLES = [("#0072b2", "-"), ("#d55e00", "--"), ("#009e73", "-."), ("#cc79a7", ":")]  # a group each


def keep(name: str, run: str) -> None:
    """Write figure/data/NAME.jsonl: of each epoch what this figure needs."""
    lines = [
        json.dumps({key: line[key] for key in ("epoch", "valid_acc", "genotype")})
        for line in visualize.load_run(run).history
    ]
    (FOLDER / "data").mkdir(exist_ok=True)
    utils.write_whole(FOLDER / "data" / f"{name}.jsonl", "\n".join(lines) + "\n")


def read(path: Path) -> tuple[list[float], list[float]]:
    """Distances of consecutive architectures (one less than epochs) and validation accuracies of a history."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = [genotypes.load(line["genotype"]) for line in lines]
    distances = [visualize.distance(a, b) for a, b in zip(found, found[1:], strict=False)]
    return distances, [line["valid_acc"] for line in lines]


def groups(paths: list[Path]) -> dict[str, list[tuple]]:
    """{group: [(distances, accuracies) of each seed]}; a group stops where its shortest run does."""
    found: dict[str, list[tuple]] = {}
    for path in sorted(paths):
        found.setdefault(path.stem.rsplit("-", 1)[0], []).append(read(path))
    return found


def draw(found: dict[str, list[tuple]]) -> Figure:
    """Both panels."""
    figure = Figure((visualize.WIDTH, 2.7), layout="constrained")
    axes = figure.subplots(1, 2)
    for (color, dashes), (name, seeds) in zip(STYLES, found.items(), strict=False):
        for which, axis in enumerate(axes):
            length = min(len(seed[which]) for seed in seeds)
            values = np.array([seed[which][:length] for seed in seeds], dtype=float)
            epochs = np.arange(length) + 2 - which  # the first distance is that of the second epoch
            mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0
            label = f"{name} ({len(values)} seed{'s' * (len(values) > 1)})"
            axis.plot(epochs, mean, color=color, linestyle=dashes, label=label)
            axis.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.18, linewidth=0)
    axes[0].set_title("Distance to the architecture one epoch before", loc="left")
    axes[0].set_ylim(bottom=0)
    axes[1].set_title("Validation accuracy of the supernet (%)", loc="left")
    for axis, place in zip(axes, ("upper right", "lower right"), strict=True):
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc=place)
    return figure


def main(args: argparse.Namespace) -> None:
    for pair in args.add:
        name, _, run = pair.partition("=")
        keep(name, run)
    paths = args.histories or list((FOLDER / "data").glob("*.jsonl"))
    if not paths:
        raise utils.UserError(f"no histories in {FOLDER / 'data'}: keep some of your runs with --add GROUP-SEED=RUN")
    if len(found := groups(paths)) > len(STYLES):
        raise utils.UserError(f"{len(found)} groups ({', '.join(found)}): at most {len(STYLES)} can be told apart")
    with matplotlib.rc_context(visualize.RC):
        visualize.save_figure(draw(found), args.out)
    for name, seeds in found.items():
        distance, accuracy = (np.mean([seed[which][-1] for seed in seeds]) for which in (0, 1))
        print(f"{name}: at the end distance {distance:.2f}, validation accuracy {accuracy:.1f} %")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("histories", nargs="*", type=Path, help="GROUP-SEED.jsonl (default: all of figure/data)")
    parser.add_argument(
        "--add", action="append", default=[], metavar="GROUP-SEED=RUN", help="keep a run's history first"
    )
    parser.add_argument("--out", type=Path, default=FOLDER / "figure1", help="without suffix")
    return parser


if __name__ == "__main__":
    utils.cli(main, get_parser())
