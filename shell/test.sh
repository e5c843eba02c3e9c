#!/usr/bin/env bash
# Run the tests: bash shell/test.sh [--oldest] [--long] [any argument of pytest]; -m cuda: those that need a GPU
# --oldest: with the oldest versions that are supported (tests/oldest.txt), in an environment of its own, .venv-oldest.
set -eu
REQUIREMENTS="requirements.txt tests/requirements.txt"
if [ "${1:-}" = --oldest ]; then
    shift
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    if [ ! -x .venv-oldest/bin/python ]; then "${PYTHON:-python3}" -m venv .venv-oldest; fi
    PYTHON=$PWD/.venv-oldest/bin/python
    echo "installing into .venv-oldest: $REQUIREMENTS as old as tests/oldest.txt says (some GB, once)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt -c tests/oldest.txt
fi
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export OMP_NUM_THREADS=1 # the tests' networks are too small for more
"$PYTHON" -m pytest -q -n 2 --dist loadfile "$@" # what a file's tests share is made once
