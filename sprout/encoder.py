"""From tokens to the first pattern: a Transformer reads the input, and the neurons it resembles wake up."""

from __future__ import annotations

from typing import NamedTuple

import bio_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SproutConfig
from .pattern import ActivationPattern
from .pool import GlobalNeuronPool


class Activation(NamedTuple):
    """What the input wakes up in the pool.

    pattern: the initial pattern, K slots of which initial_sparsity are in use.
    states: (B, K, D), states of the active neurons; padding slots hold finite values without meaning.
    score: (B, N), how well the input matches each neuron.
    drift: (B, D), W_in z, what the input adds to the signature of every neuron that wakes up.
    """

    pattern: ActivationPattern
    states: Tensor
    score: Tensor
    drift: Tensor


class InputToActivation(nn.Module):
    """tokens (B, T) -> Activation: embedding, Transformer, attention pooling to z, the neurons nearest to z.

    z = LayerNorm(sum_t softmax_t(query . h_t) h_t);  score_n = z . signature_n / sqrt(D) + threshold_n;
    the initial_sparsity highest scores are active with gate = sigmoid(score) and state = signature + W_in z.
    """

    def __init__(self, config: SproutConfig) -> None:
        super().__init__()
        self.config, d = config, config.d_state
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.position = nn.Embedding(config.max_seq_len, d)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                d, config.n_heads, 4 * d, config.dropout, F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(config.n_encoder_layers)
        )
        self.query = nn.Linear(d, 1, bias=False)
        self.norm = nn.LayerNorm(d)
        self.w_in = nn.Linear(d, d, bias=False)

    def read(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The input as one vector z.

        Args: tokens (B, T) int64 in 0..vocab_size-1, 1 <= T <= max_seq_len; attention_mask (B, T) bool or integer,
            nonzero for tokens, 0 for padding on either side; a token's position counts the tokens before it.
        Returns: z (B, D). Raises: TypeError, ValueError as ``check_tokens`` does. Gradients: every parameter read.
        """
        check_tokens(tokens, attention_mask, self.config)
        real = None if attention_mask is None else attention_mask != 0
        if real is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            positions = (real.long().cumsum(1) - 1).clamp(min=0)
        h = self.embedding(tokens) + self.position(positions)
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=None if real is None else ~real)
        weight = self.query(h).squeeze(-1)
        if real is not None:  # the lowest finite number, not -inf: softmax of a row without tokens stays finite
            weight = weight.masked_fill(~real, torch.finfo(weight.dtype).min)
        return self.norm((weight.softmax(1).unsqueeze(1) @ h).squeeze(1))

    def forward(self, tokens: Tensor, pool: GlobalNeuronPool, attention_mask: Tensor | None = None) -> Activation:
        """What the tokens wake up in the pool; arguments and errors as in ``read``."""
        config = self.config
        z = self.read(tokens, attention_mask)
        score, drift = pool.score(z), self.w_in(z)
        first = bio_kernels.topk_gather(score, pool.neuron_signatures, config.initial_sparsity, backend=config.backend)
        padding = config.final_sparsity - config.initial_sparsity
        pattern = ActivationPattern(
            F.pad(first.idx, (0, padding)),
            F.pad(first.gate.sigmoid(), (0, padding)),
            torch.full_like(first.idx[:, 0], config.initial_sparsity),
            config.n_neurons,
        )
        states = F.pad(first.rows + drift.unsqueeze(1), (0, 0, 0, padding))
        return Activation(pattern, states, score, drift)

    def extra_repr(self) -> str:
        return f"initial_sparsity={self.config.initial_sparsity}, max_seq_len={self.config.max_seq_len}"


def check_tokens(tokens: Tensor, attention_mask: Tensor | None, config: SproutConfig) -> None:
    """Refuses what the encoder cannot read, naming the argument, what was given and what is allowed.

    Raises: TypeError for a wrong dtype; ValueError for a wrong shape, and, outside torch.compile and on CPU tensors
        (elsewhere it would wait for the device), for tokens outside the vocabulary and rows without any token.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be an int64 tensor, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
    if tokens.dim() != 2 or 0 in tokens.shape or tokens.shape[1] > config.max_seq_len:
        raise ValueError(
            f"tokens must be (B, T) with B >= 1 and T in 1..max_seq_len={config.max_seq_len}, got {tuple(tokens.shape)}"
        )
    look = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
    if look and not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size:
        raise ValueError(
            f"tokens must be in 0..vocab_size-1={config.vocab_size - 1}, got {int(tokens.min())}..{int(tokens.max())}"
        )
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point() or attention_mask.is_complex():
        got = getattr(attention_mask, "dtype", type(attention_mask).__name__)
        raise TypeError(f"attention_mask must be a bool or integer tensor, got {got}")
    if attention_mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask must have the shape of tokens {tuple(tokens.shape)}, got {tuple(attention_mask.shape)}"
        )
    if look and not bool((attention_mask != 0).any(1).all()):
        empty = int((attention_mask != 0).any(1).long().argmin())
        raise ValueError(f"attention_mask must keep at least one token of every sample, got none in sample {empty}")
