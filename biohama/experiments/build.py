"""A run's task and model from its options, and a finished run's model from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from sprout.runs import CheckpointError, RunError, checkpoints, read, read_config

from ..baselines import Baseline, BaselineConfig
from ..config import BioHamaConfig
from ..model import BioHamaModel
from ..tasks import Task, make_task
from .config import FREE_ON_RESUME, KINDS, Config, ModelOptions, OptionError, TaskOptions, flat, make_config, of_a_run


def build_task(options: TaskOptions) -> Task:
    """The task that the options name. Raises: OptionError naming the key."""
    try:
        task = make_task(options.name, **options.options)
    except (ValueError, TypeError) as error:
        raise OptionError(f"task: {error}") from None
    if "train" not in task.splits:
        raise OptionError(f'task {options.name} must have a split "train" to learn from, it has {list(task.splits)}')
    return task


def build_model(options: ModelOptions, vocab_size: int) -> nn.Module:
    """The untrained model that the options name; torch's global generator decides its weights. Raises: OptionError."""
    own = {item.name: getattr(options, item.name) for item in fields(options) if item.name != "name"}
    try:
        if options.name in KINDS:
            return Baseline(BaselineConfig(vocab_size=vocab_size, **KINDS[options.name], **own))  # type: ignore[arg-type]
        return BioHamaModel(BioHamaConfig(vocab_size=vocab_size, **own))
    except (ValueError, TypeError) as error:
        raise OptionError(f"model.{error}") from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
    """Raises RunError, naming what does not fit, unless the weights are this model's."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"the weights in {source} are not this model's: {' '.join(str(error).split())[:400]}") from None


def newest_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights of a run's newest checkpoint. Raises: RunError, CheckpointError."""
    path = Path(path)
    read_config(path)
    found = checkpoints(path)
    if not found:
        raise CheckpointError(f"{path} has no checkpoint yet")
    return read(found[-1]).weights


def run_config(path: str | Path) -> Config:
    """The options of a run. Raises: RunError if there is none, OptionError if this version does not know one."""
    stored = read_config(Path(path))
    if "experiment" not in stored:
        raise RunError(f"{Path(path) / 'config.json'} lacks 'experiment': it is not a run of biohama.experiments")
    return make_config(stored["experiment"])


def load_run(path: str | Path) -> tuple[Config, Task, nn.Module]:
    """(options, task, trained model in eval mode on the CPU). Raises: RunError, CheckpointError, OptionError."""
    config = run_config(path)
    task = build_task(config.task)
    state = torch.get_rng_state()  # the untrained weights are not of interest
    model = build_model(config.model, task.vocab_size)
    torch.set_rng_state(state)
    load_weights(model, newest_weights(path), path)
    return config, task, model.eval()


def continued(path: str | Path, given: Mapping[str, Any], free: tuple[str, ...]) -> Config:
    """The options of a run to continue, with those given in nested dicts. Raises: OptionError, RunError."""
    stored = run_config(path)
    merged = OmegaConf.merge(OmegaConf.create(of_a_run(stored)), dict(given))
    config = make_config(OmegaConf.to_object(merged))  # type: ignore[arg-type]
    config.out = str(path)
    refuse_changes(config, stored, free)
    return config


def refuse_changes(now: Config, then: Config, free: tuple[str, ...] = FREE_ON_RESUME) -> None:
    """Raises OptionError if an option differs that is not free to: it would be another run."""
    options, before = flat(of_a_run(now)), flat(of_a_run(then))
    for key in sorted({*options, *before}):
        value, stored = options.get(key), before.get(key)
        if value != stored and not any(key == name or key.startswith(name + ".") for name in free):
            raise OptionError(
                f"{key} cannot be changed from {stored!r} to {value!r}: it would be another run; "
                f"free are {', '.join(free)}"
            )
