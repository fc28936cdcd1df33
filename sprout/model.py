"""SPROUT: input -> pattern -> interaction -> logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, NamedTuple

import bio_kernels
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import resize
from .config import SproutConfig
from .decoder import OutputDecoder
from .distributed import Group, join_patterns, joint_group
from .encoder import InputToActivation
from .interaction import NeuronInteraction
from .paging import GroupedScore
from .pattern import ActivationPattern, gate_change, jaccard
from .pool import GlobalNeuronPool
from .pretrained import Pretrained
from .rewiring import rewire
from .sampling import generate
from .sharded_pool import ShardedBlocks


class Settled(NamedTuple):
    """The pool after the interaction.

    states: (B, K, D), of the active neurons.
    history: the n_interaction_steps + 1 patterns, the initial one first.
    score: (B, N), how well the input matches each neuron; of a pool with groups, which never looks at all of them, a
        GroupedScore.
    """

    states: Tensor
    history: list[ActivationPattern]
    score: Tensor | GroupedScore


class BrainLikeSprout(Pretrained, nn.Module):
    """tokens (B, T) -> logits (B, vocab_size), by way of one sparse pattern over a pool of neurons."""

    def __init__(self, config: SproutConfig) -> None:
        super().__init__()
        self.config = config
        self.pool = GlobalNeuronPool(config)
        self.encoder = InputToActivation(config)
        self.interaction = NeuronInteraction(config)
        self.decoder = OutputDecoder(config)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None, *, all_positions: bool = False) -> Tensor:
        """Logits of the whole input, or of every prefix of it.

        Args:
            tokens: (B, T) int64 in 0..vocab_size-1, 1 <= T <= max_seq_len.
            attention_mask: (B, T) bool or integer, nonzero for tokens, 0 for padding on either side; None: all tokens.
            all_positions: prefix mode, one pattern for every prefix, B * T patterns at once; needs config.causal.
        Returns: (B, vocab_size), the dtype of the parameters; with all_positions (B, T, vocab_size), [:, t] the logits
            of tokens[:, :t+1] (to rounding; without meaning where attention_mask is 0).
        Raises: TypeError for a wrong dtype; ValueError for a wrong shape, for all_positions without config.causal, and
            on CPU outside torch.compile also for tokens outside the vocabulary and samples without tokens.
        Gradients: every parameter. Determinism: the same input gives bitwise the same logits.
        """
        settled = self.settle(tokens, attention_mask, all_positions=all_positions)
        logits = self.decoder(settled.states, settled.history[-1])
        return logits.unflatten(0, tokens.shape) if all_positions else logits

    def features(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, D): what the decoder makes of the settled pattern, for heads; arguments and errors as in ``forward``."""
        settled = self.settle(tokens, attention_mask)
        return self.decoder.features(settled.states, settled.history[-1])

    def settle(self, tokens: Tensor, attention_mask: Tensor | None = None, *, all_positions: bool = False) -> Settled:
        """The pool after the interaction, with gradient; arguments and errors as in ``forward``.

        With all_positions its B is B * T: prefix t of sample b is in row b * T + t.
        """
        start = self.encoder(tokens, self.pool, attention_mask, all_positions=all_positions)
        states, history = self.interaction(start, self.pool)
        return Settled(states, history, start.score if start.page is None else start.page.scores)

    def generate(self, tokens: Tensor, max_new_tokens: int, **how: Any) -> Tensor:
        """tokens (B, T) continued by max_new_tokens: (B, T + max_new_tokens); see ``sprout.sampling.generate``.

        Keywords: temperature=1.0, top_k=None, top_p=None, seed=None.
        """
        return generate(self, tokens, max_new_tokens, **how)

    @torch.no_grad()
    def analyze_activation(
        self, tokens: Tensor, attention_mask: Tensor | None = None, *, top_k: int = 10
    ) -> dict[str, Any]:
        """How the pattern evolves, without gradient and in the mode (train or eval) that the model is in.

        Args: tokens, attention_mask as in ``forward``; top_k >= 1, the most neurons to name per step.
        Returns: a dict of
            initial_active, final_active: (B,) int64, active neurons; initial_active_mean, final_active_mean: float;
            top_neurons_per_step: a dict per pattern: step, indices and values of the strongest in the batch's mean;
            activation_history: the n_interaction_steps + 1 patterns;
            jaccard, gate_change: (n_interaction_steps, B), how far each step changed the pattern.
        Raises: as ``forward``; ValueError if top_k is not a positive integer.
        """
        if type(top_k) is not int or top_k < 1:
            raise ValueError(f"top_k must be an integer >= 1, got {top_k!r}")
        history = self.settle(tokens, attention_mask).history
        changes = list(pairwise(history))
        nothing = history[0].gate.new_zeros(0, tokens.shape[0])
        return {
            "initial_active": history[0].count,
            "initial_active_mean": history[0].count.double().mean().item(),
            "final_active": history[-1].count,
            "final_active_mean": history[-1].count.double().mean().item(),
            "top_neurons_per_step": [strongest(pattern, step, top_k) for step, pattern in enumerate(history)],
            "activation_history": history,
            "jaccard": torch.stack([jaccard(*pair) for pair in changes]) if changes else nothing,
            "gate_change": torch.stack([gate_change(*pair) for pair in changes]) if changes else nothing,
        }

    @torch.no_grad()
    def plasticity(
        self,
        pattern: ActivationPattern | Sequence[ActivationPattern],
        *,
        eta: float,
        decay: float = 0.0,
        bound: float | None = 1.0,
        process_group: Group = None,
    ) -> None:
        """Strengthens, in place, the connections of neurons that were active together; call it after ``backward``.

        strength[p, q] += eta / B * sum_b (gate_bp gate_bq - decay gate_bq^2 strength[p, q]), then clamp to +-bound.
        Args: pattern, one pattern or a history (each of its patterns with eta / length); eta, fraction per call;
            decay 0 for Hebb's rule, 1 for Oja's (1982); bound >= 0 or None, dimensionless.
            process_group: whose samples the rule is about. None: those of all processes, where torch.distributed is
            initialised; "local": this process's alone, after which the processes' strengths differ.
        Raises: ValueError for an empty history or a pattern of another pool. Gradients: none. Determinism: bitwise.

        Several processes: every process of the group calls it, each time, also without samples (B = 0, or []), or the
        others wait. B may differ. Patterns travel, L * B * (8 K + 4) bytes from each process whatever N is, and every
        process applies the rule to the joined batch: the strengths, if they were the same before, stay so to the bit,
        and are to the bit those of one process with all samples in order of rank. To sum changes of the strengths
        would take L exchanges of 4 N^2 bytes (or of all stored blocks, as processes touch different ones), and its
        order of summation would not be that of one process. The price: each process computes the whole update, or,
        of a pool that is spread over processes (``sharded_pool.shard_``), that of its own blocks.
        """
        history = [pattern] if isinstance(pattern, ActivationPattern) else list(pattern)
        group, strength = joint_group(process_group), self.pool.connection_strength
        if isinstance(strength, ShardedBlocks):
            if group is not strength.joint:
                raise ValueError("process_group must be the one that the pool is spread over, got another")
            strength = strength.own()
        if group is not None:
            history = join_patterns(history, self.config.n_neurons, self.decoder.head.weight.device, group)
        if not history:
            raise ValueError("pattern must hold at least one ActivationPattern, got an empty history")
        for other in {p.n_neurons for p in history} - {self.config.n_neurons}:
            raise ValueError(f"pattern must be over n_neurons={self.config.n_neurons} neurons, got {other}")
        for idx, gate, count, _ in history:
            bio_kernels.update_strength_(
                strength,
                idx,
                gate,
                gate,
                eta=eta / len(history),
                decay=decay,
                bound=bound,
                count=count,
                backend=self.config.backend,
            )

    def rewire(self, pattern: ActivationPattern | Sequence[ActivationPattern], **how: Any) -> bio_kernels.Rewiring:
        """Lets the stored blocks of a block-sparse pool follow these patterns; see ``sprout.rewiring.rewire``.

        Keywords: max_new_per_row=1, margin=0.1, optimizers=(), process_group=None.
        """
        return rewire(self, pattern, **how)

    def grow(self, n: int, *, optimizers: Sequence[Optimizer] = (), generator: torch.Generator | None = None) -> None:
        """Adds n neurons that sleep until ``pool.waken`` rouses them: no output changes; see ``sprout.resize.grow``."""
        resize.grow(self, n, optimizers=optimizers, generator=generator)

    def prune(self, neurons: Tensor, *, optimizers: Sequence[Optimizer] = ()) -> None:
        """Removes neurons, for one those that ``silent_neurons`` names; see ``sprout.resize.prune``."""
        resize.prune(self, neurons, optimizers=optimizers)

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"n_interaction_steps={c.n_interaction_steps}, sparsity={c.initial_sparsity}->{c.final_sparsity} "
            f"of {c.n_neurons}, connection={c.connection!r}, backend={c.backend!r}"
        )


def strongest(pattern: ActivationPattern, step: int, top_k: int) -> dict[str, Any]:
    """The at most top_k strongest neurons of the batch's mean pattern: step, indices (1-D int64), values (1-D)."""
    neuron, where = pattern.idx[pattern.valid()].unique(return_inverse=True)
    gate = pattern.gate[pattern.valid()].float()  # bfloat16 would stop counting
    mean = gate.new_zeros(neuron.shape).index_add(0, where, gate) / pattern.idx.shape[0]
    values, order = mean.sort(descending=True, stable=True)
    return {"step": step, "indices": neuron[order[:top_k]], "values": values[:top_k]}


def create_brain_like_sprout(vocab_size: int = 30000, **config: Any) -> BrainLikeSprout:
    """A new SPROUT with random weights (torch's global generator).

    Args: vocab_size and the other fields of SproutConfig, by name.
    Raises: TypeError for an unknown name, with the nearest known one; ValueError for a value out of range.
    """
    known = [field.name for field in fields(SproutConfig)]
    for name in config:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(known)}"
            raise TypeError(f"create_brain_like_sprout got an unknown argument {name!r}{hint}")
    return BrainLikeSprout(SproutConfig(vocab_size=vocab_size, **config))
