"""Retrain a genotype on ImageNet with the flags and defaults of P-DARTS; the training itself is that of retrain.py.

    python train_imagenet.py --tmp_data_dir .data --save logs/ --auxiliary --note pdarts

Reads DIR/imagenet/train and DIR/imagenet/val. The run folder is SAVE + eval-NOTE-TIME. The auxiliary head is P-DARTS',
with a second BatchNorm, unless the genotype is DDSAS' or --no-auxiliary_second_bn says otherwise.
"""

from __future__ import annotations

import retrain
import utils
from lib import cli
from train_cifar import main


def get_parser() -> cli.Parser:
    parser = retrain.get_parser()
    parser.description = __doc__
    parser.set_defaults(dataset="imagenet", save="logs/", note="try", pdarts=True)
    parser.set_defaults_for("dataset", "imagenet", **utils.PDARTS_IMAGENET)
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
