"""Checkpoints that are whole or refused: files written whole, and read as data."""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from lib.cli import UserError, printable


def write_whole(path: Path | str, data: str | bytes | memoryview, previous: Path | None = None) -> None:
    """Write a file whole or not at all: temporary file beside it, fsync, rename. `previous` keeps the one before.

    Killed at any moment, `path` is a whole file, old or new. Raises OSError with the file's name (ENOSPC: disk full).
    """
    path = Path(path)
    temporary, link = (path.with_name(f".{path.name}.{os.getpid()}.{kind}.tmp") for kind in ("new", "old"))
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            try:
                os.link(path, link)  # a second name: there is no moment without a file under the first
                os.replace(link, previous)
            except OSError:  # a file system without hard links: for a moment only `previous` exists
                os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
        link.unlink(missing_ok=True)


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def checkpoint_exists(path: Path) -> bool:
    """Whether there is this checkpoint, or the one before it."""
    return path.exists() or _previous(path).exists()


def save_checkpoint(path: Path | str, state: dict) -> None:
    """Write a checkpoint (tensors and plain values) whole; the one before it is kept as NAME.prev.pt."""
    buffer = io.BytesIO()  # serialised first, so that a full disk is a plain OSError
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer(), previous=_previous(Path(path)))


def load_checkpoint(path: Path | str) -> dict:
    """Read a checkpoint of save_checkpoint, or with a warning the one before if it is damaged. Tensors on the CPU."""
    path = Path(path)
    try:
        return read_weights(path)
    except UserError as error:
        if not _previous(path).exists():
            raise
        print(f"warning: {error}; using {_previous(path).name}, one checkpoint older", file=sys.stderr)
        return read_weights(_previous(path))


def read_weights(path: Path | str) -> dict:
    """Read a file of torch.save (zip or the format before PyTorch 1.6) that holds a dict, as data, on the CPU.

    Nothing in it is executed. Checksums (zip only) and sizes are checked before memory is taken for tensors; UserError
    says what is wrong.
    """
    path = Path(path)
    if torch.__version__ < "2.10" and not (path.parent / "args.json").exists():  # a TorchVersion, compared as such
        old = f"PyTorch {torch.__version__} can be made to run code by a file written for that, 2.10 cannot"
        print(f"warning: {path}: {old}", file=sys.stderr)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a checkpoint file") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = _read_zip(data) if data.startswith(b"PK") else _read_legacy(data)
    except UserError as error:
        raise UserError(f"{path}: {printable(error)}") from None
    except (Exception, MemoryError) as error:  # hostile bytes raise anything: KeyError, struct.error, UnicodeError ...
        reason = f"{type(error).__name__} {printable(error)}"[:100]
        raise UserError(f"{path}: damaged, cut off, or not a checkpoint of torch.save ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict (a state dict or a checkpoint)")
    return content


def _read_zip(data: bytes) -> Any:
    """Read today's format: a zip file with a checksum (CRC32) for each record, one record for each storage.

    PyTorch reads a new zip file of the records whose checksums are right, since in the given one it could see others:
    with one bit of its attributes changed, a record is a folder for PyTorch, and its tensor is left uninitialised.
    """
    fresh = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(fresh, "w") as new:
        infos = old.infolist()
        names = {info.filename.lower() for info in infos}  # PyTorch ignores case
        if len(names) < len(infos) or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise UserError("a zip file, but not as torch.save writes it")
        for info in infos:
            new.writestr(info.filename, old.read(info))  # raises BadZipFile if the checksum is wrong
    return _load(fresh, len(data))


def _read_legacy(data: bytes) -> Any:
    """Read the format before PyTorch 1.6: five objects (the content is the fourth) and storages, without checksums."""
    file = io.BytesIO(data)
    content = _load(file, len(data))
    if rest := len(data) - file.tell():
        raise UserError(f"damaged: {rest} bytes too many")
    return content


def _load(file: io.BytesIO, size: int) -> Any:
    """torch.load, after a look at the shapes without memory; UserError if a tensor is larger than its data.

    A stride of 0 makes 4 bytes a terabyte, and a file of ``size`` bytes may claim any storage.
    """
    file.seek(0)
    todo, seen = [torch.load(file, map_location="meta", weights_only=True)], set()
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage().nbytes()
            if item.numel() * item.element_size() > storage or storage > size:
                raise UserError(f"damaged: a tensor of shape {tuple(item.shape)} is larger than its data")
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            todo += [*item, *item.values()] if isinstance(item, dict) else item
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def first_not_finite(state: Any, name: str = "") -> str | None:
    """The name of the first tensor or number in a checkpoint that is NaN or infinite."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return next(filter(None, (first_not_finite(value, f"{name} {key}".strip()) for key, value in items)), None)
    if isinstance(state, torch.Tensor):
        return name if state.is_floating_point() and not state.isfinite().all() else None
    return name if isinstance(state, float) and not math.isfinite(state) else None
