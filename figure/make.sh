#!/usr/bin/env bash
# All figures of this folder: figure1 from the histories in figure/data, figure2 from nothing but the algorithm.
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python}" -m figure.figure1
"${PYTHON:-python}" -m figure.figure2
