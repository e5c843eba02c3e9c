#!/usr/bin/env bash
# Train the network found on ImageNet from scratch: 250 epochs with the published settings, batches of 1024.
# --batch_size is per process. On 8 GPUs: TORCHRUN="--nproc_per_node 8" bash shell/retrain_imagenet.sh --batch_size 128
# (what stands in TORCHRUN goes to torchrun, also for several nodes); --amp computes in bfloat16.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" ${TORCHRUN:+-m torch.distributed.run $TORCHRUN} retrain.py \
    --dataset imagenet \
    --data .data/imagenet \
    --arch DDSAS_imagenet \
    --init_channels 46 \
    --layers 14 \
    --batch_size 1024 \
    --epochs 250 \
    --learning_rate 0.5 \
    --lr_scheduler linear \
    --warmup_epochs 5 \
    --momentum 0.9 \
    --weight_decay 3e-5 \
    --grad_clip 5 \
    --auxiliary \
    --auxiliary_weight 0.4 \
    --label_smooth 0.1 \
    --drop_path_prob 0 \
    --workers 8 \
    --seed 0 \
    "$@"
