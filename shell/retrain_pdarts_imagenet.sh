#!/usr/bin/env bash
# Train P-DARTS' network on ImageNet (.data/imagenet/train and val): 250 epochs with the published settings.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" ${TORCHRUN:+-m torch.distributed.run $TORCHRUN} train_imagenet.py \
    --tmp_data_dir .data \
    --arch PDARTS \
    --save logs/ \
    --note imagenet \
    --init_channels 48 \
    --layers 14 \
    --batch_size 256 \
    --epochs 250 \
    --learning_rate 0.1 \
    --lr_scheduler linear \
    --warmup_epochs 5 \
    --momentum 0.9 \
    --weight_decay 3e-5 \
    --label_smooth 0.1 \
    --grad_clip 5 \
    --auxiliary \
    --auxiliary_weight 0.4 \
    --drop_path_prob 0 \
    --workers 8 \
    --seed 0 \
    "$@"
