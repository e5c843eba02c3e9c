"""Twenty steps of a search, recorded; test_distributed.py runs it alone and under torchrun.

The network computes in float64 with its BatchNorm in evaluation mode: in training mode it would normalise with the
statistics of half a batch on each of two processes, which is another network than one with the whole batch.

    torchrun --nproc_per_node 2 tests/twenty_steps.py OUT BATCH_SIZE
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import conftest  # noqa: F401  (puts the project's root on the path)

import costs
import genotypes
import methods
import search
import utils
from architect import Architect
from lib import cli, data, distributed
from model_search import Network

STEPS = 20
FLAGS = (
    "--dataset fashion_mini --init_channels 2 --layers 3 --dss_freq 2 --rdss_prob 0.2 --gumbel --arch_learning_rate 0.1"
    " --learning_rate 0.1 --quiet --device cpu"
)


class Doubles:
    """The first batches of a loader in float64, every fourth pixel of them."""

    def __init__(self, loader: data.Loader) -> None:
        self.loader = loader

    def epoch(self, *position):
        return itertools.islice(self._changed(self.loader.epoch(*position)), STEPS)

    def random(self, *position):
        return self._changed(self.loader.random(*position))

    def _changed(self, batches):
        return ((x[:, :, ::4, ::4].double(), y) for x, y in batches)


class Recorder:
    """In place of a Run: remembers the losses and the active operations of every step."""

    def __init__(self, args, method: methods.DDSAS, architect: Architect) -> None:
        self.args, self.method, self.architect, self.step = args, method, architect, 0
        self.losses, self.active = {"train": [], "arch": []}, []

    def steps(self, train: Doubles):
        return train.epoch(0, 0)

    def after_step(self, meter, *rest) -> None:
        self.step += 1
        for name, average in (("train", meter), ("arch", self.architect.meter)):
            total, *_, images = distributed.reduce_sum(average.sums.clone()).tolist()
            assert images == self.args.batch_size * distributed.world_size() * self.step
            self.losses[name].append(total / images * self.step - sum(self.losses[name]))
        self.active.append({kind: methods.bits(mask) for kind, mask in self.method.subspace.active.items()})


def twenty_steps(batch_size: int) -> dict:
    """The losses and the active sets of every step, and the genotype; ``batch_size`` is per process."""
    args = cli.parse(search.get_parser(), f"{FLAGS} --batch_size {batch_size}".split())
    device = utils.choose_device(args)
    utils.set_seed(args.seed)
    train, valid, info = data.search_data(**cli.data_arguments(args, device))
    space = genotypes.SPACES["static"]
    network = Network(args.init_channels, info.num_classes, args.layers, space.primitives).double().eval()
    network.train = lambda mode=True: network
    method = methods.DDSAS(args, space, device)
    method.architecture.double()
    optimizer = utils.sgd(network, args)
    architect = Architect(network, method.architecture, optimizer, args, device)
    flops = costs.MultiplyAdds(network, 8)
    recorder, meter = Recorder(args, method, architect), utils.Average(device)
    batches = Doubles(train), Doubles(valid)
    search.train_one_epoch(0, recorder, *batches, network, method, optimizer, architect, meter, flops)
    distributed.assert_same(method.replicated() | dict(network.named_parameters()))
    return recorder.losses | {"active": recorder.active, "genotype": str(method.genotype())}


if __name__ == "__main__":
    record = twenty_steps(int(sys.argv[2]))
    if distributed.is_main():
        Path(sys.argv[1]).write_text(json.dumps(record))
    distributed.leave_distributed()
