#!/usr/bin/env bash
# Train P-DARTS' network on CIFAR-100 from scratch: 600 epochs with the published settings.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" train_cifar.py \
    --tmp_data_dir .data \
    --dataset cifar100 \
    --arch PDARTS \
    --save logs/ \
    --note cifar100 \
    --init_channels 36 \
    --layers 20 \
    --batch_size 128 \
    --epochs 600 \
    --learning_rate 0.025 \
    --momentum 0.9 \
    --weight_decay 3e-4 \
    --grad_clip 5 \
    --auxiliary \
    --auxiliary_weight 0.4 \
    --cutout \
    --cutout_length 16 \
    --drop_path_prob 0.3 \
    --seed 0 \
    "$@"
