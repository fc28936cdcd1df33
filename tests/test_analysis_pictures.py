"""The pictures: what stands on their axes, what they draw, what they save, and the inputs that are easily forgotten."""

from __future__ import annotations

from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import FancyArrowPatch

from sprout import ActivationPattern
from sprout.analysis import (
    evolution,
    observe,
    selectivity,
    strongest_synapses,
    visualize_activation_evolution,
    visualize_connections,
    visualize_settling,
    visualize_specialisation,
)
from sprout.analysis.plot_connections import shown
from tests.sprout_models import small, some_tokens, wired
from tests.test_analysis_specialisation import labels_of, seen_of, sparse_gates


def history_of(samples, neurons, patterns, dtype=torch.float32, seed=0):
    """Patterns in which some neurons enter and some leave."""
    generator = torch.Generator().manual_seed(seed)
    score, slots, history = torch.randn(samples, neurons, generator=generator), min(neurons, 96), []
    for step in range(patterns):
        score += 0.3 * torch.randn(samples, neurons, generator=generator)
        count = min(slots, 40 + 8 * step)
        idx = torch.zeros(samples, slots, dtype=torch.int64)
        idx[:, :count] = score.topk(count).indices.sort(1).values
        gate = torch.where(torch.arange(slots) < count, score.gather(1, idx).sigmoid(), 0).to(dtype)
        history.append(ActivationPattern(idx, gate, torch.full((samples,), count), neurons))
    return history


def check(figure, minimum=2):
    """Every axis with data is named with its unit, nothing overlaps the frame, and the picture is not blank."""
    assert isinstance(figure, Figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    axes = [ax for ax in figure.axes if ax.axison and ax.get_label() != "<colorbar>"]
    for ax in axes:
        assert ax.get_xlabel(), ax.get_title()
        assert ax.get_ylabel(), ax.get_title()
        assert ax.get_title(loc="left"), "what is to be seen"
        assert ax.has_data() or ax.texts
    for ax in figure.axes:
        box = ax.get_tightbbox()
        assert box.x0 > -2
        assert box.y0 > -2
        assert box.x1 < width + 2
        assert box.y1 < height + 2
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert len(axes) >= minimum
    return axes


@pytest.mark.parametrize(
    ("samples", "neurons", "patterns", "dtype"),
    [
        (1, 96, 1, torch.float32),
        (1, 96, 4, torch.bfloat16),
        (2, 4096, 21, torch.float64),
        (256, 4096, 6, torch.float32),
    ],
)
def test_activation(samples, neurons, patterns, dtype):
    history = history_of(samples, neurons, patterns, dtype)
    axes = check(visualize_activation_evolution(history), 4)
    found = evolution(history)
    image = axes[0].images[0].get_array()
    assert image.shape[1] == patterns
    assert len(image) <= 300
    np.testing.assert_allclose(image.mean(0), found.mean_gate.mean(0), rtol=0.05)
    assert axes[0].get_title(loc="left") == f"{len(found.neuron)} neurons are ever active"
    lines = [line for line in axes[1].get_lines() if len(line.get_xdata()) == patterns]
    np.testing.assert_allclose(lines[0].get_ydata(), found.count.mean(0))
    strongest = axes[3].get_lines()[0]
    np.testing.assert_allclose(strongest.get_ydata()[-1], found.mean_gate[:, -1].max())
    assert len(axes[3].get_lines()) == 6
    names = " ".join(ax.get_xlabel() + ax.get_ylabel() for ax in axes)
    for unit in ("step", "count", "dimensionless", "neurons", "%"):
        assert unit in names


@pytest.mark.parametrize("suffix", [".svg", ".PNG"])
def test_files(tmp_path, suffix):
    path, history = tmp_path / "new" / f"a{suffix}", history_of(3, 96, 4)
    visualize_activation_evolution(history, path)
    if suffix == ".svg":
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    else:
        assert imread(path, format="png").shape == (1125, 1575, 4)
    data, found = np.load(path.with_suffix(".npz")), evolution(history)
    for name, values in found._asdict().items():
        np.testing.assert_array_equal(data[name], values)
    first = path.read_bytes()
    visualize_activation_evolution(history, str(path))
    assert path.read_bytes() == first, "the same picture, the same bytes"


def test_nothing_global_is_touched(tmp_path):
    from matplotlib import pyplot

    with mpl.rc_context({"lines.linewidth": 7, "axes.facecolor": "red"}):
        before = dict(mpl.rcParams)
        figure = visualize_activation_evolution(history_of(1, 96, 2), tmp_path / "a.png")
        assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == []
    assert figure.axes[0].get_facecolor() == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save_path": "a.pdf"}, r"save_path must end in .png or .svg, got 'a.pdf'"),
        ({"save_path": "a"}, r"save_path must end in .png or .svg, got 'a'"),
        ({"top_k": 0}, r"top_k must be an integer in 1..7, got 0"),
        ({"top_k": 8}, r"top_k must be an integer in 1..7, got 8"),
    ],
)
def test_activation_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        visualize_activation_evolution(history_of(1, 96, 2), **arguments)


@pytest.mark.parametrize("steps", [0, 1])
def test_settling(tmp_path, steps):
    seen = observe(wired(small(n_interaction_steps=steps)), some_tokens(4, 9))
    axes = check(visualize_settling(seen, tmp_path / "s.png"), 4)
    data = np.load(tmp_path / "s.npz")
    np.testing.assert_array_equal(data["jaccard"], seen.jaccard)
    assert data["share"].sum() == pytest.approx(seen.active[:, -1].mean())
    if steps:
        np.testing.assert_allclose(axes[0].get_lines()[0].get_ydata(), seen.jaccard.mean(0))
    else:
        assert axes[0].texts[0].get_text() == "no interaction steps"


def test_settling_of_one_input():
    check(visualize_settling(observe(small(), some_tokens(1, 1))), 4)


def specialised():
    rng = np.random.default_rng(0)
    index = rng.integers(0, 12, 600)
    gates = sparse_gates(600, 80, rng)
    gates[:, 40:52] = (index[:, None] == np.arange(12)) * rng.uniform(0.3, 0.7, (600, 12))
    names = ["$", "a$b$", "space", *"defghijkl"]
    return seen_of(gates), labels_of(index)._replace(names=names)


def test_specialisation(tmp_path):
    seen, labels = specialised()
    found = selectivity(seen, labels, permutations=20)
    axes = check(visualize_specialisation(seen, labels, found, tmp_path / "p.svg", twin=found))
    data = np.load(tmp_path / "p.npz")
    image = axes[1].images[0].get_array()
    assert set(range(40, 52)) <= set(data["shown_neuron"])
    assert image.max() == 1
    rows = [text.get_text() for text in axes[1].get_yticklabels()]
    best = [axes[1].get_xticklabels()[column].get_text() for column in image.argmax(1)]
    for neuron, row, name in zip(data["shown_neuron"], rows, best, strict=True):
        if 40 <= neuron < 52:
            assert row == f"{neuron}: {name}"
    assert r"40: \$" in rows, "no formula"
    threshold = next(line for line in axes[0].get_lines() if len(set(line.get_xdata())) == 1)
    assert threshold.get_xdata()[0] == found.threshold
    np.testing.assert_array_equal(data["control"], found.control)


def test_specialisation_where_there_is_none():
    still = seen_of(np.full((9, 3), 0.5))
    labels = labels_of(np.arange(9) % 3)
    axes = check(visualize_specialisation(still, labels, selectivity(still, labels, permutations=2)))
    assert axes[1].texts[0].get_text() == "no neuron is above the control"


def test_connections(tmp_path):
    generator = torch.Generator().manual_seed(0)
    synapses = strongest_synapses(torch.randn(300, 300, generator=generator), 40)
    drives = {neuron: "$" for neuron in synapses.pre.tolist()[:5]}
    figure = visualize_connections(synapses, drives, tmp_path / "c.png")
    check(figure, 1)
    drawn, arrows = shown(synapses), [p for p in figure.axes[0].patches if isinstance(p, FancyArrowPatch)]
    assert len(arrows) == drawn < 40
    touched = {*synapses.pre[:drawn].tolist(), *synapses.post[:drawn].tolist()}
    assert len(touched) <= 48 < len(touched | {synapses.pre[drawn], synapses.post[drawn]})
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[0] == rf"{min(drives)}: \$"
    assert set(texts) == {rf"{n}: \$" if n in drives else str(n) for n in touched}
    strongest, weakest = arrows[-1], arrows[0]
    assert strongest.get_linewidth() > weakest.get_linewidth()
    for arrow, value in zip(reversed(arrows), synapses.strength, strict=False):
        assert (arrow.get_linestyle() not in ("-", "solid")) == (value < 0)
    np.testing.assert_array_equal(np.load(tmp_path / "c.npz")["strength"], synapses.strength)


@pytest.mark.parametrize("matrix", [torch.eye(4)[[1, 0, 2, 3]] * -2, torch.ones(3, 3)])
def test_few_connections(matrix):
    figure = visualize_connections(strongest_synapses(matrix, to_itself=True))
    check(figure, 1)
    assert len([p for p in figure.axes[0].patches if isinstance(p, FancyArrowPatch)]) == (matrix != 0).sum()


def test_a_model_without_connections_says_so():
    figure = visualize_connections(strongest_synapses(small().pool.connection_strength))
    text = figure.axes[0].texts[0].get_text()
    assert text.startswith("All 9,120 connection strengths are zero")
    assert not figure.axes[0].patches
    assert len(figure.axes) == 1
