"""Every operation on the device against the dense baseline in float64: outputs, gradients, dtypes, storages, sizes.

Memory from torch.empty is poisoned with NaN. Sizes are those of the tests and the ones the kernels' tables tell apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import bio_kernels as bk
import torch
from bio_kernels.testing import TOLERANCE, Inputs, assert_close, generator, make_inputs
from torch import Tensor

from ..case import in_double, leaf
from .journal import Row
from .setting import Rows, Setting, poisoned, short

Results = dict[str, Tensor]
Named = dict[str, Any]

TOPK = [  # B, N, K, D
    (2, 7, 3, 13), (1, 1, 1, 1), (3, 13, 7, 7), (2, 127, 13, 127), (2, 300, 127, 100), (4, 1000, 300, 64),
    (8, 4096, 128, 256), (2, 8192, 256, 256), (2, 20_000, 128, 64), (2, 65_536, 256, 64), (1, 70_000, 300, 16),
]  # fmt: skip
ATTENTION = [  # B, N, K, H, Dh
    (2, 13, 7, 2, 4), (1, 1, 1, 1, 1), (3, 48, 13, 3, 7), (2, 300, 127, 2, 16), (1, 512, 300, 2, 64),
    (4, 512, 128, 8, 32), (2, 512, 128, 4, 64), (2, 512, 256, 4, 64), (1, 512, 256, 2, 128), (1, 512, 100, 1, 256),
]  # fmt: skip
ROWS = [  # B, N, K, M
    (2, 13, 7, 5), (1, 1, 1, 1), (3, 127, 13, 300), (2, 300, 127, 64), (4, 1000, 300, 100), (8, 4096, 128, 256),
    (4, 4096, 128, 4096), (1, 8192, 256, 8192),
]  # fmt: skip
UPDATE = [(2, 13, 7), (1, 1, 1), (3, 127, 13), (2, 300, 127), (2, 512, 300), (16, 1024, 128), (4, 1024, 256)]
BLOCKS = [(2, 48, 7, 16), (3, 64, 13, 32), (2, 320, 127, 16), (2, 512, 128, 32), (1, 512, 300, 64), (2, 512, 128, 128)]


def outputs_and_gradients(run: Callable[[Named], Any], x: Named, leaves: tuple[str, ...]) -> Results:
    """What run(x) returns, by name, and the gradients of leaves for the same random gradients every time."""
    result = run(x)
    named = {f"output {i}": y for i, y in enumerate(result if isinstance(result, tuple) else (result,))}
    found = [y for y in named.values() if y.requires_grad]
    if not (found and leaves):
        return {name: y.detach().clone() for name, y in named.items()}
    grads = [_random_gradient(i, tuple(y.shape), y.dtype, str(y.device)) for i, y in enumerate(found)]
    of_leaves = torch.autograd.grad(found, [leaf(x[name]) for name in leaves], grads)
    gradients = {f"gradient of {name}": grad for name, grad in zip(leaves, of_leaves, strict=True)}
    return {**{name: y.detach() for name, y in named.items()}, **gradients}


@lru_cache(maxsize=4)  # also so that a CUDA graph, which cannot copy from the host, finds it there
def _random_gradient(seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).bfloat16().to(device, dtype)


def topk_gather(x: Named, backend: str) -> Any:
    return tuple(bk.topk_gather(x["score"], x["table"], x["idx"].shape[1], backend=backend))


def sparse_attention(x: Named, backend: str) -> Any:
    options = {name: x[name] for name in ("gate", "count") if name in x}
    return bk.sparse_attention(x["q"], x["k"], x["v"], x["idx"], x.get("strength"), **options, backend=backend)


def weighted_rows(x: Named, backend: str) -> Any:
    return bk.weighted_rows(x["strength"] if "strength" in x else x["table"], x["idx"], x["pre"], backend=backend)


def update_strength(x: Named, backend: str) -> Any:
    rule: dict[str, Any] = {"eta": 0.1, "decay": 1.0, "bound": 2.0} if x["bounded"] else {"eta": 0.1}
    bk.update_strength_(x["strength"], x["idx"], x["pre"], x["post"], **rule, backend=backend)
    return leaf(x["strength"]).detach()


def check(run: Callable[[Named, str], Any], x: Named, leaves: tuple[str, ...]) -> Row:
    """The errors by name of the Triton kernels. AssertionError names the first that is above the tolerance table's."""
    truth = outputs_and_gradients(lambda a: run(a, "dense"), {name: in_double(a) for name, a in x.items()}, leaves)
    with poisoned():
        ours = outputs_and_gradients(lambda a: run(a, "triton"), x, leaves)
    errors = {name: close(name, value, truth[name]) for name, value in ours.items()}
    return {"errors": errors, "worst": max(errors.values())}


def close(name: str, actual: Tensor, truth: Tensor) -> float:
    """The error. Indices must be equal; a gradient whose truth vanishes but for rounding must be small."""
    if not actual.is_floating_point():
        assert torch.equal(actual, truth), f"{name}: other neurons"
        return 0.0
    if truth.numel() and float(truth.abs().max()) < 1e-12:
        size = float(actual.abs().max())
        assert size <= 4 * TOLERANCE[actual.dtype], f"{name} should vanish, got {size:.3g}"
        return 0.0
    return assert_close(actual, truth, actual.dtype, name)


def topk_rows(setting: Setting) -> Rows:
    return _of_every_dtype(setting, _topk)


def attention_rows(setting: Setting) -> Rows:
    return _of_every_dtype(setting, _attention)


def weighted_rows_rows(setting: Setting) -> Rows:
    return _of_every_dtype(setting, _weighted)


def update_rows(setting: Setting) -> Rows:
    return _of_every_dtype(setting, _update)


def _of_every_dtype(setting: Setting, make: Callable[[Setting, torch.dtype], Rows]) -> Rows:
    for dtype in setting.dtypes:
        for name, job in make(setting, dtype):
            yield f"{short(dtype)} {name}", job


def _named(x: Inputs, setting: Setting, dtype: torch.dtype, names: str, **more: Any) -> Named:
    moved = x.to(dtype, setting.device, grad=True)
    return {name: getattr(moved, name) for name in names.split()} | more


def _topk(setting: Setting, dtype: torch.dtype) -> Rows:
    for batch, n, k, width in setting.few(TOPK, 2):

        def job(batch=batch, n=n, k=k, width=width) -> Row:
            g, moved = generator(n + k), {"device": setting.device, "dtype": dtype}
            score, table = (torch.randn(*s, generator=g).bfloat16().to(**moved) for s in ((batch, n), (n, width)))
            x = {"score": score.requires_grad_(), "table": table.requires_grad_(), "idx": torch.empty(batch, k)}
            return check(topk_gather, x, ("score", "table"))

        yield f"B{batch} N{n} K{k} D{width}", job


def _attention(setting: Setting, dtype: torch.dtype) -> Rows:
    leaves = ("q", "k", "v", "strength", "gate")
    kept = " ".join(("idx", *leaves))
    for batch, n, k, heads, width in setting.few(ATTENTION, 2):
        sizes = {"heads": heads, "head_width": width, "width": 1}

        def job(batch=batch, n=n, k=k, sizes=sizes, names=kept, leaves=leaves, count=False) -> Row:
            more = {"count": torch.arange(k, k - batch, -1).clamp(min=0).to(setting.device)} if count else {}
            return check(
                sparse_attention, _named(make_inputs(batch, n, k, **sizes), setting, dtype, names, **more), leaves
            )

        yield f"dense B{batch} N{n} K{k} H{heads} Dh{width}", job
        yield f"dense with count B{batch} N{n} K{k} H{heads} Dh{width}", lambda job=job: job(count=True)
        bare = {"names": "idx q k v", "leaves": ("q", "k", "v")}
        yield f"no matrix, no gate B{batch} N{n} K{k} H{heads} Dh{width}", lambda job=job, bare=bare: job(**bare)
    for batch, n, k, block_size in setting.few(BLOCKS):

        def sparse(batch=batch, n=n, k=k, block_size=block_size) -> Row:
            layout = {"storage": "block_sparse", "block_size": block_size, "heads": 4, "head_width": 32, "width": 1}
            return check(sparse_attention, _named(make_inputs(batch, n, k, **layout), setting, dtype, kept), leaves)

        yield f"block_sparse P{block_size} B{batch} N{n} K{k}", sparse


def _weighted(setting: Setting, dtype: torch.dtype) -> Rows:
    for batch, n, k, width in setting.few(ROWS, 2):

        def job(batch=batch, n=n, k=k, width=width) -> Row:
            g, moved = generator(n + k), {"device": setting.device, "dtype": dtype}
            table, weight = (torch.randn(*s, generator=g).bfloat16().to(**moved) for s in ((n, width), (batch, k)))
            idx = torch.randint(n, (batch, k), generator=g).to(setting.device)  # may repeat: repeats add
            x = {"table": table.requires_grad_(), "pre": weight.requires_grad_(), "idx": idx}
            return check(weighted_rows, x, ("table", "pre"))

        yield f"dense B{batch} N{n} K{k} M{width}", job
    for batch, n, k, block_size in setting.few(BLOCKS):

        def sparse(batch=batch, n=n, k=k, block_size=block_size) -> Row:
            x = make_inputs(batch, n, k, storage="block_sparse", block_size=block_size, width=1)
            return check(weighted_rows, _named(x, setting, dtype, "strength idx pre"), ("strength", "pre"))

        yield f"block_sparse P{block_size} B{batch} N{n} K{k}", sparse


def _update(setting: Setting, dtype: torch.dtype) -> Rows:
    shapes = [(*shape, 0) for shape in setting.few(UPDATE)] + setting.few(BLOCKS)
    for batch, n, k, block_size in shapes:
        layout: dict[str, Any] = {"storage": "block_sparse", "block_size": block_size} if block_size else {}
        for bounded in (True, False):

            def job(batch=batch, n=n, k=k, layout=layout, bounded=bounded) -> Row:
                x = make_inputs(batch, n, k, width=1, **layout)
                return check(update_strength, _named(x, setting, dtype, "strength idx pre post", bounded=bounded), ())

            storage = f"block_sparse P{block_size}" if block_size else "dense"
            yield f"{storage} {'Oja, bounded' if bounded else 'Hebb'} B{batch} N{n} K{k}", job
