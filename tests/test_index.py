"""The inverted index: what it lists, that backward passes share it, and that it is never out of date."""

from __future__ import annotations

from collections.abc import Callable

import bio_kernels as bk
import pytest
import torch
from bio_kernels import _index, _registration
from bio_kernels.testing import active_neurons
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor


def listed(idx: Tensor, n: int, count: Tensor | None) -> list[tuple[int, int]]:
    """(neuron, flat position) of every entry, in the order of the rule; those that are not valid last, as neuron n."""
    found = []
    for b, row in enumerate(idx.tolist()):
        for j, neuron in enumerate(row):
            valid = 0 <= neuron < n and (count is None or j < int(count[b]))
            found.append((neuron if valid else n, b * len(row) + j))
    return sorted(found)


@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 20), st.booleans(), st.integers(0, 99))
def test_lists_every_entry_once_in_order(batch: int, k: int, n: int, partial: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    idx = torch.randint(-2, n + 2, (batch, k), generator=g)
    count = torch.randint(k + 1, (batch,), generator=g) if partial else None
    index = _index.invert(idx, n, count)
    assert list(zip(index.neuron.tolist(), index.entry.tolist(), strict=True)) == listed(idx, n, count)
    assert index.neuron.dtype == index.entry.dtype == torch.int32


def test_wide_pools_take_wide_keys() -> None:
    index = _index.invert(torch.tensor([[2**40, 3]]), 2**41)
    assert index.neuron.tolist() == [3, 2**40]
    assert index.neuron.dtype == torch.int64


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every index that is really built."""
    calls: list[int] = []
    original = _index.invert

    def counted(*args: object) -> _index.InvertedIndex:
        calls.append(1)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(_index, "invert", counted)
    monkeypatch.setattr(_index, "_shared", [])
    return calls


@pytest.fixture
def within_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 7)


@pytest.mark.usefixtures("within_a_backward_pass")
def in_a_backward_pass(function: Callable[[], object]) -> None:
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: function() and None)
    y.backward()


def test_the_same_idx_is_inverted_once_in_a_backward_pass(built: list[int]) -> None:
    idx, count = active_neurons(3, 20, 5), torch.tensor([5, 2, 0])
    found: list[_index.InvertedIndex] = []
    in_a_backward_pass(lambda: found.extend(_index.inverted(idx, 20, count) for _ in range(3)))
    assert found[0] is found[1] is found[2]
    assert len(built) == 1
    in_a_backward_pass(lambda: found.append(_index.inverted(idx, 20, count)))
    assert len(built) == 2, "another pass does not trust what it did not build"


def test_outside_of_a_backward_pass_nothing_is_kept(built: list[int]) -> None:
    idx = active_neurons(3, 20, 5)
    for calls in (1, 2):
        _index.inverted(idx, 20)
        assert len(built) == calls
    assert not _index._shared


@pytest.mark.parametrize("other", ["n", "count", "no count", "equal idx"])
def test_anything_else_is_inverted_anew(built: list[int], other: str) -> None:
    idx, count = active_neurons(3, 20, 5), torch.tensor([5, 2, 0])
    arguments = {
        "n": (idx, 21, count),
        "count": (idx, 20, torch.tensor([5, 5, 5])),
        "no count": (idx, 20, None),
        "equal idx": (idx.clone(), 20, count),
    }[other]
    found: list[_index.InvertedIndex] = []
    in_a_backward_pass(lambda: found.extend(_index.inverted(*each) for each in ((idx, 20, count), arguments)))
    assert len(built) == 2
    assert found[1].neuron.tolist() == [neuron for neuron, _ in listed(*arguments)]


def test_a_count_that_is_gone_is_not_mistaken_for_none(built: list[int]) -> None:
    idx, found = active_neurons(3, 20, 5), []

    def both() -> None:
        count = torch.tensor([5, 2, 0])
        _index.inverted(idx, 20, count)
        del count
        found.append(_index.inverted(idx, 20))

    in_a_backward_pass(both)
    assert len(built) == 2
    assert 20 not in found[0].neuron.tolist(), "no slot is left out"


def test_gradients_of_all_slots_after_attention_with_a_temporary_count() -> None:
    """Attention's backward comes first, lets its count go, and leaves an index with fewer slots behind."""
    idx, lengths = active_neurons(2, 20, 5), torch.tensor([2, 3])
    table, strength = torch.rand(20, 4, requires_grad=True), torch.rand(20, 20, requires_grad=True)
    rows = bk.weighted_rows(table, idx, torch.ones(2, 5))
    q = rows[:, None, None, :].expand(-1, 1, 5, -1).contiguous()
    bk.sparse_attention(q, q, q, idx, strength, count=lengths.clamp(max=5)).sum().backward()
    expected = torch.zeros(20).index_add_(0, idx.flatten(), torch.ones(10))
    assert table.grad is not None
    assert torch.equal(table.grad.ne(0).any(1), expected > 0)


def test_what_the_dispatcher_calls_shares_nothing(built: list[int]) -> None:
    """A compiled graph keeps its tensors in a memory pool that must be empty of others' when it is replayed."""
    table, idx = torch.rand(20, 2), active_neurons(3, 20, 5)
    arguments = (table, 20, None, None, 0, idx, torch.rand(3, 5), torch.rand(3, 2), "reference")
    in_a_backward_pass(lambda: [torch.ops.bio_kernels.weighted_rows_backward_table(*arguments)])
    assert len(built) == 1
    assert not _index._shared
    in_a_backward_pass(lambda: [_registration.weighted_rows_backward_table(*arguments)])
    assert len(_index._shared) == 1


def test_each_stream_has_its_own(built: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Tensor):
        is_cuda = True  # type: ignore[assignment]

    streams = iter([1, 1, 2])
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device=None: type("Stream", (), {"cuda_stream": next(streams)})
    )
    idx = active_neurons(3, 20, 5).as_subclass(Elsewhere)
    in_a_backward_pass(lambda: [_index.inverted(idx, 20) for _ in range(3)])
    assert len(built) == 2


CHANGES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy_": lambda x, new: x.copy_(new),
    "item": lambda x, new: x.__setitem__(slice(None), new),
    "view": lambda x, new: x.view(-1).copy_(new.view(-1)),
    "set_": lambda x, new: x.set_(new),
    "data": lambda x, new: x.data.copy_(new),
    "numpy": lambda x, new: x.numpy().__setitem__(slice(None), new.numpy()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_that_changed_in_place_is_inverted_anew(change: str) -> None:
    """What a loader that refills its buffer does. A stale index would train the neurons of the last step."""
    idx, new = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[4, 5], [4, 6]])
    for values in (idx.clone(), new):
        if values is new:
            CHANGES[change](idx, new)
        table = torch.zeros(8, 3, requires_grad=True)
        bk.weighted_rows(table, idx, torch.ones(2, 2)).sum().backward()
        expected = torch.zeros(8, 3).index_add_(0, values.flatten(), torch.ones(4, 3))
        assert table.grad is not None
        assert torch.equal(table.grad, expected)


@pytest.mark.parametrize("change", ["copy_", "data", "numpy"])
def test_a_count_that_changed_in_place_is_seen(change: str) -> None:
    idx, count, new = torch.tensor([[0, 1, 2]]), torch.tensor([3]), torch.tensor([1])
    _index.inverted(idx, 8, count)
    CHANGES[change](count, new)
    assert _index.inverted(idx, 8, count).neuron.tolist() == [0, 8, 8]


def test_backward_passes_of_a_step_share_one_index(built: list[int]) -> None:
    idx = active_neurons(3, 20, 5)
    tables = [torch.rand(20, 4, requires_grad=True) for _ in range(3)]
    sum(bk.weighted_rows(table, idx, torch.ones(3, 5)).sum() for table in tables).backward()  # type: ignore[union-attr]
    assert len(built) == 1


@pytest.mark.usefixtures("within_a_backward_pass")
def test_memory_is_given_back(built: list[int]) -> None:
    """A bounded number of indices is kept, and none keeps the tensor it was built for alive."""

    def many() -> None:
        for seed in range(30):
            _index.inverted(active_neurons(2, 20, 5, seed=seed), 20)

    in_a_backward_pass(many)
    assert len(built) == 30
    assert 0 < len(_index._shared) <= _index._SHARED
    assert all(entry[1]() is None for entry in _index._shared)


def test_inference_tensors(built: list[int]) -> None:
    with torch.inference_mode():
        idx = active_neurons(2, 20, 5)
        assert _index.inverted(idx, 20).neuron.tolist() == sorted(idx.flatten().tolist())
        idx.copy_(torch.zeros_like(idx))
        assert _index.inverted(idx, 20).neuron.tolist() == [0] * 10
