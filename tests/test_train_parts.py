"""The parts of training, one by one: learning rate, optimizers, windows, evaluation, and the controls."""

import math
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from sprout import SproutConfig, data, hub
from sprout.gpt import GPT
from sprout.pattern import gate_change, jaccard
from sprout.train_config import OptionError, TrainConfig, check_scaled
from sprout.train_metrics import Evaluation, Learner, all_windows, evaluate, per_text, random_windows
from sprout.trainer import make_optimizers, schedule
from tests.sprout_models import small


def test_learning_rate_warms_up_and_decays():
    rates = [schedule(step, 20, 4) for step in range(20)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[12] == pytest.approx(0.55)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert 0.1 < rates[-1] < 0.12
    assert schedule(30, 20, 4) == pytest.approx(0.1)
    assert schedule(0, 5, 0) == 1.0


def test_optimizers_share_the_parameters_out():
    model = small()
    adamw, muon = make_optimizers(model, TrainConfig(optimizer="muon"))
    taken = [{id(p) for group in o.param_groups for p in group["params"]} for o in (adamw, muon)]
    assert taken[0] | taken[1] == {id(p) for p in model.parameters()}
    assert not taken[0] & taken[1]
    hidden = {name for name, p in model.named_parameters() if id(p) in taken[1]}
    assert {"decoder.join.weight", "encoder.w_in.weight", "encoder.layers.0.linear1.weight"} <= hidden
    rows = ("embedding", "position", "signatures", "strength", "readout", "head.", "gate_head")
    assert not [name for name in hidden if any(word in name for word in rows)]
    decayed = {id(p) for o in (adamw, muon) for g in o.param_groups if g["weight_decay"] for p in g["params"]}
    for name, p in model.named_parameters():
        table = any(word in name for word in rows) and "gate_head" not in name
        assert (id(p) in decayed) == (p.dim() >= 2 and not table), name
    (plain,) = make_optimizers(model, TrainConfig(lr=0.5))
    assert {g["highest_lr"] for g in plain.param_groups} == {0.5}
    assert {g["highest_lr"] for g in muon.param_groups} == {TrainConfig().muon_lr}


def test_windows():
    tokens = torch.arange(100)
    drawn = random_windows(tokens, 500, 7, torch.Generator().manual_seed(0))
    assert drawn.shape == (500, 8)
    assert (drawn.diff(dim=1) == 1).all()
    assert set(drawn[:, 0].tolist()) == set(range(93))
    for length in (2, 8, 9, 57, 100):
        batches = list(all_windows(tokens[:length], 3, 7))
        assert torch.cat([batch[:, 1:].flatten() for batch in batches]).tolist() == list(range(1, length))
        assert all(len(batch) <= 3 for batch in batches)


def test_evaluation_adds_up_batches_of_any_size():
    model = small(vocab_size=256).eval()
    tokens = data.encode(data.corpus()[:70])
    found, results = Evaluation.empty(96, torch.device("cpu")), []
    for number, batch in enumerate(all_windows(tokens, 2, 9)):
        results.append(Learner(model)(batch))
        found.add(results[-1], batch[:, 1:].numel(), number < 1)
    figures = found.figures(3)
    last = [result.history[-1] for result in results]
    counts = torch.cat([pattern.count for pattern in last]).double()
    assert figures["targets"] == len(counts) == 69
    assert figures["loss"] == pytest.approx(sum(r.language.item() * len(r.history[0].count) for r in results) / 69)
    assert figures["score"] == pytest.approx(results[0].language.item())
    assert figures["active_mean"] == pytest.approx(counts.mean().item())
    assert (figures["active_min"], figures["active_max"]) == (counts.min(), counts.max())
    for name, function in (("jaccard", jaccard), ("gate_change", gate_change)):
        each = torch.cat([function(*r.history[-2:]) for r in results]).double()
        assert figures[name] == pytest.approx(each.mean().item())
    dense = torch.cat([pattern.to_dense() for r in results for pattern in r.history])
    assert figures["used_share"] == pytest.approx((dense > 0).any(0).double().mean().item())


def test_bits_do_not_depend_on_how_the_text_is_cut_into_tokens():
    assert per_text(math.log(2), 8, "abcd") == {"bits_per_character": 2.0, "bits_per_byte": 2.0}
    assert per_text(math.log(2), 8, "éé") == {"bits_per_character": 4.0, "bits_per_byte": 2.0}


def test_the_gpt_is_as_large_as_the_one_it_is_compared_with():
    """4 layers, 4 heads, width 128, context 64: 12 d^2 a layer and the norms' weights, and the embeddings."""
    model = GPT(SproutConfig(vocab_size=256, d_state=128, n_heads=4, n_encoder_layers=4, max_seq_len=64))
    assert sum(p.numel() for p in model.parameters()) == 4 * (12 * 128**2 + 2 * 128) + 128 + (256 + 64) * 128
    assert not any(isinstance(module, nn.Linear) and module.bias is not None for module in model.modules())
    std = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    for name, value in std.items():
        wanted = 0.02 / 8**0.5 if "out_proj" in name or "linear2" in name else 0.02
        assert value == pytest.approx(wanted, rel=0.05), name
    assert Learner(model)(torch.randint(256, (8, 65))).loss.item() == pytest.approx(math.log(256), abs=0.1)


@pytest.mark.parametrize("kind", ["gpt", "encoder"])
def test_the_controls_see_no_later_token(kind):
    torch.manual_seed(0)
    model = hub.make_model(kind, SproutConfig(vocab_size=50, d_state=16, n_heads=2, max_seq_len=12))
    tokens = torch.randint(50, (2, 12))
    whole = model(tokens, all_positions=True)
    changed = tokens.clone()
    changed[:, 7:] = 0
    assert torch.equal(model(changed, all_positions=True)[:, :7], whole[:, :7])
    for length in (1, 5, 12):
        torch.testing.assert_close(model(tokens[:, :length]), whole[:, length - 1], rtol=1e-4, atol=1e-5)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, all_positions=True), whole, rtol=1e-4, atol=1e-5)


def test_a_wrapped_model_is_refused():
    """Its pool would not be seen, and the objective without it be another one."""
    model = small()
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        with pytest.raises(TypeError, match=r"model must be a BrainLikeSprout itself: in a .* its pool is not seen"):
            Learner(wrapped)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_mode_as_it_was(training):
    model = small(vocab_size=256).train(training)
    broken = iter([torch.zeros(1, 1, dtype=torch.int64)])
    with pytest.raises(ValueError, match="tokens must be"):
        evaluate(Learner(model), broken, 1, Accelerator(cpu=True))
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize(("optimizer", "groups"), [("adamw", False), ("muon", False), ("adamw", True)])
def test_half_precision_takes_one_optimizer(optimizer, groups):
    """What has more than one is refused, and nothing else."""
    pool = dict(n_neurons=1024, connection="block_sparse", block_size=16, blocks_per_row=2, active_groups=3)
    model = small(**pool if groups else {})
    config = TrainConfig(optimizer=optimizer, mixed_precision="fp16")
    if len(make_optimizers(model, config)) == 1:
        check_scaled(config, groups)
        return
    check_scaled(TrainConfig(optimizer=optimizer, mixed_precision="bf16"), groups)
    with pytest.raises(OptionError, match="--mixed_precision fp16 needs a single optimizer"):
        check_scaled(config, groups)
