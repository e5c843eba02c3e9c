"""DDSAS: search for a cell inside a subspace of operations that a bandit moves (ACML 2021).

    python search.py --dataset cifar10                          # static space, 50 epochs, the published settings
    python search.py --dataset cifar10 --space_config shrink --epochs 60
    python search.py --dataset fashion_mini --arch MY_CELL      # the embedded images; the result goes to genotypes.py
    python search.py --dataset folder --data path/to/images --image_size 32
    python search.py --resume logs/NAME                         # go on with a run that was stopped
    torchrun --nproc_per_node 4 search.py --dataset imagenet --data .data/imagenet_split --space_config imagenet

The run folder holds the log, the arguments, the current genotype, a line of history per epoch, and the checkpoint.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import data
import genotypes
import utils
from model_search import CELL_TYPES, Architecture, DynamicSpace, Network
from utils import Average, Diverged, Run, Stop, UserError, number, progress


def main(args: argparse.Namespace) -> Path:
    """Run the search that the arguments describe; returns the run folder."""
    device = utils.device_of(args)
    rank, world_size = utils.start_distributed(device)
    resumed = resume_run(args, "search.py")
    check(args, device)
    utils.set_seed(args.seed)
    common = data_arguments(args, device, rank, world_size)
    train, valid, info = data.search_data(**common, train_portion=args.train_portion)
    search = Search(args, info, device)
    run = resumed or create_run(args, "search.py", f"search-{args.dataset}-{args.space_config}")
    restore(search, run)
    run.log(
        f"{args.dataset}: {train.num_images} images to train the weights, {valid.num_images} for the architecture;"
        f" {args.space_config} space, {args.dss_max_ops} active operations, moved every {args.dss_freq} steps; {device}"
    )
    run_epochs(
        search,
        args.epochs,
        train,
        run,
        train_epoch=lambda stop: train_epoch(search, train, valid, run, stop),
        finish_epoch=lambda: finish_epoch(search, valid, run),
    )
    genotype = search.space.genotype()
    run.genotype(str(genotype))
    run.log(f"genotype: {genotype}")
    if args.arch and utils.is_main():
        try:
            genotypes.record(args.arch, genotype)
        except ValueError as error:
            raise UserError(str(error)) from None
        run.log(f"recorded in genotypes.py as {args.arch}")
    run.log(f"retrain it with: python retrain.py --dataset {args.dataset} --arch {run.folder}")
    run.close()
    return run.folder


def data_arguments(args: argparse.Namespace, device: torch.device, rank: int, world_size: int) -> dict:
    """What the functions of data.py that open a dataset are told by the arguments all scripts have."""
    return dict(
        name=args.dataset,
        root=args.data,
        batch_size=args.batch_size,
        seed=args.seed,
        cutout=args.cutout_length if args.cutout else 0,
        device=device,
        image_size=args.image_size,
        workers=args.workers,
        rank=rank,
        world_size=world_size,
        bad_images=args.bad_images,
        quiet=args.quiet,
    )


def run_epochs(state, epochs: int, train: data.Loader, run: Run, train_epoch, finish_epoch) -> None:
    """All epochs that are left, each with its line of history, its timing and its checkpoint.

    ``state`` is a `Search`, that of train_search.py, or a retraining; ``train_epoch(stop)`` goes through one epoch of
    ``train``, ``finish_epoch()`` validates and returns the line of history.
    """
    with Stop() as stop, bar(state, None, "epochs", epochs, state.epoch) as epochs_bar:
        while state.epoch < epochs:
            started, first_step = time.time(), state.step
            state.start_epoch(run)
            train_epoch(stop)
            line = finish_epoch()
            run.history(line)
            seconds, images = time.time() - started, (len(train) - first_step) * state.args.batch_size
            run.timing(
                {key: line[key] for key in ("stage", "epoch") if key in line}
                | {
                    "seconds": round(seconds, 2),
                    "images_per_second": round(images * utils.world_size() / seconds, 1),
                    "peak_memory_mb": round(utils.peak_memory_mb(state.device)),
                }
            )
            write_tensorboard(run, line, state, is_last=state.epoch + 1 == epochs)
            state.next_epoch()
            saved = state.state_dict()
            if line.get("best_acc") is not None and line["test_acc"] == line["best_acc"]:
                run.checkpoint(saved, "best.pt")
            run.checkpoint(saved)
            shown = {"valid_acc": "validation accuracy", "test_acc": "test accuracy", "best_acc": "best"}
            shown = [f"{text} {line[name]:.1f}%" for name, text in shown.items() if line.get(name) is not None]
            epochs_bar.set_postfix_str(", ".join(shown), refresh=False)
            epochs_bar.update()


# ---- the loop of one epoch -----------------------------------------------------------------------------------------


class SearchState:
    """What the searches of DDSAS and P-DARTS have in common: a supernet, its architecture parameters, an optimizer for
    each, and the place in the schedule. Here, and in the subclasses, is all that changes: what a checkpoint holds."""

    trains_architecture = True
    tau: float | None = None  # temperature of the Gumbel softmax; None: plain softmax

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.epoch = self.step = 0
        self.train_average, self.arch_average = Average(device), Average(device)

    def take(self, network: Network, architecture: nn.Module) -> None:
        """Search with this supernet and these architecture parameters from now on, with fresh optimizers."""
        args = self.args
        self.network, self.architecture = network.to(self.device), architecture.to(self.device)
        self.network.checkpoint_cells = args.checkpoint_cells
        self.optimizer = torch.optim.SGD(
            network.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay
        )
        self.arch_optimizer = torch.optim.Adam(
            architecture.parameters(),
            args.arch_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=args.arch_weight_decay,
        )

    def state_dict(self) -> dict:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "epochs": self.args.epochs,
            "state_dict": self.network.state_dict(),
            "architecture": self.architecture.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "arch_optimizer": self.arch_optimizer.state_dict(),
            "averages": [self.train_average.state(), self.arch_average.state()],
            "rng": utils.rng_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
        self.network.load_state_dict(state["state_dict"])
        self.architecture.load_state_dict(state["architecture"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.arch_optimizer.load_state_dict(state["arch_optimizer"])
        for average, sums in zip((self.train_average, self.arch_average), state["averages"], strict=True):
            average.load(sums)
        utils.set_rng_state(state["rng"])

    def next_epoch(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0
        self.train_average, self.arch_average = Average(self.device), Average(self.device)


class Search(SearchState):
    """A search of DDSAS: also the space, and the random numbers that choose when and which random subspaces."""

    def __init__(self, args: argparse.Namespace, info: data.Info, device: torch.device) -> None:
        super().__init__(args, device)
        self.config = genotypes.SPACES[args.space_config]
        primitives = self.config.primitives
        stem = stem_for(info, args.dataset)
        network = Network(args.init_channels, info.num_classes, args.layers, primitives, stem)
        self.take(network, Architecture(genotypes.EDGES, len(primitives)))
        self.space = DynamicSpace(primitives, max_ops=args.dss_max_ops, confidence=args.confidence)
        self.rng = np.random.default_rng(args.seed)
        self.samplings: list[dict] = []  # of this epoch

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "space": self.space.state_dict(),
            "samplings": self.samplings,
            "space_rng": repr(self.rng.bit_generator.state),
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.space.load_state_dict(state["space"])
        self.samplings = state["samplings"]
        self.rng.bit_generator.state = ast.literal_eval(state["space_rng"])

    def start_epoch(self, run: Run) -> None:
        """Set the learning rate; at an epoch's first step, shrink or expand the space if the schedule says so."""
        args = self.args
        batch = args.batch_size * utils.world_size()
        lr = learning_rate(self.epoch, args.epochs, args.learning_rate, args.learning_rate_min)
        set_learning_rate(self.optimizer, warmed_up(lr, self.epoch, args.warmup_epochs, batch))
        if self.step == 0:
            if num := self.config.shrink.get(self.epoch):
                self.space.shrink(num)
                run.log(f"epoch {self.epoch}: the space shrinks by {num} operations per cell type")
            if num := self.config.expand.get(self.epoch):
                self.space.set_available(num)
                run.log(f"epoch {self.epoch}: {num} primitives available: {', '.join(self.config.primitives[:num])}")

    def next_epoch(self) -> None:
        super().next_epoch()
        self.samplings = []

    @property
    def tau(self) -> float | None:
        """Temperature of the Gumbel softmax, linear from tau_max to tau_min over the epochs; None: plain softmax."""
        args = self.args
        if not args.gumbel:
            return None
        return args.tau_max - (args.tau_max - args.tau_min) * self.epoch / max(args.epochs - 1, 1)

    def weights(self, active: dict, tau: float | None = None) -> dict[str, Tensor]:
        """The operations' weights in the supernet (section 2)."""
        return self.architecture.weights(active, self.args.saliency_type, not self.args.no_norm, tau)

    @torch.no_grad()
    def move_subspace(self) -> dict[str, list[list[int]]]:
        """Every dss_freq steps update the bandit and sample a subspace; before epoch `begin` a random one each step.

        Returns the active operations.
        """
        args, before = self.args, {kind: active.copy() for kind, active in self.space.active.items()}
        if self.epoch < args.begin:
            self.space.sample_random(self.rng)
        elif self.step % args.dss_freq == 0:
            raw = self.architecture.weights(self.space.active_ops(), args.saliency_type, norm=False)
            self.space.update(as_arrays(raw), as_arrays(self.architecture.betas()))
            if self.rng.random() < args.rdss_prob:
                self.space.sample_random(self.rng)
            else:
                self.space.sample()
        else:
            return self.space.active_ops()
        if self.step % args.dss_freq == 0:  # what the run folder remembers
            changed = sum(int((before[kind] != self.space.active[kind]).sum()) for kind in CELL_TYPES)
            active = {kind: bits(self.space.active[kind]) for kind in CELL_TYPES}
            self.samplings.append({"step": self.step, "active": active, "changed": changed})
        return self.space.active_ops()


def train_epoch(search: Search, train: data.Loader, valid: data.Loader, run: Run, stop: Stop) -> None:
    """One epoch, from search.step on: move the subspace, train alpha and beta, train the weights (section 4).

    P-DARTS passes here too: its subspace stays as it is, and in some epochs only the weights are trained.
    """
    args, epoch, started = search.args, search.epoch, time.time()
    valid_batches = valid.random(epoch, search.step)
    steps = bar(search, train.epoch(epoch, search.step), f"epoch {epoch}", len(train), search.step)
    watch, first = Watch(search.device, epoch), search.step
    search.network.train()
    for x, y in steps:
        active = search.move_subspace()
        arch_norm = None

        # alpha and beta on the validation half (Adam)
        if search.trains_architecture:
            x_valid, y_valid = next(valid_batches)
            with autocast(args, search.device):
                weights = search.weights(active, search.tau)
                if args.unrolled:
                    loss, logits = unrolled_backward(search, weights, active, (x, y), (x_valid, y_valid))
                else:
                    loss, logits = architecture_backward(
                        search.network, search.optimizer, weights, active, x_valid, y_valid
                    )
            arch_norm = architecture_step(search.architecture, search.arch_optimizer, args.arch_grad_clip)
            search.arch_average.add(loss, logits, y_valid)

        # the weights on the training half (SGD)
        with autocast(args, search.device), torch.no_grad():
            weights = search.weights(active, search.tau)
        with autocast(args, search.device):
            logits = search.network(x, weights, active)
            loss = F.cross_entropy(logits, y)
        norm = weight_step(search.optimizer, loss, args.grad_clip)
        search.train_average.add(loss, logits, y)

        watch.add(search.step, loss, norm, arch_norm)
        search.step += 1
        report(search, run, steps, watch, (search.step - first) * args.batch_size / (time.time() - started))
        leave_or_checkpoint(search, run, stop, watch, args)


def architecture_backward(
    network: Network,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    active: dict,
    x: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the validation loss to alpha and beta, and to nothing else; returns loss and logits.

    ``optimizer`` is that of the network's weights.
    """
    with frozen(optimizer):
        logits = network(x, weights, active)
        loss = F.cross_entropy(logits, y)
        loss.backward()
    return loss, logits


def architecture_step(architecture: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> Tensor:
    """Step on the gradients of alpha and of beta, each clipped to norm ``clip`` (0: not); returns the norm of both."""
    betas = [p for name, p in architecture.named_parameters() if name.startswith("betas")]
    alphas = [p for name, p in architecture.named_parameters() if not name.startswith("betas")]
    utils.average_gradients(alphas + betas)
    norms = [nn.utils.clip_grad_norm_(group, clip or float("inf")) for group in (alphas, betas) if group]
    optimizer.step()
    optimizer.zero_grad()
    return torch.linalg.vector_norm(torch.stack(norms))


def weight_step(optimizer: torch.optim.Optimizer, loss: Tensor, grad_clip: float) -> Tensor:
    """Backpropagate, clip the gradients to norm ``grad_clip``, step; returns the norm before clipping.

    Operations that were not active have no gradient and stay as they are.
    """
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    utils.average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, grad_clip or float("inf"))
    optimizer.step()
    return norm


@contextmanager
def frozen(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """What the optimizer trains needs no gradient: a backward pass does not compute it and keeps less in memory."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.requires_grad = False
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad = True


DIFFERENCE = 0.01  # norm of the step of the finite differences in the second-order gradient (DARTS, section 2.3)


def unrolled_backward(
    search: Search, weights: dict[str, Tensor], active: dict, train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """DARTS' second-order architecture gradient (its equations 7 and 8), added to alpha and beta.

    With w' = w - xi * (momentum * buffer + dL_train/dw + decay * w), v = dL_valid/dw'(w') and R = 0.01 / ||v||:
    dL_valid/da(w') - xi * (dL_train/da(w + R v) - dL_train/da(w - R v)) / 2R. The network itself stays as it is.
    """
    network, group = search.network, search.optimizer.param_groups[0]
    xi, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    leaves = {kind: w.detach().requires_grad_() for kind, w in weights.items()}

    def gradients(params: dict[str, Tensor], batch: tuple[Tensor, Tensor], of_weights: bool, of_params: bool):
        buffers = {name: b.clone() for name, b in network.named_buffers()}  # running statistics do not move
        params = {name: p.detach().requires_grad_(of_params) for name, p in params.items()}
        logits = functional_call(network, (params, buffers), (batch[0], leaves, active))
        loss = F.cross_entropy(logits, batch[1])
        inputs = (list(leaves.values()) if of_weights else []) + (list(params.values()) if of_params else [])
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        by_name = dict(zip(params, grads[-len(params) :], strict=True)) if of_params else {}
        return loss, logits, grads[: len(leaves)], {name: g for name, g in by_name.items() if g is not None}

    w = dict(network.named_parameters())
    dw = gradients(w, train, False, True)[3]
    buffer = {name: search.optimizer.state[w[name]].get("momentum_buffer") for name in dw}
    ahead = {
        name: w[name].detach() - xi * (g + decay * w[name].detach() + (momentum * b if b is not None else 0))
        for (name, g), b in zip(dw.items(), buffer.values(), strict=True)
    }
    loss, logits, da, v = gradients(w | ahead, valid, True, True)
    R = DIFFERENCE / torch.linalg.vector_norm(torch.stack([g.norm() for g in v.values()]))
    plus, minus = (
        gradients(w | {name: w[name].detach() + sign * R * g for name, g in v.items()}, train, True, False)[2]
        for sign in (1, -1)
    )
    total = [d - xi * (p - m) / (2 * R) for d, p, m in zip(da, plus, minus, strict=True)]
    torch.autograd.backward(list(weights.values()), total)
    return loss, logits


@torch.no_grad()
def validate(network: nn.Module, loader: data.Loader, forward, device: torch.device) -> utils.Metrics:
    """Loss and accuracy of ``forward(x)`` (logits) over the loader's images, each once, in evaluation mode."""
    network.eval()
    average = Average(device)
    for x, y in loader.in_order():
        logits = forward(x)
        average.add(F.cross_entropy(logits, y), logits, y)
    return average.read()


def finish_epoch(search: Search, valid: data.Loader, run: Run) -> dict:
    """Validate, log, write the current genotype; returns the epoch's line of history."""
    space, args = search.space, search.args
    active = space.active_ops()
    utils.share_buffers(search.network)
    with torch.no_grad(), autocast(args, search.device):
        weights = search.weights(active)
        metrics = validate(search.network, valid, lambda x: search.network(x, weights, active), search.device)
    train, arch = search.train_average.read(), search.arch_average.read()
    check_finite(search.epoch, "validation", loss=metrics.loss)
    if utils.world_size() > 1:
        utils.assert_same(
            dict(search.architecture.named_parameters()) | {f"active {kind}": space.active[kind] for kind in CELL_TYPES}
        )
    genotype = space.genotype()
    run.genotype(str(genotype))
    run.log(
        f"epoch {search.epoch}: train loss {train.loss:.4f}, accuracy {train.top1:.2f} %;"
        f" validation loss {metrics.loss:.4f}, accuracy {metrics.top1:.2f} %"
    )
    run.log(f"epoch {search.epoch}: {genotype}")
    return {
        "epoch": search.epoch,
        "lr": search.optimizer.param_groups[0]["lr"],
        "tau": search.tau,
        "train_loss": train.loss,
        "train_acc": train.top1,
        "arch_loss": arch.loss,
        "valid_loss": metrics.loss,
        "valid_acc": metrics.top1,
        "genotype": str(genotype),
        "primitives": space.primitives,
        "samplings": search.samplings,
        "available": {kind: bits(space.available[kind]) for kind in CELL_TYPES},
        "saliency": {kind: space.saliency[kind].tolist() for kind in CELL_TYPES},
        "visits": {kind: space.visits[kind].tolist() for kind in CELL_TYPES},
        "alpha_entropy": {kind: entropy(alpha) for kind, alpha in search.architecture.alphas().items()},
        "active_ops": {kind: int(space.active[kind].sum()) for kind in CELL_TYPES},
    }


# ---- what the searches and retraining share ------------------------------------------------------------------------


def learning_rate(epoch: int, epochs: int, first: float, last: float) -> float:
    """Cosine from ``first`` at epoch 0 towards ``last`` at ``epochs``: a function of the epoch, nothing to restore."""
    return last + (first - last) * (1 + np.cos(np.pi * epoch / epochs)) / 2


def warmed_up(lr: float, epoch: int, warmup_epochs: int, batch_size: int) -> float:
    """lr, or lr * (epoch + 1) / warmup_epochs in the first epochs of training with large batches (more than 256)."""
    return lr * (epoch + 1) / warmup_epochs if epoch < warmup_epochs and batch_size > 256 else lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = float(lr)


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic on CUDA where --amp asks for it, float32 otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp)


class Watch:
    """Looks for losses and gradients that are not finite: at once on the CPU, on CUDA when `check` is called, since a
    look at every step would make the GPU wait."""

    def __init__(self, device: torch.device, epoch: int) -> None:
        self.at_once, self.epoch, self.pending = device.type == "cpu", epoch, []

    def add(self, step: int, loss: Tensor, norm: Tensor, arch_norm: Tensor | None = None) -> None:
        values = [loss.detach(), norm.detach()] + ([] if arch_norm is None else [arch_norm.detach()])
        self.pending.append((step, torch.stack([v.float() for v in values])))
        if self.at_once:
            self.check()

    def check(self) -> None:
        """Diverged with epoch, step, loss and norms, unless all values since the last check are finite."""
        for step, values in self.pending:
            if not values.isfinite().all():
                loss, *norms = values.tolist()
                check_finite(self.epoch, f"step {step}", loss, *norms)
        self.pending.clear()


def check_finite(epoch: int, where: str, loss: float, norm: float = 0.0, arch_norm: float = 0.0) -> None:
    """Diverged unless loss and gradient norms are finite numbers."""
    if not np.isfinite([loss, norm, arch_norm]).all():
        raise Diverged(
            f"epoch {epoch}, {where}: loss {loss:.4g}, gradient norm {norm:.4g} (architecture {arch_norm:.4g});"
            " the last checkpoint is from before: --resume it, or start with a lower --learning_rate"
        )


def bar(state, iterable, name: str, total: int, initial: int) -> tqdm:
    """A progress bar that fits into 80 columns; ``state`` has the arguments."""
    shape = "{desc} {bar} {n_fmt}/{total_fmt}, {remaining} left{postfix}"
    return progress(iterable, state.args.quiet, desc=name, total=total, initial=initial, bar_format=shape)


def report(state, run: Run, steps: tqdm, watch: Watch, images_per_second: float) -> None:
    """After a step: loss, accuracy and speed to the bar and, every --report_freq steps, to the log.

    ``state`` has args, epoch, step and train_average. In between, a GPU or the other ranks would have to wait for it.
    """
    due = state.step % state.args.report_freq == 0 or state.step == steps.total
    if due:
        watch.check()
    elif steps.disable or not watch.at_once or utils.world_size() > 1:
        return
    train = state.train_average.read()
    images_per_second *= utils.world_size()
    shown = f"loss {train.loss:.3f}, acc {train.top1:.1f}%, {images_per_second:.0f} images/s"
    text = f"epoch {state.epoch} step {state.step}/{steps.total}: loss {train.loss:.4f}, accuracy {train.top1:.2f} %"
    if space := getattr(state, "space", None):
        counts = {kind: int(space.active[kind].sum()) for kind in CELL_TYPES}
        shown += f", ops {counts['normal']}+{counts['reduce']}"
        text += f", active operations {counts['normal']} + {counts['reduce']}"
        if state.samplings:
            text += f" ({state.samplings[-1]['changed']} changed at the last sampling)"
    steps.set_postfix_str(shown, refresh=False)
    if due:  # on a terminal the bar says it
        run.log(f"{text}, {images_per_second:.0f} images/s", screen=steps.disable or not sys.stdout.isatty())


def leave_or_checkpoint(state, run: Run, stop: Stop, watch: Watch, args: argparse.Namespace) -> None:
    """After a step: end the run if a signal came, write a checkpoint if one is due; ``state`` is what it holds."""
    if (utils.world_size() == 1 or state.step % args.report_freq == 0) and stop.agreed():
        watch.check()
        run.checkpoint(state.state_dict())
        run.log(f"stopped by signal {stop.signal} at epoch {state.epoch}, step {state.step}")
        run.close()
        stop.exit(run.resume_command)
    if args.checkpoint_freq and state.step % args.checkpoint_freq == 0:
        watch.check()
        run.checkpoint(state.state_dict())


def stem_for(info: data.Info, dataset: str) -> str:
    """The network for large images (a stem of stride 8) from 96 pixels on and for ImageNet, that of CIFAR otherwise."""
    large = dataset == "imagenet" or info.image_size >= 96
    multiple = 32 if large else 4
    if info.image_size % multiple:
        raise UserError(f"--image_size {info.image_size}: must be a multiple of {multiple}, the network halves it")
    return "imagenet" if large else "cifar"


def resume_run(args: argparse.Namespace, script: str, may_change: tuple[str, ...] = ("epochs",)) -> Run | None:
    """The run that --resume names, whose arguments ``args`` takes over; None without --resume."""
    if not args.resume:
        return None
    root = os.path.dirname(args.save or "") or "logs"  # where `auto` looks
    return Run.resume(args.resume, args, script, may_change, root, check_epochs)


def create_run(args: argparse.Namespace, script: str, name: str) -> Run:
    """A new run folder: --save, below logs/ if it is a plain name, or one named after what is run and the time."""
    if args.save:
        folder = Path(args.save) if "/" in args.save else Path("logs") / args.save
    else:
        folder = new_folder(f"logs/{name}-{args.note}" if args.note else f"logs/{name}")
    return Run.create(folder, args, script)


def new_folder(stem: str) -> Path:
    """STEM-TIME, or STEM-TIME-2, ... where another run began in the same second."""
    stem = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(path for n in itertools.count(1) if not (path := Path(stem if n == 1 else f"{stem}-{n}")).exists())


def restore(state, run: Run) -> None:
    """Put the run's last checkpoint, if it has one, into ``state``, a search or a training."""
    if (saved := run.load()) is None:
        return
    try:
        state.load_state_dict(saved)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = genotypes.shown(str(error))
        raise UserError(f"{run.folder}: its checkpoint is of another run or another version ({reason})") from None


def check_epochs(args: argparse.Namespace, stored: dict) -> None:
    """A resumed run keeps its number of epochs, unless nothing before depends on it: then more may be asked for."""
    epochs = stored["epochs"]
    if args.epochs == epochs:
        return
    constant = args.learning_rate_min == args.learning_rate and getattr(args, "lr_scheduler", "cosine") == "cosine"
    if args.epochs < epochs or not constant or getattr(args, "gumbel", False) or args.drop_path_prob:
        raise UserError(
            f"--epochs was {epochs}, now {args.epochs}: the schedule of the epochs already run depends on it; only a"
            " run with a constant learning rate (--learning_rate_min equal to --learning_rate), --drop_path_prob 0 and"
            " without --gumbel can be made longer"
        )


def bits(mask: np.ndarray) -> list[int]:
    """A bool array (edges, operations) as one integer per edge: bit k is operation k."""
    return (mask @ (1 << np.arange(mask.shape[1]))).tolist()


def as_arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: t.detach().cpu().double().numpy() for name, t in tensors.items()}


def entropy(alpha: Tensor) -> float:
    """Mean over the edges of the entropy of softmax(alpha), in nats."""
    p = F.softmax(alpha.detach().double(), dim=-1)
    return float(-(p * p.log()).sum(-1).mean())


TAGS = {  # the names of history.jsonl, as TensorBoard groups them
    "train_loss": "loss/train",
    "arch_loss": "loss/architecture",
    "valid_loss": "loss/valid",
    "test_loss": "loss/test",
    "train_acc": "accuracy/train",
    "valid_acc": "accuracy/valid",
    "test_acc": "accuracy/test",
    "test_acc_top5": "accuracy/test_top5",
    "best_acc": "accuracy/best",
    "lr": "learning_rate/weights",
    "tau": "schedule/tau",
    "stage": "schedule/stage",
    "dropout": "schedule/dropout",
    "drop_path": "schedule/drop_path",
}


def write_tensorboard(run: Run, line: dict, state, is_last: bool) -> None:
    """An epoch's numbers, heat maps and cells as TensorBoard events; with the last one the hyperparameters."""
    if not utils.is_main():
        return
    board, epoch = run.tensorboard, line["epoch"]
    scalars = {tag: line[name] for name, tag in TAGS.items() if line.get(name) is not None}
    if hasattr(state, "arch_optimizer"):
        scalars["learning_rate/architecture"] = state.arch_optimizer.param_groups[0]["lr"]
    for name in ("alpha_entropy", "active_ops"):
        scalars |= {f"{name}/{kind}": value for kind, value in line.get(name, {}).items()}
    if line.get("samplings"):
        changed = np.array([sampling["changed"] for sampling in line["samplings"]])
        scalars["active_ops/changed_per_sampling"] = changed.mean()
        board.add_histogram("active_ops/changed_at_each_sampling", changed, epoch)
    for tag, value in scalars.items():
        board.add_scalar(tag, value, epoch)
    if "genotype" in line:  # a search
        import visualize  # matplotlib is slow to import, and only needed here

        for name in ("saliency", "visits"):
            if name in line:
                board.add_figure(name, visualize.heat_figure(line[name], line["primitives"]), epoch)
        if (picture := visualize.cell_image(genotypes.parse(line["genotype"]))) is not None:
            board.add_image("cells", picture, epoch, dataformats="HWC")
    if is_last:
        write_hyperparameters(
            board, state.args, [tag for tag in scalars if tag.startswith(("loss", "accuracy"))], epoch
        )
    board.flush()


def write_hyperparameters(board, args: argparse.Namespace, metrics: list[str], epoch: int) -> None:
    """The arguments for TensorBoard's table of runs; its metrics are the last values of these scalars.

    SummaryWriter.add_hparams would make one more run, with one more copy of the scalars.
    """
    from torch.utils.tensorboard.summary import hparams

    given = {name: value for name, value in vars(args).items() if name not in utils.HARMLESS | {"given", "save"}}
    plain = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in given.items()}
    for summary in hparams(plain, dict.fromkeys(metrics)):
        board.file_writer.add_summary(summary, epoch)


# ---- arguments -----------------------------------------------------------------------------------------------------


def check(args: argparse.Namespace, device: torch.device) -> None:
    """UserError for arguments that make no sense together."""
    if args.dss_max_ops < genotypes.EDGES:
        raise UserError(f"--dss_max_ops {args.dss_max_ops}: at least {genotypes.EDGES}, one operation per edge")
    if args.tau_min > args.tau_max:
        raise UserError(f"--tau_min {args.tau_min} is larger than --tau_max {args.tau_max}: tau falls over the epochs")
    check_common(args, device)
    if args.arch:
        try:
            genotypes.check_name(args.arch)
        except ValueError as error:
            raise UserError(str(error)) from None


def check_common(args: argparse.Namespace, device: torch.device) -> None:
    """UserError for what search and retraining cannot do."""
    if args.amp and device.type != "cuda":
        raise UserError("--amp needs a CUDA device: on the CPU leave it out")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Dataset, training and run arguments that every search and retraining has."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", default=".data", metavar="DIR", help="folder of the datasets, or of your own images")
    group.add_argument("--dataset", default="cifar10", choices=list(data.INFO))
    group.add_argument("--image_size", type=number(int, 8), metavar="N", help="for folder and imagenet")
    group.add_argument("--bad_images", default="stop", choices=["stop", "skip"], help="what unreadable images cause")
    group.add_argument("--cutout", action="store_true", help="erase a random square of every training image")
    group.add_argument("--cutout_length", type=number(int, 1), default=16, metavar="PIXELS")
    group = parser.add_argument_group("network and training")
    group.add_argument("--init_channels", type=number(int, 1), default=16, metavar="C")
    group.add_argument("--layers", type=number(int, 1), default=8, help="number of cells")
    group.add_argument("--batch_size", type=number(int, 2), default=64, help="per process")
    group.add_argument("--epochs", type=number(int, 1), default=50)
    group.add_argument("--learning_rate", type=number(float, 0), default=0.025, help="of SGD, at epoch 0")
    group.add_argument("--momentum", type=number(float, 0, below=1), default=0.9)
    group.add_argument("--weight_decay", type=number(float, 0), default=3e-4)
    group.add_argument(
        "--grad_clip", type=number(float, 0), default=5.0, help="largest norm of the weights' gradient; 0: any"
    )
    group.add_argument("--warmup_epochs", type=number(int, 0), default=0, help="used with batches of more than 256")
    group.add_argument("--amp", action="store_true", help="bfloat16 on CUDA (less memory, not the same digits)")
    utils.add_run_arguments(parser)


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of both searches, DDSAS and P-DARTS."""
    group = parser.add_argument_group("training of the architecture")
    group.add_argument("--unrolled", action="store_true", help="second-order architecture gradient (DARTS), 3x slower")
    group.add_argument("--checkpoint_cells", action="store_true",
                       help="nearly half the memory: cells are computed again in the backward pass")  # fmt: skip
    group.add_argument("--arch_learning_rate", type=number(float, 0), default=3e-4, help="of Adam")
    group.add_argument("--arch_weight_decay", type=number(float, 0), default=1e-3)
    group.add_argument("--arch_grad_clip", type=number(float, 0), default=0.0, help="norm of alpha, of beta; 0: any")
    group.add_argument("--train_portion", type=float, default=0.5, help="of the training images, for the weights")
    group.add_argument("--learning_rate_min", type=number(float, 0), default=0.001, help="of SGD, after the last epoch")
    group.add_argument("--drop_path_prob", type=number(float, 0, below=1), default=0.0,
                       help="kept from the published commands; the supernet has no drop path")  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(__doc__)
    group = parser.add_argument_group("dynamic subspace")
    group.add_argument("--space_config", default="static", choices=list(genotypes.SPACES), metavar="SPACE",
                       help="static, shrink, expand or imagenet (also space_config_NAME)")  # fmt: skip
    group.add_argument("--dss_max_ops", type=int, default=28, metavar="L", help="active operations per cell type")
    group.add_argument("--dss_freq", type=number(int, 1), default=30, metavar="M", help="steps between two subspaces")
    group.add_argument("--rdss_prob", type=number(float, 0, 1), default=0.0, help="probability of a random subspace")
    group.add_argument("--confidence", type=number(float, 0), default=1.44, metavar="c", help="of the UCB")
    group.add_argument("--begin", type=number(int, 0), default=0, metavar="EPOCH", help="random subspaces before it")
    group = parser.add_argument_group("architecture")
    group.add_argument("--arch", metavar="NAME", help="record the result in genotypes.py under this name")
    group.add_argument("--saliency_type", default="simple", choices=["simple", "all"], help="weights of operations")
    group.add_argument("--no_norm", action="store_true", help="do not divide the weights of an edge by their sum")
    group.add_argument("--gumbel", action="store_true", help="Gumbel softmax; tau falls from tau_max to tau_min")
    group.add_argument("--tau_min", type=number(float, 1e-3), default=0.1)
    group.add_argument("--tau_max", type=number(float, 1e-3), default=10.0)
    add_search_arguments(parser)
    add_common_arguments(parser)
    return parser


if __name__ == "__main__":
    utils.cli(main, get_parser())
