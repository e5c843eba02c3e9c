#!/usr/bin/env bash
# All figures of this folder: figure1 and study from what figure/data keeps, figure2 from nothing but the algorithm.
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python}" -m experiments.figure1
"${PYTHON:-python}" -m experiments.figure2
if [ -f figure/data/study.jsonl ]; then "${PYTHON:-python}" -m experiments.study; fi
