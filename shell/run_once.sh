#!/usr/bin/env bash
# Run a training once: bash shell/run_once.sh FOLDER SCRIPT [ARGUMENTS...]
# is `python SCRIPT ARGUMENTS --save FOLDER`. Where FOLDER holds a checkpoint it goes on from there; where it holds the
# file `finished`, which is written when the script has come to its end, nothing is done. FOLDER/command says what was
# run: other arguments are refused, they belong into another folder. Several can run at a time; who comes second to a
# folder waits for the first, and then finds it finished.
# train_search.py and its like make a folder of their own inside FOLDER, since they add the time to what --save says.
set -eu
{ # bash reads up to the closing brace before it begins: who edits this file does not disturb what runs
[ $# -ge 2 ] || { echo "run_once.sh: expected FOLDER SCRIPT [ARGUMENTS...]" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
case $1 in */*) folder=$1 ;; *) folder=./$1 ;; esac # a name without / would be one below logs/
script=$2
shift 2

mkdir -p "$folder"
if command -v flock >/dev/null; then # held by this shell and by the Python that it starts, freed by the last one's end
    exec 9>"$folder/once.lock"
    flock -n 9 || { echo "$folder: waiting for the process that works in it" >&2; flock 9; }
fi
begun=
for checkpoint in "$folder"/checkpoint*.pt "$folder"/*/checkpoint*.pt; do
    if [ -f "$checkpoint" ]; then begun=$(dirname "$checkpoint"); break; fi
done
command=$(printf '%q ' "$script" "$@")
if [ -f "$folder/command" ] && [ "$(cat "$folder/command")" != "$command" ]; then
    if [ -n "$begun" ] || [ -f "$folder/finished" ]; then
        echo "run_once.sh: $folder was begun with other arguments ($folder/command): take another folder" >&2
        exit 2
    fi
fi
if [ -f "$folder/finished" ]; then exit 0; fi
printf '%s\n' "$command" >"$folder/command"

case $script in train_*) save=$folder/ ;; *) save=$folder ;; esac
# Ctrl-C reaches Python by itself, SIGTERM has to be passed on; both end it after a step, with a checkpoint.
trap true INT
trap 'kill -TERM "$python" 2>/dev/null || true' TERM
(trap - INT; exec "$PYTHON" "$script" "$@" --save "$save" ${begun:+--resume "$begun"}) </dev/null &
python=$!
code=0
while wait "$python" && code=0 || code=$?; kill -0 "$python" 2>/dev/null; do :; done # a signal ends wait, not Python
if [ "$code" = 0 ]; then date >"$folder/finished"; fi
exit "$code"
}
