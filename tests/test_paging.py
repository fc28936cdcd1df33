"""Paging: a pool in groups is the flat pool where all are chosen, and costs what is chosen where few are."""

import copy

import pytest
import torch

from sprout import SproutConfig, create_brain_like_sprout
from sprout.analysis import selection_recall
from sprout.objective import balance_loss, next_token
from sprout.paging import GroupedScore, page_index, sparse_rows
from sprout.sampling import generate
from tests.sprout_models import SMALL, pattern_of, small, some_tokens, wired

GROUPED = dict(connection="block_sparse", block_size=16, blocks_per_row=3, n_neurons=192)
SPARSE = {"pool.neuron_signatures", "pool.threshold", "pool.connection_strength.blocks", "decoder.readout"}


def grouped(active_groups=3, seed=0, **changes):
    """12 groups of 16 neurons, of which a sample may use some; with thresholds and connections that matter."""
    model = wired(small(seed, **{**GROUPED, "active_groups": active_groups, **changes})).double()
    with torch.no_grad():
        model.pool.threshold.add_(0.3 * torch.randn_like(model.pool.threshold))
        model.pool.group_threshold.normal_(0, 0.3)
    return model


def flattened(model):
    """The flat model that a model with groups is when all are chosen: signatures and thresholds summed."""
    pool, p = model.pool, model.config.block_size
    flat = small(**{**GROUPED, "n_neurons": model.config.n_neurons}).double()
    state = {name: value.clone() for name, value in model.state_dict().items() if "group_" not in name}
    state["pool.neuron_signatures"] += pool.group_signatures.detach().repeat_interleave(p, 0)
    state["pool.threshold"] += pool.group_threshold.detach().repeat_interleave(p)
    flat.load_state_dict(state)
    return flat


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("prefix", [False, True])
def test_with_all_groups_it_is_the_flat_pool(prefix):
    model, tokens = grouped(12), some_tokens(3, 7)
    flat = flattened(model)
    ours, theirs = (m(tokens, all_positions=prefix) for m in (model, flat))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    for a, b in zip(model.settle(tokens).history, flat.settle(tokens).history, strict=True):
        assert torch.equal(a.idx, b.idx)
        assert a.n_neurons == 192
    grads, expected = (gradients(m, out.logsumexp(-1).sum()) for m, out in ((model, ours), (flat, theirs)))
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name].to_dense(), grad, rtol=0, atol=1e-10, msg=name)
    of_members = expected["pool.neuron_signatures"].unflatten(0, (12, 16)).sum(1)
    torch.testing.assert_close(grads["pool.group_signatures"], of_members, rtol=0, atol=1e-10)
    of_members = expected["pool.threshold"].unflatten(0, (12, 16)).sum(1)
    torch.testing.assert_close(grads["pool.group_threshold"], of_members, rtol=0, atol=1e-10)


def test_scores_of_all_neurons_are_those_of_the_flat_pool():
    model = grouped()
    z = model.encoder.read(some_tokens())
    torch.testing.assert_close(model.pool.score(z), flattened(model).pool.score(z), rtol=0, atol=1e-12)
    page = model.pool.page(z)
    neuron = (page.groups[:, None] * 16 + torch.arange(16)).flatten()
    torch.testing.assert_close(page.scores.member, model.pool.score(z)[:, neuron], rtol=0, atol=1e-12)


@pytest.mark.parametrize("active_groups", [3, 24])
def test_a_page_holds_the_chosen_groups_and_the_blocks_between_them(active_groups):
    model = grouped(active_groups, n_neurons=1024, blocks_per_row=4)  # of 64 groups
    z = model.encoder.read(some_tokens(4))
    page = model.pool.page(z)
    chosen = model.pool.group_score(z).topk(active_groups).indices.sort(1).values
    assert torch.equal(page.groups, chosen.unique())
    assert len(page.groups) < 64
    own = (page.groups == chosen[:, :, None]).any(1).repeat_interleave(16, 1)
    assert torch.equal(page.score > float("-inf"), own)
    neuron = (page.groups[:, None] * 16 + torch.arange(16)).flatten()
    whole = model.pool.connection_strength.to_dense()
    assert torch.equal(page.strength.to_dense(), whole[neuron][:, neuron])
    type(page.strength)(page.strength.blocks, page.strength.row_offsets, page.strength.cols)  # a layout that is checked
    assert (whole.unflatten(0, (64, 16)).unflatten(2, (64, 16))[range(64), :, range(64)] != 0).all(), "the diagonal"


def test_only_chosen_groups_are_ever_active():
    model, tokens = grouped(2), some_tokens(8)
    chosen = model.pool.group_score(model.encoder.read(tokens)).topk(2).indices
    for pattern in model.settle(tokens).history:
        for b, (idx, count) in enumerate(zip(pattern.idx, pattern.count.tolist(), strict=True)):
            assert set((idx[:count] // 16).tolist()) <= set(chosen[b].tolist())
            assert (idx[:count].diff() > 0).all()
            assert not idx[count:].any()
    assert (chosen != 0).all(1).any(), "padding and group 0 are told apart"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_does_not_depend_on_its_batch(dtype):
    model, tokens = grouped().to(dtype), some_tokens(6)
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    together = model(tokens)
    for b in range(6):
        torch.testing.assert_close(model(tokens[b : b + 1])[0], together[b], rtol=0, atol=atol)
    others = torch.cat([tokens[:2], some_tokens(4, seed=8)])
    torch.testing.assert_close(model(others)[:2], together[:2], rtol=0, atol=atol)
    # and no gradient comes from another sample
    alone = gradients(model, model(tokens[:1]).logsumexp(1).sum())
    first = gradients(model, model(tokens)[:1].logsumexp(1).sum())
    for name, grad in alone.items():
        torch.testing.assert_close(first[name].to_dense(), grad.to_dense(), rtol=0, atol=10 * atol, msg=name)


def test_prefixes_are_those_alone_and_see_nothing_later():
    model, tokens = grouped().eval(), some_tokens(2, 6)
    logits = model(tokens, all_positions=True)
    for t in range(6):
        torch.testing.assert_close(logits[:, t], model(tokens[:, : t + 1]), rtol=0, atol=1e-10)
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 50
    after = model(changed, all_positions=True)
    torch.testing.assert_close(after[:, :4], logits[:, :4], rtol=0, atol=1e-11)
    assert not torch.isclose(after[:, 4:], logits[:, 4:]).all(-1).any()


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_masked(left):
    model, tokens, junk = grouped().eval(), some_tokens(1, 6), some_tokens(1, 3, seed=3)
    padded = torch.cat([junk, tokens] if left else [tokens, junk], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6 if left else [1] * 6 + [0] * 3])
    torch.testing.assert_close(model(padded, mask), model(tokens), rtol=0, atol=1e-10)


def test_gradients_of_the_tables_hold_only_what_was_paged_in():
    model, tokens = grouped(2, n_neurons=1024), some_tokens(2)
    page = model.pool.page(model.encoder.read(tokens))
    settled = model.settle(tokens)
    grads = gradients(model, model.decoder(settled.states, settled.history[-1]).logsumexp(1).sum())
    assert {name for name, grad in grads.items() if grad.layout == torch.sparse_coo} == SPARSE
    for name in SPARSE:
        assert grads[name].is_coalesced(), name
        assert (grads[name].indices()[0].diff() > 0).all(), f"{name}: ascending, without repeats"
        assert grads[name]._values().any(), name
    neuron = (page.groups[:, None] * 16 + torch.arange(16)).flatten()
    assert torch.equal(grads["pool.neuron_signatures"].indices()[0], neuron)
    last = settled.history[-1]
    assert torch.equal(grads["decoder.readout"].indices()[0], last.idx[last.valid()].unique())
    assert len(grads["pool.connection_strength.blocks"].indices()[0]) == len(page.strength.blocks)
    assert all(grad.isfinite().all() for name, grad in grads.items() if name not in SPARSE)


def test_every_parameter_has_a_gradient_and_runs_repeat_bitwise():
    first, again = (
        gradients(m, next_token(m, some_tokens(4, 9), balance=0.1, settling=0.1).loss) for m in (grouped(), grouped())
    )
    for name, grad in first.items():
        assert grad.to_dense().any(), name
        assert torch.equal(grad.to_dense(), again[name].to_dense()), name


def test_dense_backend_agrees():
    model, dense = grouped(), grouped(backend="dense")
    dense.load_state_dict(model.state_dict())
    tokens = some_tokens()
    ours, theirs = (gradients(m, m(tokens).logsumexp(1).sum()) for m in (model, dense))
    for name, grad in ours.items():
        torch.testing.assert_close(grad.to_dense(), theirs[name].to_dense(), rtol=0, atol=1e-10, msg=name)


def test_balance_has_two_levels():
    """With all groups paged in it is the flat formula with share_n = share of the group * share within the group."""
    torch.manual_seed(0)
    group, member = torch.randn(3, 4).double(), torch.randn(3, 8).double()  # 4 groups of 2
    first = pattern_of([[0, 1, 6], [2, 6, 7], [1, 2, 3]], [[0.5] * 3] * 3, n=8)
    share = group.softmax(1).repeat_interleave(2, 1) * member.unflatten(1, (4, 2)).softmax(2).flatten(1)
    used = first.to_dense().gt(0).sum(0) / 9
    expected = 8 * (used * share.mean(0)).sum()
    torch.testing.assert_close(balance_loss(GroupedScore(group, torch.arange(4), member), first), expected)
    paged = GroupedScore(group, torch.tensor([0, 1, 3]), member[:, [0, 1, 2, 3, 6, 7]])
    torch.testing.assert_close(balance_loss(paged, first), expected, msg="groups not in use add nothing")
    even = pattern_of([[0, 1], [2, 3], [4, 5], [6, 7]], [[0.5, 0.5]] * 4, n=8)
    zero = GroupedScore(torch.zeros(4, 4).double(), torch.arange(4), torch.zeros(4, 8).double())
    assert balance_loss(zero, even).item() == pytest.approx(1.0)


def test_sparse_rows_is_a_gather():
    table = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([1, 4, 6])
    out = sparse_rows(table, rows)
    assert torch.equal(out, table[rows])
    weight = torch.randn_like(out)
    (sparse,) = torch.autograd.grad((out * weight).sum(), table)
    (dense,) = torch.autograd.grad((table[rows] * weight).sum(), table)
    assert torch.equal(sparse.to_dense(), dense)
    assert sparse.indices().tolist() == [[1, 4, 6]]


def test_local_and_global_patterns_are_each_others_inverse():
    model, tokens = grouped(), some_tokens(5)
    page, pattern = model.pool.page(model.encoder.read(tokens)), model.settle(tokens).history[-1]
    local = page.localise(pattern)
    assert local.n_neurons == len(page.signatures)
    back = page.globalise(local)
    assert torch.equal(back.idx, pattern.idx)
    assert back.n_neurons == 192
    assert torch.equal(page_index(torch.tensor([5 * 16 + 3]), torch.tensor([2, 5, 7]), 16), torch.tensor([19]))


def test_generate_analysis_plasticity_and_copies(tmp_path):
    model, tokens = grouped().float().eval(), some_tokens()
    assert generate(model, tokens, 3, seed=0).shape == (3, 12)
    analysis = model.analyze_activation(tokens)
    assert all(pattern.n_neurons == 192 for pattern in analysis["activation_history"])
    assert analysis["activation_history"][-1].to_dense().shape == (3, 192)
    assert "active_groups=3" in repr(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens), model(tokens))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.active_groups == 3
    assert torch.equal(loaded(tokens), model(tokens))
    before = model.pool.connection_strength.blocks.detach().clone()
    model.plasticity(model.settle(tokens).history, eta=0.1)
    assert (before != model.pool.connection_strength.blocks).any()


def test_a_flat_pool_is_as_it_was():
    """No parameter, no random number more than without groups."""
    model, tokens = small(**GROUPED), some_tokens()
    assert not [name for name in model.state_dict() if "group_" in name]
    assert model.settle(tokens).score.shape == (3, 192)
    torch.manual_seed(0)
    assert torch.equal(model.pool.neuron_signatures, torch.randn(192, 16))
    assert all(grad.layout == torch.strided for grad in gradients(model, model(tokens).sum()).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(active_groups=-1), "active_groups must be an integer >= 0, got -1"),
        (dict(active_groups=2.0), "active_groups must be an integer >= 0, got 2.0"),
        (
            dict(active_groups=3, connection="dense"),
            "active_groups must be 0 unless connection is .*, got 3",
        ),
        (dict(active_groups=1), "active_groups must be 0 or an integer in 2..12: .*final_sparsity=20 .* got 1"),
        (dict(active_groups=13), "active_groups must be 0 or an integer in 2..12: .*; got 13"),
        (dict(active_groups=2, recruits_per_step=33), "integer in 3..12: .*recruits_per_step=33 .*; got 2"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        SproutConfig(**{**SMALL, **GROUPED, **changes})


def test_parts_of_the_pool_have_the_variance_of_one():
    torch.manual_seed(0)
    model = create_brain_like_sprout(
        50, n_neurons=4096, d_state=32, n_heads=2, connection="block_sparse", active_groups=32
    )
    signatures = model.pool.neuron_signatures.unflatten(0, (-1, 32)) + model.pool.group_signatures[:, None]
    assert signatures.var().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("prefix", [False, True])
def test_recall_against_a_slow_count(prefix):
    model, tokens = grouped(3), some_tokens(4)
    z = model.encoder.read(tokens, all_positions=prefix).flatten(0, -2)
    best, groups = model.pool.score(z).topk(12).indices, model.pool.group_score(z).topk(3).indices
    expected = [
        sum(int(n) // 16 in chosen.tolist() for n in top) / 12 for top, chosen in zip(best, groups, strict=True)
    ]
    recall = selection_recall(model, tokens, all_positions=prefix)
    assert recall.tolist() == pytest.approx(expected)
    assert recall.min() < recall.max()
    assert (selection_recall(grouped(12), tokens) == 1).all()
    with pytest.raises(ValueError, match="model must have active_groups > 0, got 0"):
        selection_recall(small(), tokens)
