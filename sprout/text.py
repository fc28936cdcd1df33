"""Text for training: read from files or a dataset, split, and turned into tokens.

A tokenizer is any object with the members of ``Tokenizer``; three are here: bytes, characters, byte-pair encoding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from . import data

SUFFIXES = (".txt", ".md", ".py")
TRAIN_SHARE = 0.9
BPE_SIZE = 2048


class TextError(ValueError):
    """A text cannot be used; the message names the file and the remedy."""


class Tokenizer(Protocol):
    """text <-> tokens. vocab_size: every token is below it. to_json: what ``from_json`` makes an equal one of."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> Tensor: ...

    def decode(self, tokens: Tensor) -> str: ...

    def to_json(self) -> str: ...


class Bytes:
    """UTF-8 bytes; vocab_size 256. Nothing to learn, and no text that it cannot encode."""

    vocab_size = 256

    def encode(self, text: str) -> Tensor:
        """(L,) int64 in 0..255."""
        return data.encode(text)

    def decode(self, tokens: Tensor) -> str:
        """The text; half a character shows as U+FFFD. Raises: ValueError for a value that is not a byte."""
        return data.decode(tokens)

    def to_json(self) -> str:
        """Nothing but its kind."""
        return json.dumps({"kind": "bytes"})


class Chars:
    """One token for each character, in the order of the code points. Args: characters, each once."""

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self._number = {character: i for i, character in enumerate(self.characters)}
        if not self.characters:
            raise TextError("chars needs a text to take its characters from, got an empty one")

    @property
    def vocab_size(self) -> int:
        """Number of different characters."""
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """(L,) int64. Raises: TextError for a character that was not in the training text, with its position."""
        try:
            return torch.tensor([self._number[character] for character in text], dtype=torch.int64)
        except KeyError as error:
            character = error.args[0]
            raise TextError(
                f"character {character!r} (U+{ord(character):04X}) at position {text.index(character)} was not in the "
                f"training text; train with --tokenizer bytes to encode any text"
            ) from None

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens (L,). Raises: IndexError for a token >= vocab_size."""
        return "".join(self.characters[token] for token in tokens.tolist())

    def to_json(self) -> str:
        """Its kind and characters."""
        return json.dumps({"kind": "chars", "characters": self.characters})


class BytePairs:
    """Byte-pair encoding over bytes, by the library `tokenizers`; encodes any text. Source: Sennrich et al. 2016.

    Args: model, a ``tokenizers.Tokenizer``; see ``train`` for a new one.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    def train(cls, text: str, size: int = BPE_SIZE) -> BytePairs:
        """Learns size tokens (the 256 bytes among them) or, of a short text, fewer. Raises: ImportError, ValueError."""
        if size < 256:
            raise ValueError(f"--tokenizer bpe:SIZE needs SIZE >= 256, the number of bytes, got {size}")
        library = _tokenizers()
        model = library.Tokenizer(library.models.BPE())
        model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        model.train_from_iterator([text], trainer)
        return cls(model)

    @property
    def vocab_size(self) -> int:
        """Number of tokens learnt."""
        return self.model.get_vocab_size()

    def encode(self, text: str) -> Tensor:
        """(L,) int64."""
        return torch.tensor(self.model.encode(text).ids, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens (L,)."""
        return self.model.decode(tokens.tolist(), skip_special_tokens=False)

    def to_json(self) -> str:
        """Its kind and the library's own JSON."""
        return json.dumps({"kind": "bpe", "model": self.model.to_str()})


def _tokenizers() -> Any:
    try:
        return import_module("tokenizers")  # an extra: a type checker must not need it either
    except ImportError as error:
        raise ImportError('--tokenizer bpe needs tokenizers: pip install "bio-kernels[data]"') from error


def make_tokenizer(name: str, text: str) -> Tokenizer:
    """A tokenizer for a text. Args: name, "bytes", "chars", "bpe" or "bpe:SIZE"; text, all of the run's.

    "chars" takes the characters of the whole text, "bpe" learns from the training part alone.
    Raises: ValueError for another name; ImportError if "bpe" lacks its library.
    """
    kind, _, size = name.partition(":")
    if kind == "bpe" and (size.isdecimal() or name == "bpe"):
        return BytePairs.train(split(text)[0], int(size or BPE_SIZE))
    if name == "bytes":
        return Bytes()
    if name == "chars":
        return Chars(text)
    raise ValueError(f"--tokenizer must be bytes, chars, bpe or bpe:SIZE, got {name!r}")


def load_tokenizer(text: str, source: str = "tokenizer.json") -> Tokenizer:
    """The tokenizer that ``to_json`` described. Raises: TextError that names source; ImportError as make_tokenizer."""
    try:
        described = json.loads(text)
        kind = described["kind"]
        if kind == "bytes":
            return Bytes()
        if kind == "chars":
            return Chars(described["characters"])
        if kind == "bpe":
            return BytePairs(_tokenizers().Tokenizer.from_str(described["model"]))
    except (ValueError, KeyError, TypeError) as error:
        raise TextError(f"{source} does not describe a tokenizer: {error!r}") from None
    raise TextError(f"{source} describes a tokenizer of kind {kind!r}; known: bytes, chars, bpe")


def split(text: str) -> tuple[str, str]:
    """(the first 90 %, the last 10 %) of the characters: to train on, to validate on."""
    cut = int(len(text) * TRAIN_SHARE)
    return text[:cut], text[cut:]


def read_text(path: str | Path) -> str:
    """A file, or all *.txt, *.md and *.py of a folder and its subfolders, by name, with a line break between them.

    Empty files of a folder and those in hidden folders are left out.
    Raises: TextError if path is missing, empty, binary or not UTF-8, with the file, the offset and the remedy.
    """
    path = Path(path)
    if not path.exists():
        raise TextError(f"{path} does not exist; --data takes a text file or a folder of {', '.join(SUFFIXES)}")
    if path.is_file():
        text = _decode(path)
        if not text.strip():
            raise TextError(f"{path} is empty; --data needs text to learn from")
        return text
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file() and not _hidden(p, path))
    text = "\n".join(filter(str.strip, map(_decode, files)))
    if not text:
        raise TextError(f"{path} holds no text: {len(files)} files of {', '.join(SUFFIXES)}, none with content")
    return text


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}") from None
    nul = raw.find(b"\0")
    if nul >= 0:
        raise TextError(f"{path} is binary (a NUL byte at offset {nul}); --data takes UTF-8 text")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise TextError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}, line {line}; "
            f"convert it, for example: iconv -f latin1 -t utf-8 {path.name}"
        ) from None


def read_dataset(name: str) -> str:
    """The training split of a dataset of the hub, its rows with an empty line between them.

    Args: name, "NAME" or "NAME:CONFIG"; of its columns "text", or else the first that holds text.
    Raises: ImportError if the library `datasets` is missing; TextError if it cannot be loaded or has no text.
    """
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError('--dataset needs datasets: pip install "bio-kernels[data]"') from error
    repository, _, config = name.partition(":")
    try:
        rows = load_dataset(repository, config or None, split="train")
    except Exception as error:  # whatever the hub, the network or the dataset's own files raise
        raise TextError(f"--dataset {name} cannot be loaded: {error}") from error
    columns = [
        key for key, feature in rows.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if not columns:
        raise TextError(f"--dataset {name} has no column of text, only {', '.join(rows.features)}")
    return _join(rows["text" if "text" in columns else columns[0]], name)


def _join(rows: Iterable[str | None], name: str) -> str:
    text = "\n\n".join(row for row in rows if row and row.strip())
    if not text:
        raise TextError(f"--dataset {name} holds no text")
    return text
