"""Every script of shell/ passes flags that exist; the README's commands run in their order.

Shell scripts run with a stand-in for Python that writes down what they would call. What then runs is made small by
arguments behind its own, and reads a few small pictures.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forked import ROOT, copy_project, run_commands

from lib import cli

IMAGES = "--dataset folder --data path/to/images --image_size 32 --workers 0"
IMAGENET = "--dataset imagenet --data .data/imagenet --image_size 32 --workers 0"
SMALL = "--init_channels 2 --layers 3 --batch_size 12 --epochs 1 --quiet"
SMALL_SEARCH = {"search.py": " --layers 1", "train_search.py": " --layers 1 --eps_no_arch 0 --batch_size 36"}
SCRIPTS = sorted(path.name for path in (ROOT / "shell").glob("*.sh") if re.match("search|retrain|eval|demo", path.name))
# `-` reads a program from the standard input: it runs; all else is written down, and a run's folder made
RECORDER = f"""#!/bin/sh
if [ "$1" = - ]; then exec {sys.executable} "$@"; fi
for a in "$@"; do
    printf '%s\\0' "$a" >> "$RECORD"
    if [ "${{last:-}}" = --save ]; then mkdir -p "$a"; fi
    last=$a
done
printf '\\n\\0' >> "$RECORD"
"""


@pytest.fixture(scope="module")
def workspace(pictures, tmp_path_factory) -> Path:
    """A copy of the project in which path/to/images and .data/imagenet are what the README says."""
    folder = copy_project(tmp_path_factory.mktemp("workspace"))
    (folder / "path/to").mkdir(parents=True)
    (folder / "path/to/images").symlink_to(pictures)
    for part, name in (("train", "train"), ("test", "val")):
        shutil.copytree(pictures / part, folder / ".data/imagenet" / name)
    (folder / "recorder").write_text(RECORDER)
    (folder / "recorder").chmod(0o755)
    return folder


def calls_of(workspace: Path, script: str, *arguments: str, **environment: str) -> list[list[str]]:
    """The argument lists with which a shell script calls Python."""
    record = workspace / "record"
    record.write_text("")
    environment |= {"PYTHON": str(workspace / "recorder"), "RECORD": str(record), "PATH": os.environ["PATH"]}
    command = ["bash", str(workspace / "shell" / script), *arguments]
    subprocess.run(command, env=environment, check=True, cwd=workspace, timeout=120, stdout=subprocess.DEVNULL)
    return [call.split("\0") for call in record.read_text().split("\0\n\0") if call]


def make_small(arguments: list[str]) -> str:
    """The command with what makes it small, and its data small pictures, behind it."""
    script, text = arguments[0], shlex.join(arguments).replace("--add_layers 6 --add_layers 12", "--add_layers 0 " * 2)
    if "--resume" in arguments or not re.match(r"search|train_|retrain|evaluate", script):
        return text
    large = "imagenet" in text
    data = "--workers 0" if script == "evaluate.py" and "--data" in text else IMAGENET if large else IMAGES
    size = " --image_size 224" if large and "--auxiliary" in text else ""  # the head is made for 7x7 features
    return f"{text} {data}{size}{'' if script == 'evaluate.py' else f' {SMALL}'}{SMALL_SEARCH.get(script, '')}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_passes_flags_that_exist(workspace, script):
    calls = calls_of(workspace, script)
    assert calls
    for name, *arguments in calls:
        arguments = arguments[arguments.index("search.py") + 1 :] if name == "-m" else arguments
        parser = importlib.import_module(name.removesuffix(".py")).get_parser()
        assert cli.parse(parser, arguments).given


def test_readme_commands_run_in_their_order(workspace):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.strip()]
    assert len(commands) >= 15
    for program, script, *_ in commands:
        assert program in ("python", "tensorboard") or (ROOT / script).is_file()
    scripts = [words for program, *words in commands if program == "python"]
    exports = [words for words in scripts if "--export" in words]  # run in test_export.py
    assert all(cli.parse(importlib.import_module("evaluate").get_parser(), words[1:]).export for words in exports)
    run_commands(workspace, [make_small(words) for words in scripts if words not in exports])
    assert (workspace / "logs/mini/report.html").exists()
    assert (workspace / "genotypes.py").read_text().count("\nMY_CELL = Genotype(") == 1


def test_own_images_searches_retrains_and_tests_and_runs_nothing_twice(workspace, pictures, tmp_path):
    few = calls_of(workspace, "own_images.sh", str(pictures), OUT=str(tmp_path / "few"))
    assert [call[0] for call in few] == ["retrain.py", "evaluate.py", "visualize.py"] and "DDSAS_cifar10" in few[0]
    many = tmp_path / "many images"
    shutil.copytree(pictures, many)
    for path in (many / "train").glob("*/*.png"):
        for copy in range(13):
            os.link(path, path.with_name(f"{copy}-{path.name}"))
    assert calls_of(workspace, "own_images.sh", str(many), "--dry_run") == []
    calls = calls_of(workspace, "own_images.sh", str(many), OUT=str(tmp_path / "out"), SEARCH="--epochs 3")
    assert [call[0] for call in calls] == ["search.py", "visualize.py", "retrain.py", "evaluate.py", "visualize.py"]
    for name, *arguments in calls:
        assert cli.parse(importlib.import_module(name.removesuffix(".py")).get_parser(), arguments).given
    again = calls_of(workspace, "own_images.sh", str(many), OUT=str(tmp_path / "out"), SEARCH="--epochs 3")
    assert [call[0] for call in again] == ["visualize.py", "evaluate.py", "visualize.py"]
    command = ["bash", workspace / "shell/own_images.sh", tmp_path]
    ended = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "needs train/ and test/" in ended.stderr


def test_the_tests_that_faults_md_names_exist():
    text = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", (ROOT / "docs/faults.md").read_text())
    assert names and [name for name in names if f"def {name}(" not in text] == []
