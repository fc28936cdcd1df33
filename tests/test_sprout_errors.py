"""What the configuration and the model refuse."""

import pytest
import torch

import sprout
from sprout import BrainLikeSprout, NeuronInteraction, SproutConfig
from tests.sprout_models import SMALL, small, some_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(initial_sparsity=200), "initial_sparsity must be an integer in 1..final_sparsity=20, got 200"),
        (dict(final_sparsity=97), "final_sparsity must be an integer in 1..n_neurons=96, got 97"),
        (dict(n_neurons=0), "n_neurons must be an integer >= 1, got 0"),
        (dict(n_neurons=True), "n_neurons must be an integer >= 1, got True"),
        (dict(n_interaction_steps=-1), "n_interaction_steps must be an integer >= 0, got -1"),
        (dict(vocab_size=1.5), "vocab_size must be an integer >= 1, got 1.5"),
        (dict(recruits_per_step=0), "recruits_per_step must be an integer in 1..n_neurons=96, got 0"),
        (dict(min_active=13), "min_active must be an integer in 1..initial_sparsity=12, got 13"),
        (dict(d_state=15), "d_state must be a multiple of n_heads=2, got 15"),
        (dict(prune_threshold=1.0), "prune_threshold must be a number with 0 <= prune_threshold < 1, got 1.0"),
        (dict(recruit_threshold=float("nan")), "recruit_threshold must be a number with 0 <= .* < 1, got nan"),
        (dict(newcomer_scale=0), "newcomer_scale must be a number with 0 < newcomer_scale <= 1, got 0"),
        (dict(hysteresis=float("inf")), "hysteresis must be a number with hysteresis >= 0 and finite, got inf"),
        (dict(dropout="0.1"), "dropout must be a number with 0 <= dropout < 1, got '0.1'"),
        (dict(connection="sparse"), "connection must be one of 'dense', 'block_sparse', got 'sparse'"),
        (dict(backend="cuda"), "backend must be one of 'auto', 'triton', 'reference', 'dense', got 'cuda'"),
        (dict(connection="block_sparse", block_size=24), "block_size must be one of 16, 32, 64, 128, got 24"),
        (dict(connection="block_sparse", block_size=64), "n_neurons must be a multiple of block_size=64, got 96"),
        (dict(connection="block_sparse", blocks_per_row=4), "blocks_per_row must be an integer in .*=3, got 4"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        SproutConfig(**{**SMALL, **changes})


def test_a_typo_gets_the_nearest_name():
    with pytest.raises(TypeError, match="unknown argument 'n_neuron'; did you mean 'n_neurons'"):
        sprout.create_brain_like_sprout(n_neuron=64)
    with pytest.raises(TypeError, match="unknown argument 'qqq'; allowed: vocab_size, n_neurons"):
        sprout.create_brain_like_sprout(qqq=64)


@pytest.mark.parametrize(
    ("tokens", "mask", "error", "message"),
    [
        (some_tokens().int(), None, TypeError, "tokens must be an int64 tensor, got torch.int32"),
        ([[1, 2]], None, TypeError, "tokens must be an int64 tensor, got list"),
        (some_tokens()[0], None, ValueError, r"tokens must be \(B, T\) .*max_seq_len=24, got \(9,\)"),
        (some_tokens(2, 25), None, ValueError, r"tokens must be .*max_seq_len=24, got \(2, 25\)"),
        (some_tokens()[:, :0], None, ValueError, r"tokens must be .* got \(3, 0\)"),
        (some_tokens()[:0], None, ValueError, r"tokens must be .* got \(0, 9\)"),
        (some_tokens() + 49, None, ValueError, r"tokens must be in 0..vocab_size-1=49, got \d+..\d+"),
        (some_tokens() - 50, None, ValueError, r"tokens must be in 0..vocab_size-1=49, got -\d+..-\d+"),
        (
            some_tokens(),
            torch.ones(3, 9),
            TypeError,
            "attention_mask must be a bool or integer tensor, got torch.float32",
        ),
        (some_tokens(), [1], TypeError, "attention_mask must be a bool or integer tensor, got list"),
        (some_tokens(), torch.ones(3, 8).bool(), ValueError, r"attention_mask must .*\(3, 9\), got \(3, 8\)"),
        (some_tokens(), torch.tensor([1, 0, 1])[:, None].expand(3, 9), ValueError, "got none in sample 1"),
    ],
)
def test_model_refuses(tokens, mask, error, message):
    with pytest.raises(error, match=message):
        small()(tokens, mask)


def test_analysis_refuses_a_bad_top_k():
    with pytest.raises(ValueError, match="top_k must be an integer >= 1, got 0"):
        small().analyze_activation(some_tokens(), top_k=0)


def test_parts_are_usable_alone():
    config = SproutConfig(**SMALL)
    pool, encoder = sprout.GlobalNeuronPool(config), sprout.InputToActivation(config)
    states, history = NeuronInteraction(config)(encoder(some_tokens(), pool), pool)
    assert sprout.OutputDecoder(config)(states, history[-1]).shape == (3, 50)
    assert isinstance(BrainLikeSprout(config), torch.nn.Module)
