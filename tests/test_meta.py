"""The three training loops on the meta device, where whatever needs a value raises: what a GPU would have to wait for.

By design the host is asked by DDSAS where the subspace moves (every --dss_freq steps: the bandit is numpy), by GDAS at
every forward pass (which operation was drawn decides what is computed), and by reports. Nowhere else.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import engine
import model_search
import predict
import retrain
import search
import train_search
import utils

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import gpu  # noqa: E402

SMALL = "--init_channels 4 --layers 3 --batch_size 8"
META = torch.device("meta")


def small(name: str, flags: str = "") -> engine.Training:
    text = f"{SMALL} {flags}"
    return gpu.pdarts(1, text) if name == "pdarts" else {"ddsas": gpu.ddsas, "retraining": gpu.retraining}[name](text)


def first_steps(training: engine.Training, steps: int) -> predict.FirstSteps:
    return predict.FirstSteps(training.info, 32, data.Options(8, cutout=16, device=META), steps)


@pytest.mark.parametrize(
    ("name", "flags"),
    [("ddsas", ""), ("ddsas", "--plain"), ("pdarts", ""), ("retraining", ""), ("retraining", "--plain")],
)
def test_nothing_waits_between_two_reports(name, flags):
    """Data, both steps, clipping, optimizers, averages, the watch for bad numbers: as in a run, two steps of it."""
    training = small(name, flags)
    training.valid = loader = first_steps(training, 2)
    with predict.as_on_cuda():
        training.rehearse(loader)
    assert training.step == 3 and len(training.watch.pending) == 2
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # a report does wait
        training.watch.check()


@pytest.mark.parametrize("flags", ["--gumbel --saliency_type all", "--method darts", "--method darts --unrolled"])
def test_other_searches_do_not_wait_either(flags):
    training = gpu.ddsas(f"{SMALL} {flags}")
    training.valid = loader = first_steps(training, 1)
    training.rehearse(loader)
    assert training.step == 2


def test_draws_of_the_architecture_are_the_same_on_every_device():
    """And so a checkpoint of one device is resumed on another."""
    drawn = []
    for device in (torch.device("cpu"), META):
        generator = torch.Generator().manual_seed(5)
        assert model_search.gumbel(torch.empty(14, 8, device=device), generator).device == device
        drawn.append(generator.get_state())
    assert drawn[0].equal(drawn[1])


@pytest.mark.parametrize("flags", ["--dss_freq 1", "--method gdas"])
def test_where_the_host_must_know(flags):
    training = gpu.ddsas(f"{SMALL} {flags}")
    training.valid = loader = first_steps(training, 1)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        training.rehearse(loader)


@pytest.mark.parametrize(("name", "most"), [("ddsas", 4), ("pdarts", 4), ("retraining", 2)])
def test_copies_to_the_device_are_indices_and_random_numbers(name, most):
    """Of each batch its indices and random numbers; DDSAS' mask of active operations only when the subspace moved."""
    training = small(name)
    training.valid = first_steps(training, 1)
    training.rehearse(training.valid)
    with predict.Launches() as launches:
        training.rehearse(first_steps(training, 2))
    assert launches.copies == 2 * most


def test_launches_do_not_count_views_and_empty_tensors():
    x = torch.empty(4, 4, device=META)
    with predict.Launches() as launches:
        x.view(2, 8).t().unsqueeze(0).detach()
        torch.empty_like(x)
        torch.ones(3).add(1)  # of the host
        assert launches.total == 0
        x.add(1).relu_()
        torch.zeros(3).to(META)
    assert launches.counts == Counter(add=1, relu_=1, _to_copy=1) and launches.copies == 1


def test_synchronisations_are_counted_before_they_raise():
    with predict.Launches() as launches, pytest.raises(RuntimeError):
        torch.empty(1, device=META).item()
    assert launches.synchronisations == 1


def test_memory_of_a_step_counted_by_hand():
    """A linear layer in training with momentum: all its tensors are whole blocks here."""
    batch, width = 128, 256
    with predict.Memory() as memory, predict.as_on_cuda():
        layer = nn.Linear(width, width, bias=False, device=META)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1, 0.9)
        for _ in range(2):
            memory.peak = memory.now
            optimizer.zero_grad()
            x = torch.empty(batch, width, device=META)
            y = layer(x)
            dy = torch.empty_like(y)
            y.backward(dy)
            optimizer.step()
            del x, y, dy
    weight, activation = 4 * width * width, 4 * batch * width
    assert memory.now == 3 * weight  # with gradient and momentum
    assert memory.peak == 3 * weight + 3 * activation


def test_what_is_kept_for_the_backward_pass_is_counted_once_and_without_parameters():
    layer, x = nn.Linear(16, 16, bias=False, device=META), torch.empty(32, 16, device=META)
    y, kept = predict.kept_for_backward(lambda: layer(x) + layer(x[:16]).sum(), layer)
    assert kept == x.untyped_storage().nbytes() and y.requires_grad


@pytest.mark.parametrize("name", ["ddsas", "retraining"])
def test_memory_grows_with_the_batch_and_shrinks_with_the_flags(name):
    training = small(name)
    (less, state), (more, same) = (engine.predicted_memory(training, 64, batch_size=b) for b in (16, 64))
    assert state == pytest.approx(same, rel=0.05) and (more - state) / (less - state) == pytest.approx(4, rel=0.1)
    assert engine.predicted_memory(training, 64, batch_size=64, amp=True)[0] < 0.75 * more
    if name == "ddsas" and predict.recomputes():
        again = [engine.predicted_memory(training, 64, batch_size=64, checkpoint_cells=True, amp=a)[0] for a in (0, 1)]
        assert again[0] < 0.75 * more and again[1] < 0.75 * again[0]


def test_the_largest_batch():
    GB = 10**9
    assert predict.largest_batch(8 * GB, 64, peak=GB, state=0) == 456
    assert predict.largest_batch(2 * GB, 4, peak=GB, state=0) == 7
    assert predict.largest_batch(2 * GB, 64, peak=3 * GB, state=2 * GB) == 0


def out_of_memory(*arguments: object, **flags: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture
def message(pictures, tmp_path, monkeypatch, capsys):
    """message(script, arguments, free): what a run says when its first step runs out of memory of ``free`` bytes."""

    def run(script, arguments: str, free: int) -> str:
        monkeypatch.setattr(utils, "free_memory", lambda device: free)
        own = engine.Training.end_step
        fails = lambda self, *a: own(self, *a) if self.device == META else out_of_memory()  # noqa: E731
        monkeypatch.setattr(engine.Training, "end_step", fails)
        arguments += f" --dataset folder --data {pictures} --image_size 16 --save {tmp_path}/run --quiet --epochs 1"
        arguments += " --init_channels 8 --layers 3 --batch_size 32"
        with pytest.raises(SystemExit) as exit:
            utils.cli(script.main, script.get_parser(), arguments.split())
        error = capsys.readouterr().err
        assert exit.value.code == 1 and error.count("\n") == 1
        assert error.endswith(" (CUDA out of memory. Tried to allocate 2.00 GiB)\n")
        return error.split("out of GPU memory, ")[1].split(" (CUDA")[0]

    return run


SCRIPTS = [(search, ""), (train_search, "--eps_no_arch 0"), (retrain, "--arch DDSAS_cifar10 --auxiliary")]


@pytest.mark.parametrize(("script", "arguments"), SCRIPTS)
def test_out_of_memory_names_the_flag_and_the_number(script, arguments, message):
    said = message(script, arguments, free=12_000_000)
    batches = [int(number) for number in re.findall(r"--batch_size (\d+)", said)]
    assert 2 <= batches[0] < 32
    if script is retrain or not predict.recomputes():
        assert said == f"by prediction --batch_size {batches[0]} fits"
    else:
        assert said == "by prediction --batch_size {} or --batch_size {} --checkpoint_cells fits".format(*batches)
        assert batches[0] < batches[1] <= 32


@pytest.mark.parametrize("why", ["none fits", "all should fit", "the prediction fails"])
def test_out_of_memory_in_general_words(why, message, monkeypatch):
    if why == "the prediction fails":
        monkeypatch.setattr(engine, "predicted_memory", out_of_memory)
    free = {"none fits": 1000, "all should fit": 10**12, "the prediction fails": 12_000_000}[why]
    assert message(*SCRIPTS[2], free) == utils.SMALLER
