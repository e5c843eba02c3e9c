#!/usr/bin/env bash
# P-DARTS on CIFAR-100: three stages of 25 epochs at 5, 11 and 17 cells with the published settings.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" train_search.py \
    --tmp_data_dir .data \
    --dataset cifar100 \
    --save logs/ \
    --note cifar100 \
    --layers 5 \
    --add_layers 6 \
    --add_layers 12 \
    --init_channels 16 \
    --dropout_rate 0.1 \
    --dropout_rate 0.2 \
    --dropout_rate 0.3 \
    --num_to_keep 5 3 1 \
    --epochs 25 \
    --eps_no_arch 10 \
    --max_skips 2 \
    --batch_size 96 \
    --learning_rate 0.025 \
    --learning_rate_min 0 \
    --momentum 0.9 \
    --weight_decay 3e-4 \
    --arch_learning_rate 6e-4 \
    --arch_weight_decay 1e-3 \
    --grad_clip 5 \
    --train_portion 0.5 \
    --seed 2 \
    "$@"
