#!/usr/bin/env bash
# Test P-DARTS' released CIFAR-10 network (97.58 % by its README; the paper has 97.50 %).
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" evaluate.py \
    --dataset cifar10 \
    --arch PDARTS \
    --init_channels 36 \
    --layers 20 \
    --model_path .weights/PDARTS_cifar10.pt \
    --batch_size 96 \
    "$@"
