"""How patterns evolve and settle, in numbers, against slow oracles; labels of a text."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from sprout import ActivationPattern
from sprout.analysis import KINDS, character_of, evolution, label, measure, observe, windows
from sprout.analysis.settling import Band, Settling
from tests.sprout_models import pattern_of, small, some_tokens, wired


def sets(pattern):
    return [dict(zip(i[:c].tolist(), g[:c].tolist(), strict=True)) for i, g, c in zip(*pattern[:3], strict=True)]


def history_of_two():
    return [
        pattern_of([[1, 4], [4]], [[0.5, 0.25], [1.0]]),
        pattern_of([[1, 4, 7], [0, 4]], [[0.5, 0.25, 0.75], [0.5, 0.5]]),
    ]


def test_evolution_of_a_history_by_hand():
    found = evolution(history_of_two())
    # Entered at step 0: neuron 4 with means (0.625, 0.375), then 1 with (0.25, 0.25); at step 1: 7, then 0.
    assert found.neuron.tolist() == [4, 1, 7, 0]
    assert found.entry.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(found.mean_gate, [[0.625, 0.375], [0.25, 0.25], [0, 0.375], [0, 0.25]])
    assert found.count.tolist() == [[2, 3], [1, 2]]
    assert found.n_neurons == 10
    for share, gates in zip(found.gate_share, ([0.5, 0.25, 1.0], [0.5, 0.25, 0.75, 0.5, 0.5]), strict=True):
        np.testing.assert_allclose(share, np.histogram(gates, found.gate_edges)[0] / len(gates))
        assert share.sum() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_evolution_of_a_model_is_that_of_its_dense_patterns(dtype):
    history = wired(small()).to(dtype).analyze_activation(some_tokens(7))["activation_history"]
    found = evolution(history)
    dense = np.stack([p.to_dense().double().mean(0).numpy() for p in history], 1)
    np.testing.assert_allclose(found.mean_gate, dense[found.neuron], atol=1e-2 if dtype == torch.bfloat16 else 1e-12)
    assert sorted(found.neuron) == np.flatnonzero(dense.any(1)).tolist()
    assert (np.diff(found.entry) >= 0).all()


@pytest.mark.parametrize(
    ("history", "error", "message"),
    [
        ([], ValueError, "at least one ActivationPattern"),
        ([torch.zeros(2, 3)], TypeError, "got Tensor in step 0"),
        ([pattern_of([[1]], [[0.5]]), pattern_of([[1], [2]], [[0.5], [0.5]])], ValueError, "B=2, N=10 in step 1"),
        ([pattern_of([[1]], [[0.5]]), pattern_of([[1]], [[0.5]], n=11)], ValueError, "N=11 in step 1"),
        ([pattern_of([[1]], [[0.5]]), pattern_of([[1]], [[float("nan")]])], ValueError, "NaN or infinity in step 1"),
        ([ActivationPattern(*(torch.zeros(0, 2),) * 2, torch.zeros(0), 5)], ValueError, "at least one sample"),
    ],
)
def test_evolution_refuses(history, error, message):
    with pytest.raises(error, match=message):
        evolution(history)


def test_windows():
    assert windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(torch.arange(3), 4).tolist() == [[0, 1, 2]]
    for tokens, length in ((torch.arange(0), 4), (torch.arange(4), 0), (torch.zeros(2, 2), 1)):
        with pytest.raises(ValueError, match="must be"):
            windows(tokens, length)


def slow(model, tokens):
    """Patterns of every prefix, each run alone."""
    return [model.settle(row[: t + 1][None]).history for row in tokens for t in range(len(row))]


def test_observation_and_measures_against_one_prefix_at_a_time():
    model, tokens = wired(small()).double().eval(), some_tokens(3, 7)
    with torch.no_grad():
        runs = slow(model, tokens)
    seen, found = observe(model, tokens), measure(model, tokens)
    patterns = [[sets(p)[0] for p in history] for history in runs]
    overlap = np.array(
        [[len(a.keys() & b.keys()) / len(a.keys() | b.keys()) for a, b in pairwise(p)] for p in patterns]
    )
    change = np.array(
        [
            [np.mean([abs(a.get(n, 0) - b.get(n, 0)) for n in a.keys() | b.keys()]) for a, b in pairwise(p)]
            for p in patterns
        ]
    )
    assert seen.active.tolist() == [[len(gates) for gates in p] for p in patterns]
    np.testing.assert_allclose(seen.jaccard, overlap)
    np.testing.assert_allclose(seen.gate_change, change, atol=1e-12)
    dense = np.zeros((21, 96))
    for column, neuron in enumerate(seen.neuron):
        entries = slice(seen.offsets[column], seen.offsets[column + 1])
        assert (np.diff(seen.position[entries]) > 0).all()
        dense[seen.position[entries], neuron] = seen.gate[entries]
    expected = np.stack([history[-1].to_dense()[0].numpy() for history in runs])
    np.testing.assert_allclose(dense, expected, atol=1e-7)
    ever = set().union(*(gates.keys() for p in patterns for gates in p))
    assert set(np.flatnonzero(seen.ever)) == ever
    assert found.used == len(ever) / 96
    assert found.used_at_end == (expected > 0).any(0).mean()
    assert found.final_counts == len({len(p[-1]) for p in patterns})
    for step, band in enumerate(found.jaccard):
        assert band.mean == pytest.approx(overlap[:, step].mean())
        assert (band.low, band.high) == pytest.approx(tuple(np.quantile(overlap[:, step], (0.05, 0.95))))
        assert (band.min, band.max) == pytest.approx((overlap[:, step].min(), overlap[:, step].max()))
    assert found.gate_change[-1].mean == pytest.approx(change[:, -1].mean())


def test_observation_leaves_the_model_as_it_was():
    model = small(dropout=0.5).train()
    model.encoder.eval()
    first, second = (observe(model, some_tokens(3, 7)) for _ in range(2))
    assert model.training
    assert not model.encoder.training
    assert all(map(np.array_equal, first[:-1], second[:-1])), "dropout is off"
    assert all(p.grad is None for p in model.parameters())


def test_more_inputs_than_one_pass_holds():
    model, tokens = wired(small()), some_tokens(50, 24)  # 1,200 prefixes
    seen, first = observe(model, tokens), observe(model, tokens[:10])
    assert seen.n_inputs == 1200
    np.testing.assert_array_equal(seen.active[:240], first.active)
    np.testing.assert_allclose(seen.gate_change[:240], first.gate_change, atol=1e-6)


def test_no_steps_and_other_models():
    found = measure(small(n_interaction_steps=0), some_tokens())
    assert found.jaccard == found.gate_change == []
    assert list(found.targets()) == ["different counts of active neurons", "share of the neurons used"]
    json.dumps(found.as_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="causal"):
        measure(small(causal=False), some_tokens())


def settled(means, change, counts, used):
    bands = [Band(mean, mean, mean, mean, mean) for mean in means]
    return Settling(4, 10, bands, bands, [Band(change, 0, 0, 0, 0)], used, used, counts)


def test_targets():
    assert all(target["reached"] for target in settled([0.8, 0.9, 0.95], 0.02, 2, 0.9).targets().values())
    missed = settled([0.96, 0.949], 0.021, 1, 0.89).targets()
    assert len(missed) == 5
    assert not any(target["reached"] for target in missed.values())


TEXT = "It's a_1 \tX\n\N{EN DASH}é"


def test_labels():
    def named(kind, text=TEXT):
        labels = label(text, np.arange(len(text)), kind)
        assert labels.names == sorted(set(labels.names))
        return [labels.names[i] for i in labels.index]

    lower, upper, mark = "lower case", "upper case", "punctuation"
    assert named("character class") == [
        *(upper, lower, mark, lower, "space", lower, mark, "digit", "space", "space", upper, "newline", mark, lower)
    ]
    assert named("current character")[3:6] == ["s", "space", "a"]
    assert named("current character")[9:] == ["tab", "X", "newline", "\N{EN DASH}", "é"]
    assert named("next character") == [*named("current character")[1:], "end of text"]
    places = [f"letter {i}" if i else "between words" for i in (1, 2, 0, 1, 0, 1, 2, 3, 0, 0, 1, 0, 0, 1)]
    assert named("place in word") == places
    assert named("place in word", "internationally")[6:9] == ["letter 7", "letter 8 or later", "letter 8 or later"]
    assert named("character class", "中\x00") == ["other letter", "other"]
    assert named("current character", "中\x00") == ["U+4E2D", "U+0000"]
    assert label(TEXT, np.array([0, 0, 4])).names == ["I", "space"], "labels that do not occur are left out"


def test_labels_refuse():
    with pytest.raises(ValueError, match="kind must be one of 'current character'"):
        label(TEXT, np.arange(3), "word")
    with pytest.raises(ValueError, match=r"where must be in 0\.\.13, got values from 0 to 14"):
        label(TEXT, np.arange(15), KINDS[0])


class Pairs:
    """Two bytes at a time: tokens that split characters."""

    def encode(self, text):
        raw = text.encode() + b"\0" * (len(text.encode()) % 2)
        return torch.tensor([256 * a + b for a, b in zip(raw[::2], raw[1::2], strict=True)])

    def decode(self, tokens):
        raw = b"".join(bytes(divmod(token, 256)) for token in tokens.tolist())
        return raw.rstrip(b"\0").decode(errors="replace")


def test_tokens_find_their_characters():
    characters, raw = torch.zeros(len(TEXT)), torch.zeros(len(TEXT.encode()))
    assert character_of(TEXT, characters).tolist() == list(range(14))
    assert character_of(TEXT, raw).tolist() == [*range(12), 12, 12, 12, 13, 13]
    pairs = Pairs()
    text = "abcdäbc\N{EN DASH}x"  # ab cd, a letter of two bytes, bc, a dash of three, split, and x
    assert character_of(text, pairs.encode(text), pairs.decode).tolist() == [1, 3, 4, 6, 8, 8]
    with pytest.raises(ValueError, match="pass the tokenizer itself"):
        character_of(text, pairs.encode(text))
    with pytest.raises(ValueError, match="not the text's 'abcd"):
        character_of(text * 9, pairs.encode(text * 9), lambda tokens: "?")


def test_byte_pairs_find_their_characters():
    pytest.importorskip("tokenizers")
    from sprout.text import BytePairs

    text = "the cat \N{EN DASH} the hat, the “rat”; " * 20
    words = BytePairs.train(text, 280)
    tokens = words.encode(text)
    where = character_of(text, tokens, words.decode)
    pieces = [words.decode(tokens[: i + 1]).rstrip("\N{REPLACEMENT CHARACTER}") for i in range(20)]
    assert [len(piece) - 1 for piece in pieces if text.startswith(piece)] == [
        w for w, piece in zip(where[:20], pieces, strict=True) if text.startswith(piece)
    ]
    assert where[-1] == len(text) - 1


def test_the_numbers_need_no_plotting():
    code = "import sys, sprout, sprout.analysis as a; a.measure, a.ReportSettings; print([m for m in sys.modules if "
    code += "m.split('.')[0] in ('matplotlib', 'accelerate', 'tensorboard', 'huggingface_hub')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.stdout.strip() == "[]", done.stderr


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
