"""The search methods of search.py: how architecture parameters become weights of operations, and these an architecture.

    DDSAS   a bandit moves the subspace in which alpha and beta are trained (Yang et al., ACML 2021)
    DARTS   softmax(alpha) over all operations (Liu et al., ICLR 2019); --unrolled is its second order
    GDAS    one operation an edge, drawn by the Gumbel-softmax (Dong and Yang, CVPR 2019)
    random  an architecture drawn uniformly, nothing is trained: `random_architecture`

The loop, data, schedules and optimizers are the same for all (search.py, bilevel.py). A `Method` holds architecture
parameters and says, for each forward pass, what the operations weigh and which are computed. Where methods need to know
how a cell is built, they ask the space's `Cells`.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import genotypes
import model_search
import nasbench201
from genotypes import CELL_TYPES, Space
from model_search import Architecture, gumbel
from space import DynamicSpace, two_edges_a_node

Operations = tuple[dict[str, Tensor], dict[str, list[list[int]]] | None]  # weights and active operations, per cell type


class Cells(NamedTuple):
    """How the cells of a space are built: their types, edges, and what architecture a table of scores stands for.

    ``derive(scores, primitives)`` takes an array (edges, operations) per cell type, -inf where there is no choice.
    ``supernet(C, num_classes, layers, primitives, stem)`` builds the network that has all operations on every edge.
    """

    types: tuple[str, ...]
    num_edges: int
    none_may_be_chosen: bool
    derive: Callable[[dict[str, np.ndarray], list[str]], object]
    supernet: Callable[..., nn.Module]


CELLS = {  # by Space.cells
    "darts": Cells(CELL_TYPES, genotypes.EDGES, False, two_edges_a_node, model_search.Network),
    "nasbench201": Cells(
        ("cell",),
        len(nasbench201.EDGE_LIST),
        True,
        nasbench201.one_op_an_edge,
        lambda C, num_classes, layers, primitives, stem: nasbench201.Supernet(C, num_classes, layers),
    ),
}


class Method:
    """What a search learns besides the weights of its supernet; all mutable state is in `state_dict` or a parameter."""

    straight_through = False  # add the weights of operations that are not active as numbers: see GDAS
    architecture: nn.Module  # alpha, and beta where there is one

    def __init__(self, args: argparse.Namespace, space: Space) -> None:
        self.args, self.space, self.cells = args, space, CELLS[space.cells]
        self.noise = torch.Generator().manual_seed(args.seed)  # the same in every process and on every device

    def tau(self, epoch: int) -> float | None:
        """Temperature of the Gumbel-softmax, linear from tau_max to tau_min over the epochs; None: there is none."""
        return None

    def start_epoch(self, epoch: int) -> str | None:
        """What changes when an epoch begins, and a line about it for the log."""

    def before_step(self, epoch: int, step: int) -> None:
        """What changes before the two steps of a batch."""

    def operations(self, epoch: int | None) -> Operations:
        """Weights and active operations for one forward pass; epoch None: in validation, where nothing is drawn."""
        raise NotImplementedError

    def genotype(self):
        """The architecture that would be the result now."""
        raise NotImplementedError

    def summary(self) -> str:
        """The method in a few words, for the log."""
        raise NotImplementedError

    def notes(self) -> tuple[str, str]:
        """What a report of a step says: for the progress bar, and for the log."""
        return "", ""

    def replicated(self) -> dict:
        """Arrays that must be the same in every process, besides the architecture parameters."""
        return {}

    def history(self) -> dict:
        """What the epoch's line of history says besides losses and accuracies."""
        return {}

    def state_dict(self) -> dict:
        return {"noise": self.noise.get_state()}

    def load_state_dict(self, state: dict) -> None:
        noise = state.get("noise")  # earlier versions drew from the global generator, or from one of the GPU
        if noise is not None and noise.shape == self.noise.get_state().shape:
            self.noise.set_state(noise)

    def decreasing_tau(self, epoch: int) -> float:
        args = self.args
        return args.tau_max - (args.tau_max - args.tau_min) * epoch / max(args.epochs - 1, 1)


class DDSAS(Method):
    """Gradient descent inside a subspace; every dss_freq steps a bandit moves it (DDSAS, algorithm 1).

    The bandit is `DynamicSpace`, the weights are `Architecture.weights`.
    """

    def __init__(self, args: argparse.Namespace, space: Space) -> None:
        super().__init__(args, space)
        cells, primitives = self.cells, space.primitives
        self.architecture = Architecture(cells.num_edges, len(primitives), cells.types)
        self.subspace = DynamicSpace(
            primitives, cells.num_edges, args.dss_max_ops, args.confidence, cells.types, cells.derive
        )
        self.rng = np.random.default_rng(args.seed)  # of what the subspace draws
        self.samplings: list[dict] = []  # of this epoch

    def tau(self, epoch: int) -> float | None:
        return self.decreasing_tau(epoch) if self.args.gumbel else None

    def start_epoch(self, epoch: int) -> str | None:
        """Shrink or expand the space if its schedule says so."""
        if num := self.space.shrink.get(epoch):
            self.subspace.shrink(num)
            return f"the space shrinks by {num} operations per cell type"
        if num := self.space.expand.get(epoch):
            self.subspace.set_available(num)
            return f"{num} primitives available: {', '.join(self.space.primitives[:num])}"
        return None

    @torch.no_grad()
    def before_step(self, epoch: int, step: int) -> None:
        """Every dss_freq steps update the bandit and sample a subspace; before epoch `begin` a random one each step."""
        args, subspace = self.args, self.subspace
        before = {kind: active.copy() for kind, active in subspace.active.items()}
        if step == 0:
            self.samplings = []
        if epoch < args.begin:
            subspace.sample_random(self.rng)
        elif step % args.dss_freq == 0:
            raw = self.architecture.weights(subspace.active_ops(), args.saliency_type, norm=False)
            subspace.update(as_arrays(raw), as_arrays(self.architecture.betas()))
            if self.rng.random() < args.rdss_prob:
                subspace.sample_random(self.rng)
            else:
                subspace.sample()
        if step % args.dss_freq == 0:  # what the run folder remembers
            changed = sum(int((before[kind] != subspace.active[kind]).sum()) for kind in before)
            active = {kind: bits(mask) for kind, mask in subspace.active.items()}
            self.samplings.append({"step": step, "active": active, "changed": changed})

    def operations(self, epoch: int | None) -> Operations:
        active, args = self.subspace.active_ops(), self.args
        tau = None if epoch is None else self.tau(epoch)
        weights = self.architecture.weights(active, args.saliency_type, not args.no_norm, tau, self.noise)
        return weights, active

    def genotype(self):
        return self.subspace.genotype()

    def summary(self) -> str:
        args = self.args
        return f"DDSAS with {args.dss_max_ops} active operations, moved every {args.dss_freq} steps"

    def replicated(self) -> dict:
        return {f"active {kind}": active for kind, active in self.subspace.active.items()}

    def notes(self) -> tuple[str, str]:
        counts = [str(int(active.sum())) for active in self.subspace.active.values()]
        changed = f" ({self.samplings[-1]['changed']} changed at the last sampling)" if self.samplings else ""
        return f", ops {'+'.join(counts)}", f", active operations {' + '.join(counts)}{changed}"

    def history(self) -> dict:
        subspace = self.subspace
        return {
            "samplings": self.samplings,
            "available": {kind: bits(mask) for kind, mask in subspace.available.items()},
            "saliency": {kind: saliency.tolist() for kind, saliency in subspace.saliency.items()},
            "visits": {kind: visits.tolist() for kind, visits in subspace.visits.items()},
            "alpha_entropy": {kind: entropy(alpha) for kind, alpha in self.architecture.alphas().items()},
            "active_ops": {kind: int(active.sum()) for kind, active in subspace.active.items()},
        }

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "space": self.subspace.state_dict(),
            "samplings": self.samplings,
            "space_rng": repr(self.rng.bit_generator.state),
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.subspace.load_state_dict(state["space"])
        self.samplings = state["samplings"]
        self.rng.bit_generator.state = ast.literal_eval(state["space_rng"])


class DARTS(Method):
    """All operations at once, weighted with softmax(alpha) (Liu et al., ICLR 2019, equation 2)."""

    def __init__(self, args: argparse.Namespace, space: Space) -> None:
        super().__init__(args, space)
        shape = self.cells.num_edges, len(space.primitives)
        self.architecture = nn.ParameterDict({kind: 1e-3 * torch.randn(shape) for kind in self.cells.types})

    def summary(self) -> str:
        return f"{type(self).__name__}{', second order' if self.args.unrolled else ''}"

    def operations(self, epoch: int | None) -> Operations:
        return {kind: alpha.softmax(dim=-1) for kind, alpha in self.architecture.items()}, None

    def genotype(self):
        """The operation of largest alpha on each edge; in the DARTS space never `none`, and two edges a node.

        There an edge counts as much as its largest softmax(alpha) other than `none` (DARTS, section 2.4).
        """
        scores = as_arrays({kind: alpha.softmax(dim=-1) for kind, alpha in self.architecture.items()})
        return derive(scores, self.space)

    def history(self) -> dict:
        probabilities = {kind: alpha.softmax(dim=-1).tolist() for kind, alpha in self.architecture.items()}
        return {
            "probabilities": probabilities,
            "alpha_entropy": {kind: entropy(alpha) for kind, alpha in self.architecture.items()},
        }


class GDAS(DARTS):
    """One operation an edge and forward pass (Dong and Yang, CVPR 2019, equations 3 to 5).

    p = softmax((log_softmax(alpha) + g) / tau) with g from `gumbel`; k the largest; h = one_hot(k) - p.detach()
    + p. An edge computes h_k op_k(x), and adds the numbers h_j of its other operations: these are 0, and pass their
    gradient on. The architecture is DARTS'.
    """

    straight_through = True

    def tau(self, epoch: int) -> float:
        return self.decreasing_tau(epoch)

    def operations(self, epoch: int | None) -> Operations:
        weights, active = {}, {}
        for kind, alpha in self.architecture.items():
            g = torch.zeros_like(alpha) if epoch is None else gumbel(alpha, self.noise)
            h, k = nasbench201.gdas_weights(alpha, 1.0 if epoch is None else self.tau(epoch), g)
            weights[kind], active[kind] = h, [[op] for op in k.tolist()]
        return weights, active


METHODS = {"ddsas": DDSAS, "darts": DARTS, "gdas": GDAS}


def random_architecture(space: Space, rng: np.random.Generator):
    """An architecture drawn uniformly: operations, and in the DARTS space the two edges of each node."""
    cells = CELLS[space.cells]
    return derive({kind: rng.random((cells.num_edges, len(space.primitives))) for kind in cells.types}, space)


def derive(scores: dict[str, np.ndarray], space: Space):
    """The architecture for scores (edges, operations) per cell type; takes `none` out where the space says so."""
    cells = CELLS[space.cells]
    if not cells.none_may_be_chosen:
        for table in scores.values():
            table[:, [primitive == "none" for primitive in space.primitives]] = -np.inf
    return cells.derive(scores, space.primitives)


def bits(mask: np.ndarray) -> list[int]:
    """A bool array (edges, operations) as one integer per edge: bit k is operation k."""
    return (mask @ (1 << np.arange(mask.shape[1]))).tolist()


def as_arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: t.detach().cpu().double().numpy() for name, t in tensors.items()}


def entropy(alpha: Tensor) -> float:
    """Mean over the edges of the entropy of softmax(alpha), in nats."""
    p = F.softmax(alpha.detach().double(), dim=-1)
    return float(-(p * p.log()).sum(-1).mean())
