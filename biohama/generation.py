"""What a model predicts: alone, reading its own answers, or with the right ones put there for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .tasks.base import Batch


class StreamModel(Protocol):
    """How every model and baseline is called: whole sequences at once, or one token after another."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, T, V) logits of tokens (B, T) int64; causal."""
        ...

    def start(self, batch_size: int) -> Any:
        """The state before the first token."""
        ...

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """((B, V) logits, the next state) of tokens (B,) int64 and a state."""
        ...


@contextmanager
def evaluating(model: StreamModel) -> Iterator[None]:
    """The model in eval mode and without gradients; afterwards each module is in the mode that it had."""
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for part, _ in modes:
            part.training = False
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def free_run(model: StreamModel, batch: Batch) -> Tensor:
    """(B, T) int64: the likeliest token at every position, when the model's answers are its next inputs.

    Walks t = 0 .. T-1 with ``step`` and feeds batch.tokens[:, t] where batch.given, else the model's prediction at
    t - 1. Of equally likely tokens the lowest wins.

    Args: model; batch on the device of its parameters. Raises: ValueError if position 0 is not given.
    Gradients: none; the model's mode is restored. Cost: T steps.
    """
    if not batch.given[:, 0].all():
        raise ValueError("batch.given must be True at position 0: before it the model has not answered")
    predictions = torch.empty_like(batch.tokens)
    with evaluating(model):
        state = model.start(len(batch.tokens))
        for t in range(batch.tokens.shape[1]):
            tokens = batch.tokens[:, t]
            if t:
                tokens = torch.where(batch.given[:, t], tokens, predictions[:, t - 1])
            logits, state = model.step(tokens, state)
            predictions[:, t] = logits.argmax(-1)
    return predictions


def teacher_forced(model: StreamModel, batch: Batch) -> Tensor:
    """(B, T) int64: the likeliest token at every position, when every input is batch.tokens: the right answers.

    Args: model; batch on the device of its parameters. Gradients: none; the model's mode is restored.
    """
    with evaluating(model):
        return model(batch.tokens).argmax(-1)
