"""The project's root goes first on the path; one thread, so that small networks are quick and sums are reproducible."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from lib import cli  # noqa: E402

settings.register_profile("busy", suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long too (minutes)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: needs --long"))
    if not torch.cuda.is_available() and "TEST_DEVICE" not in os.environ:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="cuda: needs a GPU"))


@pytest.fixture(autouse=True)
def without_pictures_of_epochs(request, monkeypatch) -> None:
    """TensorBoard's figures take longer than a tiny epoch: they are drawn in their own tests alone."""
    if request.module.__name__ not in ("test_tensorboard", "test_visualize"):
        import visualize

        monkeypatch.setattr(visualize, "epoch_pictures", lambda line: {})


PROOFS: dict[tuple, str | None] = {}


@pytest.fixture(autouse=True)
def one_proof_for_each_shape(request, monkeypatch) -> None:
    """fast.py shows at every start that it agrees with the definition, which takes longer than a tiny epoch.

    Here it does so once for networks of the same class, candidates and depth; in test_fast.py always.
    """
    if request.module.__name__ == "test_fast":
        return
    import fast

    def find(network) -> str | None:
        shape = type(network), str(network.candidates), hasattr(network, "stem"), len(network.cells)
        shape += (network.straight_through,)
        if shape not in PROOFS:
            PROOFS[shape] = prove(network)
        return PROOFS[shape]

    prove = fast.find_difference
    monkeypatch.setattr(fast, "find_difference", find)


@pytest.fixture
def command(capsys):
    """command(script, *words) -> exit code, standard output, lines of standard error of `python SCRIPT WORDS`."""

    def command(script, *words: object) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        code = 0
        try:
            cli.run_script(script.main, script.get_parser(), [str(word) for word in words])
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return command


@pytest.fixture
def refused(command):
    """refused(script, *words) -> the one line in which a command ends that is refused."""

    def refused(script, *words: object) -> str:
        code, _, (line,) = command(script, *words)
        assert code == 2
        return line

    return refused


def run_script(script, flags: str, *more: object) -> Path:
    """What a script's main returns for these flags, in this process: for a training the run folder."""
    return script.main(cli.parse(script.get_parser(), [*flags.split(), *map(str, more)]))


def history(folder: Path) -> list[dict]:
    """The epochs of a run."""
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def same(a: object, b: object) -> bool:
    """Whether two checkpoints are equal, type by type and bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of real images: 3 classes, 16x16 pixels, 24 training and 8 test images each, of the embedded dataset."""
    root = tmp_path_factory.mktemp("pictures")
    with np.load(ROOT / "fashion_mini.npz") as arrays:
        parts = {part: (arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "test")}
    for part, count in (("train", 24), ("test", 8)):
        images, labels = parts[part]
        for name, label in (("shirt", 0), ("trouser", 1), ("pullover", 2)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in np.flatnonzero(labels == label)[:count]:
                Image.fromarray(images[index]).resize((16, 16)).save(folder / f"{index}.png")
    return root
