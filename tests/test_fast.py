"""fast.py against the definition in model_search.py, and its proof against edits of the definition."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import fast
import model_search
import nasbench201
import operations
from genotypes import CELL_TYPES, PRIMITIVES
from lib import depthwise
from model_search import Architecture, DynamicSpace, Network
from operations import OPS

AGREES = "computed by fast.py, which agrees with the definition"
FEW = ["none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"]


def close(ours, expected):
    """Relative to the largest entry, as rounding is; what is nothing but rounding is compared to nothing."""
    assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max() + 1e-12


def compare(network, arguments):
    """One forward and backward pass both ways: logits, gradients of weights, and running statistics."""
    results = []
    for forward, net in ((Network.forward, network), (fast.supernet_forward, copy.deepcopy(network))):
        x, weights, active = arguments
        leaves = {kind: w.detach().requires_grad_() for kind, w in weights.items()}
        net.zero_grad()
        logits = forward(net, x, leaves, active)
        F.cross_entropy(logits, torch.arange(len(x)) % 3).backward()
        results.append([logits.detach(), *(p.grad for p in [*leaves.values(), *net.parameters()]), *net.buffers()])
    for ours, expected in zip(*reversed(results), strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            close(ours, expected)


@pytest.mark.parametrize(("stem", "size"), [("cifar", 8), ("imagenet", 32)])
def test_steps_with_a_moving_subspace(stem, size):
    """In float64; test_supernet.py compares in float32."""
    torch.manual_seed(0)
    network, architecture = Network(4, 3, 3, PRIMITIVES, stem).double(), Architecture(14, 8).double()
    rng, space = np.random.default_rng(0), DynamicSpace(PRIMITIVES, max_ops=28)
    for _ in range(2):
        space.sample_random(rng)
        active, x = space.active_ops(), torch.randn(6, 3, size, size).double()
        compare(network, (x, architecture.weights(active), active))
    network.eval()
    with torch.no_grad():
        for chosen in (active, {kind: [[0]] * 14 for kind in CELL_TYPES}):
            arguments = x, architecture.weights(chosen), chosen
            close(fast.supernet_forward(network, *arguments), network(*arguments))


@pytest.mark.parametrize("straight_through", [False, True])
def test_candidates_of_each_edge_with_dropout(straight_through):
    """P-DARTS' later stages; and GDAS' one operation an edge."""
    rng = np.random.default_rng(0)
    candidates = {k: [[PRIMITIVES[i] for i in rng.choice(8, 3, replace=False)] for _ in range(14)] for k in CELL_TYPES}
    network = Network(4, 3, 4, candidates).double()
    network.straight_through = straight_through
    active = {kind: [[int(rng.integers(3))] for _ in range(14)] for kind in CELL_TYPES} if straight_through else None
    weights = {kind: torch.rand(14, 3).double() for kind in CELL_TYPES}
    compare(network, (torch.randn(4, 3, 8, 8).double(), weights, active))
    network.skip_dropout = 0.4
    logits = []
    for forward in (Network.forward, fast.supernet_forward):
        torch.manual_seed(0)  # the same numbers are drawn in the same order
        logits.append(forward(network, torch.ones(4, 3, 8, 8).double(), weights, active))
    close(*logits)


@pytest.mark.parametrize("H", [1, 4, 5, 9, 14])
@pytest.mark.parametrize(
    ("k", "stride", "dilation"), [(3, 1, 1), (3, 1, 2), (3, 2, 1), (5, 1, 1), (5, 1, 2), (5, 2, 1)]
)
def test_depthwise_convolutions_of_every_size(k, stride, dilation, H):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, H, H).double().requires_grad_(), torch.randn(4, 1, k, k).double().requires_grad_()
    ours = depthwise.convolve(x, weight, stride, dilation)
    expected = F.conv2d(x, weight, None, stride, dilation * (k // 2), dilation, 4)
    close(ours, expected)
    dy = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), dy) for y in (ours, expected)), strict=True):
        close(a, b)
    if k == 3 and stride == dilation == 1:
        close(depthwise.average(x), F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


def line_of(network, **options):
    lines = []
    fast.use(network, lines.append, **options)
    assert len(lines) == 1 and ("forward" in vars(network)) == (lines[0] == AGREES)
    return lines[0]


@pytest.mark.parametrize(
    ("primitives", "stem", "layers"), [(PRIMITIVES, "cifar", 4), (FEW, "imagenet", 3), ([*OPS][8:], "cifar", 3)]
)
def test_the_fast_way_is_used_and_leaves_no_trace(primitives, stem, layers):
    kinds = Network, model_search.Cell, model_search.MixedOp, *fast.OPERATIONS
    assert {fast.digest(kind) for kind in kinds} == fast.WRITTEN_FOR
    network = Network(8, 10, layers, primitives, stem)
    before, names = fast.generators(), list(network.state_dict())
    assert line_of(network) == AGREES
    assert fast.generators() == before and list(network.state_dict()) == names
    assert all(p.grad is None for p in network.parameters())
    assert all((b == 0).all() for name, b in network.named_buffers() if name.endswith("num_batches_tracked"))


def test_copies_and_other_weights_are_followed():
    """The unrolled step computes the network with other weights; a deep copy computes with its own."""
    network, x = Network(4, 10, 3, FEW), torch.rand(2, 3, 8, 8)
    weights = {kind: torch.rand(14, 4) for kind in CELL_TYPES}
    assert line_of(network) == AGREES
    copied = copy.deepcopy(network)
    zeros = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    assert functional_call(network, zeros, (x, weights, None)).abs().max() == 0
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert copied(x, weights, None).abs().max() == 0 < network(x, weights, None).abs().max()


def test_what_asks_for_the_definition_gets_it():
    network = Network(4, 10, 3, FEW)
    assert line_of(network) == AGREES
    assert line_of(network, plain=True) == "computed as defined: --plain"
    assert line_of(network, checkpoint_cells=True) == "computed as defined: --checkpoint_cells"
    network.cells[0].register_forward_hook(lambda *_: None)
    assert "hook" in line_of(network)
    assert "no way for nasbench201.Supernet" in line_of(nasbench201.Supernet(4, 10, 1))


EDITED = [model_search.MixedOp, model_search.Cell, Network, operations.SepConv, operations.Zero, operations.Pool]
EDITED += [operations.ReLUConvBN, operations.FactorizedReduce]


@pytest.mark.parametrize("edited", EDITED)
def test_an_edit_counts_and_is_named(monkeypatch, edited):
    forward = edited.forward
    monkeypatch.setattr(edited, "forward", lambda self, *arguments: 1.5 * forward(self, *arguments))
    assert line_of(Network(4, 10, 3, FEW)) == f"computed as defined: fast.py was written for another {edited.__name__}"


def test_a_factor_that_grows_over_the_steps_counts(monkeypatch):
    """Numbers at the start do not tell, the code does; comments and new methods are no edit."""

    def annealed(self, x, weights, active):
        return self.factor * sum(weights[k] * self._ops[k](x) for k in active)

    monkeypatch.setattr(model_search.MixedOp, "factor", 1.0, raising=False)
    assert line_of(Network(4, 10, 3, FEW)) == AGREES
    monkeypatch.setattr(model_search.MixedOp, "forward", annealed)
    assert line_of(Network(4, 10, 3, FEW)) == "computed as defined: fast.py was written for another MixedOp"


def test_a_subclass_and_dropout_are_noticed(monkeypatch):
    class Doubled(Network):
        def forward(self, x, weights, active):
            return 2 * super().forward(x, weights, active)

    assert line_of(Doubled(4, 10, 3, FEW)) == "computed as defined: fast.py was written for another Doubled"
    drop = lambda C, stride, affine: nn.Sequential(nn.AvgPool2d(1, stride), nn.Dropout())  # noqa: E731
    monkeypatch.setitem(OPS, "sep_conv_3x3", drop)
    assert line_of(Network(4, 10, 3, FEW)) == "computed as defined: the definition draws random numbers"


def sep_conv(C, stride, affine, change=lambda op: None):
    op = operations.SepConv(C, C, 3, stride, affine)
    change(op)
    return op


LAYERS = {  # what a line of OPS may build, and whether the fast way reads it from the layers
    "another kernel": (lambda C, stride, affine: operations.SepConv(C, C, 7, stride, affine), True),
    "another layer": (lambda C, stride, affine: nn.Conv2d(C, C, 3, stride, 1), True),
    "affine": (lambda C, stride, affine: sep_conv(C, stride, True), False),
    "momentum": (lambda *a: sep_conv(*a, lambda op: setattr(op.op[7], "momentum", 0.3)), True),
    "epsilon": (lambda *a: sep_conv(*a, lambda op: setattr(op.op[3], "eps", 0.1)), True),
    "no statistics": (lambda *a: sep_conv(*a, lambda op: op.op.__setitem__(7, nn.Identity())), False),
    "another padding": (lambda *a: sep_conv(*a, lambda op: setattr(op.op[5], "padding_mode", "circular")), False),
}


@pytest.mark.parametrize("change", LAYERS)
def test_other_layers_are_read_or_noticed(monkeypatch, change):
    build, read = LAYERS[change]
    monkeypatch.setitem(OPS, "sep_conv_3x3", build)
    assert line_of(Network(4, 3, 3, FEW)) == (AGREES if read else "computed as defined: fast.py gives other numbers")


def test_generators_come_back_even_after_a_failure(monkeypatch):
    class Fails(nn.Module):
        def forward(self, x):
            random.random(), np.random.rand(), torch.rand(1)
            raise ValueError("not for 16 pixels")

    monkeypatch.setitem(OPS, "sep_conv_3x3", lambda C, stride, affine: Fails())
    network = Network(4, 10, 3, FEW)
    before = fast.generators()
    assert "ValueError: not for 16 pixels" in line_of(network)
    assert fast.generators() == before


class NoSynchronisation(TorchDispatchMode):
    """Fails on what makes the host wait for a GPU: .item(), bool(tensor), nonzero, copies between devices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("forward", [Network.forward, fast.supernet_forward])
def test_a_step_never_waits_for_the_device(forward):
    network, architecture, space = Network(4, 10, 3, FEW), Architecture(14, 4), DynamicSpace(FEW)
    space.sample_random(np.random.default_rng(0))
    active, x, y = space.active_ops(), torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))
    with NoSynchronisation():
        loss = F.cross_entropy(forward(network, x, architecture.weights(active, tau=1.0), active), y)
        loss.backward()
    with pytest.raises(AssertionError), NoSynchronisation():
        loss.item()
