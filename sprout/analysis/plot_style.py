"""How every picture looks, and how it is saved: colours for all eyes, text for a small screen, raw data beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
except ImportError as error:  # pragma: no cover - the tests have it
    raise ImportError('plots need matplotlib: pip install "bio-kernels[train]"') from error

P = ParamSpec("P")
# Okabe & Ito 2008, without yellow (unseen on white) and with black last; each with a marker of its own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^Dv<>"
MAP = "cividis"
SUFFIXES = (".png", ".svg")
_STYLE: dict[Any, Any] = {
    "axes.grid": False,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "legend.fontsize": 9,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "savefig.facecolor": "white",
    "svg.hashsalt": "sprout",  # the same picture gives the same file
    "text.usetex": False,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


@contextmanager
def styled() -> Iterator[None]:
    """The library's look inside, whatever matplotlibrc says; the caller's settings are back afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def picture(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """A function that draws in the library's look."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with styled():
            return draw(*args, **kwargs)

    return drawn


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that belongs to no window and no global list."""
    return Figure(figsize=(width, height), layout="constrained")


def check_path(save_path: str | Path | None) -> Path | None:
    """The path, if it ends in a suffix that can be written. Raises: ValueError otherwise."""
    if save_path is None:
        return None
    path = Path(save_path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"save_path must end in {' or '.join(SUFFIXES)}, got {path.name!r}")
    return path


def save(figure: Figure, path: Path | None, data: dict[str, Any]) -> None:
    """Writes the picture, and its raw data as .npz beside it. None: no-op."""
    if path is None:
        return
    write(figure, path)
    np.savez_compressed(path.with_suffix(".npz"), **data)


def write(figure: Figure, path: Path) -> None:
    """Writes the picture alone, as SVG or as PNG of 150 dots per inch; makes the folder.

    Determinism: with one version of matplotlib the same picture gives the same bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with styled():
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def plain(text: str) -> str:
    """The text as matplotlib is to show it: a dollar is a dollar, not the beginning of a formula."""
    return text.replace("$", r"\$")
