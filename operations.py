"""The candidate operations of a cell (OPS: primitive name -> module), and the arithmetic that they share.

Each operation is the plain DARTS one: its ``op`` is the Sequential whose call would compute it, and whose parameter
names are those of released checkpoints. What is particular here: an operation can be called on a `Node`, which keeps
what several operations derive from one tensor (its ReLU, its pooled copies), and with a ``scale``, the architecture's
weight of the operation, which becomes the gain of its last batch normalisation instead of one more pass over the
output. On a CPU the two costly patterns, depthwise convolution and pointwise convolution + batch normalisation, have
backward passes of their own.
"""

from __future__ import annotations

from functools import cached_property

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
        self._pooled: dict[tuple, tuple] = {}

    @cached_property
    def relu(self) -> Tensor:
        return F.relu(self.x)

    def pooled(self, pool: nn.Module) -> Tensor:
        """pool(x); the same tensor for every pooling layer of this kind and stride."""
        key = (type(pool), pool.stride)
        if key not in self._pooled:
            self._pooled[key] = pool(self.x)
        return self._pooled[key]

    def pooled_normalised(self, pool: nn.Module, bn: nn.BatchNorm2d) -> Tensor:
        """bn(pool(x)) for a bn without affine part, in training mode; the running statistics of each bn move."""
        key = (type(pool), pool.stride, "normalised")
        if key not in self._pooled:
            y, mean, inverse_std = torch.native_batch_norm(
                self.pooled(pool), None, None, None, None, True, bn.momentum, bn.eps
            )
            self._pooled[key] = y, mean.detach(), inverse_std.detach() ** -2 - bn.eps
        y, mean, variance = self._pooled[key]
        move_running_statistics(bn, mean, variance, y.numel() // y.shape[1])
        return y


def as_node(x: Tensor | Node) -> Node:
    return x if isinstance(x, Node) else Node(x)


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


class Zero(nn.Module):
    """`none`: zeros. The supernet never calls it."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor | Node, scale: Tensor | None = None) -> Tensor:
        return torch.zeros_like(as_node(x).x[:, :, :: self.stride, :: self.stride])


class Identity(nn.Module):
    """`skip_connect` at stride 1; in P-DARTS' search followed by dropout with probability ``dropout``."""

    dropout = 0.0

    def forward(self, x: Tensor | Node, scale: Tensor | None = None) -> Tensor:
        x = as_node(x).x
        if self.dropout > 0:
            x = F.dropout(x, self.dropout, self.training)
        return scaled(x, scale)


class Pool(nn.Sequential):
    """A pooling layer, in the supernet followed by a BatchNorm2d without affine part."""

    def forward(self, x: Tensor | Node, scale: Tensor | None = None) -> Tensor:
        node, pool = as_node(x), self[0]
        if len(self) == 1:
            return scaled(node.pooled(pool), scale)
        if self.training:
            return scaled(node.pooled_normalised(pool, self[1]), scale)
        return scaled(self[1](node.pooled(pool)), scale)


class ReLUConvBN(nn.Module):
    """ReLU, convolution, batch normalisation: the preprocessing of a cell's input."""

    def __init__(self, C_in: int, C_out: int, affine: bool = True) -> None:
        super().__init__()
        self.op = nn.Sequential(nn.ReLU(), nn.Conv2d(C_in, C_out, 1, bias=False), nn.BatchNorm2d(C_out, affine=affine))

    def forward(self, x: Tensor | Node, scale: Tensor | None = None) -> Tensor:
        return pointwise_bn(as_node(x).relu, self.op[1], self.op[2], scale)


class FactorizedReduce(nn.Module):
    """Halves height and width: two pointwise convolutions with stride 2, the second one pixel further, side by side."""

    def __init__(self, C_in: int, C_out: int, affine: bool = True) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x: Tensor | Node, scale: Tensor | None = None) -> Tensor:
        x = as_node(x).relu
        return scaled_bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1), self.bn, scale)


class DilConv(nn.Module):
    """ReLU, depthwise convolution with dilation 2, pointwise convolution, batch normalisation."""

    def __init__(self, C_in: int, C_out: int, kernel_size: int, stride: int, affine: bool = True) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, kernel_size - 1, dilation=2, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x: Tensor | Node, scale: Tensor | None = None) -> Tensor:
        _, depthwise_conv, pointwise_conv, bn = self.op
        return pointwise_bn(depthwise(as_node(x).relu, depthwise_conv), pointwise_conv, bn, scale)


class SepConv(nn.Module):
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

    def forward(self, x: Tensor | Node, scale: Tensor | None = None) -> Tensor:
        _, depthwise_1, pointwise_1, bn_1, _, depthwise_2, pointwise_2, bn_2 = self.op
        x = F.relu_(pointwise_bn(depthwise(as_node(x).relu, depthwise_1), pointwise_1, bn_1))
        return pointwise_bn(depthwise(x, depthwise_2), pointwise_2, bn_2, scale)


# ---- batch normalisation -------------------------------------------------------------------------------------------


def scaled_bn(x: Tensor, bn: nn.Module, scale: Tensor | None) -> Tensor:
    """bn(x) * scale, with the scale as the normalisation's gain if it has none of its own."""
    if scale is None or not isinstance(bn, nn.BatchNorm2d) or bn.affine:
        return scaled(bn(x), scale)
    if bn.training:
        bn.num_batches_tracked.add_(1)
    gain = scale.expand(bn.num_features).contiguous()
    return F.batch_norm(x, bn.running_mean, bn.running_var, gain, None, bn.training, bn.momentum, bn.eps)


@torch.no_grad()
def move_running_statistics(bn: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """What nn.BatchNorm2d does to its buffers in training mode; mean and biased variance (C) over ``count`` values."""
    bn.running_mean.lerp_(mean, bn.momentum)
    bn.running_var.lerp_(variance * (count / (count - 1)), bn.momentum)
    bn.num_batches_tracked.add_(1)


def pointwise_bn(x: Tensor, conv: nn.Conv2d, bn: nn.Module, scale: Tensor | None = None) -> Tensor:
    """bn(conv(x)) * scale for a 1x1 convolution; on a CPU in training mode by `PointwiseBN`."""
    if not (x.is_cpu and bn.training and isinstance(bn, nn.BatchNorm2d)):
        return scaled_bn(conv(x), bn, scale)
    if bn.affine:
        y, mean, variance = PointwiseBN.apply(x, conv.weight, bn.weight, bn.bias, bn.eps)
        y = scaled(y, scale)
    else:
        y, mean, variance = PointwiseBN.apply(x, conv.weight, scale, None, bn.eps)
    move_running_statistics(bn, mean, variance, x.numel() // x.shape[1])
    return y


def rows(x: Tensor) -> Tensor:
    """The pixels of x (N, C, H, W) as the rows of a matrix (N*H*W, C); no copy when x is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class PointwiseBN(Function):
    """Batch normalisation of a 1x1 convolution is itself a 1x1 convolution, and is computed as one.

    With the pixels x of the batch as rows of X, their mean mu and covariance S, the convolution's output P x has mean
    P mu and variances v = diag(P S P'), so that with gain s and shift t

        y = A (x - mu) + t,    A = diag(s r) P,    r = (v + eps)^(-1/2).

    S is a C x C matrix: this reads X twice and writes y once, where convolution and normalisation pass over large
    tensors six times, and the backward pass needs nothing but X. Returns y, P mu, v.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float):
        X, P = rows(x), weight.flatten(1)
        n = X.shape[0]
        mu = X.new_full((n,), 1 / n) @ X
        S = torch.addmm(torch.outer(mu, mu), X.t(), X, beta=-1, alpha=1 / n)
        v = ((P @ S) * P).sum(1).clamp_(min=0)
        r = (v + eps).rsqrt_()
        A = P * (r if gain is None else r * gain)[:, None]
        bias = -(A @ mu) if shift is None else torch.addmv(shift, A, mu, alpha=-1)
        N, _, H, W = x.shape
        y = torch.empty((N, len(P), H, W), dtype=x.dtype, memory_format=torch.channels_last)
        torch.addmm(bias, X, A.t(), out=rows(y))
        mean = P @ mu
        ctx.save_for_backward(x, weight, gain, mu, S, r, A)
        ctx.mark_non_differentiable(mean, v)
        ctx.set_materialize_grads(False)
        return y, mean, v

    @staticmethod
    def backward(ctx, dy: Tensor, *_):
        x, weight, gain, mu, S, r, A = ctx.saved_tensors
        X, P, G = rows(x), weight.flatten(1), rows(dy)
        n = X.shape[0]
        d = G.new_ones(n) @ G  # sum of dy: the shift's gradient
        dA = torch.addr(G.t() @ X, d, mu, alpha=-1)  # sum of dy (x - mu)'
        q = (dA * P).sum(1)  # the gradient of s r
        dgain = None
        if gain is not None and ctx.needs_input_grad[2]:
            dgain = (q * r).sum_to_size(gain.shape)
        s = r if gain is None else r * gain
        dv = -0.5 * q * s * r * r
        dx = dP = None
        if ctx.needs_input_grad[1]:
            dP = (dA * s[:, None] + (P @ S) * (2 * dv)[:, None]).view_as(weight)
        if ctx.needs_input_grad[0]:
            # x acts through A x, through S, and through mu, whose part makes the gradient's mean the shift's alone.
            M = (P.t() * dv) @ P * (2 / n)
            dx = torch.empty_like(x, memory_format=torch.channels_last)
            torch.addmm(mu @ M + (d @ A) / n, X, M, beta=-1, out=rows(dx)).addmm_(G, A)
        return dx, dP, dgain, d if ctx.needs_input_grad[3] else None, None


# ---- depthwise convolution -----------------------------------------------------------------------------------------


def depthwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(x) for a depthwise convolution with `same` padding; on a CPU with the backward pass of `Depthwise`."""
    if not (x.is_cpu and torch.is_grad_enabled()):
        return conv(x)
    dilation, stride = conv.dilation[0], conv.stride[0]
    if stride == 2 and dilation == 2:  # every tap falls on an even pixel: the odd ones are never read
        x, dilation, stride = x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last), 1, 1
    if stride == 2:
        return conv(x)
    return Depthwise.apply(x, conv.weight, dilation)


class Depthwise(Function):
    """Depthwise convolution with stride 1 and `same` padding, whose backward pass stays in the library's fast cases."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return convolve(x, weight, dilation)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = dw = None
        if ctx.needs_input_grad[0]:  # correlation with the flipped kernel
            dx = convolve(dy, weight.flip(2, 3), ctx.dilation)
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(x, dy, weight, ctx.dilation)
        return dx, dw, None


def convolve(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return F.conv2d(x, weight, None, 1, dilation * (weight.shape[-1] // 2), dilation, x.shape[1])


def weight_gradient(x: Tensor, dy: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """dw[c, 0, i, j] = sum over images and pixels of dy[p] x[p + dilation * (i - k//2, j - k//2)].

    oneDNN is fast for kernels of three columns without dilation, of any height. Rows apart are rows of a taller kernel.
    Columns d apart are neighbours when d adjacent columns are taken as one with d times the channels, which is a view of
    a channels_last tensor; and a kernel of five columns is three neighbours and three columns twice as far apart.
    """
    k, height, width = weight.shape[-1], dilation * (weight.shape[-1] - 1) + 1, dilation * (weight.shape[-1] // 2)
    H, W = x.shape[2:]
    if H < height or W % width:
        x, dy = (F.pad(t, (0, -W % width, 0, max(0, height - H))) for t in (x, dy))
    near = three_columns_gradient(x, dy, height, dilation)
    if k == 5:
        far = three_columns_gradient(x, dy, height, 2 * dilation)
        near = torch.stack([far[..., 0], *near.unbind(-1), far[..., 2]], dim=-1)
    return near[:, :, ::dilation]


def three_columns_gradient(x: Tensor, dy: Tensor, height: int, apart: int) -> Tensor:
    """The gradient (C, 1, height, 3) of a depthwise kernel whose columns lie ``apart``; x and dy (N, C, H, W)."""
    N, C, H, W = x.shape
    x, dy = (t.permute(0, 2, 3, 1).reshape(N, H, W // apart, -1).permute(0, 3, 1, 2) for t in (x, dy))
    kernel = x.new_empty(x.shape[1], 1, height, 3)  # its shape is all that is used
    padding = [height // 2, 1]
    gradient = torch.ops.aten.convolution_backward(
        dy, x, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], x.shape[1], [False, True, False]
    )[1]
    return gradient.view(apart, C, 1, height, 3).sum(0)
