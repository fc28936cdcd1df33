"""What one would use instead, each at its best: plain sparse PyTorch, its fused functions, and its compiler.

Every function takes the Inputs of a case and returns a tuple of tensors. Nothing here calls bio_kernels.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .case import Contestant, Inputs

# ------------------------------------------------------------------------------------------------- plain tensors


def naive_topk_gather(score: Tensor, table: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    gate, idx = torch.topk(score, k, dim=1)
    return gate, idx, table[idx]


def naive_weighted_rows(table: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bk,bkm->bm", weight, table[idx])


def gathered_bias(matrix: Tensor, idx: Tensor, gate: Tensor | None) -> Tensor:
    """(B, 1, i, j): strength of the connection from j to i, plus the logarithm of j's gate."""
    bias = matrix[idx[:, None, :], idx[:, :, None]]
    return (bias if gate is None else bias + gate.log()[:, None, :])[:, None]


def naive_attention(q: Tensor, k: Tensor, v: Tensor, matrix: Tensor, idx: Tensor, gate: Tensor) -> Tensor:
    score = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5 + gathered_bias(matrix, idx, gate)
    return torch.einsum("bhij,bhjd->bhid", score.softmax(-1), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, matrix: Tensor, idx: Tensor, gate: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=gathered_bias(matrix, idx, gate))


def embedding_bag(table: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(idx, table, per_sample_weights=weight, mode="sum")


def naive_update(
    matrix: Tensor, idx: Tensor, pre: Tensor, post: Tensor, eta: float, decay: float, bound: float
) -> Tensor:
    """index_put_(accumulate=True) of the changes of all pairs, then a clamp of those pairs."""
    row, col = torch.broadcast_tensors(idx[:, :, None], idx[:, None, :])
    pre, post = pre[:, :, None], post[:, None, :]
    change = pre * post - decay * post.square() * matrix[row, col]
    matrix.index_put_((row, col), change * (eta / idx.shape[0]), accumulate=True)
    matrix[row, col] = matrix[row, col].clamp(-bound, bound)
    return matrix


def rank_b_update(
    matrix: Tensor, idx: Tensor, pre: Tensor, post: Tensor, eta: float, decay: float, bound: float
) -> Tensor:
    """Silent neurons as zeros, then two dense rank-B products: decay of the old values, addmm_ of the new ones.

    The clamp meets all values, not only pairs that were active together: the same where all lie within bound before.
    """
    n, batch = matrix.shape[0], idx.shape[0]
    zeros = pre.new_zeros(3, batch, n)
    active, sender, receiver = zeros.scatter_(2, idx.expand(3, -1, -1), torch.stack([torch.ones_like(pre), pre, post]))
    if decay:
        matrix.mul_(1 - eta / batch * decay * (active.T @ receiver.square()))
    return matrix.addmm_(sender.T, receiver, alpha=eta / batch).clamp_(-bound, bound)


def sampled_update(
    csr: Tensor, idx: Tensor, pre: Tensor, post: Tensor, eta: float, decay: float, bound: float
) -> Tensor:
    """The same products by torch.sparse.sampled_addmm, where a CSR matrix stores a value; in place on its values."""
    n, batch = csr.shape[0], idx.shape[0]
    zeros = pre.new_zeros(3, batch, n)
    active, sender, receiver = zeros.scatter_(2, idx.expand(3, -1, -1), torch.stack([torch.ones_like(pre), pre, post]))
    values = csr.values()
    forget = torch.sparse.sampled_addmm(csr, active.T.contiguous(), receiver.square(), beta=0.0).values()
    learnt = torch.sparse.sampled_addmm(csr, sender.T.contiguous(), receiver, beta=0.0).values()
    values.add_(learnt - decay * forget * values, alpha=eta / batch).clamp_(-bound, bound)
    return csr


# ------------------------------------------------------------------------------------------------- FlexAttention


def flex_attention(compiled: Callable, x: Inputs) -> tuple[Tensor, ...]:
    """FlexAttention that reads the bias from the whole matrix inside its kernel."""
    matrix, idx, log_gate = x["matrix"], x["idx"], x["gate"].log()

    def score_mod(score, b, h, i, j):
        return score + matrix[idx[b, j], idx[b, i]] + log_gate[b, j]

    return (compiled(x["q"], x["k"], x["v"], score_mod=score_mod),)


# ------------------------------------------------------------------------------------------------- the compiler


class CompileBudget:
    """Makes compiled peers while there is time for it."""

    def __init__(self, total_s: float) -> None:
        self.left = total_s

    def reason(self, wanted: bool, device: str) -> str | None:
        """Why nothing can be compiled now, or None."""
        if not wanted:
            return "compiled for one row of each operation only; --full compiles all"
        if self.left <= 0:
            return "time for compilation is used up, see --compile-budget"
        if device == "cpu" and not _has_cpp_compiler():
            return "torch.compile needs a C++ compiler on a CPU, and none was found"
        return None

    def compile(self, name: str, function: Callable, leaves: tuple[str, ...], **options) -> Contestant:
        """torch.compile of a function of the Inputs."""
        torch._dynamo.config.recompile_limit = 256  # every row has shapes of its own
        return self.timed(name, torch.compile(function, dynamic=False), leaves, **options)

    def timed(self, name: str, function: Callable, leaves: tuple[str, ...], **options) -> Contestant:
        """A contestant that compiles in its first call, in the parity check: that time counts against the budget."""

        def run(x: Inputs) -> tuple[Tensor, ...]:
            begin = time.perf_counter()
            out = function(x)
            taken = time.perf_counter() - begin
            if taken > 1:  # no call of these sizes takes that long: it compiled
                self.left -= taken
            return out

        return Contestant(name, run, leaves, **options)


def _has_cpp_compiler() -> bool:
    from torch._inductor import cpp_builder

    try:
        return bool(cpp_builder.get_cpp_compiler())
    except Exception as error:  # InvalidCxxCompiler is not a public name
        if type(error).__name__ == "InvalidCxxCompiler":
            return False
        raise


# ------------------------------------------------------------------------------------------------- GPU only


def sdpa_backends(cuda: bool, leaves: tuple[str, ...]) -> list[Contestant]:
    """scaled_dot_product_attention once for each of its backends (on a GPU: the choice is made there)."""
    if not cuda:
        return []

    def pinned(backend: SDPBackend) -> Contestant:
        def run(x: Inputs) -> tuple[Tensor, ...]:
            with sdpa_kernel(backend):
                return (sdpa(x["q"], x["k"], x["v"], x["matrix"], x["idx"], x["gate"]),)

        return Contestant(f"SDPA {backend.name.lower()}", run, leaves)

    kinds = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    return [pinned(kind) for kind in kinds]


def flashinfer_topk(cuda: bool) -> tuple[Contestant | None, str]:
    """flashinfer.top_k and an index_select where it is installed, or why not."""
    if not cuda:
        return None, "needs a GPU"
    if importlib.util.find_spec("flashinfer") is None:
        return None, "flashinfer is not installed"
    import flashinfer  # pyright: ignore[reportMissingImports]

    def run(x: Inputs) -> tuple[Tensor, ...]:
        gate, idx = flashinfer.top_k(x["score"], x["k"])
        idx = idx.long()
        return gate, idx, F.embedding(idx, x["table"])

    return Contestant("flashinfer.top_k + embedding", run, directions=("forward",)), ""


def cutedsl_note(cuda: bool) -> str:
    """Whether torch.topk is its CuTeDSL kernel here: it takes part silently, so the row has to say so."""
    if not cuda:
        return "torch.topk is ATen's: its CuTeDSL kernel needs a GPU"
    missing = [name for name in ("cutlass", "tvm_ffi") if importlib.util.find_spec(name) is None]
    if missing:
        return f"torch.topk is ATen's: its CuTeDSL kernel needs {' and '.join(missing)}, not installed"
    return "torch.topk may use its CuTeDSL kernel (nvidia-cutlass-dsl and apache-tvm-ffi are installed)"
