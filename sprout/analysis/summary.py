"""Everything that a report says of a model, as numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model import BrainLikeSprout
from ..pattern import ActivationPattern
from .connections import Synapses, strongest_synapses
from .labels import KINDS, Labels, character_of, label
from .observation import Observation, evaluating, observe, windows
from .settling import Settling, settling_of
from .specialisation import Specialisation, selectivity

_SHOWN = 64  # windows in the picture of the activation
_WINDOW = 256  # tokens, at most


@dataclass(frozen=True)
class ReportSettings:
    """What a report looks at.

    title: of the page; None: "SPROUT analysis". trained: False says in title and text that the model is untrained.
    max_tokens: tokens of the text to read, each the end of one input. window: longest input in tokens; None: the
    model's max_seq_len, at most 256. permutations: of the shuffled control. twin: whether a trained model is compared
    with an untrained one of the same sizes. seed: of control and twin.
    """

    title: str | None = None
    trained: bool = True
    max_tokens: int = 8192
    window: int | None = None
    permutations: int = 100
    twin: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "permutations", "window"):
            value = getattr(self, name)
            if not (type(value) is int and value >= 1) and not (name == "window" and value is None):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


@dataclass(frozen=True)
class Driven:
    """One kind of label: what it explains, against the stricter control, and in the untrained twin."""

    labels: Labels
    found: Specialisation
    shifted: Specialisation
    twin: Specialisation | None


@dataclass(frozen=True)
class Analysis:
    """All that a report says of a model. history: of the first windows; where: the character of each input's end."""

    model: BrainLikeSprout
    settings: ReportSettings
    text: str
    where: Any
    window: int
    history: list[ActivationPattern]
    seen: Observation
    settling: Settling
    driven: dict[str, Driven]
    synapses: Synapses

    def drives(self) -> dict[int, str]:
        """Neuron -> the character that drives it, of the neurons above the shuffled control."""
        found = self.driven[KINDS[0]].found
        rows = zip(found.neuron.tolist(), found.preferred.tolist(), found.selectivity, strict=True)
        return {n: found.names[p] for n, p, value in rows if p >= 0 and value > found.threshold}


def analyse(model: BrainLikeSprout, encode: Any, text: str, settings: ReportSettings) -> Analysis:
    """The numbers of a report, without writing any; arguments and errors as in ``write_report``."""
    encode, decode = _methods(encode)
    text = text[: settings.max_tokens * 16]  # no usual token is longer
    tokens = encode(text)
    if len(tokens) < 2:
        raise ValueError(f"text must hold at least two tokens, got {len(tokens)}; give a longer one")
    where = character_of(text, tokens, decode)
    window = min(settings.window or _WINDOW, model.config.max_seq_len)
    rows = windows(tokens[: settings.max_tokens], window)
    seen = observe(model, rows)
    with evaluating(model):
        first = rows[:_SHOWN].to(model.pool.threshold.device)
        history = model.analyze_activation(first)["activation_history"]
    other = observe(untrained_twin(model, settings.seed), rows) if settings.trained and settings.twin else None
    where = where[: seen.n_inputs]
    driven = {kind: _driven(seen, other, label(text, where, kind), settings) for kind in KINDS}
    synapses = strongest_synapses(model.pool.connection_strength)
    return Analysis(model, settings, text, where, rows.shape[1], history, seen, settling_of(seen), driven, synapses)


def untrained_twin(model: BrainLikeSprout, seed: int) -> BrainLikeSprout:
    """A new model of the same sizes, dtype and device; torch's global generator is left as it was."""
    like = model.pool.threshold
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BrainLikeSprout(model.config).to(like.device, like.dtype)


def _methods(encode: Any) -> tuple[Callable[[str], Tensor], Any]:
    """(encode, decode or None) of a tokenizer, or of its method encode."""
    tokenizer = encode if hasattr(encode, "encode") else getattr(encode, "__self__", None)
    return getattr(encode, "encode", encode), getattr(tokenizer, "decode", None)


def _driven(seen: Observation, other: Observation | None, labels: Labels, settings: ReportSettings) -> Driven:
    times, seed = settings.permutations, settings.seed
    found = selectivity(seen, labels, permutations=times, seed=seed)
    shifted = selectivity(seen, labels, permutations=times, control="shift", seed=seed)
    twin = None if other is None else selectivity(other, labels, permutations=times, seed=seed)
    return Driven(labels, found, shifted, twin)


def summarise(done: Analysis) -> dict[str, Any]:
    """The figures of a report as plain numbers, lists and dicts: what analysis.json holds."""
    s, config = done.synapses, done.model.config
    return {
        "title": title_of(done.settings),
        "settings": asdict(done.settings),
        "model": {**asdict(config), "parameters": sum(p.numel() for p in done.model.parameters())},
        "inputs": {"count": done.seen.n_inputs, "window": done.window, "shown_windows": len(done.history[0].count)},
        "settling": done.settling.as_dict(),
        "specialisation": {kind: _figures(driven) for kind, driven in done.driven.items()},
        "connections": {
            "stored": s.stored,
            "positive": s.positive,
            "negative": s.negative,
            "largest": float(abs(s.strength[0])) if len(s.strength) else 0.0,
            "largest_to_itself": s.largest_self,
            **_alike(done),
        },
        "torch": str(torch.__version__),
    }


def title_of(settings: ReportSettings) -> str:
    """The page's title; an untrained model is called that."""
    return (settings.title or "SPROUT analysis") + ("" if settings.trained else ": untrained model")


def _figures(driven: Driven) -> dict[str, Any]:
    found, twin = driven.found, driven.twin
    return {
        "labels": len(found.names),
        "active": len(found.neuron),
        "silent": found.silent,
        "share_above_shuffled": found.share,
        "threshold_shuffled": found.threshold,
        "share_above_shifted": driven.shifted.share,
        "threshold_shifted": driven.shifted.threshold,
        "median_selectivity": _median(found),
        "untrained_median_selectivity": None if twin is None else _median(twin),
        "untrained_share_above_shuffled": None if twin is None else twin.share,
    }


def _median(found: Specialisation) -> float:
    return float(np.median(found.selectivity)) if len(found.selectivity) else 0.0


def _alike(done: Analysis) -> dict[str, float]:
    """Share of the strongest synapses whose neurons are driven by the same character, and what chance would give."""
    drives, s = done.drives(), done.synapses
    both = [
        (drives[a], drives[b])
        for a, b in zip(s.pre.tolist(), s.post.tolist(), strict=True)
        if a in drives and b in drives
    ]
    sizes = [list(drives.values()).count(name) / len(drives) for name in set(drives.values())]
    if not both:
        return {}
    return {"same_label": sum(a == b for a, b in both) / len(both), "same_label_by_chance": sum(x * x for x in sizes)}
