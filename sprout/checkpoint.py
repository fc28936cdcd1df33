"""Checkpoints: a folder of safetensors and JSON with a manifest, complete or not there. Knows no model.

A state (of an optimizer, of the random generators) is a tree of dicts, lists, tuples, tensors and JSON's values; its
tensors go to one file, what holds them together to another, and nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .disk import new_folder, write_synced

FORMAT = 1
MANIFEST, WEIGHTS, STATE, TREE = "manifest.json", "model.safetensors", "state.safetensors", "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete or damaged; the message names the file and what is wrong with it."""


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    step: optimizer steps taken. weights: a state_dict. state: a tree, see the module. score: lower is better, or None.
    texts: further files, name -> content. path: where it was read from.
    """

    step: int
    weights: dict[str, Tensor]
    state: Any
    score: float | None = None
    texts: dict[str, str] = field(default_factory=dict)
    path: Path | None = None


def require_safetensors() -> Any:
    """The module safetensors.torch. Raises: ImportError that names the command which installs it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('checkpoints need safetensors: pip install "bio-kernels[train]"') from error
    return safetensors.torch


def flatten(tree: Any, name: str = "", tensors: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Any]:
    """A tree as (tensors by their path, the rest as JSON's values); ``unflatten`` is its inverse.

    Raises: TypeError for a value that is neither, with its path.
    """
    tensors = {} if tensors is None else tensors
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return tensors, {"tensor": name}
    if isinstance(tree, dict):
        return tensors, {"dict": [[_key(k, name), flatten(v, f"{name}/{k}", tensors)[1]] for k, v in tree.items()]}
    if isinstance(tree, (list, tuple)):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return tensors, {kind: [flatten(v, f"{name}/{i}", tensors)[1] for i, v in enumerate(tree)]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tensors, tree
    raise TypeError(f"the state holds a {type(tree).__name__} at {name or 'its root'}: only tensors and JSON's values")


def _key(key: Any, name: str) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"the state holds the key {key!r} at {name or 'its root'}: only str and int")
    return key


def unflatten(tensors: dict[str, Tensor], tree: Any) -> Any:
    """The tree that ``flatten`` took apart. Raises: KeyError for a tensor that is not there."""
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: unflatten(tensors, v) for k, v in value}
    return (tuple if kind == "tuple" else list)(unflatten(tensors, v) for v in value)


def to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """Tensors of any device and stride as a safetensors file; those that share memory are stored one by one."""
    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return require_safetensors().save(ready)


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint; whoever looks at path sees all of it or nothing. Raises: DiskError, nothing changed."""
    tensors, tree = flatten(checkpoint.state)
    files = {
        WEIGHTS: to_bytes(checkpoint.weights),
        STATE: to_bytes(tensors),
        TREE: json.dumps(tree).encode(),
        **{name: text.encode() for name, text in checkpoint.texts.items()},
    }
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest = {"format": FORMAT, "step": checkpoint.step, "score": checkpoint.score, "files": entries}
    manifest["sha256"] = _digest(manifest)
    with new_folder(path) as folder:
        for name, data in files.items():
            write_synced(folder / name, data)
        write_synced(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; its files are not looked at. Raises: CheckpointError."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: {path} is not a complete checkpoint")
    try:
        manifest = json.loads(file.read_text())
        intact = manifest["sha256"] == _digest(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({file.stat().st_size} bytes): {error}") from None
    if not intact:
        raise CheckpointError(f"{file} is damaged: its SHA-256 does not match its content")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{file} has format {manifest['format']!r}, this version reads {FORMAT}")
    return manifest


def read_files(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and every file that it lists, each compared with its size and SHA-256. Raises: CheckpointError."""
    manifest, files = read_manifest(path), {}
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        data = file.read_bytes()
        if len(data) != entry["bytes"]:
            raise CheckpointError(f"{file} is incomplete ({len(data)} bytes of {entry['bytes']})")
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the manifest's")
        files[name] = data
    return manifest, files


def read(path: Path) -> Checkpoint:
    """A checkpoint, verified; its tensors on the CPU. Raises: CheckpointError that names the file at fault."""
    load = require_safetensors().load
    manifest, files = read_files(path)
    return Checkpoint(
        manifest["step"],
        load(files.pop(WEIGHTS)),
        unflatten(load(files.pop(STATE)), json.loads(files.pop(TREE))),
        manifest["score"],
        {name: data.decode() for name, data in files.items()},
        path,
    )


def seed_everything(seed: int) -> None:
    """Seeds python's, numpy's and torch's global generators, on every device. Args: seed, 0 <= seed < 2**32."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 the global generator is what others draw from
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of the generators that ``seed_everything`` seeds, as a tree."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss},
        "numpy": {"name": str(name), "keys": torch.from_numpy(np.array(keys, np.int64)), "position": int(position)}
        | {"has_gauss": int(has_gauss), "cached": float(cached)},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Continues where ``random_state`` was. CUDA's generators only where there are as many devices as then."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(  # noqa: NPY002
        (numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"])
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
