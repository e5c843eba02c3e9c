"""DynamicSpace under any sequence of update, sample, shrink, set_available, save and load: what always holds."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import genotypes
from genotypes import EDGES, NODES, PRIMITIVES
from lib import checkpoints
from model_search import CELL_TYPES, DynamicSpace

SEEDS = st.integers(0, 2**32 - 1)


class AnySequence(RuleBasedStateMachine):
    """Beside the space, the sum and the number of all weights that each operation was credited with."""

    @initialize(primitives=st.permutations(PRIMITIVES), with_none=st.booleans(), max_ops=st.integers(EDGES, 110))
    def begin(self, primitives: list[str], with_none: bool, max_ops: int) -> None:
        self.primitives = primitives if with_none else [name for name in primitives if name != "none"]
        self.max_ops, self.updates = max_ops, 0
        self.space = DynamicSpace(self.primitives, max_ops=max_ops)
        shape = EDGES, len(self.primitives)
        self.credit = {kind: np.zeros(shape) for kind in CELL_TYPES}
        self.times = {kind: np.zeros(shape) for kind in CELL_TYPES}

    @rule(seed=SEEDS, scale=st.sampled_from([0.0, 1e-6, 1.0, 100.0]))
    def update(self, seed: int, scale: float) -> None:
        rng = np.random.default_rng(seed)
        weights, betas = (
            {kind: scale * rng.standard_normal(self.credit[kind].shape) for kind in CELL_TYPES} for _ in range(2)
        )
        for kind in CELL_TYPES:
            self.credit[kind] += weights[kind] * self.space.active[kind]
            self.times[kind] += self.space.active[kind]
        self.updates += 1
        self.space.update(weights, betas)

    @rule()
    def sample(self) -> None:
        self.space.sample()
        self.check_sample()

    @rule(seed=SEEDS)
    def sample_random(self, seed: int) -> None:
        self.space.sample_random(np.random.default_rng(seed))
        self.check_sample()

    def check_sample(self) -> None:
        """Exactly max_ops counted operations where there are that many, and one at least on every edge."""
        counted = self.space.counted
        for kind in CELL_TYPES:
            active = self.space.active[kind] & counted
            assert active.sum() == min(self.max_ops, (self.space.available[kind] & counted).sum())
            assert active.any(axis=1).all() and (self.space.active[kind] <= self.space.available[kind]).all()
            assert self.space.active_ops()[kind] == [np.flatnonzero(row).tolist() for row in self.space.active[kind]]

    @rule(num=st.integers(0, 60))
    def shrink(self, num: int) -> None:
        before = {kind: self.space.available[kind].copy() for kind in CELL_TYPES}
        self.space.shrink(num)
        for kind in CELL_TYPES:
            after, saliency = self.space.available[kind], self.space.saliency[kind]
            removed = before[kind] & ~after
            assert (after <= before[kind]).all()
            assert removed.sum() == min(num, before[kind].sum() - EDGES)
            spare = after & ~((after & self.space.counted).sum(axis=1, keepdims=True) == 1)
            if removed.any() and spare.any():  # those that could have gone instead are no worse
                assert saliency[removed].max() <= saliency[spare].min()

    @rule(n=st.integers(0, len(PRIMITIVES) + 1))
    def set_available(self, n: int) -> None:
        first = self.primitives[:n]
        if n > len(self.primitives) or not set(first) - {"none"}:
            with pytest.raises(ValueError, match="an edge needs an operation"):
                self.space.set_available(n)
        else:
            self.space.set_available(n)
            for kind in CELL_TYPES:
                assert self.space.available[kind].sum(axis=1).tolist() == [n] * EDGES

    @rule()
    def save_and_load(self) -> None:
        """Through a checkpoint file into a fresh space; all that follows is done with that one."""
        self.space, saved = DynamicSpace(self.primitives, max_ops=self.max_ops), self.space
        self.space.load_state_dict(through_a_file(saved.state_dict()))
        for name in DynamicSpace.ARRAYS:
            for kind, array in getattr(saved, name).items():
                restored = getattr(self.space, name)[kind]
                assert restored.dtype == array.dtype and restored.tobytes() == array.tobytes()
        assert self.space.total == saved.total
        state = saved.state_dict()
        saved.saliency["normal"][:] = -1  # the state is a copy
        assert not (state["saliency"]["normal"] == -1).all()

    @precondition(lambda self: self.updates)
    @rule()
    def genotype(self) -> None:
        """Two sources for each node, different ones, with operations that are available."""
        genotype = self.space.genotype()
        assert genotypes.parse(str(genotype)) == genotype
        for kind in CELL_TYPES:
            pairs = getattr(genotype, kind)
            for node in range(NODES):
                first = sum(2 + before for before in range(node))
                chosen = pairs[2 * node : 2 * node + 2]
                assert len({source for _, source in chosen}) == 2
                for op, source in chosen:
                    assert self.space.available[kind][first + source, self.primitives.index(op)]

    @invariant()
    def every_edge_has_an_operation(self) -> None:
        for kind in CELL_TYPES:
            assert (self.space.available[kind] & self.space.counted).any(axis=1).all()

    @invariant()
    def saliency_is_the_running_mean(self) -> None:
        """Of what was credited and of the first visit, which has the value 0."""
        for kind in CELL_TYPES:
            np.testing.assert_array_equal(self.space.visits[kind], 1 + self.times[kind])
            mean = self.credit[kind] / (1 + self.times[kind])
            np.testing.assert_allclose(self.space.saliency[kind], mean, rtol=1e-9, atol=1e-9)
            assert np.isfinite(self.space.ucb[kind]).all()
        assert self.space.total == 1 + self.updates


def through_a_file(state: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save_checkpoint(Path(folder) / "checkpoint.pt", state)
        return checkpoints.load_checkpoint(Path(folder) / "checkpoint.pt")


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
