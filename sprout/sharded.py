"""A table of which each process holds a range of rows, and the best of scores that are spread like it.

What crosses between processes is what was asked for, rows, their gradients, k candidates of each: never all N.
"""

from __future__ import annotations

from typing import Any

import bio_kernels
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import Group, gather, joint_group

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ShardedTable(nn.Module):
    """A table (n_rows, *shape) of which process r of W holds rows r * ceil(n_rows / W) and so on, the last ones fewer.

    local: the parameter (rows here, *shape), zero at the start. Its gradient is a coalesced torch.sparse_coo tensor of
        the rows that any process asked for, so that torch.optim.SparseAdam and SGD touch only these. It is the gradient
        of the sum of all processes' losses, or of their mean, see ``rows``.
    first: number of the first row here.
    Each process needs the memory of its own rows alone. Ranges are those of torch.chunk and of DTensor's Shard(0).
    state_dict holds ``local``: it fits as many processes; for another number see ``dtensor``, ``full``, ``load_full_``.
    Not to be wrapped in DistributedDataParallel, which would make all ranges equal.

    Args: n_rows >= 1; shape, of a row; process_group as in ``BrainLikeSprout.plasticity``, "local"
        holding all rows here; device, dtype of the parameter. Raises: ValueError, TypeError.
    """

    def __init__(
        self,
        n_rows: int,
        *shape: int,
        process_group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if type(n_rows) is not int or n_rows < 1:
            raise ValueError(f"n_rows must be an integer >= 1, got {n_rows!r}")
        self.group = joint_group(process_group)
        self.n_rows, self.processes = n_rows, 1 if self.group is None else dist.get_world_size(self.group)
        rank = 0 if self.group is None else dist.get_rank(self.group)
        each = -(-n_rows // self.processes)
        self.bounds = [min(n_rows, r * each) for r in range(self.processes + 1)]
        self.first = self.bounds[rank]
        self.local = nn.Parameter(torch.zeros(self.bounds[rank + 1] - self.first, *shape, device=device, dtype=dtype))

    def rows(self, index: Tensor, *, mean: bool = False, also: Tensor | None = None) -> Tensor:
        """The rows that this process asks for, wherever they are: table[index].

        Every process of the group calls it, with rows of its own choice, which may be none; and every process must call
        backward on something computed from the result (its sum, say, if it has no rows), or the others wait.
        Args: index, (R,) int64, strictly ascending, in 0..n_rows-1, on local's device; mean, whether gradients are of
            the mean of all processes' losses, as DistributedDataParallel's are, or of their sum; also, (A,) int64 rows
            of local without repeats that the gradient here holds as well, zeros if nobody asked for them.
        Returns: (R, *shape) in local's dtype.
        Raises: ValueError, on all processes at once, for an index that is none of this.
        Cost: one exchange of W numbers, which the host waits for; R indices out, R rows back; R gradients out.
        Gradients: of local, on each row's owner, summed in float32 (float64 for float64) over processes; once.
        Determinism: bitwise, the sum is in order of rank.
        """
        asked, out, back = self._ask(index)
        return _Rows.apply(self.local, asked, out, back, self.group, self.processes if mean else 1, also)

    def _ask(self, index: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """(local numbers of the rows others ask for, how many go to each process, how many come from each)."""
        problem = self._problem(index)
        wanted = [-1] * self.processes
        if problem is None:
            edges = torch.searchsorted(index, torch.tensor(self.bounds, device=index.device))
            wanted = edges.diff().tolist()
        ones = [1] * self.processes
        told = _exchange(torch.tensor(wanted, device=self.local.device), ones, ones, self.group).tolist()
        if problem is not None:
            raise ValueError(problem)
        for rank, number in enumerate(told):
            if number < 0:
                raise ValueError(f"index of process {rank} of the group does not fit; see the error there")
        return _exchange(index, told, wanted, self.group) - self.first, told, wanted

    def _problem(self, index: Any) -> str | None:
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
            got = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            return f"index must be a (R,) int64 tensor, got {got}"
        if index.device != self.local.device:
            return f"index must be on {self.local.device} as local, got {index.device}"
        if index.numel() and not (index[0] >= 0 and index[-1] < self.n_rows and (index.diff() > 0).all()):
            return f"index must be strictly ascending in 0..n_rows-1={self.n_rows - 1}, got {_shown(index)}"
        return None

    @torch.no_grad()
    def full(self) -> Tensor:
        """(n_rows, *shape), the whole table, on every process; they all call it. Gradients: none."""
        if self.group is None:
            return self.local.clone()
        padded = self.local.new_zeros(self.bounds[1], *self.local.shape[1:])
        padded[: len(self.local)] = self.local
        return torch.cat(gather(padded, self.group))[: self.n_rows]

    @torch.no_grad()
    def load_full_(self, full: Tensor) -> None:
        """Takes this process's rows of a whole table, in place. Raises: ValueError for another shape."""
        shape = (self.n_rows, *self.local.shape[1:])
        if tuple(full.shape) != shape:
            raise ValueError(f"full must have shape {shape}, got {tuple(full.shape)}")
        self.local.copy_(full[self.first : self.first + len(self.local)])

    def dtensor(self) -> Any:
        """The table as a DTensor of Shard(0) that shares local's memory, for torch.distributed.checkpoint.

        Saved by any number of processes it loads into any other. Raises: RuntimeError where there is one process only.
        """
        if self.group is None:
            raise RuntimeError("dtensor needs a process_group of several processes; use local itself")
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(self.group, self.local.device.type)
        shape = torch.Size((self.n_rows, *self.local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(self.local.detach(), mesh, [Shard(0)], shape=shape, stride=stride)

    def extra_repr(self) -> str:
        return f"{self.n_rows} rows of {tuple(self.local.shape[1:])}, here {len(self.local)} from {self.first} on"


class _Rows(torch.autograd.Function):
    """local (n, ...), asked (A,) -> the rows of all owners; ``told`` go to each process, ``wanted`` come from each.

    The gradient of local is divided by ``parts`` and holds the rows ``also`` as well.
    """

    @staticmethod
    def forward(
        local: Tensor, asked: Tensor, told: list[int], wanted: list[int], group: Any, parts: int, also: Tensor | None
    ) -> Tensor:
        return _exchange(local[asked], wanted, told, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        local, asked, ctx.told, ctx.wanted, ctx.group, ctx.parts, also = inputs
        ctx.save_for_backward(asked if also is None else torch.cat([asked, also]))
        ctx.shape = local.shape

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        (held,) = ctx.saved_tensors
        arrived = _exchange(grads[0], ctx.told, ctx.wanted, ctx.group)
        touched, where = held.unique(return_inverse=True)
        wide = torch.float64 if arrived.dtype == torch.float64 else torch.float32
        total = arrived.new_zeros(len(touched), *arrived.shape[1:], dtype=wide)
        for part, at in zip(arrived.split(ctx.told), where[: len(arrived)].split(ctx.told), strict=True):
            total[at] += part  # one process asks for a row once
        values = total.div_(ctx.parts).to(arrived.dtype)
        # Held here so that it stays known as coalesced, see sprout.paging.
        ctx.out = torch.sparse_coo_tensor(touched[None], values, ctx.shape, is_coalesced=True, check_invariants=False)
        return ctx.out, None, None, None, None, None, None


class _Shared(torch.autograd.Function):
    """x, the same on every process -> x; backward sums what the processes did with it."""

    @staticmethod
    def forward(x: Tensor, group: Any) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        wide = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
        return torch.stack(gather(grads[0], ctx.group)).sum(0, dtype=wide).to(grads[0].dtype), None


def _exchange(x: Tensor, receive: list[int], send: list[int], group: Any) -> Tensor:
    """Rows of x, send[r] of them to process r, for those of all others, receive[r] from process r, in order of rank."""
    if group is None:
        return x
    found = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(found, x.contiguous(), receive, send, group=group)
    return found


def _shown(index: Tensor) -> str:
    head = ", ".join(map(str, index[:8].tolist()))
    return f"[{head}{', ...' if len(index) > 8 else ''}]"


def sharded_topk(
    local_score: Tensor, k: int, *, process_group: Group = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The k best neurons of each sample where each process holds the scores of its own range of neurons.

    Every process of the group calls it with the same samples; neurons are numbered in order of rank.
    Args: local_score, (B, N_local) float32, bfloat16, float16 or float64; N_local may differ and be 0; 1 <= k <= N;
        process_group as in ``BrainLikeSprout.plasticity``; backend as in bio_kernels.topk_gather.
    Returns: (gate, idx) of bio_kernels.topk_gather on the whole score (B, N), to the bit, on every process: idx (B, k)
        int64 ascending, ties to the lowest neuron, NaN greatest; gate (B, k) in local_score's dtype.
    Raises: ValueError, on all processes at once, for a wrong shape or k, and where B, k or dtype differ.
    Cost: one exchange of four numbers, which the host waits for; k scores and neurons of each sample from each process.
    Gradients: gate -> local_score, once, those of the sum of all processes' losses, as in ``ShardedTable``; every
        process must call backward on something computed from gate. Determinism: bitwise, summed in order of rank.
    """
    group = joint_group(process_group)
    problem = _score_problem(local_score, k)
    sizes = (-1, 0, 0, 0)
    if problem is None:
        sizes = (local_score.shape[1], local_score.shape[0], k, DTYPES.index(local_score.dtype))
    told = [sizes]
    if group is not None:
        device = local_score.device if isinstance(local_score, Tensor) else None
        told = [tuple(found.tolist()) for found in gather(torch.tensor(sizes, device=device), group)]
    _check_sizes(problem, told)
    numbers = [n for n, *_ in told]
    first = sum(numbers[: 0 if group is None else dist.get_rank(group)])
    score = local_score.detach()
    best, neuron = _topk(score, min(k, score.shape[1]), backend)
    if group is not None:
        best, neuron = _candidates(best, neuron + first, k, numbers, group)
        best, at = _topk(best, k, backend)
        neuron = neuron.gather(1, at)
    here = score.shape[1]  # the same bits, with a way back to the scores of this process, also if it has none
    mine = (neuron >= first) & (neuron < first + here)
    own = local_score.gather(1, (neuron - first).clamp(0, here - 1)) if here else local_score.sum(1, keepdim=True)
    gate = torch.where(mine, own, best)
    return gate if group is None else _Shared.apply(gate, group), neuron


def _score_problem(score: Any, k: Any) -> str | None:
    if not isinstance(score, Tensor) or score.dim() != 2 or score.dtype not in DTYPES:
        got = f"{score.dtype} {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        return f"local_score must be a (B, N_local) float tensor, got {got}"
    return None if type(k) is int and k >= 1 else f"k must be an integer >= 1, got {k!r}"


def _check_sizes(problem: str | None, told: list[tuple[int, ...]]) -> None:
    """Raises ValueError for problem, for one elsewhere, and for sizes (N_local, B, k, dtype) that do not fit."""
    if problem is not None:
        raise ValueError(problem)
    for rank, (n, *_) in enumerate(told):
        if n < 0:
            raise ValueError(f"local_score or k of process {rank} of the group does not fit; see the error there")
    if len({size[1:] for size in told}) > 1:
        got = ", ".join(f"B={b} k={k} {DTYPES[dtype]}" for _, b, k, dtype in told)
        raise ValueError(f"local_score's B and dtype, and k, must be the same on every process, got {got}")
    n, k = sum(size[0] for size in told), told[0][2]
    if k > n:
        raise ValueError(f"k must be in 1..N={n}, got {k}")


def _topk(score: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    if k == 0:
        return score[:, :0], torch.empty(len(score), 0, dtype=torch.int64, device=score.device)
    gate, idx, _ = bio_kernels.topk_gather(score, score.new_zeros(score.shape[1], 1), k, backend=backend)
    return gate, idx


def _candidates(
    best: Tensor, neuron: Tensor, k: int, numbers: list[int], group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """(scores, neurons) of the best min(k, N_local) of every process, (B, ...), neurons ascending."""
    size, columns = best.dtype.itemsize, []
    for x in (best, neuron):  # k of each, as bytes
        padded = x.new_zeros(len(x), k)
        padded[:, : x.shape[1]] = x
        columns.append(padded.view(torch.uint8).unflatten(1, (k, x.dtype.itemsize)))
    sent = torch.cat(columns, -1)
    parts = [part[:, : min(k, n)] for part, n in zip(gather(sent, group), numbers, strict=True)]
    joined = torch.cat(parts, 1)
    scores, neurons = (part.clone(memory_format=torch.contiguous_format) for part in joined.split((size, 8), -1))
    return scores.view(best.dtype).squeeze(-1), neurons.view(torch.int64).squeeze(-1)
