"""The pool: what all samples share about the neurons."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import bio_kernels
import torch
from bio_kernels import BlockSparse
from torch import Tensor, nn

from .config import SproutConfig
from .paging import Page, page_in
from .sharded_pool import ShardedBlocks, refuse_shards

# Of the variance of a neuron's signature, what its group has in common: the more, the better a group's score tells who
# of it would wake (recall 0.99 with 32 of 128 groups, docs/scaling.md). Other shares have not been compared.
GROUP_SHARE = 0.7


class Wiring(NamedTuple):
    """The pool as one interaction step uses it; each use may be given an alias of its own.

    signatures: (N, D).
    bias, spread: the connection strength, (N, N) or BlockSparse, for the attention and for the drive.
    sparse_grad: their gradients come as sparse tensors, as the aliases of bio_kernels.shared_table take them.
    """

    signatures: Tensor
    bias: Tensor | BlockSparse
    spread: Tensor | BlockSparse
    sparse_grad: bool = False


class GlobalNeuronPool(nn.Module):
    """N neurons: what each responds to, how easily, and how they are connected.

    neuron_signatures: (N, D), what a neuron responds to and the state it wakes up with; standard normal at the start.
    threshold: (N,), added to the score, so a higher one means more excitable; at the start such that the weakest
        neuron of an initial pattern has a gate of about one half, far from saturation.
    connection_strength: (N, N) or BlockSparse, [pre, post]: a row holds the outgoing synapses of one neuron; zero at
        the start, so that an untrained connection neither helps nor hinders.
    group_signatures (G, D), group_threshold (G,): with config.active_groups, what is added to signature and threshold
        of each neuron of a group, G = N / block_size; signature and group's together are standard normal at the start.
        Of the connections every group then has those within itself: its members often wake together.
    """

    def __init__(self, config: SproutConfig) -> None:
        super().__init__()
        self.config = config
        n, d = config.n_neurons, config.d_state
        # Scores are standard normal at the start: the quantile is where the top initial_sparsity of N begin.
        share = min(config.initial_sparsity / n, 0.5)
        self.neuron_signatures = nn.Parameter(torch.randn(n, d))
        self.threshold = nn.Parameter(torch.full((n,), NormalDist().inv_cdf(share)))
        if config.connection == "dense":
            self.connection_strength = nn.Parameter(torch.zeros(n, n))
        else:
            self.connection_strength = bio_kernels.BlockSparse.random(
                n, blocks_per_row=config.blocks_per_row, block_size=config.block_size, std=0.0
            )
        if config.active_groups:
            self._make_groups(n // config.block_size, d)

    def _make_groups(self, groups: int, d: int) -> None:
        self.group_signatures = nn.Parameter(torch.randn(groups, d) * GROUP_SHARE**0.5)
        self.group_threshold = nn.Parameter(torch.zeros(groups))
        strength = self.connection_strength
        assert isinstance(strength, BlockSparse), "SproutConfig refuses groups without blocks"
        with torch.no_grad():
            self.neuron_signatures.mul_((1 - GROUP_SHARE) ** 0.5)
            # each block row has one column in each of blocks_per_row ranges: that of the diagonal moves onto it
            cols, own = strength.cols.view(groups, -1), torch.arange(groups)
            edges = torch.arange(1, cols.shape[1]) * groups // cols.shape[1]
            cols[own, torch.searchsorted(edges, own, right=True)] = own.to(cols.dtype)

    def score(self, z: Tensor) -> Tensor:
        """How well the input matches each neuron: z . signature_n / sqrt(D) + threshold_n.

        Args: z (B, D), the dtype of the pool. Returns: (B, N), in a pool with groups those of all of them, for which
            a model never asks. Gradients: z, neuron_signatures, threshold, and those of the groups.
        """
        if self.config.active_groups:
            refuse_shards(self, "score")
        score = torch.addmm(self.threshold, z * z.shape[1] ** -0.5, self.neuron_signatures.t())
        if not self.config.active_groups:
            return score
        return (score.unflatten(1, (-1, self.config.block_size)) + self.group_score(z)[..., None]).flatten(1)

    def group_score(self, z: Tensor) -> Tensor:
        """(B, G): z . group_signature / sqrt(D) + group_threshold; z (B, D). Gradients: all three."""
        return torch.addmm(self.group_threshold, z * z.shape[1] ** -0.5, self.group_signatures.t())

    def page(self, z: Tensor) -> Page:
        """The groups that z (B, D) chooses, as a small pool; see ``paging.page_in``. Needs config.active_groups."""
        tables = (self.neuron_signatures, self.threshold, self.group_signatures, self.group_threshold)
        strength = self.connection_strength
        assert isinstance(strength, (BlockSparse, ShardedBlocks)), "SproutConfig refuses groups without blocks"
        return page_in(z, self.group_score(z), tables, strength, self.config)

    @torch.no_grad()
    def waken(self, silent: Tensor, *, rate: float) -> None:
        """Makes silent neurons more excitable, in place: threshold += rate. Call it after the optimizer's step.

        Homeostasis: a neuron that stays silent responds ever more easily, until it does. One that was just grown sleeps
        about twice the norm of a signature below the others, and takes that over rate calls. In a pool with groups one
        that is silent as a whole becomes easier to choose; in the others it is their silent neurons.
        Args: silent (N,) bool, as ``silent_neurons`` gives it; rate > 0 and finite, the unit of a score per call.
        Raises: ValueError. Gradients: none. Determinism: exact. Source: Turrigiano 2008.
        """
        refuse_shards(self, "waken")
        if silent.dtype != torch.bool or silent.shape != self.threshold.shape:
            n = len(self.threshold)
            raise ValueError(f"silent must be (N,) = ({n},) bool, got {silent.dtype} of shape {tuple(silent.shape)}")
        if not 0 < rate < float("inf"):
            raise ValueError(f"rate must be > 0 and finite, got {rate}")
        if self.config.active_groups:
            asleep = silent.view(-1, self.config.block_size).all(1, keepdim=True)
            self.group_threshold.add_(asleep.squeeze(1).to(self.group_threshold), alpha=rate)
            silent = (silent.view(len(asleep), -1) & ~asleep).flatten()
        self.threshold.add_(silent.to(self.threshold), alpha=rate)

    def wiring(self, n_steps: int, n_slots: int) -> list[Wiring]:
        """The pool for each of n_steps interaction steps of n_slots = B * K slots.

        A dense matrix is used twice a step. Where the slots are fewer than its rows its gradients stay as sparse as the
        activity until they are summed, once; otherwise, and under torch.compile, each use makes a whole one.
        """
        signatures, strength = self.neuron_signatures, self.connection_strength
        if isinstance(strength, BlockSparse) or torch.compiler.is_compiling() or n_slots > len(signatures):
            return [Wiring(signatures, strength, strength)] * n_steps
        uses = max(n_steps, 1)
        strengths = bio_kernels.shared_table(strength, 2 * uses)
        tables = bio_kernels.shared_table(signatures, uses)
        return [Wiring(tables[i], strengths[2 * i], strengths[2 * i + 1], True) for i in range(n_steps)]

    def extra_repr(self) -> str:
        n, d = self.config.n_neurons, self.config.d_state
        groups = f", active_groups={self.config.active_groups}" if self.config.active_groups else ""
        return f"n_neurons={n}, d_state={d}, connection={type(self.connection_strength).__name__}{groups}"
