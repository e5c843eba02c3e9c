"""The bandit (UCB) that moves the subspace of a search: numpy, and no network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from genotypes import CELL_TYPES, EDGE_LIST, EDGES, NODES, Genotype

INCOMING = [[e for e, (node, _) in enumerate(EDGE_LIST) if node == n] for n in range(NODES)]  # edges, source by source


def descending(x: np.ndarray) -> np.ndarray:
    """Indices that sort x along its last axis from high to low, the lower index first among equals."""
    return np.argsort(-x, axis=-1, kind="stable")


def two_edges_a_node(scores: dict[str, np.ndarray], primitives: list[str]) -> Genotype:
    """Per node the two edges whose best operation has the highest score, the better one first, each with that one.

    ``scores`` (14, o) per cell type, -inf for operations that cannot be chosen (DARTS, section 2.4; DDSAS: saliency).
    """
    cells = {kind: [] for kind in scores}
    for kind, s in scores.items():
        best, score = s.argmax(axis=1), s.max(axis=1)
        for edges in INCOMING:
            for source in descending(score[edges])[:2].tolist():
                cells[kind].append((primitives[best[edges[source]]], source))
    concat = range(2, 2 + NODES)
    return Genotype(cells["normal"], concat, cells["reduce"], concat)


class DynamicSpace:
    """The subspace in which the search takes place, and the bandit (UCB) that moves it (DDSAS, Yang et al., 2021).

    Per cell type, arrays (num_edges, num_ops): ``available`` operations of the space, ``active`` ones of the subspace,
    the running mean ``saliency`` of each operation's weight, the number of ``visits``, the upper confidence bound
    ``ucb``; and the counter ``total`` of updates. Ties are resolved by the lower index.
    """

    ARRAYS = ("available", "active", "saliency", "visits", "ucb")

    def __init__(
        self,
        primitives: list[str],
        num_edges: int = EDGES,
        max_ops: int = 28,
        confidence: float = 1.44,
        cell_types: tuple[str, ...] = CELL_TYPES,
        derive: Callable[[dict[str, np.ndarray], list[str]], object] = two_edges_a_node,
    ) -> None:
        if max_ops < num_edges:
            raise ValueError(f"max_ops (--dss_max_ops) must be at least {num_edges}, one per edge; got {max_ops}")
        self.primitives = list(primitives)
        self.max_ops, self.confidence = max_ops, confidence
        self.counted = np.array([primitive != "none" for primitive in primitives])  # `none` rides along uncounted
        self.cell_types, self.derive = cell_types, derive
        shape = num_edges, len(primitives)
        self.available = {kind: np.ones(shape, bool) for kind in cell_types}
        self.active = {kind: np.zeros(shape, bool) for kind in cell_types}
        self.saliency = {kind: np.zeros(shape) for kind in cell_types}
        self.visits = {kind: np.ones(shape) for kind in cell_types}
        self.ucb = {kind: np.zeros(shape) for kind in cell_types}
        self.total = 1

    def update(self, weights: dict[str, np.ndarray], betas: dict[str, np.ndarray]) -> None:
        """Credit the active operations with their raw weights w' and renew every upper confidence bound.

        s <- (s n + w') / (n + 1), n <- n + 1 for the active ones; ucb = sigmoid(beta) + c sqrt(ln T / n) for all.
        """
        for kind in self.cell_types:
            s, n, active = self.saliency[kind], self.visits[kind], self.active[kind]
            s[active] = (s[active] * n[active] + np.asarray(weights[kind], float)[active]) / (n[active] + 1)
            n[active] += 1
            zeta = 1 / (1 + np.exp(-np.asarray(betas[kind], float)))
            self.ucb[kind] = zeta + self.confidence * np.sqrt(np.log(self.total) / n)
        self.total += 1

    def sample(self) -> None:
        """Make the operations of highest upper confidence bound active: one per edge, then the best of all."""
        for kind in self.cell_types:
            self.active[kind] = self._choose(self.ucb[kind], self.available[kind])

    def sample_random(self, rng: np.random.Generator) -> None:
        """The same with uniform random scores."""
        for kind in self.cell_types:
            self.active[kind] = self._choose(rng.random(self.ucb[kind].shape), self.available[kind])

    def _choose(self, scores: np.ndarray, available: np.ndarray) -> np.ndarray:
        """The active set (edges, operations) for these scores; `none` is active where it is met on the way."""
        active = np.zeros_like(available)
        for edge, row in enumerate(descending(scores)):
            for op in row[available[edge][row]]:
                active[edge, op] = True
                if self.counted[op]:
                    break
        remaining = self.max_ops - len(available)
        for index in descending(scores.ravel()):
            if remaining == 0:
                break
            edge, op = divmod(index, available.shape[1])
            if available[edge, op] and not active[edge, op]:
                active[edge, op] = True
                remaining -= self.counted[op]
        return active

    def shrink(self, num: int) -> None:
        """Make the ``num`` operations of lowest saliency unavailable, per cell type; no edge loses its last.

        The active set stays as it is until `sample`: the update before it still credits all that were active.
        """
        for kind in self.cell_types:
            available, remaining = self.available[kind], num
            for index in np.argsort(self.saliency[kind], axis=None, kind="stable"):
                edge, op = divmod(index, available.shape[1])
                if remaining == 0:
                    break
                last = self.counted[op] and (available[edge] & self.counted).sum() == 1
                if available[edge, op] and not last:
                    available[edge, op] = False
                    remaining -= 1

    def set_available(self, n: int) -> None:
        """The first ``n`` primitives are available on every edge; ValueError if there is none but `none` among them."""
        if not self.counted[:n].any() or n > len(self.primitives):
            raise ValueError(f"cannot make {n} of {', '.join(self.primitives)} available: an edge needs an operation")
        for kind in self.cell_types:
            self.available[kind][:] = np.arange(len(self.primitives)) < n

    def active_ops(self) -> dict[str, list[list[int]]]:
        """The indices of the active operations: per cell type one list for each edge."""
        return {kind: [np.flatnonzero(row).tolist() for row in self.active[kind]] for kind in self.cell_types}

    def genotype(self) -> Genotype:
        """The architecture of highest saliency among what is available and not `none`."""
        scores = {k: np.where(self.counted & self.available[k], s, -np.inf) for k, s in self.saliency.items()}
        return self.derive(scores, self.primitives)

    def state_dict(self) -> dict:
        """Everything that changes, as plain tensors and numbers."""
        arrays = {n: {k: torch.from_numpy(a.copy()) for k, a in getattr(self, n).items()} for n in self.ARRAYS}
        return arrays | {"total": self.total}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned; ValueError if it belongs to a space of another shape."""
        for name in self.ARRAYS:
            for kind, own in getattr(self, name).items():
                array = state[name][kind].numpy()
                if array.shape != own.shape:
                    raise ValueError(f"the saved space is {array.shape}, this one {own.shape} (edges, operations)")
                own[:] = array
        self.total = int(state["total"])
