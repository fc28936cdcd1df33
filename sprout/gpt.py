"""What SPROUT is measured against: a plain GPT, and SPROUT's own encoder without the pool.

Both take a SproutConfig, of which they read vocab_size, d_state, n_heads, n_encoder_layers, max_seq_len and dropout
(the encoder conv_width too), and are called as SPROUT is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SproutConfig
from .encoder import InputToActivation, check_tokens
from .pretrained import Pretrained


class GPT(Pretrained, nn.Module):
    """tokens (B, T) -> logits: token + position embedding, causal pre-norm layers, LayerNorm, the embedding transposed.

    torch's own layers with GELU and no biases in them; weights N(0, 0.02), those that end a residual branch divided by
    sqrt(2 n_encoder_layers). Source: Radford et al. 2019.
    """

    KIND = "gpt"

    def __init__(self, config: SproutConfig) -> None:
        super().__init__()
        if config.n_encoder_layers < 1:
            raise ValueError(f"n_encoder_layers must be an integer >= 1 for a GPT, got {config.n_encoder_layers}")
        self.config, d = config, config.d_state
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.position = nn.Embedding(config.max_seq_len, d)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                d, config.n_heads, 4 * d, config.dropout, F.gelu, batch_first=True, norm_first=True, bias=False
            )
            for _ in range(config.n_encoder_layers)
        )
        self.norm = nn.LayerNorm(d, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                ends_branch = name.endswith(("out_proj.weight", "linear2.weight"))
                nn.init.normal_(weight, std=0.02 * ((2 * config.n_encoder_layers) ** -0.5 if ends_branch else 1))

    def features(self, tokens: Tensor, *, all_positions: bool = False) -> Tensor:
        """What the head reads: (B, D), of the last token; with all_positions (B, T, D)."""
        check_tokens(tokens, None, self.config)
        h = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu(1)
        for layer in self.layers:
            h = layer(h, src_mask=later, is_causal=True)
        return self.norm(h if all_positions else h[:, -1])

    def forward(self, tokens: Tensor, *, all_positions: bool = False) -> Tensor:
        """Logits of what follows the input, or each of its prefixes.

        Args: tokens (B, T) int64 in 0..vocab_size-1, 1 <= T <= max_seq_len.
        Returns: (B, V); with all_positions (B, T, V), [:, t] the logits of tokens[:, :t+1].
        Raises: TypeError, ValueError as ``check_tokens`` does. Gradients: every parameter.
        Determinism: bitwise on a CPU.
        """
        return F.linear(self.features(tokens, all_positions=all_positions), self.embedding.weight)


class EncoderOnly(Pretrained, nn.Module):
    """SPROUT with the pool taken out: tokens -> InputToActivation.read -> a linear head on z."""

    KIND = "encoder"

    def __init__(self, config: SproutConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = InputToActivation(config)
        del self.encoder.w_in  # it speaks to the pool alone
        self.head = nn.Linear(config.d_state, config.vocab_size)

    def forward(self, tokens: Tensor, *, all_positions: bool = False) -> Tensor:
        """Logits; arguments, shapes, errors and gradients as in ``GPT.forward``."""
        return self.head(self.encoder.read(tokens, all_positions=all_positions))
