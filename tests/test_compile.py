"""What torch does to an operator: checks, compiles, exports and captures it."""

from __future__ import annotations

import shutil
from typing import Any

import bio_kernels as bk
import pytest
import torch
from bio_kernels import _registration
from bio_kernels.testing import TOLERANCE, make_inputs, relative_error
from torch import Tensor

from tests.test_transforms import functions, inputs
from tests.ways import same_bits, values_of

pytestmark = pytest.mark.default_memory
STORAGES = pytest.mark.parametrize("storage", ["dense", "block_sparse"])


def calls_of_operators(storage: str, dtype: torch.dtype) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every registered operator with the arguments of a typical call."""
    x = make_inputs(2, 16, 5, storage=storage, heads=2, head_width=3).to(dtype)
    s = x.strength.storage if isinstance(x.strength, bk.BlockSparse) else None
    layout = (16, s.row_offsets, s.cols, s.search_steps) if s else (16, None, None, 0)
    values, count, r = values_of(x.strength).detach(), torch.tensor([5, 2]), "reference"
    out, lse = _registration.sparse_attention(x.q, x.k, x.v, x.idx, values, *layout, x.gate, count, 0.5, r)
    bias = torch.rand(2, 5, 5, dtype=lse.dtype)
    ops, flow = torch.ops.bio_kernels, (values, *layout, x.idx)
    return {
        "topk_gather": (ops.topk_gather, (x.score, x.table, 5, r)),
        "scatter_gate": (ops.scatter_gate, (x.gate, x.idx, 16, r)),
        "segment_rows": (ops.segment_rows, (x.idx, torch.rand(2, 5, 3, dtype=dtype), 16, dtype, False, r)),
        "weighted_rows": (ops.weighted_rows, (*flow, x.gate, r)),
        "weighted_rows_backward_weight": (ops.weighted_rows_backward_weight, (*flow, x.gate, x.score, r)),
        "weighted_rows_backward_table": (ops.weighted_rows_backward_table, (*flow, x.gate, x.score, r)),
        "sparse_attention": (ops.sparse_attention, (x.q, x.k, x.v, x.idx, values, *layout, x.gate, count, 0.5, r)),
        "sparse_attention_backward": (
            ops.sparse_attention_backward,
            (x.q, x.q, x.k, x.v, x.idx, values, *layout, x.gate, count, 0.5, out, lse, r),
        ),
        "pair_gradient": (ops.pair_gradient, (bias, x.idx, count, values, *layout, r)),
        "update_strength_": (ops.update_strength_, (*flow, x.pre, x.post, 0.1, 1.0, 2.0, count, r)),
    }


OPERATORS = tuple(calls_of_operators("dense", torch.float32))


def test_every_operator_is_checked() -> None:
    registered = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("bio_kernels::")}  # fmt: skip
    assert registered == set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@STORAGES
def test_opcheck(operator: str, dtype: torch.dtype, storage: str) -> None:
    op, arguments = calls_of_operators(storage, dtype)[operator]
    torch.library.opcheck(op.default, arguments)


def model(x: Any) -> Tensor:
    """All four operations as one step of a model."""
    top = bk.topk_gather(x.score, x.table, 5)
    strength, again = bk.shared_table(x.strength, 2) if isinstance(x.strength, Tensor) else (x.strength,) * 2
    out = bk.sparse_attention(x.q, x.k, x.v, top.idx, strength, gate=top.gate.sigmoid())
    spread = bk.weighted_rows(again, top.idx, top.gate)
    return out.square().sum() + (spread * x.score).sum() + top.rows.sum()


def compiled_equals_eager(backend: str, storage: str, dynamic: bool | None = None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in (2, 5, 3) if dynamic else (2,):
        eager, traced = (inputs(batch, storage=storage, dtype=torch.float32, width=3) for _ in range(2))
        a, b = model(eager), compiled(traced)
        assert relative_error(b, a) <= TOLERANCE[torch.float32]
        a.backward()
        b.backward()
        for name in ("score", "table", "q", "k", "v", "strength"):
            x, y = values_of(getattr(eager, name)).grad, values_of(getattr(traced, name)).grad
            assert x is not None
            assert y is not None
            assert relative_error(y, x) <= TOLERANCE[torch.float32], name


@STORAGES
def test_compiles_without_graph_breaks(storage: str) -> None:
    compiled_equals_eager("aot_eager", storage)


def test_compiles_for_a_dynamic_batch() -> None:
    compiled_equals_eager("aot_eager", "dense", dynamic=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@STORAGES
def test_compiles_with_inductor(storage: str) -> None:
    compiled_equals_eager("inductor", storage)


@STORAGES
def test_the_update_compiles(storage: str) -> None:
    torch._dynamo.reset()

    def update(x: Any) -> Tensor:
        bk.update_strength_(x.strength, x.idx, x.pre, x.post, eta=0.1, decay=1.0, bound=2.0)
        return values_of(x.strength) * 2

    eager, traced = (inputs(storage=storage, dtype=torch.float32) for _ in range(2))
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    assert torch.equal(update(eager), compiled(traced))
    assert torch.equal(values_of(eager.strength), values_of(traced.strength))


@pytest.mark.parametrize("name", ["topk_gather", "sparse_attention", "weighted_rows"])
def test_exports_as_one_node(name: str) -> None:
    x = inputs(dtype=torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return functions(x)[name][0](*tensors)

    arguments = tuple(t.detach() for t in functions(x)[name][1])
    exported = torch.export.export(Module(), arguments)
    ours = [node for node in exported.graph.nodes if "bio_kernels" in str(node.target)]
    assert [str(node.target) for node in ours] == [f"bio_kernels.{name}.default"]
    result, expected = exported.module()(*arguments), Module()(*arguments)
    assert all(
        same_bits(a, b)
        for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (result, expected)), strict=True)
    )


def test_meta_tensors_have_the_right_shapes() -> None:
    score, table = torch.empty(3, 9, device="meta"), torch.empty(9, 2, device="meta", dtype=torch.bfloat16)
    top = bk.topk_gather(score, table, 4)
    assert [tuple(t.shape) for t in top] == [(3, 4), (3, 4), (3, 4, 2)]
    assert top.rows.dtype == torch.bfloat16
    q, strength = torch.empty(3, 2, 4, 5, device="meta"), torch.empty(9, 9, device="meta")
    assert bk.sparse_attention(q, q, q, top.idx, strength).shape == q.shape
    assert bk.weighted_rows(strength, top.idx, top.gate).shape == (3, 9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@STORAGES
def test_captured_in_a_cuda_graph(storage: str) -> None:
    """A replay reads what its inputs hold now, the indices and the inverted index included."""
    x = make_inputs(2, 48, 5, storage=storage).to(torch.float32, "cuda", grad=True)

    def step() -> Tensor:
        loss = model(x)
        loss.backward()
        return loss.detach()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    tensors = [x.score, x.table, x.q, x.k, x.v, values_of(x.strength)]
    for t in tensors:
        t.grad = torch.zeros_like(t)
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        x.score.copy_(torch.randn_like(x.score))
    for t in tensors:
        t.grad.zero_()  # type: ignore[union-attr]
    graph.replay()
    replayed = [loss.clone(), *(t.grad.clone() for t in tensors)]  # type: ignore[union-attr]
    for t in tensors:
        t.grad = torch.zeros_like(t)
    assert all(same_bits(a, b) for a, b in zip(replayed, [step(), *(t.grad for t in tensors)], strict=True))
