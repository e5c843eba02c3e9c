#!/usr/bin/env bash
# Which cells of NAS-Bench-201's space are good on the images that were searched on: 60 cells from all over the table and
# all that searches found (figure/data/figure1.jsonl) are trained on the embedded images by one protocol.
#     bash shell/truth.sh [--table FILE.csv] [--parts 60] [--jobs J] [--out FOLDER] [--list] [flags of retrain.py]
# --jobs, --out, --list, stopping and going on are as in compare_nasbench201.sh.
set -eu
{ # bash reads up to the closing brace before it begins: who edits this file does not disturb what runs
source "$(dirname "${BASH_SOURCE[0]}")/lib/many.sh"
parts=60 jobs=$(getconf _NPROCESSORS_ONLN) out=logs/truth table='' commands=()
many_arguments truth.sh parts table "--seed --save --resume --arch" "$@"
training=(
    --dataset fashion_mini
    --batch_size 64
    --init_channels 8
    --layers 1
    --epochs 6
    --learning_rate 0.05
    --learning_rate_min 0
    --momentum 0.9
    --weight_decay 5e-4
    --grad_clip 5
    --drop_path_prob 0
    --seed 0
    --quiet
)
asked=$list list='' # the list is Python's
many_start
list=$asked
cells=$("$PYTHON" -m experiments.truth --list --parts "$parts" ${table:+--table "$table"})
while read -r name cell; do
    commands+=("$(many_command "$out/$name" retrain.py --arch "$cell" "${training[@]}" ${more[@]+"${more[@]}"})")
done <<<"$cells"
many_run
"$PYTHON" -m experiments.truth "$out" --out "$out" || [ "$code" != 0 ]
exit "$code"
}
