"""A child process that runs one operation forward and backward on its smallest shapes, for a checker to watch.

``python -m benchmarks.gpu.smallest OPERATION DEVICE``; see sanitizer.py.
"""

from __future__ import annotations

import sys

import torch
from bio_kernels.testing import make_inputs

from . import parity
from .determinism import OPERATIONS, STORAGES

SHAPES = ((2, 16, 5), (1, 48, 17))  # B, N, K


def main(operation: str, device: str) -> None:
    run, names, leaves = OPERATIONS[operation]
    launched = 0
    for storage in STORAGES:
        for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
            for batch, n, k in SHAPES if device == "cuda" else SHAPES[:1]:
                x = make_inputs(batch, n, k, storage=storage, head_width=16).to(dtype, device, grad=True)
                named = {name: getattr(x, name) for name in names.split()} | {"bounded": True}
                parity.outputs_and_gradients(lambda a: run(a, "triton"), named, leaves)
                launched += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"ran {launched} shapes")


if __name__ == "__main__":
    main(*sys.argv[1:])
