"""The candidate operations of a cell: OPS, primitive name -> module, and the modules.

To add an operation of your own, write its module here and a line at the end of OPS: the static and the shrinking space
and P-DARTS then have it (they are no longer the published ones, and the tests of these say so), and search, retraining
and pictures take it. An operation is built with the number of channels, the stride
(1, or 2 on the edges of a reduction cell that leave its inputs) and whether its BatchNorm has gain and shift (`affine`,
False in the supernet); its forward must not change its input. Parameter names (`op`, `conv_1`, ...) are those of the
DARTS lineage: released checkpoints load.

The forwards here define the operations; fast.py computes the same numbers in less time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class Zero(nn.Module):
    """`none`: zeros."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class Identity(nn.Module):
    """`skip_connect` at stride 1; in P-DARTS' search followed by dropout with probability ``dropout``."""

    dropout: float | Tensor = 0.0  # a tensor in compiled networks, see `set_probability`

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.dropout, Tensor):
            return x * draws(x, self.dropout, x.shape) if self.training else x
        return F.dropout(x, self.dropout, self.training) if self.dropout > 0 else x


class Pool(nn.Sequential):
    """A pooling layer; in the supernet a BatchNorm2d without gain and shift is appended."""


class ReLUConvBN(nn.Module):
    """ReLU, 1x1 convolution, batch normalisation: the preprocessing of a cell's input."""

    def __init__(self, C_in: int, C_out: int, affine: bool = True) -> None:
        super().__init__()
        self.op = nn.Sequential(nn.ReLU(), nn.Conv2d(C_in, C_out, 1, bias=False), nn.BatchNorm2d(C_out, affine=affine))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class FactorizedReduce(nn.Module):
    """Halves height and width: two 1x1 convolutions with stride 2, the second one pixel further, side by side."""

    def __init__(self, C_in: int, C_out: int, affine: bool = True) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


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

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


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

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def draws(like: Tensor, p: float | Tensor, shape: Sequence[int]) -> Tensor:
    """Numbers of this shape that drop what they multiply with probability p: 0, otherwise 1 / (1 - p)."""
    if isinstance(p, Tensor):
        return torch.bernoulli((1 - p).expand(shape)).div_(1 - p).to(like.dtype)
    return like.new_empty(shape).bernoulli_(1 - p).div_(1 - p)


def set_probability(module: nn.Module, name: str, p: float) -> None:
    """Set ``module.name``, in place where it is a tensor: a compiled network would be compiled anew for each number."""
    if isinstance(tensor := getattr(module, name), Tensor):
        tensor.fill_(p)
    else:
        setattr(module, name, p)
