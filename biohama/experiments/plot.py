"""The pictures of the experiments: accuracy by length, what router and memory did in a stream, matrices of accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter
except ImportError as error:  # pragma: no cover - the tests have it
    raise ImportError('pictures need matplotlib: pip install "bio-kernels[experiments]"') from error

# Okabe & Ito 2008, without yellow (unseen on white) and with black last; each with a marker of its own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^Dv<>P*X"
MAP = "cividis"
LENGTHS = (2, 3, 5, 10, 20, 40, 60, 100, 200, 400)
_STYLE: dict[Any, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "svg.hashsalt": "biohama",  # the same picture gives the same file
}


@contextmanager
def styled() -> Iterator[None]:
    """One look inside, whatever matplotlibrc says; the caller's settings are back afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def write(figure: Figure, path: Path) -> list[Path]:
    """Writes path.png and path.svg; the same picture gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    with styled():
        for file in files:
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files


def binned(rows: Sequence[Sequence[int]], least: int) -> tuple[list[float], list[float]]:
    """(mean length, fraction right) of neighbouring lengths put together until there are ``least`` sequences.

    Args: rows, [length, sequences, right ones], any order; a length may come more than once.
    """
    total: dict[int, np.ndarray] = {}
    for length, n, right in rows:
        total[length] = total.get(length, np.zeros(2)) + np.array([n, right])
    x, y, lengths, sums = [], [], 0.0, np.zeros(2)
    for i, length in enumerate(sorted(total)):
        lengths, sums = lengths + length * total[length][0], sums + total[length]
        if sums[0] >= least or i == len(total) - 1:
            x.append(lengths / sums[0])
            y.append(sums[1] / sums[0])
            lengths, sums = 0.0, np.zeros(2)
    return x, y


def accuracy_by_length(
    curves: Mapping[str, Mapping[str, Sequence[Sequence[int]]]], task: str, trained: tuple[int, int] | None
) -> Figure:
    """Seq-Acc over the number of symbols to answer, a line for each model; the shaded lengths are those trained on.

    Args: curves, model -> split -> rows of ``binned``, over all seeds; trained, shortest and longest of the training.
    """
    with styled():
        figure = Figure(figsize=(8.5, 4.6), layout="constrained")
        ax = figure.subplots()
        for i, (name, splits) in enumerate(curves.items()):
            points = [
                p for split, rows in splits.items() if split != "train" for p in zip(*_quarters(rows), strict=True)
            ]
            x, y = zip(*sorted(points), strict=True)
            style = ("-", "--", ":")[i // len(COLOURS) % 3]
            ax.plot(
                x,
                np.array(y) * 100,
                style,
                color=COLOURS[i % 7],
                marker=MARKERS[i % 10],
                ms=5,
                label=name,
                clip_on=False,
            )
        if trained is not None:
            ax.axvspan(*trained, color="0.92", lw=0, label="lengths trained on", zorder=0)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(LENGTHS))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_ylim(0, 100)
        ax.set_xlabel("symbols to answer (count)")
        ax.set_ylabel("sequences without an error (%)")
        ax.set_title(f"{task}: Seq-Acc by length", pad=12)
        figure.legend(loc="outside right upper")
        return figure


def _quarters(rows: Sequence[Sequence[int]]) -> tuple[list[float], list[float]]:
    return binned(rows, max(1, sum(row[1] for row in rows) // 4))


def stream(
    title: str,
    symbols: Sequence[str],
    predicted: Sequence[str],
    router: np.ndarray,
    modules: Sequence[str],
    address: np.ndarray,
) -> Figure:
    """What the router chose and which slots were read, step by step.

    Args: symbols (T,), the input; predicted (T,), the answer, "" where none is asked for, and a second line where it is
        wrong; router (T, M) in 0..1; modules (M,); address (T, S) or, with the null slot last, (T, S + 1).
    """
    steps = len(symbols)
    slots = [*symbols, "nothing"][: address.shape[1]]
    with styled():
        figure = Figure(figsize=(max(6.0, 2.5 + 0.42 * steps), 4.0 + 0.2 * len(slots)), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[max(4, len(modules)), max(4, len(slots))])
        image = _heat(above, router.T, list(modules), "router: weight of each module")
        _heat(below, address.T, slots, "memory: weight of each slot that is read")
        below.set_ylabel("slot (the symbol that it holds)")
        above.set_ylabel("module")
        marks = [f"{symbol}\n{answer}" if answer else symbol for symbol, answer in zip(symbols, predicted, strict=True)]
        below.set_xticks(range(steps), marks)
        below.set_xlabel("step: input and, below it, the answer where one is asked for (if wrong, the right one)")
        figure.colorbar(image, ax=[above, below], label="weight (0 to 1)", shrink=0.6)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return figure


def _heat(ax: Axes, values: np.ndarray, names: Sequence[str], title: str) -> Any:
    image = ax.imshow(values, aspect="auto", cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
    ax.set_yticks(range(len(names)), names)
    ax.set_title(title)
    ax.tick_params(length=0)
    return image


def matrices(found: Mapping[str, np.ndarray], tasks: Sequence[str], split: str) -> Figure:
    """Accuracy after each stage of learning one task after another: model -> (stages, tasks) in 0..1."""
    wide = min(3, len(found))
    high = -(-len(found) // wide)
    with styled():
        figure = Figure(figsize=(3.6 * wide + 1, 3.4 * high), layout="constrained")
        axes = figure.subplots(high, wide, squeeze=False).ravel()
        image = None
        for ax, (name, matrix) in zip(axes, found.items(), strict=False):
            image = _heat(ax, matrix, [f"after {task}" for task in tasks[: len(matrix)]], name)
            ax.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
            for (i, j), value in np.ndenumerate(matrix):
                ax.text(
                    j, i, f"{100 * value:.0f}", ha="center", va="center", color="white" if value < 0.55 else "black"
                )
            ax.set_xlabel(f"Seq-Acc on ({split}, %)")
        for ax in axes[len(found) :]:
            ax.set_axis_off()
        figure.colorbar(image, ax=list(axes), label="Seq-Acc (0 to 1)", shrink=0.6)  # type: ignore[arg-type]
        return figure
