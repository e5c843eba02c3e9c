"""The candidate operations of a cell (OPS: primitive name -> module), and the arithmetic that they share.

Each operation is the plain DARTS one: its ``op`` is the Sequential whose call would compute it, and whose parameter
names are those of released checkpoints. What is particular here: an operation can be called on a `Node`, which keeps
what several operations derive from one tensor (its ReLU, its pooled copies), and it can leave its last convolution and
normalisation to the node that sums it with others, as a `Term`: an operation's weight is then the gain of its
normalisation instead of one more pass over its output. A cell's output stays a `Concatenation` of its nodes. On a CPU
the two costly patterns, depthwise convolution and sums of pointwise convolution + batch normalisation, have backward
passes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

OPS = {
    "none": lambda C, stride, affine: Zero(stride),
    "max_pool_3x3": lambda C, stride, affine: Pool(nn.MaxPool2d(3, stride, padding=1)),
    "avg_pool_3x3": lambda C, stride, affine: Pool(nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)),
    "skip_connect": lambda C, stride, affine: Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "sep_conv_3x3": lambda C, stride, affine: SepConv(C, C, 3, stride, affine),
    "sep_conv_5x5": lambda C, stride, affine: SepConv(C, C, 5, stride, affine),
    "dil_conv_3x3": lambda C, stride, affine: DilConv(C, C, 3, stride, affine),
    "dil_conv_5x5": lambda C, stride, affine: DilConv(C, C, 5, stride, affine),
}


class Node:
    """A tensor x (N, C, H, W) of a cell, and what the operations that read it have in common, computed once."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._pooled: dict[tuple, Tensor | tuple[Tensor, ...]] = {}

    @property
    def nodes(self) -> list[Node]:
        return [self]

    @cached_property
    def relu(self) -> Image:
        return Image(F.relu(self.x))

    @cached_property
    def even(self) -> Image:
        """The ReLU's pixels in even rows and columns."""
        return Image(every_second(self.relu.x, 0))

    @cached_property
    def odd(self) -> Image:
        return Image(every_second(self.relu.x, 1))

    def pooled(self, pool: nn.Module) -> Tensor:
        """pool(x), the same tensor for every pooling layer of this kind and stride."""
        key = (type(pool), pool.stride)
        if key not in self._pooled:
            averages = isinstance(pool, nn.AvgPool2d) and pool.stride == 1 and by_hand(self.x)
            self._pooled[key] = average(self.x) if averages else pool(self.x)
        return self._pooled[key]

    def normalised(self, pool: nn.Module, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
        """pool(x) normalised as by bn, the same tensor again, with its means and unbiased variances (C)."""
        key = (type(pool), pool.stride, bn.eps)
        if key not in self._pooled:
            mean, variance = torch.zeros_like(bn.running_mean), torch.zeros_like(bn.running_var)
            x = F.batch_norm(self.pooled(pool), mean, variance, training=True, momentum=1, eps=bn.eps)
            self._pooled[key] = x, mean, variance
        return self._pooled[key]


class Concatenation:
    """A cell's output: nodes side by side along the channels. What can read them one by one never makes the whole."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    @property
    def x(self) -> Tensor:
        return torch.cat([node.x for node in self.nodes], dim=1)


class Image:
    """A tensor x (N, C, H, W) that depthwise convolutions read."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @cached_property
    def mean(self) -> Tensor:
        """The mean (1, C, H, W) over the batch."""
        N, C, H, W = self.x.shape
        flat = self.x.detach().permute(0, 2, 3, 1).reshape(N, -1)
        return (flat.new_full((N,), 1 / N) @ flat).view(1, H, W, C).permute(0, 3, 1, 2)


def as_node(x: Tensor | Node | Concatenation) -> Node | Concatenation:
    return Node(x) if isinstance(x, Tensor) else x


def pointwise(xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The sum of 1x1 convolutions with ``weights`` (C', C, 1, 1) of ``xs`` (N, C, H, W), plus bias (C')."""
    y = F.conv2d(xs[0], weights[0], bias)
    accumulated = y.is_cpu and not (torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_exporting())
    for x, weight in zip(xs[1:], weights[1:], strict=True):
        if accumulated:
            torch.addmm(rows(y), rows(x), weight.flatten(1).t(), out=rows(y))
        else:
            y.add_(F.conv2d(x, weight))
    return y


def pointwise_of_parts(xs: list[Tensor], conv: nn.Conv2d) -> Tensor:
    """conv(torch.cat(xs, dim=1)) with stride 1, for a 1x1 convolution: each part has its columns of the weight."""
    return pointwise(xs, conv.weight.split([x.shape[1] for x in xs], dim=1), conv.bias)


class Term(NamedTuple):
    """An operation's output bn(conv(x)), not computed yet; without conv and bn it is x.

    If its normalisation is computed by hand, x has been centred: ``mean`` (C) was subtracted.
    """

    x: Tensor
    mean: Tensor | None = None
    conv: nn.Conv2d | None = None  # 1x1
    bn: nn.Module | None = None


class Operation(nn.Module):
    """A candidate operation of an edge."""

    def term(self, source: Node) -> Term:
        """The operation up to its last convolution."""
        raise NotImplementedError

    def forward(self, x: Tensor | Node | Concatenation) -> Tensor:
        return evaluate(self.term(as_node(x)))


class Zero(Operation):
    """`none`: zeros. The supernet never calls it."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def term(self, source: Node) -> Term:
        return Term(torch.zeros_like(source.x[:, :, :: self.stride, :: self.stride]))


class Identity(Operation):
    """`skip_connect` at stride 1; in P-DARTS' search followed by dropout with probability ``dropout``."""

    dropout = 0.0

    def term(self, source: Node) -> Term:
        return Term(F.dropout(source.x, self.dropout, self.training) if self.dropout > 0 else source.x)


class Pool(nn.Sequential, Operation):
    """A pooling layer, in the supernet followed by a BatchNorm2d without affine part."""

    forward = Operation.forward

    def term(self, source: Node) -> Term:
        pool, bn = (*self, None)[:2]
        if bn is None or not bn.training:
            return Term(source.pooled(pool), bn=bn)
        x, mean, variance = source.normalised(pool, bn)
        move_running_statistics([bn], [mean], [variance])
        return Term(x)


class ReLUConvBN(Operation):
    """ReLU, convolution, batch normalisation: the preprocessing of a cell's input."""

    def __init__(self, C_in: int, C_out: int, affine: bool = True) -> None:
        super().__init__()
        self.op = nn.Sequential(nn.ReLU(), nn.Conv2d(C_in, C_out, 1, bias=False), nn.BatchNorm2d(C_out, affine=affine))

    def term(self, source: Node) -> Term:
        _, conv, bn = self.op
        return Term(pointwise_of_parts([node.relu.x for node in source.nodes], conv), None, None, bn)


class FactorizedReduce(Operation):
    """Halves height and width: two pointwise convolutions with stride 2, the second one pixel further, side by side."""

    def __init__(self, C_in: int, C_out: int, affine: bool = True) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def term(self, source: Node) -> Term:
        # The pixels first, then the convolution: oneDNN's backward pass of a strided 1x1 convolution of few channels
        # writes beyond its memory (PyTorch 2.14, channels_last), and this is as fast.
        even, odd = [node.even.x for node in source.nodes], [node.odd.x for node in source.nodes]
        x = torch.cat([pointwise_of_parts(even, self.conv_1), pointwise_of_parts(odd, self.conv_2)], dim=1)
        x, mean = centred(x) if normalised_by_hand(x, self.bn) else (x, None)
        return Term(x, mean, None, self.bn)


class DilConv(Operation):
    """ReLU, depthwise convolution with dilation 2, pointwise convolution, batch normalisation."""

    def __init__(self, C_in: int, C_out: int, kernel_size: int, stride: int, affine: bool = True) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, kernel_size - 1, dilation=2, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def term(self, source: Node) -> Term:
        _, depthwise, pointwise, bn = self.op
        image = source.even if depthwise.stride[0] == 2 else source.relu  # with dilation 2 every tap is an even pixel
        return separable(image, depthwise, pointwise, bn)


class SepConv(Operation):
    """Twice: ReLU, depthwise convolution, pointwise convolution, batch normalisation; the stride is the first one's."""

    def __init__(self, C_in: int, C_out: int, kernel_size: int, stride: int, affine: bool = True) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_in, 1, bias=False),
            nn.BatchNorm2d(C_in, affine=affine),
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, 1, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def term(self, source: Node) -> Term:
        _, depthwise1, pointwise1, bn1, _, depthwise2, pointwise2, bn2 = self.op
        x = F.relu_(evaluate(separable(source.relu, depthwise1, pointwise1, bn1)))
        return separable(Image(x), depthwise2, pointwise2, bn2)


# ---- sums of terms -------------------------------------------------------------------------------------------------


def evaluate(term: Term) -> Tensor:
    """bn(conv(x))."""
    x, mean, conv, bn = term
    if mean is not None:
        return normalised_sum([term], bn.weight[None] if bn.affine else None, bn.bias)
    x = x if conv is None else conv(x)
    return x if bn is None else bn(x)


def fused_sum(terms: list[Term]) -> Tensor:
    """The sum of the terms in evaluation mode, at once for those whose normalisation is part of their convolution."""
    fused = [term for term in terms if isinstance(term.bn, nn.Identity)]
    others = [evaluate(term) for term in terms if not isinstance(term.bn, nn.Identity)]
    if not fused:
        return sum(others[1:], start=others[0])
    xs, _, convs, _ = zip(*fused, strict=True)
    y = pointwise(xs, [conv.weight for conv in convs], sum(conv.bias for conv in convs))
    for other in others:
        y.add_(other)
    return y


def weighted_sum(terms: list[Term], weights: list[Tensor]) -> Tensor:
    """sum of weights[k] * terms[k], the weights being scalars and the normalisations without affine part."""
    if any(term.mean is not None for term in terms):
        order = sorted(range(len(terms)), key=lambda k: terms[k].bn is None)
        gain = torch.stack([weights[k] for k in order])[:, None]
        return normalised_sum([terms[k] for k in order], gain, None)
    total = None
    for (x, _, conv, bn), weight in zip(terms, weights, strict=True):
        x = x if conv is None else conv(x)
        y = x * weight if bn is None else scaled_bn(x, bn, weight)
        total = y if total is None else total.add_(y)
    return total


def scaled_bn(x: Tensor, bn: nn.BatchNorm2d, scale: Tensor) -> Tensor:
    """bn(x) * scale, with the scale as the normalisation's gain; bn has none of its own."""
    if bn.training:
        bn.num_batches_tracked.add_(1)
    gain = scale.expand(bn.num_features).contiguous()
    return F.batch_norm(x, bn.running_mean, bn.running_var, gain, None, bn.training, bn.momentum, bn.eps)


def by_hand(x: Tensor) -> bool:
    """Whether the backward passes of this module are used: where gradients are needed on a CPU at full precision."""
    return x.is_cpu and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def normalised_by_hand(x: Tensor, bn: nn.Module | None) -> bool:
    return isinstance(bn, nn.BatchNorm2d) and bn.training and by_hand(x)


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """x minus its mean over batch and pixels, in place, and that mean (C). No normalisation notices the difference."""
    X = rows(x.detach())
    mean = X.new_full((len(X),), 1 / len(X)) @ X
    return x.sub_(mean[:, None, None]), mean


@torch.no_grad()
def move_running_statistics(bns: list[nn.BatchNorm2d], means: list[Tensor], variances: list[Tensor]) -> None:
    """What nn.BatchNorm2d does to its buffers in training mode, given the means and unbiased variances (C)."""
    momentum = bns[0].momentum
    torch._foreach_lerp_([bn.running_mean for bn in bns], means, momentum)
    torch._foreach_lerp_([bn.running_var for bn in bns], variances, momentum)
    torch._foreach_add_([bn.num_batches_tracked for bn in bns], 1)


def normalised_sum(terms: list[Term], gain: Tensor | None, shift: Tensor | None) -> Tensor:
    """sum over the terms of gain * normalised(conv(x)), and of gain * x where bn is None; these come last.

    gain broadcasts to (terms, C); None: 1. shift is (C) or None. Moves the running statistics.
    """
    bns = [term.bn for term in terms if term.bn is not None]
    K = len(bns)
    xs, convs = [term.x for term in terms], [term.conv for term in terms[:K]]
    P = [None if conv is None else conv.weight for conv in convs]
    y, variances = NormalisedSum.apply(bns[0].eps, K, gain, shift, *P, *xs)
    means = [term.mean if p is None else p.detach().flatten(1) @ term.mean for term, p in zip(terms, P, strict=False)]
    count = y.numel() // y.shape[1]
    move_running_statistics(bns, means, list((variances * (count / (count - 1))).unbind()))
    return y


def rows(x: Tensor) -> Tensor:
    """The pixels of x (N, C, H, W) as the rows of a matrix (N*H*W, C); no copy when x is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def empty_images(like: Tensor, C: int) -> Tensor:
    """A channels_last tensor of the size of ``like`` (N, _, H, W) with C channels."""
    N, _, H, W = like.shape
    return torch.empty((N, C, H, W), dtype=like.dtype, memory_format=torch.channels_last)


def inner_products(Xs: list[Tensor], Ys: list[Tensor]) -> Tensor:
    """The stacked X'Y of matrices with many rows, computed in parts that threads can share."""
    Xs, Ys = ([M.view(gcd(len(M), 8), -1, M.shape[1]) for M in Ms] for Ms in (Xs, Ys))
    return torch.stack([torch.bmm(X.mT, Y).sum(0) for X, Y in zip(Xs, Ys, strict=True)])


class NormalisedSum(Function):
    """Batch normalisation of a 1x1 convolution is itself a 1x1 convolution, and a sum of them is computed as such.

    With the centred pixels x of the batch as rows of X, n of them, and S = X'X / n their covariance, the outputs P x of
    a convolution have variances v = diag(P S P'), so that with gain s and shift t

        y = sum of A x + t,    A = diag(s r) P,    r = (v + eps)^(-1/2).

    S is a C x C matrix: this reads X twice and writes y once, where convolution and normalisation pass over large
    tensors six times, and the backward pass needs nothing but X. Returns y and the v.
    """

    @staticmethod
    def forward(ctx, eps: float, K: int, gain: Tensor | None, shift: Tensor | None, *weights_and_xs: Tensor):
        weights, xs, zs = weights_and_xs[:K], weights_and_xs[K : 2 * K], weights_and_xs[2 * K :]
        X = [rows(x) for x in xs]
        P = torch.stack([identity(x) if w is None else w.flatten(1) for x, w in zip(X, weights, strict=True)])
        S = inner_products(X, X).div_(len(X[0]))
        PS = P @ S
        v = (PS * P).sum(2)
        r = (v + eps).rsqrt_()
        A = P * (r if gain is None else r * gain[:K])[:, :, None]
        y = empty_images(xs[0], P.shape[1])
        Y = rows(y)
        if shift is None:
            torch.mm(X[0], A[0].t(), out=Y)
        else:
            torch.addmm(shift, X[0], A[0].t(), out=Y)
        for k in range(1, K):
            Y.addmm_(X[k], A[k].t())
        for k, z in enumerate(zs):
            Y.addcmul_(rows(z), gain[K + k])
        ctx.K = K
        ctx.save_for_backward(P, gain, PS, r, A, *xs, *zs)
        ctx.mark_non_differentiable(v)
        ctx.set_materialize_grads(False)
        return y, v

    @staticmethod
    def backward(ctx, dy: Tensor, _):
        K, need = ctx.K, ctx.needs_input_grad
        P, gain, PS, r, A, *xs = ctx.saved_tensors
        xs, zs = xs[:K], xs[K:]
        X, G = [rows(x) for x in xs], rows(dy)
        n = len(G)
        d = G.new_full((n,), 1 / n) @ G  # mean of dy
        dA = inner_products([G] * K, X)
        q = (dA * P).sum(2)  # the gradient of s r
        s = r if gain is None else r * gain[:K]
        dv = q * s * r * r * -0.5
        dgain = None
        if need[2]:
            dgain = (q * r).sum_to_size(gain[:K].shape)
            if zs:
                g = G.reshape(-1)
                dgain = torch.cat([dgain, torch.stack([torch.dot(g, rows(z).reshape(-1)) for z in zs])[:, None]])
        dP = [None] * K
        if any(need[4 : 4 + K]):
            all_dP = (dA * s[:, :, None]).add_(PS * (2 * dv)[:, :, None])[..., None, None].unbind()
            dP = [dP if needed else None for dP, needed in zip(all_dP, need[4 : 4 + K], strict=True)]
        dx = [None] * K
        if any(need[4 + K : 4 + 2 * K]):
            # x acts through S and through A x; because it is centred, the mean of its gradient does not count.
            M = (P.mT * dv[:, None]) @ P * (2 / n)
            centred_G = G - d
            for k, x in enumerate(xs):
                if need[4 + K + k]:
                    dx[k] = empty_images(x, x.shape[1])
                    torch.mm(X[k], M[k], out=rows(dx[k])).addmm_(centred_G, A[k])
        N, C, H, W = dy.shape
        G = G.view(N, H, W, C).permute(0, 3, 1, 2)  # dy, channels_last
        dz = [G * gain[K + k] if need[4 + 2 * K + k] else None for k in range(len(zs))]
        return None, None, dgain, d * n if need[3] else None, *dP, *dx, *dz


def identity(X: Tensor) -> Tensor:
    return torch.eye(X.shape[1], dtype=X.dtype)


# ---- depthwise convolution -----------------------------------------------------------------------------------------


def separable(image: Image, conv: nn.Conv2d, pointwise: nn.Conv2d, bn: nn.Module) -> Term:
    """bn(pointwise(conv(image))) for a depthwise convolution with `same` padding, on a CPU that of `Depthwise`.

    With dilation 2, a stride of 2 has been taken already.
    """
    stride, dilation = conv.stride[0], conv.dilation[0]
    if stride == dilation == 2:
        stride = dilation = 1
    if not by_hand(image.x):
        padding = dilation * (conv.kernel_size[0] // 2)
        x = F.conv2d(image.x, conv.weight, conv.bias, stride, padding, dilation, conv.groups)
        return Term(x, None, pointwise, bn)
    mean = None
    if normalised_by_hand(image.x, bn):
        mean = convolve(image.mean, conv.weight.detach(), stride, dilation).mean((0, 2, 3))
    return Term(Depthwise.apply(image.x, conv.weight, mean, stride, dilation), mean, pointwise, bn)


def average(x: Tensor) -> Tensor:
    """Average pooling 3x3 with stride 1: the sum of the pixels there are, divided by their number."""
    kernel, image = x.new_ones(x.shape[1], 1, 3, 3), x.new_ones(1, 1, *x.shape[2:])
    return Depthwise.apply(x, kernel, None, 1, 1).mul_(1 / convolve(image, kernel[:1], 1, 1))


def every_second(x: Tensor, first: int) -> Tensor:
    """x[:, :, first::2, first::2], channels_last."""
    if by_hand(x):
        return EverySecond.apply(x, first)
    return x[:, :, first::2, first::2].contiguous(memory_format=torch.channels_last)


class EverySecond(Function):
    """every_second, whose backward pass stays channels_last."""

    @staticmethod
    def forward(ctx, x: Tensor, first: int) -> Tensor:
        ctx.shape, ctx.first = x.shape, first
        return x[:, :, first::2, first::2].contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, dy: Tensor):
        N, C, H, W = ctx.shape
        dx = dy.new_zeros(N, H, W, C).permute(0, 3, 1, 2)
        dx[:, :, ctx.first :: 2, ctx.first :: 2] = dy
        return dx, None


class Depthwise(Function):
    """Depthwise convolution with `same` padding, minus its mean (C) if given, which is a constant.

    The backward pass stays in the library's fast cases.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, mean: Tensor | None, stride: int, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.dilation = stride, dilation
        return convolve(x, weight, stride, dilation, None if mean is None else -mean)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            if ctx.stride == 1:  # correlation with the flipped kernel
                dx = convolve(dy, weight.flip(2, 3), 1, ctx.dilation)
            else:
                dx = convolution_backward(dy, x, weight, [2, 2], [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(x, dy, weight, ctx.stride, ctx.dilation)
        return dx, dw, None, None, None


def convolve(x: Tensor, weight: Tensor, stride: int, dilation: int, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, stride, dilation * (weight.shape[-1] // 2), dilation, x.shape[1])


def convolution_backward(dy, x, weight, stride: list[int], which: list[bool]) -> tuple[Tensor, ...]:
    """The gradients with respect to (x, weight, bias) of a depthwise convolution with `same` padding."""
    padding = [size // 2 for size in weight.shape[2:]]
    groups = x.shape[1]
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, [1, 1], False, [0, 0], groups, which
    )


def weight_gradient(x: Tensor, dy: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    """dw[c, 0, i, j] = sum over images and pixels of dy[p] x[stride * p + dilation * (i - k//2, j - k//2)].

    oneDNN is fast for kernels of three columns without dilation, of any height. Rows apart are rows of a taller kernel.
    Columns d apart are neighbours when d adjacent columns are taken as one with d times the channels, which is a view
    of a channels_last tensor; and a kernel of five columns is three neighbours and three columns twice as far apart.
    """
    k = weight.shape[-1]
    if stride == 2:
        near = three_columns_gradient(x, dy, k, [2, 2])
        if k == 5:
            x = x[..., ::2].contiguous(memory_format=torch.channels_last)
            far = three_columns_gradient(x, dy, k, [2, 1])
    else:
        height, width = dilation * (k - 1) + 1, dilation * (k // 2)
        H, W = x.shape[2:]
        if H < height or W % width:
            x, dy = (F.pad(t, (0, -W % width, 0, max(0, height - H))) for t in (x, dy))
        near = three_columns_gradient(x, dy, height, [1, 1], dilation)
        if k == 5:
            far = three_columns_gradient(x, dy, height, [1, 1], 2 * dilation)
    if k == 5:
        near = torch.stack([far[..., 0], *near.unbind(-1), far[..., 2]], dim=-1)
    return near[:, :, ::dilation]


def three_columns_gradient(x: Tensor, dy: Tensor, height: int, stride: list[int], apart: int = 1) -> Tensor:
    """The gradient (C, 1, height, 3) of a depthwise kernel whose columns lie ``apart``; x (N, C, H, W)."""
    C = x.shape[1]
    x, dy = join_columns(x, apart), join_columns(dy, apart)
    kernel = x.new_empty(x.shape[1], 1, height, 3)  # its shape is all that is used
    gradient = convolution_backward(dy, x, kernel, stride, [False, True, False])[1]
    return gradient.view(apart, C, 1, height, 3).sum(0)


def join_columns(x: Tensor, number: int) -> Tensor:
    """(N, C, H, W) -> (N, number * C, H, W / number), a view of a channels_last tensor."""
    N, C, H, W = x.shape
    return x.permute(0, 2, 3, 1).reshape(N, H, W // number, number * C).permute(0, 3, 1, 2)
