#!/usr/bin/env bash
# DDSAS on CIFAR-10 in NAS-Bench-201's space, where every cell's accuracy is known: 50 epochs with the published settings.
# METHOD=darts bash shell/search_nasbench201.sh (or gdas, or random) searches with another method.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
METHOD=${METHOD:-ddsas}
own=() # what only this method has
case $METHOD in
    ddsas) own=(
        --saliency_type simple
        --dss_max_ops 10
        --dss_freq 30
        --confidence 1.44
    ) ;;
    gdas) own=(
        --tau_max 10
        --tau_min 0.1
    ) ;;
esac
"$PYTHON" search.py \
    --dataset cifar10 \
    --space_config nasbench201 \
    --method "$METHOD" \
    ${own[@]+"${own[@]}"} \
    --batch_size 64 \
    --epochs 50 \
    --init_channels 16 \
    --layers 5 \
    --learning_rate 0.025 \
    --learning_rate_min 0.001 \
    --momentum 0.9 \
    --weight_decay 5e-4 \
    --arch_learning_rate 3e-4 \
    --arch_weight_decay 1e-3 \
    --grad_clip 5 \
    --train_portion 0.5 \
    --seed 0 \
    "$@"
