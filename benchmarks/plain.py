"""The plain formulation of the networks: what the papers write and the published code does; oracle and yardstick.

Every active operation is called on its own, on its edge's input, through its own Sequential; its output is multiplied
by its weight; a Python sum adds them up; tensors are NCHW. The functions walk the modules of the network under test, so
they compute with its parameters and move its running statistics.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
import model_search
from operations import FactorizedReduce, Identity, Pool, Zero


def nchw(network: nn.Module) -> nn.Module:
    """A copy of the network whose weights are contiguous, so that no operation changes to channels_last."""
    network = copy.deepcopy(network)
    for p in network.parameters():
        p.data = p.data.clone(memory_format=torch.contiguous_format)
    return network


def call(op: nn.Module, x: Tensor) -> Tensor:
    """The operation as its Sequential says."""
    if isinstance(op, Zero):
        return torch.zeros_like(x[:, :, :: op.stride, :: op.stride])
    if isinstance(op, Identity):
        return F.dropout(x, op.dropout, op.training) if op.dropout > 0 else x
    if isinstance(op, Pool):
        return nn.Sequential.forward(op, x)
    if isinstance(op, FactorizedReduce):
        x = F.relu(x)
        return op.bn(torch.cat([op.conv_1(x), op.conv_2(x[:, :, 1:, 1:])], dim=1))
    return op.op(x)


def stems(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    if hasattr(network, "stem"):
        return (network.stem(x),) * 2
    s0 = network.stem0(x)
    return s0, network.stem1(s0)


def classify(network: nn.Module, x: Tensor) -> Tensor:
    return network.classifier(network.global_pooling(x).flatten(1))


def supernet(network: model_search.Network, x: Tensor, weights: dict, active: dict | None) -> Tensor:
    """Logits of the supernet; the arguments are those of `model_search.Network.forward`."""
    s0, s1 = stems(network, x)
    for cell in network.cells:
        kind = "reduce" if cell.reduction else "normal"
        s0, s1 = s1, supernet_cell(cell, s0, s1, weights[kind], None if active is None else active[kind])
    return classify(network, s1)


def supernet_cell(cell: model_search.Cell, s0: Tensor, s1: Tensor, weights: Tensor, active: list | None) -> Tensor:
    states = [call(cell.preprocess0, s0), call(cell.preprocess1, s1)]
    edge = 0
    for _ in range(4):
        incoming = []
        for x in states:
            ops = cell._ops[edge]._ops
            chosen = range(len(ops)) if active is None else active[edge]
            incoming.append(sum(weights[edge, k] * call(ops[k], x) for k in chosen))
            edge += 1
        states.append(sum(incoming))
    return torch.cat(states[2:], dim=1)


def discovered(network: model.Network, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(logits, auxiliary logits or None) of a discovered network."""
    s0, s1 = stems(network, x)
    auxiliary_logits = None
    for layer, cell in enumerate(network.cells):
        s0, s1 = s1, discovered_cell(cell, s0, s1, network.drop_path_prob if network.training else 0.0)
        if layer == network._auxiliary_layer and network.training and hasattr(network, "auxiliary_head"):
            head = network.auxiliary_head
            auxiliary_logits = head.classifier(head.features(s1).flatten(1))
    return classify(network, s1), auxiliary_logits


def discovered_cell(cell: model.Cell, s0: Tensor, s1: Tensor, drop_path_prob: float) -> Tensor:
    states = [call(cell.preprocess0, s0), call(cell.preprocess1, s1)]
    for first in range(0, len(cell._ops), 2):
        outputs = []
        for k in (first, first + 1):
            y = call(cell._ops[k], states[cell._indices[k]])
            if drop_path_prob > 0 and not isinstance(cell._ops[k], Identity):
                y = model.drop_path(y, drop_path_prob)
            outputs.append(y)
        states.append(outputs[0] + outputs[1])
    return torch.cat([states[i] for i in cell._concat], dim=1)
