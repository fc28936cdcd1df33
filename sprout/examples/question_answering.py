"""Who plays what, who studies what? SpanExtractor on passages of facts, against a majority and a bag of words.

The passages, and why the question is needed: sprout/examples/facts.py. The passage stands before the question, and in
this causal model no word of it sees the question: the settled pattern carries it to the passage, and points.
Exit code 0 if the model finds the exact span 40 points of accuracy more often than every baseline, and than chance
among the answers of the right kind, on facts that it has not seen; else 1.
"""

from __future__ import annotations

import random
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from ..heads import SpanExtractor
from ..model import create_brain_like_sprout
from . import common, facts

MARGIN = 0.40
STEPS = 1600
BATCH = 60  # at least so many questions; a passage comes with all of its questions
# From two facts to six: with six from the start the loss stays at that of a guess for longer than this example runs.
STAGES = ((2, 1), (3, 1), (2, 2), (3, 2))  # people, relations
STAGE = 250  # steps until passages of the next size join those before
VALIDATION = 600  # passages, one question each
CHOICES = tuple((verb, answer) for verb, answers in facts.ANSWERS.items() for answer in answers)
NUMBER = {word: i for i, word in enumerate(facts.WORDS)}


class Batch(NamedTuple):
    """tokens (B, T) int64, padded on the right; context, mask (B, T) bool, the passage, all words; spans (B, 2)."""

    tokens: Tensor
    context: Tensor
    mask: Tensor
    spans: Tensor


def collate(examples: list[facts.Example]) -> Batch:
    """Examples as tensors, T the longest of them."""
    length = max(len(example.words) for example in examples)
    rows = [[NUMBER[w] for w in e.words] + [0] * (length - len(e.words)) for e in examples]
    tokens, place = torch.tensor(rows), torch.arange(length)
    context = place < torch.tensor([[e.passage] for e in examples])
    return Batch(tokens, context, tokens != 0, torch.tensor([e.span for e in examples]))


def training(draw: random.Random, step: int) -> list[facts.Example]:
    """The questions of one training step, about passages of the sizes that have joined so far."""
    examples: list[facts.Example] = []
    while len(examples) < BATCH:
        people, relations = draw.choice(STAGES[: step // STAGE + 1])
        some = draw.sample(facts.RELATIONS, relations)
        examples += facts.questions(draw, validation=False, people=people, relations=some)
    return examples


def build(seed: int) -> SpanExtractor:
    """The extractor, new."""
    torch.manual_seed(seed)
    model = create_brain_like_sprout(
        len(facts.WORDS),
        n_neurons=512,
        d_state=64,
        n_heads=4,
        n_interaction_steps=2,
        initial_sparsity=16,
        final_sparsity=24,
        recruits_per_step=4,
        max_seq_len=facts.MAX_WORDS,
    )
    common.sinusoids_(model.encoder.position.weight)
    return SpanExtractor(model, facts.LONGEST)


def bags(examples: list[facts.Example]) -> common.Bags:
    """As a bag of words sees them: counts of the passage's words and of the question's; answers in the passage."""
    length = max(len(e.words) for e in examples)
    ids = torch.full((len(examples), length), -1)
    allowed = torch.zeros(len(examples), len(CHOICES), dtype=torch.bool)
    for row, e in enumerate(examples):
        numbers = [NUMBER[w] + len(NUMBER) * (i >= e.passage) for i, w in enumerate(e.words)]
        ids[row, : len(numbers)] = torch.tensor(numbers)
        told = " ".join(e.words[: e.passage])
        allowed[row] = torch.tensor([f" {verb} {answer} ." in told for verb, answer in CHOICES])
    answers = [CHOICES.index((e.relation, e.answer())) for e in examples]
    return common.Bags(ids, torch.tensor(answers), allowed)


def nameless(bags: common.Bags) -> common.Bags:
    """The same without names: who sees them learns which facts occur in training, and the facts judged never do."""
    names = torch.tensor([NUMBER[name] for name in facts.NAMES])
    return bags._replace(ids=bags.ids.masked_fill(torch.isin(bags.ids % len(NUMBER), names), -1))


def exact(extractor: SpanExtractor, batch: Batch, mask: Tensor) -> float:
    """The fraction of answers of which first and last word are right, mask saying which words can be read."""
    spans = extractor.predict(batch.tokens, batch.context, mask).span
    return (spans == batch.spans).all(1).double().mean().item()


def main(argv: list[str] | None = None) -> int:
    """Trains, judges, prints; the exit code. argv as for the command line, None: sys.argv."""
    args = common.arguments(str(__doc__), STEPS, argv)
    judge = random.Random("validation")
    asked = [judge.choice(facts.questions(judge, validation=True)) for _ in range(VALIDATION)]
    extractor, draw, steps = build(args.seed), random.Random(args.seed), iter(range(args.steps))

    def loss() -> Tensor:
        batch = collate(training(draw, next(steps)))
        return extractor.loss(batch.tokens, batch.spans, batch.context, batch.mask)

    seconds = common.fit(extractor, loss, steps=args.steps, lr=2e-3, weight_decay=0.01)
    batch = collate(asked)
    counted = [draw.choice(facts.questions(draw, validation=False)) for _ in range(10_000)]
    accuracy = {
        "sprout": exact(extractor, batch, batch.mask),
        "majority": common.majority(bags(counted), bags(asked)),
        "bag of words": common.bag_of_words(bags(counted), bags(asked)),
        "bag without names": common.bag_of_words(nameless(bags(counted)), nameless(bags(asked))),
        "right kind, chance": 1 / facts.PEOPLE,
        "sprout, no question": exact(extractor, batch, batch.context),
    }
    rivals = ("majority", "bag of words", "bag without names", "right kind, chance")
    return common.verdict(accuracy, rivals, MARGIN, args, validation=len(asked), cpu_seconds=round(seconds, 1))


if __name__ == "__main__":
    sys.exit(main())
