"""The dense twin, both connections, dtypes, torch.compile."""

import bio_kernels
import pytest
import torch

from tests.sprout_models import small, some_tokens, wired


@pytest.mark.parametrize("connection", ["dense", "block_sparse"])
def test_the_dense_twin_agrees(connection):
    sparse = wired(small(connection=connection, blocks_per_row=2, backend="reference")).double()
    dense = small(seed=9, connection=connection, blocks_per_row=2, backend="dense").double()
    dense.load_state_dict(sparse.state_dict())
    tokens = some_tokens()
    assert all(
        torch.equal(a.idx, b.idx) and torch.equal(a.count, b.count)
        for a, b in zip(sparse.settle(tokens).history, dense.settle(tokens).history, strict=True)
    )
    outputs = [model(tokens) for model in (sparse, dense)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
    for out in outputs:
        out.logsumexp(1).sum().backward()
    for (name, p), q in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-10, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_block_sparse_equals_a_dense_matrix_with_the_same_values():
    sparse = wired(small(connection="block_sparse", blocks_per_row=2)).double()
    dense = small().double()
    state = {k: v for k, v in sparse.state_dict().items() if not k.startswith("pool.connection_strength")}
    dense.load_state_dict({**state, "pool.connection_strength": sparse.pool.connection_strength.to_dense()})
    torch.testing.assert_close(sparse(some_tokens()), dense(some_tokens()), rtol=0, atol=1e-12)


def test_the_connection_matters():
    model, tokens = small(), some_tokens()
    before = model(tokens)
    assert not torch.allclose(before, wired(model)(tokens))


def test_operations_are_looked_up_when_called(monkeypatch):
    calls = []
    for name in ("topk_gather", "sparse_attention", "weighted_rows"):
        op = getattr(bio_kernels, name)

        def counted(*args, _op=op, _name=name, **kwargs):
            calls.append((_name, kwargs["backend"]))
            return _op(*args, **kwargs)

        monkeypatch.setattr(bio_kernels, name, counted)
    small(backend="reference")(some_tokens())
    assert sorted(calls) == sorted(
        [("topk_gather", "reference")] * 4
        + [("sparse_attention", "reference")] * 3
        + [("weighted_rows", "reference")] * 4
    )


def test_autocast_runs_in_bfloat16():
    model, tokens = wired(small()), some_tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
    logits.float().logsumexp(1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_graph_breaks(masked):
    model, tokens = wired(small(n_interaction_steps=1)), some_tokens()
    mask = torch.arange(9) < torch.tensor([[9], [5], [7]]) if masked else None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs, gradients = [], []
    for run in (compiled, model):
        model.zero_grad()
        outputs.append(run(tokens, mask))
        outputs[-1].logsumexp(1).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)
    torch._dynamo.reset()
