#!/usr/bin/env bash
# Time and memory of search, retraining and evaluation at the papers' sizes, against the definition in both memory
# orders and without each trick of fast.py; --quick takes minutes, --device cuda measures a GPU.
# What only a GPU can settle, in eight minutes on one: python benchmarks/gpu.py
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" benchmarks/run.py "$@"
