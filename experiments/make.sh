#!/usr/bin/env bash
# Draw every figure and print every table from what figure/data keeps, and put the tables into docs/.
set -euo pipefail
cd "$(dirname "$0")/.."
tell() { # MODULE [FILE]: what it prints replaces what stands in FILE between <!-- MODULE --> and <!-- end -->
    local text
    text=$("${PYTHON:-python}" -m "experiments.$1")
    printf '%s\n\n' "$text"
    if [ $# = 2 ]; then
        TEXT=$(grep -v '^figure: ' <<<"$text") awk -v begin="<!-- $1 -->" '
            /^<!-- end -->$/ { inside = 0 }
            !inside
            $0 == begin { inside = 1; print "\n" ENVIRON["TEXT"] "\n" }' "$2" >"$2.new"
        mv "$2.new" "$2"
    fi
}
tell figure1 docs/nasbench201.md
tell study docs/study.md
tell flops docs/own-images.md
if [ -f figure/data/truth.jsonl ]; then tell truth docs/nasbench201.md; fi
