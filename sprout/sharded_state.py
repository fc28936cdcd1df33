"""What a pool that is spread over processes has learnt, as that of one process: weights, optimizer states, a model.

All of it is gathered on the first process of the group, in its main memory; every process calls each function, and
those named ``whole_*`` and ``gathered`` give the others nothing to keep. Of models that are not spread it is their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import pretrained
from .sharded import ShardedTable
from .sharded_pool import sharded_tables

ROWS_AT_ONCE = 65_536  # that cross between processes, so that a device needs no room for a second range


def collected(table: ShardedTable, rows: Tensor) -> Tensor | None:
    """(n_rows, ...) on the CPU of the group's first process, of rows that are spread as the table's; None elsewhere."""
    if table.group is None:
        return rows.detach().cpu()
    if dist.get_rank(table.group):
        for part in rows.detach().split(ROWS_AT_ONCE) if len(rows) else ():
            dist.send(part.contiguous(), group=table.group, group_dst=0)
        return None
    whole = torch.empty(table.n_rows, *rows.shape[1:], dtype=rows.dtype)
    whole[: len(rows)] = rows.detach()
    for rank in range(1, table.processes):
        theirs = whole[table.bounds[rank] : table.bounds[rank + 1]]
        for part in theirs.split(ROWS_AT_ONCE) if len(theirs) else ():
            arrived = torch.empty_like(part, device=rows.device)
            dist.recv(arrived, group=table.group, group_src=rank)
            part.copy_(arrived)
    return whole


def cut(table: ShardedTable, whole: Tensor) -> Tensor:
    """A copy of this process's rows; whole as it is where it has more or fewer rows, for others to refuse."""
    return whole[table.first : table.first + len(table.local)].clone() if len(whole) == table.n_rows else whole


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the whole model on the first process, {} on the others."""
    spread, found = sharded_tables(model), {}
    for name, tensor in model.state_dict().items():
        table = spread.get(name.removesuffix(".local"))
        whole = tensor if table is None else collected(table, tensor)
        if whole is not None:
            found[name if table is None else name.removesuffix(".local")] = whole
    return found if _is_first(spread) else {}


def _is_first(spread: Mapping[str, ShardedTable]) -> bool:
    return all(table.group is None or dist.get_rank(table.group) == 0 for table in spread.values())


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Any) -> None:
    """Copies whole weights into model, on each process its rows; errors as of ``pretrained.load_weights``."""
    ours = dict(weights)
    for name, table in sharded_tables(model).items():
        if name in ours:
            ours[f"{name}.local"] = cut(table, ours.pop(name))
    pretrained.load_weights(model, ours, source)


def whole_optimizer_state(optimizer: Any, model: nn.Module) -> dict[str, Any]:
    """optimizer.state_dict() as if the model were whole; without the rows of its tables on all but the first process.

    Args: optimizer, made after the model was spread.
    """
    found = optimizer.state_dict()
    for number, table in _numbered(optimizer, model):
        if number in found["state"]:
            own = found["state"][number]
            found["state"][number] = {name: collected(table, x) if _has_rows(x) else x for name, x in own.items()}
    return found


def own_optimizer_state(optimizer: Any, model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Of a ``whole_optimizer_state`` what this process's optimizer loads."""
    numbers = dict(_numbered(optimizer, model))
    own = {
        number: {name: cut(numbers[number], x) if number in numbers and _has_rows(x) else x for name, x in of.items()}
        for number, of in state["state"].items()
    }
    return {**state, "state": own}


def _numbered(optimizer: Any, model: nn.Module) -> Iterator[tuple[int, ShardedTable]]:
    """(number of the parameter in the optimizer's state_dict, the table that it is of)."""
    held = {id(table.local): table for table in sharded_tables(model).values()}
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return ((number, held[id(p)]) for number, p in enumerate(parameters) if id(p) in held)


def _has_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


def gathered(model: Any) -> Any:
    """A whole copy of model on the CPU of the first process, None on the others; model itself if it is not spread.

    Every process calls it. It is for what one process does alone: saving, sampling, analysis, growing.
    """
    spread = sharded_tables(model)
    if not spread:
        return model
    weights = whole_weights(model)
    if not weights:
        return None
    with torch.random.fork_rng(devices=[]):
        whole = type(model)(model.config)
    whole.to(next(model.parameters()).dtype).load_state_dict(weights)
    return whole.train(model.training)
