#!/usr/bin/env bash
# Run a training once: bash shell/lib/run_once.sh FOLDER SCRIPT [ARGUMENTS...]
# is `python SCRIPT ARGUMENTS --save FOLDER`. Where FOLDER holds a checkpoint it goes on from there; where it holds the
# file `finished`, which is written when the script has come to its end, nothing is done. FOLDER/command says what was
# run: other arguments are refused, they belong into another folder. Several can run at a time; who comes second to a
# folder waits for the first, and then finds it finished.
#     bash shell/lib/run_once.sh FOLDER SCRIPT [ARGUMENTS...] --then FOLDER SCRIPT [ARGUMENTS...]
# does the same with the second when the first is finished: a search, and the retraining of what it finds.
# train_search.py and its like make a folder of their own inside FOLDER, since they add the time to what --save says; the
# genotype of it is copied to FOLDER, where that of search.py is.
set -eu
{ # bash reads up to the closing brace before it begins: who edits this file does not disturb what runs
[ $# -ge 2 ] || { echo "run_once.sh: expected FOLDER SCRIPT [ARGUMENTS...]" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
case $1 in */*) folder=$1 ;; *) folder=./$1 ;; esac # a name without / would be one below logs/
script=$2 arguments=() stopped=
shift 2
while [ $# -gt 0 ] && [ "$1" != --then ]; do arguments+=("$1"); shift; done
if [ $# -gt 0 ]; then shift; fi # what is left stands behind --then
go_on() {
    if [ $# = 0 ]; then exit 0; fi
    if [ -n "$stopped" ]; then exit "$stopped"; fi
    exec bash shell/lib/run_once.sh "$@"
}
# the number of threads to PyTorch, which asks MKL's variable first
if [ -n "${OMP_NUM_THREADS:-}" ]; then export MKL_NUM_THREADS=$OMP_NUM_THREADS; fi

mkdir -p "$folder"
if command -v flock >/dev/null; then # held by this shell and by the Python that it starts, freed by the last one's end
    exec 9>"$folder/once.lock"
    flock -n 9 || { echo "$folder: waiting for the process that works in it" >&2; flock 9; }
fi
begun() { # the run folder that has a checkpoint
    local checkpoint
    for checkpoint in "$folder"/checkpoint*.pt "$folder"/*/checkpoint*.pt; do
        if [ -f "$checkpoint" ]; then dirname "$checkpoint"; return; fi
    done
}
begun=$(begun)
command=$(printf '%q ' "$script" ${arguments[@]+"${arguments[@]}"})
if [ -f "$folder/command" ] && [ "$(cat "$folder/command")" != "$command" ]; then
    if [ -n "$begun" ] || [ -f "$folder/finished" ]; then
        echo "run_once.sh: $folder was begun with other arguments ($folder/command): take another folder" >&2
        exit 2
    fi
fi
if [ -f "$folder/finished" ]; then go_on "$@"; fi
printf '%s\n' "$command" >"$folder/command"

case $script in train_*) save=$folder/ ;; *) save=$folder ;; esac
# Ctrl-C reaches Python by itself, SIGTERM has to be passed on; both end it after a step, with a checkpoint.
trap stopped=130 INT
trap 'stopped=143; kill -TERM "$python" 2>/dev/null || true' TERM
(trap - INT; exec "$PYTHON" "$script" ${arguments[@]+"${arguments[@]}"} --save "$save" ${begun:+--resume "$begun"}) </dev/null &
python=$!
code=0
while wait "$python" && code=0 || code=$?; kill -0 "$python" 2>/dev/null; do :; done # a signal ends wait, not Python
if [ "$code" != 0 ]; then exit "$code"; fi
begun=${begun:-$(begun)}
[ -n "$begun" ] || { echo "run_once.sh: $script left no checkpoint in $folder: not finished" >&2; exit 1; }
found=$begun/genotype.txt
if [ -f "$found" ] && [ ! -f "$folder/genotype.txt" ]; then cp "$found" "$folder"; fi
date >"$folder/finished"
go_on "$@"
}
