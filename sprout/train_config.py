"""What a training run is asked for: its options, their checks, and where each value comes from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from math import ceil, isfinite
from pathlib import Path
from typing import Any

from .config import SproutConfig

MODELS = ("sprout", "gpt", "encoder")
SET_BY_TRAINING = ("vocab_size", "max_seq_len", "causal")  # by the tokenizer, by window, always true
# In prefix mode a batch is batch_size * window patterns: a wide pool of large states is for a GPU.
MODEL_DEFAULTS = {"d_state": 128, "n_heads": 4, "initial_sparsity": 32, "final_sparsity": 64, "recruits_per_step": 8}
# Behind a deep encoder the pool has nothing left to do (docs/language-model.md): here it reads embedded tokens.
MODEL_DEFAULTS |= {"n_encoder_layers": 0, "conv_width": 4}
GPT_DEFAULTS = {"n_encoder_layers": 4}
DEBUG = {
    "max_steps": 20,
    "batch_size": 4,
    "window": 32,
    "warmup_steps": 5,
    "eval_every": 10,
    "log_every": 5,
    "n_neurons": 256,
    "d_state": 32,
    "initial_sparsity": 16,
    "final_sparsity": 32,
    "recruits_per_step": 4,
}
DEBUG_CHARACTERS = 20_000
# A resumed run with another value of any other option would not be the run that was interrupted.
FREE_ON_RESUME = (
    "num_epochs",
    "max_steps",
    "eval_every",
    "eval_batches",
    "save_every",
    "log_every",
    "tensorboard",
    "analyze_activation",
    "data",  # its content is compared
)
PER_PROCESS = ("batch_size", "grad_accumulation")


class OptionError(ValueError):
    """An option is unknown or out of range; the message names it, what was got and what is allowed."""


def option(default: Any, text: str) -> Any:
    """A field of TrainConfig with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run besides the model's sizes. Raises: OptionError for a value out of range."""

    model: str = option(
        "sprout", "sprout, gpt (a plain Transformer, for comparison) or encoder (SPROUT without its pool)"
    )
    data: str | None = option(None, "text file, or folder of .txt, .md and .py (default: the embedded corpus)")
    dataset: str | None = option(None, "NAME or NAME:CONFIG of the datasets hub")
    tokenizer: str = option("bytes", "bytes, chars, bpe or bpe:SIZE")
    num_epochs: int = option(1, "passes over the training text, in tokens drawn")
    max_steps: int | None = option(None, "optimizer steps, instead of num_epochs")
    batch_size: int = option(32, "windows per step and process")
    window: int = option(64, "tokens that the model reads at once")
    grad_accumulation: int = option(1, "batches per step")
    optimizer: str = option("adamw", "adamw, or muon for the hidden matrices and adamw for the rest")
    lr: float = option(1e-3, "highest learning rate of adamw")
    muon_lr: float = option(0.02, "highest learning rate of muon")
    warmup_steps: int = option(100, "steps of linear warm-up; then a cosine to a tenth of lr")
    weight_decay: float = option(0.1, "of matrices; vectors have none")
    beta2: float = option(0.99, "adamw's second decay rate")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no limit")
    balance: float = option(0.01, "weight of the load-balancing term")
    settling: float = option(0.1, "weight of the settling term")
    plasticity: str | None = option(None, "RATE or RATE,oja: the Hebbian rule after each step")
    rewire_every: int = option(0, "steps between rewirings of a block-sparse pool, a block in each block row; 0: none")
    freeze_strength: bool = option(False, "hold the connection strengths at zero")
    mixed_precision: str = option("no", "no, bf16 or fp16 (fp16 on a GPU only)")
    device: str = option("auto", "auto, cpu or cuda")
    threads: int | None = option(None, "CPU threads (default: torch's)")
    seed: int = option(0, "of the weights, the windows and dropout")
    eval_every: int = option(250, "steps between evaluations")
    eval_batches: int = option(20, "batches of a periodic evaluation; the last evaluation takes the whole text")
    save_every: int | None = option(None, "steps between checkpoints (default: eval_every)")
    log_every: int = option(10, "steps between lines of metrics")
    tensorboard: bool = option(True, "write TensorBoard files into the run folder")
    analyze_activation: bool = option(False, "at the end write plots and a report into RUN/analysis")
    debug_mode: bool = option(False, "a small pool, a short text and few steps: under a minute")

    def __post_init__(self) -> None:
        for name in (
            "num_epochs",
            "batch_size",
            "window",
            "grad_accumulation",
            "eval_every",
            "eval_batches",
            "log_every",
        ):
            self._check(name, "an integer >= 1", lambda x: type(x) is int and x >= 1)
        for name in ("max_steps", "save_every", "threads"):
            self._check(name, "an integer >= 1", lambda x: x is None or (type(x) is int and x >= 1))
        for name in ("warmup_steps", "rewire_every"):
            self._check(name, "an integer >= 0", lambda x: type(x) is int and x >= 0)
        self._check("seed", "an integer in 0..2**32-1", lambda x: type(x) is int and 0 <= x < 2**32)
        for name in ("lr", "muon_lr"):
            self._check(name, "a finite number > 0", lambda x: _is_number(x) and x > 0)
        for name in ("weight_decay", "grad_clip", "balance", "settling"):
            self._check(name, "a finite number >= 0", lambda x: _is_number(x) and x >= 0)
        self._check("beta2", "a number in 0..1, without 1", lambda x: _is_number(x) and 0 <= x < 1)
        for name in ("freeze_strength", "tensorboard", "analyze_activation", "debug_mode"):
            self._check(name, "true or false", lambda x: type(x) is bool)
        for name, allowed in (
            ("model", MODELS),
            ("optimizer", ("adamw", "muon")),
            ("mixed_precision", ("no", "bf16", "fp16")),
            ("device", ("auto", "cpu", "cuda")),
        ):
            self._check(name, f"one of {', '.join(allowed)}", lambda x, allowed=allowed: x in allowed)
        for name in ("data", "dataset", "tokenizer", "plasticity"):
            self._check(name, "text", lambda x: x is None or type(x) is str)
        self._check_together()

    def _check(self, name: str, allowed: str, holds: Any) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise OptionError(f"--{name} must be {allowed}, got {value!r}")

    def _check_together(self) -> None:
        if self.data is not None and self.dataset is not None:
            raise OptionError("--data and --dataset both name a text; leave one of them out")
        if self.hebb is not None and self.model != "sprout":
            raise OptionError(f"--plasticity needs --model sprout, got --model {self.model}: it has no connections")
        if self.hebb is not None and self.freeze_strength:
            raise OptionError("--plasticity changes the strengths that --freeze_strength holds; leave one of them out")

    @property
    def hebb(self) -> tuple[float, float] | None:
        """(eta, decay) of ``BrainLikeSprout.plasticity``, or None. Raises: OptionError if the option is malformed."""
        if self.plasticity is None:
            return None
        rate, _, rule = self.plasticity.partition(",")
        try:
            eta = float(rate)
        except ValueError:
            eta = float("nan")
        if not isfinite(eta) or eta <= 0 or rule not in ("", "oja"):
            raise OptionError(f"--plasticity must be RATE or RATE,oja with RATE > 0, got {self.plasticity!r}")
        return eta, float(rule == "oja")

    def total_steps(self, n_tokens: int, processes: int = 1) -> int:
        """Optimizer steps of the run: max_steps, or num_epochs times the steps that draw n_tokens tokens."""
        if self.max_steps is not None:
            return self.max_steps
        per_step = self.batch_size * self.window * self.grad_accumulation * processes
        return self.num_epochs * max(1, ceil(n_tokens / per_step))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def train_names() -> list[str]:
    """Names of the options of TrainConfig."""
    return [item.name for item in fields(TrainConfig)]


def model_names() -> list[str]:
    """Names of the model's options that a user may set."""
    return [item.name for item in fields(SproutConfig) if item.name not in SET_BY_TRAINING]


def read_options(path: str | Path) -> dict[str, Any]:
    """Options from a JSON file of name -> value. Raises: OptionError that names the file, and the nearest known key."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf8"))
    except OSError as error:
        raise OptionError(f"--config {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise OptionError(f"--config {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise OptionError(f"--config {path} must hold an object of options, got a {type(values).__name__}")
    check_names(values, f"--config {path}")
    return values


def check_names(names: Iterable[str], source: str) -> None:
    """Raises OptionError, with source, for a name that is no option, with the nearest one."""
    known = [*train_names(), *model_names()]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise OptionError(f"{source} has the unknown key {name!r}; {hint}")


def merge(given: dict[str, Any], from_file: dict[str, Any]) -> dict[str, Any]:
    """All options: what was given wins over the file's, the file's over debug_mode's, those over the defaults."""
    own = {**from_file, **given}
    debug = DEBUG if own.get("debug_mode") else {}
    defaults = {item.name: item.default for item in fields(SproutConfig) if item.name not in SET_BY_TRAINING}
    control = GPT_DEFAULTS if own.get("model") == "gpt" else {}
    return {**asdict(TrainConfig()), **defaults, **MODEL_DEFAULTS, **control, **debug, **own}


def continue_with(given: dict[str, Any], stored: dict[str, Any], before: int = 1, now: int = 1) -> dict[str, Any]:
    """The stored options of a run with those given that may change. Raises: OptionError for one that may not.

    Args: before, now, numbers of processes. Where they differ those of PER_PROCESS may change so that a step takes as
        many windows as before.
    """
    changed = [name for name, value in given.items() if name not in FREE_ON_RESUME and value != stored[name]]
    options = {**stored, **given}
    for name in changed:
        if before == now or name not in PER_PROCESS:
            raise OptionError(
                f"--{name} {given[name]} cannot be changed on --resume: the run was made with {stored[name]!r}, and "
                f"another value would make another run; leave it out, or start a new run with --out"
            )
    had, has = windows_per_step(stored, before), windows_per_step(options, now)
    if changed and had != has:
        raise OptionError(
            f"--batch_size {options['batch_size']} x --grad_accumulation {options['grad_accumulation']} x {now} "
            f"processes make {has} windows per step, the run has {had}; choose them to make as many, or give neither"
        )
    return options


def windows_per_step(options: dict[str, Any], processes: int) -> int:
    """Windows that all processes together learn from in an optimizer step."""
    return options["batch_size"] * options["grad_accumulation"] * processes


def parts(options: dict[str, Any], vocab_size: int) -> tuple[TrainConfig, SproutConfig]:
    """The two configs of a complete set of options. Raises: OptionError."""
    config = TrainConfig(**{name: options[name] for name in train_names()})
    sizes = {name: options[name] for name in model_names()}
    if config.model == "gpt" and sizes["n_encoder_layers"] == 0:
        raise OptionError("--n_encoder_layers must be an integer >= 1 for --model gpt, got 0")
    if config.rewire_every and (config.model != "sprout" or sizes["connection"] != "block_sparse"):
        raise OptionError("--rewire_every needs --model sprout --connection block_sparse: only blocks can be rewired")
    try:
        return config, SproutConfig(vocab_size=vocab_size, max_seq_len=config.window, causal=True, **sizes)
    except ValueError as error:  # its texts begin with the name of the field
        raise OptionError(f"--{error}; set --{str(error).split()[0]}, or what limits it, to fit") from None


def check_sharded(config: TrainConfig) -> None:
    """Raises OptionError for what a pool that is spread over processes cannot do."""
    if config.rewire_every:
        raise OptionError(
            f"--rewire_every {config.rewire_every} with --active_groups needs one process: with more of them each "
            "holds a part of the blocks; leave it out"
        )


def check_scaled(config: TrainConfig, groups: bool) -> None:
    """Raises OptionError for fp16 with two optimizers: accelerate scales the gradients of the second back twice.

    groups: whether the model has tables with sparse gradients, which get an optimizer of their own, as muon's do.
    """
    if config.mixed_precision == "fp16" and (groups or config.optimizer == "muon"):
        raise OptionError(
            "--mixed_precision fp16 needs a single optimizer: --optimizer muon and --active_groups make two; "
            "use bf16 or no"
        )
