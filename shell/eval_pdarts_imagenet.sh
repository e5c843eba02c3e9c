#!/usr/bin/env bash
# Test P-DARTS' released ImageNet network (75.6 %).
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" ${TORCHRUN:+-m torch.distributed.run $TORCHRUN} evaluate.py \
    --dataset imagenet \
    --data .data/imagenet \
    --arch PDARTS \
    --init_channels 48 \
    --layers 14 \
    --model_path .weights/PDARTS_imagenet.pth.tar \
    --batch_size 128 \
    --workers 8 \
    "$@"
