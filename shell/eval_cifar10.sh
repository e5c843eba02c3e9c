#!/usr/bin/env bash
# Test the released CIFAR-10 network (97.61 % by its name).
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" evaluate.py \
    --dataset cifar10 \
    --arch DDSAS_cifar10 \
    --init_channels 36 \
    --layers 20 \
    --model_path .weights/cifar10-best-97.61.pt \
    --batch_size 96 \
    "$@"
