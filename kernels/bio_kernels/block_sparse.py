"""BlockSparse: a connection matrix of which only some P x P blocks are stored; the others are zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._index import Storage

BLOCK_SIZES = (16, 32, 64, 128)


def _search_steps(row_offsets: Tensor) -> int:
    longest = int(row_offsets.diff().max()) if row_offsets.numel() > 1 else 0
    return longest.bit_length()


def _check_layout(blocks: Tensor, row_offsets: Tensor, cols: Tensor) -> None:
    """Raise ValueError or TypeError unless the three tensors describe a block-sparse square matrix."""
    if blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2] or blocks.shape[1] not in BLOCK_SIZES:
        raise ValueError(f"blocks must be (Z, P, P) with P in {BLOCK_SIZES}, got shape {tuple(blocks.shape)}")
    if not blocks.is_floating_point():
        raise TypeError(f"blocks must be floating point, got {blocks.dtype}")
    for name, t in (("row_offsets", row_offsets), ("cols", cols)):
        if t.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {t.dtype}")
        if t.dim() != 1 or t.device != blocks.device:
            raise ValueError(f"{name} must be 1-D on {blocks.device}, got shape {tuple(t.shape)} on {t.device}")
    rows, z = row_offsets.numel() - 1, blocks.shape[0]
    if cols.numel() != z:
        raise ValueError(f"cols must have one entry for each of the {z} blocks, got {cols.numel()}")
    if rows < 1 or int(row_offsets[0]) != 0 or int(row_offsets[-1]) != z or bool((row_offsets.diff() < 0).any()):
        raise ValueError(f"row_offsets must be (N/P + 1,), ascend from 0 and end at the number of blocks {z}")
    if z and (int(cols.min()) < 0 or int(cols.max()) >= rows):
        raise ValueError(f"cols must lie in 0..{rows - 1}, got {int(cols.min())}..{int(cols.max())}")
    if z and bool((_keys(row_offsets, cols).diff() <= 0).any()):
        raise ValueError("cols must ascend within each block row, without repeats")


def _rows(row_offsets: Tensor) -> Tensor:
    """Block row of every stored block: (Z,) int64."""
    return torch.repeat_interleave(torch.arange(row_offsets.numel() - 1, device=row_offsets.device), row_offsets.diff())


def _keys(row_offsets: Tensor, cols: Tensor) -> Tensor:
    return _rows(row_offsets) * (row_offsets.numel() - 1) + cols


class BlockSparse(nn.Module):
    """An (N, N) matrix of which Z blocks of P x P are stored, in the layout of ``torch.sparse_bsr_tensor``.

    Accepted wherever an operation takes ``strength`` or ``table``. A module, so that ``state_dict``, ``.to()``,
    ``deepcopy``, optimizers and safetensors understand it.

    Args:
        blocks: (Z, P, P) float, P in {16, 32, 64, 128}. An ``nn.Parameter`` is registered as such and is the leaf in
            whose ``.grad`` the gradients of every operation arrive; any other tensor becomes a buffer as it is.
        row_offsets: (N/P + 1,) int32 or int64: block row r owns the blocks row_offsets[r] .. row_offsets[r + 1] - 1.
        cols: (Z,) int32 or int64: block column of each block, ascending within a block row.

    Raises:
        ValueError, TypeError: the tensors do not describe such a matrix (the message names the one at fault).
    """

    blocks: Tensor
    row_offsets: Tensor
    cols: Tensor

    def __init__(self, blocks: Tensor, row_offsets: Tensor, cols: Tensor) -> None:
        super().__init__()
        _check_layout(blocks, row_offsets, cols)
        if isinstance(blocks, nn.Parameter):
            self.blocks = blocks
        else:
            self.register_buffer("blocks", blocks)
        self.register_buffer("row_offsets", row_offsets.contiguous())
        self.register_buffer("cols", cols.contiguous())
        self._search_steps = _search_steps(row_offsets)

    @classmethod
    def trusted(cls, blocks: Tensor, row_offsets: Tensor, cols: Tensor, search_steps: int) -> BlockSparse:
        """A matrix whose layout is right by construction: nothing is checked, and no device is waited for.

        For a part of a matrix that is cut out anew in every step, see ``sprout.paging``. search_steps: bits of the
        number of blocks in the longest row; more cost a little and do no harm.
        """
        matrix = cls.__new__(cls)
        nn.Module.__init__(matrix)
        for name, tensor in (("blocks", blocks), ("row_offsets", row_offsets), ("cols", cols)):
            matrix.register_buffer(name, tensor)
        matrix._search_steps = search_steps
        return matrix

    @property
    def search_steps(self) -> int:
        """Halvings that find one block among those of the longest block row."""
        return self._search_steps

    @property
    def block_size(self) -> int:
        """P, the edge of a block, in neurons."""
        return self.blocks.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """(N, N)."""
        n = (self.row_offsets.numel() - 1) * self.block_size
        return torch.Size((n, n))

    @property
    def storage(self) -> Storage:
        """What the kernels take: the values and where they belong."""
        return Storage(self.blocks, self.shape[0], self.row_offsets, self.cols, self._search_steps)

    @classmethod
    def from_dense(cls, dense: Tensor, block_size: int = 32, blocks_per_row: int | None = None) -> BlockSparse:
        """The blocks of dense (N, N) that hold a value other than zero, copied; P = block_size divides N.

        With blocks_per_row in 1..N/P, that many of each block row instead: those of the largest Frobenius norm, also
        zeros; ties go to the lowest column, NaN counts as greatest. The blocks are an ``nn.Parameter`` of their own: no
        gradient flows back to dense. -0.0 counts as zero.
        """
        if dense.dim() != 2 or dense.shape[0] != dense.shape[1]:
            raise ValueError(f"dense must be (N, N), got shape {tuple(dense.shape)}")
        rows = _block_rows(dense.shape[0], block_size)
        tiles = dense.detach().reshape(rows, block_size, rows, block_size).transpose(1, 2)
        if blocks_per_row is None:
            kept = (tiles != 0).any(-1).any(-1)
        else:
            _check_per_row(blocks_per_row, rows)
            norm = torch.linalg.vector_norm(tiles, dim=(-2, -1), dtype=torch.float64)
            order = norm.sort(dim=1, descending=True, stable=True).indices
            kept = torch.zeros_like(norm, dtype=torch.bool).scatter_(1, order[:, :blocks_per_row], True)
        row, col = kept.nonzero(as_tuple=True)
        return cls(nn.Parameter(tiles[row, col]), _offsets(kept.sum(1)), col.to(torch.int32))

    @classmethod
    def random(
        cls,
        n: int,
        *,
        blocks_per_row: int,
        block_size: int = 32,
        std: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> BlockSparse:
        """N x N with the same number of blocks in each block row, at random columns; nothing dense is ever made.

        Each block row draws one column from each of ``blocks_per_row`` equal ranges of columns, which makes them
        distinct. Values are normal with standard deviation ``std``; std = 0 gives zeros that are stored.
        """
        rows = _block_rows(n, block_size)
        _check_per_row(blocks_per_row, rows)
        cols = _random_cols(rows, rows, blocks_per_row, generator, device)
        blocks = torch.empty(rows * blocks_per_row, block_size, block_size, device=device, dtype=dtype)
        blocks.normal_(0.0, std, generator=generator) if std else blocks.zero_()
        return cls(nn.Parameter(blocks), _offsets(torch.full((rows,), blocks_per_row, device=device)), cols)

    def grown(self, n: int, *, blocks_per_row: int, generator: torch.Generator | None = None) -> BlockSparse:
        """This matrix with n more neurons at the end, copied: the Z blocks there are, then those of the new block rows.

        Args: n, a multiple of P; blocks_per_row, zero blocks of each new block row, at random columns of the whole new
            matrix as ``random`` draws them; generator, on any device; None: torch's own on the CPU.
        Raises: ValueError if n or blocks_per_row is not allowed.
        """
        p, old = self.block_size, self.row_offsets.numel() - 1
        if n < p or n % p:
            raise ValueError(f"n must be a positive multiple of block_size={p}, got {n}")
        new = n // p
        _check_per_row(blocks_per_row, old + new)
        device = "cpu" if generator is None else generator.device
        cols = _random_cols(new, old + new, blocks_per_row, generator, device).to(self.cols)
        offsets = torch.arange(1, new + 1).to(self.row_offsets) * blocks_per_row + self.row_offsets[-1]
        blocks = self.blocks.detach()
        blocks = torch.cat([blocks, blocks.new_zeros(len(cols), p, p)])
        return self._like(blocks, torch.cat([self.row_offsets, offsets]), torch.cat([self.cols, cols]))

    def selected(self, rows: Tensor) -> tuple[BlockSparse, Tensor]:
        """The matrix among some of the groups of P neurons, copied: its i-th block row and column are rows[i] here.

        Args: rows, 1-D int64, ascending without repeats, at least one of 0..N/P-1.
        Returns: the matrix, whose block rows hold the blocks between groups that are kept, and slot (Z',) int64: which
            of the Z blocks here each of its blocks is.
        Raises: ValueError if rows is not as above.
        """
        last = self.row_offsets.numel() - 2
        if rows.dtype != torch.int64 or rows.dim() != 1 or not rows.numel() or bool((rows.diff() <= 0).any()):
            raise ValueError(f"rows must be 1-D int64, ascending without repeats, got {rows.dtype} {tuple(rows.shape)}")
        if int(rows[0]) < 0 or int(rows[-1]) > last:
            raise ValueError(f"rows must be in 0..{last}, got {int(rows[0])}..{int(rows[-1])}")
        place = torch.full_like(self.row_offsets[1:], -1, dtype=torch.int64)
        place[rows] = torch.arange(len(rows), device=rows.device)
        cols, row = place[self.cols.long()], place[_rows(self.row_offsets)]
        slot = ((row >= 0) & (cols >= 0)).nonzero().squeeze(1)
        per_row = torch.zeros_like(rows).index_add_(0, row[slot], torch.ones_like(slot))
        offsets = _offsets(per_row).to(self.row_offsets.dtype)
        return self._like(self.blocks.detach()[slot], offsets, cols[slot].to(self.cols.dtype)), slot

    def _like(self, blocks: Tensor, row_offsets: Tensor, cols: Tensor) -> BlockSparse:
        if isinstance(self.blocks, nn.Parameter):
            blocks = nn.Parameter(blocks, requires_grad=self.blocks.requires_grad)
        return BlockSparse(blocks, row_offsets, cols)

    def to_dense(self) -> Tensor:
        """(N, N) with zeros for the blocks that are not stored; differentiable with respect to ``blocks``."""
        rows, p = self.row_offsets.numel() - 1, self.block_size
        tiles = self.blocks.new_zeros(rows, rows, p, p).index_put(
            (_rows(self.row_offsets), self.cols.long()), self.blocks
        )
        return tiles.transpose(1, 2).reshape(self.shape)

    def to_sparse_bsr(self) -> Tensor:
        """The same matrix as a torch sparse BSR tensor that shares the memory of ``blocks``."""
        return torch.sparse_bsr_tensor(self.row_offsets, self.cols, self.blocks.detach(), self.shape)

    @classmethod
    def from_sparse_bsr(cls, matrix: Tensor) -> BlockSparse:
        """From a square torch sparse BSR tensor with square blocks; shares its memory."""
        if matrix.layout != torch.sparse_bsr:
            raise ValueError(f"matrix must be a torch.sparse_bsr tensor, got layout {matrix.layout}")
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, got shape {tuple(matrix.shape)}")
        return cls(nn.Parameter(matrix.values().detach()), matrix.crow_indices(), matrix.col_indices())

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Loads another layout too, also one with more or fewer blocks; a layout that is none is an error."""
        given = [state_dict.get(prefix + name) for name in ("blocks", "row_offsets", "cols")]
        if all(isinstance(x, Tensor) and not x.is_meta for x in given):
            try:
                _check_layout(*given)
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix}{error}")
                return
            fits = given[0].shape[1:] == self.blocks.shape[1:] and given[1].shape == self.row_offsets.shape
            if fits and given[0].shape[0] != self.blocks.shape[0]:
                self.blocks.grad = None
                self.blocks.data = self.blocks.new_empty(given[0].shape[0], *self.blocks.shape[1:])
                self.cols = self.cols.new_empty(given[0].shape[0])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self._search_steps = _search_steps(self.row_offsets)

    def extra_repr(self) -> str:
        z, p, n = self.blocks.shape[0], self.block_size, self.shape[0]
        return f"({n}, {n}), {z} blocks of {p} x {p} ({z * p * p / n**2:.2%} stored), {self.blocks.dtype}"


def _block_rows(n: int, block_size: int) -> int:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    if n < block_size or n % block_size:
        raise ValueError(f"block_size must divide the number of neurons {n}, got {block_size}")
    return n // block_size


def _offsets(per_row: Tensor) -> Tensor:
    return torch.cat([per_row.new_zeros(1), per_row.cumsum(0)]).to(torch.int32)


def _check_per_row(blocks_per_row: int, rows: int) -> None:
    if not 1 <= blocks_per_row <= rows:
        raise ValueError(f"blocks_per_row must be in 1..{rows} (n / block_size), got {blocks_per_row}")


def _random_cols(
    rows: int, total: int, per_row: int, generator: torch.Generator | None, device: torch.device | str | None
) -> Tensor:
    """Block columns, ascending within a row, one from each of per_row equal ranges of 0..total-1: (rows * per_row,)."""
    place = torch.rand(rows, per_row, generator=generator, device=device, dtype=torch.float64)
    edges = torch.arange(per_row + 1, device=device, dtype=torch.int64) * total // per_row
    return (edges[:-1] + (place * edges.diff()).long()).to(torch.int32).flatten()
