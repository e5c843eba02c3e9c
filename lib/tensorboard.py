"""An epoch's line of history as TensorBoard events."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lib.cli import HARMLESS

WHAT = {"loss": "loss", "acc": "accuracy"}
TAGS = {f"{part}_{key}": f"{what}/{part}" for part in ("train", "valid", "test", "best") for key, what in WHAT.items()}
TAGS |= {  # the names of history.jsonl, as TensorBoard groups them
    "arch_loss": "loss/architecture",
    "test_acc_top5": "accuracy/test_top5",
    "table_rank": "rank/looked_up",
    "lr": "learning_rate/weights",
    "arch_lr": "learning_rate/architecture",
    "expected_multiply_adds": "multiply_adds/expected",
    "derived_multiply_adds": "multiply_adds/derived",
}
TAGS |= {name: f"schedule/{name}" for name in ("tau", "stage", "dropout", "drop_path")}
GROUPS = {"alpha_entropy": "alpha_entropy", "active_ops": "active_ops", "table_acc": "accuracy/looked_up"}


class TensorBoard:
    """The events of a run folder. Steps are epochs; events from ``first_step`` on of an earlier process are ignored."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.folder, self.first_step, self._writer = folder, first_step, None

    def write(self, line: dict, pictures: dict, arguments: dict | None) -> None:
        """The numbers and pictures of an epoch; with ``arguments`` (at the end) the hyperparameters."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._writer = SummaryWriter(str(self.folder), purge_step=self.first_step)
        board, epoch = self._writer, line["epoch"]
        scalars = {tag: line[name] for name, tag in TAGS.items() if line.get(name) is not None}
        for name, group in GROUPS.items():
            scalars |= {f"{group}/{part}": value for part, value in line.get(name, {}).items()}
        if line.get("samplings"):
            changed = np.array([sampling["changed"] for sampling in line["samplings"]])
            scalars["active_ops/changed_per_sampling"] = changed.mean()
            board.add_histogram("active_ops/changed_at_each_sampling", changed, epoch)
        for tag, value in scalars.items():
            board.add_scalar(tag, value, epoch)
        for name, picture in pictures.items():
            if isinstance(picture, np.ndarray):
                board.add_image(name, picture, epoch, dataformats="HWC")
            else:
                board.add_figure(name, picture, epoch)
        if arguments is not None:
            given = {name: value for name, value in arguments.items() if name not in HARMLESS | {"save"}}
            plain = {n: value if isinstance(value, (int, float, str)) else str(value) for n, value in given.items()}
            final = {f"final/{tag}": value for tag, value in scalars.items() if tag.startswith(("loss", "accuracy"))}
            board.add_hparams(plain, final, run_name=".", global_step=epoch)
        board.flush()

    def close(self) -> None:
        """Flush what was written."""
        if self._writer is not None:
            self._writer.close()
