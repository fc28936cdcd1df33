"""Small SPROUT models, tokens and patterns that the tests of the model share."""

import torch

import sprout
from sprout import ActivationPattern

SMALL = dict(
    vocab_size=50,
    n_neurons=96,
    d_state=16,
    n_interaction_steps=3,
    initial_sparsity=12,
    final_sparsity=20,
    n_heads=2,
    n_encoder_layers=1,
    max_seq_len=24,
    recruits_per_step=6,
    min_active=4,
)
BLOCKS = dict(connection="block_sparse", block_size=16, blocks_per_row=2)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return sprout.create_brain_like_sprout(**{**SMALL, **changes})


def wired(model, seed=1):
    """The same model with connections that matter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        strength = model.pool.connection_strength
        (strength if isinstance(strength, torch.Tensor) else strength.blocks).normal_(0, 0.3)
    return model


def trained_like(kind=(), **changes):
    """A model whose weights are far from those at the start, on the reference."""
    model = wired(small(backend="reference", **dict(kind), **changes))
    torch.manual_seed(4)
    with torch.no_grad():
        model.encoder.norm.weight.normal_(1.0, 0.5)
        model.encoder.norm.bias.normal_(0.0, 0.5)
        model.pool.threshold.normal_(-1.0, 1.0)
    return model


def some_tokens(batch=3, length=9, seed=2):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


def pattern_of(idx, gate, n=10):
    """A pattern from lists of different lengths."""
    slots = max(map(len, idx)) + 1

    def pad(rows, dtype):
        return torch.tensor([row + [0] * (slots - len(row)) for row in rows], dtype=dtype)

    return ActivationPattern(pad(idx, torch.int64), pad(gate, torch.float64), torch.tensor([len(i) for i in idx]), n)
