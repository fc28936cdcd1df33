"""The constants of the kernel files, replaced for a while: the only file of the benchmarks that reaches into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import bio_kernels._attention as _attention
import bio_kernels._attention_backward as _attention_backward
import bio_kernels._pairs as _pairs
import bio_kernels._plasticity as _plasticity
import bio_kernels._segment as _segment
import bio_kernels._topk_gather as _topk_gather
import bio_kernels._topk_select as _topk_select
import bio_kernels._weighted_rows as _weighted_rows
import torch

FILES = {
    "attention": _attention,
    "backward": _attention_backward,
    "pairs": _pairs,
    "plasticity": _plasticity,
    "segment": _segment,
    "gather": _topk_gather,
    "select": _topk_select,
    "rows": _weighted_rows,
}
EVERY = (_attention.ANY,) * 3  # the one key of an attention table that fits every shape
TABLES = {"FORWARD": ("attention", "FORWARD"), "ROWS": ("backward", "ROWS"), "COLUMNS": ("backward", "COLUMNS")}


@contextmanager
def constants(**changes: Any) -> Iterator[None]:
    """select_WHOLE=4096 sets WHOLE of the file that FILES calls "select". Raises: AttributeError for an unknown one."""
    with ExitStack() as stack:
        for name, value in changes.items():
            file, constant = name.split("_", 1)
            stack.enter_context(mock.patch.object(FILES[file], constant, value))
        yield


@contextmanager
def attention_tile(table: str, tile: tuple[int, int, int, int]) -> Iterator[None]:
    """Every shape takes this (BLOCK_M, BLOCK_N, warps, stages) from the table FORWARD, ROWS or COLUMNS."""
    file, name = TABLES[table]
    with mock.patch.dict(getattr(FILES[file], name), {EVERY: tile}, clear=True):
        yield


def shipped_tile(table: str, element_size: int, k: int, head_width: int) -> tuple[int, int, int, int]:
    file, name = TABLES[table]
    entries = getattr(FILES[file], name)
    needed = (element_size, k, head_width)
    return entries[next(most for most in entries if all(a >= b for a, b in zip(most, needed, strict=True)))]


def kernels() -> list[Any]:
    """All kernels of the library."""
    found = {
        id(value): value for file in FILES.values() for name, value in vars(file).items() if name.endswith("_kernel")
    }
    return list(found.values())


def compiled() -> dict[int, Any]:
    """What Triton has compiled so far on this GPU: by identity; nothing where the kernels are interpreted."""
    if not torch.cuda.is_available():
        return {}
    held = {}
    for kernel in kernels():
        for caches in getattr(kernel, "device_caches", {}).values():
            held |= {id(program): program for program in caches[0].values()}
    return held


def resources(before: dict[int, Any]) -> dict[str, int]:
    """Most registers and spilled bytes of what was compiled since; empty if nothing was."""
    new = [program for key, program in compiled().items() if key not in before]
    found = {
        "registers": [getattr(p, "n_regs", None) for p in new],
        "spills": [getattr(p, "n_spills", None) for p in new],
    }
    return {
        name: max(v for v in values if v is not None)
        for name, values in found.items()
        if any(v is not None for v in values)
    }


def select(score: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Selection alone, without rows."""
    return _topk_select.select(score, k)


def add_pairs(matrix: torch.Tensor, delta: torch.Tensor, idx: torch.Tensor) -> None:
    """matrix[idx_bj, idx_bi] += delta[b, j, i] by the row owners, the inverted index built anew."""
    _pairs.add_pairs_(_pairs.Storage(matrix, matrix.shape[0]), delta, idx, None)


def sum_rows(idx: torch.Tensor, values: torch.Tensor, n: int) -> torch.Tensor:
    """out[i] = sum of values[b, j] over idx[b, j] = i, by the row owners."""
    return _segment.segment_rows(idx, values, None, n, values.dtype, False)
