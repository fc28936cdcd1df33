"""A model in one folder: pictures, their data, tables, analysis.json and a page that explains them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..model import BrainLikeSprout
from .labels import KINDS
from .plot_activation import visualize_activation_evolution
from .plot_connections import visualize_connections
from .plot_settling import visualize_settling
from .plot_specialisation import visualize_specialisation
from .plot_style import write
from .story import picture_of, tell
from .summary import Analysis, ReportSettings, analyse, summarise

__all__ = ["ReportSettings", "write_report"]


def write_report(
    model: BrainLikeSprout,
    encode: Callable[[str], Tensor] | Any,
    text: str,
    out: str | Path,
    settings: ReportSettings | None = None,
) -> Path:
    """Analyses a model on a text, and writes what it finds.

    Args:
        model: with config.causal; left in the mode it was in. encode: a tokenizer with encode and decode, or its method
            encode, str -> (L,) int64. text: at least two tokens; of a long one the beginning.
        out: a folder; it is made, and files of the same names are replaced.
    Writes: activation, settling, connections and one specialisation picture for each kind of label, as PNG, SVG and
        .npz; neurons.csv, synapses.csv, analysis.json, index.html.
    Returns: the path of index.html. Raises: ValueError for a text that is too short, tokens without their characters, a
        model that is not causal; TypeError for a model without a pool; OSError. Determinism: as ``observe``.
    """
    settings = settings or ReportSettings()
    if not isinstance(model, BrainLikeSprout):
        raise TypeError(f"model must be a BrainLikeSprout, got {type(model).__name__}: there is no pool to look at")
    done = analyse(model, encode, text, settings)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _draw(done, out)
    _tables(done, out)
    summary = summarise(done)
    (out / "analysis.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    index = out / "index.html"
    index.write_text(tell(done, summary, out), encoding="utf-8")
    return index


def _draw(done: Analysis, out: Path) -> None:
    figures = {
        "activation": visualize_activation_evolution(done.history, out / "activation.png"),
        "settling": visualize_settling(done.seen, out / "settling.png"),
        "connections": visualize_connections(done.synapses, done.drives(), out / "connections.png"),
    }
    for kind, driven in done.driven.items():
        name = picture_of(kind)
        figures[name] = visualize_specialisation(
            done.seen, driven.labels, driven.found, out / f"{name}.png", twin=driven.twin
        )
    for name, figure in figures.items():
        write(figure, out / f"{name}.svg")


def _tables(done: Analysis, out: Path) -> None:
    s, drives = done.synapses, done.drives()
    heads = ["neuron", "inputs", "mean_gate_when_active", *(f"{k} {x}" for k in KINDS for x in ("eta2", "label"))]
    _write_csv(out / "neurons.csv", heads, _neurons(done))
    rows = zip(s.pre.tolist(), s.post.tolist(), s.strength.tolist(), strict=True)
    heads = ["pre", "post", "strength", "pre_driven_by", "post_driven_by"]
    _write_csv(out / "synapses.csv", heads, ((a, b, x, drives.get(a, ""), drives.get(b, "")) for a, b, x in rows))


def _neurons(done: Analysis) -> Iterator[list[object]]:
    """A row for each neuron of some settled pattern."""
    seen = done.seen
    for a, neuron in enumerate(seen.neuron.tolist()):
        gates = seen.gate[seen.offsets[a] : seen.offsets[a + 1]]
        row: list[object] = [neuron, gates.size, float(gates.mean())]
        for kind in KINDS:
            found = done.driven[kind].found
            best = int(found.preferred[a])
            row += [float(found.selectivity[a]), found.names[best] if best >= 0 else ""]
        yield row


def _write_csv(path: Path, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(heads)
        writer.writerows(rows)
