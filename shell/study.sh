#!/usr/bin/env bash
# Which cells train best: searches x seeds; every cell found is retrained by one protocol and tested on all test images.
#     bash shell/study.sh [--seeds N] [--jobs J] [--out FOLDER] [--list] [--dataset NAME] [--search_epochs E] [--epochs E]
#                         [flags that search.py, train_search.py and retrain.py all have]
# --seeds 4 are the seeds 0 to 3, --seeds 10-13 others. For each there are two random cells, since they cost no search;
# published cells are retrained with the first seed alone. METHODS="gdas random MY_CELL" takes these instead: methods that
# are named below, cells of genotypes.py. --epochs are those of retraining. SEARCH="--init_channels 8" are flags of the
# searches alone, RETRAIN="--train_portion 1" of retraining. --jobs is how many run at a time, each with one thread.
# Stopped, it goes on with the same command, and what is finished is not run again. --list prints the commands, one a line
# for a cell (its search, then its retraining), to be run in the project's folder, and runs nothing.
set -eu
{ # bash reads up to the closing brace before it begins: who edits this file does not disturb what runs
source "$(dirname "${BASH_SOURCE[0]}")/many.sh"
seeds=4 search_epochs=6 epochs=6 jobs=$(getconf _NPROCESSORS_ONLN) out=logs/study dataset=fashion_mnist
many_arguments study.sh "search_epochs epochs" dataset "--seed --save --resume --method --space_config --arch" "$@"
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
published="DDSAS_cifar10 PDARTS DARTS_V2"
for seed in $(seq "${seeds%-*}" "${seeds#*-}"); do # all methods of a seed, then the next seed
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
        elif [ "$seed" = "${seeds%-*}" ]; then
            add "$method" "$seed"
        fi
    done
done
if [ -z "$list" ]; then
    source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
    # without the images nothing is begun; where they can be downloaded, it is done once
    look="import sys, data, engine, retrain, utils; sys.argv[0] = 'study.sh'; "
    look+="cli.run_script(lambda args: data.test_data(**engine.data_arguments(args, 'cpu')), retrain.get_parser())"
    "$PYTHON" -c "$look" "${retraining[@]}" ${RETRAIN[@]+"${RETRAIN[@]}"} ${more[@]+"${more[@]}"}
fi
many_run
"$PYTHON" -m experiments.study "$out" --out "$out" || [ "$code" != 0 ] # then it is said already why nothing is finished
exit "$code"
}
