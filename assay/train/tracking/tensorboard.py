"""TensorBoard: event files in the run's folder, `tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from assay.train.tracking.base import About, told


class TensorBoard:
    def __init__(self, about: About) -> None:
        import tensorboard  # noqa: F401  (torch's message names no package)
        from torch.utils.tensorboard import SummaryWriter

        # Steps that are taken again after a kill replace those that were told before.
        self._writer = SummaryWriter(str(about.folder / "tensorboard"), purge_step=about.step + 1)
        if about.step == 0:
            text = "\n".join(f"    {path}: {value}" for path, value in about.fields.items())
            self._writer.add_text("spec", text, 0)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in told(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


def opened(about: About) -> TensorBoard:
    return TensorBoard(about)
