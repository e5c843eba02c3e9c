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

    Counted by PyTorch on the modules themselves, each with an input of the size that it has in the network, so that an
    operation of one's own counts too.
    """

    def __init__(self, network: nn.Module, image_size: int) -> None:
        places = list(candidate_operations(network))
        shapes: dict[nn.Module, torch.Size] = {}
        hooks = [
            op.register_forward_pre_hook(lambda module, inputs: shapes.update({module: inputs[0].shape}))
            for *_, op in places
        ]
        device, training = next(network.parameters()).device, network.training
        counts = {
            kind: torch.zeros(len(edges), len(edges[0]), dtype=torch.float64)
            for kind, edges in network.candidates.items()
        }
        weights = {kind: torch.ones(count.shape, device=device) for kind, count in counts.items()}
        network.eval()
        with torch.no_grad():
            x = torch.zeros(1, 3, image_size, image_size, device=device, dtype=next(network.parameters()).dtype)
            type(network).forward(network, x, weights, None)
            for hook in hooks:
                hook.remove()
            for kind, edge, index, op in places:
                if op in shapes:
                    with FlopCounterMode(display=False) as counter:
                        op(x.new_zeros(shapes[op]))
                    counts[kind][edge, index] += counter.get_total_flops() / 2
        network.train(training)
        self.counts = {kind: count.float().to(device) for kind, count in counts.items()}
        self.largest = sum(count.max(dim=1).values.sum() for count in self.counts.values())
        self.candidates = network.candidates

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
