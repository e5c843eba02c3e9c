"""NAS-Bench-201's networks: the supernet against the published one, and derivations."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_arrays import GOLDEN, assert_close, golden

import genotypes
import methods
from genotypes import Genotype201
from model import count_multiply_adds, count_parameters
from nasbench201 import EDGE_LIST, PRIMITIVES, Network, Supernet, one_op_an_edge
from space import DynamicSpace

TEXT = "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|none~0|skip_connect~1|nor_conv_3x3~2|"


def published() -> tuple[dict[str, np.ndarray], Supernet]:
    """The golden arrays, and a supernet of their size that holds their weights under the published names."""
    arrays = golden("nasbench201_supernet.npz")
    state = {name[6:]: torch.tensor(array) for name, array in arrays.items() if name.startswith("state_")}
    del state["arch_parameters"]
    cells = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("cells."))
    C, classes, N = len(state["stem.0.weight"]), len(state["classifier.bias"]), (cells - 2) // 3
    network = Supernet(C, classes, N).double()
    network.load_state_dict(state)
    return arrays, network


def test_darts_logits_and_gradients_are_those_of_the_published_supernet():
    arrays, network = published()
    alphas = torch.tensor(arrays["alphas"], requires_grad=True)
    logits = network(torch.tensor(arrays["images"]), {"cell": alphas.softmax(-1)})
    loss = F.cross_entropy(logits, torch.tensor(arrays["labels"]))
    loss.backward()
    actual = {"logits": logits, "loss": loss, "grad_alphas": alphas.grad, "grad_stem": network.stem[0].weight.grad}
    for name, value in actual.items():
        assert_close(value, arrays[name], relative=1e-6, absolute=0)
    assert str(one_op_an_edge({"cell": arrays["alphas"]}, PRIMITIVES)) == str(arrays["arch"])


def test_gdas_computes_one_operation_an_edge_and_passes_all_gradients_on():
    arrays, network = published()
    alphas = torch.tensor(arrays["alphas"], requires_grad=True)
    h, index = methods.gdas_weights(alphas, float(arrays["tau"]), torch.tensor(arrays["gumbel"]))
    active = {"cell": [[k] for k in index.tolist()]}
    network.straight_through = True
    logits = network(torch.tensor(arrays["images"]), {"cell": h}, active)
    F.cross_entropy(logits, torch.tensor(arrays["labels"])).backward()
    assert index.tolist() == arrays["gdas_index"].tolist()
    assert_close(logits, arrays["gdas_logits"], relative=1e-6, absolute=0)
    assert_close(alphas.grad, arrays["gdas_grad_alphas"], relative=1e-6, absolute=0)
    assert computed(network) == {(edge, k) for edge, k in enumerate(index.tolist()) if "conv" in PRIMITIVES[k]}


def computed(network: Supernet) -> set[tuple[int, int]]:
    """The (edge, operation) pairs with a BatchNorm that has counted a call, in any cell."""
    found = set()
    for name, count in network.named_buffers():
        if ".edges." in name and name.endswith("num_batches_tracked") and count > 0:
            edge, o = name.split(".")[3:5]
            found.add((EDGE_LIST.index(tuple(map(int, edge.split("<-")))), int(o)))
    return found


@pytest.mark.parametrize("size", [8, 15])
def test_a_network_computes_what_the_supernet_computes_with_one_operation_an_edge(size):
    torch.manual_seed(0)
    supernet, x = Supernet(4, 7, 1).double(), torch.rand(3, 3, size, size, dtype=torch.float64)
    genotype = genotypes.parse(TEXT)
    chosen = [PRIMITIVES.index(op) for op in genotype.ops]
    network = Network(4, 7, 1, genotype).double()
    state = supernet.state_dict()
    for edge, (node, source) in enumerate(EDGE_LIST):
        prefix = f"edges.{node}<-{source}.{chosen[edge]}."
        state |= {name.replace(prefix, f"layers.{edge}."): state[name] for name in state if prefix in name}
    missing, _ = network.load_state_dict(state, strict=False)
    assert all(".layers." in name and ".op.2." in name for name in missing)  # affine: gains 1, shifts 0
    logits, auxiliary = network(x)
    expected = supernet(x, {"cell": torch.ones(6, 5, dtype=torch.float64)}, {"cell": [[o] for o in chosen]})
    torch.testing.assert_close(logits, expected)
    assert auxiliary is None and network.drop_path_prob == 0.0


def test_published_sizes():
    for op, parameters, multiply_adds in (("nor_conv_3x3", 1_531_546, 220.12), ("skip_connect", 73_306, 7.783)):
        network = Network(16, 10, 5, Genotype201((op,) * 6))
        assert count_parameters(network) == parameters
        assert count_multiply_adds(network, 32) / 1e6 == pytest.approx(multiply_adds, abs=6e-4)


def test_darts_genotypes_here_and_in_its_own_space():
    for case in json.loads((GOLDEN / "nasbench201_derive.json").read_text()):
        assert str(one_op_an_edge({"cell": np.array(case["alphas"])}, PRIMITIVES)) == case["architecture"]
    for case in json.loads((GOLDEN / "darts_derive.json").read_text()):
        alphas = {kind: torch.tensor(case[f"alphas_{kind}"]).softmax(-1).numpy() for kind in genotypes.CELL_TYPES}
        assert methods.derive(alphas, genotypes.SPACES["static"]) == genotypes.parse(case["genotype"])


def test_ddsas_genotype_has_the_best_available_operations_other_than_none():
    space = DynamicSpace(PRIMITIVES, 6, 10, cell_types=("cell",), derive=one_op_an_edge)
    space.saliency["cell"][:, 0] = 9  # none does not count
    space.saliency["cell"][0] = [9, 1, 4, 3, 2]
    space.available["cell"][[0, 1], [2, 1]] = False
    assert space.genotype().ops[:3] == ("nor_conv_3x3", "nor_conv_1x1", "skip_connect")  # of equals the lower index
