"""The active neurons exchange messages, change their states and gates, and some leave while others enter.

A pattern has K slots, a fixed number, of which count[b] are in use: shapes never depend on what the neurons do, so a
step compiles, is captured in a CUDA graph, and never waits for the device. Only active neurons are computed; the pool
is touched twice a step, by the drive (B, N) that recruits and by the rows that the attention and the recruits gather.
Of a pool with groups (``sprout.paging``) all this happens within its page: N is the number of neurons in it.
"""

from __future__ import annotations

from typing import NamedTuple

import bio_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SproutConfig
from .encoder import Activation
from .pattern import ActivationPattern
from .pool import GlobalNeuronPool, Wiring

_WEAK = -2.0  # takes any gate in [0, 1] below zero: a neuron under the pruning threshold ranks after all the others


class Stimulus(NamedTuple):
    """What the input is to the neurons, the same in every step.

    score: (B, N), how well it matches each neuron. drift: (B, D), what it adds to the signature of one that wakes up.
    key, value: (S, H, T, D / H), the encoded tokens to look at, B = S * G as in ``Activation``.
    seen: (G * K, T) or (S, 1, G * K, T) bool, which tokens each slot may look at; None: all.
    """

    score: Tensor
    drift: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor | None


class NeuronInteraction(nn.Module):
    """One set of weights for every neuron and step: attention between active neurons, a GRU, a gate, turnover.

    message_i = sparse_attention(q, k, v of LayerNorm(state)) + attention(look of LayerNorm(state), the encoded tokens)
    state     = GRU(message, state)
    drive     = weighted_rows(connection_strength, idx, gate) + score
    gate     += rate * (sigmoid(drive_i + w . state + b) - gate),  rate in (0, 1) learned
    a silent neuron enters with gate = newcomer_scale * sigmoid(drive), state = signature + W_in z.

    Neurons look at the tokens themselves because one vector z is a bottleneck: a pool that saw nothing else was worth
    0.01 nats a character over its encoder. A synapse drives the gates of active neurons too, not only the recruits, so
    that connections count also when nobody enters. Source of the cell: Cho et al. 2014.
    """

    def __init__(self, config: SproutConfig) -> None:
        super().__init__()
        self.config, d = config, config.d_state
        self.norm = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)  # a bias of k would cancel in the softmax
        self.look = nn.Linear(d, d, bias=False)
        self.token_norm = nn.LayerNorm(d)
        self.token_kv = nn.Linear(d, 2 * d, bias=False)
        self.cell = nn.GRUCell(d, d)  # its input weights serve as the attentions' output projection
        nn.init.ones_(self.cell.bias_ih[d : 2 * d])  # at the start a neuron keeps most of its state
        self.gate_head = nn.Linear(d, 1)
        nn.init.normal_(self.gate_head.weight, std=0.02)  # at the start a gate follows its drive
        nn.init.zeros_(self.gate_head.bias)
        self.rate_logit = nn.Parameter(torch.zeros(()))

    def forward(self, start: Activation, pool: GlobalNeuronPool) -> tuple[Tensor, list[ActivationPattern]]:
        """Runs n_interaction_steps steps.

        Args: start, what the input woke up; pool, the neurons.
        Returns: states (B, K, D) at the end, and the n_interaction_steps + 1 patterns, the initial one first.
        """
        states, history = start.states, [start.pattern]
        if self.config.n_interaction_steps:
            stimulus, page, pattern = self.stimulus(start), start.page, start.pattern
            if page is None:
                wirings = pool.wiring(self.config.n_interaction_steps, pattern.idx.numel())
            else:
                wirings = [Wiring(page.signatures, page.strength, page.strength)] * self.config.n_interaction_steps
                pattern = page.localise(pattern)
            for age, wiring in enumerate(wirings):
                states, pattern = self.step(states, pattern, stimulus, wiring, age)
                history.append(pattern if page is None else page.globalise(pattern))
        return states, history

    def stimulus(self, start: Activation) -> Stimulus:
        """What the input is to the neurons over all steps."""
        heads = self.token_kv(self.token_norm(start.tokens)).unflatten(-1, (2, self.config.n_heads, -1))
        key, value = heads.permute(2, 0, 3, 1, 4)
        seen = start.hidden
        if seen is not None:
            seen = ~seen.repeat_interleave(self.config.final_sparsity, -2)
            seen = seen if seen.dim() == 2 else seen.unsqueeze(1)
        return Stimulus(start.score, start.drift, key, value, seen)

    def step(
        self, states: Tensor, pattern: ActivationPattern, stimulus: Stimulus, wiring: Wiring, age: int = 0
    ) -> tuple[Tensor, ActivationPattern]:
        """States and pattern after one interaction step.

        Args: states (B, K, D); pattern of K slots; stimulus, the input as ``stimulus`` gives it; wiring, the pool
            as ``GlobalNeuronPool.wiring`` gives it for each step; age, steps before this one: old patterns change less.
        Returns: states (B, K, D), of which padding slots hold finite values without meaning, and the new pattern.
        Gradients: all float arguments; which neurons enter and leave is a decision without gradient.
        Determinism: bitwise; ties of equal rank go to incumbents, then to the lowest neuron.
        """
        how = {"sparse_grad": wiring.sparse_grad, "backend": self.config.backend}
        drive = bio_kernels.weighted_rows(wiring.spread, pattern.idx, pattern.gate, **how) + stimulus.score
        normed = self.norm(states)
        message = self.exchange(normed, pattern, wiring) + self.perceive(normed, stimulus)
        states = self.cell(message.flatten(0, 1), states.flatten(0, 1)).view_as(states)
        target = (self.gate_head(states).squeeze(-1) + drive.gather(1, pattern.idx)).sigmoid()
        gate = pattern.gate + self.rate_logit.sigmoid() * (target - pattern.gate)
        pattern = pattern._replace(gate=torch.where(pattern.valid(), gate, 0))
        return self.turnover(states, pattern, drive, stimulus.drift, wiring, age)

    def perceive(self, normed: Tensor, stimulus: Stimulus) -> Tensor:
        """(B, K, D): what each slot finds when it looks at the encoded tokens; normed (B, K, D), the normed states."""
        samples, (k, d) = stimulus.key.shape[0], normed.shape[1:]
        query = self.look(normed).view(samples, -1, self.config.n_heads, d // self.config.n_heads).transpose(1, 2)
        found = F.scaled_dot_product_attention(query, stimulus.key, stimulus.value, attn_mask=stimulus.seen)
        return found.transpose(1, 2).reshape(-1, k, d)

    def exchange(self, normed: Tensor, pattern: ActivationPattern, wiring: Wiring) -> Tensor:
        """(B, K, D): what each active neuron receives from all of them, 0 in padding slots; see ``perceive``."""
        heads = self.qkv(normed).unflatten(-1, (3, self.config.n_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, K, D / H)
        message = bio_kernels.sparse_attention(
            q,
            k,
            v,
            pattern.idx,
            wiring.bias,
            gate=pattern.gate,
            count=pattern.count,
            sparse_grad=wiring.sparse_grad,
            backend=self.config.backend,
        )
        return message.transpose(1, 2).flatten(2)

    def turnover(
        self, states: Tensor, pattern: ActivationPattern, drive: Tensor, drift: Tensor, wiring: Wiring, age: int = 0
    ) -> tuple[Tensor, ActivationPattern]:
        """States and pattern after neurons have entered and left; as ``step``, with drive (B, N) and drift (B, D).

        A neuron under prune_threshold times the mean gate of its sample leaves, unless it is among the min_active
        strongest: relative to the mean, because training that lowers all gates together must not empty the pattern.
        A candidate over recruit_threshold enters. Both get harder with age (turnover_decay), and the pattern settles.
        If they are too many for the K slots the lowest ranks lose; an
        incumbent's rank is its gate + hysteresis, a newcomer's its gate. A NaN gate stays, and shows in the output.
        """
        config, (idx, gate, _, n) = self.config, pattern
        valid, how = pattern.valid(), {"sparse_grad": wiring.sparse_grad, "backend": config.backend}
        taken = torch.where(valid, idx, idx[:, :1])  # padding must not mask neuron 0
        drive = drive.scatter(1, taken, float("-inf"))
        new = bio_kernels.topk_gather(drive, wiring.signatures, config.recruits_per_step, **how)
        woken = new.gate.sigmoid()

        mild = config.turnover_decay**age
        weakest = config.prune_threshold * mild * gate.detach().sum(1, keepdim=True) / pattern.count.unsqueeze(1)
        bonus = torch.where(gate.detach() < weakest, _WEAK, config.hysteresis)
        incumbent = torch.where(valid, gate.detach() + bonus, float("-inf"))
        gates = torch.cat([gate, config.newcomer_scale * woken], 1)
        weak = woken.detach() <= 1 - (1 - config.recruit_threshold) * mild
        newcomer = torch.where(weak, float("-inf"), gates.detach()[:, idx.shape[1] :])
        slot, kept = survivors(torch.cat([incumbent, newcomer], 1), idx.shape[1], config.min_active)

        neuron = torch.where(kept, torch.cat([idx, new.idx], 1).gather(1, slot), n)
        neuron, order = neuron.sort(dim=1, stable=True)  # valid slots first, in ascending order of neuron
        slot, kept = slot.gather(1, order), neuron < n
        states = take_rows(torch.cat([states, new.rows + drift.unsqueeze(1)], 1), slot)
        gate = torch.where(kept, gates.gather(1, slot), 0)
        return states, ActivationPattern(torch.where(kept, neuron, 0), gate, kept.sum(1), n)

    def extra_repr(self) -> str:
        c = self.config
        return f"n_heads={c.n_heads}, final_sparsity={c.final_sparsity}, recruits_per_step={c.recruits_per_step}"


def survivors(rank: Tensor, k: int, min_active: int) -> tuple[Tensor, Tensor]:
    """The k highest ranks of each sample, highest first: (slot (B, k) int64, which of them stay (B, k) bool).

    Args: rank (B, M) float, M >= k: >= 0 = stays if there is room, negative = leaves unless among the min_active
        highest, -inf = nothing there. NaN counts as highest. Ties go to the lowest slot.
    """
    rank, slot = rank.sort(dim=1, descending=True, stable=True)
    rank, slot = rank[:, :k], slot[:, :k]
    among_first = torch.arange(k, device=rank.device) < min_active
    return slot, ~(rank < 0) | (among_first & (rank > float("-inf")))


def take_rows(rows: Tensor, slot: Tensor) -> Tensor:
    """rows[b, slot[b, j]]: (B, M, D), (B, K) int64 -> (B, K, D). Gradients: rows.

    As an embedding: whole rows are copied, and its gradient needs no atomics on a GPU; `torch.gather` took 6 times as
    long forward, and 2.6 times forward and backward together (B=4, M=160, K=128, D=256, float32, one CPU core).
    """
    b, m, d = rows.shape
    first = torch.arange(b, device=slot.device).unsqueeze(1) * m
    return F.embedding(slot + first, rows.reshape(b * m, d))
