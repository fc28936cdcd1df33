"""The heads: one label for a text, and the words of a passage that answer a question."""

import copy
import itertools
import pickle

import pytest
import torch

from sprout.heads import SequenceClassifier, SpanExtractor, SpanScores
from tests.sprout_models import small, some_tokens, wired

CONTEXT = torch.arange(9) < torch.tensor([[6], [4], [5]])  # the passage; the rest is the question
SPANS = torch.tensor([[1, 2], [0, 3], [4, 4]])


def classifier(**changes):
    return SequenceClassifier(wired(small(**changes)), 3)


def extractor(max_answer=3, **changes):
    return SpanExtractor(wired(small(**changes)), max_answer)


def test_a_classifier_gives_a_logit_per_class():
    head, tokens = classifier(), some_tokens()
    logits = head(tokens)
    assert logits.shape == (3, 3)
    torch.testing.assert_close(logits, head.model.features(tokens) @ head.head.weight.t() + head.head.bias)
    assert torch.equal(head.predict(tokens), logits.argmax(1))
    assert head.predict(tokens).dtype == torch.int64
    labels = torch.tensor([2, 0, 1])
    by_hand = torch.stack([row.logsumexp(0) - row[label] for row, label in zip(logits, labels, strict=True)]).mean()
    torch.testing.assert_close(head.loss(tokens, labels), by_hand)


def test_pointers_are_products_of_features_and_token_vectors():
    head, tokens = extractor().double(), some_tokens()
    scores = head(tokens, CONTEXT)
    assert scores.start.shape == scores.end.shape == (3, 9)
    start, end = head.query(head.model.features(tokens)).chunk(2, 1)
    keys = head.norm(head.model.encoder(tokens, head.model.pool).tokens)
    for query, got in ((start, scores.start), (end, scores.end)):
        expected = torch.einsum("bd,btd->bt", query, keys) / 16**0.5
        torch.testing.assert_close(got[CONTEXT], expected[CONTEXT])
        assert got[~CONTEXT].isneginf().all()
    log_p = [x.log_softmax(1).gather(1, SPANS[:, [i]]) for i, x in enumerate(scores)]
    torch.testing.assert_close(head.loss(tokens, SPANS, CONTEXT), -torch.cat(log_p).mean())


def losses(head, tokens):
    if isinstance(head, SequenceClassifier):
        return head.loss(tokens, torch.arange(len(tokens)) % 3)
    return head.loss(tokens, SPANS, CONTEXT)


@pytest.mark.parametrize("make", [classifier, extractor])
def test_every_parameter_but_the_vocabulary_has_a_gradient(make):
    head = make()
    losses(head, some_tokens()).backward()
    for name, p in head.named_parameters():
        if name.startswith("model.decoder.head."):
            assert p.grad is None, name
        else:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.any(), name


@pytest.mark.parametrize("make", [classifier, extractor])
def test_heads_learn(make):
    head, tokens = make(), some_tokens()
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    before = losses(head, tokens).item()
    for _ in range(20):
        optimizer.zero_grad()
        losses(head, tokens).backward()
        optimizer.step()
    assert losses(head, tokens).item() < 0.3 * before


def padded(tokens, context, left, right):
    """The same input with noise around it that the mask leaves out, and that the context claims."""
    noise = lambda width: some_tokens(len(tokens), width, seed=7)  # noqa: E731
    mask = torch.zeros(len(tokens), left + tokens.shape[1] + right, dtype=torch.bool)
    mask[:, left : left + tokens.shape[1]] = True
    claimed = torch.ones_like(mask)
    claimed[:, left : left + tokens.shape[1]] = context
    return torch.cat([noise(left), tokens, noise(right)], 1), claimed, mask


@pytest.mark.parametrize(("left", "right"), [(4, 0), (0, 4), (2, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(left, right, causal):
    tokens = some_tokens()
    wide, claimed, mask = padded(tokens, CONTEXT, left, right)
    head = classifier(causal=causal).double()
    torch.testing.assert_close(head(wide, mask), head(tokens), rtol=0, atol=1e-10)
    assert torch.equal(head.predict(wide, mask), head.predict(tokens))
    head = extractor(causal=causal).double()
    torch.testing.assert_close(head.loss(wide, SPANS + left, claimed, mask), head.loss(tokens, SPANS, CONTEXT))
    for got, expected in zip(head(wide, claimed, mask), head(tokens, CONTEXT), strict=True):
        torch.testing.assert_close(got[:, left : left + 9], expected, rtol=0, atol=1e-10)
        assert got[~mask].isneginf().all()
    got, expected = head.predict(wide, claimed, mask), head.predict(tokens, CONTEXT)
    assert torch.equal(got.span, expected.span + left)
    torch.testing.assert_close(got.score, expected.score, rtol=0, atol=1e-10)


def best_span(start, end, offered, max_answer):
    """The oracle: every span in turn."""
    best, score = None, float("-inf")
    for first, last in itertools.combinations_with_replacement(range(len(start)), 2):
        if last - first < max_answer and all(offered[first : last + 1]):
            value = (start.log_softmax(0)[first] + end.log_softmax(0)[last]).item()
            if value > score:
                best, score = [first, last], value
    return best, score


@pytest.mark.parametrize("max_answer", [1, 2, 3, 50])
@pytest.mark.parametrize("seed", range(4))
def test_predicted_spans_are_the_likeliest_allowed(monkeypatch, max_answer, seed):
    draws = torch.Generator().manual_seed(seed)
    offered = torch.rand(3, 9, generator=draws) < 0.7  # with holes, which no answer may cross
    offered[:, 0] = True
    logits = torch.randn(2, 3, 9, generator=draws, dtype=torch.float64).masked_fill(~offered, float("-inf"))
    scores, head = SpanScores(*logits), extractor(max_answer)
    monkeypatch.setattr(head, "forward", lambda *_args: scores)
    spans = head.predict(some_tokens(), offered)
    assert spans.span.dtype == torch.int64
    for b in range(3):
        expected, score = best_span(scores.start[b], scores.end[b], offered[b].tolist(), max_answer)
        assert spans.span[b].tolist() == expected
        assert spans.score[b].item() == pytest.approx(score, abs=1e-9)


def test_equal_spans_go_to_the_earliest_and_shortest():
    head = extractor()
    torch.nn.init.zeros_(head.query.weight)
    torch.nn.init.zeros_(head.query.bias)
    late = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0]] * 3)
    assert head.predict(some_tokens(), late).span.tolist() == [[2, 2]] * 3


@pytest.mark.parametrize("make", [classifier, extractor])
def test_copies_compute_the_same(make):
    head, tokens = make(), some_tokens()
    other = make(seed=5)
    assert losses(other, tokens) != losses(head, tokens)
    other.load_state_dict(head.state_dict())
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), other):
        assert torch.equal(losses(twin, tokens), losses(head, tokens))
    assert losses(copy.deepcopy(head).double(), tokens).dtype == torch.float64


def test_a_head_leaves_its_model_as_it_was():
    model = wired(small())
    before = model(some_tokens())
    head = SpanExtractor(model)
    head(some_tokens(), CONTEXT)
    assert head.model is model
    assert torch.equal(model(some_tokens()), before)


def test_predictions_have_no_gradient():
    head = extractor()
    assert not head.predict(some_tokens(), CONTEXT).score.requires_grad
    assert not classifier().predict(some_tokens()).requires_grad


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_mode_is_the_models(mode):
    head = extractor(dropout=0.5)
    getattr(head, mode)()
    torch.manual_seed(0)
    scores = [head.predict(some_tokens(), CONTEXT).score for _ in range(2)]
    assert torch.equal(*scores) == (mode == "eval")


def test_repr_tells_the_sizes():
    assert "n_classes=3" in repr(classifier())
    assert "max_answer=3" in repr(extractor())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SequenceClassifier(small(), 0), ValueError, "n_classes must be an integer >= 1, got 0"),
        (lambda: SequenceClassifier(small(), 2.0), ValueError, "n_classes must be an integer >= 1, got 2.0"),
        (
            lambda: SequenceClassifier(torch.nn.Linear(2, 2), 2),
            TypeError,
            "model must be a BrainLikeSprout, got Linear",
        ),
        (lambda: SpanExtractor(small(), 0), ValueError, "max_answer must be an integer >= 1, got 0"),
        (lambda: SpanExtractor(None), TypeError, "model must be a BrainLikeSprout, got NoneType"),
    ],
)
def test_construction_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 3, 1]), ValueError, r"labels must be in 0..n_classes-1=2, got 0..3"),
        (torch.tensor([0, -1, 1]), ValueError, r"labels must be in 0..n_classes-1=2, got -1..1"),
        (torch.tensor([0, 1]), ValueError, r"labels must be \(3,\), got \(2,\)"),
        (torch.tensor([0.0, 1, 2]), TypeError, "labels must be an int64 tensor, got torch.float32"),
        ([0, 1, 2], TypeError, "labels must be an int64 tensor, got list"),
    ],
)
def test_labels_refused(labels, error, message):
    with pytest.raises(error, match=message):
        classifier().loss(some_tokens(), labels)


@pytest.mark.parametrize(
    ("context", "mask", "error", "message"),
    [
        (torch.ones(3, 9), None, TypeError, "context_mask must be a bool or integer tensor, got torch.float32"),
        ([1], None, TypeError, "context_mask must be a bool or integer tensor, got list"),
        (CONTEXT[:, :8], None, ValueError, r"context_mask must .* tokens \(3, 9\), got \(3, 8\)"),
        (CONTEXT & torch.tensor([[1], [0], [1]]).bool(), None, ValueError, "got none in sample 1"),
        (CONTEXT, ~CONTEXT, ValueError, "context_mask must offer at least one token .* none in sample 0"),
        (CONTEXT, torch.ones(3, 8).bool(), ValueError, r"attention_mask must have the shape of tokens \(3, 9\)"),
        (CONTEXT, torch.ones(3, 9), TypeError, "attention_mask must be a bool or integer tensor"),
    ],
)
def test_masks_refused(context, mask, error, message):
    for call in (extractor().forward, extractor().predict):
        with pytest.raises(error, match=message):
            call(some_tokens(), context, mask)


@pytest.mark.parametrize(
    ("spans", "error", "message"),
    [
        (SPANS.int(), TypeError, "spans must be an int64 tensor, got torch.int32"),
        (SPANS[:2], ValueError, r"spans must be \(3, 2\), got \(2, 2\)"),
        (torch.tensor([[1, 2], [3, 2], [4, 4]]), ValueError, r"first <= last .* got \(3, 2\) in sample 1"),
        (torch.tensor([[1, 2], [0, 3], [4, 5]]), ValueError, r"context_mask offers, got \(4, 5\) in sample 2"),
        (torch.tensor([[-1, 2], [0, 3], [4, 4]]), ValueError, r"got \(-1, 2\) in sample 0"),
        (torch.tensor([[1, 2], [0, 99], [4, 4]]), ValueError, r"got \(0, 99\) in sample 1"),
    ],
)
def test_spans_refused(spans, error, message):
    with pytest.raises(error, match=message):
        extractor().loss(some_tokens(), spans, CONTEXT)
