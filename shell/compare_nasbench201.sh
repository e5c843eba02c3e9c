#!/usr/bin/env bash
# All methods x seeds in NAS-Bench-201's space, on the embedded images, at a size for two cores; then a table and a figure.
#     bash shell/compare_nasbench201.sh [--seeds N] [--epochs E] [--jobs J] [--out FOLDER] [--list] [flags of search.py]
# --seeds 4 are the seeds 0 to 3, --seeds 10-13 others; --jobs is how many run at a time, each with one thread.
# METHODS="ddsas darts" leaves the others out. Stopped, it goes on with the same command, and what is finished is not
# run again. --list prints the commands, one a line to be run in the project's folder, and runs nothing.
set -eu
{ # bash reads up to the closing brace before it begins: who edits this file does not disturb what runs
source "$(dirname "${BASH_SOURCE[0]}")/many.sh"
seeds=4 epochs=50 jobs=$(getconf _NPROCESSORS_ONLN) out=logs/compare_nasbench201
many_arguments compare_nasbench201.sh epochs "" "--seed --save --resume --method --space_config" "$@"

own() { # the flags that only this method has, as the words of an array
    case $1 in
        ddsas) own=(--method ddsas --dss_max_ops 10 --dss_freq 15 --confidence 1.44) ;;
        ddsas-random) own=(--method ddsas --dss_max_ops 10 --dss_freq 15 --confidence 1.44 --rdss_prob 1) ;;
        gdas) own=(--method gdas --tau_max 10 --tau_min 0.1) ;;
        *) own=(--method "$1") ;;
    esac
}
shared=(
    --dataset fashion_mini
    --space_config nasbench201
    --batch_size 64
    --epochs "$epochs"
    --init_channels 8
    --layers 1
    --learning_rate 0.025
    --learning_rate_min 0.001
    --momentum 0.9
    --weight_decay 5e-4
    --arch_learning_rate 3e-4
    --arch_weight_decay 1e-3
    --grad_clip 5
    --train_portion 0.5
    --quiet
)
commands=() folders=()
for seed in $(seq "${seeds%-*}" "${seeds#*-}"); do # all methods of a seed, then the next seed
    for method in ${METHODS:-ddsas ddsas-random darts gdas random}; do
        own "$method"
        folders+=("$out/$method-$seed")
        words=("$out/$method-$seed" search.py "${own[@]}" "${shared[@]}" --seed "$seed" ${more[@]+"${more[@]}"})
        commands+=("$(many_command "${words[@]}")")
    done
done
if [ -z "$list" ]; then source "$(dirname "${BASH_SOURCE[0]}")/env.sh"; fi
many_run
finished=()
for folder in "${folders[@]}"; do
    if [ -f "$folder/finished" ]; then finished+=("$folder"); fi
done
if [ ${#finished[@]} -gt 0 ]; then "$PYTHON" -m experiments.figure1 "${finished[@]}" --out "$out"; fi
exit "$code"
}
