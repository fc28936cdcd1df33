"""The report's words: what each picture shows, with the figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import page
from .labels import KINDS
from .plot_connections import shown as drawn
from .plot_specialisation import chosen
from .summary import Analysis

_EXCERPT = 220  # characters
_EXAMPLES = 6  # neurons whose text is shown


def tell(done: Analysis, summary: dict[str, Any], out: Path) -> str:
    """The HTML of the report, its pictures taken from the PNG files in out."""
    body = [*_beginning(done, summary), *_activation(done, out), *_settling(done, summary, out)]
    body += [*_specialisation(done, summary, out), *_excerpts(done), *_connections(done, summary, out), *_files(out)]
    return page.page(summary["title"], body)


def picture_of(kind: str) -> str:
    """The name, without suffix, of the picture of a kind of label."""
    return "specialisation_" + kind.replace(" ", "_")


def _beginning(done: Analysis, summary: dict[str, Any]) -> Iterator[str]:
    model = summary["model"]
    if not done.settings.trained:
        yield page.paragraph(
            "This model is untrained: its weights are random. The report shows how the pictures read and what to "
            "compare a trained model with; nothing here was learnt.",
            "note",
        )
    yield page.paragraph(
        f"A pool of {model['n_neurons']:,} neurons, of which {model['initial_sparsity']} wake up for an input and at "
        f"most {model['final_sparsity']} may be active; they exchange messages for {model['n_interaction_steps']} "
        f"steps. The model has {model['parameters']:,} parameters. It read {done.seen.n_inputs:,} tokens of text in "
        f"windows of {done.window}; every beginning of a window is one input, so that each token is the end of one."
    )


def _activation(done: Analysis, out: Path) -> Iterator[str]:
    history = done.history
    first, last = (history[i].count.double().mean().item() for i in (0, -1))
    yield page.heading("How a pattern evolves")
    yield page.paragraph(
        f"The input wakes {first:.1f} neurons; after the last step {last:.1f} are active on average. Top left: one "
        "line per neuron, the brighter the stronger; neurons that enter later stand further down. Top right: how "
        "many are active. Bottom left: how strong the gates of the active ones are, step by step; a gate is between "
        "0 and 1. Bottom right: the neurons that are strongest in the end."
    )
    yield page.picture(
        out / "activation.png",
        f"Four plots over {len(history) - 1} steps: gates of all neurons, number of active ones, distribution of the "
        f"gates, course of the strongest. The number goes from {first:.1f} to {last:.1f} on average.",
        f"Mean over {len(history[0].count)} whole windows. Step 0 is the pattern that the input wakes up.",
    )


def _settling(done: Analysis, summary: dict[str, Any], out: Path) -> Iterator[str]:
    found = done.settling
    count = found.active[-1]
    story = "This model has no interaction steps: the initial pattern is decoded as it is. "
    if found.jaccard:
        overlap, change = found.jaccard[-1], found.gate_change[-1]
        story = (
            f"Of the neurons active before or after the last step, {100 * overlap.mean:.1f} % were active both before "
            f"and after (5-95 % of the inputs: {100 * overlap.low:.1f} to {100 * overlap.high:.1f} %); in the first "
            f"step it was {100 * found.jaccard[0].mean:.1f} %. Their gates changed by {change.mean:.4f} on average in "
            f"the last step, by {found.gate_change[0].mean:.4f} in the first. "
        )
    story += (
        f"In the end {count.mean:.1f} neurons are active, from {count.min:.0f} to {count.max:.0f}, depending on the "
        f"input. {100 * found.used:.1f} % of the pool was active at some step of some input, "
        f"{100 * found.used_at_end:.1f} % in some settled pattern; both rise with the number of inputs, here "
        f"{found.n_inputs:,}."
    )
    rows = [
        (name, _got(target["got"]), target["wanted"], "reached" if target["reached"] else "not reached")
        for name, target in summary["settling"]["targets"].items()
    ]
    yield page.heading("Does it settle?")
    yield page.paragraph(story)
    yield page.table(["what", "measured", "target", ""], rows)
    yield page.picture(out / "settling.png", "Four plots. " + story, "Mean and spread over all inputs.")


def _got(value: Any) -> str:
    return ", ".join(map(_got, value)) if isinstance(value, list) else f"{value:.4g}"


def _specialisation(done: Analysis, summary: dict[str, Any], out: Path) -> Iterator[str]:
    figures = summary["specialisation"]
    yield page.heading("What drives a neuron?")
    yield page.paragraph(
        "The selectivity of a neuron is the share of its gate's variance that a label of the input explains (eta "
        "squared, the correlation ratio): 0 if the gate is the same whatever the label, 1 if the label decides it. "
        "Labels that were shuffled explain a little too, by chance: the control shuffles them "
        f"{done.settings.permutations} times, and a neuron counts as selective if it is above 99 % of the control of "
        "all neurons. Chance alone would make 1 % of them selective. Shifted labels, whose sequence is only turned by "
        "some distance, are a stricter control."
    )
    yield page.paragraph(
        "To be selective need not be learnt: random weights pass the input on too. What training added is the "
        "distance to an untrained model of the same sizes."
    )
    columns = [
        "label",
        "above shuffled",
        "above shifted",
        "median selectivity",
        "untrained: above",
        "untrained: median",
    ]
    yield page.table(columns, [_row(kind, figure) for kind, figure in figures.items()])
    yield page.paragraph(
        f"{figures[KINDS[0]]['silent']:,} of {done.seen.n_neurons:,} neurons were in no settled pattern; they have no "
        "selectivity, and are not among those counted."
    )
    for kind, driven in done.driven.items():
        share = f"{100 * driven.found.share:.1f} % of {len(driven.found.neuron):,} active neurons"
        yield page.picture(
            out / f"{picture_of(kind)}.png",
            f"{kind}: distribution of selectivity, {share} above the control; and which labels raise the gates of the "
            "most selective neurons.",
            f"{kind.capitalize()}: {share} are above the shuffled control. Beside each neuron stands the label that, "
            "set against all others, explains most of its gate.",
        )


def _row(kind: str, figure: dict[str, Any]) -> list[str]:
    twin = figure["untrained_median_selectivity"]
    return [
        kind,
        f"{100 * figure['share_above_shuffled']:.1f} %",
        f"{100 * figure['share_above_shifted']:.1f} %",
        f"{figure['median_selectivity']:.3f}",
        "-" if twin is None else f"{100 * figure['untrained_share_above_shuffled']:.1f} %",
        "-" if twin is None else f"{twin:.3f}",
    ]


def _excerpts(done: Analysis) -> Iterator[str]:
    """The text as some neurons see it: the most selective, each driven by another character."""
    found = done.driven[KINDS[0]].found
    rows: dict[int, int] = {}
    for row in sorted(chosen(found).tolist(), key=lambda row: -found.selectivity[row]):
        rows.setdefault(int(found.preferred[row]), row)
    if not rows:
        return
    yield page.heading("The text as a neuron sees it")
    yield page.paragraph("The stronger the background, the larger the neuron's gate when the input ends there.")
    for driver, row in list(rows.items())[:_EXAMPLES]:
        begin, text, strength = excerpt(done, row)
        yield page.paragraph(
            f"Neuron {found.neuron[row]}, driven by {found.names[driver]}, selectivity {found.selectivity[row]:.2f}; "
            f"from character {begin:,}:"
        )
        yield page.coloured(text, strength)


def excerpt(done: Analysis, row: int) -> tuple[int, str, np.ndarray]:
    """Where a neuron is most active: (first character, the text, gate of each character over the neuron's largest)."""
    seen = done.seen
    entries = slice(seen.offsets[row], seen.offsets[row + 1])
    gate = np.zeros(int(done.where[-1]) + 1)
    np.maximum.at(gate, done.where[seen.position[entries]], seen.gate[entries].astype(np.float64))
    length = min(_EXCERPT, len(gate))
    sums = np.concatenate([[0.0], gate.cumsum()])
    begin = int((sums[length:] - sums[:-length]).argmax())
    return begin, done.text[begin : begin + length], gate[begin : begin + length] / max(gate.max(), 1e-9)


def _connections(done: Analysis, summary: dict[str, Any], out: Path) -> Iterator[str]:
    s, figures = done.synapses, summary["connections"]
    if not len(s.strength):
        story = f"All {s.stored:,} connection strengths between different neurons are zero: no synapse has formed."
    else:
        story = (
            f"The matrix stores {s.stored:,} connections between different neurons, {s.positive:,} of them above zero "
            f"and {s.negative:,} below. The strongest is {figures['largest']:.3g}; it is added to the score with which "
            f"its receiver attends to its sender. The picture draws the {drawn(s)} strongest; synapses.csv lists "
            f"{len(s.strength)}."
        )
    if "same_label" in figures:
        story += (
            f" Of these, {100 * figures['same_label']:.0f} % join neurons that the same character drives; "
            f"{100 * figures['same_label_by_chance']:.0f} % would by chance."
        )
    if s.largest_self:
        story += f" Connections of a neuron to itself are left out; the largest is {s.largest_self:.3g}."
    yield page.heading("Who is connected to whom?")
    yield page.paragraph(story)
    caption = "Blue and solid excites, orange and dashed inhibits; the wider the stronger. Same labels stand together."
    path = out / "connections.png"
    yield page.picture(path, "Neurons on a circle, arrows between them. " + story, caption if len(s.strength) else "")
    if len(s.strength):
        drives = done.drives()
        first = list(zip(s.pre.tolist(), s.post.tolist(), s.strength.tolist(), strict=True))[:12]
        rows = [(f"{a}", drives.get(a, ""), f"{b}", drives.get(b, ""), f"{value:+.4f}") for a, b, value in first]
        yield page.table(["from", "driven by", "to", "driven by", "strength"], rows)


def _files(out: Path) -> Iterator[str]:
    names = ", ".join(sorted(path.name for path in out.iterdir() if path.suffix in (".png", ".csv", ".json")))
    yield page.heading("Files beside this page")
    yield page.paragraph(
        f"{names}. Each picture is there as .svg too, and its raw data as .npz. neurons.csv has a line for every "
        "active neuron.",
        "soft",
    )
