"""A pool in groups of which each process holds a range of rows: neurons, stored blocks, readout.

``shard_`` puts a ShardedTable in the place of each table that has a row for each neuron or stored block. A batch's
groups are then paged in from whichever process holds them (``sprout.paging``), and all that follows is as before.
Groups' tables, the layout of the blocks and the dense layers stay whole on every process. So every forward is an
exchange: all processes of the group run as many, and as many backwards.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from bio_kernels import BlockSparse
from torch import Tensor, nn

from .distributed import Group, joint_group
from .sharded import ShardedTable

if TYPE_CHECKING:
    from .model import BrainLikeSprout


class ShardedBlocks(nn.Module):
    """An (N, N) matrix in blocks, as BlockSparse, of whose Z stored blocks each process holds a range.

    blocks: ShardedTable of Z rows (P, P). row_offsets (N/P + 1,), cols (Z,): the layout of all of it, on every process.
    search_steps: as of BlockSparse. joint: the group of processes whose samples the pool learns from.
    """

    row_offsets: Tensor
    cols: Tensor
    own_rows: Tensor  # block row of each block here

    def __init__(self, matrix: BlockSparse, exchange: Group, joint: Group) -> None:
        super().__init__()
        self.blocks, self.joint = spread(matrix.blocks, exchange), joint
        self.register_buffer("row_offsets", matrix.row_offsets)
        self.register_buffer("cols", matrix.cols)
        self._measure()

    def _measure(self) -> None:
        """What follows from the layout."""
        lengths = self.row_offsets.diff()
        self.search_steps = int(lengths.max()).bit_length()
        row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        self.register_buffer("own_rows", row[self._own()].clone(), persistent=False)

    def _own(self) -> slice:
        return slice(self.blocks.first, self.blocks.first + len(self.blocks.local))

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._measure()

    @property
    def block_size(self) -> int:
        """P, the edge of a block, in neurons."""
        return self.blocks.local.shape[-1]

    def own(self) -> BlockSparse:
        """The blocks of this process as a matrix in which the others are absent; shares their memory."""
        row_offsets = (self.row_offsets - self.blocks.first).clamp(0, len(self.blocks.local))
        return BlockSparse.trusted(self.blocks.local.detach(), row_offsets, self.cols[self._own()], self.search_steps)

    def part(self, groups: Tensor, block: Tensor) -> Tensor:
        """The blocks (Z', P, P) between these groups.

        Args: groups (U,) and block (Z',), int64 ascending, their numbers.
        Gradients: as of one process with all samples, whose SparseAdam also moves blocks between groups of different
        samples, by what it remembers of them: of the blocks here, those between groups that any process chose.
        """
        if not (torch.is_grad_enabled() and self.blocks.local.requires_grad):
            return self.blocks.rows(block)
        used = torch.zeros(len(self.row_offsets) - 1, dtype=torch.uint8, device=groups.device)
        used[groups] = 1
        dist.all_reduce(used, dist.ReduceOp.MAX, group=self.blocks.group)
        also = (used[self.own_rows] & used[self.cols[self._own()].long()]).nonzero().squeeze(1)
        return self.blocks.rows(block, mean=True, also=also)


def spread(whole: Tensor, process_group: Group) -> ShardedTable:
    """A whole table, the same on every process, as one of which each process holds a copy of its rows alone."""
    table = ShardedTable(
        len(whole), *whole.shape[1:], process_group=process_group, device=whole.device, dtype=whole.dtype
    )
    table.load_full_(whole.detach())
    table.local.requires_grad_(whole.requires_grad)
    return table


def sharded_tables(model: nn.Module) -> dict[str, ShardedTable]:
    """The tables that are spread over processes, by the name that they have in a whole model; {} if none is."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ShardedTable)}


def shard_(model: BrainLikeSprout, process_group: Group = None) -> None:
    """Leaves each process its own rows of the pool's tables, in place; ``sharded_state.gathered`` is the inverse.

    Args: model, with config.active_groups, the same on every process: call it before there are optimizers, as its
        parameters are new ones, and before DistributedDataParallel, which then leaves them alone; if it wraps a module
        that holds the model, see ``leave_to_owners``. process_group as in
        ``BrainLikeSprout.plasticity``; with one process nothing is changed.
    Raises: ValueError, TypeError, on all processes at once: not such a model, or not the same everywhere.
    Gradients: of the tables sparse, on the process that holds the rows, of the mean of all processes' losses, as
        DistributedDataParallel's are of the others. Every forward and backward is an exchange, see ``absent``.
    Determinism: bitwise with as many processes; of one process with the joined batch to rounding.
    """
    group = joint_group(process_group)
    problem, facts = _problem(model), None
    if problem is None and group is not None:
        facts = (model.config, {name: zlib.crc32(_bytes(tensor)) for name, tensor in _pool_tensors(model).items()})
    told = [(problem, facts)]
    if group is not None:
        told = [(None, None)] * dist.get_world_size(group)
        dist.all_gather_object(told, (problem, facts), group=group)
    if problem is not None:
        raise ValueError(problem)
    for rank, (error, other) in enumerate(told):
        if error is not None:
            raise ValueError(f"model of process {rank} of the group does not fit; see the error there")
        if other != told[0][1]:
            raise ValueError(
                "model must be the same on every process: seed them alike, or load the same weights; "
                f"process {rank} of the group has another pool or configuration than process 0"
            )
    if group is None:
        return
    # A group of their own: DistributedDataParallel's exchanges come in between at other places on other processes.
    own: Any = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)
    pool, matrix = model.pool, model.pool.connection_strength
    assert isinstance(matrix, BlockSparse), "SproutConfig refuses groups without blocks"
    for owner, name in ((pool, "neuron_signatures"), (pool, "threshold"), (model.decoder, "readout")):
        _replace(owner, name, spread(getattr(owner, name), own))
    strength = ShardedBlocks(matrix, own, group)
    _replace(pool, "connection_strength", strength)  # last: the order that optimizers count in
    leave_to_owners(model)


def leave_to_owners(module: nn.Module) -> None:
    """Has DistributedDataParallel(module) leave spread tables alone, which it would overwrite with the first process's.

    ``shard_`` does it for the model; call it for a module of your own that holds the model, if that is what is wrapped.
    """
    names = [f"{name}.local" for name in sharded_tables(module)]
    for name, part in module.named_modules():
        if isinstance(part, ShardedBlocks):
            names += [f"{name}.{buffer}" for buffer, _ in part.named_buffers()]
    if names:
        ignored: Any = names
        module._ddp_params_and_buffers_to_ignore = ignored  # where DistributedDataParallel looks


def _replace(owner: nn.Module, name: str, new: nn.Module) -> None:
    delattr(owner, name)
    setattr(owner, name, new)


def _problem(model: Any) -> str | None:
    config = getattr(model, "config", None)
    if not hasattr(model, "pool") or config is None:
        return f"model must be a BrainLikeSprout, got {type(model).__name__}"
    if not config.active_groups:
        return "model must have active_groups > 0 to be spread over processes, got 0: a flat pool looks at all neurons"
    return "model must be whole, got one that is spread over processes already" if sharded_tables(model) else None


def _pool_tensors(model: BrainLikeSprout) -> dict[str, Tensor]:
    return {**model.pool.state_dict(), "readout": model.decoder.readout}


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()


def refuse_shards(model: nn.Module, what: str) -> None:
    """Raises ValueError if model's pool is spread over processes, for what needs it whole."""
    if sharded_tables(model):
        raise ValueError(
            f"{what} needs a whole pool, and model's is spread over processes; see sprout.sharded_state.gathered"
        )


def absent(model: Any) -> Tensor:
    """0, as the loss of a process that has no samples while others run forward: call its backward if they do theirs.

    It takes part in the exchanges of one forward and asks for no rows, so that no row moves on its account. Dense
    parameters get gradients of zero, as DistributedDataParallel wants (call it inside of the wrapped module). Of a
    model that is not spread over processes: 0 alike, without exchange.
    Cost: that of the exchanges. Gradients: zero.
    """
    total = torch.zeros((), device=next(model.parameters()).device)
    nothing = torch.empty(0, dtype=torch.int64, device=total.device)
    tables = sharded_tables(model)
    interacts = not tables or model.config.n_interaction_steps > 0  # else neither its weights nor synapses are used
    if tables:  # in the order of page_in and OutputDecoder
        for table in (model.pool.neuron_signatures, model.pool.threshold):
            total = total + table.rows(nothing, mean=True).sum()
        blocks = model.pool.connection_strength.part(nothing, nothing)
        if interacts:
            total = total + blocks.sum()
        total = total + model.decoder.readout.rows(nothing, mean=True).sum()
    if torch.is_grad_enabled():
        apart = {id(table.local) for table in tables.values()}
        apart |= set() if interacts else {id(p) for p in model.interaction.parameters()}
        for parameter in model.parameters():
            if parameter.requires_grad and id(parameter) not in apart:
                total = total + 0 * parameter.sum()
    return total
