#!/usr/bin/env bash
# The whole of DDSAS in ten minutes on two cores: search on the embedded images, retrain what was found, evaluate it.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
run=logs/demo-$(date +%Y%m%d-%H%M%S)
clock() { date +%s; }

started=$(clock)
"$PYTHON" search.py \
    --dataset fashion_mini \
    --space_config static \
    --dss_max_ops 28 \
    --dss_freq 15 \
    --batch_size 64 \
    --epochs 3 \
    --init_channels 8 \
    --layers 3 \
    --arch_learning_rate 3e-3 \
    --report_freq 15 \
    --save "$run/search"
searched=$(clock)
"$PYTHON" retrain.py \
    --dataset fashion_mini \
    --arch "$run/search" \
    --batch_size 64 \
    --epochs 7 \
    --init_channels 16 \
    --layers 3 \
    --learning_rate 0.05 \
    --drop_path_prob 0 \
    --save "$run/retrain"
retrained=$(clock)
"$PYTHON" evaluate.py --model_path "$run/retrain"
result=$("$PYTHON" evaluate.py --model_path "$run/retrain" --json)
evaluated=$(clock)

"$PYTHON" - "$result" $((searched - started)) $((retrained - searched)) $((evaluated - retrained)) "$run" <<'PYTHON'
import json, sys

result, run = json.loads(sys.argv[1]), sys.argv[5]
search, retrain, evaluate = (f"{int(seconds) / 60:.1f} min" for seconds in sys.argv[2:5])
print(f"""
genotype       {result["genotype"]}
parameters     {result["parameters_m"]:.3f} M
test accuracy  {result["top1"]:.2f} % of {result["images"]} images
time           search {search}, retraining {retrain}, evaluation {evaluate}
run folders    {run}/search  {run}/retrain
look at it     python visualize.py {run}/search --all   tensorboard --logdir logs""")
PYTHON
