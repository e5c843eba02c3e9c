"""The same numbers on a GPU in fewer launches and less memory: what a node sums is computed side by side.

Networks this small keep a GPU waiting for the next launch. So operations of a kind that end in the same node become
one: their inputs lie side by side along the channels, their kernels too, and one grouped convolution, one normalisation
and one sum do the work of several. Besides:

- An operation's weight is the gain of its normalisation; all gains of a cell are spread over the channels at once
  (`Gains`), and all running statistics of a cell move at once (`Statistics`).
- A cell's 1x1 convolutions read the outputs of the cells before as one tensor, which is not kept for the backward pass
  but put together again there (`ConvOfParts`).
- FactorizedReduce, two 1x1 convolutions with stride 2 of which the second reads one pixel further, is one of 2x2.

Tensors are in NCHW order: PyTorch's own depthwise convolutions are for that, and cuDNN has no fast ones for float32 in
channels_last. Nothing here asks the GPU for a value.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from operations import DilConv, FactorizedReduce, Identity, Pool, ReLUConvBN, SepConv, Zero

CHAINS = (SepConv, DilConv, ReLUConvBN)  # a ReLU, then convolutions, normalisations and ReLUs: the Sequential `op`


# ---- tensors of a cell ----------------------------------------------------------------------------------------------


class Node:
    """A tensor x (N, C, H, W) of a cell, and what the operations that read it share."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._pooled: dict[str, Tensor] = {}

    @property
    def nodes(self) -> list[Node]:
        return [self]

    @cached_property
    def relu(self) -> Tensor:
        return F.relu(self.x)

    @cached_property
    def joined_relu(self) -> Tensor:
        return self.relu

    def pooled(self, pool: nn.Module) -> Tensor:
        """pool(x), the same tensor for every pooling layer with these settings."""
        if (key := settings(pool)) not in self._pooled:
            self._pooled[key] = pool(self.x)
        return self._pooled[key]


class Concatenation:
    """Nodes side by side along the channels: a cell's output, or what several operations read."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    @property
    def x(self) -> Tensor:
        return torch.cat([node.x for node in self.nodes], dim=1)

    @cached_property
    def joined_relu(self) -> Tensor:
        """relu(x). Without gradients in one pass over what no operation has read, and the nodes are let go."""
        if torch.is_grad_enabled():
            return torch.cat([node.relu for node in self.nodes], dim=1)
        unread = sum("relu" not in vars(node) for node in self.nodes)
        joined = torch.cat([node.relu for node in self.nodes], dim=1) if unread < 2 else F.relu_(self.x)
        self.nodes = []
        return joined


def settings(module: nn.Module) -> str:
    """What two modules that compute the same have in common, given the same parameters; remembered by the module."""
    known = vars(module)
    if "_settings" not in known:
        known["_settings"] = repr(module)
    return known["_settings"]


# ---- cells ----------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Operations of one kind that a node sums."""

    ops: list[nn.Module]
    sources: list[int]  # the node that each reads
    places: list[int]  # of their weights in the flat table of a cell type's weights


def supernet_cell(
    cell: nn.Module, s0: Node | Concatenation, s1: Node | Concatenation, weights: Tensor, active: list, rest: list
) -> Concatenation:
    """What model_search.Cell.forward computes, with the weights of all edges as one matrix (14, o)."""
    statistics = Statistics()
    nodes = [Node(evaluated(op, s, statistics)) for op, s in ((cell.preprocess0, s0), (cell.preprocess1, s1))]
    groups = [grouped(cell, edges, active, weights.shape[1]) for edges in cell.incoming]
    C = nodes[0].x.shape[1]
    gains = iter(Gains.apply(weights, [group.places for node in groups for group in node], C))
    joined: dict[tuple[int, ...], Node | Concatenation] = {}
    for edges, node, added in zip(cell.incoming, groups, rest, strict=True):
        y = None
        for group, gain in zip(node, gains, strict=False):
            key = tuple(group.sources)
            if key not in joined:
                parts = [nodes[i] for i in key]
                joined[key] = Concatenation(parts) if len(parts) > 1 else parts[0]
            y = plus(y, group.ops, joined[key], gain, statistics)
        if y is None:  # every incoming edge is `none`
            stride = cell._ops[edges[0]].stride
            y = torch.zeros_like(nodes[0].x[:, :, ::stride, ::stride])
        nodes.append(Node(y if added is None else y + added))
    statistics.move()
    return Concatenation(nodes[2:])


def grouped(cell: nn.Module, edges: list[int], active: list[list[int]], width: int) -> list[Group]:
    """The active operations of a node's edges but `none`: those of a kind together, what has no parameters last."""
    found = []
    for source, e in enumerate(edges):
        for k in active[e]:
            op = cell._ops[e]._ops[k]
            if not isinstance(op, Zero):
                chain = isinstance(op, (*CHAINS, FactorizedReduce))
                kind = settings(op) if chain else f"{k} {e}"
                found.append((not chain, isinstance(op, Identity), kind, source, e * width + k, op))
    found.sort(key=lambda entry: entry[:5])
    entries = (list(group) for _, group in groupby(found, key=lambda entry: entry[:3]))
    return [Group([e[5] for e in group], [e[3] for e in group], [e[4] for e in group]) for group in entries]


def plus(
    y: Tensor | None, ops: list[nn.Module], source: Node | Concatenation, gain: Tensor, statistics: Statistics
) -> Tensor:
    """y (None: 0) + the sum of gain_k * ops[k](source of k); the gains (K * C) are spread over the channels."""
    op = ops[0]
    if isinstance(op, CHAINS):
        term = summed(chain([op.op for op in ops], source, gain, statistics), len(ops))
    elif isinstance(op, FactorizedReduce):
        term = summed(normalised(halved(ops, source), [op.bn for op in ops], gain, statistics), len(ops))
    elif isinstance(op, Pool) and len(op) == 2:
        term = normalised(source.pooled(op[0]), [op[1]], gain, statistics)
    else:
        x, scale = op(source.x), gain[:, None, None]
        return x * scale if y is None else torch.addcmul(y, x, scale)
    return term if y is None else y + term


def discovered_cell(
    cell: nn.Module, s0: Node | Concatenation, s1: Node | Concatenation, drop_path_prob: float
) -> Concatenation:
    """What model.Cell.forward computes, with the same arguments."""
    statistics = Statistics()
    nodes = [Node(evaluated(op, s, statistics)) for op, s in ((cell.preprocess0, s0), (cell.preprocess1, s1))]
    keeps = cell.keeps(nodes[0].x, drop_path_prob)
    for n, pair in enumerate(cell.incoming):
        ops, sources, keep = ([values[e] for e in pair] for values in (cell._ops, cell._indices, keeps))
        parts = [nodes[i] for i in sources]
        if str(n) in cell.merged:
            y = chain([cell.merged[str(n)]], Concatenation(parts), None, statistics)
        elif of_a_kind(ops):
            y = chain([op.op for op in ops], Concatenation(parts), None, statistics).unflatten(1, (2, -1))
            y = (y if keep[0] is None else y * torch.stack(keep, dim=1)).sum(1)
        else:
            y = dropped_sum(*(evaluated(op, part, statistics) for op, part in zip(ops, parts, strict=True)), *keep)
        nodes.append(Node(y))
    statistics.move()
    return Concatenation([nodes[i] for i in cell._concat])


def of_a_kind(ops: Sequence[nn.Module]) -> bool:
    """Whether the operations can be computed side by side."""
    return isinstance(ops[0], CHAINS) and len({settings(op) for op in ops}) == 1


def dropped_sum(a: Tensor, b: Tensor, keep_a: Tensor | None, keep_b: Tensor | None) -> Tensor:
    """keep_a * a + keep_b * b; None: 1."""
    if keep_a is None:
        a, b, keep_a, keep_b = b, a, keep_b, keep_a
    b = b if keep_b is None else b * keep_b
    return a + b if keep_a is None else torch.addcmul(b, a, keep_a)


def evaluated(op: nn.Module, source: Node | Concatenation, statistics: Statistics) -> Tensor:
    """An operation of a discovered network, or the preprocessing of a cell's input."""
    if isinstance(op, CHAINS):
        return chain([op.op], source, None, statistics)
    if isinstance(op, FactorizedReduce):
        return normalised(halved([op], source), [op.bn], None, statistics)
    if isinstance(op, Pool) and len(op) == 1:
        return source.pooled(op[0])
    return op(source.x)


# ---- operations side by side ----------------------------------------------------------------------------------------


def chain(
    ops: Sequence[nn.Sequential], source: Node | Concatenation, gain: Tensor | None, statistics: Statistics
) -> Tensor:
    """The outputs (N, K * C', H, W) of K chains of a kind, which read the K parts of the source, or all read it whole.

    ``gain`` (K * C') is that of the last normalisation, which then has none of its own.
    """
    relu, *layers = zip(*ops, strict=True)
    x, parts = source.joined_relu, kept_parts(source)
    for i, layer in enumerate(layers):
        if isinstance(layer[0], nn.Conv2d):
            x, parts = convolved(x, layer, parts), []
        elif isinstance(layer[0], nn.ReLU):
            x = F.relu_(x)
        elif isinstance(layer[0], nn.BatchNorm2d):
            x = normalised(x, layer, gain if i == len(layers) - 1 else None, statistics)
    return x


def convolved(x: Tensor, convs: Sequence[nn.Conv2d], parts: Sequence[Tensor] = ()) -> Tensor:
    """K convolutions of a kind on K tensors side by side; ``parts``: what x was put together from."""
    conv, weight = convs[0], side_by_side([conv.weight for conv in convs])
    bias = None if conv.bias is None else side_by_side([conv.bias for conv in convs])
    arguments = conv.stride, conv.padding, conv.dilation, conv.groups * len(convs)
    return conv2d(x, weight, bias, arguments, parts)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, arguments: tuple, parts: Sequence[Tensor]) -> Tensor:
    """F.conv2d, which keeps the parts for the backward pass where there are several."""
    if len(parts) < 2:
        return F.conv2d(x, weight, bias, *arguments)
    return ConvOfParts.apply(x, weight, arguments, *parts)


def kept_parts(source: Node | Concatenation) -> list[Tensor]:
    """What ``source.joined_relu`` is put together from; nothing where there is no backward pass."""
    return [node.relu for node in source.nodes] if torch.is_grad_enabled() else []


def halved(ops: Sequence[FactorizedReduce], source: Node | Concatenation) -> Tensor:
    """FactorizedReduce up to its normalisation, of K tensors side by side: each a 2x2 convolution with stride 2.

    conv_1 reads the upper left pixel of every 2x2, conv_2 the lower right one.
    """
    weight = side_by_side(
        [F.pad(conv.weight, pad) for op in ops for conv, pad in ((op.conv_1, (0, 1, 0, 1)), (op.conv_2, (1, 0, 1, 0)))]
    )
    arguments = (2, 2), (0, 0), (1, 1), len(ops)
    return conv2d(source.joined_relu, weight, None, arguments, kept_parts(source))


def normalised(x: Tensor, bns: Sequence[nn.BatchNorm2d], gain: Tensor | None, statistics: Statistics) -> Tensor:
    """The batch normalisations of tensors side by side; ``gain`` (K * C) or their own gains and shifts."""
    bn, shift = bns[0], None
    if bn.affine:
        gain, shift = side_by_side([bn.weight for bn in bns]), side_by_side([bn.bias for bn in bns])
    if bn.training:  # momentum 1: the buffers become the mean and the unbiased variance of the batch
        mean, variance = statistics.buffers(x, bns)
        return F.batch_norm(x, mean, variance, gain, shift, True, 1.0, bn.eps)
    mean, variance = (side_by_side([getattr(bn, name) for bn in bns]) for name in ("running_mean", "running_var"))
    return F.batch_norm(x, mean, variance, gain, shift, False, 0.0, bn.eps)


def summed(y: Tensor, K: int) -> Tensor:
    """(N, K * C, H, W) -> the sum (N, C, H, W) of the K tensors side by side."""
    return y if K == 1 else y.unflatten(1, (K, -1)).sum(1)


def side_by_side(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def merge(cell: nn.Module) -> None:
    """Give a cell of a fused network (model.fuse), for nodes that sum two operations of a kind, these as one.

    Then no kernels are put side by side in each forward pass, and the last convolution of both sums as well.
    """
    for n, pair in enumerate(cell.incoming):
        ops = [cell._ops[e] for e in pair]
        if of_a_kind(ops):
            layers = list(zip(*(op.op for op in ops), strict=True))
            last = max(i for i, layer in enumerate(layers) if isinstance(layer[0], nn.Conv2d))
            cell.merged[str(n)] = nn.Sequential(*(merged(layer, sums=i == last) for i, layer in enumerate(layers)))


def merged(layer: Sequence[nn.Module], sums: bool) -> nn.Module:
    """Layers of a kind as one; of convolutions with ``sums`` the sum of their outputs."""
    if not isinstance(conv := layer[0], nn.Conv2d):
        return layer[0]
    one, K = copy.copy(conv), len(layer)
    one._parameters = {"weight": nn.Parameter(torch.cat([c.weight for c in layer], dim=1 if sums else 0)), "bias": None}
    if conv.bias is not None:
        one.bias = nn.Parameter(sum(c.bias for c in layer) if sums else torch.cat([c.bias for c in layer]))
    one.groups = conv.groups * (1 if sums else K)
    return one


class ConvOfParts(Function):
    """A convolution of x = torch.cat(parts, dim=1), which keeps the parts, that others keep too, instead of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, arguments: tuple, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *parts)
        ctx.arguments = arguments
        return F.conv2d(x, weight, None, *arguments)

    @staticmethod
    def backward(ctx, dy: Tensor):
        weight, *parts = ctx.saved_tensors
        x, weight = torch.cat(parts, dim=1).to(dy.dtype), weight.to(dy.dtype)
        stride, padding, dilation, groups = ctx.arguments
        which = [*ctx.needs_input_grad[:2], False]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, dilation, False, [0, 0], groups, which
        )
        return dx, dw, None, *[None] * len(parts)


class Gains(Function):
    """The weights (14, o) at some places, spread over C channels: for each list of K places a vector (K * C)."""

    @staticmethod
    def forward(ctx, weights: Tensor, places: list[list[int]], C: int) -> tuple[Tensor, ...]:
        ctx.shape, ctx.places = weights.shape, places
        ctx.set_materialize_grads(False)
        flat = weights.flatten().unbind()
        if not places:
            return ()
        spread = torch.stack([flat[i] for group in places for i in group])[:, None].expand(-1, C).flatten()
        return spread.split([C * len(group) for group in places])

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        known = [(places, g) for places, g in zip(ctx.places, grads, strict=True) if g is not None]
        if not known:
            return None, None, None
        places = [i for group, _ in known for i in group]
        sums = torch.cat([g for _, g in known]).view(len(places), -1).sum(1)
        zero = sums.new_zeros(())
        table = dict(zip(places, sums.unbind(), strict=True))
        flat = torch.stack([table.get(i, zero) for i in range(ctx.shape.numel())])
        return flat.view(ctx.shape), None, None


class Statistics:
    """The means and variances that a cell's normalisations have seen, which move the running ones all at once."""

    def __init__(self) -> None:
        self.bns: list[nn.BatchNorm2d] = []
        self.seen: list[Tensor] = []  # (2, C) of each
        self.free: Tensor | None = None

    def buffers(self, x: Tensor, bns: Sequence[nn.BatchNorm2d]) -> tuple[Tensor, Tensor]:
        """Zeros for the mean and the variance (K * C) of the channels of x."""
        C = x.shape[1]
        if self.free is None or self.free.shape[1] < C:
            self.free = torch.zeros(
                2, max(C, 64 * bns[0].num_features), device=x.device, dtype=bns[0].running_mean.dtype
            )
        taken, self.free = self.free[:, :C], self.free[:, C:]
        self.bns += bns
        self.seen += taken.split(bns[0].num_features, dim=1)
        return taken[0], taken[1]

    @torch.no_grad()
    def move(self) -> None:
        """What nn.BatchNorm2d does to its buffers in training mode."""
        if self.bns:
            buffers = [bn.running_mean for bn in self.bns] + [bn.running_var for bn in self.bns]
            torch._foreach_lerp_(buffers, [seen[i] for i in (0, 1) for seen in self.seen], self.bns[0].momentum)
            torch._foreach_add_([bn.num_batches_tracked for bn in self.bns], 1)
