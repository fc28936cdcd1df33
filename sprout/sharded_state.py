"""What a pool that is spread over processes has learnt, as that of one process: weights, optimizer states, a model.

It is gathered on the first process of the group, in its main memory, and dealt out from there; every process calls each
function. Of models that are not spread it is their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import pretrained
from .config import SproutConfig
from .sharded import ShardedTable
from .sharded_pool import sharded_tables

ROWS_AT_ONCE = 65_536  # that cross between processes, so that a device needs no room for a second range


def collected(table: ShardedTable, rows: Tensor) -> Tensor | None:
    """(n_rows, ...) on the CPU of the group's first process, of rows that are spread as the table's; None elsewhere."""
    if table.group is None:
        return rows.detach().cpu()
    if dist.get_rank(table.group):
        for part in _pieces(rows.detach()):
            dist.send(part.contiguous(), group=table.group, group_dst=0)
        return None
    whole = torch.empty(table.n_rows, *rows.shape[1:], dtype=rows.dtype)
    whole[: len(rows)] = rows.detach()
    for rank in range(1, table.processes):
        for part in _pieces(whole[table.bounds[rank] : table.bounds[rank + 1]]):
            arrived = torch.empty_like(part, device=rows.device)
            dist.recv(arrived, group=table.group, group_src=rank)
            part.copy_(arrived)
    return whole


def dealt(table: ShardedTable, whole: Tensor) -> Tensor:
    """This process's rows, on table's device, of a tensor that the first process has; the inverse of ``collected``.

    Args: whole (n_rows, ...), of which the other processes need shape and dtype only, see ``outline``.
    Returns: whole as it is where it has more or fewer rows, for others to refuse.
    """
    if len(whole) != table.n_rows:
        return whole
    own = torch.empty(len(table.local), *whole.shape[1:], dtype=whole.dtype, device=table.local.device)
    if table.group is None or dist.get_rank(table.group) == 0:
        own.copy_(whole[: len(own)])
        for rank in range(1, table.processes):
            for part in _pieces(whole[table.bounds[rank] : table.bounds[rank + 1]]):
                dist.send(part.to(own.device).contiguous(), group=table.group, group_dst=rank)
        return own
    for part in _pieces(own):
        dist.recv(part, group=table.group, group_src=0)
    return own


def _pieces(rows: Tensor) -> Sequence[Tensor]:
    return rows.split(ROWS_AT_ONCE) if len(rows) else ()


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
    """Copies the first process's whole weights into model, each its rows; errors as of ``pretrained.load_weights``.

    Args: weights, of which the others need an ``outline``.
    """
    ours = dict(weights)
    for name, table in sharded_tables(model).items():
        if name in ours:
            ours[f"{name}.local"] = dealt(table, ours.pop(name))
    pretrained.load_weights(model, ours, source)


def outline(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole weights with nothing but shape and dtype of the tables of model, to be sent to other processes."""
    spread = sharded_tables(model)
    return {name: tensor.to("meta") if name in spread else tensor for name, tensor in weights.items()}


def whole_optimizer_state(optimizer: Any, model: nn.Module) -> dict[str, Any]:
    """optimizer.state_dict() as if the model were whole; without the rows of its tables on all but the first process.

    Args: optimizer, made after the model was spread.
    """
    return _with_rows(optimizer, model, optimizer.state_dict(), collected)


def own_optimizer_state(optimizer: Any, model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Of the first process's ``whole_optimizer_state`` what this process's optimizer loads.

    Args: state, of which the others need an ``optimizer_outline``.
    """
    return _with_rows(optimizer, model, state, dealt)


def optimizer_outline(optimizer: Any, model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A ``whole_optimizer_state`` with nothing but shape and dtype of what has rows, to be sent to other processes."""
    return _with_rows(optimizer, model, state, lambda _, x: x.to("meta"))


def _with_rows(
    optimizer: Any, model: nn.Module, state: Mapping[str, Any], change: Callable[[ShardedTable, Tensor], Any]
) -> dict[str, Any]:
    """A copy of an optimizer's state_dict with all that has a row for each row of a table changed."""
    found = dict(state["state"])
    for number, table in _numbered(optimizer, model):
        if number in found:
            own = found[number].items()
            found[number] = {name: change(table, x) if isinstance(x, Tensor) and x.dim() else x for name, x in own}
    return {**state, "state": found}


def _numbered(optimizer: Any, model: nn.Module) -> Iterator[tuple[int, ShardedTable]]:
    """(number of the parameter in the optimizer's state_dict, the table that it is of)."""
    held = {id(table.local): table for table in sharded_tables(model).values()}
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return ((number, held[id(p)]) for number, p in enumerate(parameters) if id(p) in held)


def gathered(model: Any) -> Any:
    """A whole copy of model on the CPU of the first process, None on the others; model itself if it is not spread.

    Every process calls it. It is for what one process does alone: saving, growing, and after ``use_reference_``, as no
    kernel runs on a CPU, sampling and analysis.
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


def use_reference_(model: nn.Module) -> None:
    """Has a SPROUT compute on the plain-torch reference from now on, whatever its config or the environment chose."""
    for module in model.modules():
        if isinstance(getattr(module, "config", None), SproutConfig):
            module.config = replace(module.config, backend="reference")  # type: ignore[arg-type,assignment]
