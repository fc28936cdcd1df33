"""Where a run's figures go while it runs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from .runs import RunFolder


class Reporter:
    """Where figures go: metrics.jsonl, TensorBoard, and the progress bar or, without a terminal, a line of log.

    Args: folder; step, total, where the bar starts and ends; shown, kind -> the figures that a person is told; log;
        tensorboard, whether to write RUN/tensorboard (a warning if the package is missing).
    """

    def __init__(
        self,
        folder: RunFolder,
        step: int,
        total: int,
        *,
        shown: Mapping[str, Sequence[str]],
        log: logging.Logger,
        tensorboard: bool,
    ) -> None:
        self.folder, self.shown, self.log, self.writer = folder, shown, log, None
        self.bar = tqdm(total=total, initial=step, unit="step", disable=not sys.stderr.isatty())
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                log.warning('no TensorBoard files: pip install "bio-kernels[train]", or switch them off')
            else:
                self.writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1 if step else None)

    def record(self, step: int, kind: str, figures: dict[str, Any], *, quiet: bool = False) -> None:
        """Keeps the figures of a step; quiet: no line of log. Raises: DiskError."""
        self.folder.log(step, kind=kind, **figures)
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)
        shown = {name: value for name, value in figures.items() if name in self.shown[kind]}
        if kind == "train" and not self.bar.disable:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})
        elif not quiet:
            told = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.log.info("step %d %s  %s", step, kind, told)

    def close(self) -> None:
        """Ends the bar and writes what TensorBoard's writer holds back."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
