"""Tuning: the constants of the other kernel files, one at a time."""

from __future__ import annotations

from typing import Any

import torch

from ..case import Spec
from . import experiments, tables
from .journal import LeftOut, Row
from .questions import SHIPPED, Variant, conclude, of_case, plain
from .setting import Rows, Setting

HALF = torch.bfloat16
# question, operation, row, constants and what each might be instead
SWEEPS: list[tuple[str, str, Spec, dict[str, tuple[Any, ...]]]] = [
    ("rows of a neuron, dense matrix B=256", "weighted_rows", Spec(256, width=4096, dtype=HALF, direction="both"),
     {"segment_RUN_BLOCK": (4, 16, 32), "segment_TILE": (1024, 4096), "rows_TILE": (4096, 16384)}),
    ("rows of a neuron, decoder B=256", "weighted_rows", Spec(256, width=256, dtype=HALF, direction="both"),
     {"segment_RUN_BLOCK": (4, 16, 32), "segment_TILE": (1024, 4096), "rows_TILE": (4096, 16384)}),
    ("rows of a neuron, zipf", "weighted_rows", Spec(32, width=4096, distribution="zipf", direction="both"),
     {"segment_RUN_BLOCK": (4, 16, 32)}),
    ("block-sparse rows", "weighted_rows", Spec(32, width=4096, storage="block_sparse", direction="both"),
     {"rows_SPARSE": ({}, {"sm_90": (32, 1024)}, {"sm_90": (64, 2048)}, {"sm_90": (128, 1024)})}),
    ("pairs of an update B=256", "update_strength_", Spec(256, direction="update", dtype=HALF),
     {"pairs_TILE_PAIRS": (512, 2048, 4096), "pairs_TILE_WARPS": (2, 8), "pairs_MAX_WALK": (64, 128)}),
    ("pairs of an update B=32", "update_strength_", Spec(32, direction="update"),
     {"pairs_TILE_PAIRS": (512, 2048), "pairs_TILE_WARPS": (2, 8), "pairs_MAX_WALK": (64, 128)}),
    ("gather with the selection B=256", "topk_gather", Spec(256, direction="forward", dtype=HALF),
     {"gather_FUSED_BYTES": (0, 32 * 1024, 256 * 1024), "gather_GATHER_TILE_BYTES": (16 * 1024, 64 * 1024)}),
    ("gather with the selection B=1", "topk_gather", Spec(1, direction="forward", dtype=HALF),
     {"gather_FUSED_BYTES": (0, 32 * 1024, 256 * 1024)}),
]  # fmt: skip
# B, N: of float32 scores, K = 128
SELECT = [(256, 4096), (1, 4096), (32, 8192), (32, 65_536), (1, 65_536), (32, 1_048_576)]
CHUNKS = {"select_CHUNK": (2048, 8192), "select_WHOLE": (4096,), "select_REGISTERS": (96, 128, 168, 255)}


def rows(setting: Setting) -> Rows:
    for question, op, spec, changes in setting.few(SWEEPS, 2):
        variants = [Variant(SHIPPED)]
        for name, values in changes.items():
            for value in setting.few(values):
                variants.append(
                    Variant(f"{name}={value}", lambda name=name, value=value: tables.constants(**{name: value}))
                )
        for variant in variants:
            yield (
                f"{question} {variant.name}",
                lambda question=question, op=op, spec=spec, variant=variant: of_case(
                    setting, question, op, spec, variant
                ),
            )


def select_rows(setting: Setting) -> Rows:
    """Bit search against radix select, and how a row is cut into chunks."""
    for batch, n in setting.few(SELECT):
        variants: dict[str, Any] = {SHIPPED: (tables.select, {})}
        for name, values in CHUNKS.items():
            variants |= {f"{name}={value}": (tables.select, {name: value}) for value in setting.few(values)}
        for warps in setting.few((4, 8, 16)):
            variants[f"radix select, {warps} warps"] = (
                lambda score, k, warps=warps: experiments.radix_select(score, k, warps), {},
            )  # fmt: skip
        variants["torch.topk, sorted by index"] = (_torch_topk, {})
        for name, (function, changes) in variants.items():

            def job(batch=batch, n=n, name=name, function=function, changes=changes) -> Row:
                return _select(setting, batch, n, name, function, changes)

            yield f"select B={batch} N={n} {name}", job


def _torch_topk(score: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    gate, idx = torch.topk(score, k, dim=1, sorted=False)
    idx, order = idx.sort(dim=1)
    return gate.gather(1, order), idx


def _select(setting: Setting, batch: int, n: int, name: str, function: Any, changes: dict[str, Any]) -> Row:
    if name.startswith("radix") and n > experiments.LARGEST:
        raise LeftOut(f"one program holds at most {experiments.LARGEST} scores")
    k, count = 128, max(2, min(8, 2**28 // (batch * n)))
    if setting.rehearsal:
        batch, n, k, count = 2, 300, 7, 1
    generator = torch.Generator(setting.device).manual_seed(n)
    sets = [torch.randn(batch, n, device=setting.device, generator=generator) for _ in range(count)]
    sets[0][0, : n // 2] = 0.5  # many equal scores: the lowest index must win
    order = sets[0].sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    with tables.constants(**changes):
        gate, idx = function(sets[0], k)
        if not name.startswith("torch"):  # which of equal scores it takes is not said
            assert torch.equal(idx, order), f"{name} selects other neurons"
        truth = sets[0].double().gather(1, order)
        question = f"select B={batch} N={n} K={k}"
        return plain(
            question, name, lambda x: function(x, k), sets, gate.sort(1).values, truth.sort(1).values, torch.float32
        )


__all__ = ["conclude", "rows", "select_rows"]
