"""shell/env.sh: which Python the scripts take, and what is said before anything is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ENV = Path(__file__).resolve().parent.parent / "shell/env.sh"
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
    (tmp_path / "shell").mkdir()
    shutil.copy(ENV, tmp_path / "shell/env.sh")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(PYTHON)
    (tmp_path / "bin/python3").chmod(0o755)

    def source(**variables: str) -> tuple[list[str], str]:
        variables = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | variables
        script = 'set -eu; source shell/env.sh; echo "$PYTHON"'
        ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True)
        *said, python = ended.stdout.splitlines()
        return said, python.replace(str(tmp_path), "")

    return source


def test_the_active_environment_is_taken_if_it_satisfies(source, tmp_path):
    assert source(HAS="yes") == ([], "/bin/python3")
    assert not (tmp_path / ".venv").exists()


def test_gigabytes_are_announced_before_they_are_installed_and_can_be_declined(source, tmp_path):
    assert source(HAS="no", PYTHON="/any/python") == ([], "/any/python") and not (tmp_path / ".venv").exists()
    (made, announced, pip), python = source(HAS="no")
    assert python == "/.venv/bin/python" and "making .venv with Python 3.12" in made
    assert "some GB" in announced and "PYTHON=" in announced and pip.startswith("pip: -m pip install")


def test_an_environment_made_before_is_taken(source, tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(PYTHON.replace('"$HAS" = yes', "1 = 1"))
    (tmp_path / ".venv/bin/python").chmod(0o755)
    assert source(HAS="no") == ([], "/.venv/bin/python")
