"""Tuning: the tile tables of attention, forward and backward; see tables.py for how they are replaced."""

from __future__ import annotations

import itertools

import torch

from ..case import Spec
from . import tables
from .journal import Row
from .questions import SHIPPED, Variant, conclude, of_case
from .setting import Rows, Setting, short

HALF, SINGLE = torch.bfloat16, torch.float32
# table, dtype, B, K, H of D = 256: what training and inference spend their time on comes first
SHAPES = [
    ("FORWARD", HALF, 256, 128, 4), ("COLUMNS", HALF, 256, 128, 4), ("ROWS", HALF, 256, 128, 4),
    ("FORWARD", HALF, 32, 128, 4), ("FORWARD", HALF, 1, 128, 4), ("FORWARD", HALF, 256, 128, 8),
    ("FORWARD", SINGLE, 256, 128, 8), ("COLUMNS", SINGLE, 256, 128, 8), ("ROWS", SINGLE, 256, 128, 8),
    ("FORWARD", HALF, 256, 256, 4), ("COLUMNS", HALF, 256, 256, 4), ("ROWS", HALF, 256, 256, 4),
]  # fmt: skip


def candidates(k: int, dtype: torch.dtype) -> list[tuple[int, int, int, int]]:
    """(BLOCK_M, BLOCK_N, warps, stages). All senders in one tile, half of them, or 64."""
    if dtype == SINGLE:
        blocks = itertools.product((16, 32, 64), (32, 64), (4, 8), (1, 2))
    else:
        blocks = itertools.product((16, 32, 64, 128), sorted({64, k // 2, k}), (4, 8), (1, 2))
    return [tile for tile in blocks if tile[0] * tile[1] <= 16_384]


def rows(setting: Setting) -> Rows:
    for table, dtype, batch, k, heads in setting.few(SHAPES, 2):
        direction = "forward" if table == "FORWARD" else "both"
        spec = Spec(batch, k=k, heads=heads, dtype=dtype, direction=direction)
        question = f"tiles {table} {short(dtype)} B={batch} K={k} H={heads} Dh={spec.width // heads}"
        shipped = tables.shipped_tile(table, 2 if dtype == HALF else 4, k, spec.width // heads)
        variants = [Variant(SHIPPED)]
        for tile in setting.few(candidates(k, dtype), 2):
            if tile != shipped:
                variants.append(Variant(str(tile), lambda table=table, tile=tile: tables.attention_tile(table, tile)))
        for variant in variants:

            def job(question=question, spec=spec, variant=variant) -> Row:
                return of_case(setting, question, "sparse_attention", spec, variant)

            yield f"{question} {variant.name}", job


__all__ = ["conclude", "rows"]
