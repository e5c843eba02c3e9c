"""The search methods of search.py: how architecture parameters become weights of operations, and these an architecture.

    DDSAS   a bandit moves the subspace in which alpha and beta are trained (Yang et al., ACML 2021)
    DARTS   softmax(alpha) over all operations (Liu et al., ICLR 2019); --unrolled is its second order
    GDAS    one operation an edge, drawn by the Gumbel-softmax (Dong and Yang, CVPR 2019)
    RWS     one operation an edge, drawn uniformly; the best of many by the weights that they share (Li and Talwalkar)
    random  an architecture drawn uniformly, nothing is trained: `random_architecture`

The loop, data, schedules and optimizers are the same for all (search.py). A `Method` holds architecture parameters and
says, for each forward pass, what the operations weigh and which are computed. Where methods need to know how a cell is
built, they ask the space's `Cells`.
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
from model_search import Architecture, gumbel, perturb
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
    """What a search learns besides the weights of its supernet; all that changes is in `state_dict` or a parameter.

    A new method is a class here and a word in METHODS; docs/extend.md adds one.
    """

    trains_architecture = True  # False: there is no alpha
    straight_through = False  # add the weights of operations that are not active as numbers: see GDAS
    architecture: nn.Module  # alpha, and beta where there is one

    def __init__(self, args: argparse.Namespace, space: Space, device: torch.device) -> None:
        self.args, self.space, self.cells, self.device = args, space, CELLS[space.cells], device
        self.noise = torch.Generator().manual_seed(args.seed)  # the same in every process and on every device

    def summary(self) -> str:
        """The method in a few words, for the log."""
        return type(self).__name__

    def tau(self, epoch: int) -> float | None:
        """Temperature of the Gumbel-softmax, None where there is none."""
        return None

    def start_epoch(self, epoch: int) -> str | None:
        """What changes when an epoch begins, and a line about it for the log."""

    def before_step(self, epoch: int, step: int) -> None:
        """What changes before the two steps of a batch."""

    def operations(self, epoch: int | None) -> Operations:
        """Weights and active operations for one forward pass; epoch None: in validation, where nothing is drawn."""
        raise NotImplementedError

    def regulariser(self, epoch: int) -> Tensor | None:
        """What is added to the architecture's loss, a function of alpha and beta; None: nothing."""

    def finish(self, score: Callable[[dict[str, Tensor], dict[str, list[list[int]]]], float]) -> None:
        """What is decided after the last epoch; ``score`` is the supernet's validation accuracy with operations."""

    def genotype(self):
        """The architecture that would be the result now."""
        raise NotImplementedError

    def note(self) -> str:
        """What a report of a step says besides loss and accuracy."""
        return ""

    def replicated(self) -> dict:
        """What must be the same in every process."""
        return dict(self.architecture.named_parameters())

    def history(self) -> dict:
        """What the epoch's line of history says besides losses and accuracies."""
        alphas = self.alphas()
        return {
            "alpha": {kind: alpha.tolist() for kind, alpha in alphas.items()},
            "alpha_entropy": {kind: entropy(alpha) for kind, alpha in alphas.items()},
        }

    def alphas(self) -> dict[str, Tensor]:
        """alpha (edges, operations) per cell type."""
        return dict(self.architecture.items())

    def state_dict(self) -> dict:
        return {"architecture": self.architecture.state_dict(), "noise": self.noise.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.architecture.load_state_dict(state["architecture"])
        self.noise.set_state(state["noise"])


def falling_tau(args: argparse.Namespace, epoch: int) -> float:
    """The temperature, linear from tau_max to tau_min over the epochs."""
    return args.tau_max - (args.tau_max - args.tau_min) * epoch / max(args.epochs - 1, 1)


class DDSAS(Method):
    """Gradient descent inside a subspace; every dss_freq steps a bandit moves it (DDSAS, algorithm 1).

    The bandit is `DynamicSpace`, the weights are `Architecture.weights`.
    """

    def __init__(self, args: argparse.Namespace, space: Space, device: torch.device) -> None:
        super().__init__(args, space, device)
        cells, primitives = self.cells, space.primitives
        self.architecture = Architecture(cells.num_edges, len(primitives), cells.types).to(device)
        self.subspace = DynamicSpace(
            primitives, cells.num_edges, args.dss_max_ops, args.confidence, cells.types, cells.derive
        )
        self.rng = np.random.default_rng(args.seed)  # of random subspaces
        self.samplings: list[dict] = []  # of this epoch, for the run folder

    def summary(self) -> str:
        args = self.args
        return f"{type(self).__name__} with {args.dss_max_ops} active operations, moved every {args.dss_freq} steps"

    def tau(self, epoch: int) -> float | None:
        return falling_tau(self.args, epoch) if self.args.gumbel else None

    def start_epoch(self, epoch: int) -> str | None:
        """Shrink or expand the space if its schedule says so."""
        self.samplings = []
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

    def note(self) -> str:
        counts = [int(active[:, self.subspace.counted].sum()) for active in self.subspace.active.values()]
        return f", ops {'+'.join(map(str, counts))}"

    def replicated(self) -> dict:
        return super().replicated() | {f"active {kind}": active for kind, active in self.subspace.active.items()}

    def alphas(self) -> dict[str, Tensor]:
        return self.architecture.alphas()

    def history(self) -> dict:
        subspace = self.subspace
        return super().history() | {
            "beta": {kind: beta.tolist() for kind, beta in self.architecture.betas().items()},
            "saliency": {kind: saliency.tolist() for kind, saliency in subspace.saliency.items()},
            "visits": {kind: visits.tolist() for kind, visits in subspace.visits.items()},
            "samplings": self.samplings,
            "available": {kind: bits(mask) for kind, mask in subspace.available.items()},
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

    def __init__(self, args: argparse.Namespace, space: Space, device: torch.device) -> None:
        super().__init__(args, space, device)
        shape = self.cells.num_edges, len(space.primitives)
        alphas = {kind: 1e-3 * torch.randn(shape) for kind in self.cells.types}
        self.architecture = nn.ParameterDict(alphas).to(device)

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
        return super().history() | {"probabilities": probabilities}


class GDAS(DARTS):
    """One operation an edge and forward pass (Dong and Yang, CVPR 2019, equations 3 to 5).

    p = softmax((log_softmax(alpha) + g) / tau) with g from `gumbel`; k the largest; h = one_hot(k) - p.detach()
    + p. An edge computes h_k op_k(x), and adds the numbers h_j of its other operations: these are 0, and pass their
    gradient on. The architecture is DARTS'.
    """

    straight_through = True

    def tau(self, epoch: int) -> float:
        return falling_tau(self.args, epoch)

    def operations(self, epoch: int | None) -> Operations:
        weights, active = {}, {}
        for kind, alpha in self.architecture.items():
            g = torch.zeros_like(alpha) if epoch is None else gumbel(alpha, self.noise)
            h, k = gdas_weights(alpha, 1.0 if epoch is None else self.tau(epoch), g)
            weights[kind], active[kind] = h, [[op] for op in k.tolist()]
        return weights, active


def gdas_weights(alpha: Tensor, tau: float, g: Tensor) -> tuple[Tensor, Tensor]:
    """(h, k) of `GDAS` for alpha and noise g, both (edges, operations): h of that shape, k (edges).

    In value h is one_hot(k), up to rounding at k and exactly 0 elsewhere; its gradient is that of p.
    """
    p = perturb(alpha, tau, g).softmax(dim=-1)
    k = p.argmax(dim=-1)
    return F.one_hot(k, p.shape[-1]).to(p) - p.detach() + p, k


class RWS(Method):
    """Random search with weight sharing (Li and Talwalkar, UAI 2019): the weights of uniformly drawn architectures are
    trained; the result is the best of `NUM_SCORED` more, by the validation accuracy that they have with these weights.
    """

    NUM_SCORED = 100
    trains_architecture = False

    def __init__(self, args: argparse.Namespace, space: Space, device: torch.device) -> None:
        super().__init__(args, space, device)
        self.architecture = nn.ParameterDict()
        self.rng = np.random.default_rng(args.seed)
        self.draw()

    def summary(self) -> str:
        return f"random search with shared weights, the best of {self.NUM_SCORED}"

    def draw(self) -> None:
        """Draw an architecture: an operation for each edge, as `random_architecture` does."""
        shape = self.cells.num_edges, len(self.space.primitives)
        none = [primitive == "none" and not self.cells.none_may_be_chosen for primitive in self.space.primitives]
        self.scores = {kind: np.where(none, -1, self.rng.random(shape)) for kind in self.cells.types}

    def before_step(self, epoch: int, step: int) -> None:
        self.draw()

    def operations(self, epoch: int | None) -> Operations:
        active = {kind: [[int(op)] for op in scores.argmax(axis=1)] for kind, scores in self.scores.items()}
        return {kind: torch.ones(s.shape, device=self.device) for kind, s in self.scores.items()}, active

    def finish(self, score: Callable[[dict[str, Tensor], dict[str, list[list[int]]]], float]) -> None:
        best = -np.inf
        for _ in range(self.NUM_SCORED):
            self.draw()
            if (accuracy := score(*self.operations(None))) > best:
                best, chosen = accuracy, self.scores
        self.scores = chosen

    def genotype(self):
        """The best one after `finish`, before it the last one drawn."""
        return derive(self.scores, self.space)

    def replicated(self) -> dict:
        return {f"scores {kind}": scores for kind, scores in self.scores.items()}

    def state_dict(self) -> dict:
        scores = {kind: torch.from_numpy(scores.copy()) for kind, scores in self.scores.items()}
        return super().state_dict() | {"scores": scores, "rng": repr(self.rng.bit_generator.state)}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.scores = {kind: scores.numpy() for kind, scores in state["scores"].items()}
        self.rng.bit_generator.state = ast.literal_eval(state["rng"])


METHODS = {"ddsas": DDSAS, "darts": DARTS, "gdas": GDAS, "rws": RWS}


def random_architecture(space: Space, rng: np.random.Generator):
    """An architecture drawn uniformly: operations, and in the DARTS space the two edges of each node."""
    cells = CELLS[space.cells]
    return derive({kind: rng.random((cells.num_edges, len(space.primitives))) for kind in cells.types}, space)


def derive(scores: dict[str, np.ndarray], space: Space):
    """The genotype for scores (edges, operations) per cell type; takes `none` out where the space says so."""
    cells = CELLS[space.cells]
    if not cells.none_may_be_chosen:
        none = [primitive == "none" for primitive in space.primitives]
        scores = {kind: np.where(none, -np.inf, table) for kind, table in scores.items()}
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
