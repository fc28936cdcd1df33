"""From tokens to the first pattern: a Transformer reads the input, and the neurons it resembles wake up."""

from __future__ import annotations

from typing import NamedTuple

import bio_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SproutConfig
from .paging import Page
from .pattern import ActivationPattern
from .pool import GlobalNeuronPool


class Activation(NamedTuple):
    """What the input wakes up in the pool.

    pattern: the initial pattern, K slots of which initial_sparsity are in use.
    states: (B, K, D), states of the active neurons; padding slots hold finite values without meaning.
    score: (B, N), how well the input matches each neuron; in a pool with groups (B, n), of the neurons of the page.
    drift: (B, D), W_in z, what the input adds to the signature of every neuron that wakes up.
    tokens: (S, T, D), the encoded tokens, which the active neurons look at; B = S * G, pattern g of sample s in row
        s * G + g, G = T in prefix mode and else 1.
    hidden: (G, T) or (S, G, T) bool, which tokens a pattern's neurons may not see; None: none.
    page: the part of a pool with groups that the batch uses; None: all of it.
    """

    pattern: ActivationPattern
    states: Tensor
    score: Tensor
    drift: Tensor
    tokens: Tensor
    hidden: Tensor | None
    page: Page | None = None


class InputToActivation(nn.Module):
    """tokens (B, T) -> Activation: embedding, convolution, Transformer, pooling to z, the neurons nearest to z.

    z = LayerNorm(h_e + pooled_e), e the last token and pooled = multi-head attention from h_e to every h;
    score_n = z . signature_n / sqrt(D) + threshold_n;
    the initial_sparsity highest scores are active with gate = sigmoid(score) and state = signature + W_in z.
    With config.causal no token sees a later one, so that all prefixes can be read at once, each as if alone.
    The last token asks, because where it stands matters most for what comes next.
    """

    def __init__(self, config: SproutConfig) -> None:
        super().__init__()
        self.config, d = config, config.d_state
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.position = nn.Embedding(config.max_seq_len, d)
        self.joined = nn.Conv1d(d, d, config.conv_width, groups=d) if config.conv_width > 1 else None
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                d, config.n_heads, 4 * d, config.dropout, F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(config.n_encoder_layers)
        )
        self.pooling = nn.MultiheadAttention(d, config.n_heads, batch_first=True, bias=False)
        self.norm = nn.LayerNorm(d)
        self.w_in = nn.Linear(d, d, bias=False)

    def read(self, tokens: Tensor, attention_mask: Tensor | None = None, *, all_positions: bool = False) -> Tensor:
        """The input as one vector z, or every prefix of it as one.

        Args: tokens (B, T) int64 in 0..vocab_size-1, 1 <= T <= max_seq_len; attention_mask (B, T) bool or integer,
            nonzero for tokens, 0 for padding on either side; a token's position counts the tokens before it;
            all_positions, needs config.causal.
        Returns: z (B, D); with all_positions (B, T, D), [:, t] the z of tokens[:, :t+1], without meaning at padding.
        Raises: TypeError, ValueError as ``check_tokens`` does. Gradients: every parameter read.
        """
        z = self.encode(tokens, attention_mask, all_positions=all_positions)[0]
        return z if all_positions else z.squeeze(1)

    def encode(
        self, tokens: Tensor, attention_mask: Tensor | None = None, *, all_positions: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """z (B, G, D), the encoded tokens (B, T, D), and which of them are hidden; see ``read`` and ``Activation``."""
        check_tokens(tokens, attention_mask, self.config, all_positions)
        real = None if attention_mask is None else attention_mask != 0
        if real is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            positions = (real.long().cumsum(1) - 1).clamp(min=0)
        h = self._join(self.embedding(tokens), real) + self.position(positions)
        hidden = self._hidden(tokens.shape[1], real, tokens.device)
        for layer in self.layers:
            h = layer(h, src_mask=self._per_head(hidden))
        asks = h
        if not all_positions:  # the last token of each sample
            # counted anew: positions, clamped, do not tell padding before a single token from it
            last = torch.full_like(tokens[:, 0], -1) if real is None else real.long().cumsum(1).argmax(1)
            asks = h[torch.arange(len(tokens), device=tokens.device), last].unsqueeze(1)
            hidden = None if real is None else ~real.unsqueeze(1)
        pooled = self.pooling(asks, h, h, attn_mask=self._per_head(hidden), need_weights=False)[0]
        return self.norm(asks + pooled), h, hidden

    def _join(self, x: Tensor, real: Tensor | None) -> Tensor:
        """x (B, T, D) + a convolution over each token and the conv_width - 1 before it, padding (~real) as zeros."""
        if self.joined is None:
            return x
        seen = x if real is None else x * real.unsqueeze(-1)
        return x + self.joined(F.pad(seen.transpose(1, 2), (self.config.conv_width - 1, 0))).transpose(1, 2)

    def _hidden(self, length: int, real: Tensor | None, device: torch.device) -> Tensor | None:
        """Which tokens (last axis) a token may not see: (T, T) or (B, T, T); each sees itself, also as padding."""
        later = None
        if self.config.causal:
            later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        if real is None:
            return later
        hidden = ~real.unsqueeze(1) & ~torch.eye(length, dtype=torch.bool, device=device)
        return hidden if later is None else hidden | later

    def _per_head(self, hidden: Tensor | None) -> Tensor | None:
        """The mask as torch's layers take it: one for all, or one for each sample and head."""
        if hidden is None or hidden.dim() == 2:
            return hidden
        return hidden.repeat_interleave(self.config.n_heads, 0)

    def forward(
        self,
        tokens: Tensor,
        pool: GlobalNeuronPool,
        attention_mask: Tensor | None = None,
        *,
        all_positions: bool = False,
    ) -> Activation:
        """What the tokens wake up in the pool; arguments and errors as in ``read``.

        Returns: an Activation of B samples; with all_positions of B * T, prefix t of sample b in row b * T + t.
        """
        config = self.config
        z, encoded, hidden = self.encode(tokens, attention_mask, all_positions=all_positions)
        z = z.flatten(0, 1)
        page, drift = pool.page(z) if config.active_groups else None, self.w_in(z)
        score, signatures = (pool.score(z), pool.neuron_signatures) if page is None else (page.score, page.signatures)
        first = bio_kernels.topk_gather(score, signatures, config.initial_sparsity, backend=config.backend)
        padding = config.final_sparsity - config.initial_sparsity
        pattern = ActivationPattern(
            F.pad(first.idx, (0, padding)),
            F.pad(first.gate.sigmoid(), (0, padding)),
            torch.full_like(first.idx[:, 0], config.initial_sparsity),
            len(signatures),
        )
        pattern = pattern if page is None else page.globalise(pattern)
        states = F.pad(first.rows + drift.unsqueeze(1), (0, 0, 0, padding))
        return Activation(pattern, states, score, drift, encoded, hidden, page)

    def extra_repr(self) -> str:
        return f"initial_sparsity={self.config.initial_sparsity}, max_seq_len={self.config.max_seq_len}"


def check_tokens(
    tokens: Tensor, attention_mask: Tensor | None, config: SproutConfig, all_positions: bool = False
) -> None:
    """Refuses what the encoder cannot read, naming the argument, what was given and what is allowed.

    Raises: TypeError for a wrong dtype; ValueError for a wrong shape, and, outside torch.compile and on CPU tensors
        (elsewhere it would wait for the device), for tokens outside the vocabulary and rows without any token.
    """
    if all_positions and not config.causal:
        raise ValueError("all_positions=True needs a model with causal=True: here every token sees the later ones")
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
