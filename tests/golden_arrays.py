"""Reading tests/golden: arrays computed with the published implementations (see the README there)."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name, allow_pickle=False) as arrays:
        return dict(arrays)


def load_weights(network: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Load the arrays under w/; nothing may be missing but the counters, which the golden files leave out."""
    weights = {
        name[2:].replace("cell_ops", "_ops").replace("m_ops", "_ops"): torch.tensor(array)
        for name, array in arrays.items()
        if name.startswith("w/") and not name.startswith("w/alphas")
    }
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)


def assert_close(actual: torch.Tensor, expected: np.ndarray, relative: float = 1e-4, absolute: float = 1e-7) -> None:
    """Relative to the largest entry, as rounding errors are."""
    error = (actual.detach().cpu().double() - torch.tensor(expected).double()).abs().max().item()
    assert error <= relative * np.abs(expected).max() + absolute, f"error {error}, scale {np.abs(expected).max()}"


def active_lists(masks: dict[str, np.ndarray]) -> dict[str, list[list[int]]]:
    return {kind: [np.flatnonzero(row).tolist() for row in mask] for kind, mask in masks.items()}
