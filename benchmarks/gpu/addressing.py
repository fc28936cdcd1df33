"""Matrices of more than 2**31 elements: the neurons at their very ends give what a small pool of the same gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bio_kernels as bk
import torch
from bio_kernels import BlockSparse
from bio_kernels.testing import assert_close, make_inputs
from torch import Tensor, nn

from .journal import Row
from .setting import Rows, Setting

N = 65_536  # N * N = 2**32
P = 128
BLOCK_ROWS = 368  # all blocks stored: 368 * 368 * 128 * 128 = 2.2e9 values
PLACES = (0, 7, -21, -20, -2, -1)  # of the six neurons in the pool; negative: from its end
RULE: dict[str, Any] = {"eta": 0.1, "decay": 1.0, "bound": 2.0}


def small(setting: Setting, dtype: torch.dtype) -> dict[str, Tensor]:
    """A pool of six neurons, all active, as float leaves."""
    x = make_inputs(1, 6, 6, heads=2, head_width=32).to(dtype, setting.device, grad=True)
    return {name: getattr(x, name) for name in ("q", "k", "v", "gate", "strength", "pre", "post", "idx")}


def places(n: int, device: str) -> Tensor:
    return torch.tensor([place % n for place in PLACES], device=device)


def large(setting: Setting, part: Tensor) -> Tensor:
    """(N, N) of zeros that holds part between the places."""
    n = N if setting.cuda else 512
    far = places(n, setting.device)
    strength = torch.zeros(n, n, dtype=part.dtype, device=setting.device)
    strength[far[:, None], far] = part.detach()
    return strength


def large_blocks(setting: Setting, part: Tensor) -> BlockSparse:
    rows = BLOCK_ROWS if setting.cuda else 3
    blocks = torch.zeros(rows * rows, P, P, dtype=part.dtype, device=setting.device)
    far = places(rows * P, setting.device)
    pre, post = far[:, None], far[None, :]
    blocks[pre // P * rows + post // P, pre % P, post % P] = part.detach()
    offsets = torch.arange(0, rows * rows + 1, rows, dtype=torch.int32, device=setting.device)
    return BlockSparse(
        nn.Parameter(blocks), offsets, torch.arange(rows, dtype=torch.int32).repeat(rows).to(blocks.device)
    )


def matrices(setting: Setting, x: dict[str, Tensor]) -> Iterator[tuple[str, Any]]:
    yield "dense", lambda: large(setting, x["strength"])
    yield "block_sparse", lambda: large_blocks(setting, x["strength"])


def in_far(matrix: Tensor | BlockSparse, values: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """The places, and what ``values``, of the matrix's layout, hold between them: (6, 6)."""
    far = places(matrix.shape[0], device)
    pre, post = far[:, None], far[None, :]
    if isinstance(matrix, Tensor):
        return far, values[pre, post]
    rows = matrix.shape[0] // P
    return far, values[pre // P * rows + post // P, pre % P, post % P]


def attention(setting: Setting, storage: str, dtype: torch.dtype) -> Row:
    """Forward and every gradient; that of the matrix too, whole."""
    x = small(setting, dtype)
    names = ("q", "k", "v", "gate")
    leaves = [x[name] for name in names]
    out = bk.sparse_attention(x["q"], x["k"], x["v"], x["idx"], x["strength"], gate=x["gate"], backend="triton")
    truth = torch.autograd.grad(out.square().sum(), [*leaves, x["strength"]])
    matrix = dict(matrices(setting, x))[storage]()
    values = matrix.requires_grad_() if isinstance(matrix, Tensor) else matrix.blocks
    far = places(matrix.shape[0], setting.device)[x["idx"]]
    found = bk.sparse_attention(x["q"], x["k"], x["v"], far, matrix, gate=x["gate"], backend="triton")
    *grads, of_matrix = torch.autograd.grad(found.square().sum(), [*leaves, values])
    _, inside = in_far(matrix, of_matrix, setting.device)
    errors = {"output": assert_close(found, out, dtype, "output")}
    for name, grad, expected in zip((*names, "strength"), (*grads, inside), truth, strict=True):
        errors[name] = assert_close(grad, expected, dtype, f"gradient of {name}")
    elsewhere = int(of_matrix.count_nonzero()) - int(inside.count_nonzero())
    assert elsewhere == 0, f"{elsewhere} gradients of pairs that were not active"
    return {"errors": errors, "elements": values.numel()}


def weighted_rows(setting: Setting, storage: str, dtype: torch.dtype) -> Row:
    x = small(setting, dtype)
    out = bk.weighted_rows(x["strength"], x["idx"], x["gate"], backend="triton")
    weights = torch.arange(1.0, 7, device=setting.device).to(dtype)
    truth = torch.autograd.grad((out * weights).sum(), [x["gate"], x["strength"]])
    matrix = dict(matrices(setting, x))[storage]()
    values = matrix.requires_grad_() if isinstance(matrix, Tensor) else matrix.blocks
    far = places(matrix.shape[0], setting.device)
    found = bk.weighted_rows(matrix, far[x["idx"]], x["gate"], backend="triton")
    grads = torch.autograd.grad((found[:, far] * weights).sum(), [x["gate"], values])
    _, inside = in_far(matrix, grads[1], setting.device)
    errors = {"output": assert_close(found[:, far], out, dtype, "output")}
    errors["gate"] = assert_close(grads[0], truth[0], dtype, "gradient of weight")
    errors["strength"] = assert_close(inside, truth[1], dtype, "gradient of table")
    return {"errors": errors, "elements": values.numel()}


def update(setting: Setting, storage: str, dtype: torch.dtype) -> Row:
    x = {name: value.detach() for name, value in small(setting, dtype).items()}
    matrix = dict(matrices(setting, x))[storage]()
    far = places(matrix.shape[0], setting.device)[x["idx"]]
    bk.update_strength_(x["strength"], x["idx"], x["pre"], x["post"], **RULE, backend="triton")
    bk.update_strength_(matrix, far, x["pre"], x["post"], **RULE, backend="triton")
    values = matrix if isinstance(matrix, Tensor) else matrix.blocks.detach()
    _, inside = in_far(matrix, values, setting.device)
    return {"errors": {"strength": assert_close(inside, x["strength"], dtype)}, "elements": values.numel()}


def topk(setting: Setting, storage: str, dtype: torch.dtype) -> Row:
    """Rows of a table of more than 2**31 elements, and their gradient."""
    part = torch.arange(36.0, device=setting.device, dtype=dtype).view(6, 6)
    table = large(setting, part).requires_grad_()
    far = places(len(table), setting.device)
    score = torch.zeros(1, len(table), device=setting.device)
    score[0, far] = 1.0
    top = bk.topk_gather(score, table, 6, backend="triton")
    assert torch.equal(top.idx[0], far), f"selected {top.idx[0].tolist()}"
    assert torch.equal(top.rows[0][:, far], part), "rows of other neurons"
    (grad,) = torch.autograd.grad(top.rows.sum(), table)
    assert float(grad[far].min()) == 1.0, "a gradient of a chosen row is missing"
    assert int(grad.count_nonzero()) == 6 * len(table), "gradients of other rows"
    return {"elements": table.numel()}


def rows(setting: Setting) -> Rows:
    for operation in (attention, weighted_rows, update, topk):
        for storage in ("dense", "block_sparse") if operation is not topk else ("dense",):
            for dtype in setting.few((torch.float16, torch.float32)):
                yield (
                    f"{operation.__name__} {storage} {str(dtype)[6:]}",
                    lambda operation=operation, storage=storage, dtype=dtype: operation(setting, storage, dtype),
                )
