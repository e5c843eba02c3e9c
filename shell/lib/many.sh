# Sourced by compare_nasbench201.sh, study.sh and truth.sh, which make the commands of many trainings.

# many_arguments SCRIPT NUMBERS TEXTS CHOSEN "$@" reads the script's arguments. It sets a variable for each name in
# NUMBERS and TEXTS that is given as --NAME VALUE or --NAME=VALUE, also jobs and out; list with --list; more, the flags
# for Python. Flags in CHOSEN, and what argparse takes for them, are refused: the script has its own. --help prints the
# comment with which the script begins. Errors are one line, exit code 2.
many_arguments() {
    local script=$1 numbers="$2 jobs" texts="$3 out" chosen=$4 name flag got='' wrong=''
    local number='^[1-9][0-9]{0,5}$'
    shift 4
    list='' more=()
    while [ $# -gt 0 ]; do
        name=${1#--} name=${name%%=*}
        if [[ $1 = --*=* && " $numbers $texts " = *" $name "* ]]; then set -- "--$name" "${1#*=}" "${@:2}"; fi
        if [ "$1" = --help ] || [ "$1" = -h ]; then
            awk 'NR > 1 { if (!sub(/^# ?/, "")) exit; print }' "$0"
            exit 0
        elif [ "$1" = --list ]; then
            list=yes
            shift
        elif [[ $1 = --* && " $numbers $texts " = *" $name "* ]]; then
            [ $# -ge 2 ] || { echo "$script: $1 needs a value" >&2; exit 2; }
            [ -n "$2" ] || { echo "$script: $1 is empty" >&2; exit 2; }
            printf -v "$name" %s "$2"
            shift 2
        else
            for flag in $chosen --list; do
                if [[ $1 = --?* && $flag = "--$name"* ]]; then
                    echo "$script: $1 is chosen here (see --help): leave it out" >&2
                    exit 2
                fi
            done
            more+=("$1")
            shift
        fi
    done
    for name in $numbers; do
        got+=" --$name ${!name}"
        [[ ${!name} =~ $number ]] || wrong=yes
    done
    [ -z "$wrong" ] || { echo "$script: expected numbers; got$got" >&2; exit 2; }
}

# many_seeds SCRIPT SEEDS sets first and last: of 4 these are 0 and 3, of 10-13 as they stand.
many_seeds() {
    if [[ $2 =~ ^[1-9][0-9]{0,5}$ ]]; then
        first=0 last=$(($2 - 1))
    elif [[ $2 =~ ^(0|[1-9][0-9]{0,5})-(0|[1-9][0-9]{0,5})$ && ${2%-*} -le ${2#*-} ]]; then
        first=${2%-*} last=${2#*-}
    else
        echo "$1: seeds $2: expected a number, or first-last as 10-13" >&2
        exit 2
    fi
}

# many_start sets PYTHON to one that has what trainings and tables need; with --list nothing is needed.
many_start() {
    if [ -n "$list" ]; then return; fi
    REQUIREMENTS="requirements.txt experiments/requirements.txt"
    source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
}

# many_command FOLDER SCRIPT ARGUMENTS... (see run_once.sh) as a line for bash in the project's folder. One thread: jobs
# side by side do not disturb each other, and the sums of another number of threads differ in their last digits.
many_command() {
    printf 'OMP_NUM_THREADS=1 bash shell/lib/run_once.sh'
    printf ' %q' "$@"
    echo
}

# many_run runs the lines in the array commands, $jobs at a time, or prints them with --list and leaves. code is 1 if one
# failed; after a signal it leaves.
many_run() {
    if [ -n "$list" ]; then
        printf '%s\n' "${commands[@]}"
        exit 0
    fi
    source shell/lib/run_all.sh
    code=0
    run_all "$jobs" < <(printf '%s\n' "${commands[@]}") || code=$?
    if [ "$code" -gt 1 ]; then
        echo "stopped; the same command goes on with it" >&2
        exit "$code"
    fi
}
