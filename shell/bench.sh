#!/usr/bin/env bash
# Time and memory of search, retraining and evaluation at the papers' sizes against the plain formulation.
# bash shell/bench.sh --quick takes under two minutes. --gpu: what a step asks of a GPU, counted without one; behind it
# --batches (which batch fits) or --check (the prediction of memory against what is measured on the CPU).
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ "${1:-}" = --gpu ]; then
    shift
    exec "$PYTHON" benchmarks/gpu.py "$@"
fi
"$PYTHON" benchmarks/run.py "$@"
