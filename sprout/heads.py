"""Heads on the settled pattern: one label for a text, or the words of a passage that answer a question.

A head holds its model and trains it along; ``model.decoder.head``, the layer that makes logits over the vocabulary, has
no part in it and gets no gradient (DistributedDataParallel: find_unused_parameters=True, or freeze that layer).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import BrainLikeSprout


class SequenceClassifier(nn.Module):
    """tokens (B, T) -> logits (B, n_classes) = W features + b, features being what the decoder makes of the pattern."""

    def __init__(self, model: BrainLikeSprout, n_classes: int) -> None:
        """Args: model, held as it is, not copied; n_classes >= 1. Raises: TypeError, ValueError if they are not."""
        super().__init__()
        self.n_classes = _positive("n_classes", n_classes)
        self.model = _sprout(model)
        self.head = nn.Linear(model.config.d_state, n_classes)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, n_classes), the dtype of the parameters.

        Arguments and errors as in ``BrainLikeSprout.forward``. Gradients: every parameter but ``model.decoder.head``.
        Determinism: the same input gives bitwise the same logits.
        """
        return self.head(self.model.features(tokens, attention_mask))

    def loss(self, tokens: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the labels, in nats, a scalar with gradient.

        Args: tokens, attention_mask as in ``forward``; labels (B,) int64 in 0..n_classes-1.
        Raises: as ``forward``; TypeError for another dtype of labels; ValueError for another shape, and on CPU outside
            torch.compile also for labels out of range.
        """
        _int64("labels", labels, (tokens.shape[0],))
        if _looks(labels) and not bool(((labels >= 0) & (labels < self.n_classes)).all()):
            raise ValueError(
                f"labels must be in 0..n_classes-1={self.n_classes - 1}, got {int(labels.min())}..{int(labels.max())}"
            )
        return F.cross_entropy(self(tokens, attention_mask), labels)

    @torch.no_grad()
    def predict(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B,) int64: the likeliest class, the lowest of equals; in the mode (train or eval) that the model is in."""
        return self(tokens, attention_mask).argmax(1)

    def extra_repr(self) -> str:
        return f"n_classes={self.n_classes}"


class SpanScores(NamedTuple):
    """start, end: (B, T) logits of the answer's first and last token, -inf where none may be."""

    start: Tensor
    end: Tensor


class Spans(NamedTuple):
    """span: (B, 2) int64, an answer's first and last token, both inclusive. score: (B,), its log-probability, nats."""

    span: Tensor
    score: Tensor


class SpanExtractor(nn.Module):
    """Extractive question answering: which tokens of a passage answer the question beside it.

    Passage and question are one input, one pattern. Its features point at the encoder's token vectors h_t:
    start_t = W_s features . LayerNorm(h_t) / sqrt(D), end_t likewise, over the tokens that context_mask offers.
    With config.causal (the default) a token vector knows only what stands before it: put the question last, so that the
    pattern knows it, and expect answers only where what identifies them stands before or in them. A model with
    causal=False has no such limits. Every question is taken to have an answer in its passage.
    """

    def __init__(self, model: BrainLikeSprout, max_answer: int = 30) -> None:
        """Args: model, held as it is, not copied; max_answer >= 1, the longest answer ``predict`` gives, in tokens."""
        super().__init__()
        self.max_answer = _positive("max_answer", max_answer)
        self.model = _sprout(model)
        d = model.config.d_state
        self.norm = nn.LayerNorm(d)
        self.query = nn.Linear(d, 2 * d)

    def forward(self, tokens: Tensor, context_mask: Tensor, attention_mask: Tensor | None = None) -> SpanScores:
        """Where the answer may start and end.

        Args:
            tokens: (B, T) int64, passage and question in any order, see the class.
            context_mask: (B, T) bool or integer, nonzero where an answer may be: in the passage.
            attention_mask: as in ``BrainLikeSprout.forward``; padding is never part of an answer.
        Returns: SpanScores, the dtype of the parameters.
        Raises: as ``BrainLikeSprout.forward``; TypeError, ValueError for such faults of context_mask, and on CPU
            outside torch.compile for a sample that offers no token at all.
        Gradients: every parameter but ``model.decoder.head``. Determinism: bitwise on a CPU.
        """
        offered = self._offered(tokens, context_mask, attention_mask)
        features, h = self._read(tokens, attention_mask)
        query = self.query(features).unflatten(1, (2, -1)) * features.shape[1] ** -0.5
        scores = query @ self.norm(h).transpose(1, 2)  # (B, 2, T)
        return SpanScores(*scores.masked_fill(~offered.unsqueeze(1), float("-inf")).unbind(1))

    def loss(self, tokens: Tensor, spans: Tensor, context_mask: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean of the cross-entropies of start and end, in nats, a scalar with gradient.

        Args: spans (B, 2) int64, first and last token of each answer, inclusive; the others as in ``forward``.
        Raises: as ``forward``; TypeError, ValueError for another dtype or shape of spans, and on CPU outside
            torch.compile for one that is not start <= end on offered tokens.
        """
        _int64("spans", spans, (tokens.shape[0], 2))
        if _looks(spans):
            self._check_spans(spans, self._offered(tokens, context_mask, attention_mask))
        start, end = self(tokens, context_mask, attention_mask)
        return (F.cross_entropy(start, spans[:, 0]) + F.cross_entropy(end, spans[:, 1])) / 2

    @torch.no_grad()
    def predict(self, tokens: Tensor, context_mask: Tensor, attention_mask: Tensor | None = None) -> Spans:
        """The likeliest answers: start <= end, at most max_answer tokens, every one of them offered.

        Arguments and errors as in ``forward``. Ties go to the earliest start, then to the shortest answer.
        score = log p(start) + log p(end). Gradients: none; in the mode (train or eval) that the model is in.
        """
        scores = self(tokens, context_mask, attention_mask)
        start, end = scores.start.log_softmax(1), scores.end.log_softmax(1)
        longest = min(self.max_answer, tokens.shape[1])
        # [b, s, l]: the answer of l + 1 tokens from s; one banned token within makes it -inf.
        ends = F.pad(end, (0, longest - 1), value=float("-inf")).unfold(1, longest, 1)
        whole = ends.isneginf().cumsum(2) == 0
        total = torch.where(whole, start.unsqueeze(2) + ends, float("-inf"))
        score, best = total.flatten(1).max(1)
        first = best // longest
        return Spans(torch.stack([first, first + best % longest], 1), score)

    def _read(self, tokens: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features (B, D) and the encoder's token vectors (B, T, D), of one reading."""
        model = self.model
        start = model.encoder(tokens, model.pool, attention_mask)
        states, history = model.interaction(start, model.pool)
        return model.decoder.features(states, history[-1]), start.tokens

    def _offered(self, tokens: Tensor, context_mask: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, T) bool: the tokens that may be part of an answer."""
        if not isinstance(context_mask, Tensor) or context_mask.is_floating_point() or context_mask.is_complex():
            got = getattr(context_mask, "dtype", type(context_mask).__name__)
            raise TypeError(f"context_mask must be a bool or integer tensor, got {got}")
        if context_mask.shape != tokens.shape:
            raise ValueError(
                f"context_mask must have the shape of tokens {tuple(tokens.shape)}, got {tuple(context_mask.shape)}"
            )
        offered = context_mask != 0
        if attention_mask is not None and attention_mask.shape == offered.shape:  # other faults: the model names them
            offered = offered & (attention_mask != 0)
        if _looks(offered) and not bool(offered.any(1).all()):
            empty = int(offered.any(1).long().argmin())
            raise ValueError(f"context_mask must offer at least one token of every sample, got none in sample {empty}")
        return offered

    @staticmethod
    def _check_spans(spans: Tensor, offered: Tensor) -> None:
        inside = (spans >= 0) & (spans < offered.shape[1])
        good = inside.all(1) & (spans[:, 0] <= spans[:, 1])
        good &= offered.gather(1, spans.clamp(0, offered.shape[1] - 1)).all(1)
        if not bool(good.all()):
            bad = int(good.long().argmin())
            raise ValueError(
                f"spans must be (first, last) with first <= last on tokens that context_mask offers, "
                f"got {tuple(spans[bad].tolist())} in sample {bad}"
            )

    def extra_repr(self) -> str:
        return f"max_answer={self.max_answer}"


def _looks(values: Tensor) -> bool:
    """Whether values may be looked at: elsewhere it would wait for the device or break the graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _positive(name: str, value: int) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return value


def _sprout(model: BrainLikeSprout) -> BrainLikeSprout:
    if not isinstance(model, BrainLikeSprout):
        raise TypeError(f"model must be a BrainLikeSprout, got {type(model).__name__}")
    return model


def _int64(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(value.shape)}")
