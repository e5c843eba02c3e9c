"""Retrain a genotype on CIFAR with the flags and defaults of P-DARTS; the training itself is that of retrain.py.

    python train_cifar.py --tmp_data_dir .data --auxiliary --cutout --save logs/ --note pdarts          # CIFAR-10
    python train_cifar.py --tmp_data_dir .data --auxiliary --cutout --save logs/ --note pdarts --cifar100
    python train_cifar.py --tmp_data_dir .data --auxiliary --save logs/ --note mine --arch logs/search-NOTE-TIME

The run folder is SAVE + eval-NOTE-TIME.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import retrain
from lib import cli


def main(args: argparse.Namespace) -> Path:
    """Train; returns the run folder."""
    cli.prefix_save(args, "eval")
    return retrain.main(args)


def get_parser() -> cli.Parser:
    parser = retrain.get_parser()
    parser.description = __doc__
    cli.add_cifar100(parser)
    parser.set_defaults(arch="PDARTS", save="logs/", note="try", batch_size=128, drop_path_prob=0.3, pdarts=True)
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
