"""The supernet's forward pass in about half the time on a CPU, with the numbers of its definition in model_search.py.

`use` asks at every start whether it may: the definition is the code that this file was written for, and a narrow twin
of the network computes logits, gradients and running statistics both ways, in float64. Where they agree,
`supernet_forward` takes the place of the network's forward; otherwise the definition runs. What is saved:

- Work that several operations share: a `Node` keeps the ReLU and the pooled copies of a tensor for all that read it.
- Passes over large tensors: an operation's weight is the gain of its last batch normalisation.
- Time in the backward pass of depthwise convolutions and averages: lib/depthwise.py.

An operation that this file does not know is computed by its own forward.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import random
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import MethodType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import depthwise
from model_search import Cell, MixedOp, Network, all_active, split
from operations import (
    DilConv,
    FactorizedReduce,
    Pool,
    ReLUConvBN,
    SepConv,
    Zero,
    concatenate,
    order_pixels,
    take_every_second,
)
from space import INCOMING

Active = dict[str, list[list[int]]]

# ---- the fast way ---------------------------------------------------------------------------------------------------


class Node:
    """A tensor x (N, C, H, W) of a cell, and what the operations that read it have in common, computed once."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._pooled: dict[str, Tensor] = {}

    @cached_property
    def relu(self) -> Tensor:
        return F.relu(self.x)

    @cached_property
    def even(self) -> Tensor:
        """The ReLU's pixels in even rows and columns."""
        return take_every_second(self.relu, 0)

    @cached_property
    def odd(self) -> Tensor:
        return take_every_second(self.relu, 1)

    def pooled(self, pool: nn.Module) -> Tensor:
        """pool(x), the same tensor for every pooling layer with these settings."""
        key = repr(pool)
        if key not in self._pooled:
            average = key == AVERAGE and depthwise.own_backward(self.x)
            self._pooled[key] = depthwise.average(self.x) if average else pool(self.x)
        return self._pooled[key]


AVERAGE = repr(nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False))  # what depthwise.average computes


def supernet_forward(network: Network, x: Tensor, weights: dict[str, Tensor], active: Active | None) -> Tensor:
    """What model_search.Network.forward computes, with the same arguments."""
    active = active or all_active(network.candidates)
    scalars = {kind: split(w) for kind, w in weights.items()}
    first, second = network.stems(order_pixels(x))
    s0 = Node(first)
    s1 = s0 if second is first else Node(second)
    for cell in network.cells:
        kind = "reduce" if cell.reduction else "normal"
        s0, s1 = s1, Node(compute_cell(cell, s0, s1, scalars[kind], active[kind]))
    return network.classifier(network.global_pooling(s1.x).flatten(1))


def compute_cell(cell: Cell, s0: Node, s1: Node, weights: list[list[Tensor]], active: list[list[int]]) -> Tensor:
    """What Cell.forward computes."""
    nodes = [Node(apply(cell.preprocess0, s0)), Node(apply(cell.preprocess1, s1))]
    for edges in INCOMING:
        sources = [(cell._ops[e], nodes[i], weights[e], active[e]) for i, e in enumerate(edges)]
        nodes.append(Node(sum_edges(sources)))
    return concatenate([node.x for node in nodes[2:]])


def sum_edges(edges: list[tuple[MixedOp, Node, list[Tensor], list[int]]]) -> Tensor:
    """The sum of what MixedOp.forward computes, over (edge, its source, the weights, the active operations)."""
    y = None
    for edge, source, weights, active in edges:
        for k in active:
            if type(op := edge._ops[k]) is not Zero:
                term = apply(op, source, weights[k])
                y = term if y is None else y.add_(term)
    if y is None:  # every incoming edge is `none`
        edge, source, weights, active = edges[0]
        y = weights[active[0]] * edge._ops[active[0]](source.x)
    for edge, _, weights, active in edges:
        if edge.straight_through:
            y = y + sum(w for k, w in enumerate(weights) if k not in active)
    return y


def apply(op: nn.Module, node: Node, gain: Tensor | None = None) -> Tensor:
    """op(node.x); times the scalar ``gain``."""
    bn = None
    if type(op) in (ReLUConvBN, DilConv, SepConv):
        x, bn = node.relu, op.op[-1]
        for layer in op.op[1:-1]:
            x = convolve_depthwise(layer, x) if is_depthwise(layer) else layer(x)
    elif type(op) is FactorizedReduce:
        x, bn = concatenate([op.conv_1(node.even), op.conv_2(node.odd)]), op.bn
    elif type(op) is Pool:
        x, bn = node.pooled(op[0]), op[1] if len(op) > 1 else None
    else:
        x = op(node.x)
    return normalise(x, bn, gain)


def normalise(x: Tensor, bn: nn.BatchNorm2d | None, gain: Tensor | None) -> Tensor:
    """bn(x) times the scalar ``gain``, which is that of the normalisation: it has none of its own."""
    if bn is None or gain is None:
        x = x if bn is None else bn(x)
        return x if gain is None else x * gain
    if bn.training:
        bn.num_batches_tracked.add_(1)
    gains = gain.expand(bn.num_features).contiguous()
    return F.batch_norm(x, bn.running_mean, bn.running_var, gains, None, bn.training, bn.momentum, bn.eps)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether this is a convolution in which every channel has its own kernel."""
    return type(layer) is nn.Conv2d and layer.groups == layer.in_channels == layer.out_channels > 1


def convolve_depthwise(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """layer(x) for a depthwise convolution with `same` padding."""
    if layer.stride == layer.dilation == (2, 2):  # every tap reads an even pixel
        return depthwise.convolve(take_every_second(x, 0), layer.weight)
    return depthwise.convolve(x, layer.weight, layer.stride[0], layer.dilation[0])


# ---- the proof ------------------------------------------------------------------------------------------------------


def use(network: nn.Module, log: Callable[[str], None], plain: bool = False, checkpoint_cells: bool = False) -> None:
    """Let the network be computed by this file if that agrees with its definition, and ``log`` a line that says so.

    ``plain`` asks for the definition. ``checkpoint_cells`` and a GPU, where this file is slower, imply it.
    """
    vars(network).pop("forward", None)
    if plain:
        reason = "--plain"
    elif checkpoint_cells:
        reason = "--checkpoint_cells"
    elif not isinstance(network, Network):
        reason = f"fast.py has no way for {type(network).__module__}.{type(network).__name__}"
    elif next(network.parameters()).device.type != "cpu":
        reason = "fast.py is for CPUs"
    else:
        reason = find_difference(network)
    if reason is None:
        network.forward = MethodType(supernet_forward, network)
    log(f"computed as defined: {reason}" if reason else "computed by fast.py, which agrees with the definition")


def use_depthwise(network: nn.Module, log: Callable[[str], None]) -> None:
    """Let the depthwise convolutions of a discovered network take their gradients from lib/depthwise.py, on a CPU.

    Cells and operations run as they are defined. What is exchanged is how an nn.Conv2d computes, after each kind of
    layer has given nn.Conv2d's outputs and gradients in float64; ``log`` gets a line about those that have not.
    """
    if next(network.parameters()).device.type != "cpu":
        return
    equal: dict[tuple, bool] = {}
    for layer in network.modules():
        if is_depthwise(layer):
            kind = layer.kernel_size, layer.stride, layer.padding, layer.dilation
            kind += layer.bias is None, layer.padding_mode
            if kind not in equal:
                equal[kind] = agree_on_a_narrow_layer(*kind)
                if not equal[kind]:
                    log(f"computed as defined: {layer}")
            if equal[kind]:
                layer.forward = MethodType(convolve_depthwise, layer)


def agree_on_a_narrow_layer(
    size: tuple, stride: tuple, padding: tuple, dilation: tuple, plain: bool, mode: str
) -> bool:
    """Whether a depthwise convolution of four channels of this kind computes the same both ways."""
    with keep_generators():
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 4, size, stride, padding, dilation, 4, not plain, mode).double()
        x = torch.randn(2, 4, 10, 10).double()
        try:
            return plain and agree(*(differentiate(layer, way, [x]) for way in (convolve_depthwise, nn.Conv2d.forward)))
        except RuntimeError:  # a kernel that is no square, say
            return False


def find_difference(network: Network) -> str | None:
    """Why the definition must run, in words; None if both ways compute the same on a narrow twin of the network."""
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in network.modules()):
        return "a layer has a hook or a forward of its own"
    if edited := [kind.__name__ for kind in dict.fromkeys(map(type, network.modules())) if not is_known(kind)]:
        return f"fast.py was written for another {' and '.join(edited)}"
    with keep_generators():
        torch.manual_seed(0)
        try:
            twin = build_twin(network)
            before = generators()
            expected = list(compute(twin, type(twin).forward))
        except Exception as error:
            return f"a narrow twin for the proof fails, {type(error).__name__}: {error}"
        if generators() != before:
            return "the definition draws random numbers"
        if {type(m) for m in network.modules()} - {type(m) for m in twin.modules()}:
            return "the network has layers that its class does not build"
        try:
            ours = list(compute(twin, supernet_forward))
        except Exception:
            ours = []
        equal = len(ours) == len(expected) and all(map(agree, ours, expected))
        return None if equal else "fast.py gives other numbers"


OPERATIONS = DilConv, FactorizedReduce, Pool, ReLUConvBN, SepConv, Zero  # others are computed by their own forward
WRITTEN_FOR = {  # `digest` of each class as it is; after an edit of both, tests/test_fast.py says what to write here
    "cb0130c3ddd8",  # Network
    "7f9cdce903ee",  # Cell
    "4d8fd8a05f24",  # MixedOp
    "8acb63a3cd76",  # DilConv, ReLUConvBN, SepConv
    "d7175626b683",  # FactorizedReduce
    "e3b0c44298fc",  # Pool
    "ca3ec75ff4ce",  # Zero
}


def is_known(kind: type) -> bool:
    """Whether the code of this class is what this file was written for, or whether this file calls it as it is.

    Numbers at the start do not tell: a factor that grows over the steps is 1 there.
    """
    return not (issubclass(kind, (Network, Cell, MixedOp)) or kind in OPERATIONS) or digest(kind) in WRITTEN_FOR


def digest(kind: type) -> str:
    """A fingerprint of what a class computes: its methods without comments and docstrings, but not PyTorch's."""
    said = ""
    for method in [getattr(kind, name, None) for name in ("__call__", "forward", "stems")]:
        if method is not None and not method.__module__.startswith("torch."):
            try:
                function = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
                if ast.get_docstring(function) is not None:
                    del function.body[0]
            except (OSError, TypeError, SyntaxError):  # code without a file, or that is no function's
                return "unknown"
            said += ast.unparse(function)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def build_twin(network: Network) -> Network:
    """A network of the same class and candidates with few channels and a cell of each kind, in float64."""
    stem = "cifar" if hasattr(network, "stem") else "imagenet"
    twin = type(network)(4, 3, min(4, len(network.cells)), network.candidates, stem).double()
    twin.straight_through = network.straight_through
    return twin


Results = list[Tensor | None]


def compute(twin: Network, forward: Callable[..., Tensor]) -> Iterator[Results]:
    """What `differentiate` gives for the twin's ``forward``, with several active operations, and logits when tested."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    size = 16 if hasattr(twin, "stem") else 64
    x = torch.randn(2, 3, size, size, generator=generator).double()
    every = all_active(twin.candidates)
    some = {kind: [rng.permutation(ops)[: 1 + e % 2].tolist() for e, ops in enumerate(every[kind])] for kind in every}
    for edges in some.values():
        edges[0] = edges[1] = [0]  # in most spaces `none`, alone on all edges of a node
    width = max(len(ops) for edges in every.values() for ops in edges)
    weights = [torch.rand(len(edges), width, generator=generator).double() for edges in every.values()]

    def logits(active: Active | None) -> Callable[..., Tensor]:
        return lambda net, *w: forward(net, x, dict(zip(every, w, strict=True)), active)

    buffers = [b.clone() for b in twin.buffers()]
    for active in (None, some):
        yield differentiate(twin, logits(active), weights)
    with torch.no_grad():
        yield [logits(some)(twin.eval(), *weights)]
        twin.train()
        for now, before in zip(twin.buffers(), buffers, strict=True):
            now.copy_(before)


def differentiate(module: nn.Module, f: Callable[..., Tensor], inputs: Iterable[Tensor]) -> Results:
    """f(module, *inputs), gradients with respect to inputs and the module's parameters, and the module's buffers."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = f(module, *inputs)
    loss = (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()).sum()
    gradients = torch.autograd.grad(loss, [*inputs, *module.parameters()], allow_unused=True)
    return [y.detach(), *gradients, *(b.clone() for b in module.buffers())]


def agree(ours: Results, expected: Results) -> bool:
    """Whether the tensors differ by rounding alone, and are missing (no gradient) in the same places."""
    for a, b in zip(ours, expected, strict=True):
        if a is None or b is None or a.shape != b.shape:
            if a is not b:
                return False
        elif a.numel() and not (a - b).abs().max() <= 1e-9 * b.abs().max() + 1e-12:  # NaN is a difference
            return False
    return True


def generators() -> tuple:
    """The states of the global generators."""
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()


@contextmanager
def keep_generators() -> Iterator[None]:
    """The global generators are put back at the end."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
