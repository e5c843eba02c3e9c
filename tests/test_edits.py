"""The definition is the method: whoever edits it gets what the edit says, with and without fast.py."""

import json
import shlex

import pytest
from forked import copy_project, run_commands

TINY = "--dataset folder --image_size 16 --init_channels 2 --layers 1 --batch_size 36 --epochs 1 --dss_freq 2 --quiet"
SEP_CONV = "class SepConv(nn.Module):\n"
EDITS = {  # what is edited: the file, a place in it, what stands there afterwards
    "MixedOp": ("model_search.py", "y = sum(weights[k]", "y = 1.5 * sum(weights[k]"),
    "Cell": ("model_search.py", "return concatenate(states[2:])", "return concatenate(states[2:]) + 0.1"),
    "Network": ("model_search.py", "return self.classifier(self", "return 2 * self.classifier(self"),
    "SepConv": (
        "operations.py",
        SEP_CONV,
        f"{SEP_CONV}    def __call__(self, x):\n        return 1.5 * super().__call__(x)\n\n",
    ),
    "OPS": ("operations.py", "DilConv(C, C, 3, stride, affine)", "nn.Conv2d(C, C, 3, stride, 1)"),
}
EDITOR = r"""
import sys
name, before, after = (text.replace("\\n", "\n") for text in sys.argv[1:])
text = open(name).read()
assert text.count(before) == 1, (name, before)
open(name, "w").write(text.replace(before, after))
"""


@pytest.fixture(scope="module")
def results(pictures, tmp_path_factory) -> dict[str, tuple[float, str]]:
    """(loss, log) of a tiny search for every edit and of one without any, where fast.py computes with --plain too."""
    tree = copy_project(tmp_path_factory.mktemp("edited"))
    (tree / "edit.py").write_text(EDITOR)
    search = f"search.py {TINY} --data {pictures} --save"
    commands = [f"{search} unedited", f"{search} unedited-plain --plain"]
    for name, (file, before, after) in EDITS.items():
        commands += [edit(file, before, after), f"{search} {name}", edit(file, after, before)]
    commands[-1:] = [f"{search} OPS-plain --plain"]  # while it is edited
    run_commands(tree, commands, edited=True)
    losses = {path.parent: json.loads(path.read_text())["train_loss"] for path in tree.glob("logs/*/history.jsonl")}
    return {folder.name: (loss, (folder / "log.txt").read_text()) for folder, loss in losses.items()}


def edit(file: str, before: str, after: str) -> str:
    return shlex.join(["edit.py", file, before.replace("\n", "\\n"), after.replace("\n", "\\n")])


def test_without_an_edit_fast_py_computes(results):
    assert "computed by fast.py" in results["unedited"][1]
    assert results["unedited"][0] == pytest.approx(results["unedited-plain"][0], rel=1e-4)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_what_a_search_computes(results, name):
    loss, log = results[name]
    assert abs(loss - results["unedited"][0]) > 1e-6
    if name == "OPS":  # an operation that fast.py does not know is computed by its own forward
        assert "computed by fast.py" in log and loss == pytest.approx(results["OPS-plain"][0], rel=1e-3)
    else:
        assert f"computed as defined: fast.py was written for another {name}" in log
