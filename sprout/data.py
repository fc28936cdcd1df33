"""Text to learn from: the Python language reference that every CPython carries, as bytes.

Real English, about half a million characters, and nothing to download. Its wording follows the Python version; with one
version it is the same text on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor


@cache
def corpus() -> str:
    """The language reference as one text, its topics in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"


def encode(text: str) -> Tensor:
    """The UTF-8 bytes of the text: (L,) int64 in 0..255. Raises: TypeError if text is not a str."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).long() if text else torch.empty(0).long()


def decode(tokens: Tensor) -> str:
    """The text of UTF-8 bytes (L,) integer in 0..255; what is not UTF-8, such as half a character, shows as U+FFFD.

    Raises: ValueError if tokens is not 1-D, or holds a value that is not a byte.
    """
    if tokens.dim() != 1:
        raise ValueError(f"tokens must be (L,), got {tuple(tokens.shape)}")
    try:
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")
    except (ValueError, TypeError):
        raise ValueError(f"tokens must be integers in 0..255, got {tokens.dtype} {tokens.tolist()[:8]}...") from None


def batches(tokens: Tensor, *, batch_size: int, window: int, seed: int | None = 0) -> Iterator[Tensor]:
    """One epoch of windows, (batch_size, window) int64 each: no token twice, the last incomplete batch left out.

    Args:
        tokens: (L,) int64, for example encode(corpus()).
        batch_size: windows in a batch, >= 1.
        window: length in tokens, 1 <= window <= L; to predict the next token take one more than the model reads.
        seed: where the first window starts (before window) and the order of the windows; the same seed gives the same
            epoch. None: from the beginning, in the order of the text.
    Raises: ValueError, at the call, if there are not enough tokens for one batch or a size is below 1.
    """
    if tokens.dim() != 1:
        raise ValueError(f"tokens must be (L,), got {tuple(tokens.shape)}")
    for name, value in (("batch_size", batch_size), ("window", window)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    spare = len(tokens) - window * batch_size
    if spare < 0:
        raise ValueError(f"tokens must hold at least batch_size * window = {batch_size * window}, got {len(tokens)}")
    # The start is limited so that at least one batch is left.
    start = 0 if generator is None else int(torch.randint(min(window, spare + 1), (), generator=generator))
    windows = tokens[start:].unfold(0, window, window)
    order = torch.arange(len(windows)) if generator is None else torch.randperm(len(windows), generator=generator)
    return (windows[chosen] for chosen in order.split(batch_size) if len(chosen) == batch_size)
