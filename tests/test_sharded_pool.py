"""A pool that is spread over processes learns, forgets nothing and answers as a whole one; gloo on the CPU.

The processes run the functions of tests/sharded_workers.py; here what they computed is compared with one process.
"""

from __future__ import annotations

import bio_kernels
import pytest
import torch

from sprout.sharded_pool import ShardedBlocks, absent, shard_, sharded_tables
from sprout.sharded_state import gathered, use_reference_
from sprout.train_metrics import Learner
from tests import distributed_workers
from tests import sharded_workers as workers
from tests.distributed_workers import BATCHES, some_history
from tests.sprout_models import some_tokens

TABLES = {"pool.neuron_signatures", "pool.threshold", "pool.connection_strength.blocks", "decoder.readout"}
ALL = (
    workers.held,
    workers.together,
    workers.one_without_samples,
    workers.without_interaction,
    workers.faulty,
    workers.plasticity,
    workers.forward,
    workers.goes_on,
    workers.refused,
    workers.wrapped,
)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["two", "four"])
def found(request, tmp_path_factory):
    """(number of processes, what all scenarios gave), from one start of the processes."""
    return request.param, distributed_workers.run(ALL, request.param, tmp_path_factory.mktemp("processes"))


def furthest(ours, theirs):
    """The largest difference of two sets of weights, or of two states, with the same names."""
    assert ours.keys() == theirs.keys()
    return max(float((torch.as_tensor(x) - torch.as_tensor(theirs[name])).abs().max()) for name, x in ours.items())


def test_a_process_holds_its_share_alone(found):
    world, results = found
    whole = dict(workers.grouped().named_parameters())
    shares = [own for own, *_ in results["held"]]
    for name in TABLES:
        rows, numel = len(whole[name]), whole[name].numel()
        assert sum(own[name] for own in shares) == numel
        assert max(own[name] for own in shares) == -(-rows // world) * (numel // rows)
    for own, copies, tensors, kept in results["held"]:
        assert kept
        assert own.keys() == TABLES
        assert copies == []
        assert tensors > 100


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_steps_are_those_of_one_process_with_the_joined_batch(found, optimizer):
    world, results = found
    own = [rank[optimizer] for rank in results["together"]]
    same(own, workers.learnt_alone(world, "together", optimizer))
    assert furthest(own[0][1], workers.grouped().state_dict()) > 1e-2


def same(own, alone):
    """Losses, norms, weights and optimizer states of processes are those of one; states of the same form."""
    told, weights, states = alone
    for losses, _, _ in own:
        assert torch.allclose(torch.tensor(losses), torch.tensor(told), rtol=0, atol=1e-10)
        assert torch.equal(torch.tensor(losses), torch.tensor(own[0][0]))
    assert [w for _, w, _ in own[1:]] == [{}] * (len(own) - 1)
    assert furthest(own[0][1], weights) < 1e-10
    assert len(own[0][2]) == len(states)
    for found, wanted in zip(own[0][2], states, strict=True):
        assert found["param_groups"] == wanted["param_groups"]
        assert found["state"].keys() == wanted["state"].keys()
        for number, state in wanted["state"].items():
            assert furthest(found["state"][number], state) < 1e-10


def test_a_process_without_samples_takes_part_and_moves_nothing(found):
    world, results = found
    same(results["one_without_samples"], workers.learnt_alone(world, "absent", "adam"))
    still = workers.grouped(n_interaction_steps=0)
    same(results["without_interaction"], workers.learnt_alone(world, "absent", "adam", still))


def test_wrong_gradients_are_noticed(found):
    """The negative control: the comparison above fails for each of these faults."""
    world, results = found
    _, right, _ = workers.learnt_alone(world, "together", "sgd")
    for fault in ("sum", "own", "norm"):
        _, weights, _ = results["faulty"][0][fault]
        assert furthest(weights, right) > 1e-6, fault


def test_plasticity_is_to_the_bit_that_of_one_process(found):
    world, results = found
    assert {key for own in results["plasticity"][1:] for key in own.values() if key} == set()
    for (dtype, decay), weights in results["plasticity"][0].items():
        model = workers.grouped(dtype)
        before = model.pool.connection_strength.blocks.detach().clone()
        own = [some_history(BATCHES[rank], seed=rank, n=workers.N) for rank in range(world)]
        history = distributed_workers.joined(own)
        history = [p._replace(gate=p.gate.to(dtype), n_neurons=workers.N) for p in history]
        model.plasticity(history, eta=0.4, decay=decay, bound=0.5)
        blocks = weights["pool.connection_strength.blocks"]
        assert torch.equal(blocks, model.pool.connection_strength.blocks)
        assert (blocks != before).any(2).any(1).float().mean() > 0.7
        assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "dense", "triton"])
def test_every_backend_updates_a_range_of_blocks(backend, dtype):
    whole = workers.grouped(dtype).pool.connection_strength
    before = whole.blocks.detach().clone()
    (pattern,) = some_history(2, seed=0, steps=1, n=workers.N)
    gate = pattern.gate.to(dtype)

    def update(matrix):
        how = dict(eta=0.4, decay=1.0, bound=0.5, count=pattern.count, backend=backend)
        bio_kernels.update_strength_(matrix, pattern.idx, gate, gate, **how)

    parts = []
    for first, end in ((0, 5), (5, 5), (5, 38), (38, 39)):
        matrix = ShardedBlocks(whole, "local", "local")
        matrix.blocks.first, matrix.blocks.local = first, torch.nn.Parameter(before[first:end].clone())
        update(matrix.own())
        parts.append(matrix.blocks.local.detach())
    update(whole)
    assert torch.equal(torch.cat(parts), whole.blocks)
    assert not torch.equal(whole.blocks[:5], before[:5])
    assert not torch.equal(whole.blocks[5:38], before[5:38])


def test_answers_are_those_of_the_whole_model(found):
    world, results = found
    texts = [some_tokens(2, 6, seed=i) for i in range(world + 1)]
    whole = workers.grouped().eval()
    with torch.no_grad():
        losses = [float(Learner(whole)(text).language) for text in texts]
    for rank, (logits, drawn, (figures, none), copy, same_numbers) in enumerate(results["forward"]):
        assert torch.equal(*logits)
        assert torch.equal(*drawn)
        assert none == {}
        assert figures["targets"] == 10 * (world + 1)
        assert figures["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-10)
        assert figures["score"] == pytest.approx(sum(losses[:2]) / 2, abs=1e-10)
        assert (copy is None) == (rank > 0)
        assert same_numbers
    answer, training = results["forward"][0][3]
    assert torch.equal(answer, whole(some_tokens(2, 5, seed=0)))
    assert training is False


def test_what_was_learnt_is_handed_on(found):
    world, results = found
    _, right, _ = workers.learnt_alone(world, "together", "adam", n=2 * workers.STEPS)
    handed_on, from_one = results["goes_on"][0]
    assert furthest(handed_on, right) < 1e-9
    assert furthest(from_one, right) < 1e-9


def test_what_a_spread_pool_refuses(found):
    world, results = found
    for rank, (told, unchanged, whole) in enumerate(results["refused"]):
        assert "model must be the same on every process: seed them alike" in told["seed"]
        assert told["other"] == "ValueError: model must be a BrainLikeSprout, got Linear"
        flat = (
            "model must have active_groups > 0" if rank == world - 1 else f"model of process {world - 1} of the group"
        )
        assert flat in told["flat"]
        assert "got one that is spread over processes already" in told["twice"]
        for what in ("grow", "prune", "rewire", "waken", "score", "save"):
            needs = "saving" if what == "save" else what
            assert told[what].startswith(f"ValueError: {needs} needs a whole pool, and model's is spread"), what
        for what in ("local", "group"):
            assert "process_group must be the one that the pool is spread over" in told[what]
        assert f"pool.threshold.local is (192,) instead of ({-(-workers.N // world)},)" in told["weights"]
        assert "pool.threshold.local is missing" in told["missing"]
        assert unchanged
        assert whole


def test_a_module_around_the_model_leaves_the_rows_to_their_owners(found):
    _, results = found
    assert all(results["wrapped"])


def test_a_whole_copy_on_the_cpu_needs_no_kernels(monkeypatch):
    """A model of a GPU may ask for Triton, by its config or by the environment; its copy computes all the same."""
    tokens, expected = some_tokens(2, 5, seed=0), workers.grouped(torch.float32)(some_tokens(2, 5, seed=0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for environment, backend in (("auto", "triton"), ("triton", "auto")):
        monkeypatch.setenv("BIO_KERNELS_BACKEND", environment)
        model = workers.grouped(torch.float32, backend=backend)
        with pytest.raises(RuntimeError, match='backend "triton" cannot'):
            model(tokens)
        use_reference_(model)
        assert torch.equal(model(tokens), expected)


def test_one_process_keeps_a_whole_pool():
    model = workers.grouped()
    names = [name for name, _ in model.named_parameters()]
    shard_(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert sharded_tables(model) == {}
    assert gathered(model) is model
    assert absent(model).item() == 0
