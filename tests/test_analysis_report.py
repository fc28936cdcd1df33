"""The report and its command line: what is written, that the page stands alone, and what is refused."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from sprout import analyze, data
from sprout.analysis import KINDS, ReportSettings, measure, page, selectivity, windows, write_report
from sprout.analysis.summary import analyse, untrained_twin
from tests.sprout_models import small, wired

TEXT = "the whole input becomes one <sparse> pattern & the pool settles.\n" * 6
SETTINGS = ReportSettings(max_tokens=240, permutations=5)
PICTURES = ["activation", "settling", "connections", *("specialisation_" + kind.replace(" ", "_") for kind in KINDS)]


def model_of_bytes(**changes):
    return wired(small(vocab_size=256, **changes))


class Page(HTMLParser):
    """What a page holds, and whether its tags close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "deep" / "er"
    model = model_of_bytes()
    assert write_report(model, data.encode, TEXT, out, SETTINGS) == out / "index.html"
    return model, out


def test_everything_is_written(report):
    _, out = report
    names = {f"{name}.{suffix}" for name in PICTURES for suffix in ("png", "svg", "npz")}
    assert {path.name for path in out.iterdir()} == names | {
        "index.html",
        "analysis.json",
        "neurons.csv",
        "synapses.csv",
    }
    assert all(path.stat().st_size > 300 for path in out.iterdir())


def test_the_page_needs_nothing_but_itself(report):
    source = (report[1] / "index.html").read_text(encoding="utf-8")
    found = Page(source)
    pictures = [attrs for tag, attrs in found.tags if tag == "img"]
    assert len(pictures) == len(PICTURES)
    for attrs in pictures:
        assert attrs["src"].startswith("data:image/png;base64,")
        assert len(attrs["alt"]) > 40
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.tags}
    for _, attrs in found.tags:
        assert not attrs.keys() & {"href", "srcset", "onclick"}
        assert "url(" not in str(attrs.get("style"))
    without_pictures = re.sub(r"base64,[^\"]+", "", source)
    for outside in ("http", "//", "url(", "@import"):
        assert outside not in without_pictures
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags
    assert "prefers-color-scheme: dark" in source
    assert "&lt;sparse&gt;" in source, "the text is text"


def test_the_figures_are_those_of_the_functions(report):
    model, out = report
    found = json.loads((out / "analysis.json").read_text())
    rows = windows(data.encode(TEXT)[:240], 24)
    expected = json.loads(json.dumps(measure(model, rows).as_dict()))
    assert found["settling"] == expected
    assert found["inputs"] == {"count": 240, "window": 24, "shown_windows": 10}
    done = analyse(model, data.encode, TEXT, SETTINGS)
    for kind in KINDS:
        driven, figures = done.driven[kind], found["specialisation"][kind]
        assert figures["share_above_shuffled"] == driven.found.share
        assert (
            figures["share_above_shifted"]
            == selectivity(done.seen, driven.labels, permutations=5, control="shift").share
        )
        assert figures["median_selectivity"] == np.median(driven.found.selectivity)
        assert figures["untrained_median_selectivity"] == np.median(driven.twin.selectivity)
    text = Page((out / "index.html").read_text(encoding="utf-8")).text
    assert f"{100 * expected['jaccard'][-1]['mean']:.1f} % were active both" in text
    assert f"{100 * found['specialisation'][KINDS[1]]['share_above_shuffled']:.1f} %" in text
    assert "untrained model" not in found["title"]
    with (out / "neurons.csv").open() as file:
        neurons = list(csv.DictReader(file))
    assert [int(row["neuron"]) for row in neurons] == done.seen.neuron.tolist()
    assert sum(int(row["inputs"]) for row in neurons) == len(done.seen.gate)
    with (out / "synapses.csv").open() as file:
        synapses = list(csv.DictReader(file))
    strength = model.pool.connection_strength.detach().clone().fill_diagonal_(0)
    first = synapses[0]
    assert float(first["strength"]) == strength[int(first["pre"]), int(first["post"])].item()
    assert abs(float(first["strength"])) == strength.abs().max().item()


def test_the_twin_is_another_model_and_leaves_the_random_numbers_alone():
    model = model_of_bytes().double()
    before = torch.get_rng_state()
    twins = [untrained_twin(model, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    weights = [twin.pool.neuron_signatures for twin in twins]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].dtype == torch.float64
    assert twins[0].config == model.config


KNOWN = sorted({TEXT[i : i + 2] for i in range(0, len(TEXT), 2)})


class Tokenizer:
    """Two characters at a time."""

    def encode(self, text):
        return torch.tensor([KNOWN.index(text[i : i + 2]) for i in range(0, len(text), 2)])

    def decode(self, tokens):
        return "".join(KNOWN[token] for token in tokens.tolist())


def test_a_tokenizer_or_its_method():
    tokenizer = Tokenizer()
    for encode in (tokenizer, tokenizer.encode):
        done = analyse(model_of_bytes(), encode, TEXT, SETTINGS)
        assert done.where[:3].tolist() == [1, 3, 5]
        assert done.seen.n_inputs == len(TEXT) // 2 // 24 * 24
    with pytest.raises(ValueError, match="pass the tokenizer itself"):
        analyse(model_of_bytes(), lambda text: tokenizer.encode(text), TEXT, SETTINGS)


@pytest.mark.parametrize("changes", [{"n_interaction_steps": 0}, {"connection": "block_sparse", "blocks_per_row": 2}])
def test_other_models_are_analysed(changes):
    done = analyse(model_of_bytes(**changes), data.encode, TEXT, SETTINGS)
    assert len(done.settling.jaccard) == done.model.config.n_interaction_steps
    assert len(done.synapses.strength) == 60


def test_report_refuses(tmp_path):
    with pytest.raises(ValueError, match="at least two tokens, got 1"):
        write_report(model_of_bytes(), data.encode, "a", tmp_path / "new")
    with pytest.raises(TypeError, match="got Linear: there is no pool"):
        write_report(torch.nn.Linear(2, 2), data.encode, TEXT, tmp_path / "new")
    with pytest.raises(ValueError, match="causal"):
        write_report(model_of_bytes(causal=False), data.encode, TEXT, tmp_path / "new")
    assert not (tmp_path / "new").exists(), "nothing is made before everything is known"
    for name in ("max_tokens", "permutations", "window"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
            ReportSettings(**{name: 0})


def test_page_parts():
    text = page.table(["a<b", "c"], [("x&y", "1,234.5"), ("-", "99.1 %")])
    assert "a&lt;b" in text
    assert "x&amp;y" in text
    assert text.count('class="number"') == 2
    marked = page.coloured("a<\nb", np.array([0, 1, 1, 0.25]))
    assert marked == (
        '<div class="text">a<b style="background:rgba(230,159,0,0.8)">&lt;↵</b>'
        '<b style="background:rgba(230,159,0,0.2)">b</b></div>'
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_tokens", "1"], "--max_tokens must be at least 2, got 1"),
        (["--max_tokens", "many"], "argument --max_tokens: invalid int value: 'many'; see --help"),
        (["--colour"], "unrecognized arguments: --colour; see --help"),
        (["--seed", "-1"], "--seed must be in 0..2**32-1, got -1"),
        (["--device", "abacus"], "--device abacus cannot be used: "),
        (["--text", "missing.txt"], "--text missing.txt does not exist; --text takes a text file or a folder"),
        (["--text", "one.txt"], "--text one.txt does not suit the model: text must hold at least two tokens, got 1"),
        (["--checkpoint", "missing"], "--checkpoint missing cannot be loaded: "),
        (["--out", "one.txt"], "--out one.txt is a file; name a folder"),
        (["--out", "full"], "--out full is not empty; name another folder, or replace its files with --force"),
    ],
)
def test_command_line_refuses(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    assert analyze.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("sprout-analyze: error: " + message)
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "one.txt"]


def test_command_line_without_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analyze, "UNTRAINED", {**analyze.UNTRAINED, "n_neurons": 128})
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    assert analyze.main(["--max_tokens", "130"]) == 0
    out = tmp_path / "runs" / "analysis-untrained"
    assert capsys.readouterr().out.strip() == "runs/analysis-untrained/index.html"
    assert torch.equal(torch.get_rng_state(), before)
    source = (out / "index.html").read_text(encoding="utf-8")
    assert "<title>SPROUT analysis: untrained model</title>" in source
    assert "This model is untrained: its weights are random." in source
    assert "All 16,256 connection strengths between different neurons are zero" in source
    found = json.loads((out / "analysis.json").read_text())
    assert found["inputs"]["count"] == 128
    assert found["specialisation"][KINDS[0]]["untrained_median_selectivity"] is None
    assert analyze.main([]) == 2, "its own folder is not empty now"


def test_command_line_with_a_checkpoint(tmp_path, monkeypatch, capsys):
    from sprout import hub
    from sprout.analysis import report
    from sprout.text import Bytes

    model, seen = model_of_bytes(), {}
    hub.save(model, tmp_path / "run", Bytes())

    def write(model, encode, text, out, settings):
        seen.update(model=model, text=text, out=out, settings=settings, tokens=encode.encode("ab"))
        return out / "index.html"

    monkeypatch.setattr(report, "write_report", write)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    run = str(tmp_path / "run")
    assert analyze.main(["--checkpoint", run, "--text", str(text), "--max_tokens", "99", "--seed", "3"]) == 0
    assert torch.equal(seen["model"].pool.connection_strength, model.pool.connection_strength)
    assert (seen["text"], seen["out"]) == (TEXT, tmp_path / "run" / "analysis")
    assert seen["tokens"].tolist() == [97, 98]
    assert seen["settings"] == ReportSettings(title="SPROUT analysis: run", max_tokens=99, seed=3)
    assert analyze.main(["--checkpoint", run, "--out", run]) == 2
    assert analyze.main(["--checkpoint", run, "--out", run, "--force"]) == 0
    assert capsys.readouterr().err.count("is not empty") == 1
