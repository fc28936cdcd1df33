"""The examples: what they are made of, what is fair about them, and that they reach what they state."""

import json
import random
import re
from collections import Counter

import pytest
import torch

from sprout.data import corpus
from sprout.examples import classification, common, facts, question_answering, word_order


@pytest.fixture(scope="module")
def passages():
    return word_order.split(corpus())


def shown(passages, rows):
    word = {number: w for w, number in passages.vocabulary.items()}
    return [" ".join(word.get(i, "_") for i in row) for row in rows.tolist()]


def test_the_text_has_prose_on_both_sides(passages):
    assert passages.train.shape[1] == passages.validation.shape[1] == word_order.LENGTH
    assert len(passages.train) > 10_000
    assert len(passages.validation) > 300
    assert len(passages.vocabulary) == word_order.VOCABULARY - 1
    assert 0 < passages.train.max() < word_order.VOCABULARY
    assert passages.vocabulary["the"] < 10


def test_the_split_is_always_the_same(passages):
    again = word_order.split(corpus())
    assert torch.equal(again.train, passages.train)
    assert torch.equal(again.validation, passages.validation)
    assert again.vocabulary == passages.vocabulary


def test_no_paragraph_and_no_run_of_words_is_on_both_sides():
    """By an independent road: from the text, with strings."""
    sides = {False: [], True: []}
    for words in word_order.paragraphs(corpus()):
        sides[word_order.held_out(words)].append(" ".join(words))
    assert not set(sides[False]) & set(sides[True])
    share = len(sides[True]) / sum(map(len, sides.values()))
    assert 0.1 < share < 0.3
    everything = " | ".join(sides[False]).split(" ")
    seen = {" ".join(everything[i : i + word_order.SHARED]) for i in range(len(everything))}
    passages = [p.split(" ") for p in sides[True]]
    kept = dropped = 0
    for words in passages:
        for i in range(0, len(words) - word_order.LENGTH + 1, word_order.LENGTH):
            window = words[i : i + word_order.LENGTH]
            runs = {" ".join(window[j : j + word_order.SHARED]) for j in range(len(window) - word_order.SHARED + 1)}
            kept, dropped = (kept, dropped + 1) if runs & seen else (kept + 1, dropped)
    assert kept == len(word_order.split(corpus()).validation)
    assert dropped > 0, "a check that never fires"


def test_shuffles_stay_within_runs(passages):
    draws = torch.Generator().manual_seed(0)
    before = passages.train[:500]
    after = word_order.shuffled(before, draws)
    assert not torch.equal(before, after)
    for a, b in zip(before.tolist(), after.tolist(), strict=True):
        for i in range(0, word_order.LENGTH, word_order.RUN):
            assert Counter(a[i : i + word_order.RUN]) == Counter(b[i : i + word_order.RUN])
    first = (word_order.shuffled(torch.arange(12).expand(4800, 12), draws)[:, 0]).bincount(minlength=12)
    assert first[4:].sum() == 0
    assert first[:4].min() > 1000


def test_every_judged_passage_stands_once_in_each_class(passages):
    tokens, labels = word_order.pairs(passages.validation, seed=0)
    half = len(tokens) // 2
    assert labels.tolist() == [0] * half + [1] * half
    text = set(shown(passages, passages.validation))
    assert set(shown(passages, tokens[:half])) <= text
    for original, other in zip(tokens[:half].tolist(), tokens[half:].tolist(), strict=True):
        assert original != other
        assert sorted(original) == sorted(other)
    assert len(passages.validation) - half < 10
    assert torch.equal(word_order.pairs(passages.validation, seed=0)[0], tokens)
    assert not torch.equal(word_order.pairs(passages.validation, seed=1)[0], tokens)


def test_training_batches_are_labelled_right(passages):
    tokens, labels = word_order.batch(passages.train, 600, torch.Generator().manual_seed(3))
    again, _ = word_order.batch(passages.train, 600, torch.Generator().manual_seed(3))
    assert torch.equal(tokens, again)
    original = set(map(tuple, passages.train.tolist()))
    as_written = torch.tensor([tuple(row) in original for row in tokens.tolist()])
    assert as_written[labels == 0].all()
    assert as_written[labels == 1].float().mean() < 0.02
    assert labels.tolist() == [0] * 300 + [1] * 300
    assert torch.equal(tokens[:300].sort(1).values, tokens[300:].sort(1).values)


def test_a_text_without_prose_is_refused():
    with pytest.raises(ValueError, match="text must have prose for both sides, got 0 training paragraphs, 0 kept"):
        word_order.split("x = 1\n\ny = 2\n")


def told(example):
    """What a passage says, read with a regular expression: {(name, verb): answer}."""
    text = " ".join(example.words[: example.passage])
    found = re.findall(r"(\w+) (plays|studies) ([^.]+) \.", text)
    assert " ".join(f"{n} {verb} {a} ." for n, verb, a in found) == text
    return {(n, verb): a for n, verb, a in found}


@pytest.mark.parametrize("validation", [False, True])
def test_answers_are_what_the_passage_says(validation):
    draw = random.Random(0)
    for _ in range(50):
        asked = facts.questions(draw, validation=validation)
        assert len(asked) == 6
        for example in asked:
            said = told(example)
            assert len(said) == len(set(said.values())) == 6
            question = " ".join(example.words[example.passage :])
            verb, name = re.fullmatch(r"what is (played|studied) by (\w+) \?", question).groups()
            verb = {"played": "plays", "studied": "studies"}[verb]
            assert (verb, name) == (example.relation, example.name)
            assert example.answer() == said[name, verb]
            assert len(example.words) <= facts.MAX_WORDS
        assert len({example.answer() for example in asked}) == 6, "the question decides the answer"


def test_no_fact_is_on_both_sides_and_no_word_is_new():
    draw, sides, words = random.Random(1), {}, {}
    for validation in (False, True):
        examples = [e for _ in range(1500) for e in facts.questions(draw, validation=validation)[:1]]
        sides[validation] = {(n, a) for e in examples for (n, _), a in told(e).items()}
        words[validation] = {w for e in examples for w in e.words}
    assert words[True] <= words[False] == set(facts.WORDS[1:])
    assert not sides[False] & sides[True]
    pairs = {(n, a) for n in facts.NAMES for answers in facts.ANSWERS.values() for a in answers}
    assert sides[False] | sides[True] == pairs
    assert 0.15 < len(sides[True]) / len(pairs) < 0.35


def test_the_seed_decides_the_facts():
    ask = lambda seed: facts.questions(random.Random(seed), validation=False)  # noqa: E731
    assert ask(3) == ask(3)
    assert ask(3) != ask(4)
    small = facts.questions(random.Random(0), validation=False, people=2, relations=["studies"])
    assert [e.relation for e in small] == ["studies"] * 2


def test_batches_hold_the_words_and_the_spans():
    examples = question_answering.training(random.Random(0), step=2000)
    assert len(examples) >= question_answering.BATCH
    assert {len(e.words) for e in question_answering.training(random.Random(0), step=0)} <= set(range(14, 20))
    batch = question_answering.collate(examples)
    for i, example in enumerate(examples):
        n, (first, last) = len(example.words), batch.spans[i].tolist()
        words = [facts.WORDS[j] for j in batch.tokens[i, :n]]
        assert words == example.words
        assert " ".join(words[first : last + 1]) == example.answer()
        assert batch.mask[i].tolist() == [True] * n + [False] * (batch.tokens.shape[1] - n)
        assert batch.context[i].sum() == example.passage
        assert batch.context[i, : example.passage].all()


def bags_of(ids, labels, classes=2, allowed=None):
    labels = torch.tensor(labels)
    everything = torch.ones(len(labels), classes, dtype=torch.bool)
    return common.Bags(torch.tensor(ids), labels, everything if allowed is None else torch.tensor(allowed))


def test_the_majority_is_the_commonest_class_that_is_allowed():
    train = bags_of([[0]] * 6, [2, 2, 2, 1, 1, 0], 3)
    test = bags_of([[0]] * 4, [2, 1, 0, 1], 3, [[True] * 3, [True, True, False], [True, True, False], [True] * 3])
    assert common.majority(train, test) == 0.5


def test_a_bag_of_words_learns_what_words_tell_and_only_that():
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(8, (600, 6), generator=draws)
    telling = ((ids == 3).sum(1) > (ids == 5).sum(1)).long()
    ordered = (ids[:, 0] < ids[:, 1]).long()

    def accuracy(labels):
        every = torch.ones(600, 2, dtype=torch.bool)
        bags = common.Bags(ids, labels, every)
        return common.bag_of_words(common.Bags(*(x[:400] for x in bags)), common.Bags(*(x[400:] for x in bags)))

    assert accuracy(telling) > 0.95
    assert abs(accuracy(ordered) - ordered.double().mean()) < 0.15


def test_a_bag_of_words_is_the_regression_it_says():
    """The gradient of the stated loss is zero where the fit ends; unknown words, and nothing, count for nothing."""
    draws = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(5, (200, 4), generator=draws), torch.randint(3, (200,), generator=draws)
    ids[0, 2:] = -1
    bags = common.Bags(ids, labels, torch.ones(200, 3, dtype=torch.bool))
    weights = common._regression(bags, 1e-2)
    counts = torch.stack([(ids == word).sum(1) for word in range(5)], 1).float()
    w, b = weights[:5].clone().requires_grad_(), weights[-1].clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(counts @ w + b, labels) + 0.005 * w.square().sum()
    loss.backward()
    assert w.grad.abs().max() < 1e-3
    assert b.grad.abs().max() < 1e-3
    assert not weights[5].any()
    strange = bags._replace(ids=torch.full((200, 4), 77))
    torch.testing.assert_close(common._logits(weights, strange), weights[-1].expand(200, 3))


def test_no_bag_of_words_can_tell_the_order(passages):
    judged = classification.bags(*word_order.pairs(passages.validation, seed=0))
    counted = classification.samples(passages.train[::20], torch.Generator().manual_seed(0))
    counted = common.Bags(*(x[::10] for x in counted))
    assert common.bag_of_words(counted, judged) == 0.5
    assert common.majority(counted, judged) == 0.5
    assert common.bag_of_words(classification.neighbours(counted), classification.neighbours(judged)) > 0.6


def test_bags_of_questions():
    draw = random.Random(5)
    asked = [facts.questions(draw, validation=True)[0] for _ in range(40)]
    bags = question_answering.bags(asked)
    assert (bags.allowed.sum(1) == 6).all()
    for i, example in enumerate(asked):
        choices = {c for c, ok in zip(question_answering.CHOICES, bags.allowed[i].tolist(), strict=True) if ok}
        assert choices == {(verb, answer) for (_, verb), answer in told(example).items()}
        assert question_answering.CHOICES[bags.labels[i]] == (example.relation, example.answer())
    blind = question_answering.nameless(bags)
    words = [facts.WORDS[j % len(facts.WORDS)] for j in blind.ids[blind.ids >= 0].tolist()]
    assert not set(words) & set(facts.NAMES)
    assert {"plays", "played", "studied", "chess"} <= set(words)


@pytest.mark.parametrize("example", [classification, question_answering])
def test_an_example_runs_from_end_to_end(example, monkeypatch, tmp_path, capsys):
    out = tmp_path / "figures.json"
    monkeypatch.setattr(common, "bag_of_words", lambda *_bags: 0.25)
    assert example.main(["--steps", "2", "--seed", "3", "--out", str(out)]) == 1
    printed, figures = capsys.readouterr(), json.loads(out.read_text())
    assert "step     2  loss" in printed.out
    assert "asked for" in printed.err
    assert (figures["seed"], figures["steps"], figures["passed"]) == (3, 2, False)
    assert 0 <= figures["accuracy"]["sprout"] < 0.7
    assert figures["accuracy"]["bag of words"] == 0.25
    assert example.main(["--steps", "2", "--seed", "3", "--out", str(out)]) == 1
    again = json.loads(out.read_text())
    assert {**again, "cpu_seconds": 0} == {**figures, "cpu_seconds": 0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps must be >= 1, got 0"),
        (["--seed", "-1"], "--seed must be >= 0, got -1"),
        (["--out", "no/such/folder/x.json"], "--out must be a .json file in an existing folder"),
        (["--out", "figures.txt"], "--out must be a .json file in an existing folder, got figures.txt"),
    ],
)
def test_flags_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        classification.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_verdict_asks_for_the_margin_over_the_best_rival(capsys):
    args = common.arguments("", 1, [])
    accuracy = {"sprout": 0.75, "majority": 0.5, "bag of words": 0.25}
    assert common.verdict(accuracy, ("majority", "bag of words"), 0.25, args) == 0
    assert common.verdict(accuracy, ("majority", "bag of words"), 0.26, args) == 1
    assert common.verdict(accuracy, ("bag of words",), 0.26, args) == 0
    assert "+25.0% over the best of majority, bag of words; +26% is asked for" in capsys.readouterr().err


def test_sinusoids_shift_by_one_linear_map():
    table = common.sinusoids_(torch.empty(40, 16, dtype=torch.float64))
    assert table.square().mean() == pytest.approx(1.0)
    sine, cosine = table.chunk(2, 1)
    turn = torch.atan2(sine[1], cosine[1])  # row 0 is sin 0 and cos 0
    assert (turn.diff() < 0).all()
    torch.testing.assert_close(sine[:-1] * turn.cos() + cosine[:-1] * turn.sin(), sine[1:], rtol=0, atol=1e-4)
    torch.testing.assert_close(cosine[:-1] * turn.cos() - sine[:-1] * turn.sin(), cosine[1:], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("example", [classification, question_answering])
def test_an_example_reaches_what_it_states(example, tmp_path):
    out = tmp_path / "figures.json"
    assert example.main(["--out", str(out)]) == 0
    accuracy = json.loads(out.read_text())["accuracy"]
    best = max(value for name, value in accuracy.items() if name in ("majority", "bag of words"))
    assert accuracy["sprout"] >= best + example.MARGIN
