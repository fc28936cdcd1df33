"""Looking at a SPROUT: how its patterns evolve and settle, what drives its neurons, how they are connected.

The numbers need torch and numpy; the pictures need matplotlib, which is imported when the first one is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .connections import Synapses, strongest_synapses
from .labels import KINDS, Labels, character_of, label
from .observation import Observation, observe, windows
from .patterns import Evolution, evolution
from .recall import selection_recall
from .settling import Settling, measure
from .specialisation import Specialisation, selectivity, tuning
from .summary import ReportSettings

if TYPE_CHECKING:
    from .plot_activation import visualize_activation_evolution
    from .plot_connections import visualize_connections
    from .plot_settling import visualize_settling
    from .plot_specialisation import visualize_specialisation
    from .report import write_report

_LAZY = {
    "visualize_activation_evolution": "plot_activation",
    "visualize_connections": "plot_connections",
    "visualize_settling": "plot_settling",
    "visualize_specialisation": "plot_specialisation",
    "write_report": "report",
}

__all__ = [
    "KINDS",
    "Evolution",
    "Labels",
    "Observation",
    "ReportSettings",
    "Settling",
    "Specialisation",
    "Synapses",
    "character_of",
    "evolution",
    "label",
    "measure",
    "observe",
    "selection_recall",
    "selectivity",
    "strongest_synapses",
    "tuning",
    "visualize_activation_evolution",
    "visualize_connections",
    "visualize_settling",
    "visualize_specialisation",
    "windows",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
