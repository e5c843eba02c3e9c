#!/usr/bin/env bash
# The whole of P-DARTS in some minutes on two cores: three small stages on the embedded images, retrain, evaluate.
set -eu
[ $# = 0 ] || { sed -n '2s/^# \(.*\)/\1 It takes no arguments./p' "$0"; [ "$1" != --help ] || exit 0; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
run=logs/demo-pdarts-$(date +%Y%m%d-%H%M%S)

started=$(date +%s)
"$PYTHON" train_search.py \
    --dataset fashion_mini \
    --save "$run/" \
    --note demo \
    --layers 3 \
    --add_layers 1 \
    --add_layers 2 \
    --init_channels 4 \
    --dropout_rate 0.1 \
    --dropout_rate 0.4 \
    --dropout_rate 0.7 \
    --epochs 1 \
    --eps_no_arch 0 \
    --arch_learning_rate 6e-3 \
    --report_freq 20
searched=$(date +%s)
search=$(echo "$run"/search-demo-*)
"$PYTHON" train_cifar.py \
    --dataset fashion_mini \
    --arch "$search" \
    --batch_size 64 \
    --epochs 8 \
    --init_channels 16 \
    --layers 3 \
    --learning_rate 0.05 \
    --drop_path_prob 0 \
    --save "$run/" \
    --note demo
retrained=$(date +%s)
echo
"$PYTHON" evaluate.py --model_path "$(echo "$run"/eval-demo-*)"
evaluated=$(date +%s)

minutes() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }
cat <<TABLE

time          search $(minutes $((searched - started))), retraining $(minutes $((retrained - searched))), evaluation $(minutes $((evaluated - retrained))) minutes
run folders   $search  $(echo "$run"/eval-demo-*)
look at them  python visualize.py $search --all;  tensorboard --logdir logs
TABLE
