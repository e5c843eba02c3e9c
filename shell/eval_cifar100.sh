#!/usr/bin/env bash
# Test the released CIFAR-100 network (the paper has 16.26 % test error).
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" evaluate.py \
    --dataset cifar100 \
    --arch DDSAS_cifar100 \
    --init_channels 36 \
    --layers 20 \
    --model_path .weights/best_weights.pt \
    --batch_size 96 \
    "$@"
