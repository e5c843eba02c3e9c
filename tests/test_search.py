"""search.py: the loop against the published one, the second-order gradient, every flag, and runs that repeat."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import history, run_script
from golden_arrays import golden, load_weights

import architect
import fast
import genotypes
import search
import utils
from architect import Architect, unrolled_backward
from genotypes import CELL_TYPES
from lib import cli, data, runs
from methods import CELLS, METHODS

TINY = "--dataset folder --image_size 8 --init_channels 2 --layers 3 --batch_size 12 --epochs 1 --report_freq 1 --quiet"


SMALL_SPACE = "--space_config nasbench201"


def arguments(text):
    return cli.parse(search.get_parser(), [*TINY.split(), *text.split()])


def run_search(pictures, folder, text="", *more):
    return run_script(search, f"{TINY} --layers 1 {text}", *more, "--data", pictures, "--save", folder)


def tiny_search(text="", num_classes=10):
    """What search.main builds, over a tiny network in float64, without data."""
    args, device = arguments(text), torch.device("cpu")
    space = genotypes.SPACES[args.space_config]
    supernet = CELLS[space.cells].supernet
    network = supernet(args.init_channels, num_classes, args.layers, space.primitives, "cifar").double()
    method = METHODS[args.method](args, space, device)
    method.architecture.double()
    network.straight_through = method.straight_through
    optimizer = utils.sgd(network, args)
    trainer = Architect(network, method.architecture, optimizer, args, device)
    return SimpleNamespace(args=args, network=network, method=method, optimizer=optimizer, architect=trainer)


@pytest.mark.parametrize(
    ("computed", "steps"),
    [("as defined", 6), ("by fast.py", 14), pytest.param("by fast.py", 30, marks=pytest.mark.long)],
)
def test_steps_are_those_of_the_published_search(computed, steps):
    arrays = golden("search_trace.npz")
    meta = json.loads(str(arrays["meta"]))
    state = tiny_search(
        f"--init_channels {meta['C']} --layers {meta['layers']} --dss_freq {meta['dss_freq']}"
        f" --dss_max_ops {meta['max_ops']} --learning_rate {meta['lr']} --momentum {meta['momentum']}"
        f" --weight_decay {meta['weight_decay']} --arch_learning_rate {meta['arch_lr']}"
        f" --arch_weight_decay {meta['arch_weight_decay']} --grad_clip {meta['grad_clip']}"
    )
    load_weights(state.network, arrays)
    fast.use(state.network, print, plain=computed == "as defined")
    with torch.no_grad():
        for name, parameter in state.method.architecture.named_parameters():
            parameter.copy_(torch.tensor(arrays[f"init/{name}"]))
    batches = {name: torch.tensor(arrays[name]) for name in ("x", "y", "x_val", "y_val")}

    for step in range(steps):
        state.method.before_step(0, step)
        if step % meta["dss_freq"] == 0:
            for kind in CELL_TYPES:
                update = step // meta["dss_freq"]
                np.testing.assert_array_equal(
                    state.method.subspace.active[kind], arrays[f"trace/active_{kind}"][update]
                )
                for name in ("saliency", "ucb"):
                    expected = arrays[f"trace/{name}_{kind}"][update]
                    np.testing.assert_allclose(getattr(state.method.subspace, name)[kind], expected, rtol=1e-5)
        x, y, x_val, y_val = (batches[name][step % 6] for name in ("x", "y", "x_val", "y_val"))
        state.architect.step(*state.method.operations(0), (x, y), (x_val, y_val))
        with torch.no_grad():
            weights, active = state.method.operations(0)
        loss = F.cross_entropy(state.network(x, weights, active), y)
        utils.descend(loss, state.optimizer, meta["grad_clip"])
        assert loss.item() == pytest.approx(arrays["trace/train_loss"][step], rel=1e-5)
    if steps == meta["steps"]:
        assert str(state.method.subspace.genotype()) == str(arrays["genotype"])


def test_unrolled_gradient_is_the_derivative_of_the_loss_one_step_ahead(monkeypatch):
    """d/da L_valid(w - xi (momentum buffer + dL_train/dw + decay w), a), by central differences in a few entries."""
    monkeypatch.setattr(architect, "DIFFERENCE", 1e-5)  # the published 0.01 steps over kinks of the ReLUs
    torch.manual_seed(0)
    state = tiny_search("--unrolled --learning_rate 0.1 --weight_decay 0.01", num_classes=3)
    state.network.eval()  # running statistics fixed: the loss is smooth in the weights
    state.method.before_step(0, 0)
    active = state.method.subspace.active_ops()
    train, valid = ((torch.randn(6, 3, 8, 8).double(), torch.randint(0, 3, (6,))) for _ in range(2))

    def train_loss(weights):
        return F.cross_entropy(state.network(train[0], weights, active), train[1])

    utils.descend(train_loss(state.method.operations(0)[0]), state.optimizer, 0)  # fills the buffers
    state.method.architecture.zero_grad()
    buffers = [b.clone() for b in state.network.buffers()]
    unrolled_backward(state.network, state.optimizer, state.method.operations(0)[0], active, train, valid)
    assert all(map(torch.equal, state.network.buffers(), buffers))

    def loss_ahead():
        weights = {kind: w.detach() for kind, w in state.method.operations(0)[0].items()}
        before = {p: p.detach().clone() for p in state.network.parameters()}
        state.network.zero_grad()
        train_loss(weights).backward()
        with torch.no_grad():
            for p, w in before.items():
                if p.grad is not None:
                    p -= 0.1 * (p.grad + 0.01 * w + 0.9 * state.optimizer.state[p]["momentum_buffer"])
            loss = F.cross_entropy(state.network(valid[0], weights, active), valid[1]).item()
            for p, w in before.items():
                p.copy_(w)
        return loss

    first_order = torch.autograd.grad(
        F.cross_entropy(state.network(valid[0], state.method.operations(0)[0], active), valid[1]),
        list(state.method.architecture.parameters()),
    )
    differs = False
    for parameter, plain in zip(state.method.architecture.parameters(), first_order, strict=True):
        entry, flat = parameter.grad.abs().argmax().item(), parameter.data.view(-1)
        value, losses = flat[entry].item(), []
        for h in (1e-4, -1e-4, 0):
            flat[entry] = value + h
            losses.append(loss_ahead())
        gradient = parameter.grad.view(-1)[entry].item()
        assert gradient == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-3)
        differs |= abs(plain.view(-1)[entry].item() - gradient) > 0.05 * abs(gradient)
    assert differs, "the second order made no difference: the test shows nothing"


@pytest.mark.parametrize(
    "method",
    [
        f"--method ddsas {SMALL_SPACE} --dss_max_ops 8",
        f"--method darts {SMALL_SPACE} --unrolled",
        f"--method gdas {SMALL_SPACE}",
        f"--method rws {SMALL_SPACE}",
        *(pytest.param(f"--method {rest}", marks=pytest.mark.long) for rest in ("darts --unrolled", "gdas", "rws")),
    ],
)
def test_an_epoch_of_every_method_and_its_resumption(pictures, tmp_path, method):
    """Interrupted in the middle of its second epoch and resumed, a run ends with the bytes of one that was not.

    See test_resume.py for DDSAS in DARTS' space.
    """
    flags = f"{method} --epochs 2 --batch_size 18 --no-tf32"
    whole = run_search(pictures, tmp_path / "whole", flags)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        after_step, steps = runs.Run.after_step, []

        def interrupt(self, *arguments):
            after_step(self, *arguments)
            steps.append(1)
            if len(steps) == 3:  # of two an epoch
                raise KeyboardInterrupt

        patch.setattr(runs.Run, "after_step", interrupt)
        run_search(pictures, tmp_path / "cut", flags, "--checkpoint_freq", "1")
    torch.backends.cuda.matmul.allow_tf32 = True
    run_script(search, "--resume", tmp_path / "cut")
    assert not torch.backends.cuda.matmul.allow_tf32  # as the run began
    for name in ("genotype.txt", "history.jsonl"):
        assert (whole / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    lines = history(whole)
    assert len(lines) == 2 and np.isfinite([line["train_loss"] for line in lines]).all()
    assert all((line["arch_loss"] is None) == ("rws" in method) for line in lines)
    expected, derived = lines[-1]["expected_multiply_adds"], lines[-1]["derived_multiply_adds"]
    assert derived >= 0 and expected > 0 or "gdas" in method  # one operation an edge, which may cost nothing
    if "ddsas" in method:
        other = run_search(pictures, tmp_path / "other", flags, "--seed", 1)
        assert (whole / "history.jsonl").read_bytes() != (other / "history.jsonl").read_bytes()


@pytest.mark.parametrize("space", ["static", "nasbench201"])
def test_random_search_draws_an_architecture_and_trains_nothing(pictures, tmp_path, space):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        flags = f"--method random --space_config {space} --seed {seed}"
        folder = run_search(pictures, tmp_path / str(number), flags)
        found.append((folder / "genotype.txt").read_text().strip())
        assert [line["genotype"] for line in history(folder)] == found[-1:]
    assert found[0] == found[1] != found[2]


def test_every_process_draws_its_own_dropout_and_the_same_architecture(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    drawn = {}
    for rank in ("0", "1", "1"):
        monkeypatch.setenv("RANK", rank)
        utils.set_seed(0)
        state = tiny_search("--method gdas --quiet")
        loader = data.search_data("fashion_mini", ".", batch_size=2000)[0]
        steps = runs.Run(state.args, "search.py", "x").steps(loader)
        found = [(torch.rand(1).item(), state.method.operations(0)[1]) for _ in steps]
        assert drawn.setdefault(rank, found) == found and len(found) > 1
    for (dropout, active), (other, same) in zip(drawn["0"], drawn["1"], strict=True):
        assert dropout != other and active == same


def test_before_epoch_begin_every_step_has_a_random_subspace():
    method = tiny_search("--begin 1").method
    seen = set()
    for step in range(4):
        method.before_step(0, step)
        seen.add(method.subspace.active["normal"].tobytes())
    assert len(seen) == 4 and method.subspace.total == 1
    for step in range(391):
        method.before_step(1, step)
    assert method.subspace.total == 15 and [one["step"] for one in method.samplings[-14:]] == [*range(0, 391, 30)]


def test_on_imagenet_alpha_rests_before_epoch_begin(pictures, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "train").symlink_to(pictures / "train")
    (images / "val").symlink_to(pictures / "test")
    flags = "--dataset imagenet --image_size 32 --epochs 2 --begin 1 --workers 0"
    lines = history(run_search(images, tmp_path / "run", flags))
    assert [line["arch_loss"] is None for line in lines] == [True, False]
    assert [line["valid_loss"] is None for line in lines] == [True, False]


def test_space_schedules_take_effect_at_their_epochs():
    for config, expected in (("expand", [42, 42, 56]), ("shrink", [112, 112, 98])):
        method, found = tiny_search(f"--space_config {config}").method, []
        for epoch in (0, 9, 10):
            method.start_epoch(epoch)
            found.append(method.subspace.available["normal"].sum())
        assert found == expected


def test_imagenets_ramp_starts_from_the_undecayed_rate(pictures, tmp_path, monkeypatch):
    flags = f"{SMALL_SPACE} --epochs 3 --warmup_epochs 2 --learning_rate 0.5 --learning_rate_min 0 --dss_freq 1"
    monkeypatch.setattr(utils, "world_size", lambda: 32)  # 32 x 12 images: more than 256
    lines = history(run_search(pictures, tmp_path / "run", flags))
    assert [line["lr"] for line in lines] == pytest.approx([0.25, 0.5, 0.125])


def test_the_gradients_of_alpha_and_of_beta_are_clipped_each():
    torch.manual_seed(0)
    state = tiny_search("--arch_grad_clip 5")
    architecture = state.method.architecture
    state.architect.optimizer = torch.optim.SGD(architecture.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in architecture.named_parameters()}
    state.method.before_step(0, 0)
    for name, p in architecture.named_parameters():  # they are added to what the step computes, which is tiny
        p.grad = torch.full_like(p, 7.0 if name.startswith("alphas") else 1e-3)
    batch = torch.randn(4, 3, 8, 8).double(), torch.randint(0, 10, (4,))
    state.architect.step(*state.method.operations(0), batch, batch)
    step = {name: (p.detach() - before[name]).flatten() for name, p in architecture.named_parameters()}
    assert torch.cat([step["alphas_normal"], step["alphas_reduce"]]).norm() == pytest.approx(5, rel=1e-4)
    assert torch.cat([step["betas_normal"], step["betas_reduce"]]).norm() < 2


def test_inactive_operations_decay_on_demand():
    """Under PyTorch 1.4 a gradient of zero still decayed what had been active once; today it stays as it is."""
    for flag, moves in (("--decay_inactive", True), ("", False)):
        state = tiny_search(f"{flag} --weight_decay 0.1 --dss_max_ops 14")
        weight = state.network.cells[0]._ops[0]._ops[4].op[1].weight
        x, y = torch.randn(4, 3, 8, 8).double(), torch.randint(0, 10, (4,))
        weights = {kind: torch.full((14, 8), 0.1).double() for kind in CELL_TYPES}
        for active in ([4], [1]):  # sep_conv_3x3, then max_pool_3x3 alone
            before = weight.detach().clone()
            logits = state.network(x, weights, {kind: [active] * 14 for kind in CELL_TYPES})
            utils.descend(F.cross_entropy(logits, y), state.optimizer, 0, state.args.decay_inactive)
        assert (not torch.equal(weight, before)) == moves


def test_flops_weight_makes_the_expected_cost_fall(pictures, tmp_path):
    flags = f"{SMALL_SPACE} --method darts --arch_learning_rate 0.1 --batch_size 12"
    weights = ["", "--flops_weight 0", "--flops_weight 1", "--flops_weight 100"]
    lines = [history(run_search(pictures, tmp_path / f"run{weight}", f"{flags} {weight}")) for weight in weights]
    assert lines[0] == lines[1]
    costs = [epochs[0]["expected_multiply_adds"] for epochs in lines[1:]]
    assert costs[0] > costs[1] > costs[2]


def test_wrong_arguments_are_named(pictures, tmp_path):
    for flags, message in {
        "--tau_min 3 --tau_max 2 --gumbel": "tau",
        "--batch_size 50": "batch",
        "--train_portion 1": "between 0 and 1",
        "--arch DDSAS_cifar10": "taken",
        "--amp": "CUDA",
        "--image_size 18": "multiple of 4",
        "--method darts --dss_freq 5": "--dss_freq is for --method ddsas, not darts",
        "--method gdas --unrolled": "--unrolled is for --method darts or ddsas",
        "--space_config nasbench201 --checkpoint_cells": "--checkpoint_cells",
        "--space_config nasbench201 --dss_max_ops 5": "at least 6",
        "--table t.csv": "--table is for --space_config nasbench201",
    }.items():
        with pytest.raises(cli.UserError, match=message):
            run_search(pictures, tmp_path / "run", flags)


def test_a_method_takes_the_flags_of_the_one_that_it_inherits_from(monkeypatch):
    for name, parent in (("own-ddsas", "ddsas"), ("own-darts", "darts")):
        monkeypatch.setitem(METHODS, name, type("Own", (METHODS[parent],), {}))
        assert search.kind_of(name) == parent
    assert [search.kind_of(name) for name in ("gdas", "rws", "random")] == ["gdas", "rws", "random"]
    with pytest.raises(cli.UserError, match="--dss_freq is for --method ddsas, not own-darts"):
        search.check(SimpleNamespace(**vars(arguments("--dss_freq 5")) | {"method": "own-darts"}))
    search.check(SimpleNamespace(**vars(arguments("--dss_freq 5")) | {"method": "own-ddsas"}))
