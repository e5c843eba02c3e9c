"""The candidate operations of a cell: OPS, primitive name -> module, and the modules.

To add an operation of your own, write its module here and a line at the end of OPS: genotypes may use it from then on,
and a search that has it in its space (PRIMITIVES and SPACES of genotypes.py) chooses it. An operation is built with the
number of channels, the stride (1, or 2 on the edges of a reduction cell that leave its inputs) and whether its
normalisation has gain and shift (`affine`, False in the supernet); its forward must not change its input. Parameter
names (`op`, `conv_1`, ...) are those of the DARTS lineage: released checkpoints load.
"""

from __future__ import annotations

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
    # In no search space here; published genotypes such as NASNet's and AmoebaNet's use them.
    "max_pool_5x5": lambda C, stride, affine: Pool(nn.MaxPool2d(5, stride, padding=2)),
    "avg_pool_5x5": lambda C, stride, affine: Pool(nn.AvgPool2d(5, stride, padding=2, count_include_pad=False)),
    "sep_conv_7x7": lambda C, stride, affine: SepConv(C, C, 7, stride, affine),
    "dil_conv_7x7": lambda C, stride, affine: DilConv(C, C, 7, stride, affine),
    "conv_7x1_1x7": lambda C, stride, affine: nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(C, C, (1, 7), (1, stride), (0, 3), bias=False),
        nn.Conv2d(C, C, (7, 1), (stride, 1), (3, 0), bias=False),
        nn.BatchNorm2d(C, affine=affine),
    ),
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

    dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
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
    """Halves height and width: two 1x1 convolutions with stride 2, the second one pixel further, side by side.

    The pixels are taken first and convolved then, with the same numbers: the backward pass of a strided 1x1 convolution
    of few channels writes beyond its memory in oneDNN (PyTorch 2.14, images in channels_last order).
    """

    def __init__(self, C_in: int, C_out: int, affine: bool = True) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.bn(concatenate([self.conv_1(take_every_second(x, 0)), self.conv_2(take_every_second(x, 1))]))


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
            nn.ReLU(inplace=True),  # a normalisation does not keep its output
            nn.Conv2d(C_in, C_in, kernel_size, 1, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def concatenate(xs: list[Tensor]) -> Tensor:
    """xs (N, C_i, H, W) side by side along the channels, with gradients in the memory order of images.

    Those of torch.cat are pieces of a larger tensor, on which a CPU's normalisations and ReLUs are slower.
    """
    for x in xs:
        if x.requires_grad:
            x.register_hook(order_pixels)
    return torch.cat(xs, dim=1) if len(xs) > 1 else xs[0]


def take_every_second(x: Tensor, first: int) -> Tensor:
    """x[:, :, first::2, first::2]; on a CPU taken in an order in which the gradient is channels_last, too."""
    if not x.is_cpu:
        return x[:, :, first::2, first::2]
    return x.permute(0, 2, 3, 1)[:, first::2, first::2].contiguous().permute(0, 3, 1, 2)


def order_pixels(x: Tensor) -> Tensor:
    """Images x (N, C, H, W) in the memory order that is fastest: channels last on a CPU, elsewhere as they come."""
    return x.contiguous(memory_format=torch.channels_last) if x.is_cpu else x
