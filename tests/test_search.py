"""search.py: the loop against the published one, the second-order gradient, every flag, and runs that repeat."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_arrays import golden, load_weights

import bilevel
import engine
import fast
import genotypes
import search
import utils
from genotypes import CELL_TYPES
from lib import cli, distributed, runs

TINY = (
    "--dataset folder --image_size 16 --init_channels 2 --layers 3 --batch_size 12 --epochs 1 --report_freq 1 --quiet"
)


def arguments(text, *more):
    return cli.parse(search.get_parser(), [*TINY.split(), *text.split(), *map(str, more)])


def run_search(pictures, folder, text="", *more):
    return search.main(arguments(text, *more, "--data", pictures, "--save", folder))


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def tiny_search(text="", num_classes=10, dtype=torch.float64, device="cpu"):
    """A Search over a tiny network without data."""
    args = arguments(text)
    info = search.data.Info(num_classes, (0,) * 3, (1,) * 3, image_size=16)
    state = search.Search(args, info, None, search.Judge(args), torch.device(device))
    state.network.to(dtype)
    state.architecture.to(dtype)
    return state


def test_thirty_steps_are_those_of_the_published_search():
    check_thirty_steps("cpu")


def check_thirty_steps(device):
    arrays = golden("search_trace.npz")
    meta = json.loads(str(arrays["meta"]))
    state = tiny_search(
        f"--init_channels {meta['C']} --layers {meta['layers']} --dss_freq {meta['dss_freq']}"
        f" --dss_max_ops {meta['max_ops']} --learning_rate {meta['lr']} --momentum {meta['momentum']}"
        f" --weight_decay {meta['weight_decay']} --arch_learning_rate {meta['arch_lr']}"
        f" --arch_weight_decay {meta['arch_weight_decay']} --grad_clip {meta['grad_clip']}",
        device=device,
    )
    load_weights(state.network, arrays)
    with torch.no_grad():
        for name, parameter in state.architecture.named_parameters():
            parameter.copy_(torch.tensor(arrays[f"init/{name}"]))
    batches = {name: torch.tensor(arrays[name], device=device) for name in ("x", "y", "x_val", "y_val")}

    for step in range(meta["steps"]):
        state.method.before_step(state.epoch, state.step)
        if step % meta["dss_freq"] == 0:
            for kind in CELL_TYPES:
                update = step // meta["dss_freq"]
                np.testing.assert_array_equal(
                    state.method.subspace.active[kind], arrays[f"trace/active_{kind}"][update]
                )
                for name in ("saliency", "ucb"):
                    expected = arrays[f"trace/{name}_{kind}"][update]
                    np.testing.assert_allclose(getattr(state.method.subspace, name)[kind], expected, rtol=1e-5)
        active = state.method.subspace.active_ops()
        x, y, x_val, y_val = (batches[name][step % 6] for name in ("x", "y", "x_val", "y_val"))
        bilevel.architecture_backward(state.network, state.optimizer, state.operations()[0], active, x_val, y_val)
        bilevel.clip_and_step(state.architecture, state.arch_optimizer, 0)
        with torch.no_grad():
            weights = state.operations()[0]
        loss = F.cross_entropy(state.network(x, weights, active), y)
        bilevel.backward_clip_and_step(state.optimizer, loss, meta["grad_clip"])
        state.step += 1
        assert loss.item() == pytest.approx(arrays["trace/train_loss"][step], rel=1e-5)
    assert str(state.method.subspace.genotype()) == str(arrays["genotype"])


def test_unrolled_gradient_is_the_derivative_of_the_loss_one_step_ahead(monkeypatch):
    """d/da L_valid(w - xi (momentum buffer + dL_train/dw + decay w), a), by central differences in a few entries."""
    monkeypatch.setattr(bilevel, "DIFFERENCE", 1e-5)  # the published 0.01 steps over kinks of the ReLUs
    torch.manual_seed(0)
    state = tiny_search("--unrolled --learning_rate 0.1 --weight_decay 0.01", num_classes=3)
    state.network.eval()  # running statistics fixed: the loss is smooth in the weights
    state.method.before_step(state.epoch, state.step)
    active = state.method.subspace.active_ops()
    train, valid = ((torch.randn(6, 3, 8, 8).double(), torch.randint(0, 3, (6,))) for _ in range(2))

    def train_loss(weights):
        return F.cross_entropy(state.network(train[0], weights, active), train[1])

    bilevel.backward_clip_and_step(state.optimizer, train_loss(state.operations()[0]), 0)  # fills the buffers
    state.architecture.zero_grad()
    buffers = {name: b.clone() for name, b in state.network.named_buffers()}
    bilevel.unrolled_backward(state.network, state.optimizer, state.operations()[0], active, train, valid)
    for name, b in state.network.named_buffers():
        assert torch.equal(b, buffers[name])

    def loss_ahead():
        weights = {kind: w.detach() for kind, w in state.operations()[0].items()}
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
        F.cross_entropy(state.network(valid[0], state.operations()[0], active), valid[1]),
        list(state.architecture.parameters()),
    )
    differs = False
    for parameter, plain in zip(state.architecture.parameters(), first_order, strict=True):
        entry = parameter.grad.abs().argmax().item()
        flat, h = parameter.data.view(-1), 1e-4
        value = flat[entry].item()
        flat[entry] = value + h
        above = loss_ahead()
        flat[entry] = value - h
        below = loss_ahead()
        flat[entry] = value
        gradient = parameter.grad.view(-1)[entry].item()
        assert gradient == pytest.approx((above - below) / (2 * h), rel=1e-3)
        differs |= abs(plain.view(-1)[entry].item() - gradient) > 0.05 * abs(gradient)
    assert differs, "the second order made no difference: the test shows nothing"


@pytest.mark.parametrize(
    "flags",
    [
        "--space_config shrink --saliency_type all --no_norm",
        "--space_config expand --gumbel --tau_min 0.5 --tau_max 5",
        "--space_config imagenet --rdss_prob 0.5 --arch_grad_clip 5 --warmup_epochs 5",
        "--space_config space_config_static --begin 1 --cutout --cutout_length 4",
        "--unrolled --dss_freq 1 --dss_max_ops 14 --confidence 0.5",
        "--train_portion 0.6 --momentum 0.5 --weight_decay 0 --arch_weight_decay 0 --grad_clip 0 --seed 3 --note x",
        "--learning_rate 0.1 --learning_rate_min 0 --arch_learning_rate 1e-2 --drop_path_prob 0.1 --bad_images skip",
        "--checkpoint_freq 1 --device cpu --workers 0 --dss_max_ops 98",
    ],
)
def test_every_flag_runs(pictures, tmp_path, flags):
    folder = run_search(pictures, tmp_path / "run", flags)
    (line,) = history(folder)
    assert np.isfinite([line["train_loss"], line["valid_loss"], line["arch_loss"]]).all()
    assert genotypes.load(str(folder)) == genotypes.load(line["genotype"])
    names = {"log.txt", "args.json", "genotype.txt", "history.jsonl", "timing.jsonl", "checkpoint.pt"}
    assert names <= {path.name for path in folder.iterdir()} and list(folder.glob("events*"))


METHODS = ["--method ddsas --gumbel", "--method darts", "--method darts --unrolled", "--method gdas"]


@pytest.mark.parametrize(
    ("method", "space"),
    [
        pytest.param(method, space, marks=[pytest.mark.long] * ("unrolled" in method and space == "static"))
        for method, space in itertools.product(METHODS, ["static", "nasbench201 --layers 1 --dss_max_ops 8"])
    ],
)
def test_an_epoch_of_every_method_and_its_resumption(pictures, tmp_path, method, space):
    """Interrupted in the middle of its second epoch and resumed, a run ends with the bytes of one that was not."""
    if "nasbench201" in space and "ddsas" not in method:
        space = space.replace(" --dss_max_ops 8", "")
    flags = f"{method} --space_config {space} --epochs 2 --batch_size 6"
    whole = run_search(pictures, tmp_path / "whole", flags)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        end_step, steps = search.Search.end_step, []

        def interrupt(self, *arguments):
            end_step(self, *arguments)
            steps.append(1)
            if len(steps) == 8:
                raise KeyboardInterrupt

        patch.setattr(search.Search, "end_step", interrupt)
        run_search(pictures, tmp_path / "cut", flags, "--checkpoint_freq", "1")
    search.main(cli.parse(search.get_parser(), ["--resume", str(tmp_path / "cut")]))
    for name in ("genotype.txt", "history.jsonl"):
        assert (whole / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    lines = history(whole)
    assert len(lines) == 2 and np.isfinite([[line["train_loss"], line["arch_loss"]] for line in lines]).all()


@pytest.mark.parametrize("space", ["static", "nasbench201"])
def test_random_search_draws_an_architecture_and_trains_nothing(pictures, tmp_path, space):
    folders = [
        run_search(pictures, tmp_path / name, f"--method random --space_config {space} --seed {seed}")
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    found = [(folder / "genotype.txt").read_text() for folder in folders]
    assert found[0] == found[1] != found[2]
    assert [line["genotype"] for line in history(folders[0])] == [found[0].strip()]


def test_gdas_trains_alphas_of_operations_it_does_not_compute():
    state = tiny_search("--method gdas")
    x, y = torch.randn(4, 3, 8, 8).double(), torch.randint(0, 10, (4,))
    weights, active = state.operations()
    assert all(len(ops) == 1 for edges in active.values() for ops in edges)
    bilevel.architecture_backward(state.network, state.optimizer, weights, active, x, y)
    for kind, alpha in state.architecture.items():
        assert (alpha.grad != 0).all(), kind
    fast_grads = [alpha.grad.clone() for alpha in state.architecture.values()]
    state.architecture.zero_grad()
    state.method.noise.manual_seed(0)  # the same draw once more
    fast.switch_off(state.network)
    bilevel.architecture_backward(state.network, state.optimizer, *state.operations(), x, y)
    for ours, alpha in zip(fast_grads, state.architecture.values(), strict=True):
        torch.testing.assert_close(ours, alpha.grad)


def test_every_process_draws_its_own_dropout_and_the_same_architecture(monkeypatch, tmp_path):
    class Loader:
        num_images = 3

        def __len__(self):
            return 3

        def epoch(self, epoch, start):
            return iter(range(start, 3))

    drawn = {}
    for rank in ("0", "1", "1"):
        monkeypatch.setenv("RANK", rank)
        utils.set_seed(0)
        state = tiny_search("--method gdas --quiet")
        state.run = SimpleNamespace(folder=tmp_path)
        dropout, noise = [], []
        for _ in state.steps(Loader()):
            dropout.append(torch.rand(1).item())
            noise.append(state.operations()[1])
        assert drawn.setdefault(rank, (dropout, noise)) == (dropout, noise)
    assert drawn["0"][1] == drawn["1"][1] and not set(drawn["0"][0]) & set(drawn["1"][0])


def test_two_runs_with_the_same_seed_are_the_same(pictures, tmp_path):
    folders = [run_search(pictures, tmp_path / name, "--gumbel --rdss_prob 0.3 --dss_freq 1") for name in "ab"]
    for name in ("genotype.txt", "history.jsonl"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    other = run_search(pictures, tmp_path / "c", "--gumbel --rdss_prob 0.3 --dss_freq 1 --seed 1")
    assert (folders[0] / "history.jsonl").read_bytes() != (other / "history.jsonl").read_bytes()


def test_runs_without_a_name_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.time, "strftime", lambda *_: "NOW")
    names = []
    for _ in range(3):
        run = runs.create_run(arguments("--note try"), "search.py", "search")
        names.append(run.folder.name)
        run.close()
    assert names == ["search-try-NOW", "search-try-NOW-2", "search-try-NOW-3"]
    assert str(runs.new_folder("logs/search-try")) == "logs/search-try-NOW-4"  # as the scripts of P-DARTS name theirs


def test_the_subspace_moves_every_dss_freq_steps(pictures, tmp_path):
    (line,) = history(run_search(pictures, tmp_path / "run", "--dss_freq 2 --batch_size 6"))
    assert [sampling["step"] for sampling in line["samplings"]] == [0, 2, 4]
    actives = [json.dumps(sampling["active"]) for sampling in line["samplings"]]
    assert len(set(actives)) == 3 and all(sampling["changed"] > 0 for sampling in line["samplings"])


def test_an_epoch_of_cifar_has_14_samplings():
    method = tiny_search("").method
    for step in range(391):
        method.before_step(0, step)
    assert [sampling["step"] for sampling in method.samplings] == [30 * n for n in range(14)]


def test_imagenets_space_on_another_dataset_says_what_it_means(pictures, tmp_path):
    log = (run_search(pictures, tmp_path / "run", "--space_config imagenet") / "log.txt").read_text()
    assert "the space: sep_conv_3x3, dil_conv_3x3, sep_conv_5x5, dil_conv_5x5 from epoch 0; sep_conv_3x3," in log
    assert "all other settings are those of --dataset folder" in log


def test_before_epoch_begin_every_step_has_a_random_subspace():
    state = tiny_search("--begin 1")
    seen = set()
    for _ in range(4):
        state.method.before_step(state.epoch, state.step)
        seen.add(state.method.subspace.active["normal"].tobytes())
        state.step += 1
    assert len(seen) == 4 and state.method.subspace.total == 1
    state.next_epoch()
    state.method.before_step(state.epoch, state.step)
    assert state.method.subspace.total == 2


def test_space_schedules_take_effect_at_their_epochs(tmp_path):
    for config, expected in (("expand", [3, 3, 4]), ("shrink", [112, 112, 98])):
        state = tiny_search(f"--space_config {config}")
        state.run = runs.RunFolder.create(tmp_path / config, state.args, "search.py")
        found = []
        for state.epoch in (0, 9, 10):
            state.start_epoch()
            available = state.method.subspace.available["normal"]
            found.append(int(available.any(0).sum() if config == "expand" else available.sum()))
        state.run.close()
        assert found == expected


def test_learning_rates():
    assert engine.cosine_rate(0, 50, 0.025, 0.001) == 0.025
    assert engine.cosine_rate(25, 50, 0.025, 0.001) == pytest.approx(0.013)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    for batch, epoch, expected in ((512, 0, 0.1), (512, 5, 0.5), (256, 0, 0.5)):
        args = arguments(f"--warmup_epochs 5 --learning_rate 0.5 --batch_size {batch}")
        engine.set_learning_rate(optimizer, 0.5, epoch, args)
        assert optimizer.param_groups[0]["lr"] == expected
    state = tiny_search("--gumbel --tau_min 1 --tau_max 3 --epochs 3")
    taus = []
    for state.epoch in range(3):
        taus.append(state.method.tau(state.epoch))
    assert taus == [3, 2, 1]


def test_the_architecture_step_leaves_the_weights_alone():
    state = tiny_search()
    state.method.before_step(state.epoch, state.step)
    active = state.method.subspace.active_ops()
    x, y = torch.randn(4, 3, 8, 8).double(), torch.randint(0, 10, (4,))
    bilevel.architecture_backward(state.network, state.optimizer, state.operations()[0], active, x, y)
    assert all(p.grad is None and p.requires_grad for p in state.network.parameters())
    assert all(p.grad.abs().sum() > 0 for p in state.architecture.parameters())
    norms = [p.grad.norm() for p in state.architecture.parameters()]
    norm = bilevel.clip_and_step(state.architecture, state.arch_optimizer, clip=5)
    assert norm == pytest.approx(torch.stack(norms).norm().item())


def test_the_gradients_of_alpha_and_of_beta_are_clipped_each():
    state = tiny_search("--arch_learning_rate 1")
    state.arch_optimizer = torch.optim.SGD(state.architecture.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in state.architecture.named_parameters()}
    for name, p in state.architecture.named_parameters():
        p.grad = torch.full_like(p, 7.0 if name.startswith("alphas") else 1e-3)
    bilevel.clip_and_step(state.architecture, state.arch_optimizer, clip=5)
    step = {name: (p.detach() - before[name]).flatten() for name, p in state.architecture.named_parameters()}
    assert torch.cat([step["alphas_normal"], step["alphas_reduce"]]).norm() == pytest.approx(5, rel=1e-4)
    assert step["betas_normal"] == pytest.approx(torch.full((112,), -1e-3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dss_max_ops 13", "at least 14"),
        ("--tau_min 3 --tau_max 2 --gumbel", "tau"),
        ("--batch_size 50", "batch"),
        ("--train_portion 1", "between 0 and 1"),
        ("--arch 2x", "Python name"),
        ("--arch PRIMITIVES", "taken"),
        ("--arch DDSAS_cifar10", "taken"),
        ("--amp", "CUDA"),
        ("--device cuda:7", "cuda:7"),
        ("--image_size 18", "multiple of 4"),
        ("--method darts --dss_freq 5", "--dss_freq is for --method ddsas, not darts"),
        ("--method gdas --unrolled", "--unrolled is for --method darts or ddsas"),
        ("--space_config nasbench201 --checkpoint_cells", "--checkpoint_cells"),
        ("--space_config nasbench201 --dss_max_ops 5", "at least 6"),
        ("--space_config nasbench201 --table nowhere.csv", "nowhere.csv"),
        ("--table t.csv", "--table is for --space_config nasbench201"),
    ],
)
def test_wrong_arguments_are_named(pictures, tmp_path, flags, message):
    with pytest.raises(cli.UserError, match=message):
        run_search(pictures, tmp_path / "run", flags)


@pytest.mark.parametrize(
    "flags", ["--dataset mnist", "--space_config big", "--epochs 0", "--rdss_prob 2", "--momentum 1", "--frobnicate"]
)
def test_wrong_values_are_one_line_and_exit_2(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        cli.run_script(search.main, search.get_parser(), flags.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(pictures, tmp_path):
    with pytest.raises(distributed.Diverged, match="epoch 0, step [1-9].*gradient norm"):
        run_search(pictures, tmp_path / "run", "--learning_rate 1e30 --grad_clip 0 --batch_size 6")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
