"""A network as a file for other programs: ONNX, or PyTorch's own pt2. The file says what input it expects."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.checkpoints import write_whole
from lib.cli import UserError
from lib.data import Info

Classifier = Callable[[Tensor], Tensor]  # images -> logits
TOLERANCE = 1e-4  # of an exported network's logits, relative to the largest one


class Logits(nn.Module):
    """A network that returns its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


def to_onnx(network: nn.Module, images: Tensor, metadata: dict[str, str]) -> tuple[bytes, Classifier]:
    """An ONNX file, and what runs it: `input` images, `output` logits, both with a dimension `batch`."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, used by torch.onnx
    except ImportError as error:
        raise UserError(f"--export onnx needs {error.name}: pip install onnx onnxscript onnxruntime") from None
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells every operation that it leaves as it is
    names = {"input_names": ["input"], "output_names": ["output"], "dynamic_shapes": ({0: "batch"},)}
    model = torch.onnx.export(network, (images,), dynamo=True, verbose=False, **names).model_proto
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def to_pt2(network: nn.Module, images: Tensor, metadata: dict[str, str]) -> tuple[bytes, Classifier]:
    """A file for torch.export.load(file, extra_files=dict.fromkeys(KEYS, "")).module(), and what runs it."""
    file = io.BytesIO()
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    torch.export.save(program, file, extra_files=metadata)
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


FORMATS = {"onnx": to_onnx, "pt2": to_pt2}
KEYS = ("class_names", "mean", "std", "image_size", "scale", "input")  # of the metadata, as JSON


@torch.no_grad()
def export_network(kind: str, file: str, network: nn.Module, fused: nn.Module, info: Info, quiet: bool) -> dict:
    """Write a network as a file for other programs: images (batch, 3, size, size), normalised, to logits.

    It is made from ``fused`` and written if its logits, on random images, are those of ``network``. Its metadata are
    KEYS as JSON, as far as ``info`` has them: ``scale`` is the shorter side of the image whose centre is the input, of
    ``image_size`` pixels; ``input`` is the line that is printed. UserError: what is wrong.
    """
    path, size = Path(file), info.image_size
    if kind not in FORMATS:
        raise UserError(f"--export {kind}: expected one of {', '.join(FORMATS)}, then the file to write")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--export {kind} {file}: expected the name of a file, in a folder that exists")
    known = {"image_size": size, "scale": round(info.test_scale * size), "class_names": info.class_names}
    known |= {"mean": info.mean, "std": info.std, "input": describe_input(info)}
    metadata = {key: json.dumps(value) for key, value in known.items() if value}
    images = torch.randn(7, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = network.eval()(images)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls channels_last weights incomplete, and its own calls deprecated
        content, run = FORMATS[kind](Logits(fused), images[:2], metadata)
        found = torch.cat([run(part) for part in images.split([1, 6])])
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:  # nor NaN
        raise UserError(f"--export {kind} {file}: not written, its logits are not the network's ({difference:.1e} off)")
    write_whole(path, content)
    if not quiet:
        print(f"{file}: {kind}, {len(content) / 1e6:.1f} MB; input: {known['input']}; output: logits (batch,", end=" ")
        print(f"{expected.shape[1]}); was run, and its logits differ by {difference:.1e} of the largest")
    return {"format": kind, "file": str(file), "largest_difference": difference, "input": known["input"]}


def describe_input(info: Info) -> str:
    """What an exported network expects, in one line."""
    size, scale = info.image_size, round(info.test_scale * info.image_size)
    pixels = f"the centre {size} x {size} pixels of an image whose shorter side is scaled to {scale}"
    if scale == size:
        pixels = f"the centre square of an image, scaled to {size} x {size} pixels"
    numbers = "normalised as its training images were"
    if info.mean:
        numbers = "minus mean, divided by std: these, per channel, and class_names are in the file's metadata"
    return f"float32 (batch, 3, {size}, {size}): {pixels} (bilinear), RGB in 0..1, {numbers}"
