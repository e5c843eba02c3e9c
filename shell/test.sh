#!/usr/bin/env bash
# Run the tests: bash shell/test.sh [--long] [any argument of pytest]
set -eu
REQUIREMENTS="requirements.txt tests/requirements.txt"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export OMP_NUM_THREADS=1 # the tests' networks are too small for more
"$PYTHON" -m pytest -q -n 2 "$@"
