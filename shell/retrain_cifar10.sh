#!/usr/bin/env bash
# Train the network found on CIFAR-10 from scratch: 600 epochs with the published settings.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" retrain.py \
    --dataset cifar10 \
    --arch DDSAS_cifar10 \
    --init_channels 36 \
    --layers 20 \
    --batch_size 96 \
    --epochs 600 \
    --learning_rate 0.025 \
    --learning_rate_min 0 \
    --lr_scheduler cosine \
    --momentum 0.9 \
    --weight_decay 3e-4 \
    --grad_clip 5 \
    --auxiliary \
    --auxiliary_weight 0.4 \
    --cutout \
    --cutout_length 16 \
    --drop_path_prob 0.2 \
    --seed 0 \
    "$@"
