"""P-DARTS: pruning between the stages, derivation, restriction of skip connections, the supernet, whole searches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import genotypes
import train_search
from genotypes import PRIMITIVES
from model_search import Network

GOLDEN = Path(__file__).parent / "golden"
STAGES = json.loads((GOLDEN / "pdarts_stages.json").read_text())
FULL = {cell: [PRIMITIVES] * genotypes.EDGES for cell in train_search.CELL_TYPES}


def alphas_of(stage: dict) -> dict[str, np.ndarray]:
    return {cell: np.array(stage[f"alphas_{cell}"]) for cell in train_search.CELL_TYPES}


def kept_of(stage: dict) -> dict[str, list[list[str]]]:
    return {cell: stage[f"kept_{cell}"] for cell in train_search.CELL_TYPES}


def node_sets(pairs) -> list[set]:
    """The (op, input) pairs of a cell as one set per node."""
    pairs = [tuple(pair) for pair in pairs]
    return [set(pairs[i : i + 2]) for i in range(0, len(pairs), 2)]


def assert_same_cells(genotype: genotypes.Genotype, golden: dict) -> None:
    for cell in train_search.CELL_TYPES:
        assert node_sets(getattr(genotype, cell)) == node_sets(golden[cell])


@pytest.mark.parametrize("case", STAGES["cases"])
def test_golden_stages(case):
    first, second, third = case["stages"]
    candidates = train_search.drop_candidates(FULL, alphas_of(first), 3)
    assert candidates == kept_of(first)
    candidates = train_search.drop_candidates(candidates, alphas_of(second), 2)
    assert candidates == kept_of(second)

    genotype = train_search.derive(candidates, alphas_of(third))
    assert_same_cells(genotype, case["genotype"])
    assert genotypes.load(str(genotype)) == genotype  # valid, and two different edges in each node
    for cell in (genotype.normal, genotype.reduce):
        assert all(cell[i][1] < cell[i + 1][1] for i in range(0, len(cell), 2))

    restricted = train_search.restrict_skips(candidates, alphas_of(third))
    assert {str(most) for most in restricted} == set(case["restricted"])
    for most, genotype in restricted.items():
        assert_same_cells(genotype, case["restricted"][str(most)])
        assert train_search.count_skips(genotype) <= most


def test_last_drop_agrees_with_derive():
    """Dropping two more with `none` first leaves on each edge the op that the genotype uses."""
    for case in STAGES["cases"]:
        candidates, alphas = kept_of(case["stages"][1]), alphas_of(case["stages"][2])
        left = train_search.drop_candidates(candidates, alphas, 2, drop_none_first=True)
        table = train_search.probabilities(candidates["normal"], alphas["normal"], none=0)
        for edge, op in train_search.chosen_edges(table):
            assert left["normal"][edge] == [op]
        assert all(len(names) == 1 and names != ["none"] for names in left["normal"] + left["reduce"])


def test_none_counts_as_one_of_the_dropped():
    edge = ["none", "skip_connect", "sep_conv_3x3"]
    alphas = {cell: np.tile([9.0, 1.0, 2.0], (14, 1)) for cell in train_search.CELL_TYPES}
    candidates = {cell: [edge] * 14 for cell in train_search.CELL_TYPES}
    assert train_search.drop_candidates(candidates, alphas, 2)["normal"][0] == ["none"]
    assert train_search.drop_candidates(candidates, alphas, 2, drop_none_first=True)["normal"][0] == ["sep_conv_3x3"]


def test_an_edge_scores_without_its_none():
    """A huge `none` leaves little to the other ops of its edge, so the edge loses; it never wins by its `none`."""
    edge = ["none", "skip_connect", "sep_conv_3x3"]
    alphas = {cell: np.tile([0.0, 1.0, 2.0], (14, 1)) for cell in train_search.CELL_TYPES}
    alphas["normal"][2, 0] = 9.0  # source 0 of node 1
    genotype = train_search.derive({cell: [edge] * 14 for cell in train_search.CELL_TYPES}, alphas)
    assert [source for _, source in genotype.normal[2:4]] == [1, 2]


def test_drops_must_leave_an_operation():
    alphas = {cell: np.zeros((14, 8)) for cell in train_search.CELL_TYPES}
    with pytest.raises(ValueError, match="cannot drop 8 of the 8"):
        train_search.drop_candidates(FULL, alphas, 8)
    only_none = {cell: [["none"]] * 14 for cell in train_search.CELL_TYPES}
    with pytest.raises(ValueError, match="besides none"):
        train_search.derive(only_none, {cell: np.zeros((14, 1)) for cell in train_search.CELL_TYPES})


def test_restriction_ends_where_no_other_candidate_is_left():
    edge = ["none", "skip_connect"]
    candidates = {cell: [edge] * 14 for cell in train_search.CELL_TYPES}
    alphas = {cell: np.zeros((14, 2)) for cell in train_search.CELL_TYPES}
    assert train_search.restrict_skips(candidates, alphas) == {}


def test_inputs_are_left_alone():
    case = STAGES["cases"][1]
    candidates, alphas = kept_of(case["stages"][1]), alphas_of(case["stages"][2])
    before = json.dumps(candidates), {cell: table.copy() for cell, table in alphas.items()}
    train_search.restrict_skips(candidates, alphas)
    train_search.drop_candidates(candidates, alphas, 2, drop_none_first=True)
    assert json.dumps(candidates) == before[0]
    assert all((alphas[cell] == before[1][cell]).all() for cell in alphas)


def published_weights(golden: np.lib.npyio.NpzFile) -> dict[str, torch.Tensor]:
    """The network weights of a golden file under our names (its README says how the published ones differ)."""
    weights = {key[2:]: torch.from_numpy(golden[key]) for key in golden if key.startswith("w/") and "alphas" not in key}
    return {key.replace("cell_ops", "_ops").replace("m_ops", "_ops"): w for key, w in weights.items()}


@pytest.mark.parametrize("name", ["full", "kept5"])
def test_golden_supernet(name):
    golden = np.load(GOLDEN / f"pdarts_supernet_{name}.npz")
    candidates = {
        cell: [[op for op, on in zip(PRIMITIVES, row, strict=True) if on] for row in golden[f"switches_{cell}"]]
        for cell in train_search.CELL_TYPES
    }
    network = Network(4, 10, 5, candidates)
    missing, unexpected = network.load_state_dict(published_weights(golden), strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    alphas = {cell: torch.tensor(golden[f"w/alphas_{cell}"], requires_grad=True) for cell in train_search.CELL_TYPES}
    logits = network(torch.from_numpy(golden["x"]), {cell: a.softmax(dim=-1) for cell, a in alphas.items()}, None)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(golden["y"]))
    loss.backward()
    assert_close(logits, golden["logits"])
    assert_close(loss, golden["loss"])
    for cell, alpha in alphas.items():
        assert_close(alpha.grad, golden[f"grad/alphas_{cell}"])


def assert_close(ours: torch.Tensor, golden: np.ndarray) -> None:
    """Within 1e-4 of the largest value."""
    assert np.abs(ours.detach().numpy() - golden).max() <= 1e-4 * np.abs(golden).max()
