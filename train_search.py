"""P-DARTS search (Chen et al., ICCV 2019): three stages over ever deeper supernets and ever fewer operations."""

from __future__ import annotations

import numpy as np
import torch

from genotypes import NODES, Genotype

CELLS = ("normal", "reduce")
Candidates = dict[str, list[list[str]]]  # cell type -> for each of the 14 edges its primitives that are still on
Alphas = dict[str, np.ndarray]  # cell type -> 14 x n, for the n candidates of each edge
Table = list[dict[str, float]]  # for each of the 14 edges of a cell: primitive -> probability


# ---- From alpha to a genotype: pure functions. Of equal probabilities the earlier one always goes first. ----


def drop_candidates(candidates: Candidates, alphas: Alphas, num_drop: int, drop_none_first: bool = False) -> Candidates:
    """The candidates without the ``num_drop`` of lowest softmax(alpha) on each edge (P-DARTS, section 3.2).

    With ``drop_none_first``, as at the end of the last stage, `none` goes first where it is still on and counts as one.
    ValueError if an edge would keep no operation.
    """
    kept = {}
    for cell in CELLS:
        kept[cell] = []
        for names, p in zip(candidates[cell], probabilities(candidates[cell], alphas[cell]), strict=True):
            if not 0 <= num_drop < len(names):
                raise ValueError(f"cannot drop {num_drop} of the {len(names)} candidates of an edge: {names}")
            dropped = weakest_first(p, drop_none_first)[:num_drop]
            kept[cell].append([name for name in names if name not in dropped])
    return kept


def derive(candidates: Candidates, alphas: Alphas) -> Genotype:
    """The genotype at the end of the last stage: one op per edge, two edges per node, in edge order.

    ValueError if a chosen edge has no candidate besides `none`.
    """
    return Genotype(
        normal=derive_cell(probabilities(candidates["normal"], alphas["normal"], none=0)),
        normal_concat=range(2, 2 + NODES),
        reduce=derive_cell(probabilities(candidates["reduce"], alphas["reduce"], none=0)),
        reduce_concat=range(2, 2 + NODES),
    )


def restrict_skips(candidates: Candidates, alphas: Alphas) -> dict[int, Genotype]:
    """The genotypes with at most M skip connections in the normal cell, for each M = 8, 7, ..., 0 that forced a change.

    While there are too many, the least probable of the chosen ones has its probability set to 0 and the cell is derived
    again (search space regularisation, P-DARTS section 3.3). Arguments are those of the last stage, as for ``derive``.
    An M is left out if the candidates cannot satisfy it.
    """
    table = probabilities(candidates["normal"], alphas["normal"], none=0)
    genotype, restricted = derive(candidates, alphas), {}
    for most in range(2 * NODES, -1, -1):
        while count_skips(genotype) > most:
            skips = [table[e] for e, op in chosen_edges(table) if op == "skip_connect" and table[e][op] > 0]
            if not skips:  # what is left are edges that have no other candidate
                return restricted
            min(skips, key=lambda p: p["skip_connect"])["skip_connect"] = 0.0
            genotype = genotype._replace(normal=derive_cell(table))
            if count_skips(genotype) <= most:
                restricted[most] = genotype
    return restricted


def count_skips(genotype: Genotype) -> int:
    """The number of skip connections in the normal cell."""
    return sum(op == "skip_connect" for op, _ in genotype.normal)


def probabilities(edges: list[list[str]], alphas: np.ndarray, none: float | None = None) -> Table:
    """softmax(alpha) over the candidates of each edge of a cell; the probability of `none` is overwritten if given.

    In float32, as the search computes it, whatever the precision of ``alphas``.
    """
    rows = torch.softmax(torch.as_tensor(alphas, dtype=torch.float32), dim=-1).tolist()
    table = [dict(zip(names, row, strict=True)) for names, row in zip(edges, rows, strict=True)]
    return table if none is None else [{op: none if op == "none" else p for op, p in edge.items()} for edge in table]


def weakest_first(edge: dict[str, float], none_first: bool) -> list[str]:
    """The candidates of an edge in the order in which they are dropped."""
    return sorted(edge, key=lambda op: (not (none_first and op == "none"), edge[op]))


def chosen_edges(table: Table) -> list[tuple[int, str]]:
    """(edge, op) of a discovered cell in edge order: two edges per node, with the last op standing on each.

    The edges are those of highest score: the largest probability, `none` being 0 in ``table``.
    """
    chosen, first = [], 0
    for node in range(NODES):
        edges = range(first, first + 2 + node)
        best = sorted(edges, key=lambda e: max(table[e].values()))[-2:]
        chosen += [(e, weakest_first(table[e], none_first=True)[-1]) for e in sorted(best)]
        first = edges.stop
    return chosen


def derive_cell(table: Table) -> list[tuple[str, int]]:
    """The (op, source) pairs of a genotype."""
    edges = chosen_edges(table)
    if any(op == "none" for _, op in edges):
        raise ValueError("an edge has no candidate besides none: keep at least two operations until the end")
    sources = [source for node in range(NODES) for source in range(2 + node)]  # of the 14 edges
    return [(op, sources[edge]) for edge, op in edges]
