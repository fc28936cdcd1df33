"""Small BioHama models and tokens that the tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biohama import BioHamaConfig, BioHamaModel
from biohama.config import MODULES

ONE_LESS = tuple(tuple(name for name in MODULES if name != gone) for gone in MODULES)
SWITCHES: tuple[dict[str, Any], ...] = (
    {},
    *({"modules": modules} for modules in ONE_LESS),
    *({"modules": (name,)} for name in MODULES[2:]),
    *({"threshold": 0.0}, {"winner_take_all": False}, {"winner_take_all": False, "threshold": 0.0}),
    *({"tied_cue": False}, {"inhibition": False}, {"read_width": 0}, {"read_width": 0, "winner_take_all": False}),
    *({"n_rounds": 0}, {"n_rounds": 2, "n_heads": 4}),
)


def label(value: Any) -> str:
    """A readable name of a case of SWITCHES."""
    if "modules" in value:
        names = value["modules"]
        return f"only {names[0]}" if len(names) == 1 else f"without {next(n for n in MODULES if n not in names)}"
    return " ".join(f"{name}={setting}" for name, setting in value.items()) or "default"


def shaken(seed: int = 0, **changes: Any) -> BioHamaModel:
    """A tiny model in which nothing is left as it starts: no zeros, no ones, no equal biases."""
    torch.manual_seed(seed)
    model = BioHamaModel(BioHamaConfig.tiny(**{"vocab_size": 30, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.add_(torch.randn_like(parameter) * 0.3 * (spread or 1.0))
    return model


def tokens_of(batch: int, length: int, vocab_size: int = 30, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@torch.no_grad()
def stepped(model: BioHamaModel, tokens: Tensor) -> Tensor:
    """(B, T, V): one token after another."""
    state, logits = model.start(len(tokens)), []
    for token in tokens.unbind(1):
        here, state = model.step(token, state)
        logits.append(here)
    return torch.stack(logits, 1)
