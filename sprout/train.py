"""Training from the command line: ``python -m sprout.train --help``, installed as ``sprout-train``.

Everything (options, text, sizes, folder, device) is checked before anything is made; what is wrong is said in one line,
with exit code 2. A run that fails later ends with exit code 1, one that is interrupted with 130 or 143.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import data
from .config import SproutConfig
from .disk import DiskError, LockError
from .pretrained import TOKENIZER, read_file
from .runs import CheckpointError, RunError, check_new, read_config
from .text import TextError, Tokenizer, load_tokenizer, make_tokenizer, read_dataset, read_text, split
from .train_config import (
    DEBUG_CHARACTERS,
    MODEL_DEFAULTS,
    OptionError,
    TrainConfig,
    check_scaled,
    check_sharded,
    continue_with,
    merge,
    model_names,
    parts,
    read_options,
    windows_per_step,
)

log = logging.getLogger("sprout.train")
OF_CONTROLS = ("d_state", "n_heads", "n_encoder_layers", "conv_width", "dropout")  # sizes of a gpt and an encoder
LIBRARIES = ("accelerate", "safetensors", "psutil", "tqdm")
NOT_OF_A_RUN = ("out", "resume", "force", "config")


class _Parser(argparse.ArgumentParser):
    """One whose errors are exceptions, to be told in one line."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    """The command line: the options of TrainConfig and SproutConfig, by name, and those that are not part of a run."""
    text = "Train SPROUT, or a model to compare it with, on text."
    p = _Parser(prog="sprout-train", description=text, allow_abbrev=False)
    p.add_argument("--out", help="new run folder (default: runs/MODEL-DATE-TIME)")
    p.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    p.add_argument("--force", action="store_true", help="take over a run folder locked by another host")
    p.add_argument("--config", metavar="FILE", help="JSON file of options; those given here win")
    training, model = p.add_argument_group("training"), p.add_argument_group("model (see SproutConfig)")
    for item in fields(TrainConfig):
        _add(training, item.name, str(item.type), item.default, item.metadata["help"])
    sizes = {item.name: item for item in fields(SproutConfig)}
    for name in model_names():
        _add(model, name, str(sizes[name].type), MODEL_DEFAULTS.get(name, sizes[name].default), "")
    return p


def _add(group: Any, name: str, kind: str, default: Any, text: str) -> None:
    """One option, absent from the result unless it is given."""
    shown = text if default is None else f"{text} (default: {default})"
    if kind == "bool":
        action = argparse.BooleanOptionalAction if default else "store_true"
        group.add_argument(f"--{name}", action=action, default=argparse.SUPPRESS, help=shown)
        return
    convert = {"int": int, "float": float}.get(kind.removesuffix(" | None"), str)
    label = {int: "INT", float: "NUMBER", str: "TEXT"}[convert]
    group.add_argument(f"--{name}", type=convert, default=argparse.SUPPRESS, help=shown, metavar=label)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(what is not part of a run, the options that were given). Raises: OptionError; SystemExit after --help."""
    p = parser()
    arguments, unknown = p.parse_known_args(argv)
    for name in unknown:
        known = [flag for action in p._actions for flag in action.option_strings]
        near = get_close_matches(name.partition("=")[0], known, n=1)
        raise OptionError(f"unknown argument {name}; {f'did you mean {near[0]}?' if near else 'see --help'}")
    given = vars(arguments).copy()
    return argparse.Namespace(**{name: given.pop(name) for name in NOT_OF_A_RUN}), given


def read_source(options: dict[str, Any]) -> str:
    """The text that the options name. Raises: TextError, ImportError."""
    if options["data"] is not None:
        text = read_text(options["data"])
    elif options["dataset"] is not None:
        text = read_dataset(options["dataset"])
    else:
        text = data.corpus()
    return text[:DEBUG_CHARACTERS] if options["debug_mode"] else text


def describe(source: str) -> dict[str, Any]:
    """What tells one text from another: its length in characters and SHA-256."""
    return {"characters": len(source), "sha256": hashlib.sha256(source.encode()).hexdigest()}


def check_length(train: torch.Tensor, validation: torch.Tensor, window: int) -> None:
    """Raises TextError unless a window and its target fit into train (L,), and validation has two tokens."""
    if len(train) <= window or len(validation) < 2:
        raise TextError(
            f"the text is too short: {len(train)} tokens to train on (--window {window} needs {window + 1}) and "
            f"{len(validation)} to validate on (2 are needed); use a longer text or a smaller --window"
        )


def check_device(config: TrainConfig) -> None:
    """Raises OptionError for a device that is not there, or a precision that it does not have."""
    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise OptionError("--device cuda: torch finds no CUDA device; use --device cpu")
    if config.mixed_precision == "fp16" and (config.device == "cpu" or not gpu):
        raise OptionError("--mixed_precision fp16 needs a GPU; use bf16 or no")


def plan_run(options: dict[str, Any], tokenizer: Tokenizer | None, source: str) -> Any:
    """A trainer.Plan of complete options, a tokenizer (None: make one) and a text. Raises: ValueError, ImportError."""
    tokenizer = tokenizer or make_tokenizer(options["tokenizer"], source)
    config, sizes = parts(options, tokenizer.vocab_size)
    train_text, validation_text = split(source)
    train, validation = tokenizer.encode(train_text), tokenizer.encode(validation_text)
    check_length(train, validation, config.window)
    from .trainer import Plan  # accelerate with it

    return Plan(config, sizes, tokenizer, train, validation, validation_text)


def check_libraries(config: TrainConfig) -> None:
    """Raises ImportError, with the command that installs it, for an absent library that the run will need."""
    for name in (*LIBRARIES, *(["matplotlib"] if config.analyze_activation else [])):
        if find_spec(name) is None:
            raise ImportError(f'training needs {name}: pip install "bio-kernels[train]"')


def check_options(options: dict[str, Any], given: dict[str, Any]) -> None:
    """What can be checked before a text is read. Raises: OptionError, ImportError. Warns of what has no effect."""
    config, sizes = parts(options, vocab_size=1)
    check_libraries(config)
    check_device(config)
    groups = options["model"] == "sprout" and sizes.active_groups > 0
    check_scaled(config, groups)
    if groups and processes() > 1:
        check_sharded(config)
    if options["model"] != "sprout":
        for name in sorted(set(given) & set(model_names()) - set(OF_CONTROLS)):
            log.warning("--%s has no effect on --model %s", name, options["model"])


def processes() -> int:
    """How many processes the launcher started; torchrun and accelerate launch say it in WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def new_run(given: dict[str, Any], arguments: argparse.Namespace) -> tuple[Any, dict[str, Any], Path]:
    """(plan, what config.json keeps, folder) of a run from its options. Raises: as ``plan_run``; RunError."""
    options = merge(given, read_options(arguments.config) if arguments.config else {})
    check_options(options, given)
    out = Path(arguments.out or f"runs/{options['model']}-{time.strftime('%Y%m%d-%H%M%S')}")
    check_new(out)
    source = read_source(options)
    plan = plan_run(options, None, source)
    if options["data"] is not None:  # so that the run can be resumed from another folder
        options["data"] = str(Path(options["data"]).resolve())
    return plan, {"options": options, "text": describe(source), "processes": processes()}, out


def old_run(given: dict[str, Any], arguments: argparse.Namespace) -> tuple[Any, dict[str, Any], Path]:
    """The same of a run to continue. Raises: as ``new_run``; OptionError for an option that cannot change."""
    out = Path(arguments.resume)
    for name in ("out", "config"):
        if getattr(arguments, name):
            raise OptionError(f"--{name} cannot be given with --resume: the run has its own; leave it out")
    request = read_config(out)
    try:
        stored, text = request["options"], request["text"]
    except KeyError as error:
        raise RunError(f"{out / 'config.json'} lacks {error}: it is not a run of sprout-train") from None
    before, now = request.get("processes", processes()), processes()
    stored = {**merge({}, {}), **stored}
    options = continue_with(given, stored, before, now)
    had, has = windows_per_step(stored, before), windows_per_step(options, now)
    if had != has and os.environ.get("RANK", "0") == "0":
        told = (
            "a step takes %d windows instead of %d, at the same lr: the run had %d processes, now %d; give --batch_size"
        )
        log.warning(f"{told} or --grad_accumulation with --resume to keep it", has, had, before, now)
    check_options(options, given)
    source = read_source(options)
    if describe(source) != text:
        raise TextError(f"the text of {out} has changed since: it was {text}, now it is {describe(source)}")
    tokenizer = load_tokenizer(read_file(out, TOKENIZER).decode(), str(out / TOKENIZER))
    return plan_run(options, tokenizer, source), {**request, "options": options, "processes": now}, out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns: the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        arguments, given = parse(argv)
        plan, request, out = (old_run if arguments.resume else new_run)(given, arguments)
        from .train_loop import fit  # after it is known that its libraries are there
    except (ValueError, ImportError, RunError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return 130
    if plan.config.threads is not None:
        torch.set_num_threads(plan.config.threads)
    try:
        return fit(plan, request, out, resume=bool(arguments.resume), force=arguments.force)
    except LockError as error:
        return _fail(error, 2)
    except (RunError, CheckpointError, DiskError) as error:
        return _fail(error, 1)


def _fail(error: Exception, code: int) -> int:
    print(f"sprout-train: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
