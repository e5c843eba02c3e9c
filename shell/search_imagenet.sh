#!/usr/bin/env bash
# DDSAS on ImageNet: 60 epochs with the published settings, batches of 512, on the two subsets that this makes:
#     python imagenet_split.py --data .data/imagenet --out .data/imagenet_split
# --batch_size is per process. On 8 GPUs: TORCHRUN="--nproc_per_node 8" bash shell/search_imagenet.sh --batch_size 64
# (what stands in TORCHRUN goes to torchrun, also for several nodes); --amp computes in bfloat16.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" ${TORCHRUN:+-m torch.distributed.run $TORCHRUN} search.py \
    --dataset imagenet \
    --data .data/imagenet_split \
    --space_config imagenet \
    --saliency_type simple \
    --dss_max_ops 28 \
    --dss_freq 30 \
    --confidence 1.44 \
    --batch_size 512 \
    --epochs 60 \
    --init_channels 16 \
    --layers 8 \
    --learning_rate 0.5 \
    --learning_rate_min 0 \
    --warmup_epochs 5 \
    --momentum 0.9 \
    --weight_decay 3e-4 \
    --arch_learning_rate 6e-3 \
    --arch_weight_decay 1e-3 \
    --arch_grad_clip 5 \
    --grad_clip 5 \
    --workers 8 \
    --seed 2 \
    "$@"
