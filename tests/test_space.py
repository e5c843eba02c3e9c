"""DynamicSpace against the published bandit, and its rules one by one."""

import itertools

import numpy as np
import pytest
import torch
from golden_arrays import golden

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


def test_ties_go_to_the_lower_index_the_better_edge_comes_first_and_none_never():
    space = DynamicSpace(PRIMITIVES, max_ops=14)
    space.sample()
    assert space.active_ops()["normal"] == [[0, 1]] * 14  # `none` is met first, then max_pool_3x3
    assert space.genotype().normal == space.genotype().reduce == [("max_pool_3x3", 0), ("max_pool_3x3", 1)] * 4
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
    for n in (0, 1, 9):  # nothing, `none` alone, more than there are
        with pytest.raises(ValueError, match="an edge needs an operation"):
            DynamicSpace(PRIMITIVES).set_available(n)


@pytest.mark.parametrize("seed", range(12))
def test_what_always_holds(seed):
    """Any sequence of updates, samples, shrinks, stages, saving and loading; beside it what each operation got."""
    rng = np.random.default_rng(seed)
    primitives = [name for name in rng.permutation(PRIMITIVES).tolist() if name != "none" or seed % 2]
    space = DynamicSpace(primitives, max_ops=int(rng.integers(EDGES, 110)))
    credit, times = ({kind: np.zeros((EDGES, len(primitives))) for kind in CELL_TYPES} for _ in range(2))
    for _ in range(25):
        weights, betas = ({k: rng.choice([0, 1, 100]) * rng.random(c.shape) for k, c in credit.items()} for _ in "ab")
        for kind in CELL_TYPES:
            credit[kind] += weights[kind] * space.active[kind]
            times[kind] += space.active[kind]
        space.update(weights, betas)
        change = rng.integers(6)
        if change == 0:
            shrink_and_check(space, int(rng.integers(60)))
        elif change == 1:
            stage = int(rng.integers(2, len(primitives) + 1))  # one of them is not `none`
            space.set_available(stage)
            assert all((space.available[kind].sum(axis=1) == stage).all() for kind in CELL_TYPES)
        elif change == 2:  # into a fresh space, with which all that follows is done
            saved, space = space, DynamicSpace(primitives, max_ops=space.max_ops)
            space.load_state_dict(saved.state_dict())
            for name, kind in itertools.product(DynamicSpace.ARRAYS, CELL_TYPES):
                array, restored = getattr(saved, name)[kind], getattr(space, name)[kind]
                assert restored.dtype == array.dtype and restored.tobytes() == array.tobytes()
                array[:] = 0  # the state is a copy
        space.sample() if rng.random() < 0.5 else space.sample_random(rng)
        genotype = space.genotype()
        assert genotypes.parse(str(genotype)) == genotype
        for kind in CELL_TYPES:
            available, active = space.available[kind], space.active[kind] & space.counted
            assert active.any(axis=1).all() and (space.active[kind] <= available).all()
            assert active.sum() == min(space.max_ops, (available & space.counted).sum())
            assert space.active_ops()[kind] == [np.flatnonzero(row).tolist() for row in space.active[kind]]
            for index, (op, source) in enumerate(getattr(genotype, kind)):
                assert available[INCOMING[index // 2][source], primitives.index(op)]
            np.testing.assert_array_equal(space.visits[kind], 1 + times[kind])
            np.testing.assert_allclose(space.saliency[kind], credit[kind] / (1 + times[kind]), rtol=1e-9, atol=1e-9)
            assert np.isfinite(space.ucb[kind]).all()


def shrink_and_check(space: DynamicSpace, num: int) -> None:
    before = {kind: space.available[kind].copy() for kind in CELL_TYPES}
    space.shrink(num)
    for kind in CELL_TYPES:
        after, saliency = space.available[kind], space.saliency[kind]
        removed = before[kind] & ~after
        assert (after <= before[kind]).all() and removed.sum() == min(num, before[kind].sum() - EDGES)
        spare = after & ~((after & space.counted).sum(axis=1, keepdims=True) == 1)
        if removed.any() and spare.any():  # those that could have gone instead are no worse
            assert saliency[removed].max() <= saliency[spare].min()
