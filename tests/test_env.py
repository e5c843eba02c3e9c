"""shell/env.sh: which Python the scripts take, what is said before anything is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# stands for python3: has what is required if $HAS says so; makes environments of itself, and writes down what pip does
PYTHON = """#!/bin/sh
case "$1 $2" in
    "--version ") echo Python 3.12 ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") echo "pip: $*" ;;
    *) [ "$HAS" = yes ] ;;
esac
"""


@pytest.fixture
def source(tmp_path):
    """Sources env.sh in a project of its own, with an active environment; returns the lines it says and $PYTHON."""
    for folder, name, text in (("shell", "env.sh", (ROOT / "shell/env.sh").read_text()), ("bin", "python3", PYTHON)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    (tmp_path / "bin/python3").chmod(0o755)

    def source(**variables: str) -> tuple[list[str], str]:
        variables = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | variables
        script = 'set -eu; source shell/env.sh; echo "$PYTHON"'
        ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True)
        *said, python = ended.stdout.splitlines()
        return said, python.replace(str(tmp_path), "")

    return source


def test_an_environment_is_taken_if_it_satisfies_and_announced_before_it_is_made(source, tmp_path):
    assert source(HAS="yes") == ([], "/bin/python3")
    assert source(HAS="no", PYTHON="/any/python") == ([], "/any/python") and not (tmp_path / ".venv").exists()
    (made, announced, pip), python = source(HAS="no")
    assert python == "/.venv/bin/python" and "making .venv with Python 3.12" in made
    assert "some GB" in announced and "PYTHON=" in announced and pip.startswith("pip: -m pip install")
    shutil.copy(tmp_path / "bin/python3", tmp_path / ".venv/bin/python")
    (tmp_path / ".venv/bin/python").write_text(PYTHON.replace('"$HAS" = yes', "1 = 1"))
    assert source(HAS="no") == ([], "/.venv/bin/python")  # made before
