"""Analysis from the command line: ``python -m sprout.analyze --help``, installed as ``sprout-analyze``.

Writes pictures, their data and a page that explains them. What is wrong is said in one line, with exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import data
from .model import create_brain_like_sprout

# What an untrained model is shown with: small enough for seconds on one core.
UNTRAINED = dict(
    vocab_size=256,
    n_neurons=1024,
    d_state=64,
    initial_sparsity=32,
    final_sparsity=64,
    n_heads=4,
    recruits_per_step=8,
    max_seq_len=64,
)


class UsageError(Exception):
    """A flag cannot be followed; the message names it and the remedy."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = _Parser(prog="sprout-analyze", description="Pictures and figures of a SPROUT, and a page that explains them.")
    p.add_argument("--checkpoint", metavar="RUN", help="run folder, or a model's (default: a small untrained model)")
    p.add_argument(
        "--out", metavar="DIR", help="new or empty folder (default: RUN/analysis or runs/analysis-untrained)"
    )
    p.add_argument("--text", metavar="FILE", help="UTF-8 text to read (default: the last tenth of the embedded corpus)")
    p.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    p.add_argument("--max_tokens", type=int, default=8192, help="tokens of the text to read (default: 8192)")
    p.add_argument("--seed", type=int, default=0, help="of the control and of untrained weights (default: 0)")
    p.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; prints the path of the page. Returns: the exit code, 2 for a flag that is wrong."""
    try:
        arguments = parser().parse_args(argv)
        print(run(arguments))
    except UsageError as error:
        print(f"sprout-analyze: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> Path:
    """Checks everything before it computes anything. Returns: the page. Raises: UsageError."""
    out = _out(arguments)
    if arguments.max_tokens < 2:
        raise UsageError(f"--max_tokens must be at least 2, got {arguments.max_tokens}")
    if not 0 <= arguments.seed < 2**32:
        raise UsageError(f"--seed must be in 0..2**32-1, got {arguments.seed}")
    text, device = _text(arguments.text), _device(arguments.device)
    try:
        from .analysis.report import ReportSettings, write_report
    except ImportError as error:
        raise UsageError(str(error)) from None
    model, tokenizer = _model(arguments)
    trained = arguments.checkpoint is not None
    title = f"SPROUT analysis: {Path(arguments.checkpoint).name}" if trained else None
    settings = ReportSettings(title=title, trained=trained, max_tokens=arguments.max_tokens, seed=arguments.seed)
    try:
        return write_report(model.to(device), tokenizer, text, out, settings)
    except ValueError as error:
        raise UsageError(f"--text {arguments.text or '(default)'} does not suit the model: {error}") from None
    except TypeError as error:
        raise UsageError(f"--checkpoint {arguments.checkpoint}: {error}") from None
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror or error}") from None


def _out(arguments: argparse.Namespace) -> Path:
    default = Path(arguments.checkpoint) / "analysis" if arguments.checkpoint else Path("runs/analysis-untrained")
    out = Path(arguments.out) if arguments.out else default
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not arguments.force:
        raise UsageError(f"--out {out} is not empty; name another folder, or replace its files with --force")
    return out


def _text(path: str | None) -> str:
    from .text import TextError, read_text, split

    if path is None:
        return split(data.corpus())[1]
    try:
        return read_text(path)
    except TextError as error:
        raise UsageError(f"--text {str(error).replace('--data', '--text')}") from None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used: {reason}; --device cpu always can") from None
    return device


def _model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of --checkpoint, or an untrained model of bytes."""
    if arguments.checkpoint is None:
        from .text import Bytes

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(arguments.seed)
            return create_brain_like_sprout(**UNTRAINED), Bytes()
    try:
        from .hub import load

        return load(arguments.checkpoint)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        line = " ".join(str(error).split())
        raise UsageError(f"--checkpoint {arguments.checkpoint} cannot be loaded: {line}") from None


if __name__ == "__main__":
    sys.exit(main())
