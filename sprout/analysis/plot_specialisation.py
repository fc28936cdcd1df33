"""Which inputs drive a neuron: selectivity against its control, and the most selective neurons with their labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .labels import Labels
from .observation import Observation
from .plot_style import COLOURS, MAP, check_path, new_figure, picture, plain, save
from .specialisation import Specialisation, tuning

_SHOWN, _COLUMNS = 24, 24  # neurons and labels of the right-hand plot


@picture
def visualize_specialisation(
    seen: Observation,
    labels: Labels,
    found: Specialisation,
    save_path: str | Path | None = None,
    *,
    twin: Specialisation | None = None,
    title: str | None = None,
) -> Figure:
    """Two plots of ``selectivity(seen, labels)``.

    Left: distribution of the selectivity of the neurons and of the control, with the control's 99th percentile, and
    of the neurons of an untrained twin if one is given.
    Right: mean gate under each label, in units of the neuron's largest, of the most selective neurons above that
    percentile; no label drives more of those shown than its share of places, so that different neurons are seen.

    Args: seen, labels and what ``selectivity`` found of them; save_path as in ``visualize_activation_evolution``, the
        raw data are selectivity, control, preferred and the mean gates shown; twin, what ``selectivity`` found in an
        untrained model of the same sizes; title above the plots.
    Returns: the figure. Raises: ValueError for another suffix. Determinism: as there.
    """
    path = check_path(save_path)
    figure = new_figure(11, 6.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    _distribution(left, found, twin)
    rows, columns = chosen(found), _columns(found, labels)
    means = tuning(seen, labels, found.neuron[rows])[:, columns] if len(rows) else np.zeros((0, len(columns)))
    _matrix(figure, right, found, rows, columns, means)
    figure.suptitle(title or f"What drives {len(found.neuron)} active neurons: {found.kind}")
    data = {
        **{name: getattr(found, name) for name in ("neuron", "selectivity", "control", "threshold", "preferred")},
        "labels": np.array(found.names),
        "shown_neuron": found.neuron[rows],
        "shown_label": columns,
        "shown_mean_gate": means,
    }
    save(figure, path, data)
    return figure


def chosen(found: Specialisation, most: int = _SHOWN) -> np.ndarray:
    """Rows of the neurons to show, grouped by preferred label: the best above the threshold, few of one label."""
    order = np.argsort(-found.selectivity, kind="stable")
    order = order[(found.selectivity[order] > found.threshold) & (found.preferred[order] >= 0)]
    each = max(2, -(-most // max(1, len(np.unique(found.preferred[order])))))
    taken: dict[int, int] = {}
    rows = []
    for row in order:
        label = int(found.preferred[row])
        if taken.get(label, 0) < each and len(rows) < most:
            taken[label] = taken.get(label, 0) + 1
            rows.append(row)
    rows.sort(key=lambda row: (found.names[found.preferred[row]], -found.selectivity[row]))
    return np.array(rows, dtype=np.int64)


def _columns(found: Specialisation, labels: Labels) -> np.ndarray:
    """The labels to show: those that drive a neuron shown, then the most frequent, in alphabetical order."""
    counts = np.bincount(labels.index, minlength=len(labels.names))
    drives = np.isin(np.arange(len(counts)), found.preferred[chosen(found)])
    return np.sort(np.lexsort((-counts, ~drives))[:_COLUMNS])


def _distribution(ax: Axes, found: Specialisation, twin: Specialisation | None) -> None:
    curves = [(found.control, "shuffled labels", COLOURS[1], "--"), (found.selectivity, "neurons", COLOURS[0], "-")]
    if twin is not None:
        curves.append((twin.selectivity, "untrained twin", "0.35", "-."))
    positive = np.concatenate([values for values, *_ in curves])
    positive = positive[positive > 0]
    if not positive.size:
        ax.text(0.5, 0.5, "no gate varies", ha="center", va="center", transform=ax.transAxes)
    else:
        low = max(np.quantile(positive, 0.001), 1e-6)
        edges = np.geomspace(low, max(positive.max(), low * 1.01), 60)
        for values, name, colour, style in curves:
            heights = 100 * np.histogram(values.clip(low), edges)[0] / max(1, values.size)
            ax.stairs(heights, edges, color=colour, ls=style, lw=1.5, label=name)
            if name != "untrained twin":
                ax.stairs(heights, edges, color=colour, alpha=0.2, fill=True)
        ax.set_xscale("log")
        ax.axvline(found.threshold, color="black", lw=1.2, ls=":", label="99th percentile, shuffled")
        ax.set_ylim(0, ax.get_ylim()[1] * 1.3)  # room for the legend
        ax.legend(loc="upper right")
    ax.set_xlabel(r"selectivity $\eta^2$ (share of variance, dimensionless)")
    ax.set_ylabel("neurons (% per bin)")
    ax.set_title(f"{100 * found.share:.1f} % of the neurons are\nabove the shuffled control")


def _matrix(
    figure: Figure, ax: Axes, found: Specialisation, rows: np.ndarray, columns: np.ndarray, means: np.ndarray
) -> None:
    ax.set_title("The most selective neurons\nand what raises their gates")
    ax.set_xlabel(found.kind)
    ax.set_ylabel("neuron: label that drives it")
    if not len(rows):
        ax.text(0.5, 0.5, "no neuron is above the control", ha="center", va="center", transform=ax.transAxes)
        ax.set_xticks([])
        ax.set_yticks([])
        return
    top = means.max(1, keepdims=True)
    image = ax.imshow(means / np.where(top > 0, top, 1), aspect="auto", cmap=MAP, vmin=0, vmax=1)
    ax.set_xticks(range(len(columns)), [plain(found.names[label]) for label in columns])
    ax.tick_params("x", length=2)
    for tick, label in zip(ax.get_xticklabels(), columns, strict=True):
        tick.set_rotation(90 if len(found.names[label]) > 2 else 0)  # a letter on its side may look like another
    names = [f"{found.neuron[row]}: {plain(found.names[found.preferred[row]])}" for row in rows]
    ax.set_yticks(range(len(rows)), names, fontsize=8)
    figure.colorbar(image, ax=ax, label="mean gate / the neuron's largest (dimensionless)", pad=0.02)
