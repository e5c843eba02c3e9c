"""Retrain a genotype on ImageNet with the flags and defaults of P-DARTS; the training itself is that of retrain.py.

    python train_imagenet.py --tmp_data_dir .data --save logs/ --auxiliary --note pdarts

Reads DIR/imagenet/train and DIR/imagenet/val. The run folder is SAVE + eval-NOTE-TIME.
"""

from __future__ import annotations

import argparse

import retrain
from lib import cli
from train_cifar import main


def get_parser() -> argparse.ArgumentParser:
    parser = retrain.get_parser(data_flags=("--data",))
    parser.description = __doc__
    parser.set_defaults(
        arch="PDARTS",
        save="logs/",
        note="try",
        dataset="imagenet",
        data=".data/imagenet",
        init_channels=48,
        layers=14,
        batch_size=256,
        epochs=250,
        learning_rate=0.1,
        lr_scheduler="linear",
        warmup_epochs=5,  # with batches of more than 256
        weight_decay=3e-5,
        label_smooth=0.1,
        drop_path_prob=0.0,
        pdarts=True,
    )
    parser.set_defaults_for("dataset", "imagenet")  # these, and not those of retrain.py
    parser.add_argument("--tmp_data_dir", dest="data", default=argparse.SUPPRESS, metavar="DIR",
                        type=lambda folder: f"{folder}/imagenet", help="--data is DIR/imagenet")  # fmt: skip
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
