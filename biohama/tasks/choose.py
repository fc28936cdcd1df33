"""A task by its name: one of ours, or any class of a module that can be imported."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from .base import Task
from .mixture import Mixture
from .mqar import MQAR
from .recall import Recall
from .streams import Copy, Reverse, Sort

TASKS: dict[str, type] = {
    "copy": Copy,
    "reverse": Reverse,
    "sort": Sort,
    "recall": Recall,
    "mqar": MQAR,
    "mixture": Mixture,
}


def make_task(name: str, **options: Any) -> Task:
    """The task of that name, made with its options.

    Args:
        name: a key of TASKS, or "module:Class" of a class whose instances have the members of ``Task``.
        options: keywords of the class, for example vocab_size of "mqar" or tasks and weights of "mixture".
    Raises: ValueError for an unknown name, a module or class that is not there, or an option out of range; TypeError
        for an option that the class does not have, or an instance that is not a task, with what it lacks.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if name not in TASKS and ":" not in name:
        raise ValueError(f'name must be one of {", ".join(TASKS)} or "module:Class", got {name!r}')
    made = TASKS[name] if name in TASKS else _imported(name)
    signature = inspect.signature(made)
    try:
        signature.bind(**options)
    except TypeError as error:
        allowed = ", ".join(signature.parameters) or "no options"
        raise TypeError(f"options of {name!r}: {error}; it takes {allowed}") from None
    task = made(**options)
    if not isinstance(task, Task):
        lacking = ", ".join(
            sorted(m for m in ("name", "vocab_size", "splits", "sample", "describe") if not hasattr(task, m))
        )
        raise TypeError(f"{name!r} is not a task: it lacks {lacking}")
    return task


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"name {name!r}: the module {module!r} cannot be imported: {error}") from None
    except ValueError:
        raise ValueError(f'name must be "module:Class", got {name!r}') from None
    if not callable(getattr(found, attribute, None)):
        raise ValueError(f"name {name!r}: the module {module!r} has no class {attribute!r}")
    return getattr(found, attribute)
