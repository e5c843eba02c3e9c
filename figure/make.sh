#!/usr/bin/env bash
# All figures of this folder: figure1 from what figure/data keeps of searches, figure2 from nothing but the algorithm.
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python}" -m figure.figure1
"${PYTHON:-python}" -m figure.figure2
