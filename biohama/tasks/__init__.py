"""Tasks that are learnt on short sequences and tested on long ones: what is drawn, what is asked, what is scored."""

from __future__ import annotations

from .base import EOS, IGNORE, ITEMS, KEYS, NOISE, PAD, SEP, SPLITS, VOCAB_SIZE, Batch, Task, held_out
from .choose import TASKS, make_task
from .mixture import Mixture
from .mqar import MQAR
from .recall import Recall
from .streams import Copy, Reverse, Sort

__all__ = [
    "EOS",
    "IGNORE",
    "ITEMS",
    "KEYS",
    "MQAR",
    "NOISE",
    "PAD",
    "SEP",
    "SPLITS",
    "TASKS",
    "VOCAB_SIZE",
    "Batch",
    "Copy",
    "Mixture",
    "Recall",
    "Reverse",
    "Sort",
    "Task",
    "held_out",
    "make_task",
]
