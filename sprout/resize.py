"""More or fewer neurons in a pool that has learnt, and in the optimizers that train it.

New neurons sleep: they change no output until ``GlobalNeuronPool.waken`` or training has raised their threshold. What
is checked is checked first: an error leaves model and optimizers as they were. Every resized parameter is a new
nn.Parameter under its old name, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from bio_kernels import BlockSparse
from torch import Tensor, nn
from torch.optim import Optimizer

from .config import SproutConfig
from .pool import GROUP_SHARE
from .sharded_pool import refuse_shards

if TYPE_CHECKING:
    from .model import BrainLikeSprout


class Table(NamedTuple):
    """A parameter with a row for each neuron, or for each group of block_size neurons: model.<owner>.<name>."""

    owner: str
    name: str
    per_group: bool = False


TABLES = (
    Table("pool", "neuron_signatures"),
    Table("pool", "threshold"),
    Table("decoder", "readout"),
)
GROUP_TABLES = (Table("pool", "group_signatures", per_group=True), Table("pool", "group_threshold", per_group=True))


def _tables(config: SproutConfig) -> tuple[Table, ...]:
    return (*TABLES, *GROUP_TABLES) if config.active_groups else TABLES


class _Change(NamedTuple):
    """owner.name becomes new; resized does the same to a tensor of its shape, with zeros for what is new."""

    owner: nn.Module
    name: str
    new: Tensor | BlockSparse
    resized: Callable[[Tensor], Tensor]


@torch.no_grad()
def grow(
    model: BrainLikeSprout,
    n: int,
    *,
    optimizers: Sequence[Optimizer] = (),
    generator: torch.Generator | None = None,
) -> None:
    """Adds n sleeping neurons at the end of the pool; the outputs stay the same.

    A new neuron has a random signature, standard normal as at the start, a readout row of zeros, no synapse (of a
    block-sparse matrix: config.blocks_per_row zero blocks for each new block row, at random columns), and a threshold
    from which no input can wake it, see ``sleeping_threshold``. In a pool with groups it is the new groups that sleep:
    no input can choose them, see ``sleeping_group_threshold``; their neurons have the mean threshold of the others.

    Args:
        model: its config is replaced by one with the new n_neurons.
        n: >= 1; of a block-sparse pool a multiple of block_size.
        optimizers: those that hold its parameters: they take the new ones, and what they remember of old rows; new rows
            start at zero, as in a fresh optimizer (a step counter goes on).
        generator: of the signatures and columns, on any device; None: torch's own on the CPU.
    Raises: ValueError, TypeError, naming the argument. Gradients: those of the resized parameters are dropped.
    Determinism: the outputs are bitwise the same wherever a score has the same bits in a larger product, as in the
        tests of the reference; else to rounding.
    """
    refuse_shards(model, "grow")
    strength, config = model.pool.connection_strength, model.config
    step = strength.block_size if isinstance(strength, BlockSparse) else 1
    if type(n) is not int or n < 1 or n % step:
        what = f"a positive multiple of block_size={step}" if step > 1 else "an integer >= 1"
        raise ValueError(f"n must be {what}, got {n!r}")

    old = model.pool.neuron_signatures
    device = "cpu" if generator is None else generator.device
    signatures = torch.randn(n, old.shape[1], generator=generator, device=device).to(old)
    if config.active_groups:
        groups = torch.randn(n // step, old.shape[1], generator=generator, device=device).to(old) * GROUP_SHARE**0.5
        fresh = {"neuron_signatures": signatures * (1 - GROUP_SHARE) ** 0.5, "threshold": model.pool.threshold.mean()}
        fresh |= {"group_signatures": groups, "group_threshold": sleeping_group_threshold(model, groups)}
    else:
        fresh = {"neuron_signatures": signatures, "threshold": sleeping_threshold(model, signatures)}

    changes = []
    for table in _tables(config):
        owner = model.get_submodule(table.owner)
        more = n // config.block_size if table.per_group else n
        resized = _more_rows(more)
        new = resized(getattr(owner, table.name))
        if table.name in fresh:
            new[-more:] = fresh[table.name]
        changes.append(_Change(owner, table.name, new, resized))
    if isinstance(strength, BlockSparse):
        matrix = strength.grown(n, blocks_per_row=config.blocks_per_row, generator=generator)
        resized = _more_rows(len(matrix.blocks) - len(strength.blocks))
        changes.append(_Change(model.pool, "connection_strength", matrix, resized))
    else:
        wider = lambda x: F.pad(x, (0, n, 0, n))  # noqa: E731
        changes.append(_Change(model.pool, "connection_strength", wider(strength), wider))
    _apply(model, replace(config, n_neurons=config.n_neurons + n), changes, optimizers)


@torch.no_grad()
def sleeping_threshold(model: BrainLikeSprout, signatures: Tensor) -> Tensor:
    """Thresholds (n,) that keep neurons with these signatures (n, D), and without synapses, silent for every input.

    z = w * x + b comes from a LayerNorm, so |x| <= sqrt(D), and by the Cauchy-Schwarz inequality
    |z . s| / sqrt(D) <= reach(s) = |w * s| + |b . s| / sqrt(D).
    At least initial_sparsity of the old neurons have a score >= lowest, the initial_sparsity-th greatest of
    threshold - reach: who stays below it is not in an initial pattern. Nobody sends to the new neurons, so that their
    drive is their score: below logit(recruit_threshold) they do not enter later, and take nobody's place among the
    candidates. So threshold = min(lowest, logit) - reach(s), less 1 and 2 % for rounding, enough for bfloat16.
    With recruit_threshold 0 the limit is not the logit but where sigmoid is 0 in the pool's dtype.
    """
    pool, config = model.pool, model.config
    lowest = (pool.threshold - _reach(model, pool.neuron_signatures)).topk(config.initial_sparsity).values[-1]
    numbers, share = torch.finfo(signatures.dtype), config.recruit_threshold
    limit = log(numbers.tiny * numbers.eps) - 1  # below half of the smallest number above 0
    limit = lowest.clamp(max=max(limit, log(share / (1 - share))) if share else limit)
    return _below(limit, _reach(model, signatures)).to(signatures.dtype)


@torch.no_grad()
def sleeping_group_threshold(model: BrainLikeSprout, signatures: Tensor) -> Tensor:
    """Thresholds (g,) that keep groups with these signatures (g, D) from being chosen by any input.

    As ``sleeping_threshold``: at least active_groups of the old groups have a score >= the active_groups-th greatest of
    threshold - reach.
    """
    pool = model.pool
    lowest = (pool.group_threshold - _reach(model, pool.group_signatures)).topk(model.config.active_groups).values[-1]
    return _below(lowest, _reach(model, signatures)).to(signatures.dtype)


def _reach(model: BrainLikeSprout, signatures: Tensor) -> Tensor:
    """(n,): the most that |z . signature| / sqrt(D) can be, see ``sleeping_threshold``."""
    norm, s = model.encoder.norm, signatures.to(torch.promote_types(signatures.dtype, torch.float32))
    return (s * norm.weight).norm(dim=1) + (s @ norm.bias.to(s)).abs() * s.shape[1] ** -0.5


def _below(limit: Tensor, reach: Tensor) -> Tensor:
    return limit - reach - 1 - 0.02 * (limit.abs() + reach)


@torch.no_grad()
def prune(model: BrainLikeSprout, neurons: Tensor, *, optimizers: Sequence[Optimizer] = ()) -> None:
    """Removes neurons; those that stay are renumbered in order.

    Without neurons that are active in no pattern of some inputs (``silent_neurons``), the outputs on these inputs stay
    the same to rounding. Stored blocks to or from removed groups go, so that block rows may differ in length.
    In a pool with groups that holds for groups that no input has chosen: where one goes that was chosen, though none of
    it woke, the next best is looked at instead.

    Args:
        model: its config is replaced by one with the new n_neurons (and, if fewer groups are left, blocks_per_row).
        neurons: (N,) bool, True for those to remove, or their numbers, 1-D int32 or int64; on any device. Of a
            block-sparse pool whole groups of block_size.
        optimizers: those that hold its parameters: they take the new ones, with what they remember of the rows that
            stay.
    Raises: ValueError, TypeError, naming the argument, or the field of SproutConfig that forbids so few neurons.
    Gradients: those of the resized parameters are dropped. Determinism: exact.
    """
    refuse_shards(model, "prune")
    strength, config = model.pool.connection_strength, model.config
    keep = ~_as_mask(neurons, config.n_neurons, model.pool.threshold.device)
    kept = keep.nonzero().squeeze(1)
    size = {"n_neurons": len(kept)}
    groups = kept
    if isinstance(strength, BlockSparse):
        p = strength.block_size
        whole, part = keep.view(-1, p).all(1), keep.view(-1, p).any(1)
        if not torch.equal(whole, part):
            group = int((whole != part).long().argmax())
            raise ValueError(f"neurons must be whole groups of block_size={p}, got a part of group {group}")
        groups = whole.nonzero().squeeze(1)
        size["blocks_per_row"] = min(config.blocks_per_row, len(groups))
    config = replace(config, **size)

    changes = []
    for table in _tables(config):
        owner, resized = model.get_submodule(table.owner), _these_rows(groups if table.per_group else kept)
        changes.append(_Change(owner, table.name, resized(getattr(owner, table.name)), resized))
    if isinstance(strength, BlockSparse):
        matrix, slot = strength.selected(groups)
        changes.append(_Change(model.pool, "connection_strength", matrix, _these_rows(slot)))
    else:
        among = lambda x: x[kept[:, None], kept]  # noqa: E731
        changes.append(_Change(model.pool, "connection_strength", among(strength), among))
    _apply(model, config, changes, optimizers)


def _more_rows(n: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([x, x.new_zeros(n, *x.shape[1:])])


def _these_rows(rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x[rows]


def _as_mask(neurons: Tensor, n: int, device: torch.device) -> Tensor:
    """(N,) bool, on device."""
    if not isinstance(neurons, Tensor) or neurons.dtype not in (torch.bool, torch.int32, torch.int64):
        got = getattr(neurons, "dtype", type(neurons).__name__)
        raise TypeError(f"neurons must be a bool, int32 or int64 tensor, got {got}")
    neurons = neurons.to(device)
    if neurons.dtype == torch.bool:
        if neurons.shape != (n,):
            raise ValueError(f"neurons must be (N,) = ({n},) if it is bool, got shape {tuple(neurons.shape)}")
        return neurons
    if neurons.dim() != 1 or (neurons.numel() and not 0 <= int(neurons.min()) <= int(neurons.max()) < n):
        raise ValueError(f"neurons must be 1-D with numbers in 0..{n - 1}, got shape {tuple(neurons.shape)}")
    return torch.zeros(n, dtype=torch.bool, device=device).index_fill_(0, neurons.long(), True)


def _values(x: Tensor | BlockSparse) -> Tensor:
    return x.blocks if isinstance(x, BlockSparse) else x


def _apply(
    model: BrainLikeSprout, config: SproutConfig, changes: list[_Change], optimizers: Sequence[Optimizer]
) -> None:
    """Everything that can fail, then the assignments."""
    if not isinstance(optimizers, Sequence) or not all(isinstance(x, Optimizer) for x in optimizers):
        raise TypeError(f"optimizers must be a list or tuple of torch.optim.Optimizer, got {type(optimizers).__name__}")
    renewed: dict[Tensor, Tensor] = {}
    states = []
    for i, (owner, name, new, resized) in enumerate(changes):
        old = _values(getattr(owner, name))
        if isinstance(new, Tensor):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            changes[i] = _Change(owner, name, new, resized)
        renewed[old] = _values(new)
        states += [(x.state, old, _resized_state(x.state[old], old, resized)) for x in optimizers if old in x.state]

    for owner, name, new, _ in changes:
        setattr(owner, name, new)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["params"] = [renewed.get(p, p) for p in group["params"]]
    for state, old, resized_state in states:
        del state[old]
        state[renewed[old]] = resized_state
    for module in model.modules():
        if isinstance(getattr(module, "config", None), SproutConfig):
            module.config = config  # type: ignore[assignment]


def _resized_state(state: dict, parameter: Tensor, resized: Callable[[Tensor], Tensor]) -> dict:
    """What an optimizer remembers of a parameter, for its new shape; scalars as they are."""
    found = dict(state)
    for name, x in state.items():
        if isinstance(x, Tensor) and x.dim():
            if x.shape != parameter.shape:
                raise ValueError(f"optimizers: state {name!r} must have its parameter's shape, got {tuple(x.shape)}")
            found[name] = resized(x)
    return found
