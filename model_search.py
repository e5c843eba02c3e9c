"""The supernet (MixedOp, Cell, Network) and its architecture parameters; the bandit is in space.py.

The three are apart: the Network holds weights only and is told which operations are active as plain Python indices; the
Architecture holds alpha and beta; the bandit's DynamicSpace is numpy on the CPU and knows no module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genotypes import CELL_TYPES, EDGE_LIST, EDGES, NODES
from lib.distributed import to_device
from operations import OPS, FactorizedReduce, Identity, Pool, ReLUConvBN, concatenate, order_pixels
from space import INCOMING, DynamicSpace  # noqa: F401, people import the space from here


class MixedOp(nn.Module):
    """One edge, with its candidate operations."""

    straight_through = False  # add the weights of the operations that are not active as numbers (GDAS: they are 0)

    def __init__(self, C: int, stride: int, primitives: list[str]) -> None:
        super().__init__()
        self._ops = nn.ModuleList()
        for primitive in primitives:
            op = OPS[primitive](C, stride, False)
            if isinstance(op, Pool):
                op.append(nn.BatchNorm2d(C, affine=False))
            self._ops.append(op)

    def forward(self, x: Tensor, weights: list[Tensor], active: list[int]) -> Tensor:
        """sum over the active operations o of w_o * o(x) (DARTS, equation 2; the active ones alone: DDSAS).

        x (N, C, H, W), weights one scalar per operation, active the indices of the operations to compute, at least one.
        """
        y = sum(weights[k] * self._ops[k](x) for k in active)
        if self.straight_through:
            y = y + sum(w for k, w in enumerate(weights) if k not in active)
        return y


class Cell(nn.Module):
    """A cell: each intermediate node sums its incoming edges; the output concatenates the intermediate nodes."""

    def __init__(
        self,
        C_prev_prev: int,
        C_prev: int,
        C: int,
        reduction: bool,
        reduction_prev: bool,
        candidates: list[list[str]],
    ) -> None:
        super().__init__()
        self.reduction = reduction
        preprocess0 = FactorizedReduce if reduction_prev else ReLUConvBN
        self.preprocess0 = preprocess0(C_prev_prev, C, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, affine=False)
        self._ops = nn.ModuleList(
            MixedOp(C, 2 if reduction and source < 2 else 1, primitives)
            for (_, source), primitives in zip(EDGE_LIST, candidates, strict=True)
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: list[list[Tensor]], active: list[list[int]]) -> Tensor:
        """The output (N, 4 C, H, W) from those of the two cells before; weights and active operations edge by edge."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for edges in INCOMING:
            states.append(sum(self._ops[e](states[i], weights[e], active[e]) for i, e in enumerate(edges)))
        return concatenate(states[2:])


class Supernet(nn.Module):
    """What the supernets of both spaces share."""

    checkpoint_cells = False  # compute every cell once more in the backward pass instead of keeping what is in it

    @property
    def straight_through(self) -> bool:
        """`MixedOp.straight_through` of all edges."""
        return any(m.straight_through for m in self.modules() if m is not self and hasattr(m, "straight_through"))

    @straight_through.setter
    def straight_through(self, value: bool) -> None:
        for module in self.modules():
            if module is not self and hasattr(module, "straight_through"):
                module.straight_through = value


class Network(Supernet):
    """The supernet. It holds network weights only: alpha, beta and the active operations come with each call.

    ``candidates`` is one list of primitives for every edge, or {"normal": [14 lists], "reduce": [14 lists]};
    ``stem`` is "cifar" (any small image) or "imagenet" (a stride of 8 before the first cell).
    """

    def __init__(
        self, C: int, num_classes: int, layers: int, candidates: list[str] | dict[str, list], stem: str = "cifar"
    ) -> None:
        super().__init__()
        if not isinstance(candidates, dict):
            candidates = {kind: [candidates] * EDGES for kind in CELL_TYPES}
        self.candidates = candidates
        C_prev = 3 * C
        if stem == "cifar":
            self.stem = nn.Sequential(nn.Conv2d(3, C_prev, 3, padding=1, bias=False), nn.BatchNorm2d(C_prev))
        elif stem == "imagenet":
            self.stem0, self.stem1 = imagenet_stem(C_prev)
        else:
            raise ValueError(f"stem must be 'cifar' or 'imagenet', got {stem!r}")
        C_prev_prev, reduction_prev = C_prev, stem == "imagenet"
        self.cells = nn.ModuleList()
        for layer in range(layers):
            reduction = layer in (layers // 3, 2 * layers // 3)
            C = 2 * C if reduction else C
            kind = "reduce" if reduction else "normal"
            self.cells.append(Cell(C_prev_prev, C_prev, C, reduction, reduction_prev, candidates[kind]))
            C_prev_prev, C_prev, reduction_prev = C_prev, NODES * C, reduction
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, num_classes)

    @property
    def skip_dropout(self) -> float:
        """The probability of the dropout behind every identity skip_connect (P-DARTS, section 3.3)."""
        return float(next((m.dropout for m in self.modules() if isinstance(m, Identity)), 0.0))

    @skip_dropout.setter
    def skip_dropout(self, p: float) -> None:
        for module in self.modules():
            if isinstance(module, Identity):
                module.dropout = p

    def forward(self, x: Tensor, weights: dict[str, Tensor], active: dict[str, list[list[int]]] | None) -> Tensor:
        """Logits (N, classes) of images x (N, 3, H, W).

        ``weights[kind]`` (14, o) are the operations' weights, ``active[kind]`` 14 lists of operation indices; the
        operations not listed are not computed. None: all are active.
        """
        active = active or all_active(self.candidates)
        scalars = {kind: split(w) for kind, w in weights.items()}
        s0, s1 = self.stems(order_pixels(x))
        for cell in self.cells:
            kind = "reduce" if cell.reduction else "normal"
            arguments = s0, s1, scalars[kind], active[kind]
            s0, s1 = s1, recompute(cell, arguments) if self.checkpoint_cells else cell(*arguments)
        return self.classifier(self.global_pooling(s1).flatten(1))

    def stems(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two inputs of the first cell."""
        s0 = self.stem(x) if hasattr(self, "stem") else self.stem0(x)
        return s0, s0 if hasattr(self, "stem") else self.stem1(s0)


def recompute(cell: Cell, arguments: tuple) -> Tensor:
    """cell(*arguments), of which only inputs and output are kept until the backward pass computes it once more."""
    return checkpoint(cell, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), keep_statistics(cell)))


@contextmanager
def keep_statistics(module: nn.Module) -> Iterator[None]:
    """The running statistics stay as they are while the module computes once more what moved them already."""
    bns = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(bn, bn.momentum, bn.num_batches_tracked.clone()) for bn in bns]
    for bn in bns:
        bn.momentum = 0.0
    try:
        yield
    finally:
        for bn, momentum, count in before:
            bn.momentum = momentum
            bn.num_batches_tracked.copy_(count)


def all_active(candidates: dict[str, list]) -> dict[str, list[list[int]]]:
    """Every operation of every edge."""
    return {kind: [list(range(len(ops))) for ops in edges] for kind, edges in candidates.items()}


def split(weights: Tensor) -> list[list[Tensor]]:
    """A matrix (14, o) as 14 lists of scalars, in one step of the graph."""
    flat, width = weights.flatten().unbind(), weights.shape[1]
    return [list(flat[i : i + width]) for i in range(0, len(flat), width)]


def imagenet_stem(C: int) -> tuple[nn.Sequential, nn.Sequential]:
    """stem0 (stride 4) and stem1 (stride 2), each to C channels, of the ImageNet networks."""
    stem0 = nn.Sequential(
        nn.Conv2d(3, C // 2, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(C // 2),
        nn.ReLU(inplace=True),
        nn.Conv2d(C // 2, C, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(C),
    )
    stem1 = nn.Sequential(
        nn.ReLU(inplace=False),
        nn.Conv2d(C, C, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(C),
    )
    return stem0, stem1


class Architecture(nn.Module):
    """alpha and beta (zeta in the paper) of each cell type, (num_edges, num_ops), 1e-3 * N(0, 1) at the start.

    The parameters are alphas_normal, alphas_reduce, betas_normal, betas_reduce.
    """

    def __init__(self, num_edges: int, num_ops: int, cell_types: tuple[str, ...] = CELL_TYPES) -> None:
        super().__init__()
        self.cell_types = cell_types
        self._masks: dict[str, tuple[list[list[int]] | None, Tensor]] = {}  # active operations, and as a mask
        for name in ("alphas", "betas"):
            for kind in cell_types:
                self.register_parameter(f"{name}_{kind}", nn.Parameter(1e-3 * torch.randn(num_edges, num_ops)))

    def alphas(self) -> dict[str, Tensor]:
        return {kind: getattr(self, f"alphas_{kind}") for kind in self.cell_types}

    def betas(self) -> dict[str, Tensor]:
        return {kind: getattr(self, f"betas_{kind}") for kind in self.cell_types}

    def weights(
        self,
        active: dict[str, list[list[int]]] | None,
        saliency_type: str = "simple",
        norm: bool = True,
        tau: float | None = None,
        noise: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The operations' weights w (num_edges, o) per cell type (DDSAS), zero where an operation is not active.

        With p the softmax of alpha over the active operations A of an edge and zeta = sigmoid(beta), `simple` is
        w = p * zeta, `all` is w = p * prod over A of zeta * prod over the others of (1 - zeta). ``norm`` divides by the
        edge's sum. ``tau`` is the temperature of the Gumbel softmax (Jang et al., ICLR 2017), None for the plain one:
        alpha becomes (log softmax(alpha) + g) / tau, with g from the generator ``noise``.
        """
        betas = self.betas()
        weights = {}
        for kind, alpha in self.alphas().items():
            mask = self.mask(kind, None if active is None else active[kind])
            if tau is not None:
                alpha = perturb(alpha, tau, gumbel(alpha, noise))
            p = masked_softmax(alpha, mask)
            zeta = torch.sigmoid(betas[kind])
            if saliency_type == "simple":
                w = p * zeta
            elif saliency_type == "all":
                w = p * torch.where(mask, zeta, 1 - zeta).prod(dim=-1, keepdim=True)
            else:
                raise ValueError(f"saliency_type must be 'simple' or 'all', got {saliency_type!r}")
            if norm:
                w = w / (w.abs().sum(dim=-1, keepdim=True) + 1e-14)
            weights[kind] = w
        return weights

    def mask(self, kind: str, active: list[list[int]] | None) -> Tensor:
        """`active_mask` on the device of alpha; it is copied there only when the active operations are other ones."""
        alpha, (known, mask) = self.alphas()[kind], self._masks.get(kind, (None, None))
        if mask is None or known != active or mask.device != alpha.device:
            mask = active_mask(alpha, active)
            self._masks[kind] = None if active is None else [list(ops) for ops in active], mask
        return mask


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """g = -log(E), E ~ Exp(1), as many as ``like`` and on its device; drawn on the CPU: the same on every device."""
    numbers = torch.empty(like.shape, dtype=like.dtype).exponential_(generator=generator)
    return to_device(-numbers.log(), like.device)


def perturb(alpha: Tensor, tau: float, g: Tensor) -> Tensor:
    """What the Gumbel softmax is the softmax of: (log softmax(alpha) + g) / tau (Jang et al., ICLR 2017)."""
    return (F.log_softmax(alpha, dim=-1) + g) / tau


def active_mask(like: Tensor, active: list[list[int]] | None) -> Tensor:
    """A bool tensor (14, o): True where the operation is active (None: everywhere)."""
    mask = np.full(like.shape, active is None)
    for edge, ops in enumerate(active or []):
        mask[edge, ops] = True
    return to_device(torch.from_numpy(mask), like.device)


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the entries of each row where mask is True, 0 elsewhere (a row without any: zeros)."""
    return F.softmax(x.masked_fill(~mask, torch.finfo(x.dtype).min), dim=-1) * mask
