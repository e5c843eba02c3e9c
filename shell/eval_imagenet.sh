#!/usr/bin/env bash
# Test the released ImageNet network (76.1 %) on the validation images, .data/imagenet/val/<class>/.
# On 4 GPUs, each image once: TORCHRUN="--nproc_per_node 4" bash shell/eval_imagenet.sh
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" ${TORCHRUN:+-m torch.distributed.run $TORCHRUN} evaluate.py \
    --dataset imagenet \
    --data .data/imagenet \
    --arch DDSAS_imagenet \
    --init_channels 46 \
    --layers 14 \
    --model_path .weights/imagenet-best-76.1.pt \
    --batch_size 128 \
    --workers 8 \
    "$@"
