"""--compile: the same numbers, the same checkpoints, and no compilation beyond the first ones."""

from __future__ import annotations

import json

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import data
import engine
import evaluate
import retrain
import runs
import search
import train_search
import utils
from genotypes import CELL_TYPES


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Everything but the making of kernels."""
    monkeypatch.setattr(engine, "BACKEND", "aot_eager")
    counters.clear()
    yield
    torch.compiler.reset()


def compilations() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


# ---- retraining and evaluation ---------------------------------------------------------------------------------------

SMALL = "--dataset folder --image_size 16 --init_channels 2 --layers 1 --batch_size 26 --quiet --device cpu"


def retrained(pictures, folder, *more: str):
    """The run folder of two epochs of three steps, the last with a smaller batch."""
    argv = [*f"{SMALL} --epochs 2 --drop_path_prob 0 --arch DARTS_V2 --auxiliary".split(), *more]
    return retrain.main(utils.parse(retrain.get_parser(), [*argv, "--data", str(pictures), "--save", str(folder)]))


def history(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def assert_close_runs(ours, expected) -> None:
    for a, b in zip(history(ours), history(expected), strict=True):
        for name in ("train_loss", "train_acc", "test_loss", "test_acc"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    states = [runs.read_weights(folder / "checkpoint.pt")["state_dict"] for folder in (ours, expected)]
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-3, atol=1e-4)


def check_retraining_and_evaluation(pictures, tmp_path) -> None:
    plain = retrained(pictures, tmp_path / "plain", "--plain")  # what is compiled; fast.py rounds otherwise
    counters.clear()
    ours = retrained(pictures, tmp_path / "compiled", "--compile")
    assert_close_runs(ours, plain)
    results = []
    for more in ([], ["--compile"]):  # each tests what the other has trained
        argv = ["--model_path", str(plain if more else ours), "--data", str(pictures), "--device", "cpu", *more]
        results.append(evaluate.main(utils.parse(evaluate.get_parser(), argv)))
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], 1e-4)


def test_retraining_and_evaluation_give_the_same_numbers(pictures, tmp_path):
    check_retraining_and_evaluation(pictures, tmp_path)


@pytest.mark.long
def test_they_do_with_the_kernels_of_inductor(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "BACKEND", "inductor")
    check_retraining_and_evaluation(pictures, tmp_path)


def test_drop_path_of_every_epoch_and_smaller_batches_are_compiled_once(monkeypatch):
    monkeypatch.setattr(engine, "BACKEND", "eager")
    args = utils.parse(
        retrain.get_parser(), f"{SMALL} --arch DARTS_V2 --epochs 5 --drop_path_prob 0.5 --compile".split()
    )
    state = retrain.Retraining(
        args, engine.load_genotype("DARTS_V2"), data.INFO["fashion_mini"], None, torch.device("cpu")
    )
    probabilities, found = [], []
    for state.epoch in range(5):
        state.start_epoch()
        probabilities.append(state.network.drop_path_prob.item())
        for batch in (8, 8, 8 - state.epoch):
            loss = state.network(torch.randn(batch, 3, 16, 16))[0].square().mean()
            retrain.gradient_step(state.network, state.optimizer, loss, 5)
        found.append(compilations())
    assert probabilities == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert found == [1, 2, 2, 2, 2]


# ---- P-DARTS ---------------------------------------------------------------------------------------------------------


def stage(flags: str, candidates: list[str]) -> train_search.ProgressiveSearch:
    """A stage of P-DARTS with one cell and few operations."""
    argv = f"--init_channels 2 --layers 1 --dataset fashion_mini --device cpu {flags}".split()
    args = utils.parse(train_search.get_parser(), argv)
    torch.manual_seed(0)
    state = train_search.ProgressiveSearch(args, data.INFO["fashion_mini"], None, torch.device("cpu"))
    state.candidates = {kind: [candidates] * 14 for kind in CELL_TYPES}
    state.build_stage()
    return state


@pytest.mark.parametrize("flags", ["", pytest.param("--checkpoint_cells", marks=pytest.mark.long)])
def test_a_stage_of_pdarts_gives_the_same_numbers(flags):
    """Steps of alpha and of the weights, with smaller batches among them; running statistics move once a step."""
    states = [stage(f"{flags} {more}", ["max_pool_3x3", "skip_connect"]) for more in ("", "--compile")]
    generator = torch.Generator().manual_seed(0)
    found = []
    for batch in (8, 8, 5, 8, 6):
        x, y = torch.randn(batch, 3, 8, 8, generator=generator), torch.randint(0, 10, (batch,), generator=generator)
        for state in states:
            state.network.skip_dropout = 0.0
            arch_norm = state.architecture_step((x, y), (x, y))
            state.numbers = [*state.weight_step(x, y)[::2], arch_norm]
        for ours, expected in zip(states[1].numbers, states[0].numbers, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
        found.append(compilations())
    assert found == [2, 2, 4, 4, 4]
    for ours, expected in zip(*(state.network.state_dict().items() for state in states), strict=True):
        assert ours[0] == expected[0]
        torch.testing.assert_close(ours[1], expected[1], rtol=1e-4, atol=1e-5)


def test_the_dropout_of_skip_connections_changes_without_a_compilation(monkeypatch):
    monkeypatch.setattr(engine, "BACKEND", "eager")
    state = stage("--compile", ["skip_connect"])
    weights, x = state.operations()[0], torch.randn(4, 3, 8, 8)
    outputs = []
    for p in (0.0, 0.0, 0.5, 0.9):
        state.network.skip_dropout = p
        assert state.network.skip_dropout == pytest.approx(p)
        outputs.append(state.network(x, weights, None).detach())
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert compilations() == 1


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (search, "", "--compile is for --method darts"),
        (search, "--method gdas", "--compile is for --method darts"),
        (search, "--method darts --unrolled", "not with --unrolled"),
        (train_search, "--unrolled", "not with --unrolled"),
        (train_search, "", "--compile does not work here (no compiler)"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_a_line(script, flags, message, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    args = utils.parse(script.get_parser(), f"{flags} --dataset fashion_mini --compile --device cpu".split())
    with pytest.raises(utils.UserError) as error:
        script.check(args, torch.device("cpu"))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.long
@pytest.mark.parametrize("space", ["static", "nasbench201"])
def test_darts_in_search(space, pictures, tmp_path):
    flags = "--dataset folder --image_size 16 --init_channels 2 --layers 1 --batch_size 12 --epochs 1 --quiet"
    found = []
    for name, more in (("plain", ("--plain",)), ("compiled", ("--compile",))):
        argv = [*flags.split(), "--method", "darts", "--space_config", space, "--data", str(pictures), *more]
        argv += ["--device", "cpu", "--save", str(tmp_path / name)]
        found += history(search.main(utils.parse(search.get_parser(), argv)))
    for name in ("train_loss", "valid_loss", "arch_loss"):
        assert found[0][name] == pytest.approx(found[1][name], 1e-4)


@pytest.mark.long
def test_compiled_processes_train_as_others_do(pictures, tmp_path):
    from test_distributed import finished, torchrun

    flags = f"{SMALL.replace('26', '13')} --epochs 2 --drop_path_prob 0 --arch DARTS_V2".split()
    for name, more in (("plain", ("--plain",)), ("compiled", ("--compile",))):
        command = "tests/launched.py", "aot_eager", "retrain.py", *flags, *more
        finished(torchrun(*command, "--data", pictures, "--save", tmp_path / name))
    assert_close_runs(tmp_path / "compiled", tmp_path / "plain")
