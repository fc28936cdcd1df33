"""Every size and rate of a SPROUT, checked once, when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

CONNECTIONS = ("dense", "block_sparse")
BACKENDS = ("auto", "triton", "reference", "dense")
BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class SproutConfig:
    """Sizes and rates of a SPROUT.

    vocab_size: number of tokens; 256 for bytes.
    n_neurons: N, neurons in the pool.
    d_state: D, width of a neuron's state; a multiple of n_heads.
    n_interaction_steps: how often the active neurons exchange messages; 0 decodes the initial pattern.
    initial_sparsity: neurons active at the start, the same for every sample.
    final_sparsity: K, the most neurons that may be active in a sample; every pattern has this many slots.
    n_heads: heads of the encoder's and of the neurons' attention.
    n_encoder_layers: Transformer layers that read the tokens; 0: the neurons look at the embedded tokens themselves.
    conv_width: tokens that a causal convolution, one filter for each channel, joins before that; 1: none.
    max_seq_len: longest input in tokens.
    causal: tokens see earlier ones only; prefix mode and generation need it.
    dropout: fraction of the encoder's activations dropped in training.
    recruits_per_step: silent neurons that may enter in one step.
    recruit_threshold: a silent neuron enters when sigmoid(drive) is above it (a gate, dimensionless).
    newcomer_scale: a newcomer's gate is this fraction of sigmoid(drive).
    prune_threshold: a neuron leaves when its gate is below this fraction of the mean gate of its sample's active ones.
    hysteresis: bonus of an incumbent's gate over a newcomer's when they compete for a slot (a gate, dimensionless).
    turnover_decay: how a pattern hardens, a fraction per step: in step t (0, 1, ...) the pruning threshold is
        prune_threshold * turnover_decay^t, and a newcomer needs 1 - (1 - recruit_threshold) * turnover_decay^t.
    min_active: neurons that stay however weak they are.
    connection: "dense", one (N, N) matrix, or "block_sparse", a fixed number of stored blocks per block row.
    blocks_per_row, block_size: layout of the block-sparse matrix; without effect on a dense one.
    active_groups: groups of block_size neurons that a sample may use, chosen before its neurons, so that a step costs
        the same in a pool of any size (see ``sprout.paging``); needs "block_sparse". 0: all neurons are looked at.
    backend: which implementation of the operations to use, see bio_kernels.
    """

    vocab_size: int = 256
    n_neurons: int = 4096
    d_state: int = 256
    n_interaction_steps: int = 5
    initial_sparsity: int = 128
    final_sparsity: int = 256
    n_heads: int = 8
    n_encoder_layers: int = 2
    conv_width: int = 1
    max_seq_len: int = 512
    causal: bool = True
    dropout: float = 0.0
    recruits_per_step: int = 16
    recruit_threshold: float = 0.5
    newcomer_scale: float = 0.5
    prune_threshold: float = 0.7
    hysteresis: float = 0.1
    turnover_decay: float = 0.7
    min_active: int = 8
    connection: str = "dense"
    blocks_per_row: int = 8
    block_size: int = 32
    active_groups: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_neurons", "d_state", "n_heads", "conv_width", "max_seq_len"):
            self._check_int(name, 1)
        self._check_int("n_encoder_layers", 0)
        self._check_int("n_interaction_steps", 0)
        self._check_int("final_sparsity", 1, "n_neurons")
        self._check_int("initial_sparsity", 1, "final_sparsity")
        self._check_int("recruits_per_step", 1, "n_neurons")
        self._check_int("min_active", 1, "initial_sparsity")
        for name in ("dropout", "recruit_threshold", "prune_threshold"):
            self._check_float(name, "0 <= {0} < 1", lambda x: 0 <= x < 1)
        for name in ("newcomer_scale", "turnover_decay"):
            self._check_float(name, "0 < {0} <= 1", lambda x: 0 < x <= 1)
        self._check_float("hysteresis", "{0} >= 0 and finite", lambda x: x >= 0)
        self._check_choice("causal", (True, False))
        self._check_choice("connection", CONNECTIONS)
        self._check_choice("backend", BACKENDS)
        if self.d_state % self.n_heads:
            raise ValueError(f"d_state must be a multiple of n_heads={self.n_heads}, got {self.d_state}")
        if self.connection == "block_sparse":
            self._check_choice("block_size", BLOCK_SIZES)
            self._check_blocks()
        self._check_groups()

    def _check_int(self, name: str, low: int, high_name: str | None = None) -> None:
        value = getattr(self, name)
        high = None if high_name is None else getattr(self, high_name)
        allowed = f"an integer >= {low}" if high is None else f"an integer in {low}..{high_name}={high}"
        if type(value) is not int or value < low or (high is not None and value > high):
            raise ValueError(f"{name} must be {allowed}, got {value!r}")

    def _check_float(self, name: str, allowed: str, holds) -> None:
        value = getattr(self, name)
        if type(value) not in (int, float) or not isfinite(value) or not holds(value):
            raise ValueError(f"{name} must be a number with {allowed.format(name)}, got {value!r}")

    def _check_choice(self, name: str, allowed: tuple) -> None:
        value = getattr(self, name)
        if type(value) is not type(allowed[0]) or value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")

    def _check_blocks(self) -> None:
        if self.n_neurons % self.block_size:
            raise ValueError(f"n_neurons must be a multiple of block_size={self.block_size}, got {self.n_neurons}")
        rows = self.n_neurons // self.block_size
        if type(self.blocks_per_row) is not int or not 1 <= self.blocks_per_row <= rows:
            raise ValueError(
                f"blocks_per_row must be an integer in 1..n_neurons/block_size={rows}, got {self.blocks_per_row!r}"
            )

    def _check_groups(self) -> None:
        self._check_int("active_groups", 0)
        if self.active_groups == 0:
            return
        if self.connection != "block_sparse":
            raise ValueError(
                f"active_groups must be 0 unless connection is 'block_sparse', got {self.active_groups} with "
                f"connection={self.connection!r}"
            )
        p, groups = self.block_size, self.n_neurons // self.block_size
        needed = -(-max(self.final_sparsity, self.recruits_per_step) // p)
        if not needed <= self.active_groups <= groups:
            raise ValueError(
                f"active_groups must be 0 or an integer in {needed}..{groups}: groups of block_size={p} that hold "
                f"final_sparsity={self.final_sparsity} and recruits_per_step={self.recruits_per_step} neurons, of the "
                f"n_neurons/block_size groups of the pool; got {self.active_groups}"
            )
