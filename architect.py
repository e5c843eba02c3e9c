"""The architecture's step: Adam on alpha and beta with the loss of a validation batch, of first or second order."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lib.distributed import average_gradients
from utils import Average, autocast

Batch = tuple[Tensor, Tensor]  # images (N, 3, H, W), labels (N)
Active = dict[str, list[list[int]]] | None  # active operations of each edge, per cell type; None: all
DIFFERENCE = 0.01  # norm of the step of the finite differences (DARTS, footnote 2 of section 2.3)


class Architect:
    """Trains the architecture parameters (DARTS, Liu et al., ICLR 2019, section 2.3).

    ``weights_optimizer`` is the SGD of the network's weights: they stand still here, and --unrolled looks one of its
    steps ahead. ``meter`` has loss and accuracy of the validation batches.
    """

    def __init__(
        self,
        network: nn.Module,
        architecture: nn.Module,
        weights_optimizer: torch.optim.Optimizer,
        args: argparse.Namespace,
        device: torch.device,
    ) -> None:
        self.network, self.weights_optimizer, self.args, self.device = network, weights_optimizer, args, device
        named = list(architecture.named_parameters())
        betas = [p for name, p in named if name.startswith("betas")]
        alphas = [p for name, p in named if not name.startswith("betas")]
        self.groups = [group for group in (alphas, betas) if group]  # each clipped on its own
        self.meter = Average(device)
        adam = {"betas": (0.5, 0.999), "weight_decay": args.arch_weight_decay}
        self.optimizer = torch.optim.Adam(alphas + betas, args.arch_learning_rate, **adam) if named else None

    def step(
        self,
        weights: dict[str, Tensor],
        active: Active,
        train: Batch,
        valid: Batch,
        regulariser: Tensor | None = None,
    ) -> Tensor:
        """One step on the loss of a validation batch plus ``regulariser``; returns the norm of the gradient.

        ``weights`` are the operations' weights as functions of alpha and beta, ``active`` the active operations. The
        training batch is used by --unrolled alone.
        """
        precision = autocast(self.args, self.device)
        if self.args.unrolled:
            loss, logits = unrolled_backward(
                self.network, self.weights_optimizer, weights, active, train, valid, regulariser
            )
        else:
            loss, logits = first_order_backward(
                self.network, self.weights_optimizer, weights, active, valid, regulariser, precision
            )
        self.meter.add(loss, logits, valid[1])
        average_gradients(p for group in self.groups for p in group)
        norms = [nn.utils.clip_grad_norm_(group, self.args.arch_grad_clip or float("inf")) for group in self.groups]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.linalg.vector_norm(torch.stack(norms))

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer and self.optimizer.state_dict(), "meter": self.meter.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.meter.load_state_dict(state["meter"])


def first_order_backward(
    network: nn.Module,
    weights_optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    active: Active,
    valid: Batch,
    regulariser: Tensor | None = None,
    precision: AbstractContextManager | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the validation loss to alpha and beta, and to nothing else; returns loss and logits.

    The first-order approximation of DARTS (its section 2.3, xi = 0).
    """
    with frozen(weights_optimizer):
        with precision or nullcontext():
            logits = network(valid[0], weights, active)
            loss = F.cross_entropy(logits, valid[1])
        (loss if regulariser is None else loss + regulariser).backward()
    return loss, logits


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


def unrolled_backward(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    active: Active,
    train: Batch,
    valid: Batch,
    regulariser: Tensor | None = None,
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
    added = [] if regulariser is None else [regulariser]
    torch.autograd.backward([*weights.values(), *added], [*total, *(None for _ in added)])
    return loss, logits
