"""The strongest synapses as a graph: neurons on a circle, synapses as arcs through it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path as Curve

from .connections import Synapses
from .plot_style import COLOURS, check_path, new_figure, picture, plain, save

_NEURONS = 48  # on the circle: what can still be labelled
_WIDTHS = (0.7, 3.7)  # points, of the weakest and the strongest that is drawn
_LOOK = {True: (COLOURS[0], "-", "excites (> 0)"), False: (COLOURS[1], (0, (4, 2)), "inhibits (< 0)")}


@picture
def visualize_connections(
    synapses: Synapses,
    drives: Mapping[int, str] | None = None,
    save_path: str | Path | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """The strongest synapses as a graph, beside the distribution of their strengths.

    Left: arrows from the sending to the receiving neuron; blue and solid excite, orange and dashed inhibit, width by
    strength. Neurons that the same label drives stand together. As many of the strongest synapses as fit 48 neurons are
    drawn. Right: magnitude by rank. If every strength is 0 the picture says so, and nothing else.

    Args: synapses, from ``strongest_synapses``; drives, neuron -> the label that drives it, for those known; save_path
        as in ``visualize_activation_evolution``, the raw data are the synapses; title above the plots.
    Returns: the figure. Raises: ValueError for another suffix. Determinism: as there.
    """
    path, drives = check_path(save_path), drives or {}
    figure = new_figure(11, 7.5 if len(synapses.strength) else 2.5)
    figure.suptitle(title or f"Strongest synapses among {synapses.n_neurons} neurons")
    if not len(synapses.strength):
        _nothing(figure, synapses)
    else:
        left, right = figure.subplots(1, 2, width_ratios=(2.3, 1))
        _graph(left, synapses, drives)
        _ranks(right, synapses)
    save(figure, path, synapses._asdict())
    return figure


def _nothing(figure: Figure, synapses: Synapses) -> None:
    ax = figure.subplots()
    ax.set_axis_off()
    own = (
        f"\n(its largest connection of a neuron to itself: {synapses.largest_self:.3g})"
        if synapses.largest_self
        else ""
    )
    text = f"All {synapses.stored:,} connection strengths are zero:\nthere is no synapse to draw yet.{own}"
    ax.text(0.5, 0.5, text, ha="center", va="center", fontsize=14)


def shown(synapses: Synapses) -> int:
    """How many of the strongest synapses the graph draws: as many as touch at most 48 neurons."""
    met: set[int] = set()
    for i, pair in enumerate(zip(synapses.pre.tolist(), synapses.post.tolist(), strict=True)):
        met |= set(pair)
        if len(met) > _NEURONS:
            return i
    return len(synapses.pre)


def _graph(ax: Axes, synapses: Synapses, drives: Mapping[int, str]) -> None:
    m = shown(synapses)
    pre, post, strength = synapses.pre[:m], synapses.post[:m], synapses.strength[:m]
    neurons = sorted({*pre.tolist(), *post.tolist()}, key=lambda n: (n not in drives, drives.get(n, ""), n))
    angles = np.pi / 2 - 2 * np.pi * np.arange(len(neurons)) / len(neurons)
    at = {neuron: np.array([np.cos(angle), np.sin(angle)]) for neuron, angle in zip(neurons, angles, strict=True)}
    weakest, strongest = np.abs(strength).min(), np.abs(strength).max()
    widths = np.interp(np.abs(strength), (weakest, strongest), _WIDTHS) if weakest < strongest else np.full(m, 2.0)
    for i in reversed(range(m)):
        _arrow(ax, at[pre[i]], at[post[i]], bool(strength[i] > 0), widths[i])
    for neuron, angle in zip(neurons, angles, strict=True):
        ax.plot(*at[neuron], "o", color="black", markersize=4)
        left = np.cos(angle) < -1e-9
        x, y = at[neuron] * 1.05
        ax.text(
            x,
            y,
            plain(f"{neuron}: {drives[neuron]}" if neuron in drives else str(neuron)),
            rotation=np.degrees(angle) + (180 if left else 0),
            rotation_mode="anchor",
            ha="right" if left else "left",
            va="center",
            fontsize=8,
        )
    _key(ax, [sign for sign in (True, False) if ((strength > 0) == sign).any()], (weakest, strongest))
    ax.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
    ax.set_axis_off()
    names = "number and label that drives it" if drives else "number"
    ax.set_title(f"The {m} strongest, between {len(neurons)} neurons ({names})", loc="left")


def _key(ax: Axes, signs: list[bool], range_: tuple[float, float]) -> None:
    lines = [Line2D([], [], color=_LOOK[sign][0], ls=_LOOK[sign][1], lw=2) for sign in signs]
    names = [_LOOK[sign][2] for sign in signs]
    if range_[0] < range_[1]:
        lines += [Line2D([], [], color="0.4", lw=width) for width in _WIDTHS]
        names += [f"|strength| {value:.3g}" for value in range_]
    ax.legend(lines, names, loc="lower left", bbox_to_anchor=(-0.05, -0.05))


def _arrow(ax: Axes, begin: np.ndarray, end: np.ndarray, excites: bool, width: float) -> None:
    """A curve bent towards the centre; a neuron's synapse with itself is a loop outside the circle's edge."""
    if np.array_equal(begin, end):
        side = np.array([-begin[1], begin[0]]) * 0.12
        curve = Curve([begin, begin * 0.75 + side, begin * 0.75 - side, end], [1, 4, 4, 4])
    else:
        near = 1 - np.linalg.norm(end - begin) / 2  # neighbours' arcs stay near the edge
        curve = Curve([begin * 0.985, (begin + end) / 2 * (0.2 + 0.6 * near), end * 0.97], [1, 3, 3])
    colour, style, _ = _LOOK[excites]
    ax.add_patch(
        FancyArrowPatch(
            path=curve, arrowstyle="-|>", mutation_scale=7 + width, color=colour, ls=style, lw=width, alpha=0.75
        )
    )


def _ranks(ax: Axes, synapses: Synapses) -> None:
    ranks, positive = np.arange(1, len(synapses.strength) + 1), synapses.strength > 0
    for sign, marker in ((True, "o"), (False, "v")):
        here = positive == sign
        if here.any():
            ax.plot(
                ranks[here], np.abs(synapses.strength[here]), marker, color=_LOOK[sign][0], ms=4, label=_LOOK[sign][2]
            )
    ax.set_ylim(0, np.abs(synapses.strength).max() * 1.15)
    ax.set_xlabel("synapse (rank)")
    ax.set_ylabel("|strength| (dimensionless)")
    ax.set_title("Their strengths")
    ax.legend()
