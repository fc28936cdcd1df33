"""Compiles, without a GPU, every kernel launch of the shipped shapes for every supported GPU, and reads what came out.

The launchers run on meta tensors (nothing is allocated, and a host synchronisation would raise) while
``JITFunction.run`` is replaced by a recorder, so signatures, constants, pointer alignment and options are exactly those
that Triton's own binder would choose at run time; no signature is written by hand.

    python -m tests.aot              compile everything, print the figures and whatever breaks a rule of aot_rules.py
    python -m tests.aot --write      the same, and write the baseline (tests/aot_baseline.json)
    python -m tests.aot --json FILE [--default] [--arch sm_90] [--controls] [--addresses] [--cache FILE]
                                     what test_aot.py runs, in a process of its own without TRITON_INTERPRET
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled
sys.path.append(str(Path(__file__).parents[1] / "kernels"))  # for a checkout that is not installed

import torch
import triton
from bio_kernels import _storage
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from tests import aot_controls, aot_rules
from tests.aot_figures import figures
from tests.aot_ttir import Probe, narrow_products

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TOOLS = ("aot.py", "aot_figures.py", "aot_ttir.py")  # a change in them makes cached figures void
_WORKERS = 2
_CACHED = 4000  # rows kept between runs, about a kilobyte each
_GRID_LIMIT = (2**31 - 1, 65535, 65535)


@dataclass
class Launch:
    """One recorded launch: what the JIT would compile for it, and which of its tensors have 2**31 elements or more."""

    kernel: JITFunction
    constants: dict[tuple[int, ...], Any]
    options: Any
    source: ASTSource
    key: str
    probes: list[Probe]

    @property
    def configuration(self) -> str:
        """The constants that choose the code, and the options, in words."""
        names = self.kernel.arg_names
        chosen = [(names[path[0]], value) for path, value in sorted(self.constants.items()) if value is not None]
        limit = getattr(self.options, "maxnreg", None)
        options = [f"warps={self.options.num_warps}", f"stages={self.options.num_stages}"]
        constants = [f"{name}={value}" for name, value in chosen]
        return " ".join([*constants, *options, *([f"maxnreg={limit}"] if limit else [])])


def _bind(kernel: JITFunction, backend: BaseBackend, args: tuple, grid: Any, options: dict[str, Any]) -> Launch:
    """What ``JITFunction.run`` computes before it compiles."""
    options = {**options, "debug": False, "instrumentation_mode": ""}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = binder(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    source = ASTSource(kernel, signature, constants, attributes)
    key = hashlib.sha256(f"{source.hash()}{parsed.hash()}".encode()).hexdigest()
    large = [name for name, x in bound.items() if isinstance(x, torch.Tensor) and x.numel() >= 2**31]
    values = {name: x for name, x in bound.items() if isinstance(x, int)}
    grid = tuple(grid(bound) if callable(grid) else grid)
    if any(not 0 < extent <= limit for extent, limit in zip(grid, _GRID_LIMIT, strict=False)):
        raise RuntimeError(f"{kernel.__name__} is launched on the grid {grid}; allowed is 1 .. {_GRID_LIMIT}")
    probes = [Probe(large, values, grid)] if large else []
    return Launch(kernel, constants, parsed, source, key, probes)


@contextlib.contextmanager
def _recording(arch: str) -> Iterator[list[Launch]]:
    """Within the block launches are recorded for ``arch`` instead of run."""
    backend = make_backend(TARGETS[arch])
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(_bind(kernel, backend, args, grid, options))

    run, arch_of = JITFunction.run, _storage.arch_of
    JITFunction.run, _storage.arch_of = record, lambda x: arch
    try:
        yield launches
    finally:
        JITFunction.run, _storage.arch_of = run, arch_of


def record_launches(fn: Callable[[], object], arch: str) -> list[Launch]:
    """The kernel launches that ``fn()`` would make on a GPU of the given architecture, in order."""
    with _recording(arch) as launches:
        fn()
    return launches


def shipped(arch: str, cases: dict[str, Callable[[], object]]) -> dict[str, Launch]:
    """Launch by the name "arch | kernel | case"; a compilation that several cases ask for stands under the first."""
    rows: dict[str, Launch] = {}
    seen: dict[str, Launch] = {}
    for label, fn in cases.items():
        for launch in record_launches(fn, arch):
            first = seen.setdefault(launch.key, launch)
            if first is not launch:
                first.probes += launch.probes
                continue
            name = f"{arch} | {launch.kernel.__name__} | {label}"
            again = sum(row == name or row.startswith(f"{name} #") for row in rows)
            rows[f"{name} #{again + 1}" if again else name] = launch
    return rows


def _ttir(launch: Launch, arch: str) -> str:
    """The kernel's Triton IR after inlining: the first of the compiler's stages alone."""
    target, source = TARGETS[arch], launch.source
    backend, context, stages = make_backend(target), ir.context(), {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, launch.options, source.language)
    functions = backend.get_codegen_implementation(launch.options)
    module = source.make_ir(target, launch.options, functions, backend.get_module_map(), context)
    return str(stages["ttir"](module, {}))


def compile_launch(launch: Launch, arch: str, addresses_only: bool = False) -> dict[str, Any]:
    """Figures of one compilation, and its 32-bit products; {"error": ...} if the compiler refuses."""
    log = io.StringIO()
    start = time.perf_counter()
    measured = {}
    try:
        if addresses_only:
            text = _ttir(launch, arch)
        else:
            with contextlib.redirect_stdout(log):
                compiled = triton.compile(launch.source, target=TARGETS[arch], options=launch.options.__dict__)
            text, measured = compiled.asm["ttir"], figures(compiled, log.getvalue())
    except Exception as error:  # every refusal is a finding of its row, not the end of the run
        return {"error": f"{type(error).__name__}: {str(error)[:600]}"}
    narrow = sorted({line for probe in launch.probes for line in narrow_products(text, probe)})
    large = sorted({name for probe in launch.probes for name in probe.large})
    return {**measured, "narrow": narrow, "large": large, "seconds": round(time.perf_counter() - start, 2)}


def addresses(rows: dict[str, Launch]) -> dict[str, dict[str, Any]]:
    """The 32-bit products alone, of the rows that reach past 2**31 elements: a small part of a compilation."""
    return {
        name: compile_launch(launch, name.split(" | ")[0], addresses_only=True)
        for name, launch in rows.items()
        if launch.probes
    }


_rows: dict[str, Launch] = {}  # read by the workers, which are forked after it is filled: launches do not pickle


def _compile_row(name: str) -> tuple[str, dict[str, Any]]:
    return name, compile_launch(_rows[name], name.split(" | ")[0])


def measure(rows: dict[str, Launch], cache: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures of every row; what ``cache`` holds is not compiled again, and it is filled with what was."""
    tools = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in _TOOLS))
    assemblers = f"{knobs.nvidia.ptxas.version} {knobs.nvidia.ptxas_blackwell.version}"
    version = f"{triton.__version__} {assemblers} {tools.hexdigest()[:16]}"
    keys = {name: f"{version} {name.split(' | ')[0]} {launch.key} {launch.probes}" for name, launch in rows.items()}
    _rows.update(rows)
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True  # a hit in Triton's cache would bring no ptxas log
    todo = [name for name in rows if keys[name] not in cache]
    with tempfile.TemporaryDirectory() as folder:
        knobs.cache.dir = folder
        with multiprocessing.get_context("fork").Pool(_WORKERS) as pool:
            for name, figures in pool.imap_unordered(_compile_row, todo):
                cache[keys[name]] = figures
    for name in rows:
        cache[keys[name]] = cache.pop(keys[name])  # the last used stand last
    return {name: cache[keys[name]] for name in rows}


def _selection(rows: dict[str, Launch], default: bool) -> dict[str, Launch]:
    """All rows; in the default selection one per kernel on every architecture but sm_90."""
    if not default:
        return rows
    first: dict[str, str] = {}
    for name in rows:
        first.setdefault(name.rpartition(" | ")[0], name)
    return {name: row for name, row in rows.items() if name.startswith("sm_90 ") or name in first.values()}


def report(rows: dict[str, Launch], measured: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Everything test_aot.py judges: what ships, and the figures of what was compiled."""
    return {
        "triton": triton.__version__,
        "shipped": {name: launch.configuration for name, launch in rows.items()},
        "rows": {name: {"config": rows[name].configuration, **figures} for name, figures in measured.items()},
        "seconds": round(seconds, 1),
    }


def _library_cases() -> dict[str, Callable[[], object]]:
    from tests import aot_cases  # only where needed: the controls must run even where a kernel file cannot be imported

    return aot_cases.cases()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write the baseline (needs every architecture)")
    parser.add_argument("--json", type=Path, help="write the report here instead of printing it")
    parser.add_argument("--default", action="store_true", help="sm_90 whole, one configuration a kernel for the others")
    parser.add_argument("--arch", choices=TARGETS, action="append", help="only this architecture (may be repeated)")
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    parser.add_argument("--controls", action="store_true", help="the kernels of aot_controls.py instead of ours")
    parser.add_argument("--addresses", action="store_true", help="only the check for 32-bit products, into --json")
    parser.add_argument("--cache", type=Path, help="file that keeps figures between runs")
    args = parser.parse_args(argv)
    if args.write and (args.default or args.arch or args.case or args.controls or args.addresses):
        parser.error("--write needs everything compiled")
    if args.addresses and not args.json:
        parser.error("--addresses needs --json")
    start = time.perf_counter()
    cases = aot_controls.CASES if args.controls else _library_cases()
    cases = {label: fn for label, fn in cases.items() if args.case in label}
    cache = json.loads(args.cache.read_text()) if args.cache and args.cache.exists() else {}
    rows = {name: launch for arch in args.arch or TARGETS for name, launch in shipped(arch, cases).items()}
    measured = addresses(rows) if args.addresses else measure(_selection(rows, args.default), cache)
    result = report(rows, measured, time.perf_counter() - start)
    if args.cache:
        args.cache.write_text(json.dumps(dict(list(cache.items())[-_CACHED:])))
    if args.write:
        aot_rules.write_baseline(result)
    if args.json:
        args.json.write_text(json.dumps(result))
        return 0
    for name, row in result["rows"].items():
        print(name, {key: value for key, value in row.items() if key not in ("config", "large")})
    problems = aot_rules.violations(result)
    done = f"{len(result['rows'])} of {len(result['shipped'])} configurations in {result['seconds']} s"
    print(*problems, f"{done}, {len(problems)} findings", sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
