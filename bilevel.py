"""What every differentiable search shares: two steps per batch, one for the architecture, one for the weights.

DARTS (Liu et al., ICLR 2019), algorithm 1: alternately descend the loss of the validation half with respect to the
architecture parameters, and the loss of the training half with respect to the weights. search.py and train_search.py
differ in the supernet, in how architecture parameters become weights of operations, and in when which step is taken.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import engine
from engine import Training, autocast, evaluate, placed
from lib import data, distributed
from lib.cli import number
from model_search import Network
from utils import Average, Metrics

Batch = tuple[Tensor, Tensor]  # images, labels
Active = dict[str, list[list[int]]] | None  # active operations of each edge, per cell type; None: all


class BilevelSearch(Training):
    """A supernet, its architecture parameters, and an optimizer for each."""

    network: Network

    def __init__(self, args: argparse.Namespace, valid: data.Loader, device: torch.device) -> None:
        super().__init__(args, device)
        self.valid = valid
        self.averages["arch"] = Average(device)

    def take(self, network: Network, architecture: nn.Module, all_active: bool) -> None:
        """Search with this supernet and these architecture parameters from now on, with fresh optimizers.

        ``all_active``: every operation is computed at every step. The fused SGD needs that: it starts the momentum of
        all weights at the same step.
        """
        args = self.args
        self.network, self.architecture = placed(network, args, self.device), architecture.to(self.device)
        self.network.checkpoint_cells = args.checkpoint_cells
        self.optimizer = torch.optim.SGD(
            network.parameters(),
            args.learning_rate,
            args.momentum,
            weight_decay=args.weight_decay,
            fused=engine.fused(self.device) if all_active else None,
        )
        self.arch_optimizer = torch.optim.Adam(
            architecture.parameters(),
            args.arch_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=args.arch_weight_decay,
            fused=engine.fused(self.device),
        )

    def operations(self, noise: bool = True) -> tuple[dict[str, Tensor], Active]:
        """The weights of the operations, from the architecture parameters, and the active ones, for one forward pass.

        Without ``noise`` nothing is drawn: that is how the supernet is validated.
        """
        raise NotImplementedError

    def architecture_step(self, train: Batch, valid: Batch) -> Tensor:
        """One step of Adam on alpha and beta with the loss of a validation batch; returns the gradient's norm.

        The training batch is used by --unrolled alone.
        """
        args = self.args
        with autocast(args, self.device):
            weights, active = self.operations()
            if args.unrolled:
                loss, logits = unrolled_backward(self.network, self.optimizer, weights, active, train, valid)
        if not args.unrolled:
            precision = autocast(args, self.device)
            loss, logits = architecture_backward(self.network, self.optimizer, weights, active, *valid, precision)
        self.averages["arch"].add(loss, logits, valid[1])
        return clip_and_step(self.architecture, self.arch_optimizer, args.arch_grad_clip)

    def weight_step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of SGD on the weights with a training batch; returns loss, logits and the gradient's norm."""
        with autocast(self.args, self.device), torch.no_grad():
            weights, active = self.operations()
        with autocast(self.args, self.device):
            logits = self.network(x, weights, active)
            loss = F.cross_entropy(logits, y)
        return loss, logits, backward_clip_and_step(self.optimizer, loss, self.args.grad_clip)

    @torch.no_grad()
    def validate(self) -> Metrics:
        """Loss and accuracy of the supernet on the validation half, in evaluation mode."""
        distributed.share_buffers(self.network)
        self.network.eval()
        with autocast(self.args, self.device):
            weights, active = self.operations(noise=False)
            return evaluate(lambda x: self.network(x, weights, active), self.valid, self.device)

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "epochs": self.args.epochs,
            "state_dict": self.network.state_dict(),
            "architecture": self.architecture.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "arch_optimizer": self.arch_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.network.load_state_dict(state["state_dict"])
        self.architecture.load_state_dict(state["architecture"])
        engine.load_optimizer(self.optimizer, state["optimizer"])
        engine.load_optimizer(self.arch_optimizer, state["arch_optimizer"])


# ---- the two steps --------------------------------------------------------------------------------------------------


def architecture_backward(
    network: Network,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    active: Active,
    x: Tensor,
    y: Tensor,
    precision: AbstractContextManager | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the validation loss to alpha and beta, and to nothing else; returns loss and logits.

    The first-order approximation of DARTS (its section 2.3). ``optimizer`` is that of the network's weights,
    ``precision`` that of the forward pass (autocast; None: as it is).
    """
    with frozen(optimizer):
        with precision or nullcontext():
            logits = network(x, weights, active)
            loss = F.cross_entropy(logits, y)
        loss.backward()
    return loss, logits


def clip_and_step(architecture: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> Tensor:
    """Step on the gradients of alpha and of beta, each clipped to norm ``clip`` (0: not); returns the norm of both."""
    betas = [p for name, p in architecture.named_parameters() if name.startswith("betas")]
    alphas = [p for name, p in architecture.named_parameters() if not name.startswith("betas")]
    distributed.average_gradients(alphas + betas)
    norms = [nn.utils.clip_grad_norm_(group, clip or float("inf")) for group in (alphas, betas) if group]
    optimizer.step()
    optimizer.zero_grad()
    return torch.linalg.vector_norm(torch.stack(norms))


def backward_clip_and_step(optimizer: torch.optim.Optimizer, loss: Tensor, grad_clip: float) -> Tensor:
    """Backpropagate, clip the gradients to norm ``grad_clip``, step; returns the norm before clipping.

    Operations that were not active have no gradient and stay as they are.
    """
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    distributed.average_gradients(parameters)
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


# ---- second order ---------------------------------------------------------------------------------------------------

DIFFERENCE = 0.01  # norm of the step of the finite differences (DARTS, footnote 2 of section 2.3)


def unrolled_backward(
    network: Network,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    active: Active,
    train: Batch,
    valid: Batch,
) -> tuple[Tensor, Tensor]:
    """DARTS' second-order architecture gradient (its equations 7 and 8), added to alpha and beta; loss and logits.

    With w' = w - xi * (momentum * buffer + dL_train/dw + decay * w), v = dL_valid/dw'(w') and R = 0.01 / ||v||:
    dL_valid/da(w') - xi * (dL_train/da(w + R v) - dL_train/da(w - R v)) / 2R. The network itself stays as it is.
    """
    group, leaves = optimizer.param_groups[0], {kind: w.detach().requires_grad_() for kind, w in weights.items()}
    xi, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    parameters = dict(network.named_parameters())
    w = {name: p.detach() for name, p in parameters.items()}

    def loss_at(at: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and logits of the network with the weights ``at``; running statistics do not move."""
        buffers = {name: b.clone() for name, b in network.named_buffers()}
        logits = functional_call(network, (at, buffers), (batch[0], leaves, active))
        return F.cross_entropy(logits, batch[1]), logits

    def train_gradient_of_weights() -> dict[str, Tensor]:
        """dL_train/dw at w, of the weights that have one."""
        at = {name: p.clone().requires_grad_() for name, p in w.items()}
        grads = torch.autograd.grad(loss_at(at, train)[0], list(at.values()), allow_unused=True)
        return {name: g for name, g in zip(at, grads, strict=True) if g is not None}

    def train_gradient_of_architecture(at: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """dL_train/da at the weights ``at``."""
        return torch.autograd.grad(loss_at(at, train)[0], list(leaves.values()), materialize_grads=True)

    ahead = dict(w)  # w'
    for name, g in train_gradient_of_weights().items():
        buffer = optimizer.state[parameters[name]].get("momentum_buffer")
        ahead[name] = w[name] - xi * (g + decay * w[name] + (momentum * buffer if buffer is not None else 0))
    ahead = {name: p.clone().requires_grad_() for name, p in ahead.items()}
    loss, logits = loss_at(ahead, valid)
    inputs = [*leaves.values(), *ahead.values()]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    da, dw = grads[: len(leaves)], zip(ahead, grads[len(leaves) :], strict=True)
    v = {name: g for name, g in dw if g is not None}
    R = DIFFERENCE / torch.linalg.vector_norm(torch.stack([g.norm() for g in v.values()]))
    plus, minus = (
        train_gradient_of_architecture(w | {name: w[name] + sign * R * g for name, g in v.items()}) for sign in (1, -1)
    )
    second = [-xi * (p - m) / (2 * R) for p, m in zip(plus, minus, strict=True)]
    total = [s if d is None else d + s for d, s in zip(da, second, strict=True)]  # None: no cell of this type
    torch.autograd.backward(list(weights.values()), total)
    return loss, logits


# ---- arguments ------------------------------------------------------------------------------------------------------


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every search."""
    add = parser.add_argument_group("training of the architecture").add_argument
    add("--unrolled", action="store_true", help="second-order architecture gradient (DARTS), 3x slower")
    add("--checkpoint_cells", action="store_true",
        help="nearly half the memory: cells are computed again in the backward pass")  # fmt: skip
    add("--arch_learning_rate", type=number(float, 0), default=3e-4, help="of Adam")
    add("--arch_weight_decay", type=number(float, 0), default=1e-3)
    add(
        "--arch_grad_clip",
        type=number(float, 0),
        default=0.0,
        help="largest norm of the gradient of alpha, and of that of beta; 0: no clipping",
    )
    add("--train_portion", type=number(float, 0, 1), default=0.5, help="of the training images, for the weights")
    add("--learning_rate_min", type=number(float, 0), default=0.001, help="of SGD, after the last epoch")
    add("--drop_path_prob", type=number(float, 0, below=1), default=0.0,
        help="kept from the published commands; the supernet has no drop path")  # fmt: skip
