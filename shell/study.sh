#!/usr/bin/env bash
# Which cells train best: searches x seeds; every cell found is retrained by one protocol and tested on all test images.
#     bash shell/study.sh [--seeds N] [--jobs J] [--out FOLDER] [--list] [--dataset NAME] [--search_epochs E] [--epochs E]
#                         [flags that search.py, train_search.py and retrain.py all have]
#     bash shell/study.sh --pilot [--jobs J] [--out FOLDER] [--list]
# --seeds 4 are the seeds 0 to 3, --seeds 10-13 others. For each there are two random cells, since they cost no search;
# published cells are retrained with the first seed alone. METHODS="gdas random MY_CELL" takes these instead: methods that
# are named below, cells of genotypes.py. --epochs are those of retraining. SEARCH="--init_channels 8" are flags of the
# searches alone, RETRAIN="--train_portion 1" of retraining. --jobs is how many run at a time, each with one thread.
# Stopped, it goes on with the same command, and what is finished is not run again. --list prints the commands, one a line
# for a cell (its search, then its retraining), to be run in the project's folder, and runs nothing.
# --pilot retrains 12 random cells, each with two seeds, by three protocols: now, with 16 channels, on three times the
# images; and prints for each how well it tells cells apart in a minute.
set -eu
{ # bash reads up to the closing brace before it begins: who edits this file does not disturb what runs
source "$(dirname "${BASH_SOURCE[0]}")/lib/many.sh"
seeds=4 search_epochs=6 epochs=6 jobs=$(getconf _NPROCESSORS_ONLN) out='' dataset=fashion_mnist pilot='' words=()
for word in "$@"; do if [ "$word" = --pilot ]; then pilot=yes; else words+=("$word"); fi; done
chosen="--seed --save --resume --method --space_config --arch"
many_arguments study.sh "search_epochs epochs" "dataset seeds" "$chosen" ${words[@]+"${words[@]}"}
many_seeds study.sh "$seeds" # first and last
if [ -n "$pilot" ]; then name=pilot; else name=study; fi
out=${out:-logs/$name}
stage=$((search_epochs / 3)) # epochs of each of P-DARTS' three stages
[ $((3 * stage)) = "$search_epochs" ] || { echo "study.sh: --search_epochs $search_epochs: expected a multiple of 3" >&2; exit 2; }

own() { # script and flags of a method's search, no script for a cell that is known
    script=search.py
    local ddsas=(--method ddsas --dss_max_ops 28 --dss_freq 6 --confidence 1.44) # 14 subspaces an epoch, as published
    case $1 in
        ddsas) own=("${ddsas[@]}" --space_config static) ;;
        ddsas-shrink) own=("${ddsas[@]}" --space_config shrink --scale_space) ;;
        ddsas-expand) own=("${ddsas[@]}" --space_config expand --scale_space) ;;
        ddsas-random) own=("${ddsas[@]}" --space_config static --rdss_prob 1) ;;
        darts | random) own=(--method "$1") ;;
        gdas) own=(--method gdas --tau_max 10 --tau_min 0.1) ;;
        pdarts)
            script=train_search.py
            own=(
                --layers 3
                --add_layers 1
                --add_layers 2
                --dropout_rate 0.1
                --dropout_rate 0.4
                --dropout_rate 0.7
                --epochs "$stage"
                --eps_no_arch $(((4 * stage + 5) / 10)) # two fifths, as published
                --arch_learning_rate 6e-3
                --learning_rate_min 0
            ) ;;
        *) script='' ;;
    esac
}
searching=(
    --dataset "${dataset/fashion_mnist/fashion_mini}"
    --batch_size 64
    --init_channels 4
    --layers 5
    --epochs "$search_epochs"
    --learning_rate 0.025
    --learning_rate_min 0.001
    --momentum 0.9
    --weight_decay 3e-4
    --arch_learning_rate 3e-3
    --arch_weight_decay 1e-3
    --grad_clip 5
    --train_portion 0.5
    --device cpu
    --quiet
)
retraining=(
    --dataset "$dataset"
    --train_portion 0.17
    --batch_size 64
    --init_channels 8
    --layers 5
    --epochs "$epochs"
    --learning_rate 0.05
    --learning_rate_min 0
    --momentum 0.9
    --weight_decay 3e-4
    --grad_clip 5
    --drop_path_prob 0
    --device cpu
    --quiet
)
read -r -a SEARCH <<<"${SEARCH:-}"
read -r -a RETRAIN <<<"${RETRAIN:-}"

commands=()
add() { # METHOD SEED
    local cell=$out/$1-$2 words=()
    local retrain=("$cell/retrain" retrain.py --arch "$1" "${retraining[@]}" --seed "$2" ${RETRAIN[@]+"${RETRAIN[@]}"})
    if [ -n "$script" ]; then
        retrain[3]=$cell/search
        words=("$cell/search" "$script" "${searching[@]}" "${own[@]}" --seed "$2" ${SEARCH[@]+"${SEARCH[@]}"})
        words+=(${more[@]+"${more[@]}"} --then)
    fi
    commands+=("$(many_command ${words[@]+"${words[@]}"} "${retrain[@]}" ${more[@]+"${more[@]}"})")
}
add_pilot() { # CELL: a random one, and its retraining by three protocols with two seeds each
    local cell=$out/random-$1 seed protocol words
    words=("$cell/search" search.py "${searching[@]}" --method random --seed "$1")
    for seed in 0 1; do
        for protocol in now channels images; do
            words+=(--then "$cell/$protocol-$seed" retrain.py --arch "$cell/search" "${retraining[@]}" --seed "$seed")
            case $protocol in
                channels) words+=(--init_channels 16) ;;
                images) words+=(--train_portion 0.51) ;;
            esac
            words+=(${RETRAIN[@]+"${RETRAIN[@]}"} ${more[@]+"${more[@]}"})
        done
    done
    commands+=("$(many_command "${words[@]}")")
}
published="DDSAS_cifar10 PDARTS DARTS_V2"
if [ -n "$pilot" ]; then
    for cell in $(seq 0 11); do add_pilot "$cell"; done
    first=1 last=0 # nothing else
fi
for seed in $(seq "$first" "$last"); do # all methods of a seed, then the next seed
    for method in ${METHODS:-ddsas ddsas-shrink ddsas-expand ddsas-random darts gdas pdarts random $published}; do
        own "$method"
        if [ "$method" = random ]; then
            add random $((2 * seed))
            add random $((2 * seed + 1))
        elif [ -n "$script" ]; then
            add "$method" "$seed"
        elif ! grep -q "^$method = " "$(dirname "${BASH_SOURCE[0]}")/../genotypes.py"; then
            echo "study.sh: METHODS: $method is no method that study.sh names, and no cell of genotypes.py" >&2
            exit 2
        elif [ "$seed" = "$first" ]; then
            add "$method" "$seed"
        fi
    done
done
many_start
if [ -z "$list" ]; then # without the images nothing is begun; where they can be downloaded, it is done once
    "$PYTHON" - "${retraining[@]}" ${RETRAIN[@]+"${RETRAIN[@]}"} ${more[@]+"${more[@]}"} <<'PYTHON'
import sys
import retrain
from lib import cli, data
sys.argv[0] = "study.sh"
look = lambda args: data.test_data(args.dataset, args.data, batch_size=args.batch_size, image_size=args.image_size)
cli.run_script(look, retrain.get_parser())
PYTHON
fi
many_run
if [ -n "$pilot" ]; then
    "$PYTHON" -m experiments.study "$out" --pilot || [ "$code" != 0 ]
else
    "$PYTHON" -m experiments.study "$out" --out "$out" || [ "$code" != 0 ] # then it is said why nothing is finished
fi
exit "$code"
}
