"""Depthwise convolutions and 3x3 averages whose backward passes are fast on a CPU, with PyTorch's numbers.

oneDNN is fast for the gradient of a kernel of three columns without dilation, of any height, and slow for others; here
every gradient is computed as such ones. Images are channels_last. fast.py uses this where `own_backward` says so.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def own_backward(x: Tensor) -> bool:
    """Whether this file is used: where gradients are needed, on a CPU, in full precision."""
    return x.is_cpu and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def convolve(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """The depthwise convolution of x (N, C, H, W) with weight (C, 1, k, k) and `same` padding."""
    if own_backward(x) and weight.shape[-1] in (3, 5) and 1 in (stride, dilation):
        return Depthwise.apply(x, weight, stride, dilation)
    return convolve_plainly(x, weight, stride, dilation)


def convolve_plainly(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    return F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation, x.shape[1])


def average(x: Tensor) -> Tensor:
    """Average pooling 3x3 with stride 1: the sum of the pixels there are, divided by their number."""
    C, H, W = x.shape[1:]
    return convolve(x, x.new_ones(C, 1, 3, 3)).mul_(reciprocal_counts(H, W, x.dtype))


@lru_cache(maxsize=32)
def reciprocal_counts(H: int, W: int, dtype: torch.dtype) -> Tensor:
    """(1, 1, H, W): one over the number of pixels in the 3x3 window around each."""
    return 1 / F.conv2d(torch.ones(1, 1, H, W, dtype=dtype), torch.ones(1, 1, 3, 3, dtype=dtype), padding=1)


class Depthwise(Function):
    """`convolve` for kernels 3x3 and 5x5, with stride 1 and any dilation, or with stride 2."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
        needed = ctx.needs_input_grad[1] or stride == 2  # for dw, and with stride 2 for dx
        ctx.save_for_backward(x if needed else None, weight)
        ctx.stride, ctx.dilation = stride, dilation
        return convolve_plainly(x, weight, stride, dilation)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = dw = None
        if ctx.needs_input_grad[0] and ctx.stride == 1:  # correlation with the flipped kernel
            dx = convolve_plainly(dy, weight.flip(2, 3), 1, ctx.dilation)
        elif ctx.needs_input_grad[0]:
            dx = differentiate(dy, x, weight, [2, 2], [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            dw = differentiate_weight(x, dy, weight.shape[-1], ctx.stride, ctx.dilation)
        return dx, dw, None, None


def differentiate(dy: Tensor, x: Tensor, weight: Tensor, stride: list[int], which: list[bool]) -> tuple[Tensor, ...]:
    """PyTorch's gradients with respect to (x, weight, bias) of a depthwise convolution with `same` padding."""
    padding, groups = [size // 2 for size in weight.shape[2:]], x.shape[1]
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, [1, 1], False, [0, 0], groups, which
    )


def differentiate_weight(x: Tensor, dy: Tensor, k: int, stride: int, dilation: int) -> Tensor:
    """dw[c, 0, i, j] = sum over images and pixels of dy[p] x[stride * p + dilation * (i - k//2, j - k//2)].

    Rows apart are rows of a taller kernel. Columns d apart are neighbours when d adjacent columns are taken as one with
    d times the channels, which is a view of a channels_last tensor; and a kernel of five columns is three neighbours
    and three columns twice as far apart.
    """
    if stride == 2:
        near = differentiate_three_columns(x, dy, k, [2, 2])
        if k == 5:
            x = x[..., ::2].contiguous(memory_format=torch.channels_last)
            far = differentiate_three_columns(x, dy, k, [2, 1])
    else:
        height, width = dilation * (k - 1) + 1, dilation * (k // 2)
        H, W = x.shape[2:]
        if H < height or W % width:
            x, dy = (F.pad(t, (0, -W % width, 0, max(0, height - H))) for t in (x, dy))
        near = differentiate_three_columns(x, dy, height, [1, 1], dilation)
        if k == 5:
            far = differentiate_three_columns(x, dy, height, [1, 1], 2 * dilation)
    if k == 5:
        near = torch.stack([far[..., 0], *near.unbind(-1), far[..., 2]], dim=-1)
    return near[:, :, ::dilation]


def differentiate_three_columns(x: Tensor, dy: Tensor, height: int, stride: list[int], apart: int = 1) -> Tensor:
    """The gradient (C, 1, height, 3) of a depthwise kernel whose columns lie ``apart``; x (N, C, H, W)."""
    C = x.shape[1]
    x, dy = join_columns(x, apart), join_columns(dy, apart)
    kernel = x.new_empty(x.shape[1], 1, height, 3)  # its shape is all that is used
    gradient = differentiate(dy, x, kernel, stride, [False, True, False])[1]
    return gradient.view(apart, C, 1, height, 3).sum(0)


def join_columns(x: Tensor, number: int) -> Tensor:
    """(N, C, H, W) -> (N, number * C, H, W / number), a view of a channels_last tensor."""
    N, C, H, W = x.shape
    return x.permute(0, 2, 3, 1).reshape(N, H, W // number, number * C).permute(0, 3, 1, 2)
