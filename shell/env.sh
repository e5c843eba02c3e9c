# Sourced by the scripts of this folder: goes to the project's root and sets PYTHON to an interpreter that has what
# REQUIREMENTS list (requirements.txt by default): the python3 of the active environment (venv, conda) if it has them,
# otherwise that of .venv, made when missing. A PYTHON that is set already is taken as it is.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
REQUIREMENTS=${REQUIREMENTS:-requirements.txt}

satisfied() { # does this python have every requirement? (packaging comes with matplotlib)
    "$1" - $REQUIREMENTS <<'PYTHON' 2>/dev/null
import sys
from importlib.metadata import version
from packaging.requirements import Requirement

assert sys.version_info >= (3, 10)
for path in sys.argv[1:]:
    for line in open(path):
        if line.strip() and not line.startswith("#"):
            wanted = Requirement(line.strip())
            assert wanted.specifier.contains(version(wanted.name), prereleases=True)
PYTHON
}

if [ -z "${PYTHON:-}" ]; then
    PYTHON=$(command -v python3 || command -v python) || { echo "Python 3.10 or newer is needed" >&2; exit 1; }
    if ! satisfied "$PYTHON" && [ -x .venv/bin/python ]; then PYTHON=$PWD/.venv/bin/python; fi
    if ! satisfied "$PYTHON"; then
        if [ ! -x .venv/bin/python ]; then
            echo "making .venv with $("$PYTHON" --version): $PYTHON lacks something of $REQUIREMENTS"
            "$PYTHON" -m venv .venv || { echo "python3 -m venv failed (on Debian: apt install python3-venv)" >&2; exit 1; }
            PYTHON=$PWD/.venv/bin/python
        fi
        echo "installing into .venv: $REQUIREMENTS (some GB with PyTorch, a few minutes; PYTHON=... takes another Python)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' $REQUIREMENTS) ||
            { echo "pip could not install $REQUIREMENTS; is there a network?" >&2; exit 1; }
    fi
fi
export PYTHON
# Threads that wait spin, which is a third faster on an idle machine. Where half of the processors have work already
# they must sleep instead: spinning beside another program makes every step several times slower.
if [ -r /proc/loadavg ] && awk -v n="$(nproc)" '{ split($4, tasks, "/"); exit !(tasks[1] - 1 >= n / 2) }' /proc/loadavg; then
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
fi
# glibc: freed memory is kept for the next tensors instead of being returned and faulted in again; huge pages.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592}
