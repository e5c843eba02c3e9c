"""Command lines as users of the published scripts paste them, and values that no flag should have."""

import argparse
import itertools
import shlex
import shutil

import pytest
from conftest import ROOT

import evaluate
import nasbench201
import retrain
import search
import train_cifar
import train_imagenet
import train_search
import visualize
from lib import cli, runs
from lib.tensorboard import TensorBoard

SCRIPTS = (search, retrain, evaluate, train_search, train_cifar, train_imagenet)


def parse(script, text: str) -> argparse.Namespace:
    return cli.parse(script.get_parser(), shlex.split(text))


def test_published_spellings_are_understood():
    assert parse(search, "--report_freq 10.0").report_freq == 10
    assert parse(search, "--arch_learning 1e-3 --init_ch 4").init_channels == 4  # abbreviations, where they are clear
    assert parse(retrain, "--tmp_data_dir DIR").data == "DIR"
    assert parse(search, "--space_config space_config_static").space_config == "space_config_static"


def test_imagenet_has_the_settings_of_the_papers():
    args = parse(search, "--dataset imagenet")
    expected = dict(space_config="imagenet", batch_size=512, epochs=60, learning_rate=0.5, learning_rate_min=0)
    expected |= dict(warmup_epochs=5, arch_learning_rate=6e-3, arch_grad_clip=5, init_channels=16, layers=8, seed=2)
    assert expected.items() <= vars(args).items()
    assert parse(retrain, "--dataset imagenet --epochs 3").epochs == 3  # see also test_imagenet.py
    assert parse(retrain, "").init_channels == 36 and parse(search, "").batch_size == 64


EDGES = ["0", "-1", "99999999999999999999", "1e300", "1e999", "nan", "", "word", "0.5"]


@pytest.mark.parametrize("script", [*SCRIPTS, nasbench201, visualize], ids=lambda script: script.__name__)
def test_every_value_of_every_flag_is_taken_or_refused_in_one_line(capsys, script):
    """A number that is taken is finite and of the flag's kind; all else is one line and exit code 2."""
    parser = script.get_parser()
    named = ["x" for action in parser._actions if not action.option_strings]  # what must be named beside the flags
    flags = [a for a in parser._actions if a.option_strings and a.nargs != 0 and a.help != argparse.SUPPRESS]
    for action, value in itertools.product(flags, EDGES):
        flag = f"{action.option_strings[0]}={value}"
        try:
            taken = getattr(cli.parse(parser, [flag, *named]), action.dest)
        except SystemExit as stop:
            assert stop.code == 2 and capsys.readouterr().err.count("\n") == 1, flag
            continue
        for number in taken if isinstance(taken, list) else [taken]:
            assert not isinstance(number, float) or abs(number) < float("inf"), flag
            assert not isinstance(number, int) or abs(number) < 2**63, flag


HUGE = 2**32 - 1
TINY = "--dataset folder --image_size 16 --init_channels 2 --layers 1 --batch_size 12 --epochs 1 --quiet"


@pytest.mark.parametrize(
    ("script", "flags", "code", "said"),
    [
        (search, f"--grad_clip 1e30 --seed {HUGE} --dss_max_ops {HUGE} --confidence 9e9 --gumbel --tau_max 9e9", 0, ""),
        (search, f"--cutout --cutout_length {HUGE}", 2, "cutout"),
        (search, f"--report_freq {HUGE} --checkpoint_freq {HUGE} --warmup_epochs {HUGE} --begin {HUGE}", 0, ""),
        (search, "--learning_rate 0 --arch_learning_rate 0 --confidence 0 --grad_clip 0 --momentum 0", 0, ""),
        (search, "--learning_rate 1e30", 1, "start with a lower --learning_rate"),
        (search, "--arch_learning_rate 1e30", 1, "loss nan"),
        (search, f"--batch_size {HUGE}", 2, "take a smaller one"),
        (search, f"--init_channels {HUGE}", 1, "out of memory"),
        (retrain, "--weight_decay 0 --label_smooth 0.999 --drop_path_prob 0.999 --auxiliary_weight 0", 0, ""),
    ],
)
def test_a_run_with_extreme_values_makes_sense_or_ends_in_one_line(
    pictures, tmp_path, command, monkeypatch, script, flags, code, said
):
    monkeypatch.setattr(TensorBoard, "write", lambda *arguments: None)  # test_tensorboard.py; slow
    words = *TINY.split(), *flags.split(), "--data", pictures, "--save", tmp_path / "run"
    ended, _, errors = command(script, *words)
    assert ended == code and said in "".join(errors) and len(errors) == (code > 0)


def test_a_run_folder_deleted_during_the_run_is_one_line(pictures, tmp_path, refused, monkeypatch):
    after_step = runs.Run.after_step

    def delete(self, *arguments):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        after_step(self, *arguments)

    monkeypatch.setattr(runs.Run, "after_step", delete)
    words = *TINY.split(), "--report_freq", 1, "--data", pictures, "--save", tmp_path / "run"
    assert "No such file" in refused(search, *words)


def test_a_released_file_is_looked_for_by_its_genotype(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, name in (
        ("--arch DDSAS_cifar10", "cifar10-best-97.61.pt"),
        ("--arch DDSAS_cifar100 --dataset cifar100", "best_weights.pt"),
        ("--arch DDSAS_imagenet --dataset imagenet", "imagenet-best-76.1.pt"),
        ("--arch PDARTS --dataset imagenet", "PDARTS_imagenet.pth.tar"),
    ):
        with pytest.raises(cli.UserError, match=f"{name} is not there: README's section"):
            evaluate.main(parse(evaluate, text))
    with pytest.raises(cli.UserError, match="--model_path is missing"):
        evaluate.main(parse(evaluate, "--arch DARTS_V1"))
    section = (ROOT / "README.md").read_text().split("## Released weights")[1].split("\n## ")[0]
    assert all(f"`{name}`" in section for name in evaluate.RELEASED.values())


CELL = "|skip_connect~0|+|none~0|skip_connect~1|+|none~0|none~1|skip_connect~2|"  # without any parameter


def test_an_architecture_is_retrained_and_tested_like_any_genotype(pictures, tmp_path, monkeypatch):
    small = f"--dataset folder --image_size 16 --data {pictures} --epochs 1 --batch_size 12 --init_channels 2 --quiet"
    folder = retrain.main(parse(retrain, f"{small} --layers 1 --arch '{CELL}' --save {tmp_path}/run"))
    assert (folder / "genotype.txt").read_text() == f"{CELL}\n"
    result = evaluate.main(parse(evaluate, f"--model_path {folder} --data {pictures}"))
    assert result["genotype"] == CELL and result["images"] == 24
