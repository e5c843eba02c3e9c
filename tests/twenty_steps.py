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
from types import SimpleNamespace

import conftest  # noqa: F401  (puts the project's root on the path)
import torch

import methods
import search
import utils
from lib import cli, data, distributed

STEPS = 20
FLAGS = (
    "--dataset fashion_mini --init_channels 2 --layers 3 --dss_freq 2 --rdss_prob 0.2 --gumbel --arch_learning_rate 0.1"
    " --learning_rate 0.1 --drop_path_prob 0 --report_freq 5 --quiet --device cpu"
)


class Doubles:
    """The first batches of a loader in float64, every fourth pixel of them."""

    def __init__(self, loader: data.Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return STEPS

    def epoch(self, *position):
        return itertools.islice(self._changed(self.loader.epoch(*position)), STEPS)

    def random(self, *position):
        return self._changed(self.loader.random(*position))

    def _changed(self, batches):
        return ((x[:, :, ::4, ::4].double(), y) for x, y in batches)


def twenty_steps(batch_size: int) -> dict:
    """The losses and the active sets of every step, and the genotype; ``batch_size`` is per process."""
    args = cli.parse(search.get_parser(), f"{FLAGS} --batch_size {batch_size}".split())
    rank, world_size = distributed.start_distributed(torch.device("cpu"))
    utils.set_seed(args.seed)
    train, valid, info = data.search_data(
        args.dataset, ".", batch_size=batch_size, seed=args.seed, rank=rank, world_size=world_size
    )
    record, global_batch = {"train": [], "arch": [], "active": []}, batch_size * world_size

    class Recorded(search.Search):
        def end_step(self, loss, logits, y, norm, arch_norm=None) -> None:
            self.averages["train"].add(loss, logits, y)
            self.step += 1
            for name, average in self.averages.items():
                total, *_, images = distributed.reduce_sum(average.sums.clone()).tolist()
                assert images == global_batch * self.step
                record[name].append((total - sum(record[name]) * global_batch) / global_batch)
            record["active"].append(
                {kind: methods.bits(active) for kind, active in self.method.subspace.active.items()}
            )

    state = Recorded(args, info, Doubles(valid), search.Judge(args), torch.device("cpu"))
    state.run = SimpleNamespace(folder=Path())
    state.network.double().eval()
    state.architecture.double()
    state.start_epoch()
    state.train_one_epoch(Doubles(train))
    distributed.assert_same(
        dict(state.architecture.named_parameters())
        | dict(state.network.named_parameters())
        | state.method.subspace.active
    )
    return record | {"genotype": str(state.method.genotype())}


if __name__ == "__main__":
    record = twenty_steps(int(sys.argv[2]))
    if distributed.is_main():
        Path(sys.argv[1]).write_text(json.dumps(record))
    distributed.leave_distributed()
