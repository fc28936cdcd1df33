"""Who computes: the environment's switches, what cannot run here, and that nothing falls back in silence."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import bio_kernels as bk
import pytest
import torch
from bio_kernels import _backend
from bio_kernels.testing import make_inputs

from tests.ways import Way, backward, every_way

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("no_environment")
KERNEL_FILES = (
    "_topk_gather", "_segment", "_weighted_rows", "_attention", "_attention_backward", "_pairs", "_plasticity",
)  # fmt: skip
REFERENCE = ("reference", "reference_pairs")
ENTRIES = (
    "topk_gather_forward", "scatter_gate", "segment_rows", "weighted_rows_forward", "weighted_rows_backward_weight",
    "weighted_rows_backward_table", "attention_forward", "attention_backward", "pair_gradient", "update_strength",
)  # fmt: skip
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def python(code: str, **environment: str) -> str:
    """What a fresh Python prints; TRITON_INTERPRET is unset unless given."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)]), "OMP_NUM_THREADS": "1", **environment}
    ended = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_on_a_cpu_no_kernel_file_is_imported() -> None:
    """Not by the import; and no operation loads a kernel file, although torch itself may load Triton."""
    code = """
import sys, bio_kernels as bk, torch
from bio_kernels.testing import make_inputs
print("triton" in sys.modules)
x = make_inputs(2, 16, 4).to(torch.float32, grad=True)
top = bk.topk_gather(x.score, x.table, 4)
out = bk.sparse_attention(x.q, x.k, x.v, x.idx, x.strength, gate=x.gate)
(out.sum() + top.rows.sum() + bk.weighted_rows(x.strength, x.idx, x.gate).sum()).backward()
bk.update_strength_(x.strength, x.idx, x.pre, x.post, eta=0.1)
print(any(name in sys.modules for name in KERNELS))
"""
    assert (
        python(code.replace("KERNELS", repr([f"bio_kernels.{file}" for file in KERNEL_FILES]))).split() == ["False"] * 2
    )


@needs_triton
def test_the_interpreter_is_never_chosen_alone() -> None:
    """Without TRITON_INTERPRET a request on a CPU tensor is refused; with it, "auto" is still the reference."""
    code = """
import sys, bio_kernels as bk, torch
score, table = torch.rand(1, 4), torch.rand(4, 1)
bk.topk_gather(score, table, 2)
print("bio_kernels._topk_gather" in sys.modules)
try:
    bk.topk_gather(score, table, 2, backend="triton")
    print("ran")
except RuntimeError as error:
    print(error)
"""
    refused = python(code)
    assert 'backend "triton" cannot run on cpu tensors' in refused
    assert "TRITON_INTERPRET=1" in refused
    assert python(code, TRITON_INTERPRET="1").split() == ["False", "ran"]


@pytest.mark.parametrize("given", ["cuda", "", "AUTO", "Reference"])
def test_unknown_names(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(1, 4)
    with pytest.raises(ValueError, match=rf"backend must be one of auto, triton, reference, dense, got '{given}'"):
        bk.topk_gather(x, x.t(), 2, backend=given)
    monkeypatch.setenv("BIO_KERNELS_BACKEND", given)
    with pytest.raises(ValueError, match=rf"BIO_KERNELS_BACKEND must be auto, triton or reference, got '{given}'"):
        bk.topk_gather(x, x.t(), 2)


def test_the_environment_decides_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(1, 4)
    assert _backend.resolve("auto", x) == "reference"
    monkeypatch.setenv("BIO_KERNELS_BACKEND", "reference")
    assert _backend.resolve("auto", x) == "reference"
    monkeypatch.setenv("BIO_KERNELS_BACKEND", "triton")
    assert _backend.resolve("dense", x) == "dense", "what a call asks for goes before the environment"
    monkeypatch.setattr(_backend, "interpreting", lambda: False)
    with pytest.raises(RuntimeError, match="cannot run on cpu tensors"):
        _backend.resolve("auto", x)
    monkeypatch.setattr(_backend, "_has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        _backend.resolve("auto", x)


class OnGpu:
    """As much of a CUDA tensor as the choice of a backend looks at."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype


def test_gpu_tensors_take_triton_and_double_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_has_triton", lambda: True)
    x: Any = OnGpu()
    assert _backend.resolve("auto", x) == "triton"
    assert _backend.resolve("auto", x, OnGpu(torch.bfloat16)) == "triton"  # type: ignore[arg-type]
    assert _backend.resolve("auto", x, OnGpu(torch.float64)) == "reference"  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="float64"):
        _backend.resolve("triton", OnGpu(torch.float64))  # type: ignore[arg-type]


def test_without_triton_a_gpu_tensor_takes_the_reference_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_has_triton", lambda: False)
    _backend._warn_no_triton.cache_clear()
    x: Any = OnGpu()
    with pytest.warns(RuntimeWarning, match=r"pip install .*triton") as caught:
        assert [_backend.resolve("auto", x) for _ in range(3)] == ["reference"] * 3
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        _backend.resolve("triton", x)
    monkeypatch.setenv("BIO_KERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        _backend.resolve("auto", x)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter needs a machine without a GPU here")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_the_interpreter_cannot_do_are_refused(dtype: torch.dtype) -> None:
    """float64 would be rounded down; Triton's interpreter returns garbage for bfloat16 products."""
    x = make_inputs(2, 16, 4).to(dtype)
    calls = [
        lambda: bk.topk_gather(x.score, x.table, 2, backend="triton"),
        lambda: bk.sparse_attention(x.q, x.k, x.v, x.idx, backend="triton"),
        lambda: bk.weighted_rows(x.table, x.idx, x.gate, backend="triton"),
        lambda: bk.update_strength_(x.strength, x.idx, x.pre, x.post, eta=0.1, backend="triton"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"float64|bfloat16"):
            call()


def disable(files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function that an operator calls in these files raises."""

    def raising(*_: object, **__: object) -> None:
        raise AssertionError("the other backend ran")

    for file in files:
        module = importlib.import_module(f"bio_kernels.{file}")
        for name in ENTRIES:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, raising)


@every_way(single=True)
@pytest.mark.parametrize("storage", ["dense", "block_sparse"])
def test_what_was_asked_for_is_what_ran(way: Way, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, with the other backend's functions out of order; and with its own, nothing runs."""
    others = {"triton": REFERENCE, "reference": KERNEL_FILES if importlib.util.find_spec("triton") else ()}
    x = make_inputs(2, 16, 4, storage=storage).to(way.dtype, way.device, grad=True)
    calls = [
        lambda: bk.topk_gather(x.score, x.table, 4, backend=way.backend),
        lambda: bk.sparse_attention(x.q, x.k, x.v, x.idx, x.strength, gate=x.gate, backend=way.backend),
        lambda: bk.weighted_rows(x.strength, x.idx, x.gate, backend=way.backend),
    ]
    disable(others[way.backend], monkeypatch)
    results = [call() for call in calls]
    for result in results:
        backward(result)
    bk.update_strength_(x.strength, x.idx, x.pre, x.post, eta=0.1, backend=way.backend)
    results = [call() for call in calls]
    disable(REFERENCE if way.backend == "reference" else KERNEL_FILES, monkeypatch)
    for call in [*calls, *(lambda result=result: backward(result) for result in results)]:
        with pytest.raises(AssertionError, match="the other backend ran"):
            call()


def test_backend_info(monkeypatch: pytest.MonkeyPatch) -> None:
    info = bk.backend_info()
    assert set(info) == {
        "torch", "triton", "cuda", "hip", "interpreter", "check", "BIO_KERNELS_BACKEND", "cpu_backend", "gpu_backend",
    }  # fmt: skip
    assert info["torch"] == torch.__version__
    assert info["BIO_KERNELS_BACKEND"] == "auto"
    assert info["check"] is False
    assert info["cpu_backend"] == "reference"
    assert (info["gpu_backend"] is None) == (not torch.cuda.is_available())
    monkeypatch.setenv("BIO_KERNELS_CHECK", "1")
    monkeypatch.setenv("BIO_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    info = bk.backend_info()
    assert info["check"] is True
    assert info["interpreter"] is True
    assert info["cpu_backend"] == "triton"


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    _backend._log_choice.cache_clear()
    x = torch.rand(1, 4)
    with caplog.at_level(logging.INFO, logger="bio_kernels"):
        for _ in range(3):
            bk.topk_gather(x, x.t(), 2)
    assert [record.getMessage() for record in caplog.records] == [
        "operations on cpu tensors run on the reference backend"
    ]


def test_the_choice_of_a_gpu_is_traced_without_a_warning():
    """torch.compile warns of cached functions, which it does not honour; a user would see that in every GPU program."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(lambda x: x + _backend._has_triton(), fullgraph=True, backend="eager")
        assert float(compiled(torch.zeros(()))) == float(_backend._has_triton())
