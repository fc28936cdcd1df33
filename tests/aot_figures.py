"""Reads the figures of one compiled kernel: ptxas's log and the disassembly on NVIDIA, the assembly on AMD."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

from triton import knobs


def _match(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def _tensor_core(codes: list[str]) -> dict[str, Any]:
    """How many tensor-core instructions, and of which kinds: HGMMA (asynchronous, sm_90), HMMA, UTCHMMA, mfma."""
    return {"tensor_core": len(codes), "kinds": " ".join(sorted(set(codes)))}


def _nvidia_figures(compiled: Any, log: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    codes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE)
    loads = [code for code in codes if code.split(".")[0] in ("LDG", "LDGSTS")]
    widths = [next((int(part) for part in code.split(".") if part in ("64", "128", "256")), 32) for code in loads]
    bulk = any(code.startswith(("UTMALDG", "UBLKCP")) for code in codes)
    return {
        "registers": _match(r"Used (\d+) registers", log),
        "spill": _match(r"(\d+) bytes spill stores", log) + _match(r"(\d+) bytes spill loads", log),
        "instructions": sum(code != "NOP" for code in codes),
        **_tensor_core([code.split(".")[0] for code in codes if code.split(".")[0].endswith("MMA")]),
        "load_bits": max([*widths, 128 * bulk]),
    }


def _amd_figures(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    codes = re.findall(r"^\t([sv]_\w+|ds_\w+|(?:global|buffer|flat|scratch)_\w+)", text, re.MULTILINE)
    loads = re.findall(r"^\t(?:global|buffer|flat)_load_(?:dword|[us]byte|[us]?short)(x\d)?", text, re.MULTILINE)
    return {
        "registers": _match(r"\.vgpr_count:\s+(\d+)", text),
        "spill": 4 * _match(r"\.vgpr_spill_count:\s+(\d+)", text),
        "instructions": len(codes),
        **_tensor_core([code.split("_")[1] for code in codes if code.startswith(("v_mfma", "v_smfmac"))]),
        "load_bits": max([32 * int(width[1:] or 1) for width in loads], default=0),
    }


def figures(compiled: Any, log: str) -> dict[str, Any]:
    """Registers, spill (bytes), instructions, tensor-core instructions, widest global load (bits), shared memory
    (bytes), tensor memory (columns) and tl.dot of a ``triton.compile`` result; log is what ptxas printed.
    """
    machine = _amd_figures(compiled) if "amdgcn" in compiled.asm else _nvidia_figures(compiled, log)
    return {
        **machine,
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0),
        "dots": len(re.findall(r"= tt\.dot", compiled.asm["ttir"])),
    }
