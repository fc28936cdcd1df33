"""Where a training run's figures go while it runs."""

from __future__ import annotations

import logging
import sys
from typing import Any

from tqdm import tqdm

from .runs import RunFolder

log = logging.getLogger("sprout.train")
SHOWN = {
    "train": ("loss", "lr", "grad_norm", "tokens_per_second", "active_mean", "jaccard", "gate_change"),
    "val": ("loss", "bits_per_character", "active_mean", "jaccard", "gate_change", "used_share", "seconds"),
}


class Reporter:
    """Where figures go: metrics.jsonl, TensorBoard, and the progress bar or, without a terminal, a line of log."""

    def __init__(self, folder: RunFolder, step: int, total: int, tensorboard: bool) -> None:
        self.folder, self.writer = folder, None
        self.bar = tqdm(total=total, initial=step, unit="step", disable=not sys.stderr.isatty())
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                log.warning('no TensorBoard files: pip install "bio-kernels[train]", or --no-tensorboard')
            else:
                self.writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1 if step else None)

    def record(self, step: int, kind: str, figures: dict[str, Any]) -> None:
        """Keeps the figures of a step; kind is "train" or "val". Raises: DiskError."""
        self.folder.log(step, kind=kind, **figures)
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)
        shown = {name: value for name, value in figures.items() if name in SHOWN[kind]}
        if kind == "train" and not self.bar.disable:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})
        else:
            log.info("step %d %s  %s", step, kind, "  ".join(f"{name} {value:.4g}" for name, value in shown.items()))

    def close(self) -> None:
        """Ends the bar and writes what TensorBoard's writer holds back."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
