"""What an experiment is asked for: its options, their checks, and the groups of tasks and models.

The dataclasses are Hydra's schema (a name that is not a field, or a value of another type, is refused with its key),
and plain Python's: ``make_config`` takes nested dicts. A value out of range is refused when the dataclass is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..baselines import BaselineConfig
from ..config import BioHamaConfig
from ..objective import PARTS

Plan = TypeVar("Plan")
DEVICES = ("auto", "cpu", "cuda")
# What may change when a run is continued, and what is not part of a run: the rest makes it another one.
FREE_ON_RESUME = ("evaluation", "train.save_every", "train.tensorboard")
NOT_OF_A_RUN = ("out", "force")


class OptionError(ValueError):
    """An option is unknown or out of range; the message names its key, what was got and what is allowed."""


def check(key: str, value: Any, holds: Callable[[Any], bool], allowed: str) -> None:
    """Raises OptionError unless holds(value)."""
    if not holds(value):
        raise OptionError(f"{key} must be {allowed}, got {value!r}")


def _at_least(low: int) -> tuple[Callable[[Any], bool], str]:
    return lambda x: type(x) is int and x >= low, f"an integer >= {low}"


def _positive(x: Any) -> bool:
    return type(x) in (int, float) and isfinite(x) and x > 0


@dataclass
class TaskOptions:
    """name: of TASKS or "module:Class"; options: the arguments of its class."""

    name: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelOptions:
    """name: of MODELS. The further fields of a model are those of its own config, but for vocab_size: the task's."""

    name: str = MISSING


@dataclass
class TrainOptions:
    """AdamW with betas 0.9 and 0.98 and no weight decay, a linear warm-up, and a linear decay over the last 0.3.

    steps, batch_size (sequences), lr (highest), warmup_steps; clip: largest norm of the gradient, 0: no limit.
    log_every, save_every: steps between lines of metrics, between checkpoints.
    check_every: steps between measurements of the Seq-Acc on fresh training sequences, 0: none; stop_at: the run ends
    when one reaches it, null: never. without: parts of BioHama's objective to leave out, of PARTS.
    tensorboard: write RUN/tensorboard, too.
    """

    steps: int = 1200
    batch_size: int = 32
    lr: float = 1.5e-3
    warmup_steps: int = 100
    clip: float = 1.0
    log_every: int = 20
    save_every: int = 200
    check_every: int = 0
    stop_at: float | None = None
    without: list[str] = field(default_factory=list)
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every"):
            check(f"train.{name}", getattr(self, name), *_at_least(1))
        for name in ("warmup_steps", "check_every"):
            check(f"train.{name}", getattr(self, name), *_at_least(0))
        check("train.lr", self.lr, _positive, "a finite number > 0")
        check("train.clip", self.clip, lambda x: x == 0 or _positive(x), "a finite number >= 0")
        check("train.stop_at", self.stop_at, lambda x: x is None or 0 < x <= 1, "a number in 0..1 without 0, or null")
        check("train.without", self.without, lambda x: set(x) <= set(PARTS), f"names out of {', '.join(PARTS)}")
        if self.stop_at is not None and not self.check_every:
            raise OptionError("train.check_every must be >= 1 where train.stop_at is given, got 0")


@dataclass
class EvaluationOptions:
    """How a trained model is measured, on sequences that depend on seed and task only.

    sequences: in each split. free_running: so many of them also in free running, null: all. batch_size: at once.
    splits: null: all of the task's.
    """

    sequences: int = 200
    free_running: int | None = None
    batch_size: int = 50
    seed: int = 20_000_003
    splits: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("sequences", "batch_size"):
            check(f"evaluation.{name}", getattr(self, name), *_at_least(1))
        allowed = f"an integer in 0..evaluation.sequences={self.sequences}, or null"
        check("evaluation.free_running", self.free_running, lambda x: x is None or 0 <= x <= self.sequences, allowed)
        check("evaluation.seed", self.seed, *_at_least(0))


@dataclass
class Config:
    """One run. out: its new folder, null: runs/NAME, see ``run_name``; in a multirun the folder of the runs' folders.

    seed: of weights and training sequences. threads: CPU threads, null: torch's. device: auto, cpu or cuda.
    init: a run whose weights this one starts from. force: take over a folder locked by another host.
    """

    task: TaskOptions = field(default_factory=TaskOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    init: str | None = None
    out: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check("seed", self.seed, lambda x: type(x) is int and 0 <= x < 2**32, "an integer in 0..2**32-1")
        check("threads", self.threads, lambda x: x is None or x >= 1, "an integer >= 1, or null")
        check("device", self.device, lambda x: x in DEVICES, f"one of {', '.join(DEVICES)}")


def _options_class(name: str, sizes: type) -> type[ModelOptions]:
    """ModelOptions with the fields of a model's config; what is fixed by the group or the task is left out."""
    plain = (int, float, bool, str)
    own: list[Any] = []
    for item in fields(sizes):
        if item.name in ("vocab_size", "kind", "position"):
            continue
        value = item.default
        if isinstance(value, tuple):
            own.append((item.name, list[str], field(default_factory=lambda value=value: list(value))))
        else:
            own.append((item.name, type(value) if type(value) in plain else Any, field(default=value)))
    return dataclasses.make_dataclass(name, own, bases=(ModelOptions,))


BioHamaOptions = _options_class("BioHamaOptions", BioHamaConfig)
BaselineOptions = _options_class("BaselineOptions", BaselineConfig)


def _filled(kind: type[ModelOptions], name: str, sizes: Any) -> ModelOptions:
    own = {item.name for item in fields(kind)} & {item.name for item in fields(sizes)}
    values = {key: getattr(sizes, key) for key in own}
    return kind(name=name, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()})


POSITIONS = ("sinusoidal", "rope", "alibi", "nope")
KINDS = {  # name -> the fields of BaselineConfig that the group fixes
    "lstm": {"kind": "lstm"},
    "gru": {"kind": "gru"},
    **{f"transformer_{position}": {"kind": "transformer", "position": position} for position in POSITIONS},
}
MODELS: dict[str, ModelOptions] = {
    "biohama": _filled(BioHamaOptions, "biohama", BioHamaConfig()),
    "biohama_tiny": _filled(BioHamaOptions, "biohama_tiny", BioHamaConfig.tiny()),
    **{name: _filled(BaselineOptions, name, BaselineConfig(**kind)) for name, kind in KINDS.items()},  # type: ignore[arg-type]
}
FOUR = ["copy", "reverse", "sort", "recall"]
TASK_GROUPS: dict[str, TaskOptions] = {
    **{name: TaskOptions(name) for name in (*FOUR, "mqar")},
    "all_four": TaskOptions("mixture", {"tasks": FOUR}),
    "custom": TaskOptions(),
}


def chosen(key: str, given: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group, by its name or as {"name": ..., further options}. Raises: OptionError."""
    own = {"name": given} if isinstance(given, str) else dict(given)
    name = own.pop("name", None)
    if name not in known:
        near = get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise OptionError(f"{key} must be one of {', '.join(known)}, got {name!r}{hint}")
    return {**dataclasses.asdict(known[str(name)]), **own}


def make_config(options: Mapping[str, Any]) -> Config:
    """A Config of nested dicts, as Hydra would make it; task and model also by name, a task also as "module:Class".

    Example: make_config({"task": "copy", "model": {"name": "lstm", "width": 64}, "train": {"steps": 100}}).
    Raises: OptionError naming the key.
    """
    options = {"task": "copy", "model": "biohama", **options}
    task, model = options["task"], chosen("model", options["model"], MODELS)
    name = task if isinstance(task, str) else task.get("name")
    if name in TASK_GROUPS:
        given = {} if isinstance(task, str) else task
        preset = TASK_GROUPS[str(name)]
        task = {"name": preset.name, "options": {**preset.options, **given.get("options", {})}}
        task |= {k: v for k, v in given.items() if k not in task}
    elif isinstance(task, str):
        task = {"name": task}
    try:
        schema = OmegaConf.merge(OmegaConf.structured(Config), {"model": type(MODELS[str(model["name"])])})
        return to_config(OmegaConf.merge(schema, {**options, "task": task, "model": model}))
    except OmegaConfBaseException as error:
        raise OptionError(str(error).partition("\n")[0] + f" ({error.full_key})") from None


def nested(arguments: Sequence[str]) -> dict[str, Any]:
    """{"a": {"b": value}, ...} of "a.b=value", the values read as YAML. Raises: OptionError."""
    for argument in arguments:
        if "=" not in argument or argument.startswith("-"):
            raise OptionError(f"arguments must be KEY=VALUE, got {argument!r}")
    try:
        return OmegaConf.to_object(OmegaConf.from_dotlist(list(arguments)))  # type: ignore[return-value]
    except (OmegaConfBaseException, ValueError) as error:
        raise OptionError(f"the arguments cannot be read: {error}") from None


def planned(kind: type[Plan], argv: Sequence[str]) -> Plan:
    """kind, a dataclass of many runs with a folder out, of the command line; what is not its own goes to its options.

    Raises: OptionError.
    """
    given = nested(argv)
    if "out" not in given:
        raise OptionError("out must be given: the folder of the results, as in out=runs/NAME")
    names: Any = fields(kind)  # type: ignore[arg-type]
    own: dict[str, Any] = {name: given.pop(name) for name in [x.name for x in names] if name in {*given} - {"options"}}
    own["options"] = given
    return kind(**own)


def to_config(composed: Any) -> Config:
    """The Config of a composed DictConfig. Raises: OptionError naming the key."""
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise OptionError(str(error).partition("\n")[0] + f" ({error.full_key})") from None
    assert isinstance(config, Config)
    return config


def of_a_run(config: Config) -> dict[str, Any]:
    """What config.json keeps: everything but the folder."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_OF_A_RUN}


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.lr": 0.001, ...} of nested dicts."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def changes(config: Config) -> dict[str, Any]:
    """The options, by key, that are not the defaults of this task and model; without seed, threads, device and out."""
    preset = Config(task=next((t for t in TASK_GROUPS.values() if t == config.task), TaskOptions(config.task.name)))
    preset.model = MODELS[config.model.name]
    now, then = flat(of_a_run(config)), flat(of_a_run(preset))
    besides = ("seed", "threads", "device", "train.save_every", "train.log_every", "train.tensorboard")
    keys = [k for k in now if k not in besides and not k.startswith("evaluation")]
    return {key: now[key] for key in keys if key not in then or then[key] != now[key]}


def task_label(task: TaskOptions) -> str:
    """The group's name where it is one with these options, else the task's own."""
    same = (name for name, preset in TASK_GROUPS.items() if preset == task)
    return next(same, task.name.replace(":", "."))


def run_name(config: Config) -> str:
    """TASK-MODEL-sSEED and what differs from the defaults: a name for the run's folder."""
    more = [f"{key}={value}" for key, value in changes(config).items()]
    name = "-".join([task_label(config.task), config.model.name, f"s{config.seed}", *more])
    return "".join(c if c.isalnum() or c in "-_.=," else "_" for c in name)[:200]
