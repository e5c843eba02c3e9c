"""docs/extend.md: what it says is done in a copy of the project, block after block, and its commands are run."""

import re
from pathlib import Path

import pytest
from conftest import history
from forked import copy_project, run_commands

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", (ROOT / "docs/extend.md").read_text(), re.DOTALL)
TINY = "--dataset folder --workers 0 --image_size 16 --batch_size 18 --init_channels 2 --layers 3 --epochs 2 --quiet"


@pytest.fixture(scope="module")
def extended(pictures, tmp_path_factory) -> Path:
    """The project with every Python block at the end of the file that its first line names, and every command run."""
    tree = copy_project(tmp_path_factory.mktemp("extended"))
    commands = []
    for language, block in BLOCKS:
        if language == "python":
            where, block = block.split("\n", 1)
            with (tree / where.removeprefix("# at the end of ")).open("a") as file:
                file.write(f"\n\n{block}")
        else:
            commands += block.replace("--dataset fashion_mini", "").splitlines()
    commands.append("python search.py --method darts --save darts")  # to compare with
    small = {"search.py": f"{TINY} --layers 1 --data {pictures}", "retrain.py": f"{TINY} --data {pictures}"}
    small |= {"evaluate.py": f"--data {pictures} --workers 0"}
    lines = [f"{command.removeprefix('python ')} {small[command.split()[1]]}" for command in commands]
    lines = [f"{line} --dss_freq 1" if "--space_config" in line else line for line in lines]
    (tree / "printed").write_text(run_commands(tree, lines))
    return tree


def test_a_new_operation_is_searched_in_the_space_that_has_it(extended):
    last = history(extended / "logs/with_se")[-1]
    assert last["primitives"][-1] == "se_conv_3x3" and max(visits[-1] for visits in last["visits"]["reduce"]) > 1
    first, last = history(extended / "logs/convolutions")
    assert not any(mask >> 3 & 1 for mask in first["available"]["normal"])  # one primitive more from epoch 1 on
    assert all(mask >> 3 & 1 for mask in last["available"]["normal"])


def test_the_regulariser_of_a_new_method_moves_alpha(extended):
    plain, decayed = (
        [line["probabilities"]["reduce"] for line in history(extended / "logs" / name)]  # the one cell is of that kind
        for name in ("darts", "beta-decay")
    )
    assert plain[0] == decayed[0] and plain[1] != decayed[1]  # in epoch 0 it weighs nothing


def test_a_new_cell_is_counted_retrained_and_tested(extended):
    printed = (extended / "printed").read_text()
    assert "| MY_CELL " in printed and "test accuracy" in printed
    assert "se_conv_3x3" in (extended / "logs/my-cell/genotype.txt").read_text()
