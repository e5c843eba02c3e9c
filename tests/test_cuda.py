"""What only a GPU can show: bash shell/test.sh -m cuda. Skipped without one.

TEST_DEVICE=cpu runs the same bodies on the CPU, which shows that they can be run, not what they are for.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import engine
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_arrays import active_lists, assert_close, golden, load_weights
from test_distributed import finished, torchrun
from test_search import check_thirty_steps

import evaluate
import fast
import genotypes
import model
import retrain
import search
import train_search
import utils
from genotypes import CELL_TYPES, PRIMITIVES
from lib import cli, data
from model_search import Architecture, Network

pytestmark = pytest.mark.cuda
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def device() -> torch.device:
    """The GPU, which computes float32 in full unless a test says otherwise."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    utils.cuda_settings(tf32=False)
    yield torch.device(os.environ.get("TEST_DEVICE", "cuda"))
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- the published numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_supernet_is_the_published_one(device, plain):
    arrays = golden("supernet_simple_norm.npz")
    network, architecture = Network(4, 10, 3, PRIMITIVES), Architecture(14, 8).to(device)
    load_weights(network, arrays)
    network = (fast.switch_off(network) if plain else network).to(device)
    with torch.no_grad():
        for name, parameter in architecture.named_parameters():
            parameter.copy_(torch.tensor(arrays[name]))
    active = active_lists({kind: arrays[f"active_{kind}"] for kind in CELL_TYPES})
    logits = network(torch.tensor(arrays["x"], device=device), architecture.weights(active), active)
    loss = F.cross_entropy(logits, torch.tensor(arrays["y"], device=device))
    loss.backward()
    assert_close(logits, arrays["logits"])
    assert_close(loss, arrays["loss"])
    for name, parameter in architecture.named_parameters():
        assert_close(parameter.grad, arrays[f"grad/{name}"], 1e-3)


@pytest.mark.parametrize("name", ["DDSAS_cifar10", "DDSAS_cifar100", "PDARTS"])
def test_discovered_networks_are_the_published_ones(device, name):
    arrays = golden(f"network_{name}.npz")
    network = model.NetworkCIFAR(4, 7, 5, False, genotypes.load(name)).eval()
    load_weights(network, arrays)
    x = torch.tensor(arrays["x"], device=device)
    with torch.no_grad():
        for net in (network.to(device), model.fuse(network), fast.switch_off(network)):
            assert_close(net(x)[0], arrays["logits"])


def test_thirty_steps_are_those_of_the_published_search(device):
    check_thirty_steps(device)


# ---- an epoch of everything ------------------------------------------------------------------------------------------

TINY = "--dataset fashion_mini --init_channels 4 --layers 3 --batch_size 20 --epochs 1 --report_freq 2 --quiet"
STAGES = "--layers 2 --add_layers 1 --add_layers 2 --eps_no_arch 0 --dropout_rate 0.1 --dropout_rate 0.4"
COMMANDS = {
    "ddsas": (search, "--gumbel --dss_freq 2 --cutout"),
    "ddsas, cells recomputed": (search, "--checkpoint_cells"),
    "darts": (search, "--method darts"),
    "darts, second order": (search, "--method darts --unrolled"),
    "gdas": (search, "--method gdas"),
    "nasbench201": (search, "--space_config nasbench201 --layers 1"),
    "pdarts": (train_search, f"{STAGES} --dropout_rate 0.7"),
    "retraining": (retrain, "--arch DARTS_V2 --auxiliary --cutout --drop_path_prob 0.2"),
}


@pytest.fixture
def few_images(monkeypatch):
    """fashion_mini with 100 training images, a last batch smaller than the others, and 40 test images."""
    info = data.INFO["fashion_mini"]

    def read(root: Path, train: bool) -> data.Arrays:
        images, labels = info.read(root, train)
        return tuple(array[:: 100 if train else 50] for array in (images, labels))

    monkeypatch.setitem(data.INFO, "fashion_mini", dataclasses.replace(info, read=read))


def run(script, device: torch.device, folder: Path, *flags: str) -> Path:
    """A script in this process; returns its run folder."""
    argv = [*TINY.split(), *" ".join(flags).split(), "--device", str(device), "--save", str(folder)]
    return script.main(cli.parse(script.get_parser(), argv))


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_epoch(device, few_images, tmp_path, name):
    script, flags = COMMANDS[name]
    folder = run(script, device, tmp_path / "run", flags)
    lines = history(folder)
    assert len(lines) == (3 if script is train_search else 1)
    for line in lines:
        assert 0 < line["train_loss"] < 20 and 0 <= line["train_acc"] <= 100
    assert genotypes.load(str(folder))
    timing = json.loads((folder / "timing.jsonl").read_text().splitlines()[-1])
    assert timing["images_per_second"] > 0 and timing["peak_memory_mb"] > 0


@pytest.mark.parametrize("case", ["ddsas", "retraining"])
def test_it_learns_as_on_the_cpu(device, few_images, tmp_path, case):
    """The first epoch's loss: the same images, subspaces and weights at the start; no draws on the device."""
    script, flags = {"ddsas": (search, "--dss_freq 2"), "retraining": (retrain, "--drop_path_prob 0")}[case]
    devices = {"ours": device, "cpu": torch.device("cpu")}
    lines = [history(run(script, d, tmp_path / name, flags, "--no-tf32"))[0] for name, d in devices.items()]
    assert lines[0]["train_loss"] == pytest.approx(lines[1]["train_loss"], rel=1e-2)


def test_evaluation_repeats_what_retraining_found(device, few_images, tmp_path):
    folder = run(retrain, device, tmp_path / "run", "--arch DARTS_V2")
    argv = ["--model_path", str(folder), "--device", str(device), "--no-tf32"]
    result = evaluate.main(cli.parse(evaluate.get_parser(), argv))
    (line,) = history(folder)
    assert result["images"] == 40 and result["top1"] == pytest.approx(line["test_acc"], abs=2.6)  # one image
    assert result["loss"] == pytest.approx(line["test_loss"], rel=1e-2)  # tf32 trained it


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["search", "retrain"])
def test_a_killed_run_goes_on_with_the_same_losses(device, pictures, tmp_path, script):
    """Not to the bit, as on the CPU; with --begin subspaces are drawn, so that a last digit moves none."""
    flags = "--dataset folder --image_size 16 --init_channels 4 --layers 3 --batch_size 12 --epochs 5 --quiet --no-tf32"
    start = [sys.executable, str(ROOT / f"{script}.py"), *flags.split(), "--checkpoint_freq", "1"]
    start += ["--device", str(device), "--data", str(pictures), *(["--begin", "9"] if script == "search" else [])]
    subprocess.run([*start, "--save", tmp_path / "whole"], check=True, timeout=600)
    process = subprocess.Popen([*start, "--save", tmp_path / "killed"])
    while not (tmp_path / "killed" / "history.jsonl").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    resume = [sys.executable, str(ROOT / f"{script}.py"), "--resume", str(tmp_path / "killed")]
    subprocess.run(resume, check=True, timeout=600)
    whole, killed = (history(tmp_path / name) for name in ("whole", "killed"))
    assert len(whole) == len(killed) == 5
    for a, b in zip(whole, killed, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=2e-2)


def test_a_checkpoint_goes_on_on_the_other_device(device, few_images, tmp_path):
    folder = run(search, device, tmp_path / "run", "--learning_rate 0.01 --learning_rate_min 0.01")
    argv = ["--resume", str(folder), "--epochs", "2", "--device", "cpu"]
    search.main(cli.parse(search.get_parser(), argv))
    assert len(history(folder)) == 2
    search.main(cli.parse(search.get_parser(), [*argv[:3], "3", "--device", str(device)]))
    assert len(history(folder)) == 3


# ---- what the host does ----------------------------------------------------------------------------------------------


def training(name: str, device: torch.device, folder: Path, more: str = "") -> tuple[engine.Training, data.Loader]:
    """A training and its images, as the script makes them."""
    script, flags = COMMANDS[name]
    args = cli.parse(script.get_parser(), f"{TINY} {flags} {more} --device {device}".split())
    utils.set_seed(0)
    arguments = engine.data_arguments(args, device)
    if script is retrain:
        train, test, info = data.train_data(**arguments)
        state = retrain.Retraining(args, engine.load_genotype(args.arch), info, test, device)
    else:
        train, valid, info = data.search_data(**arguments)
        make = train_search.ProgressiveSearch if script is train_search else search.Search
        state = make(args, info, valid, *([search.Judge(args)] if script is search else []), device)
    state.run, state.stop = SimpleNamespace(folder=folder, log=print), SimpleNamespace(agreed=lambda: False)
    state.start_epoch()
    state.network.train()
    return state, train


@pytest.mark.parametrize("name", ["ddsas", "darts", "pdarts", "retraining"])
def test_no_step_waits_for_the_gpu(device, few_images, tmp_path, name, monkeypatch):
    """From the second step on, between two reports and two subspaces."""
    state, train = training(name, device, tmp_path, "--report_freq 100" + " --dss_freq 100" * (name == "ddsas"))
    add, mode = state.averages["train"].add, "error"

    def first_step_done(*arguments) -> None:
        add(*arguments)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    state.averages["train"].add = first_step_done
    monkeypatch.setattr(engine.Training, "report", lambda self: None)
    try:
        state.train_one_epoch(train)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert state.step == len(train) > 2


def test_memory_is_as_predicted(device):
    """A retraining step: the peak of its tensors on the meta device, and of the GPU's allocator."""
    predict = pytest.importorskip("predict")
    flags = "--init_channels 16 --layers 8 --arch DARTS_V2 --auxiliary --batch_size 64 --device cpu"
    args, info = cli.parse(retrain.get_parser(), flags.split()), data.INFO["fashion_mini"]

    def two_steps(device: torch.device) -> None:
        state = retrain.Retraining(args, engine.load_genotype(args.arch), info, None, device)
        x, y = torch.zeros(64, 3, 32, 32, device=device), torch.zeros(64, dtype=torch.int64, device=device)
        for _ in range(2):
            logits, auxiliary_logits = state.network(x)
            loss = F.cross_entropy(logits, y) + F.cross_entropy(auxiliary_logits, y)
            retrain.gradient_step(state.network, state.optimizer, loss, 5)

    with predict.as_on_cuda(), predict.Memory() as memory:
        two_steps(torch.device("meta"))
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False  # its trials take what they find
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        two_steps(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        print(f"predicted {memory.peak / 2**20:.0f} MB, measured {peak / 2**20:.0f} MB")
        assert 0.8 < memory.peak / peak < 1.2
    else:
        two_steps(device)
        assert memory.peak > 0


@pytest.mark.parametrize(("script", "more"), [("search.py", "--gumbel"), ("retrain.py", "--arch DARTS_V2")])
def test_two_processes_on_one_gpu(device, pictures, tmp_path, script, more):
    """gloo instead of nccl, see launched.py; the scripts check that both processes agree."""
    one = "cuda:0" if device.type == "cuda" else device
    flags = f"--dataset folder --image_size 16 --init_channels 4 --layers 3 --batch_size 6 --epochs 1 --device {one}"
    command = "tests/launched.py", "inductor", script, *flags.split(), *more.split(), "--quiet"
    finished(torchrun(*command, "--data", pictures, "--save", tmp_path / "run"))
    (line,) = history(tmp_path / "run")
    assert 0 < line["train_loss"] < 20


# ---- precision, compilation, speed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddsas", "pdarts", "retraining"])
def test_bfloat16_learns_the_same(device, few_images, tmp_path, name):
    if device.type != "cuda":
        pytest.skip("--amp is for CUDA")
    script, flags = COMMANDS[name]
    lines = [history(run(script, device, tmp_path / str(i), flags, more))[0] for i, more in enumerate(("", "--amp"))]
    assert lines[1]["train_loss"] == pytest.approx(lines[0]["train_loss"], rel=0.1)
    assert lines[0]["train_loss"] != lines[1]["train_loss"]


@pytest.mark.parametrize("name", ["ddsas", "pdarts", "retraining"])
def test_steps_are_no_slower_than_the_plain_formulation(device, tmp_path, name):
    """At the papers' sizes, in turn; prints the steps per second (pytest -s)."""
    size = {
        "ddsas": "--init_channels 16 --layers 8 --batch_size 64",
        "pdarts": "--init_channels 16 --layers 5 --batch_size 96",
        "retraining": "--init_channels 36 --layers 20 --batch_size 96",
    }[name]
    size, repetitions = (size, 15) if device.type == "cuda" else ("--init_channels 2 --layers 3 --batch_size 4", 2)
    bodies = []
    for more in ("--plain", ""):
        state, _ = training(name, device, tmp_path, f"{size} {more}")
        batch = state.args.batch_size
        x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)
        bodies.append(step_of(state, x, y))
    seconds = [[], []]
    for _ in range(repetitions):
        for times, body in zip(seconds, bodies, strict=True):
            synchronize(device)
            started = time.perf_counter()
            body()
            synchronize(device)
            times.append(time.perf_counter() - started)
    plain, ours = (statistics.median(times[1:]) for times in seconds)
    print(f"{name}: plain {1 / plain:.2f}, ours {1 / ours:.2f} steps per second, {plain / ours:.2f} times")
    if device.type == "cuda":
        assert ours < 1.1 * plain


def step_of(state: engine.Training, x: torch.Tensor, y: torch.Tensor):
    """The two steps of a search, or the one of retraining, on the same images each time."""

    def search_step() -> None:
        if isinstance(state, search.Search):
            state.method.before_step(0, state.step)
            state.step += 1
        state.architecture_step((x, y), (x, y))
        state.weight_step(x, y)

    def retraining_step() -> None:
        logits, auxiliary_logits = state.network(x)
        loss = F.cross_entropy(logits, y) + 0.4 * F.cross_entropy(auxiliary_logits, y)
        retrain.gradient_step(state.network, state.optimizer, loss, 5)

    return retraining_step if isinstance(state, retrain.Retraining) else search_step


def test_an_inactive_operation_costs_no_launch(device):
    """The published code asks the GPU whether an operation is active; here the mask is a copy in pinned memory."""
    architecture = Architecture(14, 8).to(device)
    active = {kind: [[e % 8] for e in range(14)] for kind in CELL_TYPES}
    weights = architecture.weights(active)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.set_sync_debug_mode("error")
            try:
                again = architecture.weights(copy.deepcopy(active))
            finally:
                torch.cuda.set_sync_debug_mode("default")
    else:
        again = architecture.weights(copy.deepcopy(active))
    for kind in CELL_TYPES:
        assert torch.equal(weights[kind], again[kind])
        assert [row.nonzero().item() for row in weights[kind].detach().cpu()] == list(np.arange(14) % 8)
