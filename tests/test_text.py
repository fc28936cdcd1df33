"""Text to learn from: files with faults, datasets, tokenizers."""

import sys
import types

import pytest
import torch

from sprout import data, text
from sprout.text import TextError

SAMPLES = ["", "plain", "naïve 日本語 🧠\n\ttab\r\n", "a  b   c"]


def test_a_file_and_a_folder(tmp_path):
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_bytes("\ufefffirst é".encode())
    (tmp_path / "c").mkdir()
    (tmp_path / "c/d.py").write_text("third")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\0\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/x.txt").write_text("hidden")
    assert text.read_text(tmp_path) == "first é\nsecond\nthird"
    assert text.read_text(tmp_path / "a.txt") == "first é"
    assert text.read_text(str(tmp_path / "picture.png").replace("picture.png", "b.md")) == "second"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "x.txt does not exist; --data takes a text file or a folder"),
        (b"", "x.txt is empty; --data needs text"),
        (b" \n\t", "x.txt is empty"),
        (b"abc\0def", r"x.txt is binary \(a NUL byte at offset 3\)"),
        ("é\n".encode("utf-16"), "x.txt is binary"),
        (b"one\ntwo\nthr\xe9e\n", r"x.txt is not UTF-8: byte 0xe9 at offset 11, line 3; convert it, .*iconv .* x.txt"),
    ],
)
def test_faulty_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(TextError, match=message):
        text.read_text(tmp_path / "x.txt")


def test_faulty_folders(tmp_path):
    with pytest.raises(TextError, match=r"holds no text: 0 files of .txt, .md, .py"):
        text.read_text(tmp_path)
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.py").write_bytes(b"\xff")
    with pytest.raises(TextError, match=r"b.py is not UTF-8: byte 0xff at offset 0, line 1"):
        text.read_text(tmp_path)


def test_the_split_is_by_characters():
    train, validation = text.split("é" * 95 + "x" * 10)
    assert (len(train), len(validation)) == (94, 11)
    assert train + validation == "é" * 95 + "x" * 10


def tokenizer(kind):
    if kind.startswith("bpe"):
        pytest.importorskip("tokenizers")
    return text.make_tokenizer(kind, "".join(SAMPLES) + data.corpus()[:5000])


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe", "bpe:300"])
def test_tokenizers_round_trip_and_come_back_from_json(kind):
    made = tokenizer(kind)
    again = text.load_tokenizer(made.to_json())
    assert type(again) is type(made)
    assert again.vocab_size == made.vocab_size
    for sample in SAMPLES:
        tokens = made.encode(sample)
        assert tokens.dtype == torch.int64
        assert tokens.dim() == 1
        assert made.decode(tokens) == sample
        assert torch.equal(again.encode(sample), tokens)
        if sample:
            assert 0 <= int(tokens.min()) <= int(tokens.max()) < made.vocab_size


def test_sizes_of_vocabularies():
    assert text.make_tokenizer("bytes", "x").vocab_size == 256
    assert text.make_tokenizer("chars", "abca").vocab_size == 3
    assert text.Chars("cab").encode("abc").tolist() == [0, 1, 2]
    assert tokenizer("bpe:300").vocab_size == 300
    sample = data.corpus()[:2000]
    assert len(tokenizer("bpe:400").encode(sample)) < 0.7 * len(sample)


def test_byte_pairs_learn_from_the_training_part_alone():
    pytest.importorskip("tokenizers")
    source = data.corpus()[:9000] + "qxqxqxqx " * 111
    merged = text.make_tokenizer("bpe:400", source)
    assert torch.equal(text.BytePairs.train(text.split(source)[0], 400).encode("qxqx"), merged.encode("qxqx"))
    assert len(merged.encode("qxqx")) == 4


def test_unknown_characters_are_named():
    with pytest.raises(TextError, match=r"character 'é' \(U\+00E9\) at position 2 was not in the training text"):
        text.make_tokenizer("chars", "abc").encode("abé")
    with pytest.raises(IndexError):
        text.make_tokenizer("chars", "abc").decode(torch.tensor([7]))


@pytest.mark.parametrize("name", ["byte", "bpe:", "bpe:x", "bpe:-3", "", "BYTES"])
def test_unknown_tokenizers(name):
    with pytest.raises(ValueError, match=f"--tokenizer must be bytes, chars, bpe or bpe:SIZE, got {name!r}"):
        text.make_tokenizer(name, "text")


def test_bpe_needs_room_for_the_bytes():
    with pytest.raises(ValueError, match="needs SIZE >= 256, the number of bytes, got 99"):
        text.make_tokenizer("bpe:99", "text")


def test_bpe_without_its_library_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "bio-kernels\[data\]"'):
        text.make_tokenizer("bpe", "text")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tok.json does not describe a tokenizer"),
        ("[]", "tok.json does not describe a tokenizer"),
        ('{"kind": "chars"}', "tok.json does not describe a tokenizer: KeyError"),
        ('{"kind": "words"}', "tok.json describes a tokenizer of kind 'words'; known: bytes, chars, bpe"),
    ],
)
def test_faulty_descriptions_of_tokenizers(content, message):
    with pytest.raises(TextError, match=message):
        text.load_tokenizer(content, "tok.json")


def test_datasets_need_their_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'--dataset needs datasets: pip install "bio-kernels\[data\]"'):
        text.read_dataset("owner/name")


def hub_with(monkeypatch, columns):
    """A library `datasets` that has one dataset with these columns; what it was asked for."""
    asked = []

    class Rows(dict):
        @property
        def features(self):
            return {name: types.SimpleNamespace(dtype=kind) for name, (kind, _) in columns.items()}

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "absent":
            raise FileNotFoundError("no such dataset")
        return Rows({name: values for name, (_, values) in columns.items()})

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_dataset_is_its_rows_of_text(monkeypatch):
    asked = hub_with(monkeypatch, {"title": ("string", ["t"]), "text": ("string", ["one", "", None, "two"])})
    assert text.read_dataset("owner/name:big") == "one\n\ntwo"
    assert text.read_dataset("name")
    assert asked == [("owner/name", "big", "train"), ("name", None, "train")]
    with pytest.raises(TextError, match="--dataset absent cannot be loaded: no such dataset"):
        text.read_dataset("absent")


def test_datasets_without_text(monkeypatch):
    hub_with(monkeypatch, {"label": ("int64", [1])})
    with pytest.raises(TextError, match="--dataset name has no column of text, only label"):
        text.read_dataset("name")
    hub_with(monkeypatch, {"story": ("large_string", ["", " "])})
    with pytest.raises(TextError, match="--dataset name holds no text"):
        text.read_dataset("name")
