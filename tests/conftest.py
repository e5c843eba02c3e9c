"""The project's root goes first on the path; one thread, so that small networks are quick and sums are reproducible."""

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
