"""Several processes: strengths stay the same to the bit, tables and scores are spread; gloo on the CPU.

The processes run the functions of tests/distributed_workers.py; here what they computed is compared with one process.
"""

from __future__ import annotations

from itertools import product

import bio_kernels
import pytest
import torch

from sprout.sharded import ShardedTable, sharded_topk
from tests import distributed_workers as workers
from tests.distributed_workers import BATCHES, ROWS, SCORED, TOPKS, WIDTH, K

ALL = (
    workers.plasticity,
    workers.plasticity_without_samples,
    workers.plasticity_apart,
    workers.plasticity_refused,
    workers.wrapped,
    workers.table_sgd,
    workers.table_adam,
    workers.table_dtypes,
    workers.topk,
)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["two", "four"])
def found(request, tmp_path_factory):
    """(number of processes, what all scenarios gave), from one start of the processes."""
    return request.param, workers.run(ALL, request.param, tmp_path_factory.mktemp("processes"))


def same_everywhere(values):
    return all(torch.equal(values[0], other) for other in values[1:])


@pytest.mark.parametrize("decay", [0.0, 1.0], ids=["hebb", "oja"])
@pytest.mark.parametrize("kind", workers.STRENGTHS)
def test_plasticity_is_that_of_the_joined_batch(found, kind, decay):
    world, results = found
    values = [own[kind, decay] for own in results["plasticity"]]
    joined = workers.joined([workers.some_history(BATCHES[rank], seed=rank) for rank in range(world)])
    assert same_everywhere(values)
    assert torch.equal(values[0], workers.learned(kind, decay, joined))
    assert not torch.equal(values[0], workers.strength(workers.fresh(kind)))


def test_a_process_without_samples(found):
    world, results = found
    nothing, narrow, none = zip(*results["plasticity_without_samples"], strict=True)
    assert all(map(same_everywhere, (nothing, narrow, none)))
    with_samples = [workers.some_history(BATCHES[rank], seed=rank) for rank in range(world) if BATCHES[rank]]
    assert torch.equal(nothing[0], workers.learned("dense", 1.0, workers.joined(with_samples)))
    assert torch.equal(none[0], workers.strength(workers.fresh("float64")))
    padded = []
    for rank in range(world):
        own = workers.some_history(2, seed=rank, slots=K - 5 * rank)
        wider = torch.nn.functional.pad
        padded.append([p._replace(idx=wider(p.idx, (0, 5 * rank)), gate=wider(p.gate, (0, 5 * rank))) for p in own])
    assert torch.equal(narrow[0], workers.learned("dense", 1.0, workers.joined(padded)))


def test_without_joining_the_processes_differ(found):
    """The negative control: the comparisons above fail where each process learns from its own samples."""
    world, results = found
    joined = workers.joined([workers.some_history(2, seed=rank) for rank in range(world)])
    right = workers.learned("dense", 0.0, joined)
    for values in zip(*results["plasticity_apart"], strict=True):
        assert not same_everywhere(values)
        for rank, value in enumerate(values):
            assert (value - right).abs().max() > 1e-2
            assert torch.equal(value, workers.learned("dense", 0.0, workers.some_history(2, seed=rank)))


def test_a_mistake_of_one_process_is_told_on_all(found):
    world, results = found
    told, unchanged, after = zip(*results["plasticity_refused"], strict=True)
    others = {name: {rank[name] for rank in told[:-1]} for name in told[0]}
    elsewhere = {f"ValueError: pattern of process {world - 1} of the group does not fit; see the error there"}
    assert told[-1]["pool"] == "ValueError: pattern must be over n_neurons=96 neurons, got 50"
    assert told[-1]["batches"] == "ValueError: pattern must hold patterns of one batch, got B in [1, 2]"
    assert others["pool"] == others["batches"] == elsewhere
    for own in told:
        assert "same length on every process, got lengths [1, 2]" in own["length"]
        assert "got an empty history on every process" in own["empty"]
        assert own["type"] == "TypeError: process_group must be a ProcessGroup, None or 'local', got 'locals'"
    assert told[-1]["group"] == "ValueError: process_group must contain this process, got a group of others"
    assert all(unchanged)
    assert same_everywhere(after)


def test_data_parallel_starts_from_the_same_strengths(found):
    before, after, learned = zip(*found[1]["wrapped"], strict=True)
    assert not same_everywhere(before)
    assert same_everywhere(after)
    assert torch.equal(after[0], before[0])
    assert same_everywhere(learned)
    assert not torch.equal(learned[0], after[0])


# ------------------------------------------------------------------------------------------------- sharded table


@pytest.mark.parametrize("optimizer", workers.OPTIMIZERS)
def test_a_sharded_table_learns_as_a_whole_one(found, optimizer):
    world, results = found
    whole = torch.nn.Parameter(workers.whole_table())
    optimize = workers.OPTIMIZERS[optimizer]([whole])
    own = results[f"table_{optimizer}"]
    assert [r["rows"] for r in own] == {2: [6, 5], 4: [3, 3, 3, 2]}[world]
    for step in range(3):
        loss = torch.zeros(())
        touched = set()
        for rank in range(world):
            uses = [(workers.asked(rank, step), step)] + ([(workers.asked(rank, 0), 0)] if step == 1 else [])
            for index, scale in uses:
                loss = loss + workers.loss_of(whole[index], rank, scale)
                touched |= set(index.tolist())
            assert torch.allclose(own[rank]["seen"][step], whole[workers.asked(rank, step)], atol=1e-6)
        optimize.zero_grad()
        loss.backward()
        whole.grad = workers_sparse(whole.grad, sorted(touched))
        optimize.step()
        assert all(r["touched"][step][0] for r in own)
        assert sorted(row for r in own for row in r["touched"][step][1]) == sorted(touched)
    for r in own:
        assert torch.allclose(r["full"], whole.detach(), atol=1e-6)
    assert same_everywhere([r["full"] for r in own])
    assert not torch.allclose(own[0]["full"], workers.whole_table(), atol=1e-2)


def workers_sparse(grad, rows):
    """A dense gradient as SparseAdam takes it."""
    return torch.sparse_coo_tensor(torch.tensor([rows]), grad[rows], grad.shape, check_invariants=False)


def test_rows_and_gradients_in_every_dtype(found):
    world, results = found
    asked = [workers.asked(rank, 0) for rank in range(world)]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        rows, grads = zip(*(own[0][dtype] for own in results["table_dtypes"]), strict=True)
        for index, got in zip(asked, rows, strict=True):
            assert torch.equal(got, workers.whole_table(dtype)[index])
        times = torch.cat(asked).bincount(minlength=ROWS).to(dtype)
        assert torch.equal(sum(grads), times[:, None].expand(ROWS, WIDTH))
    for rank, (_, _, again, tiny, alone) in enumerate(results["table_dtypes"]):
        assert torch.equal(again, workers.whole_table(torch.float16)[asked[rank]])
        assert tiny == (1, 2)
        assert torch.equal(alone, torch.zeros(3, 1))


def test_a_wrong_index_of_one_process_is_told_on_all(found):
    world, results = found
    told = [own[1] for own in results["table_dtypes"]]
    assert "strictly ascending in 0..n_rows-1=10, got [1, 1]" in told[-1]["ascending"]
    assert "strictly ascending in 0..n_rows-1=10, got [11]" in told[-1]["range"]
    assert "index must be a (R,) int64 tensor, got torch.float32 (1,)" in told[-1]["dtype"]
    assert "index must be a (R,) int64 tensor, got list" in told[-1]["type"]
    elsewhere = f"ValueError: index of process {world - 1} of the group does not fit; see the error there"
    for own in told[:-1]:
        assert set(own.values()) == {elsewhere}


@pytest.mark.slow
def test_a_table_saved_by_two_processes_loads_into_four(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("processes") for _ in range(2)]
    workers.run([workers.table_saved], 2, folders[0], str(folders[0] / "table"))
    loaded = workers.run([workers.table_loaded], 4, folders[1], str(folders[0] / "table"))["table_loaded"]
    assert same_everywhere([workers.whole_table(), *loaded])


def test_one_process_holds_the_whole_table():
    table = ShardedTable(ROWS, WIDTH)
    table.load_full_(workers.whole_table())
    index = torch.tensor([1, 4])
    table.rows(index).sum().backward()
    assert table.local.grad.is_coalesced()
    assert torch.equal(table.local.grad.to_dense(), torch.zeros(ROWS, WIDTH).index_fill_(0, index, 1.0))
    assert torch.equal(table.full(), workers.whole_table())
    with pytest.raises(ValueError, match=r"full must have shape \(11, 3\), got \(3, 11\)"):
        table.load_full_(workers.whole_table().t())
    with pytest.raises(ValueError, match="n_rows must be an integer >= 1, got 0"):
        ShardedTable(0, 3)
    with pytest.raises(RuntimeError, match="dtensor needs a process_group of several processes"):
        table.dtensor()


# ------------------------------------------------------------------------------------------------- sharded top-k


def test_sharded_topk_is_topk_to_the_bit(found):
    world, results = found
    for number, (sizes, (dtype, k)) in enumerate(product(SCORED[world], TOPKS)):
        score = workers.scores(dtype).requires_grad_()
        gate, idx, _ = bio_kernels.topk_gather(score, torch.zeros(13, 1), k)
        losses = sum(range(1, world + 1))  # of all processes
        (gate.nan_to_num(0, 0, 0) * torch.arange(1, k + 1, dtype=dtype) * losses).sum().backward()
        grads = score.grad.split(sizes, 1)
        for (own, _, _), wanted in zip(results["topk"], grads, strict=True):
            got_gate, got_idx, grad = own[number]
            assert torch.equal(got_idx, idx)
            assert torch.equal(got_gate.view(torch.uint8), gate.detach().view(torch.uint8))
            assert torch.equal(grad, wanted)
    assert all(empty.shape == (0, 3) for _, empty, _ in results["topk"])


def test_sharded_topk_refuses_on_all_processes(found):
    world, results = found
    told = [own for _, _, own in results["topk"]]
    for own in told:
        assert own["k"] == "ValueError: k must be in 1..N=13, got 14"
        assert "must be the same on every process, got B=6 k=3" in own["batch"]
        assert "k=3 torch.float16" in own["dtype"]
    elsewhere = f"ValueError: local_score or k of process {world - 1} of the group does not fit; see the error there"
    for own in told[:-1]:
        assert own["shape"] == own["zero"] == elsewhere
    assert "local_score must be a (B, N_local) float tensor, got torch.float32" in told[-1]["shape"]
    assert told[-1]["zero"] == "ValueError: k must be an integer >= 1, got 0"


def test_sharded_topk_in_one_process():
    gate, idx = sharded_topk(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), 2)
    assert idx.tolist() == [[1, 3]]
    assert gate.tolist() == [[3.0, 3.0]]
