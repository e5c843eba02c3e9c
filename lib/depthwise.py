"""Backward passes for training on a CPU: several times faster and in less memory than PyTorch's own, the same numbers.

- `NormalisedSum`: the weighted sum of several 1x1 convolutions, each with its batch normalisation, as matrix products.
- `PointwiseOfParts`: a 1x1 convolution of several tensors side by side, without putting them side by side.
- `Depthwise`: a depthwise convolution whose backward pass stays in the cases that oneDNN has fast code for.

fast.py uses them where `own_backward` says so. Tensors are channels_last throughout: pixels are rows of a matrix.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def own_backward(x: Tensor) -> bool:
    """Whether this file's own backward passes are used: where gradients are needed, on a CPU, at full precision."""
    return x.is_cpu and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


# ---- pixels as rows of a matrix -------------------------------------------------------------------------------------


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


def centred(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x minus its mean over batch and pixels, in place, that mean and the variance (C).

    Batch normalisation is invariant to this shift.
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


# ---- sums of 1x1 convolutions with their batch normalisation --------------------------------------------------------


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


@lru_cache(maxsize=32)
def tap_reads(H: int, W: int, k: int, stride: int, dilation: int, dtype: torch.dtype) -> Tensor:
    """(k * k, H * W): the part of the output pixels for which a tap of a `same` convolution reads an image's pixel."""
    offset = dilation * (torch.arange(k) - k // 2)
    read = [
        (stride * torch.arange(-(-size // stride)) + offset[:, None])[..., None] == torch.arange(size)
        for size in (H, W)
    ]
    of_rows, of_columns = (r.to(dtype).mean(1) for r in read)
    return torch.kron(of_rows, of_columns)


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
    if own_backward(x):
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
    """Depthwise convolution with `same` padding; given its `Image.tap_means`, minus its mean (C), which is a constant.

    The mean of the output is the kernel applied to the means of its taps. The backward pass stays in the library's fast
    cases. Returns the images and the mean (None without these).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, tap_means: Tensor | None, stride: int, dilation: int):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.dilation = stride, dilation
        ctx.set_materialize_grads(False)
        if tap_means is None:
            return convolve(x, weight, stride, dilation), None
        mean = torch.linalg.vecdot(weight.flatten(1), tap_means)
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
