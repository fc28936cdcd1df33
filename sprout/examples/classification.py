"""Is a passage in its order, or locally shuffled? SequenceClassifier against a majority and a bag of words.

The passages and why no bag of words can do it: sprout/examples/word_order.py. Exit code 0 if the model beats both
baselines by 20 points of accuracy on paragraphs that it has not seen, else 1.
"""

from __future__ import annotations

import sys

import torch

from ..data import corpus
from ..heads import SequenceClassifier
from ..model import create_brain_like_sprout
from . import common, word_order

MARGIN = 0.20
STEPS = 1600
BATCH = 64


def build(seed: int) -> SequenceClassifier:
    """The classifier, new."""
    torch.manual_seed(seed)
    model = create_brain_like_sprout(
        word_order.VOCABULARY,
        n_neurons=512,
        d_state=64,
        n_heads=4,
        n_interaction_steps=2,
        initial_sparsity=24,
        final_sparsity=32,
        recruits_per_step=4,
        max_seq_len=word_order.LENGTH,
    )
    common.sinusoids_(model.encoder.position.weight)
    return SequenceClassifier(model, 2)


def bags(tokens: torch.Tensor, labels: torch.Tensor) -> common.Bags:
    """Passages as a bag of words sees them, both classes allowed."""
    return common.Bags(tokens, labels, torch.ones(len(labels), 2, dtype=torch.bool))


def samples(train: torch.Tensor, draws: torch.Generator) -> common.Bags:
    """20,000 training passages for the baselines; the last fifth, which tunes them, is from paragraphs of its own."""
    cut = len(train) * 4 // 5
    parts = [word_order.batch(train[:cut], 16_000, draws), word_order.batch(train[cut:], 4_000, draws)]
    return bags(*(torch.cat(part) for part in zip(*parts, strict=True)))


def main(argv: list[str] | None = None) -> int:
    """Trains, judges, prints; the exit code. argv as for the command line, None: sys.argv."""
    args = common.arguments(str(__doc__), STEPS, argv)
    passages = word_order.split(corpus())
    tokens, labels = word_order.pairs(passages.validation, seed=0)
    print(f"{len(passages.train)} training passages, {len(tokens)} for validation, half of them shuffled")
    classifier = build(args.seed)
    draws = torch.Generator().manual_seed(args.seed)
    seconds = common.fit(
        classifier,
        lambda: classifier.loss(*word_order.batch(passages.train, BATCH, draws)),
        steps=args.steps,
        lr=2e-3,
        weight_decay=0.1,
    )
    counted, judged = samples(passages.train, draws), bags(tokens, labels)
    accuracy = {
        "sprout": (classifier.predict(tokens) == labels).double().mean().item(),
        "majority": common.majority(counted, judged),
        "bag of words": common.bag_of_words(counted, judged),
        "bag of word pairs": common.bag_of_words(neighbours(counted), neighbours(judged)),
    }
    rivals = ("majority", "bag of words")
    return common.verdict(accuracy, rivals, MARGIN, args, validation=len(tokens), cpu_seconds=round(seconds, 1))


def neighbours(bags: common.Bags) -> common.Bags:
    """The bag of pairs of words side by side, which does see some order: for comparison, not to be beaten."""
    return bags._replace(ids=bags.ids[:, :-1] * word_order.VOCABULARY + bags.ids[:, 1:])


if __name__ == "__main__":
    sys.exit(main())
