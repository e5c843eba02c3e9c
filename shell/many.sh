# Sourced by compare_nasbench201.sh and study.sh, which make the commands of many trainings: what both have in common.

# many_arguments SCRIPT NUMBERS TEXTS CHOSEN "$@" reads the script's arguments. It sets a variable for each name in
# NUMBERS and TEXTS that is given as --NAME VALUE or --NAME=VALUE, also seeds (as first-last), jobs and out; list with
# --list; more, the flags for Python. Flags in CHOSEN, and what argparse takes for them, are refused: the script has its
# own. --help prints the comment with which the script begins. Errors are one line, exit code 2.
many_arguments() {
    local script=$1 numbers="seeds $2 jobs" texts="$3 out" chosen=$4 name flag got='' wrong=''
    local number='^[1-9][0-9]{0,5}$' range='^(0|[1-9][0-9]{0,5})-(0|[1-9][0-9]{0,5})$'
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
                    echo "$script: $1 is chosen here (--seeds, --out, --list, METHODS=...): leave it out" >&2
                    exit 2
                fi
            done
            more+=("$1")
            shift
        fi
    done
    for name in $numbers; do
        got+=" --$name ${!name}"
        [[ ${!name} =~ $number || ( $name = seeds && $seeds =~ $range ) ]] || wrong=yes
    done
    [ -z "$wrong" ] || { echo "$script: expected numbers, --seeds 4 or 10-13; got$got" >&2; exit 2; }
    case $seeds in *-*) ;; *) seeds=0-$((seeds - 1)) ;; esac
    [ "${seeds%-*}" -le "${seeds#*-}" ] || { echo "$script: --seeds $seeds: expected the smaller first" >&2; exit 2; }
}

# many_command FOLDER SCRIPT ARGUMENTS... (see run_once.sh) as a line for bash in the project's folder. One thread: jobs
# side by side do not disturb each other, and the sums of another number of threads differ in their last digits.
many_command() {
    printf 'OMP_NUM_THREADS=1 bash shell/run_once.sh'
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
    source shell/run_all.sh
    code=0
    run_all "$jobs" < <(printf '%s\n' "${commands[@]}") || code=$?
    if [ "$code" -gt 1 ]; then
        echo "stopped; the same command goes on with it" >&2
        exit "$code"
    fi
}
