"""What is decided for a GPU and can be tested without one: its settings, optimizers, copies. See also test_cuda.py."""

from __future__ import annotations

import copy

import engine
import numpy as np
import pytest
import torch

import model_search
import retrain
import search
import train_search
import utils
from genotypes import PRIMITIVES
from lib import cli, data
from model_search import Architecture, DynamicSpace


@pytest.fixture
def restored():
    """The settings are the process's: each is put back."""
    benchmark, matmul = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    convolutions = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32 = benchmark, matmul
    torch.backends.cudnn.allow_tf32 = convolutions


@pytest.mark.parametrize(
    ("script", "flag", "tf32"),
    [(search, [], True), (search, ["--no-tf32"], False), (retrain, ["--no-tf32"], False), (train_search, [], True)],
)
def test_the_settings_are_made_before_the_first_step(script, flag, tf32, pictures, tmp_path, monkeypatch, restored):
    """A resumed run takes those of the run, though they were not on its command line."""
    utils.cuda_settings(not tf32)
    torch.backends.cudnn.benchmark = False

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(engine.Training, "fit", stop)
    small = "--dataset folder --image_size 16 --init_channels 2 --layers 2 --batch_size 8 --device cpu --quiet"
    argv = [*small.split(), "--data", str(pictures), "--save", f"{tmp_path}/run", *flag]
    if script is not train_search:  # whose folder has the time in its name
        argv += ["--epochs", "2"]
    with pytest.raises(Stop):
        script.main(cli.parse(script.get_parser(), argv))
    found = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    assert found == (True, tf32, tf32)
    utils.cuda_settings(not tf32)
    (folder,) = tmp_path.iterdir()
    with pytest.raises(Stop):
        script.main(cli.parse(script.get_parser(), ["--resume", str(folder), "--device", "cpu"]))
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is tf32


# ---- optimizers ------------------------------------------------------------------------------------------------------


def steps(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda parameters, fused: torch.optim.SGD(parameters, 0.1, 0.9, weight_decay=0.01, fused=fused),
    "adam": lambda parameters, fused: torch.optim.Adam(parameters, 0.1, (0.5, 0.999), weight_decay=0.01, fused=fused),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("before", "after"), [(True, None), (None, True)])
def test_a_checkpoint_goes_on_fused_or_not(make, before, after):
    """PyTorch's own load_state_dict would take the kernels from the file."""
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    first = make(parameters, before)
    steps(first, parameters, range(3))
    others = copy.deepcopy(parameters)
    second = make(others, after)
    engine.load_optimizer(second, copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["fused"] is after
    steps(first, parameters, range(3, 6))
    steps(second, others, range(3, 6))
    for ours, expected in zip(others, parameters, strict=True):
        torch.testing.assert_close(ours, expected)


def test_fused_sgd_cannot_train_operations_that_become_active_later():
    """Why DDSAS' weights have another SGD: the momentum of all weights would have to begin at the same step."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for fused in (None, True):
        optimizer = OPTIMIZERS["sgd"](parameters, fused)
        parameters[1].grad = None
        steps(optimizer, parameters[:1], range(1))
        if fused:
            with pytest.raises((RuntimeError, TypeError, AttributeError)):
                steps(optimizer, parameters, range(1, 2))
        else:
            steps(optimizer, parameters, range(1, 2))


def made(monkeypatch, script, flags: str = "") -> dict[str, bool | None]:
    """Which optimizers of a script are fused on a GPU; they are made on the CPU."""
    monkeypatch.setattr(engine, "fused", lambda device: True)
    argv = f"--init_channels 2 --layers 2 --dataset fashion_mini {flags}".split()
    args, info = cli.parse(script.get_parser(), argv), data.INFO["fashion_mini"]
    cpu = torch.device("cpu")
    if script is retrain:
        state = retrain.Retraining(args, engine.load_genotype("DARTS_V2"), info, None, cpu)
    elif script is search:
        state = search.Search(args, info, None, search.Judge(args), cpu)
    else:
        state = train_search.ProgressiveSearch(args, info, None, cpu)
    optimizers = {"weights": state.optimizer, "architecture": getattr(state, "arch_optimizer", None)}
    return {name: optimizer.defaults["fused"] for name, optimizer in optimizers.items() if optimizer}


def test_what_always_has_gradients_is_stepped_by_one_kernel(monkeypatch):
    assert made(monkeypatch, retrain) == {"weights": True}
    assert made(monkeypatch, train_search) == {"weights": True, "architecture": True}
    assert made(monkeypatch, search, "--method darts") == {"weights": True, "architecture": True}
    for method in ("ddsas", "gdas"):
        assert made(monkeypatch, search, f"--method {method}") == {"weights": None, "architecture": True}
    monkeypatch.undo()
    assert made_on("cuda") is True and made_on("cpu") is None


def made_on(device: str) -> bool | None:
    return engine.fused(torch.device(device))


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_the_mask_is_copied_to_the_device_only_when_the_subspace_moves(monkeypatch):
    copies = []  # of masks, not of the Gumbel softmax' numbers
    copied = lambda tensor, device: tensor if tensor.is_floating_point() else copies.append(device) or tensor  # noqa: E731
    monkeypatch.setattr(model_search, "to_device", copied)
    architecture, space, rng = Architecture(14, 8), DynamicSpace(PRIMITIVES), np.random.default_rng(0)
    for moves in (1, 2):
        space.sample_random(rng)
        for _ in range(3):
            active = space.active_ops()
            w = architecture.weights(active, tau=1.0)
            for kind, lists in active.items():
                assert [row.nonzero().flatten().tolist() for row in w[kind]] == lists
        assert len(copies) == 2 * moves
    assert (architecture.weights(None)["normal"] > 0).all() and len(copies) == 2 * moves + 2
    active = space.active_ops()
    architecture.weights(active)
    active["normal"][0][:] = [7]  # the caller's own lists
    assert architecture.weights(active)["normal"][0].nonzero().tolist() == [[7]]
