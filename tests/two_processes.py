"""What two processes do in test_distributed.py: twenty steps of a search, also run alone; then what lib/ promises them.

The network computes in float64 with its BatchNorm in evaluation mode: in training mode it would normalise with the
statistics of half a batch on each of two processes, which is another network than one with the whole batch.

    torchrun --nproc_per_node 2 tests/two_processes.py --save FOLDER
"""

import itertools
import json
import os
import signal
from pathlib import Path

import conftest  # noqa: F401  (puts the project's root on the path)
import torch

import costs
import genotypes
import methods
import search
import utils
from architect import Architect
from lib import cli, data, distributed, runs
from model_search import Network

STEPS = 20
FLAGS = (
    "--dataset fashion_mini --init_channels 2 --layers 1 --dss_freq 2 --rdss_prob 0.2 --gumbel --arch_learning_rate 0.1"
    " --learning_rate 0.1 --quiet --device cpu"
)


class Doubles:
    """The first batches of a loader in float64, every fourth pixel of them."""

    def __init__(self, loader: data.Loader) -> None:
        self.loader = loader

    def epoch(self, *position):
        return ((x[:, :, ::4, ::4].double(), y) for x, y in itertools.islice(self.loader.epoch(*position), STEPS))

    def random(self, *position):
        return ((x[:, :, ::4, ::4].double(), y) for x, y in self.loader.random(*position))


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


def agree(rank: int) -> None:
    """Gradients, sums and meters are over both processes; what differs between them is named."""
    params = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)] + [torch.nn.Parameter(torch.zeros(4).double())]
    params[0].grad, params[2].grad = torch.full((2, 3), rank + 1.0), torch.full((3, 2), float(rank)).t()
    params[3].grad = torch.full((4,), rank * 2.0).double()
    distributed.average_gradients(params)
    grads = [p.grad.unique().tolist() for p in params if p.grad is not None]
    assert params[1].grad is None and grads == [[1.5], [0.5], [1.0]], grads
    assert distributed.reduce_sum(torch.tensor([rank + 1])).item() == 3
    try:
        distributed.assert_same({"alpha": torch.ones(3), "beta": torch.tensor(float(rank))})
        raise SystemExit("not seen")
    except distributed.Diverged as error:
        assert "beta" in str(error) and "alpha" not in str(error)
    average = utils.Average("cpu")
    logits = torch.arange(10.0, 0, -1).expand(5, 10)
    average.add(torch.tensor(float(rank)), logits, torch.tensor([0, 0, 0, 4, 9 * rank]))
    assert average.read() == (0.5, 70.0, 90.0, 10), average.read()
    try:
        distributed.together(torch.mm, torch.ones(2, 3), torch.ones(2, 3))
    except RuntimeError as error:
        assert not isinstance(error, distributed.RankLost)  # an error of the network's is no lost process


def main(args) -> None:
    record, rank = twenty_steps(4), distributed.rank()
    assert (rank, distributed.world_size()) == (int(os.environ["RANK"]), 2) and distributed.is_main() == (rank == 0)
    run = runs.Run(args, "two_processes.py", "x")
    run.keep({"average": utils.Average("cpu")})
    agree(rank)
    run.end_epoch({"epoch": 0})
    if rank == 0:
        Path(args.save, "record.json").write_text(json.dumps(record))
    for step in range(10**9):  # a signal to one process stops both at the same step
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if run._signals.arrived():
            Path(args.save, f"stopped{rank}").write_text(str(step))
            run._signals.leave(run.resume_command)


if __name__ == "__main__":
    parser = cli.Parser()
    cli.add_run_arguments(parser)
    parser.set_defaults(epochs=4, batch_size=2)
    cli.run_script(main, parser)
