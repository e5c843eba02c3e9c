"""How the cells of model_search.py and model.py are computed several times faster, with the same numbers.

The way in: networks pass `nodes` instead of tensors to their cells, whose forwards hand over to `supernet_cell` and
`discovered_cell`. The switch: --plain, or `switch_off`, after which they pass tensors. What is saved:

- Work that several operations share: a `Node` keeps the ReLU and the pooled copies of a tensor for all that read it; a
  cell's output stays a list of nodes (`Concatenation`), since the next cell's 1x1 convolution can read them one by one.
- Passes over large tensors: an operation ends in a `Term`, its last 1x1 convolution and normalisation not computed yet,
  and the node that sums the terms uses an operation's weight as the gain of its normalisation.
- On a CPU, in training at full precision (`own_backward`), fast_cpu.py has faster backward passes for depthwise
  convolutions, 1x1 convolutions of several tensors, and sums of 1x1 convolution + batch normalisation.

An operation that this file does not know is computed by its own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib.depthwise import (
    Depthwise,
    NormalisedSum,
    PointwiseOfParts,
    average,
    centred,
    column_means,
    even_and_odd,
    own_backward,
    rows,
    tap_reads,
)
from operations import OPS, DilConv, FactorizedReduce, Identity, Pool, ReLUConvBN, SepConv, Zero


def switch_off(network: nn.Module) -> nn.Module:
    """Let the network compute by its modules' own forwards, on tensors in NCHW order; returns the network."""
    network.plain = True
    for p in network.parameters():
        p.data = p.data.clone(memory_format=torch.contiguous_format)
    return network


# ---- tensors of a cell, and what their readers share ----------------------------------------------------------------


AVERAGE = repr(OPS["avg_pool_3x3"](1, 1, False)[0])  # the pooling layer that fast_cpu.average computes


class Node:
    """A tensor x (N, C, H, W) of a cell, and what the operations that read it have in common, computed once."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._pooled: dict[object, Tensor | tuple[Tensor, ...]] = {}

    @property
    def nodes(self) -> list[Node]:
        return [self]

    @cached_property
    def relu(self) -> Image:
        return Image(F.relu(self.x))

    @cached_property
    def even(self) -> Image:
        """The ReLU's pixels in even rows and columns."""
        return Image(self._even_and_odd[0])

    @cached_property
    def odd(self) -> Image:
        return Image(self._even_and_odd[1])

    @cached_property
    def _even_and_odd(self) -> tuple[Tensor, Tensor]:
        return even_and_odd(self.relu.x)

    def pooled(self, pool: nn.Module) -> Tensor:
        """pool(x), the same tensor for every pooling layer with these settings."""
        key = repr(pool)
        if key not in self._pooled:
            averages = key == AVERAGE and own_backward(self.x)
            self._pooled[key] = average(self.x) if averages else pool(self.x)
        return self._pooled[key]

    def centred(self, pool: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """pool(x) minus its mean, the same tensor again (in place: `pooled` gives it too), mean and variance (C)."""
        key = repr(pool), "centred"
        if key not in self._pooled:
            self._pooled[key] = centred(self.pooled(pool))
        return self._pooled[key]


class Concatenation:
    """A cell's output: nodes side by side along the channels. Who accepts a list of nodes skips the concatenation."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    @property
    def x(self) -> Tensor:
        return torch.cat([node.x for node in self.nodes], dim=1)


class Image:
    """A tensor x (N, C, H, W) that depthwise convolutions read."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._tap_means: dict[tuple, Tensor] = {}

    @cached_property
    def mean(self) -> Tensor:
        """The mean (H * W, C) over the batch."""
        N, C, H, W = self.x.shape
        return column_means(rows(self.x.detach()).view(N, -1)).view(H * W, C)

    def tap_means(self, k: int, stride: int, dilation: int) -> Tensor:
        """(C, k * k): the means over batch and output pixels of what each tap of a `same` convolution reads."""
        key = k, stride, dilation
        if key not in self._tap_means:
            reads = tap_reads(*self.x.shape[2:], *key, self.x.dtype)
            self._tap_means[key] = (reads @ self.mean).t().contiguous()
        return self._tap_means[key]


Nodes = Node | Concatenation  # what cells pass on instead of tensors


def memory_order(x: Tensor) -> torch.memory_format:
    """The order of images and kernels that is faster."""
    return torch.channels_last


def laid_out(x: Tensor) -> Tensor:
    """Images in the order that is faster."""
    return x.contiguous(memory_format=memory_order(x))


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, its kernels in the order that is faster there."""
    network = network.to(device)
    return network.to(memory_format=memory_order(next(network.parameters())))


def nodes(s0: Tensor, s1: Tensor) -> tuple[Nodes, Nodes]:
    """The two inputs of the first cell; one node if they are the same tensor."""
    kind = Node
    first = kind(s0)
    return first, first if s1 is s0 else kind(s1)


def whole(x: Tensor | Nodes) -> Tensor:
    """A cell's output as one tensor."""
    return x if isinstance(x, Tensor) else x.x


# ---- cells ----------------------------------------------------------------------------------------------------------


def supernet_cell(
    cell: nn.Module,
    s0: Nodes,
    s1: Nodes,
    weights: list[list[Tensor]],
    active: list[list[int]],
    rest: list[Tensor | None],
) -> Concatenation:
    """What model_search.Cell.forward computes, with the same arguments."""
    nodes = preprocessed(cell, s0, s1)
    for edges, added in zip(cell.incoming, rest, strict=True):
        terms, gains = [], []
        for source, e in zip(nodes, edges, strict=True):
            for k in active[e]:
                if not isinstance(op := cell._ops[e]._ops[k], Zero):
                    terms.append(term_of(op, source))
                    gains.append(weights[e][k])
        if not terms:  # every incoming edge is `none`
            stride = cell._ops[edges[0]].stride
            terms, gains = [Term(torch.zeros_like(nodes[0].x[:, :, ::stride, ::stride]))], [weights[edges[0]][0]]
        y = weighted_sum(terms, gains)
        nodes.append(Node(y if added is None else y + added))
    return Concatenation(nodes[2:])


def discovered_cell(cell: nn.Module, s0: Nodes, s1: Nodes, drop_path_prob: float) -> Concatenation:
    """What model.Cell.forward computes, with the same arguments."""
    nodes = preprocessed(cell, s0, s1)
    keeps = cell.keeps(nodes[0].x, drop_path_prob)
    for pair in cell.incoming:
        terms = (term_of(cell._ops[e], nodes[cell._indices[e]]) for e in pair)
        if cell.training:
            a, b = (
                evaluate(t) if keeps[e] is None else evaluate(t) * keeps[e] for e, t in zip(pair, terms, strict=True)
            )
            nodes.append(Node(a + b))
        else:
            nodes.append(Node(fused_sum(list(terms))))
    return Concatenation([nodes[i] for i in cell._concat])


def preprocessed(cell: nn.Module, s0: Nodes, s1: Nodes) -> list[Node]:
    """The two inputs of a cell."""
    return [Node(evaluate(term_of(op, s))) for op, s in ((cell.preprocess0, s0), (cell.preprocess1, s1))]


def recomputed_cell(
    cell: nn.Module, s0: Nodes, s1: Nodes, *arguments: list, contexts: tuple[AbstractContextManager, ...]
) -> Concatenation:
    """cell(s0, s1, *arguments) of which only inputs and outputs are kept until it is computed a second time.

    ``contexts`` surround the first and the second computation.
    """
    inputs, first = [node.x for node in s0.nodes + s1.nodes], len(s0.nodes)

    node, concatenation = Node, Concatenation

    def run(*xs: Tensor) -> list[Tensor]:
        fresh = [node(x) for x in xs]
        cells = concatenation(fresh[:first]), concatenation(fresh[first:])
        return [node.x for node in cell(*cells, *arguments).nodes]

    outputs = checkpoint(run, *inputs, use_reentrant=False, context_fn=lambda: contexts)
    return concatenation([node(x) for x in outputs])


# ---- operations, up to their last convolution and normalisation -----------------------------------------------------


class Term(NamedTuple):
    """An operation's output bn(conv(x)), not computed yet; without conv and bn it is x.

    If its normalisation is computed by `NormalisedSum`, x has been centred: ``mean`` (C) was subtracted; and without
    conv the ``variance`` (C) of x is known.
    """

    x: Tensor
    mean: Tensor | None = None
    conv: nn.Conv2d | None = None  # 1x1
    bn: nn.Module | None = None
    variance: Tensor | None = None


def term_of(op: nn.Module, source: Node | Concatenation) -> Term:
    """The operation ``op`` of ``source``."""
    if type(op) not in TERMS:
        return Term(op(source.x))
    return TERMS[type(op)](op, source)


def identity(op: Identity, source: Node) -> Term:
    return Term(op(source.x))


def pooling(op: Pool, source: Node) -> Term:
    pool, bn = (*op, None)[:2]
    if not own_normalisation(source.x, bn):
        return Term(source.pooled(pool), bn=bn)
    x, mean, variance = source.centred(pool)
    return Term(x, mean, None, bn, variance)


def relu_conv_bn(op: ReLUConvBN, source: Node | Concatenation) -> Term:
    _, conv, bn = op.op
    return Term(conv_of_parts([node.relu.x for node in source.nodes], conv), None, None, bn)


def factorized_reduce(op: FactorizedReduce, source: Node | Concatenation) -> Term:
    # The pixels first, then the convolution: oneDNN's backward pass of a strided 1x1 convolution of few channels
    # writes beyond its memory (PyTorch 2.14, channels_last), and this is as fast.
    even, odd = [node.even.x for node in source.nodes], [node.odd.x for node in source.nodes]
    x = torch.cat([conv_of_parts(even, op.conv_1), conv_of_parts(odd, op.conv_2)], dim=1)
    x, mean, variance = centred(x) if own_normalisation(x, op.bn) else (x, None, None)
    return Term(x, mean, None, op.bn, variance)


def dil_conv(op: DilConv, source: Node) -> Term:
    _, depthwise, pointwise, bn = op.op
    image = source.even if depthwise.stride[0] == 2 else source.relu  # with dilation 2 every tap is an even pixel
    return separable(image, depthwise, pointwise, bn)


def sep_conv(op: SepConv, source: Node) -> Term:
    _, depthwise1, pointwise1, bn1, _, depthwise2, pointwise2, bn2 = op.op
    x = F.relu_(evaluate(separable(source.relu, depthwise1, pointwise1, bn1)))
    return separable(Image(x), depthwise2, pointwise2, bn2)


TERMS = {
    Identity: identity,
    Pool: pooling,
    ReLUConvBN: relu_conv_bn,
    FactorizedReduce: factorized_reduce,
    DilConv: dil_conv,
    SepConv: sep_conv,
}


def separable(image: Image, depthwise: nn.Conv2d, pointwise: nn.Conv2d, bn: nn.Module) -> Term:
    """bn(pointwise(depthwise(image))), the depthwise convolution with `same` padding, in training on a CPU `Depthwise`.

    With dilation 2, a stride of 2 has been taken already.
    """
    k, stride, dilation = depthwise.kernel_size[0], depthwise.stride[0], depthwise.dilation[0]
    if stride == dilation == 2:
        stride = dilation = 1
    if not own_backward(image.x) or k not in (3, 5):
        x = F.conv2d(image.x, depthwise.weight, depthwise.bias, stride, dilation * (k // 2), dilation, depthwise.groups)
        return Term(x, None, pointwise, bn) if not own_normalisation(x, bn) else Term(bn(pointwise(x)))
    tap_means = image.tap_means(k, stride, dilation) if own_normalisation(image.x, bn) else None
    x, mean = Depthwise.apply(image.x, depthwise.weight, tap_means, stride, dilation)
    return Term(x, mean, pointwise, bn)


def conv_of_parts(xs: list[Tensor], conv: nn.Conv2d) -> Tensor:
    """conv(torch.cat(xs, dim=1)) with stride 1, for a 1x1 convolution: each part has its columns of the weight."""
    if conv.bias is None and own_backward(xs[0]):
        return PointwiseOfParts.apply(conv.weight, *xs)
    return sum_of_convs(xs, conv.weight.split([x.shape[1] for x in xs], dim=1), conv.bias)


def sum_of_convs(xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The sum of 1x1 convolutions with ``weights`` (C', C, 1, 1) of ``xs`` (N, C, H, W), plus bias (C')."""
    y = F.conv2d(xs[0], weights[0], bias)
    accumulated = y.is_cpu and not (torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling())
    for x, weight in zip(xs[1:], weights[1:], strict=True):
        if accumulated:
            torch.addmm(rows(y), rows(x), weight.flatten(1).t(), out=rows(y))
        else:
            y.add_(F.conv2d(x, weight))
    return y


# ---- sums of terms -------------------------------------------------------------------------------------------------


def evaluate(term: Term) -> Tensor:
    """bn(conv(x))."""
    x, mean, conv, bn, _ = term
    if mean is not None:
        return normalised_sum([term], bn.weight[None] if bn.affine else None, bn.bias)
    x = x if conv is None else conv(x)
    return x if bn is None else bn(x)


def fused_sum(terms: list[Term]) -> Tensor:
    """The sum of the terms in evaluation mode, at once for those whose normalisation is part of their convolution."""
    fused = [t for t in terms if isinstance(t.bn, nn.Identity)]
    others = [evaluate(t) for t in terms if not isinstance(t.bn, nn.Identity)]
    if not fused:
        return sum(others[1:], start=others[0])
    xs, _, convs, *_ = zip(*fused, strict=True)
    y = sum_of_convs(xs, [conv.weight for conv in convs], sum(conv.bias for conv in convs))
    for other in others:
        y.add_(other)
    return y


def weighted_sum(terms: list[Term], gains: list[Tensor]) -> Tensor:
    """sum of gains[k] * terms[k], the gains being scalars and the normalisations without gain and shift."""
    if any(t.mean is not None for t in terms):
        order = sorted(range(len(terms)), key=lambda k: (terms[k].conv is None, terms[k].bn is None))
        gain = torch.stack([gains[k] for k in order])[:, None]
        return normalised_sum([terms[k] for k in order], gain, None)
    total = None
    for (x, _, conv, bn, _), gain in zip(terms, gains, strict=True):
        x = x if conv is None else conv(x)
        y = x * gain if bn is None else scaled_bn(x, bn, gain)
        total = y if total is None else total.add_(y)
    return total


def scaled_bn(x: Tensor, bn: nn.BatchNorm2d, scale: Tensor) -> Tensor:
    """bn(x) * scale, with the scale as the normalisation's gain; bn has none of its own."""
    if bn.training:
        bn.num_batches_tracked.add_(1)
    gain = scale.expand(bn.num_features).contiguous()
    return F.batch_norm(x, bn.running_mean, bn.running_var, gain, None, bn.training, bn.momentum, bn.eps)


def own_normalisation(x: Tensor, bn: nn.Module | None) -> bool:
    """Whether the normalisation ``bn`` of x is left to `NormalisedSum`."""
    return isinstance(bn, nn.BatchNorm2d) and bn.training and own_backward(x)


@torch.no_grad()
def move_running_statistics(bns: list[nn.BatchNorm2d], means: list[Tensor], variances: list[Tensor]) -> None:
    """What nn.BatchNorm2d does to its buffers in training mode, given the means and unbiased variances (C)."""
    momentum = bns[0].momentum
    buffers = [bn.running_mean for bn in bns] + [bn.running_var for bn in bns]
    torch._foreach_lerp_(buffers, means + variances, momentum)
    torch._foreach_add_([bn.num_batches_tracked for bn in bns], 1)


def normalised_sum(terms: list[Term], gain: Tensor | None, shift: Tensor | None) -> Tensor:
    """The sum over the terms of gain * normalised(conv(x)), plus shift; moves the running statistics.

    Terms without conv (nothing but x to normalise) come behind those with, and terms without bn (x as it is) last.
    gain broadcasts to (terms, C); None: 1. shift is (C) or None.
    """
    convolved = [t for t in terms if t.conv is not None]
    others = [t for t in terms[len(convolved) :] if t.bn is not None]
    weights = [t.conv.weight for t in convolved]
    means = torch.stack([t.mean for t in convolved]) if convolved else None
    variances = torch.stack([t.variance for t in others]) if others else None
    xs = [t.x for t in terms]
    eps = terms[0].bn.eps
    y, means, variances = NormalisedSum.apply(eps, len(weights), gain, shift, means, variances, *weights, *xs)
    n = y.numel() // y.shape[1]
    bns = [t.bn for t in convolved + others]
    means = [*(means if convolved else ()), *(t.mean for t in others)]
    move_running_statistics(bns, means, list((variances * (n / (n - 1))).unbind()))
    return y
