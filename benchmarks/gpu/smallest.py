"""A child process that runs one operation forward and backward on small shapes, for a checker to watch.

``python -m benchmarks.gpu.smallest OPERATION DEVICE SIZE``; see sanitizer.py.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from bio_kernels.testing import make_inputs

from . import parity
from .determinism import OPERATIONS, STORAGES, selection

Shapes = tuple[tuple[int, int, int], ...]  # B, N, K
SMALLEST: Shapes = ((2, 16, 5), (1, 48, 17))
# size -> operation -> shapes. "tiled": every loop over tiles of the operation's kernels takes more than one turn.
SHAPES: dict[str, dict[str, Shapes]] = {
    "smallest": dict.fromkeys(OPERATIONS, SMALLEST),
    "tiled": {
        "topk_gather": ((1, 9000, 300),),  # a row in two chunks, rows of 512 bytes fetched by a launch of their own
        "sparse_attention": ((1, 512, 300),),  # senders in tiles, their pairs gathered before
        "weighted_rows": ((10, 1040, 300),),  # slots in chunks, two groups of block columns, neurons active 9 times
        "update_strength_": ((2, 512, 300),),  # tiles of pairs; two turns along a row; neurons active twice
    },
}
WIDTHS = {"smallest": {"head_width": 16}, "tiled": {"head_width": 64, "width": 128}}


def arguments(operation: str, shape: tuple[int, int, int], size: str, storage: str, how: dict[str, Any]) -> Any:
    """What runs the operation once with these arguments, as parity.py names them; how: dtype and device."""
    batch, n, k = shape
    if operation == "topk_gather" and size == "tiled":  # without the N x N matrix of the other operations
        return selection(batch, n, k, WIDTHS[size]["width"], how)
    kind = "zipf" if size == "tiled" else "uniform"  # the same neurons in many samples
    x = make_inputs(batch, n, k, storage=storage, kind=kind, **WIDTHS[size]).to(**how, grad=True)
    return {name: getattr(x, name) for name in OPERATIONS[operation][1].split()} | {"bounded": True}


def main(operation: str, device: str, size: str) -> None:
    run, _, leaves = OPERATIONS[operation]
    shapes = SHAPES[size][operation]
    launched = 0
    for storage in STORAGES:
        if operation == "topk_gather" and storage != "dense":
            continue
        for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
            for shape in shapes if device == "cuda" else shapes[:1]:
                named = arguments(operation, shape, size, storage, {"dtype": dtype, "device": device})
                parity.outputs_and_gradients(lambda a: run(a, "triton"), named, leaves)
                launched += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"ran {launched} shapes")


if __name__ == "__main__":
    main(*sys.argv[1:])
