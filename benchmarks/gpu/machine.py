"""The machine: names, versions, and what it does at best."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil

import torch
from bio_kernels import backend_info

from .. import roofline
from . import condition
from .journal import Row
from .setting import Rows, Setting, commit, python_version

PACKAGES = ("pytest", "hypothesis", "numpy", "torch", "triton", "flashinfer-python")
PACKAGES += ("nvidia-cutlass-dsl", "apache-tvm-ffi", "pytest-xdist", "pytest-timeout")
TOOLS = ("compute-sanitizer", "ncu", "nvidia-smi")


def describe(setting: Setting) -> Row:
    """In the form of machine_info and commit_info of --benchmark-json, as far as that reaches."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    row: Row = {
        "machine_info": {
            "device": torch.cuda.get_device_name() if setting.cuda else "rehearsal",
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "python_version": python_version(),
            "backend": backend_info(),
        },
        "commit_info": commit(),
        "datetime": condition.now(),
        "packages": packages,
        "tools": {name: bool(shutil.which(name)) for name in TOOLS},
        "left_out": [f"{name} is not installed" for name, version in packages.items() if version is None],
    }
    if setting.cuda:
        properties = torch.cuda.get_device_properties(0)
        row["device"] = {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        row["gpu"] = condition.read()
    return row | {"line": "; ".join(row["left_out"]) or "every package is there"}


def ceilings(setting: Setting) -> Row:
    """Bytes per second of a large copy (read and write), FLOPs per second of a large product of random matrices."""
    if not setting.cuda:
        return {"line": "no ceilings in a rehearsal"}
    measured = roofline.measured(setting.device)
    rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in measured.matmul.items())
    facts = {"copy_bytes_per_s": measured.copy, "matmul_flops_per_s": measured.matmul}
    return {"roofline": facts, "line": f"copy {measured.copy / 1e12:.2f} TB/s, {rates}"}


def rows(setting: Setting) -> Rows:
    yield "machine", lambda: describe(setting)
    yield "ceilings", lambda: ceilings(setting)
