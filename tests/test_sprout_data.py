"""The embedded corpus, bytes, and the windows a model learns from."""

import pytest
import torch

from sprout import data


def test_the_corpus_is_real_text_and_always_the_same():
    text = data.corpus()
    assert 200_000 < len(text) < 2_000_000
    assert "The for statement" in " ".join(text.replace('"', "").split())
    data.corpus.cache_clear()
    assert data.corpus() == text


@pytest.mark.parametrize("text", ["", "plain", "na\u00efve \u2013 \u65e5\u672c\u8a9e \U0001f9e0\n", "\0\x7f"])
def test_bytes_round_trip(text):
    tokens = data.encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == list(text.encode())
    assert data.decode(tokens) == text


def test_a_character_cut_in_half_is_shown():
    assert data.decode(data.encode("a\u00e9")[:-1]) == "a\ufffd"


def test_text_errors():
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        data.encode(b"x")
    with pytest.raises(ValueError, match=r"tokens must be \(L,\), got \(1, 2\)"):
        data.decode(torch.zeros(1, 2).long())
    for bad in ([256], [-1], [1.5]):
        with pytest.raises(ValueError, match=r"tokens must be integers in 0..255, got torch"):
            data.decode(torch.tensor(bad))


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
@pytest.mark.parametrize(("length", "batch_size", "window"), [(100, 4, 7), (28, 4, 7), (29, 4, 7), (5, 5, 1)])
def test_an_epoch_shows_no_token_twice(length, batch_size, window, seed):
    epoch = list(data.batches(torch.arange(length), batch_size=batch_size, window=window, seed=seed))
    assert epoch
    assert all(batch.shape == (batch_size, window) and batch.dtype == torch.int64 for batch in epoch)
    seen = torch.cat(epoch)
    assert (seen.diff(dim=1) == 1).all()
    assert seen.unique().numel() == seen.numel()
    if seed is None:
        assert torch.equal(seen.flatten(), torch.arange(seen.numel()))


def test_the_seed_decides_the_epoch():
    epoch = lambda seed: torch.stack(list(data.batches(torch.arange(999), batch_size=4, window=7, seed=seed)))  # noqa: E731
    assert torch.equal(epoch(3), epoch(3))
    assert not torch.equal(epoch(3)[:30], epoch(4)[:30])
    starts = {int(epoch(seed).min()) for seed in range(20)}
    assert starts <= set(range(2 * 7))
    assert len(starts) > 3


@pytest.mark.parametrize(
    ("tokens", "changes", "message"),
    [
        (torch.arange(20), dict(batch_size=0), "batch_size must be an integer >= 1, got 0"),
        (torch.arange(20), dict(window=2.0), "window must be an integer >= 1, got 2.0"),
        (torch.arange(27), dict(), r"tokens must hold at least batch_size \* window = 28, got 27"),
        (torch.zeros(4, 7), dict(), r"tokens must be \(L,\), got \(4, 7\)"),
    ],
)
def test_batches_refuse_at_the_call(tokens, changes, message):
    with pytest.raises(ValueError, match=message):
        data.batches(tokens, **{**dict(batch_size=4, window=7), **changes})
