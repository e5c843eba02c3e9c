"""The ImageNet split: per class, disjoint, the same from every file system, whole after an interruption."""

import os
import random
from pathlib import Path

import pytest

import imagenet_split


def make_images(root: Path, classes: int, images: int, order: random.Random | None = None) -> Path:
    """train/<class>/<image>, written in the given order; every image has a content of its own."""
    names = [(f"n{c:08d}", f"n{c:08d}_{i}.JPEG") for c in range(classes) for i in range(images)]
    if order:
        order.shuffle(names)
    for folder, name in names:
        (root / "train" / folder).mkdir(parents=True, exist_ok=True)
        (root / "train" / folder / name).write_bytes(name.encode())
    return root


def split(data: Path, out: Path, *arguments) -> None:
    words = "--data", data, "--out", out, *arguments
    imagenet_split.main(imagenet_split.get_parser().parse_args(list(map(str, words))))


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_fractions_of_each_class_and_no_image_twice(tmp_path):
    data = make_images(tmp_path / "data", classes=3, images=40)
    (data / "train" / "n00000000" / "notes.txt").write_text("not an image")
    split(data, tmp_path / "out")
    for folder in (data / "train").iterdir():
        train, val = ({p.name for p in (tmp_path / "out" / part / folder.name).iterdir()} for part in ("train", "val"))
        assert (len(train), len(val)) == (4, 1) and not train & val
        for part, name in [("train", name) for name in train] + [("val", name) for name in val]:
            assert os.path.samefile(folder / name, tmp_path / "out" / part / folder.name / name)


def test_small_classes_have_an_image_in_each_part(tmp_path):
    data = make_images(tmp_path / "data", classes=1, images=2)
    split(data, tmp_path / "out", "--train", 0.9, "--val", 0.1)
    assert [len(list((tmp_path / "out" / part).glob("*/*"))) for part in ("train", "val")] == [1, 1]
    (data / "train" / "n00000000" / "n00000000_0.JPEG").unlink()
    with pytest.raises(imagenet_split.UserError, match="1 images, a split needs at least 2"):
        split(data, tmp_path / "other")


def test_same_choice_whatever_the_order_of_the_files_and_the_other_classes(tmp_path):
    chosen = []
    for number, classes in enumerate((6, 6, 3)):
        data = make_images(tmp_path / str(number) / "data", classes, images=30, order=random.Random(number))
        split(data, tmp_path / str(number) / "out")
        files = contents(tmp_path / str(number) / "out")
        chosen.append({name for name in files if "n00000001" in name or "n00000002" in name})
    assert chosen[0] == chosen[1] == chosen[2] != set()
    split(tmp_path / "0" / "data", tmp_path / "seed1", "--seed", 1)
    assert set(contents(tmp_path / "seed1")) != set(contents(tmp_path / "0" / "out"))


def test_killed_and_run_again_gives_the_result_of_one_run(tmp_path, monkeypatch):
    """The second time without hard links, as between two file systems: symbolic ones take their place."""
    data = make_images(tmp_path / "data", classes=9, images=20)
    split(data, tmp_path / "whole")
    out, link, linked = tmp_path / "out", os.link, []

    def link_until_killed(source, target):
        linked.append(target)
        if len(linked) == 15:
            raise KeyboardInterrupt
        if len(linked) > 15:
            raise OSError(18, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(os, "link", link_until_killed)
    with pytest.raises(KeyboardInterrupt):
        split(data, out)
    assert 0 < len(contents(out)) < len(contents(tmp_path / "whole"))
    split(data, out)
    assert contents(out) == contents(tmp_path / "whole")
    assert any(path.is_symlink() for path in out.glob("*/*/*"))


def test_the_split_has_the_images_that_a_loader_finds(tmp_path):
    data = make_images(tmp_path / "data", classes=1, images=7)
    folder = data / "train" / "n00000000"
    for name in (".ipynb_checkpoints/n_1.JPEG", "._n00000000_0.JPEG", "more/n_2.JPEG"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "loop").symlink_to("..")
    (data / "train" / ".cache").mkdir()
    split(data, tmp_path / "out", "--train", 0.5, "--val", 0.5)
    files = {Path(name).name for name in contents(tmp_path / "out")} - {"split.json"}
    assert files == {f"n00000000_{i}.JPEG" for i in range(7)} | {"n_2.JPEG"}
    split(data, tmp_path / "out", "--train", 0.5, "--val", 0.5)


def test_a_finished_split_is_recognised_and_another_one_refused(tmp_path, command, refused):
    data = make_images(tmp_path / "data", classes=2, images=20)
    out = tmp_path / "out"
    split(data, out)
    before = contents(out)
    code, text, _ = command(imagenet_split, "--data", data, "--out", out)
    assert code == 0 and "2 classes, 4 images in train/ and 2 in val/" in text
    assert "seed = 0, asked for 1" in refused(imagenet_split, "--data", data, "--out", out, "--seed", 1)
    assert contents(out) == before
    (out / "split.json").unlink()
    del before["split.json"]
    assert "give an empty --out" in refused(imagenet_split, "--data", data, "--out", out)
    assert contents(out) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "no folder nowhere/train"),
        (["--val", "nan"], "--val nan"),
        (["--train", "0.9", "--val", "0.2"], "together at most 1"),
        (["--out", "data/train/split"], "would mix"),
    ],
)
def test_bad_arguments_get_one_line(tmp_path, monkeypatch, refused, arguments, message):
    make_images(tmp_path / "data", classes=1, images=20)
    monkeypatch.chdir(tmp_path)
    assert message in refused(imagenet_split, "--data", "data", "--out", "out", *arguments)
    assert not (tmp_path / "out").exists()
