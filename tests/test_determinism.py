"""The same inputs give the same bits, every time; and uninitialised memory is what these tests say it is."""

from __future__ import annotations

from typing import Any

import bio_kernels as bk
import pytest
import torch
from bio_kernels.testing import make_inputs
from torch import Tensor

from tests.ways import Way, every_way, gradient, leaf, same_bits


def everything(way: Way, storage: str, batch: int, sparse_grad: bool = False) -> dict[str, Tensor]:
    """Outputs and gradients of all operations for neurons that are active in almost every sample."""
    x = make_inputs(batch, 32, 10, storage=storage, kind="zipf")
    a: dict[str, Any] = {name: leaf(value, way) for name, value in x.__dict__.items()}
    top = bk.topk_gather(a["score"], a["table"], 10, sparse_grad=sparse_grad, backend=way.backend)
    one = another = a["strength"]
    if sparse_grad:  # torch adds an uncoalesced gradient to a strided one by atomics
        one, another = bk.shared_table(a["strength"], 2)
    out = bk.sparse_attention(
        a["q"], a["k"], a["v"], a["idx"], one, gate=a["gate"], sparse_grad=sparse_grad, backend=way.backend
    )
    spread = bk.weighted_rows(another, a["idx"], a["pre"], backend=way.backend)
    (out.sin().sum() + top.rows.sin().sum() + top.gate.sum() + spread.sin().sum()).backward()
    result = {"out": out, "spread": spread, "idx": top.idx, "gate": top.gate, "rows": top.rows}
    result |= {f"gradient of {name}": g for name, value in a.items() if (g := _gradient(value)) is not None}
    bk.update_strength_(a["strength"], a["idx"], a["pre"], a["post"], eta=0.1, decay=1.0, backend=way.backend)
    values = a["strength"].blocks if isinstance(a["strength"], bk.BlockSparse) else a["strength"]
    return {**result, "updated": values.detach()}


def _gradient(x: Any) -> Tensor | None:
    return gradient(x) if isinstance(x, bk.BlockSparse | Tensor) else None


@pytest.mark.default_memory
@every_way()
@pytest.mark.parametrize("storage", ["dense", "block_sparse", "dense, sparse_grad"])
def test_the_same_bits_every_time(way: Way, storage: str) -> None:
    """In torch's default mode, which asks for nothing: 100 runs on a GPU, 3 here."""
    storage, _, sparse_grad = storage.partition(", ")
    batch = 64 if way.device == "cuda" else 6
    first = everything(way, storage, batch, bool(sparse_grad))
    for _ in range(99 if way.device == "cuda" else 2):
        again = everything(way, storage, batch, bool(sparse_grad))
        assert all(same_bits(first[name], again[name]) for name in first), [
            name for name in first if not same_bits(first[name], again[name])
        ]


@pytest.mark.default_memory
@pytest.mark.parametrize("storage", ["dense", "block_sparse"])
def test_the_reference_does_not_depend_on_the_number_of_threads(storage: str) -> None:
    way, threads = Way("cpu", "reference", torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything(way, storage, 40)
        torch.set_num_threads(4)
        four = everything(way, storage, 40)
    finally:
        torch.set_num_threads(threads)
    ours = [name for name in one if name not in ("out", "gradient of q", "gradient of k", "gradient of v")]
    assert all(same_bits(one[name], four[name]) for name in ours if "gate" not in name and "strength" not in name)


@every_way(single=True)
@pytest.mark.parametrize("storage", ["dense", "block_sparse"])
def test_with_deterministic_algorithms_only(way: Way, storage: str) -> None:
    """torch.use_deterministic_algorithms(True) is on, and refuses whatever is not: nothing of ours is."""
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert all(x.isfinite().all() for x in everything(way, storage, 6).values())


def test_uninitialised_memory_is_poisoned() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        made = [torch.empty(3, dtype=dtype), torch.empty_like(torch.ones(3, dtype=dtype)),
                torch.ones(1, dtype=dtype).new_empty(3), torch.empty_strided((3,), (2,), dtype=dtype)]  # fmt: skip
        assert all(x.isnan().all() for x in made)
    assert (torch.empty(3, dtype=torch.int64) == 2**63 - 1).all()


@every_way(single=True)
def test_the_poison_shows_what_was_not_written(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a kernel that does not run leaves NaN, and the comparison of these tests rejects it."""
    if way.backend == "triton":
        weighted_rows = pytest.importorskip("bio_kernels._weighted_rows")

        class Nothing:
            def __getitem__(self, grid: object) -> Any:
                return lambda **_: None

        monkeypatch.setattr(weighted_rows, "_dense_forward_kernel", Nothing())
    else:
        from bio_kernels import reference

        monkeypatch.setattr(
            reference, "weighted_rows_forward", lambda table, idx, _: table.new_empty(len(idx), table.shape[1])
        )
    x = make_inputs(2, 16, 4).to(way.dtype, way.device)
    assert bk.weighted_rows(x.table, x.idx, x.gate, backend=way.backend).isnan().all()


@pytest.mark.default_memory
def test_the_marker_leaves_memory_alone() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
