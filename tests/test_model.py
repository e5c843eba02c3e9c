"""Discovered networks against the published ones; parameters and multiply-adds against the papers' numbers."""

import copy

import numpy as np
import pytest
import torch
from golden_arrays import assert_close, golden, load_weights

import fast
import genotypes
from model import NetworkCIFAR, NetworkImageNet, count_multiply_adds, count_parameters, drop_path, fuse, mobile_channels


@pytest.mark.parametrize("name", ["DDSAS_cifar10", "DDSAS_cifar100", "PDARTS"])
def test_logits_are_those_of_the_published_network(name):
    arrays = golden(f"network_{name}.npz")
    network = NetworkCIFAR(4, 7, 5, False, genotypes.load(name)).eval()
    load_weights(network, arrays)
    x = torch.tensor(arrays["x"])
    logits, auxiliary_logits = network(x)
    assert auxiliary_logits is None
    assert_close(logits, arrays["logits"])
    assert_close(fuse(network)(x)[0], arrays["logits"])


def test_imagenet_logits_are_those_of_the_published_network():
    arrays = golden("network_DDSAS_imagenet.npz")
    network = NetworkImageNet(4, 7, 5, False, genotypes.load("DDSAS_imagenet")).eval()
    load_weights(network, arrays)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(int(arrays["x_seed"])))
    assert_close(network(x)[0], arrays["logits"])
    assert_close(fuse(network)(x)[0], arrays["logits"])


@pytest.mark.parametrize(
    ("network", "C", "classes", "layers", "name", "size", "parameters", "multiply_adds"),
    [
        (NetworkCIFAR, 36, 10, 20, "DDSAS_cifar10", 32, 3.6, 568),
        (NetworkCIFAR, 36, 10, 20, "PDARTS", 32, 3.4, 532),
        (NetworkImageNet, 46, 1000, 14, "DDSAS_imagenet", 224, 5.3, 581),
        (NetworkImageNet, 48, 1000, 14, "PDARTS", 224, 4.9, 543),
    ],
)
def test_parameters_are_the_papers(network, C, classes, layers, name, size, parameters, multiply_adds):
    with torch.device("meta"):
        net = network(C, classes, layers, True, genotypes.load(name))
    assert round(count_parameters(net) / 1e6, 1) == parameters
    assert round(count_multiply_adds(net, size) / 1e6) == multiply_adds
    assert name != "DDSAS_imagenet" or mobile_channels(genotypes.load(name), layers) == C


def test_gradients_have_the_memory_order_of_images():
    """Where one has not, a CPU takes longer for what comes before it."""
    network, orders = NetworkCIFAR(4, 3, 3, False, genotypes.load("DDSAS_cifar100")), []

    def watch(layer, inputs, output):
        output.register_hook(lambda dy: orders.append(dy.is_contiguous(memory_format=torch.channels_last)))

    for layer in network.modules():
        if isinstance(layer, (torch.nn.ReLU, torch.nn.BatchNorm2d)):
            layer.register_forward_hook(watch)
    network(torch.randn(2, 3, 16, 16))[0].sum().backward()
    assert len(orders) > 30 and all(orders)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    y = drop_path(torch.ones(4000, 2, 3, 3), 0.25)
    values = y.flatten(1)
    assert (values == values[:, :1]).all()
    assert set(values.unique().tolist()) == {0.0, np.float32(1 / 0.75)}
    assert y.mean() == pytest.approx(1, abs=0.03)


def test_drop_path_spares_the_identity_but_not_the_factorized_reduce():
    """With nearly everything dropped, a cell of skip connections still passes its inputs on at stride 1."""
    skips = genotypes.Genotype([("skip_connect", 0), ("skip_connect", 1)] * 4, range(2, 6),
                               [("skip_connect", 0), ("skip_connect", 1)] * 4, range(2, 6))  # fmt: skip
    net = NetworkCIFAR(4, 7, 3, False, skips)
    net.drop_path_prob = 1 - 1e-9
    outputs = {}
    for layer in (0, 1):
        net.cells[layer].register_forward_hook(lambda _, __, out, layer=layer: outputs.update({layer: out}))
    net(torch.rand(2, 3, 16, 16))
    assert outputs[0].abs().sum() > 0
    assert outputs[1].abs().sum() == 0


def test_depthwise_layers_of_a_discovered_network_compute_what_conv2d_does():
    """Retraining exchanges how they compute (fast.use_depthwise): every kind agrees, but for one with other padding."""
    torch.manual_seed(0)
    genotype = genotypes.load("DDSAS_cifar10")._replace(normal=[("dil_conv_5x5", 0), ("sep_conv_3x3", 1)] * 4)
    defined = NetworkCIFAR(4, 5, 3, True, genotype).double()
    quick, lines = copy.deepcopy(defined), []
    fast.use_depthwise(quick, lines.append)
    assert not lines and sum("forward" in vars(m) for m in quick.modules()) > 10
    x, gradients = torch.randn(2, 3, 16, 16).double(), []
    for network in (defined, quick):
        logits, _ = network(x)
        logits.square().sum().backward()
        gradients.append([logits.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-9 * a.abs().max() + 1e-12
    other = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=0, groups=4, bias=False))
    fast.use_depthwise(other, lines.append)
    assert "forward" not in vars(other[0]) and len(lines) == 1 and lines[0].startswith("computed as defined: Conv2d")
