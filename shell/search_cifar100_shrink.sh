#!/usr/bin/env bash
# DDSAS on CIFAR-100 in the shrinking space: 112 operations to 42 over 60 epochs.
# The cell found is recorded in genotypes.py as DDSAS_cifar100_search; a second search of that name replaces it.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" search.py \
    --dataset cifar100 \
    --space_config shrink \
    --saliency_type simple \
    --dss_max_ops 28 \
    --dss_freq 30 \
    --confidence 1.44 \
    --batch_size 64 \
    --epochs 60 \
    --init_channels 16 \
    --layers 8 \
    --learning_rate 0.025 \
    --learning_rate_min 0.001 \
    --momentum 0.9 \
    --weight_decay 3e-4 \
    --arch_learning_rate 3e-5 \
    --arch_weight_decay 0 \
    --grad_clip 5 \
    --train_portion 0.5 \
    --seed 0 \
    --arch DDSAS_cifar100_search \
    "$@"
