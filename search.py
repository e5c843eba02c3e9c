"""Search for a cell: DDSAS, inside a subspace that a bandit moves (ACML 2021), or DARTS, GDAS, random cells beside it.

    python search.py --dataset cifar10                          # DDSAS, static space, 50 epochs, the published settings
    python search.py --dataset cifar10 --space_config shrink --epochs 60
    python search.py --dataset cifar10 --space_config nasbench201 --method darts    # see nasbench201.py
    python search.py --dataset fashion_mini --arch MY_CELL      # the embedded images; the result goes to genotypes.py
    python search.py --dataset folder --data path/to/images --image_size 32
    python search.py --resume logs/NAME                         # go on with a run that was stopped
    torchrun --nproc_per_node 4 search.py --dataset imagenet --data .data/imagenet_split

The run folder holds the log, the arguments, the current genotype, a line of history per epoch, and the checkpoint.
What a method does is in methods.py, the step of alpha and beta in architect.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import costs
import fast
import genotypes
import utils
import visualize
from architect import Architect
from lib import cli, data, tables
from lib.cli import UserError
from lib.distributed import assert_same, is_main, share_buffers
from lib.run_folder import retrain_command
from lib.runs import Run
from methods import CELLS, METHODS, Method, random_architecture
from utils import Average, Metrics


def main(args: argparse.Namespace) -> Path:
    """Run the search that the arguments describe; returns the run folder."""
    device = utils.choose_device(args)
    name = f"search-{args.dataset}-{args.space_config}"
    run = Run(args, "search.py", name)
    check(args)
    utils.set_seed(args.seed)
    utils.allow_tf32(args.tf32)
    space = genotypes.SPACES[args.space_config]
    space = space.scale(args.epochs) if args.scale_space else space
    table = tables.load_table(args.table) if space.cells == "nasbench201" else None
    if args.method == "random":
        return draw(args, run, space, table)

    train, valid, info = data.search_data(**cli.data_arguments(args, device), train_portion=args.train_portion)
    stem = utils.stem_for(info, args.dataset, args.init_channels)
    supernet = CELLS[space.cells].supernet
    network = supernet(args.init_channels, info.num_classes, args.layers, space.primitives, stem).to(device)
    method = METHODS[args.method](args, space, device)
    network.straight_through = method.straight_through
    network.checkpoint_cells = args.checkpoint_cells
    optimizer = utils.sgd(network, args)
    architect = Architect(network, method.architecture, optimizer, args, device)
    meter = Average(device)
    kept = {"state_dict": network, "optimizer": optimizer, "method": method, "architect": architect, "meter": meter}
    run.keep(kept, {"data_hash": info.data_hash})
    run.log(
        f"{args.dataset}: {train.num_images} images to train the weights, {valid.num_images} for the architecture;"
        f" {args.space_config} space, {method.summary()}; {device}"
    )
    if schedule := space.describe():
        run.log(f"the space: {schedule}; all other settings are those of --dataset {args.dataset}")
    if space.cells == "nasbench201":
        run.log(f"architectures are looked up in {table.source}" if table else tables.NO_TABLE)
    if kind_of(args.method) == "ddsas" and args.epochs == 1 and len(train) <= args.dss_freq:
        text = f"in {len(train)} steps --dss_freq {args.dss_freq} credits no operation, the genotype will say nothing"
        run.log(f"warning: {text}: take a smaller one, or more epochs", always=True)
    flops = costs.MultiplyAdds(network, info.image_size)
    fast.use(network, run.log, args.plain, args.checkpoint_cells)  # may exchange network.forward for a faster one

    for epoch in range(run.epoch, args.epochs):
        rate = utils.cosine_rate(epoch, args.epochs, args.learning_rate, args.learning_rate_min)
        ramp = epoch < args.warmup_epochs and args.learning_rate  # from the undecayed rate, unlike retraining
        utils.set_learning_rate(optimizer, utils.warmed_up(ramp or rate, epoch, args))
        if run.step == 0 and (news := method.start_epoch(epoch)):
            run.log(f"epoch {epoch}: {news}")
        train_one_epoch(epoch, run, train, valid, network, method, optimizer, architect, meter, flops)

        warming_up = args.dataset == "imagenet" and epoch < args.begin
        validated = None if warming_up else validate(network, method, valid, args)
        assert_same(method.replicated())
        trained, architecture, genotype = meter.read(), architect.meter.read(), method.genotype()
        meter.reset(), architect.meter.reset()
        looked_up = look_up(table, genotype)
        text = f"; validation loss {validated.loss:.4f}, accuracy {validated.top1:.2f} %" if validated else ""
        run.log(f"epoch {epoch}: train loss {trained.loss:.4f}, accuracy {trained.top1:.2f} %{text}")
        run.log(f"epoch {epoch}: {genotype}{in_words(looked_up)}")
        run.write("genotype.txt", str(genotype))
        line = {
            "epoch": epoch,
            "lr": optimizer.param_groups[0]["lr"],
            "arch_lr": args.arch_learning_rate,
            "tau": method.tau(epoch),
            "train_loss": trained.loss,
            "train_acc": trained.top1,
            "arch_loss": architecture.loss if architecture.count else None,
            "valid_loss": validated and validated.loss,
            "valid_acc": validated and validated.top1,
            "genotype": str(genotype),
            "primitives": space.primitives,
        }
        line |= method.history() | looked_up | flops.history(method.operations(None)[0], genotype)
        run.end_epoch(line, lambda line=line: visualize.epoch_pictures(line))

    method.finish(lambda weights, active: measure(network, weights, active, valid, args).top1)
    return finish(args, run, method.genotype(), table)


def train_one_epoch(
    epoch: int,
    run: Run,
    train: data.Loader,
    valid: data.Loader,
    network: torch.nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    architect: Architect,
    meter: Average,
    flops: costs.MultiplyAdds,
) -> None:
    """For each batch one step of alpha and beta, then one of the weights (DARTS, algorithm 1)."""
    args = run.args
    trains_architecture = method.trains_architecture and not (args.dataset == "imagenet" and epoch < args.begin)
    network.train()
    valid_batches, arch_norm = valid.random(epoch, run.step), None
    for x, y in run.steps(train):
        method.before_step(epoch, run.step)  # DDSAS: every dss_freq steps the bandit moves the subspace
        if trains_architecture:
            weights, active = method.operations(epoch)
            regulariser = costs.add(method.regulariser(epoch), flops.penalty(weights, args.flops_weight))
            arch_norm = architect.step(weights, active, (x, y), next(valid_batches), regulariser)
        with utils.autocast(args, x.device):
            with torch.no_grad():
                weights, active = method.operations(epoch)
            logits = network(x, weights, active)
            loss = F.cross_entropy(logits, y)
        norm = utils.descend(loss, optimizer, args.grad_clip, args.decay_inactive)
        meter.add(loss, logits, y)
        run.after_step(meter, loss, norm, arch_norm, method.note())


def validate(network: torch.nn.Module, method: Method, valid: data.Loader, args: argparse.Namespace) -> Metrics:
    """Loss and accuracy of the supernet on the validation half, in evaluation mode, as the method weighs it now."""
    share_buffers(network)
    with torch.no_grad():
        return measure(network, *method.operations(None), valid, args)


def measure(
    network: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    active: dict[str, list[list[int]]] | None,
    valid: data.Loader,
    args: argparse.Namespace,
) -> Metrics:
    """Loss and accuracy of the supernet on the validation half with these operations."""
    network.eval()
    device = next(network.parameters()).device
    with utils.autocast(args, device):
        return utils.measure_accuracy(lambda x: network(x, weights, active), valid, device)


def draw(args: argparse.Namespace, run: Run, space: genotypes.Space, table: tables.Table | None) -> Path:
    """Random search: one architecture drawn uniformly, nothing trained; a run folder as of any search."""
    run.keep({})
    genotype = random_architecture(space, np.random.default_rng(args.seed))
    if run.epoch == 0:
        run.log(f"epoch 0: {genotype}{in_words(look_up(table, genotype))}")
        run.end_epoch({"epoch": 0, "genotype": str(genotype)} | look_up(table, genotype))
    return finish(args, run, genotype, table)


def finish(args: argparse.Namespace, run: Run, genotype, table: tables.Table | None) -> Path:
    """Record the result; returns the run folder."""
    run.write("genotype.txt", str(genotype))
    run.log(f"genotype: {genotype}{in_words(look_up(table, genotype))}")
    if args.arch and is_main():
        genotypes.record(args.arch, genotype)
        run.log(f"recorded in genotypes.py as {args.arch}")
    run.log(f"retrain it with: {retrain_command('search.py', vars(args), run.folder)}")
    run.close()
    return run.folder


def look_up(table: tables.Table | None, genotype) -> dict:
    """For a line of history: the accuracy in percent per data set, and the rank on CIFAR-10 (1: the best)."""
    if table is None or not (found := table.accuracy(genotype)):
        return {}
    return {"table_acc": found, "table_rank": table.standing(genotype)[0], "table_size": len(table)}


def in_words(looked_up: dict) -> str:
    """What `look_up` found, for the log."""
    if not looked_up:
        return ""
    accuracies = ", ".join(f"{name} {value:.2f} %" for name, value in looked_up["table_acc"].items())
    return f" ({accuracies}; rank {looked_up['table_rank']:,} of {looked_up['table_size']:,})"


# ---- arguments ------------------------------------------------------------------------------------------------------

METHOD_FLAGS = {  # what other methods have no use for; see kind_of
    **dict.fromkeys(("dss_max_ops", "dss_freq", "rdss_prob", "confidence", "begin"), {"ddsas"}),
    **dict.fromkeys(("saliency_type", "no_norm", "gumbel", "scale_space", "decay_inactive"), {"ddsas"}),
    **dict.fromkeys(("tau_min", "tau_max"), {"ddsas", "gdas"}),
    "unrolled": {"ddsas", "darts"},
    "flops_weight": {"ddsas", "darts", "gdas"},
}


def kind_of(method: str) -> str:
    """Whose flags a method takes: its own, or those of the one of these three that it inherits from."""
    classes = METHODS[method].__mro__ if method in METHODS else ()
    return next((name for cls in classes for name in ("ddsas", "gdas", "darts") if METHODS[name] is cls), method)


def check(args: argparse.Namespace) -> None:
    """UserError for arguments that make no sense together."""
    space = genotypes.SPACES[args.space_config]
    cells = CELLS[space.cells]
    for flag, methods in METHOD_FLAGS.items():
        if flag in args.given and kind_of(args.method) not in methods:
            raise UserError(f"--{flag} is for --method {' or '.join(sorted(methods))}, not {args.method}: leave it out")
    if space.cells == "nasbench201" and args.checkpoint_cells:
        raise UserError("--checkpoint_cells is for the DARTS space; NAS-Bench-201's supernet is small: leave it out")
    if space.cells != "nasbench201" and args.table:
        raise UserError("--table is for --space_config nasbench201: no other space has its networks trained")
    if args.scale_space and not (space.shrink or space.expand):
        raise UserError(f"--scale_space: the space {args.space_config} stays as it is over the epochs: leave it out")
    if kind_of(args.method) == "ddsas" and args.dss_max_ops < cells.num_edges:
        raise UserError(f"--dss_max_ops {args.dss_max_ops}: at least {cells.num_edges}, one operation per edge")
    if args.tau_min > args.tau_max:
        raise UserError(f"--tau_min {args.tau_min} is larger than --tau_max {args.tau_max}: tau falls over the epochs")
    if args.arch:
        genotypes.check_name(args.arch)


def get_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add = parser.flags("method and space")
    text = "ddsas: a bandit moves the subspace; darts: all operations at once; gdas: one operation an edge;"
    text += " rws: the best of 100 random cells by shared weights; random: draw an architecture, train nothing"
    add("--method", [*METHODS, "random"], "ddsas", text)
    text = "static, shrink, expand, imagenet: DARTS' cells (also space_config_NAME); nasbench201: accuracies are known"
    add("--space_config", list(genotypes.SPACES), "static", text, metavar="SPACE")
    text = f"shrink or expand in proportion to --epochs, not at the epochs of {genotypes.WRITTEN_FOR}"
    add("--scale_space", bool, False, text)
    add("--table", str, None, "nasbench201: accuracies to look up, not analog-nasbench's", metavar="FILE.csv")
    add("--arch", str, None, "record the result in genotypes.py under this name", metavar="NAME")
    add = parser.flags("DDSAS")
    add("--dss_max_ops", cli.SIZE, 28, "active operations per cell type, `none` not counted", metavar="L")
    add("--dss_freq", cli.SIZE, 30, "steps between two subspaces", metavar="M")
    add("--rdss_prob", cli.SHARE, 0.0, "probability of a random subspace")
    add("--confidence", cli.RATE, 1.44, "c in the bandit's bound sigmoid(beta) + c sqrt(ln T / n)", metavar="c")
    add("--begin", cli.COUNT, 0, "before this epoch every step has a random subspace", metavar="EPOCH")
    add("--saliency_type", ["simple", "all"], "simple", "weights of operations")
    add("--no_norm", bool, False, "do not divide the weights of an edge by their sum")
    add("--gumbel", bool, False, "Gumbel softmax; tau falls from tau_max to tau_min")
    add("--decay_inactive", bool, False, "operations that are not active decay on, as under PyTorch 1.4")
    add("--tau_min", cli.number(float, 1e-3), 0.1, "lowest temperature (Gumbel, GDAS)")
    add("--tau_max", cli.number(float, 1e-3), 10.0, "highest temperature (Gumbel, GDAS)")
    cli.add_search_arguments(parser)
    cli.add_data_arguments(parser, list(data.INFO))
    cli.add_training_arguments(parser)
    cli.add_run_arguments(parser)
    parser.ignore("--model_path", "--local_rank", "--local-rank")  # of the published script
    parser.set_defaults(learning_rate_min=0.001)
    parser.set_defaults_for("dataset", "imagenet", **utils.IMAGENET_SEARCH)
    parser.set_defaults_for("space_config", "nasbench201", layers=5, dss_max_ops=10, weight_decay=5e-4)
    return parser


if __name__ == "__main__":
    cli.run_script(main, get_parser())
