#!/usr/bin/env bash
# The whole of DDSAS in some minutes on two cores: search on the embedded images, retrain what was found, evaluate it.
set -eu
[ $# = 0 ] || { sed -n '2s/^# \(.*\)/\1 It takes no arguments./p' "$0"; [ "$1" != --help ] || exit 0; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
run=logs/demo-$(date +%Y%m%d-%H%M%S)

started=$(date +%s)
"$PYTHON" search.py \
    --dataset fashion_mini \
    --space_config static \
    --dss_max_ops 28 \
    --dss_freq 8 \
    --batch_size 64 \
    --epochs 1 \
    --init_channels 8 \
    --layers 3 \
    --arch_learning_rate 3e-3 \
    --report_freq 8 \
    --save "$run/search"
searched=$(date +%s)
"$PYTHON" retrain.py \
    --dataset fashion_mini \
    --arch "$run/search" \
    --batch_size 64 \
    --epochs 5 \
    --init_channels 16 \
    --layers 3 \
    --learning_rate 0.05 \
    --drop_path_prob 0 \
    --save "$run/retrain"
retrained=$(date +%s)
echo
"$PYTHON" evaluate.py --model_path "$run/retrain"
evaluated=$(date +%s)

minutes() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }
cat <<TABLE

time          search $(minutes $((searched - started))), retraining $(minutes $((retrained - searched))), evaluation $(minutes $((evaluated - retrained))) minutes
run folders   $run/search  $run/retrain
look at them  python visualize.py $run/search --all;  tensorboard --logdir logs
TABLE
