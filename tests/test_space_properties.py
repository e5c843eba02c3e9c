"""DynamicSpace under any sequence of update, sample, shrink, set_available, save and load: what always holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import genotypes
from genotypes import EDGES, PRIMITIVES
from model_search import CELL_TYPES, DynamicSpace
from space import INCOMING

SEEDS = st.integers(0, 2**32 - 1)


class AnySequence(RuleBasedStateMachine):
    """Beside the space, the sum and the number of all weights that each operation was credited with."""

    @initialize(primitives=st.permutations(PRIMITIVES), with_none=st.booleans(), max_ops=st.integers(EDGES, 110))
    def begin(self, primitives: list[str], with_none: bool, max_ops: int) -> None:
        self.primitives = primitives if with_none else [name for name in primitives if name != "none"]
        self.space = DynamicSpace(self.primitives, max_ops=max_ops)
        self.credit, self.times = ({k: np.zeros((EDGES, len(self.primitives))) for k in CELL_TYPES} for _ in range(2))

    @rule(seed=SEEDS, scale=st.sampled_from([0.0, 1e-6, 1.0, 100.0]))
    def update(self, seed: int, scale: float) -> None:
        rng = np.random.default_rng(seed)
        weights, betas = ({k: scale * rng.standard_normal(c.shape) for k, c in self.credit.items()} for _ in range(2))
        for kind in CELL_TYPES:
            self.credit[kind] += weights[kind] * self.space.active[kind]
            self.times[kind] += self.space.active[kind]
        self.space.update(weights, betas)

    @rule(seed=st.none() | SEEDS)
    def sample(self, seed: int | None) -> None:
        """Exactly max_ops counted operations where there are that many, and one at least on every edge."""
        space = self.space
        space.sample() if seed is None else space.sample_random(np.random.default_rng(seed))
        for kind in CELL_TYPES:
            active = space.active[kind] & space.counted
            assert active.sum() == min(space.max_ops, (space.available[kind] & space.counted).sum())
            assert active.any(axis=1).all() and (space.active[kind] <= space.available[kind]).all()
            assert space.active_ops()[kind] == [np.flatnonzero(row).tolist() for row in space.active[kind]]

    @rule(num=st.integers(0, 60))
    def shrink(self, num: int) -> None:
        before = {kind: self.space.available[kind].copy() for kind in CELL_TYPES}
        self.space.shrink(num)
        for kind in CELL_TYPES:
            after, saliency = self.space.available[kind], self.space.saliency[kind]
            removed = before[kind] & ~after
            assert (after <= before[kind]).all() and removed.sum() == min(num, before[kind].sum() - EDGES)
            spare = after & ~((after & self.space.counted).sum(axis=1, keepdims=True) == 1)
            if removed.any() and spare.any():  # those that could have gone instead are no worse
                assert saliency[removed].max() <= saliency[spare].min()

    @rule(n=st.integers(0, len(PRIMITIVES) + 1))
    def set_available(self, n: int) -> None:
        if n > len(self.primitives) or not set(self.primitives[:n]) - {"none"}:
            with pytest.raises(ValueError, match="an edge needs an operation"):
                self.space.set_available(n)
        else:
            self.space.set_available(n)
            assert all(self.space.available[kind].sum(axis=1).tolist() == [n] * EDGES for kind in CELL_TYPES)

    @rule()
    def save_and_load(self) -> None:
        """Into a fresh space, with which all that follows is done."""
        saved, state = self.space, self.space.state_dict()
        self.space = DynamicSpace(self.primitives, max_ops=saved.max_ops)
        self.space.load_state_dict(state)
        for name in DynamicSpace.ARRAYS:
            for kind, array in getattr(saved, name).items():
                restored = getattr(self.space, name)[kind]
                assert restored.dtype == array.dtype and restored.tobytes() == array.tobytes()
                array[:] = 0  # the state is a copy

    @rule()
    def genotype(self) -> None:
        """Two sources for each node, different ones, with operations that are available."""
        genotype = self.space.genotype()
        assert genotypes.parse(str(genotype)) == genotype
        for kind in CELL_TYPES:
            for index, (op, source) in enumerate(getattr(genotype, kind)):
                edge = INCOMING[index // 2][source]
                assert self.space.available[kind][edge, self.primitives.index(op)]
                assert source != getattr(genotype, kind)[index ^ 1][1]

    @invariant()
    def saliency_is_the_running_mean(self) -> None:
        """Of what was credited and of the first visit, which has the value 0; and every edge has an operation."""
        for kind in CELL_TYPES:
            assert (self.space.available[kind] & self.space.counted).any(axis=1).all()
            np.testing.assert_array_equal(self.space.visits[kind], 1 + self.times[kind])
            mean = self.credit[kind] / (1 + self.times[kind])
            np.testing.assert_allclose(self.space.saliency[kind], mean, rtol=1e-9, atol=1e-9)
            assert np.isfinite(self.space.ucb[kind]).all()


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
