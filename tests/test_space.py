"""DynamicSpace against the published bandit, and its rules one by one."""

import numpy as np
import pytest
import torch
from golden_arrays import golden
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import genotypes
from genotypes import EDGES, PRIMITIVES, SPACES
from model_search import CELL_TYPES, Architecture, DynamicSpace
from space import INCOMING


def architecture_of(arrays, round_):
    architecture = Architecture(14, 8).double()
    with torch.no_grad():
        for name, parameter in architecture.named_parameters():
            parameter.copy_(torch.tensor(arrays[name][round_]))
    return architecture


@pytest.mark.parametrize("name", ["static_L14", "static_L28", "static_L56", "expand_L28", "shrink_trace"])
def test_forty_rounds_are_those_of_the_published_code(name):
    arrays = golden(f"space_{name}.npz")
    space = DynamicSpace(
        arrays["primitives"].tolist(), max_ops=int(arrays["max_ops"]), confidence=float(arrays["confidence"])
    )
    stages = list(SPACES["expand"].expand.values())
    for round_ in range(40):
        if name.startswith("expand") and round_ % 8 == 0:
            space.set_available(stages[round_ // 8])
        if name.startswith("shrink") and arrays["shrink"][round_]:
            space.shrink(int(arrays["shrink"][round_]))
        architecture = architecture_of(arrays, round_)
        raw = architecture.weights(space.active_ops(), norm=False)
        space.update(
            {kind: w.detach().numpy() for kind, w in raw.items()},
            {kind: b.detach().numpy() for kind, b in architecture.betas().items()},
        )
        space.sample()
        for kind in CELL_TYPES:
            for own, published in (("saliency", "saliency"), ("visits", "opt_steps"), ("ucb", "ucb")):
                expected = arrays[f"{published}_{kind}"][round_]
                np.testing.assert_allclose(getattr(space, own)[kind], expected, rtol=1e-6, atol=1e-12)
            np.testing.assert_array_equal(space.active[kind], arrays[f"active_{kind}"][round_])
            np.testing.assert_array_equal(space.available[kind], arrays[f"available_{kind}"][round_])
    if "genotype" in arrays:
        assert str(space.genotype()) == str(arrays["genotype"])


def test_shrinking_is_that_of_the_published_code():
    arrays = golden("space_shrink.npz")
    space = DynamicSpace(arrays["primitives"].tolist())
    space.saliency = {kind: arrays[f"saliency_{kind}"] for kind in CELL_TYPES}
    for stage in range(3):
        space.shrink(int(arrays["num"]))
        for kind in CELL_TYPES:
            np.testing.assert_array_equal(space.available[kind], arrays[f"available_{kind}"][stage])


def test_five_shrinks_leave_42_operations_and_no_edge_empty():
    space = DynamicSpace(PRIMITIVES)
    space.saliency["normal"][3:] = 1  # all edges equal: the guard is needed on the first ones
    for num in SPACES["shrink"].shrink.values():
        space.shrink(num)
    for available in space.available.values():
        assert available.sum() == 42 and (available & space.counted).any(axis=1).all()


def test_none_rides_along_where_it_ranks_above_the_cut():
    space = DynamicSpace(["a", "none", "b"], num_edges=14, max_ops=15)
    ucb = space.ucb["normal"]
    ucb[:] = [0.5, 0.1, 0.4]
    ucb[0] = [0.5, 0.9, 0.4]  # met before the edge's first operation
    ucb[1] = [0.5, 0.45, 0.6]  # below the edge's first, above the cut, which is 0.5
    ucb[2] = [0.5, 0.3, 0.6]  # below the cut
    space.sample()
    active = space.active["normal"]
    assert active[:, [0, 2]].sum() == 15
    assert active[:3, 1].tolist() == [True, False, False]
    assert active[1].tolist() == [True, False, True], "edge 1 has the best of the rest: the walk ends there"


def test_ties_go_to_the_lower_index():
    space = DynamicSpace(PRIMITIVES, max_ops=14)
    space.sample()
    assert space.active_ops()["normal"] == [[0, 1]] * 14  # `none` is met first, then max_pool_3x3
    pairs = [("max_pool_3x3", 0), ("max_pool_3x3", 1)] * 4
    assert space.genotype().normal == pairs and space.genotype().reduce == pairs


def test_the_better_edge_comes_first_and_none_never():
    space = DynamicSpace(PRIMITIVES)
    space.saliency["normal"][:, 0] = 9  # none
    space.saliency["normal"][3, 4] = 2  # node 1, source 1
    space.saliency["normal"][4, 5] = 3  # node 1, source 2
    space.saliency["normal"][2, 6] = 4  # node 1, source 0: but not available
    space.available["normal"][2, 6] = False
    assert space.genotype().normal[2:4] == [("sep_conv_5x5", 2), ("sep_conv_3x3", 1)]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="at least 14"):
        DynamicSpace(PRIMITIVES, max_ops=13)
    with pytest.raises(ValueError, match="saved space"):
        DynamicSpace(PRIMITIVES[:5]).load_state_dict(DynamicSpace(PRIMITIVES).state_dict())


# ---- any sequence of update, sample, shrink, set_available, save and load: what always holds -------------------------

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
