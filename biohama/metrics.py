"""How right the predictions of a batch are; only positions with a target count."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .tasks.base import IGNORE, Batch


def seq_right(pred: Tensor, batch: Batch) -> Tensor:
    """(B,) bool: whether a sequence is right at all its scored positions, EOS included.

    Args: pred (B, T) int64, see ``biohama.generation``. Raises: ValueError for another shape, or if a sequence has no
    scored position: it could not be wrong.
    """
    scored = _scored(pred, batch)
    if not scored.any(1).all():
        raise ValueError("batch.targets must score at least one position of every sequence")
    return ((pred == batch.targets) | ~scored).all(1)


def seq_acc(pred: Tensor, batch: Batch) -> float:
    """Seq-Acc: the fraction of sequences that are right everywhere; arguments and errors as in ``seq_right``.

    The same for predictions of ``free_run`` and ``teacher_forced``, up to ties in the logits: a sequence without an
    error has read the right answers in both.
    """
    return seq_right(pred, batch).double().mean().item()


def token_acc(pred: Tensor, batch: Batch) -> float:
    """The fraction of scored positions that are right; not the same for free_run and teacher_forced.

    Args: pred (B, T) int64. Raises: ValueError for another shape, or if nothing is scored.
    """
    scored = _scored(pred, batch)
    if not scored.any():
        raise ValueError("batch.targets must score at least one position, all are IGNORE")
    return (pred == batch.targets)[scored].double().mean().item()


def perplexity(logits: Tensor, batch: Batch) -> float:
    """exp(mean negative log-likelihood of the targets, nats) over all scored positions.

    Args: logits (B, T, V) float. Raises: ValueError for another shape, or if nothing is scored; ImportError without
    torchmetrics.
    """
    if logits.dim() != 3 or logits.shape[:2] != batch.targets.shape:
        shape = tuple(batch.targets.shape)
        raise ValueError(
            f"logits must be ({shape[0]}, {shape[1]}, V) with batch.targets of {shape}, got {tuple(logits.shape)}"
        )
    if not batch.scored().any():
        raise ValueError("batch.targets must score at least one position, all are IGNORE")
    meter = perplexity_meter().to(logits.device)
    meter.update(logits, batch.targets)
    return meter.compute().item()


def perplexity_meter() -> Any:
    """torchmetrics' Perplexity, for batches that follow one another: update(logits, batch.targets), compute()."""
    try:
        from torchmetrics.text import Perplexity
    except ImportError as error:
        raise ImportError('perplexity needs torchmetrics: pip install "bio-kernels[experiments]"') from error
    return Perplexity(ignore_index=IGNORE)


def _scored(pred: Tensor, batch: Batch) -> Tensor:
    if pred.shape != batch.targets.shape:
        raise ValueError(f"pred must be {tuple(batch.targets.shape)} as batch.targets, got {tuple(pred.shape)}")
    return batch.scored()
