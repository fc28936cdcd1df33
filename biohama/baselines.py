"""What BioHama is measured against: an LSTM, a GRU, and a decoder-only Transformer with four ways to know positions.

All are called as BioHama is: whole sequences, or step by step with a state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("lstm", "gru", "transformer")
POSITIONS = ("sinusoidal", "rope", "alibi", "nope")
DEFAULTS = {"lstm": (160, 1), "gru": (160, 1), "transformer": (64, 3)}  # (width, n_layers)
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class BaselineConfig:
    """Sizes of a baseline; the defaults have more than 1.5 times the parameters of a default BioHama.

    kind: "lstm", "gru" or "transformer".
    position: how a Transformer knows the order of tokens; without effect on the others.
        "sinusoidal": absolute waves added to the embedding (Vaswani et al. 2017, section 3.5);
        "rope": queries and keys turned by their position (Su et al. 2021, equation 34);
        "alibi": scores fall with the distance, a slope for each head (Press et al. 2021, section 3);
        "nope": by the causal mask alone (Kazemnejad et al. 2023).
    vocab_size: V.
    width: D, of embedding and hidden state; 0 stands for the kind's default, 160 or, of a Transformer, 64.
    n_layers: 0 stands for the kind's default, 1 or, of a Transformer, 3.
    n_heads: of a Transformer, divides the width (with "rope" into even parts); without effect on the others.
    max_len: longest sequence of a Transformer, in tokens; without effect on the others.
    """

    kind: str = "lstm"
    position: str = "rope"
    vocab_size: int = 101
    width: int = 0
    n_layers: int = 0
    n_heads: int = 4
    max_len: int = 2048

    def __post_init__(self) -> None:
        for name, allowed in (("kind", KINDS), ("position", POSITIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, low in (("vocab_size", 1), ("width", 0), ("n_layers", 0), ("n_heads", 1), ("max_len", 1)):
            if type(getattr(self, name)) is not int or getattr(self, name) < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {getattr(self, name)!r}")
        for name, default in zip(("width", "n_layers"), DEFAULTS[self.kind], strict=True):
            object.__setattr__(self, name, getattr(self, name) or default)
        if self.kind == "transformer":
            part = 2 * self.n_heads if self.position == "rope" else self.n_heads
            even = 2 if self.position == "sinusoidal" else 1
            if self.width % part or self.width % even:
                words = {"rope": "2 * n_heads", "sinusoidal": "n_heads and even"}.get(self.position, "n_heads")
                raise ValueError(
                    f"width must be a multiple of {words} with n_heads={self.n_heads} and position={self.position!r}, "
                    f"got {self.width}"
                )


class Baseline(nn.Module):
    """tokens -> embedding -> the kind's layers -> linear head; made from a BaselineConfig."""

    def __init__(self, config: BaselineConfig) -> None:
        if not isinstance(config, BaselineConfig):
            raise TypeError(f"config must be a BaselineConfig, got {type(config).__name__}")
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.core = Transformer(config) if config.kind == "transformer" else Recurrent(config)
        self.head = nn.Linear(config.width, config.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, V) logits, [:, t] those of what follows tokens[:, :t+1].

        Args: tokens (B, T) int64 in 0..V-1, T >= 1, and T <= max_len of a Transformer.
        Raises: TypeError, ValueError naming the argument. Gradients: every parameter.
        """
        self._check(tokens, 2)
        return self.head(self.core(self.embedding(tokens)))

    def start(self, batch_size: int) -> State:
        """The state before the first token, on the parameters' device. Raises: ValueError for batch_size < 1."""
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}")
        return self.core.start(self.embedding.weight.new_empty(batch_size, 0))

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """((B, V) logits, the next state) after one more token; ``forward`` in its recurrent form.

        Args: tokens (B,) int64 in 0..V-1; state of ``start`` or of the last step, which stays as it was.
        Raises: TypeError, ValueError naming the argument. Gradients: every parameter.
        """
        self._check(tokens, 1)
        hidden, state = self.core.step(self.embedding(tokens).unsqueeze(1), state)
        return self.head(hidden.squeeze(1)), state

    def _check(self, tokens: Tensor, dim: int) -> None:
        shape, vocab_size = "(B, T)" if dim == 2 else "(B,)", self.config.vocab_size
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
            got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"tokens must be {shape} int64, got {got}")
        if tokens.dim() != dim or 0 in tokens.shape:
            raise ValueError(f"tokens must be {shape} and not empty, got {tuple(tokens.shape)}")
        look = (
            tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        )  # elsewhere it would wait for the device
        if look and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            low, high = int(tokens.min()), int(tokens.max())
            raise ValueError(f"tokens must be in 0..vocab_size-1={vocab_size - 1}, got {low}..{high}")


class Recurrent(nn.Module):
    """torch's LSTM or GRU; the state is its own, (h, c) or (h,), each (n_layers, B, D)."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.gates = nn.LSTM if config.kind == "lstm" else nn.GRU
        self.layers = self.gates(config.width, config.width, config.n_layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[0]

    def start(self, like: Tensor) -> State:
        zeros = like.new_zeros(self.layers.num_layers, len(like), self.layers.hidden_size)
        return (zeros, zeros) if self.gates is nn.LSTM else (zeros,)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if self.gates is nn.LSTM:
            return self.layers(x, state)
        hidden, h = self.layers(x, state[0])
        return hidden, (h,)


class Transformer(nn.Module):
    """Pre-norm causal layers and a last LayerNorm. Source: Vaswani et al. 2017.

    The state holds the keys and values of the t tokens read so far: k_1, v_1, k_2, ... each (B, n_heads, t, Dh).
    """

    waves: Tensor

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.width)
        length = config.max_len if config.position == "sinusoidal" else 0
        self.register_buffer("waves", waves(length, config.width).flatten(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, self.start(x))[0]

    def start(self, like: Tensor) -> State:
        c = self.config
        empty = like.new_zeros(len(like), c.n_heads, 0, c.width // c.n_heads)
        return (empty,) * (2 * c.n_layers)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x (B, T, D) that follows what the state has read -> (hidden (B, T, D), the state with it)."""
        past, length = state[0].shape[2], x.shape[1]
        if past + length > self.config.max_len:
            raise ValueError(f"tokens must be at most max_len={self.config.max_len} long, got {past + length}")
        if self.config.position == "sinusoidal":
            x = x + self.waves[past : past + length]
        kept: list[Tensor] = []
        for layer, keys, values in zip(self.layers, state[::2], state[1::2], strict=True):
            x, *now = layer(x, keys, values)
            kept += now
        return self.norm(x), tuple(kept)


class Layer(nn.Module):
    """x + attention(LN x), then x + MLP(LN x), the MLP four times as wide with GELU."""

    turns: Tensor
    slopes: Tensor

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        d, self.config = config.width, config
        self.norm_1, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm_2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        length = config.max_len if config.position == "rope" else 0
        self.register_buffer("turns", waves(length, d // config.n_heads), persistent=False)
        self.register_buffer("slopes", alibi_slopes(config.n_heads), persistent=False)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) and the earlier keys and values (B, H, t, Dh) -> the next x, and all keys and values."""
        past = keys.shape[2]
        heads = self.qkv(self.norm_1(x)).unflatten(2, (3, self.config.n_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        if self.config.position == "rope":
            turns = self.turns[past : past + x.shape[1]]
            q, k = rotated(q, turns), rotated(k, turns)
        if past:
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(past, q))
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x)))), k, v

    def _mask(self, past: int, q: Tensor) -> Tensor:
        """(T, t + T) bool, or with ALiBi (H, T, t + T) added to the scores: each token sees itself and earlier ones."""
        t = torch.arange(past + q.shape[2], device=q.device)
        distance = t[past:, None] - t
        if self.config.position != "alibi":
            return distance >= 0
        fall = -self.slopes[:, None, None] * distance
        return fall.masked_fill(distance < 0, float("-inf")).to(q.dtype)


def waves(length: int, width: int) -> Tensor:
    """(length, 2, width / 2): sine and cosine of position * 10000^(-2 i / width), computed in float64."""
    speed = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * speed
    return torch.stack([angle.sin(), angle.cos()], 1).float()


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """x (..., T, Dh) with its coordinates i and i + Dh/2 turned, as a pair, by the angle i of turns (T, 2, Dh/2)."""
    sin, cos = turns.unbind(1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def alibi_slopes(n_heads: int) -> Tensor:
    """(n_heads,): 2^(-8 h / n_heads) for h = 1..n_heads, score lost for each token of distance."""
    return 2.0 ** (-8.0 * torch.arange(1, n_heads + 1) / n_heads)
