"""The four plots of a history: who is active when, how many, how strongly, and the course of the strongest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..pattern import ActivationPattern
from .patterns import Evolution, evolution
from .plot_style import COLOURS, MAP, MARKERS, check_path, new_figure, picture, save

_LINES = 300  # rows of the heatmap: what a screen shows


@picture
def visualize_activation_evolution(
    history: Sequence[ActivationPattern],
    save_path: str | Path | None = None,
    *,
    top_k: int = 6,
    title: str | None = None,
) -> Figure:
    """Four plots of how the patterns of a batch evolve over the interaction steps.

    Top left: mean gate of every neuron that is ever active, by step of entry, then strongest first. Top right: active
    neurons, mean and 5-95 % of the samples. Bottom left: how the gates of active neurons are distributed. Bottom
    right: mean gate of the neurons that are strongest at the end.

    Args:
        history: the n_interaction_steps + 1 patterns, as ``analyze_activation(tokens)["activation_history"]``.
        save_path: ends in .png or .svg; the raw data (``Evolution``) goes beside it as .npz. None: nothing is written.
        top_k: trajectories, 1..7. title: above the plots; None: the sizes.
    Returns: the figure; it belongs to no window. Raises: ValueError for another suffix or top_k, and as ``evolution``.
    Determinism: the same history gives the same picture.
    """
    path = check_path(save_path)
    if type(top_k) is not int or not 1 <= top_k <= len(COLOURS):
        raise ValueError(f"top_k must be an integer in 1..{len(COLOURS)}, got {top_k!r}")
    data = evolution(history)
    samples, patterns = data.count.shape
    figure = new_figure(10.5, 7.5)
    axes = figure.subplots(2, 2)
    _heatmap(figure, axes[0, 0], data)
    _counts(axes[0, 1], data)
    _gates(axes[1, 0], data)
    _trajectories(axes[1, 1], data, top_k)
    for ax in (axes[0, 0], axes[0, 1], axes[1, 1]):
        steps_axis(ax, patterns - 1)
    inputs = "1 input" if samples == 1 else f"{samples} inputs"
    figure.suptitle(title or f"Activation of {data.n_neurons} neurons over {patterns - 1} steps, {inputs}")
    save(figure, path, data._asdict())
    return figure


def steps_axis(ax: Axes, last: int, first: int = 0) -> None:
    """A horizontal axis of interaction steps first..last, whole numbers only."""
    ax.set_xlim(first - 0.5, last + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=11, integer=True, min_n_ticks=1))
    ax.set_xlabel("interaction step")


def _heatmap(figure: Figure, ax: Axes, data: Evolution) -> None:
    rows, patterns = data.mean_gate.shape
    lines = _thinned(data.mean_gate) if rows else np.zeros((1, patterns))
    # In the mean over many inputs most gates are far below the largest: the square root lets them be seen.
    norm = PowerNorm(1.0 if len(data.count) == 1 else 0.5, 0, lines.max() or 1.0)
    image = ax.imshow(
        lines,
        aspect="auto",
        cmap=MAP,
        norm=norm,
        interpolation="nearest",
        extent=(-0.5, patterns - 0.5, max(rows, 1), 0),
    )
    figure.colorbar(image, ax=ax, label="mean gate (dimensionless)", pad=0.02)
    for step in range(1, patterns):
        members = np.flatnonzero(data.entry == step)
        if len(members):
            ax.axhline(members[0], color="white", linewidth=0.8)
        if len(members) > 0.05 * rows and patterns <= 12:  # room for a text, on the dark cells before they enter
            ax.text(
                step - 0.6, members.mean() + 0.5, f"+{len(members)}", color="white", ha="right", va="center", fontsize=8
            )
    ax.set_ylabel("neurons, by entry, then strength")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set_title(f"{rows} neurons are ever active")


def _counts(ax: Axes, data: Evolution) -> None:
    count, steps = data.count, np.arange(data.count.shape[1])
    if len(count) > 1:
        low, high = np.quantile(count, (0.05, 0.95), axis=0)
        ax.fill_between(steps, count.min(0), count.max(0), color=COLOURS[0], alpha=0.12, lw=0, label="all inputs")
        ax.fill_between(steps, low, high, color=COLOURS[0], alpha=0.3, lw=0, label="5-95 % of inputs")
    ax.plot(steps, count.mean(0), color=COLOURS[0], marker="o", label="mean" if len(count) > 1 else "count")
    ax.set_ylim(0, count.max() * 1.1 or 1)
    ax.set_ylabel("active neurons (count)")
    ax.set_title("How many are active")
    if len(count) > 1:
        ax.legend(loc="lower right")


def _thinned(values: np.ndarray) -> np.ndarray:
    """Groups of neighbouring rows as their mean, so that a picture's height has a place for each."""
    group = -(-len(values) // _LINES)
    first = np.arange(0, len(values), group)
    return np.add.reduceat(values, first) / np.diff(np.append(first, len(values)))[:, None]


def _gates(ax: Axes, data: Evolution) -> None:
    """One histogram above the other, the initial pattern's at the top; all on one scale."""
    patterns = len(data.gate_share)
    shown = np.unique(np.linspace(0, patterns - 1, min(patterns, 8)).round().astype(int))
    colours = colormaps["viridis"](np.linspace(0, 0.88, len(shown)))
    highest = data.gate_share[shown].max() or 1.0
    for floor, (step, colour) in enumerate(zip(shown, colours, strict=True)):
        heights = data.gate_share[step] / highest * 0.9 - floor
        ax.stairs(heights, data.gate_edges, baseline=-floor, fill=True, color=colour, alpha=0.35)
        ax.stairs(heights, data.gate_edges, baseline=-floor, color=colour, lw=1.3)
    ax.set_yticks(-np.arange(len(shown)), [str(step) for step in shown])
    ax.set_ylim(-len(shown) + 0.95, 1)
    ax.set_xlim(data.gate_edges[0], data.gate_edges[-1])
    ax.set_xlabel("gate (dimensionless)")
    ax.set_ylabel(f"interaction step\n(tallest bin: {100 * highest:.0f} % of the active)")
    ax.set_title("How strong their gates are")


def _trajectories(ax: Axes, data: Evolution, top_k: int) -> None:
    best = np.argsort(-data.mean_gate[:, -1], kind="stable")[:top_k]
    steps = np.arange(data.mean_gate.shape[1])
    for place, row in enumerate(best):
        ax.plot(
            steps, data.mean_gate[row], color=COLOURS[place], marker=MARKERS[place], label=f"neuron {data.neuron[row]}"
        )
    ax.set_ylim(0, (data.mean_gate[best].max() if len(best) else 0) * 1.4 or 1)  # room for the legend
    ax.set_ylabel("mean gate (dimensionless)")
    ax.set_title("The strongest at the end")
    if len(best):
        ax.legend(loc="upper center", ncols=3, columnspacing=1.2)
