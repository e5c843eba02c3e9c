#!/usr/bin/env bash
# All methods x seeds in NAS-Bench-201's space, on the embedded images, at a size for two cores; then a table and a figure.
#     bash shell/compare_nasbench201.sh [--seeds N] [--epochs E] [--jobs J] [--out FOLDER] [--list] [flags of search.py]
# --seeds 4 are the seeds 0 to 3, --seeds 10-13 others; --jobs is how many run at a time, each with one thread.
# METHODS="ddsas darts" leaves the others out. Stopped, it goes on with the same command, and what is finished is not
# run again. --list prints the commands, one a line to be run in the project's folder, and runs nothing.
set -eu
{ # bash reads up to the closing brace before it begins: who edits this file does not disturb what runs
seeds=4 epochs=50 jobs=$(getconf _NPROCESSORS_ONLN) out=logs/compare_nasbench201 list=
more=() # for search.py
while [ $# -gt 0 ]; do
    case $1 in
        --list) list=yes; shift; continue ;;
        --seeds | --epochs | --jobs | --out) ;;
        --seed | --save | --resume | --method | --space_config | --seed=* | --save=* | --resume=* | --method=*)
            echo "compare_nasbench201.sh: $1 is chosen here (--seeds, --out, METHODS=...): leave it out" >&2
            exit 2 ;;
        *) more+=("$1"); shift; continue ;;
    esac
    [ $# -ge 2 ] || { echo "compare_nasbench201.sh: $1 needs a value" >&2; exit 2; }
    case $1 in
        --seeds) seeds=$2 ;;
        --epochs) epochs=$2 ;;
        --jobs) jobs=$2 ;;
        --out) out=$2 ;;
    esac
    shift 2
done
number='^[1-9][0-9]{0,5}$' range='^[0-9]{1,6}-[0-9]{1,6}$'
[[ $jobs =~ $number && $epochs =~ $number && ( $seeds =~ $number || $seeds =~ $range ) ]] || {
    echo "compare_nasbench201.sh: expected numbers, --seeds 4 or 10-13; got --seeds $seeds --epochs $epochs --jobs $jobs" >&2
    exit 2
}
case $seeds in *-*) ;; *) seeds=0-$((seeds - 1)) ;; esac

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
        commands+=("OMP_NUM_THREADS=1 bash shell/run_once.sh$(printf ' %q' "${words[@]}")")
    done
done
if [ -n "$list" ]; then
    printf '%s\n' "${commands[@]}"
    exit 0
fi

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source shell/run_all.sh
code=0
run_all "$jobs" < <(printf '%s\n' "${commands[@]}") || code=$?
if [ "$code" -gt 1 ]; then
    echo "stopped; the same command goes on with it" >&2
    exit "$code"
fi
finished=()
for folder in "${folders[@]}"; do
    if [ -f "$folder/finished" ]; then finished+=("$folder"); fi
done
if [ ${#finished[@]} -gt 0 ]; then "$PYTHON" -m figure.figure1 "${finished[@]}" --out "$out"; fi
exit "$code"
}
