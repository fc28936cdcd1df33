"""Every part of a BioHama alone: what its formula says, computed a second time in plain loops or by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from biohama import BioHamaConfig, Competition, Executive, MessagePassing, Router, SparseAttention
from biohama import WorkingMemory as Memory
from biohama.addresses import corrected, first_slot, newest, newest_so_far, oldest, shifted, winner
from tests.biohama_models import difference


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def attention(backend: str = "auto", always: int = 0) -> SparseAttention:
    part = SparseAttention(7, 12, 3, n_heads=2, backend=backend, always=always).double()
    with torch.no_grad():
        part.strength.normal_()
        part.salience_bias.normal_()
    return part


def by_loops(part: SparseAttention, nodes: Tensor) -> Tensor:
    """The formula of SparseAttention, one receiver and one head after another."""
    samples = []
    for sample in nodes:
        salience = sample @ part.salience.weight[0] + part.salience_bias
        speaking = sorted(range(7), key=lambda m: (m >= part.always, -float(salience[m].detach())))[:3]
        q, k, v = (sample @ weight.T for weight in part.qkv.weight.chunk(3))
        found = []
        for i in range(7):
            for head in (slice(0, 6), slice(6, 12)):
                e = [
                    salience[j].sigmoid() * (q[i, head] @ k[j, head] / math.sqrt(6) + part.strength[j, i]).exp()
                    for j in speaking
                ]
                found.append(sum(w * v[j, head] for w, j in zip(e, speaking, strict=True)) / sum(e))
        samples.append(torch.cat(found).view(7, 12) @ part.out.weight.T)
    return torch.stack(samples)


@pytest.mark.parametrize("always", [0, 2, 3])
@pytest.mark.parametrize("backend", ["auto", "reference", "dense"])
def test_attention_is_its_formula_with_its_gradients(backend, always):
    part, nodes = attention(backend, always), torch.randn(4, 7, 12, dtype=torch.float64, requires_grad=True)
    there = torch.randn(4, 7, 12, dtype=torch.float64)
    inputs = [nodes, *part.parameters()]
    mine, plain = part(nodes), by_loops(part, nodes)
    torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((out * there).sum(), inputs) for out in (mine, plain)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


@torch.no_grad()
def test_only_the_senders_speak():
    part, nodes = attention(), torch.randn(5, 7, 12, dtype=torch.float64)
    gates = part.gates(nodes)
    assert (gates > 0).sum(1).tolist() == [3] * 5
    silent = int((gates[0] == 0).nonzero()[0])
    other = nodes.clone()
    other[0, silent] -= 0.5 * part.salience.weight[0]  # another content, and no more salient
    rest = [m for m in range(7) if m != silent]
    assert part.gates(other)[0].equal(gates[0])
    assert part(other)[0, rest].equal(part(nodes)[0, rest])
    assert not part(other)[0, silent].equal(part(nodes)[0, silent]), "it listens all the same"
    with pytest.raises(ValueError, match=r"nodes must be \(B, n_nodes=7, D\), got \(5, 6, 12\)"):
        part(nodes[:, :6])


@torch.no_grad()
def test_the_first_nodes_always_send_however_salient_the_others_are():
    part, nodes = attention(always=2), torch.randn(5, 7, 12, dtype=torch.float64)
    part.salience_bias[:2] = -100.0
    gates, others = part.gates(nodes), SparseAttention(5, 12, 1).double()
    others.salience.weight, others.salience_bias = part.salience.weight, torch.nn.Parameter(part.salience_bias[2:])
    assert (gates > 0).sum(1).tolist() == [3] * 5
    assert bool((gates[:, :2] > 0).all())
    assert gates[:, 2:].equal(others.gates(nodes[:, 2:])), "for the other place the most salient of the rest compete"


def test_sizes_of_an_attention_are_checked():
    for always in (-1, 3):
        with pytest.raises(ValueError, match=f"always must be in 0..n_senders=2, got {always}"):
            SparseAttention(5, 8, 2, always=always)
    for senders in (0, 6):
        with pytest.raises(ValueError, match=f"n_senders must be in 1..n_nodes=5, got {senders}"):
            SparseAttention(5, 8, senders)
    with pytest.raises(ValueError, match="d_node must be a multiple of n_heads=3, got 8"):
        SparseAttention(5, 8, 2, n_heads=3)


@torch.no_grad()
def test_messages_are_rounds_of_one_set_of_weights():
    nodes = torch.randn(3, 6, 8)
    none, once, twice = (MessagePassing(6, 8, 2, n_rounds=n) for n in (0, 1, 2))
    twice.load_state_dict(once.state_dict())
    assert none(nodes) is nodes
    assert twice(nodes).equal(once(once(nodes)))
    here = F.layer_norm(nodes + once.attention(nodes), (8,))
    here = F.layer_norm(here + once.contract(F.gelu(once.expand(here))), (8,))
    torch.testing.assert_close(once(nodes), here)


def test_router_weights_are_a_sparse_simplex():
    router, nodes = Router(8, 16, threshold=0.1), torch.randn(2, 8, 16, requires_grad=True)
    weights = router(nodes)
    assert weights.shape == (2, 8)
    assert router(torch.randn(3, 5, 8, 16)).shape == (3, 5, 8)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    p = router(nodes, threshold=0.0)
    torch.testing.assert_close(p, router.logits(nodes).softmax(-1))
    kept = p * (p >= 0.1)
    torch.testing.assert_close(weights, kept / kept.sum(-1, keepdim=True))
    assert (weights == 0).any()
    floored = router(nodes, floor=0.4)
    torch.testing.assert_close(floored, 0.6 * weights + 0.05)
    weights[:, 0].sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in (nodes, router.weight, router.bias))
    with pytest.raises(ValueError, match=r"nodes must be .*\(8, 16\)\), got \(2, 7, 16\)"):
        router(torch.randn(2, 7, 16))


@pytest.mark.parametrize(("threshold", "floor"), [(0.0, 0.0), (0.1, 0.0), (0.9, 0.0), (0.0, 0.5), (0.9, 1.0)])
def test_a_router_never_picks_what_is_absent(threshold, floor):
    logits = torch.randn(20, 6).masked_fill(torch.rand(20, 6) < 0.5, float("-inf"))
    logits[:, 2] = -3.0  # somebody is there
    weights = Router.choose(logits, threshold, floor)
    assert weights.isfinite().all()
    assert (weights[logits.isinf()] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(20))
    if threshold == 0.9 and not floor:
        assert ((weights > 0).sum(-1) == 1).all(), "the strongest one stays, also below the threshold"


@torch.no_grad()
def test_working_memory_writes_and_reads():
    memory, x = Memory(6, read_width=3), torch.randn(2, 5, 6)
    slots = memory.write(x)
    assert slots[:, :5].equal(x), "at the start a slot holds what was heard"
    assert slots[:, 5].equal(memory.null.expand(2, 6))
    memory.to_value.weight.normal_()
    torch.testing.assert_close(memory.write(x)[:, :5], x + x @ memory.to_value.weight.T)
    address = torch.zeros(2, 4, 6).scatter(-1, torch.rand(2, 4, 6).topk(3).indices, torch.rand(2, 4, 3))
    torch.testing.assert_close(memory.read(address, slots), address @ slots)
    address = torch.rand(2, 4, 6)
    weight, index = address.topk(3)
    cut = torch.zeros(2, 4, 6).scatter(-1, index, weight)
    torch.testing.assert_close(memory.read(address, slots), cut @ slots)
    for width in (0, 3, 6, 9):
        memory.read_width = width
        by_step = torch.stack([memory.read_step(address[:, t], slots) for t in range(4)], 1)
        torch.testing.assert_close(by_step, memory.read(address, slots))
        torch.testing.assert_close(by_step, (cut if width == 3 else address) @ slots)
    with pytest.raises(ValueError, match=r"slots must be \(B, S \+ 1, D\) = \(2, 6, D\) .* got \(2, 5, 6\)"):
        memory.read(address, slots[:, 1:])


def test_a_sparse_read_has_the_gradients_of_a_dense_one():
    memory = Memory(3, read_width=2)
    address = torch.zeros(1, 2, 4, dtype=torch.float64).scatter(-1, torch.tensor([[[0, 2], [1, 3]]]), 0.4)
    address, slots = address.requires_grad_(), torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    there = torch.randn(1, 2, 3, dtype=torch.float64)
    sparse = torch.autograd.grad((memory.read(address, slots) * there).sum(), (address, slots))
    dense = torch.autograd.grad((address @ slots * there).sum(), (address, slots))
    torch.testing.assert_close(sparse[1], dense[1])
    torch.testing.assert_close(sparse[0], dense[0] * (address > 0))


def test_erasing_takes_room_and_no_more():
    room, address = torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([[0.25, 0.75, 1.0]])
    assert Memory.erase(room, address, torch.tensor([1.0])).tolist() == [[0.75, 0.0, 0.0]]
    assert Memory.erase(room, address, torch.tensor([0.0])).equal(room)


def queue(inhibition: bool) -> Tensor:
    """(B, T, S + 1): one stream of items 3 1 2 1 3, a separator and the items in order, by priorities set by hand."""
    tokens = torch.tensor([[3, 1, 2, 1, 3, 0, 1, 1, 2, 3, 3]])
    part, content, own = Competition(4, inhibition), torch.zeros(1, 11), torch.zeros(1, 11)
    with torch.no_grad():
        part.priority.weight[:] = torch.tensor([0.0, 6.0, 4.0, 2.0])
        content[:, :5], own[:, 6:] = 1, 1  # the items count; what follows the separator is the model's own answer
        heard = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).float()
        return part(F.one_hot(tokens, 4).float(), content, own, heard)


def test_competition_sorts_to_the_end():
    """One slot after another, each once, two of them twice the same symbol, and then the null slot."""
    address = queue(inhibition=True)
    assert address[0, 5:].argmax(-1).tolist() == [1, 3, 2, 0, 4, 11]
    assert address[0, :5].argmax(-1).tolist() == [0, 1, 1, 1, 1], "the strongest so far"
    torch.testing.assert_close(address.sum(-1), torch.ones(1, 11))
    assert (address[..., :-1].triu(1) == 0).all()


def test_without_inhibition_the_same_slot_returns():
    assert queue(inhibition=False)[0, 5:].argmax(-1).tolist() == [1] * 6


@torch.no_grad()
def test_what_no_proposed_slot_explains_uses_none_up():
    part, room, own = Competition(4), torch.ones(1, 3), torch.ones(1)
    address = torch.tensor([[0.6, 0.3, 0.1]])
    for heard, left in (([0.4, 0.4, 0.4], [1, 1, 1]), ([0.4, 0.9, 0.4], [1, 0, 1]), ([0.9, 0.9, 0.9], [0, 1, 1])):
        assert part.inhibit(room, address, torch.tensor([heard]), own, hard=True).tolist() == [left]
    soft = part.inhibit(room, address, torch.tensor([[0.0, 1.0, 1.0]]), 0.5 * own, hard=False)
    torch.testing.assert_close(soft, torch.tensor([[1.0, 1 - 0.5 * 0.3 / 0.401, 1 - 0.5 * 0.1 / 0.401]]))


def test_competition_passes_gradients_to_all_it_reads():
    part = Competition(4)
    x, content, own = torch.randn(2, 6, 4), torch.rand(2, 6), torch.rand(2, 6)
    heard = torch.rand(2, 6, 6)
    inputs = [tensor.requires_grad_() for tensor in (x, content, own)]
    with torch.no_grad():
        part.priority.weight.normal_()
    (part(*inputs, heard, hard=False, excluded=1.0)[..., :3].square().sum()).backward()
    for tensor in (*inputs, *part.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().max() > 0


@torch.no_grad()
def test_between_events_the_executive_keeps_its_state():
    part, x = Executive(8, 16), torch.randn(2, 1010, 8)
    event = torch.zeros(2, 1010)
    event[:, :5], event[:, 1005] = 1, 1
    h = part(x, event)
    assert h[:, 4].abs().max() > 0
    assert h[:, 4:1005].equal(h[:, 4:5].expand(-1, 1001, -1)), "to the bit, over 1000 steps"
    assert difference(h[:, 1005], part.cell(x[:, 1005], h[:, 4])) < 1e-6
    assert difference(part.event(x), torch.ones(())) < 1e-6, "at the start every token is an event"


def test_addresses_by_plain_loops():
    content = torch.rand(2, 6, dtype=torch.float64)
    content[1, 2], content[1, 4] = 1.0, 0.0
    first, last, so_far = oldest(content), newest(content), newest_so_far(content)
    for b, g in enumerate(content.tolist()):
        for i in range(6):
            assert float(first[b, i]) == pytest.approx(g[i] * math.prod(1 - g[j] for j in range(i)), abs=1e-5)
            assert float(last[b, i]) == pytest.approx(g[i] * math.prod(1 - g[j] for j in range(i + 1, 6)), abs=1e-5)
            for t in range(6):
                left = g[i] * math.prod(1 - g[j] for j in range(i + 1, t + 1)) if i <= t else 0.0
                assert float(so_far[b, t, i]) == pytest.approx(left, abs=1e-5)
    assert shifted(content, 1)[:, 1:].equal(content[:, :-1])
    assert shifted(content, -1)[:, :-1].equal(content[:, 1:])
    assert shifted(content, 1)[:, 0].tolist() == shifted(content, -1)[:, -1].tolist() == [0, 0]
    assert shifted(content, 0) is content
    rows = torch.tensor([[0.2, 0.4, 0.4], [0.0, 0.0, 0.0], [0.0, 0.1, 0.9]])
    assert winner(rows).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert first_slot(2, 3, rows).tolist() == [[1, 0, 0]] * 2


def test_an_address_is_corrected_by_what_was_heard():
    address, heard = torch.tensor([[0.6, 0.3, 0.1]] * 3), torch.tensor([[0.0, 1.0, 0.0]] * 3)
    found = corrected(address, heard, torch.tensor([0.0, 1.0, 0.5]))
    assert found[0].equal(address[0])
    assert found[1, 1] > 0.99
    torch.testing.assert_close(found[2], (found[0] + found[1]) / 2)
    assert corrected(torch.zeros(1, 3), heard[:1], torch.ones(1)).tolist() == [[0, 0, 0]]


def test_pointers_alone_are_refused():
    with pytest.raises(ValueError, match="modules must have one that finds a slot by itself, got only forward"):
        BioHamaConfig(modules=("forward",))
