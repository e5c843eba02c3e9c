"""The TensorBoard events of a tiny search, of one that was killed and resumed, of P-DARTS, and of a retraining."""

import itertools
import math
import shutil

import numpy as np
import pytest
from conftest import history, run_script
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

import genotypes
import nasbench201
import retrain
import search
import train_search
import visualize
from lib import runs

TINY = "--dataset folder --image_size 16 --init_channels 2 --layers 1 --batch_size 12 --epochs 2 --quiet"


def run(script, pictures, folder, text=""):
    return run_script(script, f"{TINY} {text}", "--data", pictures, "--save", folder)


def events(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "histograms": 0}).Reload()


def scalars(events, tag) -> dict[int, float]:
    """{epoch: value}; every epoch once."""
    found = events.Scalars(tag)
    assert len({event.step for event in found}) == len(found), f"{tag} has an epoch twice"
    return {event.step: event.value for event in found}


def hyperparameters(events) -> tuple[dict, list[str]]:
    """({argument: value}, tags of the metrics) of the table of runs; the run is marked as finished."""
    found = events.PluginTagToContent("hparams").items()
    parts = {tag: HParamsPluginData.FromString(content) for tag, content in found}
    assert parts["_hparams_/session_end_info"].session_end_info.status
    start = parts["_hparams_/session_start_info"].session_start_info
    values = {name: getattr(v, v.WhichOneof("kind")) for name, v in start.hparams.items()}
    return values, [metric.name.tag for metric in parts["_hparams_/experiment"].experiment.metric_infos]


def assert_curves(found, lines, names):
    for name, tag in names.items():
        expected = {line["epoch"]: pytest.approx(line[name], rel=1e-6) for line in lines if line[name] is not None}
        assert scalars(found, tag) == expected, tag


def small_picture(line: dict) -> dict:
    return {"cells": Figure(figsize=(1, 1))}


WHAT = {"loss": "loss", "acc": "accuracy"}
SEARCH_CURVES = {f"{part}_{name}": f"{tag}/{part}" for part in ("train", "valid") for name, tag in WHAT.items()}
SEARCH_CURVES |= {"arch_loss": "loss/architecture", "lr": "learning_rate/weights"}


def test_curves_and_pictures_of_a_search(pictures, tmp_path):
    folder = run(search, pictures, tmp_path / "run", "--dss_freq 2 --batch_size 6 --gumbel")
    found, lines = events(folder), history(folder)
    assert_curves(found, lines, SEARCH_CURVES | {"tau": "schedule/tau"})
    assert scalars(found, "learning_rate/architecture") == pytest.approx({0: 3e-4, 1: 3e-4})
    for cell in ("normal", "reduce"):
        entropy = scalars(found, f"alpha_entropy/{cell}")
        assert entropy == pytest.approx({line["epoch"]: line["alpha_entropy"][cell] for line in lines}, rel=1e-6)
        assert entropy[0] == pytest.approx(math.log(8), rel=1e-2)  # alpha starts close to zero
        assert scalars(found, f"active_ops/{cell}") == {line["epoch"]: line["active_ops"][cell] for line in lines}
    mean = scalars(found, "active_ops/changed_per_sampling")
    for line, histogram in zip(lines, found.Histograms("active_ops/changed_at_each_sampling"), strict=True):
        changed = [sampling["changed"] for sampling in line["samplings"]]
        values = histogram.histogram_value
        assert len(changed) == 3 and (values.num, values.min, values.max) == (3, min(changed), max(changed))
        assert mean[line["epoch"]] == pytest.approx(np.mean(changed))
    tags = {"saliency", "visits"} | ({"cells"} if shutil.which("dot") else set())
    assert set(found.Tags()["images"]) == tags
    for first, second in map(found.Images, tags):
        assert (first.step, second.step) == (0, 1) and first.width > 300 and first.height > 200
        assert first.encoded_image_string != second.encoded_image_string
    values, metrics = hyperparameters(found)
    expected = {"space_config": "static", "dss_freq": 2, "batch_size": 6, "gumbel": True, "seed": 0}
    assert expected.items() <= values.items() and not {"save", "given", "resume", "quiet", "device"} & values.keys()
    assert {"final/loss/valid", "final/accuracy/valid", "final/loss/train"} <= set(metrics)
    assert scalars(found, "final/loss/valid") == {1: scalars(found, "loss/valid")[1]}


def test_a_run_that_was_killed_and_resumed_has_no_event_twice(pictures, tmp_path, monkeypatch):
    """Killed after the events of epoch 0, and then of epoch 1, were written and before their checkpoint was."""

    save, calls = runs.Run._save, []

    def die(self, best=False):
        calls.append(self.epoch)
        if len(calls) in (1, 3):
            raise ArithmeticError
        save(self, best)

    monkeypatch.setattr(visualize, "epoch_pictures", small_picture)
    monkeypatch.setattr(runs.Run, "_save", die)
    # files of one second and process are read in the order of their last number as text, in which 10 is before 9
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            run(search, pictures, tmp_path / "run")
    run_script(search, "--resume", tmp_path / "run")
    assert calls == [1, 1, 2, 2]
    assert len(list((tmp_path / "run").glob("events*"))) == 5  # two of them of hyperparameters
    found = events(tmp_path / "run")
    assert_curves(found, history(tmp_path / "run"), SEARCH_CURVES)
    for tag in found.Tags()["scalars"]:
        assert list(scalars(found, tag)) == ([1] if tag.startswith("final/") else [0, 1])
    assert all([image.step for image in found.Images(tag)] == [0, 1] for tag in found.Tags()["images"])
    assert hyperparameters(found)[0]["epochs"] == 2


def test_events_of_pdarts(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "epoch_pictures", small_picture)
    folder = run(train_search, pictures, tmp_path / "p", "--epochs 1 --eps_no_arch 0 --add_layers 0 --add_layers 0")
    found, lines = events(folder), history(folder)
    assert_curves(found, lines, SEARCH_CURVES | {"stage": "schedule/stage", "dropout": "schedule/dropout"})
    assert [image.step for image in found.Images("cells")] == [0, 1, 2]


def test_looked_up_accuracy_and_rank_are_in_tensorboard_and_the_report(pictures, tmp_path):
    table, every = tmp_path / "table.csv", itertools.product(nasbench201.PRIMITIVES, repeat=6)
    rows = [f"{genotypes.Genotype201(ops)},{50 + n / 1000},{n / 1000}\n" for n, ops in enumerate(every)]
    table.write_text("architecture,cifar10,cifar100\n" + "".join(rows))
    folder = run(search, pictures, tmp_path / "run", f"--space_config nasbench201 --epochs 1 --table {table}")
    found, (line,) = events(folder), history(folder)
    assert_curves(found, [line], {"table_rank": "rank/looked_up"})
    for name in ("cifar10", "cifar100"):
        assert scalars(found, f"accuracy/looked_up/{name}") == {0: pytest.approx(line["table_acc"][name])}
    assert "final/accuracy/looked_up/cifar10" in hyperparameters(found)[1]
    visualize.write_report(folder)
    assert f"{line['table_acc']['cifar10']:.2f} %" in (folder / "report.html").read_text()


def test_events_of_a_retraining(pictures, tmp_path):
    folder = run(retrain, pictures, tmp_path / "run", "--arch DDSAS_cifar10 --auxiliary --layers 3")
    found = events(folder)
    curves = {f"{part}_{name}": f"{tag}/{part}" for part in ("train", "test") for name, tag in WHAT.items()}
    curves |= {"best_acc": "accuracy/best", "lr": "learning_rate/weights", "drop_path": "schedule/drop_path"}
    assert_curves(found, history(folder), curves)
    plain = {tag for tag in found.Tags()["scalars"] if not tag.startswith("final/")}
    assert plain == set(curves.values())  # three classes: there is no top-5
    values, metrics = hyperparameters(found)
    assert genotypes.load(values["arch"]) == genotypes.DDSAS_cifar10 and "final/accuracy/best" in metrics
