"""A trained model with its tokenizer, from wherever training left it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoint as checkpoints
from .config import SproutConfig
from .gpt import GPT, EncoderOnly
from .model import BrainLikeSprout
from .pretrained import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    PretrainedError,
    find_folder,
    load_weights,
    parse_config,
    read_file,
    read_weights,
    save_model,
)
from .text import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)
MODELS: dict[str, type[nn.Module]] = {"sprout": BrainLikeSprout, "gpt": GPT, "encoder": EncoderOnly}


def make_model(kind: str, config: SproutConfig) -> nn.Module:
    """A new model with random weights. Raises: ValueError unless kind is "sprout", "gpt" or "encoder"."""
    if kind not in MODELS:
        raise ValueError(f"model must be one of {', '.join(map(repr, MODELS))}, got {kind!r}")
    return MODELS[kind](config)


def save(model: Any, folder: str | Path, tokenizer: Tokenizer) -> None:
    """Writes config.json, model.safetensors and tokenizer.json. Raises: ImportError, DiskError."""
    save_model(model, model.KIND, folder, tokenizer.to_json())


def load(source: str | Path, **download: Any) -> tuple[Any, Tokenizer]:
    """(model on the CPU in eval mode, its tokenizer).

    Args: source, a run folder (its RUN/model, or the newest checkpoint that is whole), RUN/model, a checkpoint's
        folder, or "owner/name" on the hub; download, as in ``BrainLikeSprout.from_pretrained``.
    Raises: PretrainedError, CheckpointError or TextError that name the file at fault; ImportError.
    """
    folder = find_folder(source, **download)
    if (folder / "checkpoints").is_dir():
        if (folder / "model" / CONFIG).is_file():
            return _load_folder(folder / "model")
        return _load_newest(folder)
    if (folder / checkpoints.MANIFEST).is_file():
        return _load_checkpoint(folder)
    return _load_folder(folder)


def _load_newest(run: Path) -> tuple[Any, Tokenizer]:
    problems = []
    for path in sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True):
        try:
            return _load_checkpoint(path)
        except checkpoints.CheckpointError as error:
            log.warning("%s; trying the checkpoint before it", error)
            problems.append(str(error))
    raise PretrainedError(f"{run} holds no model and no whole checkpoint{''.join('; ' + p for p in problems)}")


def _load_checkpoint(folder: Path) -> tuple[Any, Tokenizer]:
    found = checkpoints.read(folder)
    for name in (CONFIG, TOKENIZER):
        if name not in found.texts:
            raise PretrainedError(f"{folder / name} is not part of this checkpoint")
    return _build(found.texts[CONFIG], found.weights, found.texts[TOKENIZER], folder)


def _load_folder(folder: Path) -> tuple[Any, Tokenizer]:
    config, tokenizer = read_file(folder, CONFIG), read_file(folder, TOKENIZER)
    return _build(config, read_weights(folder), tokenizer.decode(), folder)


def _build(config: str | bytes, weights: Any, tokenizer: str, folder: Path) -> tuple[Any, Tokenizer]:
    kind, sizes = parse_config(config, folder / CONFIG)
    if kind not in MODELS:
        raise PretrainedError(f"{folder / CONFIG} describes the model {kind!r}; known: {', '.join(MODELS)}")
    words = load_tokenizer(tokenizer, str(folder / TOKENIZER))
    if words.vocab_size > sizes.vocab_size:
        raise PretrainedError(
            f"{folder / TOKENIZER} has {words.vocab_size} tokens, {folder / CONFIG} only vocab_size={sizes.vocab_size}"
        )
    model = make_model(kind, sizes)
    load_weights(model, weights, folder / WEIGHTS)
    return model.eval(), words
