"""What a cell costs: multiply-adds of every operation at its place in a supernet, and their weight in the loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import genotypes
import model_search
import nasbench201


class MultiplyAdds:
    """Multiply-adds for one image, per cell type a matrix (edges, operations), summed over the supernet's cells.

    Counted by PyTorch in the network itself, so that an operation of one's own counts too; before fast.py, with which
    operations are not called one by one.
    """

    def __init__(self, network: nn.Module, image_size: int) -> None:
        (parameter, *_), training = network.parameters(), network.training
        device, self.candidates = parameter.device, network.candidates
        sizes = {kind: (len(edges), len(edges[0])) for kind, edges in self.candidates.items()}
        weights = {kind: torch.ones(size, device=device) for kind, size in sizes.items()}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(parameter.new_zeros(1, 3, image_size, image_size), weights, None)
        network.train(training)
        flops, names = counter.get_flop_counts(), {module: name for name, module in network.named_modules()}
        counts = {kind: torch.zeros(size, dtype=torch.float64) for kind, size in sizes.items()}
        for kind, edge, index, op in candidate_operations(network):
            known = flops.get(f"{type(network).__name__}.{names[op]}", {})  # `none` is never called
            counts[kind][edge, index] += sum(known.values()) / 2
        self.counts = {kind: count.float().to(device) for kind, count in counts.items()}
        self.largest = sum(count.max(dim=1).values.sum() for count in self.counts.values())

    def expected(self, weights: dict[str, Tensor]) -> Tensor:
        """sum of w * cost over cells, edges and operations, in multiply-adds; a function of alpha and beta."""
        return sum((weights[kind] * count).sum() for kind, count in self.counts.items())

    def penalty(self, weights: dict[str, Tensor], flops_weight: float) -> Tensor | None:
        """--flops_weight times the expected multiply-adds, as a share of the most expensive choice; None without."""
        return flops_weight * self.expected(weights) / self.largest if flops_weight else None

    def derived(self, genotype) -> float:
        """Multiply-adds of the operations that a genotype keeps, at their places in the supernet."""
        total = 0.0
        for kind, edges in genotypes.edges_of(genotype).items():
            for edge, op in edges:
                total += self.counts[kind][edge, self.candidates[kind][edge].index(op)].item()
        return total

    def history(self, weights: dict[str, Tensor], genotype) -> dict:
        """For a line of history: expected and derived multiply-adds of the cells' operations, in millions."""
        return {
            "expected_multiply_adds": self.expected(weights).item() / 1e6,
            "derived_multiply_adds": self.derived(genotype) / 1e6,
        }


def candidate_operations(network: nn.Module) -> Iterator[tuple[str, int, int, nn.Module]]:
    """(cell type, edge, index, module) of every candidate in every cell of a supernet."""
    for cell in network.cells:
        if isinstance(cell, model_search.Cell):
            kind, edges = "reduce" if cell.reduction else "normal", [edge._ops for edge in cell._ops]
        elif isinstance(cell, nasbench201.SearchCell):
            kind, edges = "cell", list(cell.edges.values())
        else:
            continue  # a residual block
        yield from ((kind, edge, index, op) for edge, ops in enumerate(edges) for index, op in enumerate(ops))


def add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum of what is not None."""
    return first if second is None else second if first is None else first + second
