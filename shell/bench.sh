#!/usr/bin/env bash
# Time and memory of search, retraining and evaluation at the papers' sizes against the plain formulation.
# bash shell/bench.sh --quick takes under two minutes.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" benchmarks/run.py "$@"
