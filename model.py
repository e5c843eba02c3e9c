"""Discovered networks: a genotype's cells stacked for 32x32 images (NetworkCIFAR) or 224x224 ones (NetworkImageNet)."""

from __future__ import annotations

import copy
from bisect import bisect_left
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

import nasbench201
from genotypes import Genotype, Genotype201
from model_search import imagenet_stem
from operations import OPS, FactorizedReduce, Identity, ReLUConvBN, concatenate, order_pixels


class Cell(nn.Module):
    """A cell of a genotype: every intermediate node sums two operations."""

    def __init__(
        self, genotype: Genotype, C_prev_prev: int, C_prev: int, C: int, reduction: bool, reduction_prev: bool
    ) -> None:
        super().__init__()
        preprocess0 = FactorizedReduce if reduction_prev else ReLUConvBN
        self.preprocess0 = preprocess0(C_prev_prev, C)
        self.preprocess1 = ReLUConvBN(C_prev, C)
        edges = genotype.reduce if reduction else genotype.normal
        self._concat = list(genotype.reduce_concat if reduction else genotype.normal_concat)
        self.multiplier = len(self._concat)
        self._indices = [source for _, source in edges]
        self._ops = nn.ModuleList(OPS[op](C, 2 if reduction and source < 2 else 1, True) for op, source in edges)

    def forward(self, s0: Tensor, s1: Tensor, drop_path_prob: float) -> Tensor:
        """The output (N, C * multiplier, H, W) from those of the two cells before."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        drop = self.training and drop_path_prob > 0
        for e in range(0, len(self._ops), 2):
            both = []
            for op, source in zip(self._ops[e : e + 2], self._indices[e : e + 2], strict=True):
                y = op(states[source])
                both.append(drop_path(y, drop_path_prob) if drop and not isinstance(op, Identity) else y)
            states.append(both[0] + both[1])
        return concatenate([states[i] for i in self._concat])


def drop_path(y: Tensor, p: float) -> Tensor:
    """y (N, C, H, W) with each sample zeroed with probability p, the others times 1 / (1 - p) (FractalNet, 2017)."""
    return y * y.new_empty(len(y), 1, 1, 1).bernoulli_(1 - p).div_(1 - p)


class AuxiliaryHead(nn.Module):
    """The classifier behind cell 2*layers//3 that helps training (stride 3 on 8x8 inputs, 2 on ImageNet's 7x7).

    Its pooling leaves 2x2 there; on smaller inputs it averages to 2x2 whatever their size.
    """

    def __init__(self, C: int, num_classes: int, stride: int, second_bn: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.AvgPool2d(5, stride=stride, padding=0, count_include_pad=False),
            nn.Conv2d(C, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 768, 2, bias=False),
            *([nn.BatchNorm2d(768)] if second_bn else []),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        relu, pool = self.features[:2]
        small = min(x.shape[2:]) < pool.kernel_size + pool.stride
        x = F.adaptive_avg_pool2d(relu(x), 2) if small else pool(relu(x))
        return self.classifier(self.features[2:](x).flatten(2).mean(-1))  # 1x1 at the standard sizes


class Network(nn.Module):
    """What both networks share: cells with two reductions, the auxiliary head, pooling and the linear classifier.

    Each makes its stem, and says with ``stems`` what it makes of images: the two inputs of the first cell.
    """

    large: bool  # images, for which the stem has a stride of 8

    def __init__(
        self,
        C: int,
        num_classes: int,
        layers: int,
        auxiliary: bool,
        genotype: Genotype,
        second_bn: bool | None = None,  # of the auxiliary head; None: in NetworkCIFAR only
    ) -> None:
        super().__init__()
        self.drop_path_prob = 0.0
        self._auxiliary_layer = 2 * layers // 3
        C_first, C_stem = C, C if self.large else 3 * C
        C_prev_prev, C_prev, reduction_prev = C_stem, C_stem, self.large
        self.cells = nn.ModuleList()
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            C = 2 * C if reduction else C
            cell = Cell(genotype, C_prev_prev, C_prev, C, reduction, reduction_prev)
            self.cells.append(cell)
            C_prev_prev, C_prev, reduction_prev = C_prev, cell.multiplier * C, reduction
            if layer == self._auxiliary_layer:
                C_auxiliary = C_prev
        if auxiliary:
            stride, second_bn = 2 if self.large else 3, not self.large if second_bn is None else second_bn
            self.auxiliary_head = AuxiliaryHead(C_auxiliary, num_classes, stride, second_bn)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, num_classes)
        self.make_stem(C_first)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (N, classes) of images (N, 3, H, W), and those of the auxiliary head in training mode, else None."""
        s0, s1 = self.stems(order_pixels(x))
        auxiliary_logits = None
        for layer, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path_prob)
            if layer == self._auxiliary_layer and self.training and hasattr(self, "auxiliary_head"):
                auxiliary_logits = self.auxiliary_head(s1)
        return self.classifier(self.global_pooling(s1).flatten(1)), auxiliary_logits


class NetworkCIFAR(Network):
    """For small images such as CIFAR's: a 3x3 stem without stride."""

    large = False

    def make_stem(self, C: int) -> None:
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))

    def stems(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        return x, x


class NetworkImageNet(Network):
    """For ImageNet: a stem of stride 8. P-DARTS' auxiliary head has a second BatchNorm, that of DDSAS has not."""

    large = True

    def make_stem(self, C: int) -> None:
        self.stem0, self.stem1 = imagenet_stem(C)

    def stems(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s0 = self.stem0(x)
        return s0, self.stem1(s0)


def network_for(
    large: bool, C: int, num_classes: int, layers: int, auxiliary: bool, genotype: Genotype, second_bn: bool = False
) -> Network:
    """NetworkImageNet for large images, NetworkCIFAR for small ones (whose auxiliary head always has a second BN).

    An architecture of NAS-Bench-201's space has its own network, ``layers`` cells a stage; it has no auxiliary head.
    """
    if isinstance(genotype, Genotype201):
        return nasbench201.Network(C, num_classes, layers, genotype)
    if large:
        return NetworkImageNet(C, num_classes, layers, auxiliary, genotype, second_bn)
    return NetworkCIFAR(C, num_classes, layers, auxiliary, genotype)


def fuse(network: nn.Module) -> nn.Module:
    """A copy of a network in evaluation mode in which each batch normalisation behind a convolution is part of it.

    The logits are the same up to rounding, in less time.
    """
    network = copy.deepcopy(network)
    for layers in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for i, (conv, bn) in enumerate(pairwise(layers)):
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                layers[i], layers[i + 1] = fuse_conv_bn_eval(conv, bn), nn.Identity()
    return network


def count_parameters(network: nn.Module) -> int:
    """The number of parameters without the auxiliary head."""
    return sum(p.numel() for name, p in network.named_parameters() if not name.startswith("auxiliary_head"))


def count_multiply_adds(network: nn.Module, image_size: int) -> int:
    """Multiply-adds of convolutions and linear layers for one image in evaluation: half of PyTorch's FLOP count."""
    device, training = next(network.parameters()).device, network.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.empty(1, 3, image_size, image_size, device=device))
    network.train(training)
    return counter.get_total_flops() // 2


def mobile_channels(genotype: Genotype, layers: int, num_classes: int = 1000, limit: int = 600_000_000) -> int:
    """The largest even init_channels that keeps a NetworkImageNet under ``limit`` multiply-adds at 224x224."""

    def cost(C: int) -> int:
        with torch.device("meta"):
            return count_multiply_adds(NetworkImageNet(C, num_classes, layers, False, genotype), 224)

    even = range(2, 1024, 2)
    return even[bisect_left(even, limit, key=cost) - 1]
