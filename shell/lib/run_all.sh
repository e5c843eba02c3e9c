#!/usr/bin/env bash
# Run commands, one a line, several at a time: bash shell/lib/run_all.sh [JOBS] <commands, or sourced: run_all JOBS <commands
# All are run even if some fail; those are named at the end. After Ctrl-C or SIGTERM no command is begun, and those that
# run are waited for: a training ends after its step with a checkpoint. JOBS is the number of processors by default.
# Returns 0, 1 if a command failed, 130 or 143 if a signal came.

run_all() {
    local jobs=${1:-$(getconf _NPROCESSORS_ONLN)} stopped=0 line job code next=0
    local lines=() running=() left=() failed=()
    while IFS= read -r line || [ -n "$line" ]; do
        if [ -n "$line" ]; then lines+=("$line"); fi
    done
    trap 'stopped=130; echo "stopping; each command is waited for, which ends after its step" >&2' INT
    trap 'stopped=143; run_all_pass_on' TERM
    RUN_ALL=() # process ids by number of the command
    while [ ${#running[@]} -gt 0 ] || { [ $next -lt ${#lines[@]} ] && [ $stopped = 0 ]; }; do
        if [ ${#running[@]} -lt "$jobs" ] && [ $next -lt ${#lines[@]} ] && [ $stopped = 0 ]; then
            # a shell lets what it starts with & ignore Ctrl-C: not here
            (trap - INT; exec bash -c "${lines[next]}") </dev/null &
            RUN_ALL[next]=$!
            running+=("$next")
            next=$((next + 1))
            continue
        fi
        sleep 0.2 || true
        left=()
        for job in "${running[@]}"; do
            if kill -0 "${RUN_ALL[job]}" 2>/dev/null; then
                left+=("$job")
                continue
            fi
            code=0
            wait "${RUN_ALL[job]}" || code=$?
            unset "RUN_ALL[job]"
            if [ $code = 0 ]; then
                echo "done: $((job + 1)) of ${#lines[@]}"
            elif [ $stopped = 0 ]; then
                failed+=("exit code $code: ${lines[job]}")
            fi
        done
        running=(${left[@]+"${left[@]}"})
    done
    trap - INT TERM
    if [ $stopped != 0 ]; then return $stopped; fi
    if [ ${#failed[@]} = 0 ]; then return 0; fi
    echo "${#failed[@]} of ${#lines[@]} commands failed:" >&2
    printf '%s\n' "${failed[@]}" >&2
    return 1
}

run_all_pass_on() { # SIGTERM to all commands that run
    local job
    for job in ${RUN_ALL[@]+"${RUN_ALL[@]}"}; do kill -TERM "$job" 2>/dev/null || true; done
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -eu
    run_all "$@"
fi
