"""Chooses who computes an operation: the Triton kernels, the plain-torch reference, or the dense baseline.

The only place that asks about devices. Triton is never imported here: looking for its package is enough, and a CPU
program that uses the reference never pays for the import.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference", "dense")
_log = logging.getLogger("bio_kernels")


def interpreting() -> bool:
    """True if Triton runs on CPU tensors, through its interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def checking() -> bool:
    """True if values on a GPU are checked too, at the price of a synchronisation (BIO_KERNELS_CHECK=1)."""
    return os.environ.get("BIO_KERNELS_CHECK") == "1"


_FOUND_TRITON = importlib.util.find_spec("triton") is not None


def _has_triton() -> bool:
    return _FOUND_TRITON


@functools.cache
def _log_choice(backend: str, device: str) -> None:
    _log.info("operations on %s tensors run on the %s backend", device, backend)


@functools.cache
def _warn_no_triton() -> None:
    warnings.warn(
        "bio_kernels: Triton is not installed, so GPU tensors take the slower plain-torch reference. "
        'Install it with: pip install "triton>=3.6"  (BIO_KERNELS_BACKEND=triton makes this an error)',
        RuntimeWarning,
        stacklevel=4,
    )


def resolve(backend: str, x: Tensor, *others: Tensor | None) -> str:
    """The backend that computes an operation on x and others: "triton", "reference" or "dense".

    "auto" obeys BIO_KERNELS_BACKEND, then takes Triton for a GPU tensor and the reference for any other one and for
    float64. Raises ValueError for an unknown name and RuntimeError where the one asked for cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = os.environ.get("BIO_KERNELS_BACKEND", "auto")
        if backend not in ("auto", "triton", "reference"):
            raise ValueError(f"BIO_KERNELS_BACKEND must be auto, triton or reference, got {backend!r}")
    if backend == "auto":
        double = any(t is not None and t.dtype == torch.float64 for t in (x, *others))
        backend = "triton" if x.is_cuda and not double else "reference"
        if backend == "triton" and not _has_triton():
            _warn_no_triton()
            backend = "reference"
    if backend == "triton":
        _require_triton(x, *others)
    if not torch.compiler.is_compiling():
        _log_choice(backend, x.device.type)
    return backend


def _require_triton(x: Tensor, *others: Tensor | None) -> None:
    if not _has_triton():
        raise RuntimeError('backend "triton" cannot run: Triton is not installed (pip install "triton>=3.6")')
    if not x.is_cuda and not interpreting():
        raise RuntimeError(
            f'backend "triton" cannot run on {x.device.type} tensors: move them to a GPU, or set TRITON_INTERPRET=1 '
            'before Python starts to run the kernels through the interpreter, or use backend="reference"'
        )
    for t in (x, *others):
        if t is not None and t.dtype == torch.float64:
            raise RuntimeError('backend "triton" computes in float32; use backend="reference" for float64')
        if t is not None and not x.is_cuda and t.dtype == torch.bfloat16:
            raise RuntimeError("Triton's interpreter gives wrong bfloat16 dot products; use float32 or float16 there")


def backend_info() -> dict[str, str | bool | None]:
    """What would compute here: versions, the environment's settings and the backend of CPU and GPU tensors.

    Returns a dict of plain values with the keys torch, triton, cuda, hip, interpreter, check, BIO_KERNELS_BACKEND,
    cpu_backend and gpu_backend (None without a GPU).
    """
    setting = os.environ.get("BIO_KERNELS_BACKEND", "auto")
    triton = importlib.metadata.version("triton") if _has_triton() else None
    gpu = ("triton" if triton else "reference") if setting == "auto" else setting
    return {
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "interpreter": interpreting(),
        "check": checking(),
        "BIO_KERNELS_BACKEND": setting,
        "cpu_backend": "reference" if setting == "auto" else setting,
        "gpu_backend": gpu if torch.cuda.is_available() else None,
    }


def on_its_device(body: Callable[..., Any], *args: Any) -> Any:
    """body(*args), launched on the GPU that holds the first tensor: Triton takes torch's current one."""
    first = next((x for x in args if isinstance(x, Tensor)), None)
    if first is None or first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
        return body(*args)
    with torch.cuda.device(first.device):
        return body(*args)
