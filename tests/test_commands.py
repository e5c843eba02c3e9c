"""Every command of README.md and every script of shell/ runs, on a few small pictures and with the smallest network.

Shell scripts run with a stand-in for Python that writes down what they would call; that, and the README's python
lines, then runs in this process with the arguments that make it small put behind its own.
"""

import contextlib
import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import genotypes
from lib import cli

ROOT = Path(__file__).resolve().parent.parent
IMAGES = "--dataset folder --data path/to/images --image_size 32 --workers 0"
IMAGENET = "--dataset imagenet --data .data/imagenet --image_size 32 --workers 0"
SMALL = "--init_channels 2 --layers 3 --batch_size 12 --epochs 1 --quiet"
SCRIPTS = sorted(
    path.name
    for path in (ROOT / "shell").glob("*.sh")
    # the last three: test_compare.py, test_study.py
    if path.name not in ("env.sh", "test.sh", "bench.sh", "run_once.sh", "run_all.sh", "many.sh")
)


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := line.split(" #")[0].strip())]


@pytest.fixture(scope="module")
def workspace(pictures, tmp_path_factory) -> Path:
    """A folder in which path/to/images, .data/imagenet and .weights/ are what the README says."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "path/to").mkdir(parents=True)
    (folder / "path/to/images").symlink_to(pictures)
    (folder / ".data").mkdir()
    shutil.copytree(pictures / "train", folder / ".data/imagenet/train")
    shutil.copytree(pictures / "test", folder / ".data/imagenet/val")
    recorder = folder / "recorder"
    recorder.write_text(  # run_once.sh makes the folder of a run, and asks afterwards for a checkpoint in it
        '#!/bin/sh\nfor a in "$@"; do printf "%s\\0" "$a" >> "$RECORD"; done; printf "\\n\\0" >> "$RECORD"\n'
        'for a in "$@"; do if [ -f "$a/command" ]; then touch "$a/checkpoint.pt"; fi; done\n'
    )
    recorder.chmod(0o755)
    return folder


@pytest.fixture
def in_workspace(workspace, monkeypatch):
    """Work in the workspace; a genotype is recorded in a copy of genotypes.py and in the module."""
    monkeypatch.chdir(workspace)
    copy = workspace / "genotypes.py"
    copy.write_text((ROOT / "genotypes.py").read_text())
    record = genotypes.record

    def record_in_copy(name, genotype):
        record(name, genotype, copy)
        setattr(genotypes, name, genotype)

    monkeypatch.setattr(genotypes, "record", record_in_copy)
    yield workspace
    vars(genotypes).pop("MY_CELL", None)


def calls_of(script: str, workspace: Path, *arguments: str) -> list[list[str]]:
    """The argument lists with which a shell script calls Python."""
    record = workspace / "record"
    record.unlink(missing_ok=True)
    environment = {"PYTHON": str(workspace / "recorder"), "RECORD": str(record), "PATH": "/usr/bin:/bin"}
    if script in ("compare_nasbench201.sh", "study.sh"):  # one after another: the recorder writes word by word
        arguments = (*arguments, "--seeds", "1", "--jobs", "1", "--out", str(workspace / "compare"))
        shutil.rmtree(workspace / "compare", ignore_errors=True)
    if script == "study.sh":
        environment["METHODS"] = "ddsas-shrink PDARTS"
    subprocess.run(["bash", str(ROOT / "shell" / script), *arguments], env=environment, check=True, cwd="/", timeout=60)
    for checkpoint in (workspace / "compare").rglob("checkpoint.pt"):
        checkpoint.unlink()
    calls = record.read_text().split("\0\n\0")
    return [call.split("\0") for call in calls if call]


def run_python(arguments: list[str]) -> None:
    """`python SCRIPT ARGUMENTS`, made small."""
    script, *arguments = arguments
    # the recorder makes no run folders, so bash left the patterns that stand for them as they are
    arguments = [str(next(Path().glob(a))) if "-*" in a else a for a in arguments]
    text, more = " ".join(arguments), []
    if script in ("search.py", "retrain.py", "evaluate.py") or script.startswith("train_"):
        more += (IMAGENET if "imagenet" in text + script else IMAGES).split()
    if "imagenet" in text + script and "--auxiliary" in arguments:  # the head is made for 7x7 features
        more += ["--image_size", "224"]
    if script in ("search.py", "retrain.py") or script.startswith("train_"):
        more += SMALL.split()
    if script == "train_search.py":
        more += "--layers 2 --eps_no_arch 0 --batch_size 36".split()
    if script == "evaluate.py" and ".weights" in text:  # the released files are not here
        more += IMAGES.split() + "--model_path logs/retrained --arch DDSAS_cifar10 --init_channels 2 --layers 3".split()
    if "--resume" in text:
        more = []
    module = importlib.import_module(script.removesuffix(".py"))
    no_dot = script == "visualize.py" and len(arguments) == 1 and not shutil.which("dot")  # a genotype's cells alone
    with pytest.raises(cli.UserError, match="Graphviz") if no_dot else contextlib.nullcontext():
        module.main(cli.parse(module.get_parser(), [*arguments, *more]))


def run(command: str) -> int:
    """A line of the README or a script of shell/, in one process; returns how many times it called Python."""
    program, *arguments = [word for word in shlex.split(command) if not word.startswith(("TORCHRUN=", "METHOD="))]
    if program == "bash":
        script, *arguments = arguments
        calls = calls_of(Path(script).name, Path.cwd(), *arguments) if Path(script).name in SCRIPTS else []
    elif program == "python":
        calls = [arguments]
    else:
        assert program == "tensorboard" and importlib.util.find_spec("tensorboard")
        calls = []
    for call in calls:
        if call[0].endswith(".py"):
            run_python(call)
    return len(calls)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs(in_workspace, script):
    if script.startswith("eval_") and not Path("logs/retrained").exists():
        run("python retrain.py --save retrained")
    assert run(f"bash shell/{script}") > 0


def test_readme_commands_run_in_their_order(in_workspace):
    commands = readme_commands()
    assert len(commands) > 15
    for command in commands:
        run(command)
    assert (in_workspace / "logs/mini/report.html").exists()
