"""Command lines of both published projects, as their users paste them: what happens here.

P-DARTS' are those of its README. DDSAS' are put together from the flags, settings and names of its scripts. What makes
a command small, and its images those of a few pictures, is put behind it; the last flag counts.
"""

import importlib
import shlex
import shutil

import pytest
import torch

import genotypes
import model
from lib import cli
from lib.tensorboard import TensorBoard

TRAINING = "--batch_size 24 --epochs 1 --init_channels 2 --layers 3 --workers 0"
PICTURES = f"--dataset folder --data pictures --image_size 32 {TRAINING}"
SEARCHED = f"{PICTURES} --layers 1"
STAGES = f"{SEARCHED} --eps_no_arch 0"
IMAGENET = f"--image_size 32 {TRAINING} --batch_size 12"  # its search takes a part of the images
TESTED = "--dataset folder --data pictures --image_size 32 --workers 0 --init_channels 2 --layers 3"

SEARCH = """search.py --data .data --dataset {} --space_config space_config_{} --arch NAME --saliency_type simple
    --dss_max_ops 28 --dss_freq 30 --rdss_prob 0.0 --confidence 1.44 --begin 0 --tau_min 0.1 --tau_max 10
    --batch_size 64 --learning_rate 0.025 --learning_rate_min 0.001 --momentum 0.9 --weight_decay 3e-4
    --arch_learning_rate {} --arch_weight_decay {} --epochs {} --init_channels 16 --layers 8 --cutout_length 16
    --drop_path_prob 0.3 --train_portion 0.5 --grad_clip 5 --report_freq 50.0 --seed 0 --workers 2 --note try"""
STATIC = SEARCH.format("cifar10", "static", "3e-4", "1e-3", 50)
SEARCH_IMAGENET = """search.py --data .data/imagenet --dataset imagenet --space_config space_config_imagenet --arch NAME
    --batch_size 512 --learning_rate 0.5 --learning_rate_min 0.0 --arch_learning_rate 6e-3 --epochs 60 --seed 2"""
RETRAIN = """retrain.py --data .data --dataset {0} --arch DDSAS_{0} --auxiliary --auxiliary_weight 0.4 --cutout
    --cutout_length 16 --drop_path_prob 0.2 --batch_size 96 --learning_rate 0.025 --momentum 0.9 --weight_decay 3e-4
    --epochs 600 --init_channels 36 --layers 20 --grad_clip 5 --report_freq 50.0 --seed 0 --workers 2 --note try"""
RETRAIN_IMAGENET = """retrain.py --data .data/imagenet --dataset imagenet --arch DDSAS_imagenet --auxiliary
    --auxiliary_weight 0.4 --drop_path_prob 0 --batch_size 1024 --learning_rate 0.5 --weight_decay 3e-5 --epochs 250
    --init_channels 46 --layers 14 --grad_clip 5 --label_smooth 0.1 --lr_scheduler linear --workers 8"""
EVALUATE = """evaluate.py --data .data --dataset {} --arch DDSAS_{} --init_channels {} --layers {}
    --model_path .weights/{} --batch_size 96 --workers 2"""
EVALUATE_CIFAR10 = EVALUATE.format("cifar10", "cifar10", 36, 20, "cifar10-best-97.61.pt")
OF_EVALUATE = "--auxiliary --drop_path_prob 0.2 --seed 0 --report_freq 50.0 --cutout --cutout_length 16"
OF_EVALUATE_FLAGS = " ".join(word for word in OF_EVALUATE.split() if word.startswith("--"))
DARTS_STAGES = "--add_layers 6 --add_layers 12"
DROPOUT = "--dropout_rate 0.1 --dropout_rate 0.4 --dropout_rate 0.7"
PDARTS = f"train_search.py --tmp_data_dir .data --save logs/ {DARTS_STAGES} {DROPOUT} --note NOTE"

OF_PDARTS = """--workers 2 --batch_size 96 --learning_rate 0.025 --momentum 0.9 --weight_decay 3e-4 --report_freq 50
    --init_channels 16 --layers 5 --cutout --cutout_length 16 --drop_path_prob 0.3 --seed 2 --grad_clip 5"""

OLD = ".weights/cifar10-best-97.61.pt does not say its classes, mean and deviation: those of pictures are taken"
WITHOUT_EFFECT = "warning: of the published scripts, without effect here:"
RUNS = [  # command, what makes it small, what it says on stderr; those in the README run in test_commands.py
    (SEARCH.format("cifar100", "shrink", "3e-5", "0", 60), SEARCHED, ""),
    (SEARCH.format("cifar100", "expand", "3e-4", "1e-3", 60), SEARCHED, ""),
    (f"{STATIC} --model_path saved_models --gpu 0", f"{SEARCHED} --device cpu", f"{WITHOUT_EFFECT} --model_path"),
    (f"{STATIC} --no_norm --gumbel --unrolled --cutout --saliency_type all --rdss_prob 0.1 --begin 1", SEARCHED, ""),
    (f"{STATIC} --bad_images skip --checkpoint_freq 1 --train_portion 0.4 --drop_path_prob 0.1", SEARCHED, ""),
    (f"{SEARCH_IMAGENET} --local-rank=0", f"{IMAGENET} --layers 1", f"{WITHOUT_EFFECT} --local-rank"),
    (f"{RETRAIN.format('cifar100')} --model_path x --auto_aug", PICTURES, f"{WITHOUT_EFFECT} --model_path --auto_aug"),
    (f"{RETRAIN_IMAGENET} --tmp_data_dir .data/imagenet", f"{IMAGENET} --image_size 224", ""),
    (f"{EVALUATE_CIFAR10} --gpu 0", f"{TESTED} --device cpu", f"warning: {OLD}"),
    (f"{EVALUATE_CIFAR10} {OF_EVALUATE}", TESTED, f"{WITHOUT_EFFECT} {OF_EVALUATE_FLAGS}\nwarning: {OLD}"),
    (f"{PDARTS.replace(DARTS_STAGES, '--add_layers 0 ' * 2)} {OF_PDARTS} --cifar100", STAGES, ""),
    ("train_cifar.py --tmp_data_dir .data --auxiliary --save logs/ --note NOTE --cifar100", PICTURES, ""),
]
REFUSED = [  # command, what the line says
    (f"{STATIC} --gpu 99", "cuda:99 is not there"),
    (RETRAIN.format("imagenet").replace(".data ", ".nowhere "), "no folder .nowhere/train"),
    (EVALUATE.format("imagenet", "imagenet", 46, 14, "imagenet-best-76.1.pt"), 'README\'s section "Released weights"'),
    (f"train_search.py --add_layers 6 {DROPOUT}", "--add_layers 6: expected 2 values"),
    ("train_search.py --dataset cifar10 --space_config space_config_static", "DDSAS' is search.py"),
    (f"{PDARTS} --epochs 1", "--eps_no_arch 10"),
    ("train_search.py \\", "unrecognized arguments"),
]


@pytest.fixture(scope="module")
def workspace(pictures, tmp_path_factory):
    """A folder with the pictures, as a folder and as ImageNet, and a released file of a small network."""
    folder = tmp_path_factory.mktemp("pasted")
    (folder / "pictures").symlink_to(pictures)
    shutil.copytree(pictures / "train", folder / ".data/imagenet/train")
    shutil.copytree(pictures / "test", folder / ".data/imagenet/val")
    (folder / ".weights").mkdir()
    network = model.NetworkCIFAR(2, 3, 3, True, genotypes.DDSAS_cifar10)
    torch.save(network.state_dict(), folder / ".weights/cifar10-best-97.61.pt")
    return folder


@pytest.fixture
def run(workspace, monkeypatch, command):
    """Runs a command in the workspace: exit code and what it says on stderr."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(genotypes, "record", lambda name, genotype: None)
    monkeypatch.setattr(TensorBoard, "write", lambda *arguments: None)  # test_tensorboard.py; slow

    def run(words: str) -> tuple[int, str]:
        script, *arguments = shlex.split(words.replace("\\", "'\\'"))
        code, _, errors = command(importlib.import_module(script.removesuffix(".py")), *arguments)
        return code, "\n".join(errors)

    return run


@pytest.mark.parametrize(("words", "small", "said"), RUNS)
def test_a_pasted_command_runs(run, words, small, said):
    assert run(f"{words} {small}") == (0, said)


@pytest.mark.parametrize(("words", "reason"), REFUSED)
def test_a_pasted_command_that_cannot_run_says_why(run, words, reason):
    code, said = run(words)
    assert code == 2 and reason in said and "\n" not in said


def test_a_folder_named_beside_a_bare_resume_is_resumed():
    for text in ("--resume --resume_path logs/x", "--resume_path logs/x --resume", "--resume logs/x"):
        parser = importlib.import_module("search").get_parser()
        assert cli.parse(parser, text.split()).resume == "logs/x"
    assert cli.parse(parser, ["--resume"]).resume == "auto" and cli.parse(parser, []).resume is None
