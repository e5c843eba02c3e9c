"""The candidate operations of a cell (OPS: primitive name -> module), and the arithmetic that they share.

Each operation is the plain DARTS one: its ``op`` is the Sequential whose call would compute it, and whose parameter
names are those of released checkpoints. What is particular here: an operation can be called on a `Node`, which keeps
what several operations derive from one tensor (its ReLU, its pooled copies), and it can leave its last convolution and
normalisation to the node that sums it with others, as a `Term`: an operation's weight is then the gain of its
normalisation instead of one more pass over its output. A cell's output stays a `Concatenation` of its nodes. On a CPU
the costly patterns, depthwise convolution, pointwise convolution of several tensors, and sums of pointwise convolution
+ batch normalisation, have backward passes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
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
        return Image(self._even_and_odd[0])

    @cached_property
    def odd(self) -> Image:
        return Image(self._even_and_odd[1])

    @cached_property
    def _even_and_odd(self) -> tuple[Tensor, Tensor]:
        return even_and_odd(self.relu.x)

    def pooled(self, pool: nn.Module) -> Tensor:
        """pool(x), the same tensor for every pooling layer of this kind and stride."""
        key = (type(pool), pool.stride)
        if key not in self._pooled:
            averages = isinstance(pool, nn.AvgPool2d) and pool.stride == 1 and by_hand(self.x)
            self._pooled[key] = average(self.x) if averages else pool(self.x)
        return self._pooled[key]

    def centred(self, pool: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """pool(x) minus its mean, the same tensor again (in place: `pooled` gives it too), mean and variance (C)."""
        key = (type(pool), pool.stride, "centred")
        if key not in self._pooled:
            self._pooled[key] = centred(self.pooled(pool))
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
        self._taps: dict[tuple, Tensor] = {}

    @cached_property
    def mean(self) -> Tensor:
        """The mean (H * W, C) over the batch."""
        N, C, H, W = self.x.shape
        return column_means(rows(self.x.detach()).view(N, -1)).view(H * W, C)

    def taps(self, k: int, stride: int, dilation: int) -> Tensor:
        """(C, k * k): the means over batch and output pixels of what the taps of a `same` convolution read."""
        key = k, stride, dilation
        if key not in self._taps:
            self._taps[key] = (taps(*self.x.shape[2:], *key, self.x.dtype) @ self.mean).t().contiguous()
        return self._taps[key]


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
    if conv.bias is None and by_hand(xs[0]):
        return PointwiseOfParts.apply(conv.weight, *xs)
    return pointwise(xs, conv.weight.split([x.shape[1] for x in xs], dim=1), conv.bias)


class Term(NamedTuple):
    """An operation's output bn(conv(x)), not computed yet; without conv and bn it is x.

    If its normalisation is computed by hand, x has been centred: ``mean`` (C) was subtracted; and without conv the
    variance (C) of x is known.
    """

    x: Tensor
    mean: Tensor | None = None
    conv: nn.Conv2d | None = None  # 1x1
    bn: nn.Module | None = None
    variance: Tensor | None = None


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
        if not normalised_by_hand(source.x, bn):
            return Term(source.pooled(pool), bn=bn)
        x, mean, variance = source.centred(pool)
        return Term(x, mean, None, bn, variance)


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
        x, mean, variance = centred(x) if normalised_by_hand(x, self.bn) else (x, None, None)
        return Term(x, mean, None, self.bn, variance)


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
    x, mean, conv, bn, _ = term
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
    xs, _, convs, *_ = zip(*fused, strict=True)
    y = pointwise(xs, [conv.weight for conv in convs], sum(conv.bias for conv in convs))
    for other in others:
        y.add_(other)
    return y


def weighted_sum(terms: list[Term], weights: list[Tensor]) -> Tensor:
    """sum of weights[k] * terms[k], the weights being scalars and the normalisations without affine part."""
    if any(term.mean is not None for term in terms):
        order = sorted(range(len(terms)), key=lambda k: (terms[k].conv is None, terms[k].bn is None))
        gain = torch.stack([weights[k] for k in order])[:, None]
        return normalised_sum([terms[k] for k in order], gain, None)
    total = None
    for (x, _, conv, bn, _), weight in zip(terms, weights, strict=True):
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


def centred(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x minus its mean over batch and pixels, in place, that mean and the variance (C).

    No normalisation notices the difference.
    """
    X = rows(x.detach())
    mean = column_means(X)
    x.sub_(mean[:, None, None])
    return x, mean, column_means(X * X)


def column_means(X: Tensor) -> Tensor:
    """The means (C) of a matrix (n, C) with many rows."""
    return averaging(X.shape[0], X.dtype) @ X


@lru_cache(maxsize=32)
def averaging(n: int, dtype: torch.dtype) -> Tensor:
    """The vector whose inner product with n numbers is their mean."""
    return torch.full((n,), 1 / n, dtype=dtype)


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
    convolved = [term for term in terms if term.conv is not None]
    others = [term for term in terms[len(convolved) :] if term.bn is not None]
    weights = [term.conv.weight for term in convolved]
    means = torch.stack([term.mean for term in convolved]) if convolved else None
    variances = torch.stack([term.variance for term in others]) if others else None
    xs = [term.x for term in terms]
    eps = terms[0].bn.eps
    y, means, variances = NormalisedSum.apply(eps, len(weights), gain, shift, means, variances, *weights, *xs)
    n = y.numel() // y.shape[1]
    bns = [term.bn for term in convolved + others]
    means = [*(means if convolved else ()), *(term.mean for term in others)]
    move_running_statistics(bns, means, list((variances * (n / (n - 1))).unbind()))
    return y


def rows(x: Tensor) -> Tensor:
    """The pixels of x (N, C, H, W) as the rows of a matrix (N*H*W, C); no copy when x is channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    N, C, H, W = x.shape
    return x.as_strided((N * H * W, C), (C, 1))


def empty_images(like: Tensor, C: int) -> Tensor:
    """A channels_last tensor of the size of ``like`` (N, _, H, W) with C channels."""
    N, _, H, W = like.shape
    return torch.empty((N, C, H, W), dtype=like.dtype, memory_format=torch.channels_last)


def images(X: Tensor, like: Tensor) -> Tensor:
    """The inverse of `rows`: a channels_last tensor (N, C, H, W) whose N, H and W are those of ``like``."""
    N, _, H, W = like.shape
    C = X.shape[1]
    return X.as_strided((N, C, H, W), (H * W * C, 1, W * C, C))


def inner_products(Xs: list[Tensor], Ys: list[Tensor]) -> Tensor:
    """The stacked X'Y of matrices with many rows, computed in parts that threads can share."""
    Xs, Ys = ([M.view(gcd(M.shape[0], 8), -1, M.shape[1]) for M in Ms] for Ms in (Xs, Ys))
    return torch.stack([torch.bmm(X.mT, Y).sum(0) for X, Y in zip(Xs, Ys, strict=True)])


class NormalisedSum(Function):
    """Batch normalisation of a 1x1 convolution is itself a 1x1 convolution, and a sum of them is computed as such.

    With the centred pixels x of the batch as rows of X, n of them, and S = X'X / n their covariance, the outputs P x of
    a convolution have variances v = diag(P S P'), so that with gain s and shift t

        y = sum of A x + t,    A = diag(a) P,    a = s r,    r = (v + eps)^(-1/2).

    S is a C x C matrix: this reads X twice and writes y once, where convolution and normalisation pass over large
    tensors six times, and the backward pass needs nothing but X. Without convolution A = diag(a); without normalisation
    r = 1. Returns y, the means P m of the convolutions (m: what was subtracted), and all v.
    """

    @staticmethod
    def forward(ctx, eps: float, K: int, gain, shift, means, variances, *weights_and_xs: Tensor):
        weights, xs = weights_and_xs[:K], weights_and_xs[K:]
        X = [rows(x) for x in xs]
        v, P, PS, A = variances, None, None, None
        if K:
            P = torch.stack([weight.flatten(1) for weight in weights])
            S = inner_products(X[:K], X[:K]).div_(X[0].shape[0])
            PS = torch.bmm(P, S)
            v = (PS * P).sum(2)
            v = v if variances is None else torch.cat([v, variances])
            means = torch.bmm(P, means[:, :, None]).squeeze(2)
        r = (v + eps).rsqrt_()
        if len(X) > r.shape[0]:
            r = torch.cat([r, r.new_ones(len(X) - r.shape[0], r.shape[1])])
        a = r if gain is None else r * gain
        y = empty_images(xs[0], r.shape[1])
        Y = rows(y)
        if shift is not None:
            Y.copy_(shift)
        if K:
            A = P * a[:K, :, None]
            for k, At in enumerate(A.mT.unbind()):
                Y.addmm_(X[k], At, beta=1 if k or shift is not None else 0)
        elif shift is None:
            Y.zero_()
        for x, scale in zip(X[K:], a[K:].unbind(), strict=True):
            Y.addcmul_(x, scale)
        ctx.K, ctx.normalised = K, v.shape[0]
        ctx.save_for_backward(gain, r, a, P, PS, A, *X)
        ctx.mark_non_differentiable(*(t for t in (means, v) if t is not None))
        ctx.set_materialize_grads(False)
        return y, means, v

    @staticmethod
    def backward(ctx, dy: Tensor, *_):
        K, need_dx = ctx.K, ctx.needs_input_grad[6 + ctx.K :]
        gain, r, a, P, PS, A, *X = ctx.saved_tensors
        G = rows(dy)
        n = G.shape[0]
        d = column_means(G)
        q = []  # the gradient of a
        if K:
            dA = inner_products([G] * K, X[:K])
            q.append((dA * P).sum(2))
        if len(X) > K:
            q.append(torch.stack([column_means(G * x) for x in X[K:]]).mul_(n))
        q = torch.cat(q)
        dv = q * a * r * r * -0.5
        dgain = (q * r).sum_to_size(gain.shape) if ctx.needs_input_grad[2] else None
        dP = [None] * K
        if any(ctx.needs_input_grad[6 : 6 + K]):
            dP = (dA * a[:K, :, None]).addcmul_(PS, dv[:K, :, None], value=2)[..., None, None].unbind()
        dx = [None] * len(X)
        if any(need_dx):
            # x acts through v and through A x; because it is centred, the mean of its gradient does not count.
            centred_G = G - d
            dv = (dv * (2 / n))[:, None]
            if K:
                M = torch.bmm(P.mT * dv[:K], P)
            for k in range(len(X)):
                if need_dx[k]:
                    if k < K:
                        dX = torch.mm(X[k], M[k]).addmm_(centred_G, A[k])
                    elif k < ctx.normalised:
                        dX = torch.mul(X[k], dv[k]).addcmul_(centred_G, a[k])
                    else:
                        dX = torch.mul(G, a[k])
                    dx[k] = images(dX, dy)
        return None, None, dgain, d * n if ctx.needs_input_grad[3] else None, None, None, *dP, *dx


class PointwiseOfParts(Function):
    """A 1x1 convolution (C', C, 1, 1) of xs (N, C/K, H, W) side by side, as matrix products."""

    @staticmethod
    def forward(ctx, weight: Tensor, *xs: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *xs)
        P = weight.flatten(1).t().split([x.shape[1] for x in xs])
        y = empty_images(xs[0], weight.shape[0])
        Y = torch.mm(rows(xs[0]), P[0], out=rows(y))
        for x, p in zip(xs[1:], P[1:], strict=True):
            Y.addmm_(rows(x), p)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        weight, *xs = ctx.saved_tensors
        G, dweight = rows(dy), None
        if ctx.needs_input_grad[0]:
            dweight = torch.cat([*inner_products([G] * len(xs), [rows(x) for x in xs])], dim=1).view_as(weight)
        dxs = [None] * len(xs)
        for k, P in enumerate(weight.flatten(1).split([x.shape[1] for x in xs], dim=1)):
            if ctx.needs_input_grad[1 + k]:
                dxs[k] = images(G.mm(P), dy)
        return dweight, *dxs


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
    means = image.taps(conv.kernel_size[0], stride, dilation) if normalised_by_hand(image.x, bn) else None
    x, mean = Depthwise.apply(image.x, conv.weight, means, stride, dilation)
    return Term(x, mean, pointwise, bn)


@lru_cache(maxsize=32)
def taps(H: int, W: int, k: int, stride: int, dilation: int, dtype: torch.dtype) -> Tensor:
    """(k * k, H * W): the part of the output pixels for which a tap of a `same` convolution reads an image's pixel."""
    offset = dilation * (torch.arange(k) - k // 2)
    read = [
        (stride * torch.arange(-(-size // stride)) + offset[:, None])[..., None] == torch.arange(size)
        for size in (H, W)
    ]
    rows, columns = (r.to(dtype).mean(1) for r in read)
    return torch.kron(rows, columns)


def average(x: Tensor) -> Tensor:
    """Average pooling 3x3 with stride 1: the sum of the pixels there are, divided by their number."""
    C, H, W = x.shape[1:]
    sums, _ = Depthwise.apply(x, x.new_ones(C, 1, 3, 3), None, 1, 1)
    return sums.mul_(reciprocal_counts(H, W, x.dtype))


@lru_cache(maxsize=32)
def reciprocal_counts(H: int, W: int, dtype: torch.dtype) -> Tensor:
    """(1, 1, H, W): one over the number of pixels in the 3x3 window around each."""
    return 1 / F.conv2d(torch.ones(1, 1, H, W, dtype=dtype), torch.ones(1, 1, 3, 3, dtype=dtype), padding=1)


def even_and_odd(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[:, :, ::2, ::2] and x[:, :, 1::2, 1::2], channels_last."""
    if by_hand(x):
        return EvenAndOdd.apply(x)
    return tuple(x[:, :, i::2, i::2].contiguous(memory_format=torch.channels_last) for i in (0, 1))


class EvenAndOdd(Function):
    """even_and_odd, whose backward pass stays channels_last."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return tuple(x[:, :, i::2, i::2].contiguous(memory_format=torch.channels_last) for i in (0, 1))

    @staticmethod
    def backward(ctx, *dys: Tensor | None):
        N, C, H, W = ctx.shape
        dx = next(dy for dy in dys if dy is not None).new_zeros(N, H, W, C).permute(0, 3, 1, 2)
        for i, dy in enumerate(dys):
            if dy is not None:
                dx[:, :, i::2, i::2] = dy
        return dx


class Depthwise(Function):
    """Depthwise convolution with `same` padding; given its `Image.taps`, minus its mean (C), which is a constant.

    The mean of the output is the kernel applied to the means of its taps. The backward pass stays in the library's fast
    cases. Returns the images and the mean (None without taps).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, taps: Tensor | None, stride: int, dilation: int):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.dilation = stride, dilation
        ctx.set_materialize_grads(False)
        if taps is None:
            return convolve(x, weight, stride, dilation), None
        mean = torch.linalg.vecdot(weight.flatten(1), taps)
        ctx.mark_non_differentiable(mean)
        return convolve(x, weight, stride, dilation, -mean), mean

    @staticmethod
    def backward(ctx, dy: Tensor, _):
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
    if number == 1:
        return x
    N, C, H, W = x.shape
    return x.permute(0, 2, 3, 1).reshape(N, H, W // number, number * C).permute(0, 3, 1, 2)
