"""Commands of the project, run in a copy of it: each in a process of its own, forked from one that has PyTorch loaded.

A command sees the files as the one before left them (a genotype recorded in genotypes.py, a run folder), as in a shell,
without the seconds that each would need to import PyTorch; and, where nothing is edited, without those in which fast.py
shows that it agrees with the definition.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DRIVER = """
import os, runpy, shlex, sys
import matplotlib.figure, torch, torch._dynamo, torchvision
from torch.utils import tensorboard
torch.set_num_threads(1)
sys.path.insert(0, os.getcwd())
for line in sys.stdin.read().splitlines():
    print("$", line, flush=True)
    if child := os.fork():
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(f"exit code {code}: {line}")
        continue
    import visualize
    visualize.epoch_pictures = lambda line: {}  # TensorBoard's figures take longer than a tiny epoch
    if sys.argv[1:] == ["proven"]:
        import fast
        fast.find_difference = lambda network: None
    sys.argv = shlex.split(line)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    os._exit(0)  # to take a forked interpreter apart would copy all of PyTorch's pages, in a second and a half
"""


def copy_project(folder: Path) -> Path:
    """The project's scripts, lib/ and shell/ in this folder."""
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
        shutil.copy(path, folder)
    for name in ("lib", "shell"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "fashion_mini.npz").symlink_to(ROOT / "fashion_mini.npz")
    return folder


def run_commands(folder: Path, commands: list[str], edited: bool = False) -> str:
    """Run `SCRIPT ARGUMENTS` one after another; returns what they print. AssertionError at the first that fails."""
    driver = [sys.executable, "-c", DRIVER, *([] if edited else ["proven"])]
    text = "\n".join(commands)
    ended = subprocess.run(driver, cwd=folder, input=text, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return ended.stdout
