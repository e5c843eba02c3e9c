"""The supernet and its architecture parameters against the published ones, and against fast.py."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_arrays import active_lists, assert_close, golden, load_weights

import fast
from genotypes import CELL_TYPES, PRIMITIVES
from model_search import Architecture, DynamicSpace, MixedOp, Network, masked_softmax
from operations import OPS


@pytest.mark.parametrize("forward", [Network.forward, fast.supernet_forward])
@pytest.mark.parametrize(
    ("name", "options"), [("simple_norm", {}), ("simple_raw", {"norm": False}), ("all_norm", {"saliency_type": "all"})]
)
def test_logits_and_gradients_are_those_of_the_published_supernet(name, options, forward):
    arrays = golden(f"supernet_{name}.npz")
    network, architecture = Network(4, 10, 3, PRIMITIVES), Architecture(14, 8)
    load_weights(network, arrays)
    with torch.no_grad():
        for parameter_name, parameter in architecture.named_parameters():
            parameter.copy_(torch.tensor(arrays[parameter_name]))
    active = active_lists({kind: arrays[f"active_{kind}"] for kind in CELL_TYPES})
    logits = forward(network, torch.tensor(arrays["x"]), architecture.weights(active, **options), active)
    loss = F.cross_entropy(logits, torch.tensor(arrays["y"]))
    loss.backward()
    assert_close(logits, arrays["logits"])
    assert_close(loss, arrays["loss"])
    for parameter_name, parameter in architecture.named_parameters():
        assert_close(parameter.grad, arrays[f"grad/{parameter_name}"])
    for parameter_name in ("stem.0.weight", "classifier.weight"):
        assert_close(network.get_parameter(parameter_name).grad, arrays[f"grad/w/{parameter_name}"])


def test_operations_that_are_not_active_are_not_computed():
    network, weights = Network(4, 10, 3, PRIMITIVES), {kind: torch.rand(14, 8) for kind in CELL_TYPES}
    active = {kind: [[0, 4] if edge % 2 else [1, 7] for edge in range(14)] for kind in CELL_TYPES}
    network(torch.rand(2, 3, 8, 8), weights, active)
    computed = {  # every operation here has a BatchNorm that counts its calls
        tuple(map(int, re.match(r"cells.(\d)._ops.(\d+)._ops.(\d)", name).groups()))
        for name, count in network.named_buffers()
        if name.endswith("num_batches_tracked") and name.count("._ops.") == 2 and count > 0
    }
    assert computed == {(c, e, k) for c in range(3) for e in range(14) for k in active["normal"][e] if k != 0}


def test_none_contributes_nothing_even_alone():
    network = Network(4, 10, 3, ["none", "skip_connect"])
    weights = {kind: torch.ones(14, 2) for kind in CELL_TYPES}
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network.eval()
    only_none = {kind: [[0]] * 14 for kind in CELL_TYPES}
    torch.testing.assert_close(network(x, weights, only_none)[0], network.classifier.bias)


def test_straight_through_adds_the_weights_of_what_is_not_active():
    """GDAS: those are zero in value, and their gradient reaches the alphas of operations that are not computed."""
    torch.manual_seed(0)
    edge, x = MixedOp(4, 1, PRIMITIVES), torch.rand(2, 4, 8, 8)
    weights = [torch.tensor(w, requires_grad=True) for w in (0.0, 0.5, 0.0, 1.0, 0.25, 0.0, 0.0, 0.0)]
    torch.testing.assert_close(edge(x, weights, [3]), x)
    edge.straight_through = True
    torch.testing.assert_close(edge(x, weights, [3]), x + 0.75)
    edge(x, weights, [3]).mean().backward()
    assert [w.grad.item() for k, w in enumerate(weights) if k != 3] == [1] * 7


def test_cells_computed_twice_are_the_same_and_move_their_statistics_once():
    torch.manual_seed(0)
    network, results = Network(4, 10, 3, ["avg_pool_3x3", "sep_conv_3x3"]), []
    again, x = copy.deepcopy(network), torch.rand(2, 3, 8, 8)
    again.checkpoint_cells = True
    for net in (network, again):
        weights = {kind: torch.full((14, 2), 0.1, requires_grad=True) for kind in CELL_TYPES}
        net(x, weights, None).square().sum().backward()
        results.append([weights["normal"].grad, *(p.grad for p in net.parameters()), *net.buffers()])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("C", [2, 8])
def test_few_channels_are_halved_as_published(C):
    """Strided 1x1 convolutions of few channels in channels_last order, where oneDNN's gradients are not to be had."""
    torch.manual_seed(0)
    op = OPS["skip_connect"](C, 2, False)
    reference, x = copy.deepcopy(op).double(), torch.randn(3, C, 8, 8)
    ours, theirs = x.contiguous(memory_format=torch.channels_last).requires_grad_(), x.double().requires_grad_()
    weights = reference.conv_1.weight, reference.conv_2.weight
    strided = [F.conv2d(F.relu(theirs)[:, :, i:, i:], weight, stride=2) for i, weight in enumerate(weights)]
    y, expected = op(ours), reference.bn(torch.cat(strided, dim=1))
    y.square().sum().backward(), expected.square().sum().backward()
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4)
    for a, b in zip(op.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-4, rtol=1e-4)


def test_skip_dropout_acts_on_identities_in_training_only():
    skip = OPS["skip_connect"](4, 1, False)
    skip.dropout = 0.5
    x = torch.ones(1, 4, 50, 50)
    assert set(skip(x).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(skip.eval()(x), x)


def test_gumbel_softmax_samples_each_operation_as_often_as_softmax_says():
    torch.manual_seed(0)
    alpha = torch.tensor([[0.0, 1.0, 2.0]])
    architecture = Architecture(1, 3)
    with torch.no_grad():
        architecture.alphas_normal.copy_(alpha)
        architecture.betas_normal.zero_()
        counts = torch.zeros(3)
        for _ in range(2000):
            counts[architecture.weights(None, tau=0.1)["normal"].argmax()] += 1
    torch.testing.assert_close(counts / 2000, alpha.softmax(-1)[0], atol=0.04, rtol=0)


def test_softmax_of_nothing_is_nothing():
    x = torch.randn(2, 3, requires_grad=True)
    p = masked_softmax(x, torch.tensor([[True, False, True], [False, False, False]]))
    assert p[1].tolist() == [0, 0, 0] and p[0, 1] == 0
    p.square().sum().backward()
    assert x.grad.isfinite().all()


def test_weights_are_of_what_is_active_though_masks_are_kept_on_the_device():
    architecture, space, rng = Architecture(14, 8), DynamicSpace(PRIMITIVES), np.random.default_rng(0)
    for _ in range(3):
        space.sample_random(rng)
        active = space.active_ops()
        for kind, weights in architecture.weights(active, tau=1.0).items():
            assert [row.nonzero().flatten().tolist() for row in weights] == active[kind]
    active["normal"][0][:] = [7]  # the caller's own lists
    assert architecture.weights(active)["normal"][0].nonzero().tolist() == [[7]]
    assert (architecture.weights(None)["normal"] > 0).all()
