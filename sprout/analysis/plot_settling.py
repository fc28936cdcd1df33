"""Does it settle: overlap and gate change step by step, how many stay active, how evenly the pool is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .observation import Observation
from .plot_activation import steps_axis
from .plot_style import COLOURS, MARKERS, check_path, new_figure, picture, save
from .settling import MAX_CHANGE, MIN_JACCARD


@picture
def visualize_settling(seen: Observation, save_path: str | Path | None = None, *, title: str | None = None) -> Figure:
    """Four plots of how the patterns of all observed inputs settle.

    Top: overlap of the active sets and mean change of a gate in each step, mean and 5-95 % of the inputs, with the
    targets. Bottom left: how many neurons are active at first and at the end. Bottom right: the share of the inputs in
    whose settled pattern each neuron is, most used first.

    Args: seen; save_path as in ``visualize_activation_evolution``, the raw data are the observation's arrays by input
        and each neuron's share; title above the plots.
    Returns: the figure. Raises: ValueError for another suffix. Determinism: as there.
    """
    path = check_path(save_path)
    figure = new_figure(10.5, 7)
    axes = figure.subplots(2, 2)
    _band(axes[0, 0], seen.jaccard, MIN_JACCARD, "at least", "overlap (Jaccard, dimensionless)", below=0.5)
    axes[0, 0].set_title("Do the same neurons stay active?")
    _band(axes[0, 1], seen.gate_change, MAX_CHANGE, "at most", "gate change (mean, dimensionless)")
    axes[0, 1].set_title("Do their gates come to rest?")
    _active(axes[1, 0], seen)
    share = np.zeros(seen.n_neurons)
    share[seen.neuron] = np.diff(seen.offsets) / seen.n_inputs
    _use(axes[1, 1], np.sort(share)[::-1], seen)
    figure.suptitle(title or f"Settling of {seen.n_inputs} inputs")
    data = {"active": seen.active, "jaccard": seen.jaccard, "gate_change": seen.gate_change, "share": share}
    save(figure, path, data)
    return figure


def _band(ax: Axes, values: np.ndarray, target: float, word: str, name: str, below: float = 0.08) -> None:
    """Mean and spread of each step, and the target; below: room under them, for a legend (fraction of their range)."""
    ax.set_ylabel(name)
    if not values.shape[1]:
        ax.text(0.5, 0.5, "no interaction steps", ha="center", va="center", transform=ax.transAxes)
        ax.set_xlabel("interaction step")
        return
    steps = np.arange(1, values.shape[1] + 1)
    low, high = np.quantile(values, (0.05, 0.95), axis=0)
    if len(steps) == 1:
        ax.errorbar(steps, values.mean(0), [values.mean(0) - low, high - values.mean(0)], color=COLOURS[0], fmt="none")
    ax.fill_between(steps, low, high, color=COLOURS[0], alpha=0.25, lw=0, label="5-95 % of inputs")
    ax.plot(steps, values.mean(0), color=COLOURS[0], marker="o", label="mean")
    ax.axhline(target, color=COLOURS[1], linestyle="--", label=f"target: {word} {target} at the end")
    lowest, highest = min(low.min(), target), max(high.max(), target)
    room = max(highest - lowest, 0.01)
    ax.set_ylim(max(0, lowest - below * room), highest + 0.08 * room)
    steps_axis(ax, len(steps), 1)
    ax.legend(loc="lower right" if below > 0.1 else "upper right")


def _active(ax: Axes, seen: Observation) -> None:
    settled, first = seen.active[:, -1], seen.active[:, 0].mean()
    low, high = settled.min(), settled.max()
    width = max(1, -(-(high - low + 1) // 40))  # counts in a bar
    edges = np.arange(low, high + width + 1, width) - 0.5
    heights = 100 * np.histogram(settled, edges)[0] / seen.n_inputs
    ax.stairs(heights, edges, fill=True, color=COLOURS[0], alpha=0.6, label=f"settled: {settled.mean():.4g} on average")
    ax.axvline(first, color=COLOURS[1], linestyle="--", label=f"initial: {first:.4g}")
    ax.set_ylim(0, heights.max() * 1.3)  # room for the legend
    ax.set_ylabel(f"inputs (% per {width} neurons)" if width > 1 else "inputs (%)")
    ax.set_xlabel("active neurons (count)")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.set_title("How many are active")
    ax.legend()


def _use(ax: Axes, share: np.ndarray, seen: Observation) -> None:
    used = int((share > 0).sum())
    ranks = np.arange(1, used + 1)
    ax.plot(ranks, 100 * share[:used], color=COLOURS[0], lw=2, marker=MARKERS[0] if used == 1 else None)
    even = 100 * share.sum() / seen.n_neurons
    ax.axhline(even, color=COLOURS[1], linestyle="--", label=f"all used alike: {even:.2g} %")
    if used < seen.n_neurons:
        ax.axvspan(used + 0.5, seen.n_neurons, color="0.9", label=f"{seen.n_neurons - used} never used")
    ax.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_major_formatter(plain)
    if share[:used].min() * 20 > share.max():  # within about a decade the ticks between are labelled, too
        ax.yaxis.set_minor_formatter(plain)
    ax.set_xlim(0, seen.n_neurons)
    ax.set_xlabel("neurons (rank by use)")
    ax.set_ylabel("inputs that use the neuron (%)")
    ax.set_title(f"Who is used: {100 * used / seen.n_neurons:.0f} % of the pool at the end")
    ax.legend()
