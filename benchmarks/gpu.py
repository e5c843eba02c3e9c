"""The day a GPU is at hand: eight minutes that settle what cannot be settled without one.

    python benchmarks/gpu.py                            # on an H100 or the like; writes benchmarks/gpu.json
    python benchmarks/gpu.py --device cpu --small       # the rehearsal: every part to its end on a CPU, tiny sizes

Each part is a process of its own that is ended when its share of the time is used; what it has measured until then is
in the file. Needs PyTorch, torchvision and numpy alone: the scripts draw nothing here (checks.launch). Images are
random, or those of fashion_mini. The parts, of which --part NAME runs one alone:

    checks            golden arrays, an epoch of every method, resuming to the same losses, --amp, two processes
    steps             seconds and memory of a step: definition and fast.py, both memory orders, three precisions
    synchronisations  what makes the host wait for the GPU within a step
    graph, compile, side_by_side, channels_last      candidates to make it faster, each alone
    epoch             an epoch of the search from start to end, loader included: hours for 50
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from checks import METHODS, Scripts, golden_errors, lines
from steps import (
    Setting,
    Step,
    Way,
    evaluation,
    measure_peak,
    measure_seconds,
    retraining_step,
    search_step,
    use_tf32,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model_search import Network
from operations import DilConv, SepConv
from space import INCOMING

HERE = Path(__file__).resolve().parent

SHARES = {  # seconds of each part on a GPU; 8 minutes in all
    "checks": 115,
    "steps": 130,
    "synchronisations": 40,
    "graph": 30,
    "compile": 60,
    "side_by_side": 25,
    "channels_last": 30,
    "epoch": 50,
}


class Report(dict):
    """What a part has found; in its file after each measurement."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path, self.until = Path(args.out), args.until

    def __setitem__(self, name: str, value: object) -> None:
        super().__setitem__(name, value)
        write(self.path, self)

    def left(self) -> float:
        """Seconds until the part should be at its end."""
        return self.until - time.time()


def write(path: Path, found: dict) -> None:
    """The file is whole at every moment."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(found, indent=1) + "\n")
    fresh.replace(path)


def main(args: argparse.Namespace) -> dict:
    """Run the parts one after the other; what they found goes to the file after each."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"{args.device}: PyTorch finds no GPU here; --device cpu --small rehearses every part")
    out, started, found = Path(args.out), time.monotonic(), {}
    found["machine"] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU: no GPU has run this",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "small": args.small,
    }
    for name, seconds in SHARES.items():
        began = time.monotonic()
        found[name] = run_part(name, args, seconds if device.type == "cuda" else 1200)
        found[name]["seconds_of_this_part"] = round(time.monotonic() - began, 1)
        found["seconds"] = round(time.monotonic() - started, 1)
        write(out, found)
        print(f"{name}: {found[name].get('failed', 'done')}, {found[name]['seconds_of_this_part']} s", flush=True)
    print(f"written: {out}")
    return found


def run_part(name: str, args: argparse.Namespace, seconds: float) -> dict:
    """A part in a process of its own, which is ended after so many seconds; what it has found."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "found.json", Path(folder) / "errors.txt"
        command = [sys.executable, __file__, "--part", name, "--device", args.device, "--out", str(out)]
        command += ["--until", str(time.time() + 0.9 * seconds)] + ["--small"] * args.small
        with errors.open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
            finally:
                if (code := process.poll()) is None:
                    os.killpg(process.pid, signal.SIGKILL)  # and all that it has started
                    process.wait()
        found = json.loads(out.read_text()) if out.exists() else {}
        if code != 0:
            last = errors.read_text().strip().splitlines()[-1:] or [""]
            found["failed"] = f"ended after {seconds:.0f} s" if code is None else f"exit code {code}: {last[0]}"
        return found


# ---- 1: does it compute what it should, and do all scripts run? ------------------------------------------------------


def check(report: Report, device: torch.device, small: bool) -> None:
    report["golden arrays, largest relative errors"] = golden_errors(device)
    with tempfile.TemporaryDirectory() as name:
        scripts = Scripts(device, Path(name), report.left)
        jobs: dict[str, Callable] = {method: partial(scripts.epoch, method) for method in METHODS}
        jobs["resume, search.py"] = partial(scripts.resume, "search.py", "--begin 9")
        jobs["resume, retrain.py"] = partial(scripts.resume, "retrain.py", "")
        jobs["two processes on one device"] = scripts.two_processes
        if device.type == "cuda":
            jobs["ddsas --amp"] = partial(scripts.epoch, "ddsas", "--amp")
            jobs["retraining --amp"] = partial(scripts.epoch, "retraining", "--amp")
        else:
            report["--amp"] = "not on a CPU: the scripts refuse it there"
        with ThreadPoolExecutor(4 if device.type == "cuda" else 2) as pool:
            for name, done in [(name, pool.submit(job)) for name, job in jobs.items()]:
                try:
                    report[name] = done.result()
                except Exception as error:
                    report[name] = {"failed": str(error)}


# ---- 2: seconds and memory of a step ---------------------------------------------------------------------------------

PRECISIONS = ("tf32", "bfloat16", "float32")  # the scripts' default, --amp, --no-tf32
WAYS = {
    "published": Way(),
    "definition": Way(frozen=True),
    "definition, channels_last": Way(frozen=True, channels_last=True),
    "fast.py": Way(frozen=True, fast=True),
    "fast.py, channels_last": Way(frozen=True, fast=True, channels_last=True),
}


def work(small: bool) -> dict[str, tuple[Callable, int]]:
    """Name -> (setting -> step, batch size), at the papers' sizes."""

    def sized(build: Callable, layers: int, **more: object) -> Callable:
        return partial(build, layers=3 if small else layers, **more | ({"C": 4} if small else {}))

    batch = (lambda size: 4) if small else (lambda size: size)
    return {
        "DDSAS search": (sized(search_step, 8), batch(64)),
        "retraining": (sized(retraining_step, 20), batch(96)),
        "P-DARTS stage 1": (sized(search_step, 5, max_ops=None), batch(96)),
        "evaluation": (sized(evaluation, 20), batch(96)),
        "P-DARTS stage 3": (sized(search_step, 17, max_ops=None, candidates=3), batch(96)),
        "P-DARTS stage 2": (sized(search_step, 11, max_ops=None, candidates=5), batch(96)),
    }


def time_steps(report: Report, device: torch.device, small: bool) -> None:
    """The most important first; what there is no time for is named."""
    report["left out"] = []
    for precision in PRECISIONS:
        if precision == "tf32" and device.type != "cuda":
            report["tf32"] = "not on a CPU"
            continue
        use_tf32(precision != "float32")
        for name, (build, batch) in work(small).items():
            if report.left() < 15:
                report["left out"] = [*report["left out"], f"{name}, {precision}"]
                continue
            steps = {}
            for way_name, way in WAYS.items():
                if name == "retraining" and way.fast or name == "evaluation" and way.frozen and not way.fast:
                    continue  # these are what another way computes
                steps[way_name] = build(Setting(batch, way, device, precision == "bfloat16"))
            report[f"{name}, batch {batch}, {precision}"] = in_turn(steps, device, small, report.left)


def in_turn(
    steps: dict[str, Step], device: torch.device, small: bool, left: Callable[[], float]
) -> dict[str, dict[str, float | str]]:
    """Least seconds of each step, A B A B ..., and the MB that it takes at most above what was there before it.

    The first two of each do not count, in which cuDNN tries its algorithms (small: each once). A step that fails says
    why.
    """
    found: dict[str, dict] = {name: {} for name in steps}
    first, repetitions = (0, 1) if small else (2, 4)
    for i in range(first + repetitions):
        for name, step in steps.items():
            if "failed" in found[name] or i > first and left() < 5:
                continue
            try:
                measured = {"peak_mb": measure_peak(step, device)} if device.type == "cuda" and i == first else {}
                measured["seconds"] = measure_seconds(step, device)
            except RuntimeError as error:
                found[name] = {"failed": str(error).splitlines()[0][:300]}
                continue
            if i >= first:
                found[name] |= {
                    key: round(min(value, found[name].get(key, value)), 5) for key, value in measured.items()
                }
    return found


# ---- 3: what makes the host wait -------------------------------------------------------------------------------------


def find_synchronisations(report: Report, device: torch.device, small: bool) -> None:
    """A step must run where waiting is an error; and the lines of the scripts that wait, with how often they do."""
    for name, (build, batch) in work(small).items():
        for way in ("definition", "fast.py"):
            if name == "retraining" and way == "fast.py" or name.startswith("P-DARTS stage") and name[-1] != "1":
                continue
            step = build(Setting(batch, Way(frozen=True, fast=way == "fast.py", channels_last=True), device))
            step()
            try:
                with waiting_is_an_error(device):
                    step()
                report[f"{name}, {way}"] = "none"
            except Exception as error:
                report[f"{name}, {way}"] = {"failed": str(error).splitlines()[0][:300]}
    if device.type != "cuda":
        report["scripts"] = "not on a CPU: there they look at each loss at once"
        return
    with tempfile.TemporaryDirectory() as name:
        scripts = Scripts(device, Path(name), report.left)

        def waits(method: str) -> dict:
            """The lines that wait, and how often, in an epoch of 3 (search) or 6 (retraining) steps and validation."""
            counted = scripts.folder / f"{method}.json"
            scripts.start(f"{METHODS[method]} --report_freq 100", (), {"COUNT_WAITS": str(counted)})
            return json.loads(counted.read_text())

        with ThreadPoolExecutor(3) as pool:
            for method, done in [(m, pool.submit(waits, m)) for m in ("ddsas", "pdarts", "retraining")]:
                report[f"{method}, lines of the script that wait"] = done.result()


class NoReading(TorchDispatchMode):
    """Reading a tensor's number on a CPU is an error: on a GPU it would wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select"):
            raise RuntimeError(f"{name} would wait for a GPU")
        return function(*args, **(kwargs or {}))


@contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        with NoReading():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- 4: candidates to make it faster, each alone ---------------------------------------------------------------------


def try_graph(report: Report, device: torch.device, small: bool) -> None:
    """A CUDA graph of the step of one subspace, which lasts 30 steps in DDSAS: what it saves, what capturing costs."""
    if device.type != "cuda":
        report["not on a CPU"] = "a CUDA graph needs CUDA"
        return
    use_tf32(True)
    build, batch = work(small)["DDSAS search"]
    for name, way in WAYS.items():
        if name == "published" or report.left() < 4:
            continue
        try:
            report[name] = of_one_subspace(build(Setting(batch, way, device), capturable=True), device)
        except RuntimeError as error:
            report[name] = {"failed": str(error).splitlines()[0][:300]}


def of_one_subspace(step: Step, device: torch.device) -> dict[str, float]:
    """Seconds of 30 steps, of capturing one, and of replaying it 30 times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    steps = measure_seconds(lambda: [step() for _ in range(30)], device)
    graph, started = torch.cuda.CUDAGraph(), time.perf_counter()
    with torch.cuda.graph(graph):
        loss = step()
    torch.cuda.synchronize()
    capturing = time.perf_counter() - started
    replays = measure_seconds(lambda: [graph.replay() for _ in range(30)], device)
    return {
        "30 steps": steps,
        "capturing": capturing,
        "30 replays": replays,
        "a subspace is faster by": steps / (capturing + replays),
        "last loss": loss.item(),
    }


def try_compile(report: Report, device: torch.device, small: bool) -> None:
    """torch.compile of retraining, at 8 cells so that compiling comes to its end."""
    use_tf32(True)
    cuda, size = device.type == "cuda", {"layers": 3, "C": 4} if small else {"layers": 8}
    if not cuda:
        report["not on a CPU"] = "aot_eager, which traces and does not generate code, stands for both modes"
    plain = retraining_step(Setting(4 if small else 96, Way(channels_last=True), device), **size)
    for mode in ("default", "reduce-overhead"):
        options = {"mode": mode} if cuda else {"backend": "aot_eager"}
        setting = Setting(4 if small else 96, Way(channels_last=True), device, wrap=partial(torch.compile, **options))
        torch._dynamo.reset()
        step = retraining_step(setting, **size)
        started = time.perf_counter()
        step()
        first = time.perf_counter() - started
        found = in_turn({"eager": plain, "compiled": step}, device, small, report.left)
        report[mode] = found | {"seconds of the first step": first, "layers": size["layers"]}


def try_side_by_side(report: Report, device: torch.device, small: bool) -> None:
    """Separable convolutions of a kind that end in the same node as one grouped convolution, after the definition."""
    use_tf32(True)
    build, batch = work(small)["DDSAS search"]
    at = Setting(batch, Way(frozen=True), device)
    steps = {"definition": build(at), "side by side": build(at, forward=side_by_side_forward)}
    losses = {name: step().item() for name, step in steps.items()}  # of the same weights and images
    report["losses"] = losses | {"ok": abs(losses["definition"] - losses["side by side"]) < 1e-2}
    report["DDSAS search"] = in_turn(steps, device, small, report.left)


def side_by_side_forward(
    network: Network, x: Tensor, weights: dict[str, Tensor], active: dict[str, list[list[int]]] | None
) -> Tensor:
    """model_search.Network's forward. Fewer launches, which is what small networks keep a GPU waiting for."""
    s0 = s1 = network.stem(x)
    active = active or {kind: [range(w.shape[1])] * len(w) for kind, w in weights.items()}
    for cell in network.cells:
        kind = "reduce" if cell.reduction else "normal"
        nodes = [cell.preprocess0(s0), cell.preprocess1(s1)]
        for edges in INCOMING:
            alike: dict[object, list] = {}  # operations of a kind, what they read, their weights
            for source, e in enumerate(edges):
                for k in active[kind][e]:
                    op = cell._ops[e]._ops[k]
                    key = repr(op) if isinstance(op, (SepConv, DilConv)) else (e, k)
                    alike.setdefault(key, []).append((op, nodes[source], weights[kind][e, k]))
            nodes.append(sum(side_by_side(*zip(*group, strict=True)) for group in alike.values()))
        s0, s1 = s1, torch.cat(nodes[2:], dim=1)
    return network.classifier(network.global_pooling(s1).flatten(1))


def side_by_side(ops: tuple[nn.Module], xs: tuple[Tensor], gains: tuple[Tensor]) -> Tensor:
    """sum of gains[k] * ops[k](xs[k])."""
    if len(ops) == 1:
        return gains[0] * ops[0](xs[0])
    y = torch.cat(xs, dim=1)
    for layers in zip(*(op.op for op in ops), strict=True):
        first, K = layers[0], len(layers)
        if isinstance(first, nn.Conv2d):
            weight = torch.cat([conv.weight for conv in layers])
            y = F.conv2d(y, weight, None, first.stride, first.padding, first.dilation, K * first.groups)
        elif isinstance(first, nn.BatchNorm2d):
            moved = [[getattr(bn, name) for bn in layers] for name in ("running_mean", "running_var")]
            mean, variance = (torch.cat(parts) for parts in moved)
            y = F.batch_norm(y, mean, variance, None, None, first.training, first.momentum, first.eps)
            with torch.no_grad():
                torch._foreach_copy_(moved[0] + moved[1], [*mean.chunk(K), *variance.chunk(K)])
                torch._foreach_add_([bn.num_batches_tracked for bn in layers], 1)
        else:
            y = F.relu(y)
    return (y.unflatten(1, (len(ops), -1)) * torch.stack(gains)[:, None, None, None]).sum(1)


def try_channels_last(report: Report, device: torch.device, small: bool) -> None:
    """channels_last with bfloat16, against either alone."""
    use_tf32(True)
    for name in ("DDSAS search", "retraining"):
        build, batch = work(small)[name]
        steps = {
            f"{order}, {precision}": build(Setting(batch, Way(channels_last, frozen=True), device, bfloat16))
            for precision, bfloat16 in (("tf32", False), ("bfloat16", True))
            for order, channels_last in (("NCHW", False), ("channels_last", True))
        }
        report[name] = in_turn(steps, device, small, report.left)


# ---- 5: an epoch from start to end -----------------------------------------------------------------------------------

IMAGES, EPOCHS = 25_000, 50  # of CIFAR-10 for the weights, as many for the architecture; of the published search


def time_epoch(report: Report, device: torch.device, small: bool) -> None:
    """search.py at the published size on fashion_mini, the second of two epochs, in images of CIFAR-10 for 50 epochs.

    In one epoch of either dataset each image of both halves is seen once in a step, and the second half once more in
    validation, so that the time goes with the number of images.
    """
    with tempfile.TemporaryDirectory() as folder:
        scripts = Scripts(device, Path(folder), report.left)
        size = "--init_channels 16 --layers 8 --batch_size 64 --dataset fashion_mini"
        if small:
            size = "--init_channels 4 --layers 3 --batch_size 12 --dataset folder --image_size 32"
        line = lines(scripts.start(f"search.py {size} --epochs 2 --quiet") / "timing.jsonl")[-1]
    report["epoch"] = line
    hours = EPOCHS * IMAGES / line["images_per_second"] / 3600
    report["hours for 50 epochs of CIFAR-10"] = "not asked at this size" if small else round(hours, 2)
    report["published"] = "3 hours, 4 GB"


PARTS = {
    "checks": check,
    "steps": time_steps,
    "synchronisations": find_synchronisations,
    "graph": try_graph,
    "compile": try_compile,
    "side_by_side": try_side_by_side,
    "channels_last": try_channels_last,
    "epoch": time_epoch,
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true", help="tiny sizes, each step once: a rehearsal")
    parser.add_argument("--out", default=str(HERE / "gpu.json"), metavar="FILE.json")
    parser.add_argument("--part", choices=PARTS, help="this part alone, in this process")
    parser.add_argument(
        "--until", type=float, default=float("inf"), help="for --part: when it should end, as time.time()"
    )
    return parser


if __name__ == "__main__":
    args = get_parser().parse_args()
    if args.part:
        PARTS[args.part](Report(args), torch.device(args.device), args.small)
    else:
        main(args)
