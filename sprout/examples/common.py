"""What both examples need: their flags, a training loop, two baselines, and the verdict."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_DECAYS = (0.0, 1e-4, 1e-3, 1e-2)
WARMUP = 50


class Bags(NamedTuple):
    """Samples as a bag of words sees them.

    ids: (M, L) int64, the words of each sample in any order, -1 for nothing. labels: (M,) int64.
    allowed: (M, C) bool, the classes that an answer may be; a sample's label is among them.
    """

    ids: Tensor
    labels: Tensor
    allowed: Tensor


def vocabulary(words: Iterable[str], size: int) -> dict[str, int]:
    """The size - 1 commonest words, numbered from 1 by how common they are; 0 is left for every other word."""
    return {word: i for i, (word, _) in enumerate(Counter(words).most_common(size - 1), 1)}


def majority(train: Bags, test: Bags) -> float:
    """Accuracy of the class that is commonest in training among those allowed; the lowest of equals."""
    counts = torch.bincount(train.labels, minlength=train.allowed.shape[1])
    guess = torch.where(test.allowed, counts, -1).argmax(1)
    return (guess == test.labels).double().mean().item()


def bag_of_words(train: Bags, test: Bags) -> float:
    """Accuracy of multinomial logistic regression on word counts, answers that are not allowed left out.

    logits = b + sum_w count_w W_w. Of WEIGHT_DECAYS (of |W|^2 / 2, beside the mean cross-entropy in nats) the one that
    does best on the last fifth of the training samples is taken, the model then fitted to all of them.
    Determinism: nothing is drawn at random, the fit starts at zero.
    """
    cut = len(train.labels) * 4 // 5
    fitted, chosen = Bags(*(x[:cut] for x in train)), Bags(*(x[cut:] for x in train))
    decay = max(WEIGHT_DECAYS, key=lambda decay: _accuracy(_regression(fitted, decay), chosen))
    return _accuracy(_regression(train, decay), test)


def _logits(weights: Tensor, bags: Bags) -> Tensor:
    """(M, C); the last row of weights (F + 2, C) is the bias, the one before it, zero, stands for nothing."""
    nothing = len(weights) - 2
    ids = torch.where(bags.ids < 0, nothing, bags.ids.clamp(max=nothing))
    logits = F.embedding_bag(ids, weights, mode="sum", padding_idx=nothing) + weights[-1]
    return logits.masked_fill(~bags.allowed, float("-inf"))


def _accuracy(weights: Tensor, bags: Bags) -> float:
    return (_logits(weights, bags).argmax(1) == bags.labels).double().mean().item()


def _regression(bags: Bags, weight_decay: float) -> Tensor:
    weights = torch.zeros(int(bags.ids.max()) + 3, bags.allowed.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(weights, bags), bags.labels)
        loss = loss + weight_decay / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


@torch.no_grad()
def sinusoids_(table: Tensor) -> Tensor:
    """A table of positions (T, D), D even, filled in place with sines and cosines of mean square 1.

    A shift is then the same linear map at every position, which shortens the time until a model finds that the word
    before matters. Periods go from 2 pi to 60 pi positions. Source of the form: Vaswani et al. 2017, section 3.5.
    """
    length, d = table.shape
    rate = 30.0 ** -(torch.arange(0, d, 2) / d)
    angle = torch.arange(length).unsqueeze(1) * rate
    return table.copy_(torch.cat([angle.sin(), angle.cos()], 1) * 2**0.5)


def fit(module: nn.Module, loss: Callable[[], Tensor], *, steps: int, lr: float, weight_decay: float) -> float:
    """Minimises loss(), drawn anew each step, and prints eight lines on the way; seconds of CPU time that it took.

    AdamW; the rate rises over WARMUP steps and falls linearly to zero; gradients are clipped at norm 1.
    Leaves the module in eval mode.
    """
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / WARMUP, 1 - t / steps))
    begun, recent = time.process_time(), []
    for step in range(1, steps + 1):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        rate.step()
        recent.append(value.item())
        if step % max(steps // 8, 1) == 0:
            seconds = time.process_time() - begun
            print(f"step {step:5}  loss {sum(recent) / len(recent):.3f} nats  {seconds:5.0f} s of CPU", flush=True)
            recent.clear()
    module.eval()
    return time.process_time() - begun


def arguments(doc: str, steps: int, argv: list[str] | None) -> argparse.Namespace:
    """The flags --steps, --seed and --out, checked; a wrong one ends the program with exit code 2 and one line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help=f"training steps, >= 1 (default {steps})")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples, >= 0 (default 0)")
    parser.add_argument("--out", type=Path, default=None, help="a .json file for the figures (default: none)")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be >= 1, got {args.steps}")
    if args.seed < 0:
        parser.error(f"--seed must be >= 0, got {args.seed}")
    if args.out is not None and (args.out.suffix != ".json" or not args.out.parent.is_dir()):
        parser.error(f"--out must be a .json file in an existing folder, got {args.out}")
    return args


def verdict(
    accuracy: dict[str, float], rivals: tuple[str, ...], margin: float, args: argparse.Namespace, **more: float
) -> int:
    """Prints and writes the accuracies; exit code 0 if SPROUT's beats every rival's by the margin, else 1.

    Args: accuracy, fractions by name, "sprout" and the rivals among them; margin, a fraction;
        more, further figures for the .json file.
    """
    for name, value in accuracy.items():
        print(f"{name:20} {value:6.1%}")
    lead = accuracy["sprout"] - max(accuracy[name] for name in rivals)
    passed = lead >= margin
    if args.out is not None:
        figures = {"seed": args.seed, "steps": args.steps, "accuracy": accuracy, "margin": margin, "passed": passed}
        args.out.write_text(json.dumps({**figures, **more}, indent=2) + "\n", encoding="utf-8")
    if not passed:
        print(f"failed: {lead:+.1%} over the best of {', '.join(rivals)}; {margin:+.0%} is asked for", file=sys.stderr)
    return 0 if passed else 1
