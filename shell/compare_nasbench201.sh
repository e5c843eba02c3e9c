#!/usr/bin/env bash
# Searches in NAS-Bench-201's space, on the embedded images, at a size for two cores; then tables and a figure.
#     bash shell/compare_nasbench201.sh [METHOD=SEEDS ...] [--epochs E] [--jobs J] [--out FOLDER] [--list] [flags of search.py]
# darts=12 are the seeds 0 to 11 of DARTS, darts=12-15 others; without any, the list below, 118 searches.
# --table FILE.csv has accuracies to look up. --jobs is how many run at a time, each with one thread. Stopped, it goes on
# with the same command, and what is finished is not run again. --list prints the commands, one a line, and runs nothing.
set -eu
{ # bash reads up to the closing brace before it begins: who edits this file does not disturb what runs
source "$(dirname "${BASH_SOURCE[0]}")/lib/many.sh"
planned=(
    ddsas=24
    ddsas-random=24  # DDSAS whose subspaces are drawn at random: the primary hypothesis
    darts=12
    gdas=12
    ddsas-c0=12      # without the bandit's bonus for what was seldom active
    rws=12           # random search with shared weights: the best of 100 random cells by the supernet's validation
    gdas-240=6       # as long as published
    ddsas-L6=4       # sweeps: operations in the subspace,
    ddsas-L18=4
    ddsas-M5=4       # and steps between two subspaces
    ddsas-M30=4
)
seeds=1 epochs=50 jobs=$(getconf _NPROCESSORS_ONLN) out=logs/compare_nasbench201 table='' asked=() words=()
for word in "$@"; do if [[ $word =~ ^[a-z][a-zA-Z0-9-]*=.*$ ]]; then asked+=("$word"); else words+=("$word"); fi; done
if [ ${#asked[@]} = 0 ]; then asked=("${planned[@]}"); fi
many_arguments compare_nasbench201.sh epochs table "--seed --seeds --save --resume --method --space_config" ${words[@]+"${words[@]}"}
if [ -n "$table" ]; then more+=(--table "$table"); fi

own() { # the flags that only this method has, as the words of an array
    local ddsas=(--method ddsas --dss_max_ops 10 --dss_freq 15 --confidence 1.44)
    case $1 in
        ddsas) own=("${ddsas[@]}") ;;
        ddsas-random) own=("${ddsas[@]}" --rdss_prob 1) ;;
        ddsas-c0) own=("${ddsas[@]}" --confidence 0) ;;
        ddsas-L6 | ddsas-L18) own=("${ddsas[@]}" --dss_max_ops "${1#ddsas-L}") ;;
        ddsas-M5 | ddsas-M30) own=("${ddsas[@]}" --dss_freq "${1#ddsas-M}") ;;
        gdas) own=(--method gdas --tau_max 10 --tau_min 0.1) ;;
        gdas-240) own=(--method gdas --tau_max 10 --tau_min 0.1 --epochs 240) ;;
        darts | rws | random) own=(--method "$1") ;;
        *) echo "compare_nasbench201.sh: $1 is no method that it names" >&2; exit 2 ;;
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
for word in "${asked[@]}"; do
    many_seeds compare_nasbench201.sh "${word#*=}" # first and last
    own "${word%%=*}"
    for seed in $(seq "$first" "$last"); do
        folders+=("$out/${word%%=*}-$seed")
        line=("${folders[-1]}" search.py "${shared[@]}" "${own[@]}" --seed "$seed" ${more[@]+"${more[@]}"})
        commands+=("$(many_command "${line[@]}")")
    done
done
many_start
many_run
finished=()
for folder in "${folders[@]}"; do
    if [ -f "$folder/finished" ]; then finished+=("$folder"); fi
done
if [ ${#finished[@]} -gt 0 ]; then
    "$PYTHON" -m experiments.figure1 "${finished[@]}" ${table:+--table "$table"} --out "$out"
fi
exit "$code"
}
