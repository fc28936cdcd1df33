"""Backward pass of attention among the active neurons (forward pass and notation: _attention).

    P_ij  = gate_j exp(s_ij - lse_i);   delta_i = grad_out_i . out_i;   dS_ij = P_ij (grad_out_i . v_j - delta_i)
    dq_i  = scale sum_j dS_ij k_j;   dk_j = scale sum_i dS_ij q_i;   dv_j = sum_i P_ij grad_out_i
    dbias[b, j, i] = sum_h dS_ij;    dgate_j = sum_h,i exp(s_ij - lse_i) (grad_out_i . v_j - delta_i)

Layouts as in the forward pass; dbias (B, K, K) float32 [sender, receiver], delta (B, H, K) and dgate (B, K) float32.
The strengths are gathered once into (B, K, K) (_pairs), which both kernels read contiguously. A program of the row
kernel owns BLOCK_M receivers of a sample (dq, delta), one of the column kernel BLOCK_M senders (dk, dv, dbias, dgate);
both loop over the heads. The probabilities are computed twice so that every output has one owner and needs no atomics
(equations: T. Dao et al., "FlashAttention", arXiv:2205.14135, 2022, appendix B.2). A silent sender has P = dS = 0, and
the finite dgate of the formula.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention import ANY, LOG2E, bias_tile, launch_shape, load_rows, log_gates, row_products, store_rows
from ._index import Storage
from ._pairs import gather_pairs, valid_slots

# As FORWARD in _attention; for the column kernel BLOCK_M are senders and BLOCK_N receivers.
ROWS = {
    (2, 128, 128): (32, 128, 8, 2),
    (2, 256, 64): (32, 256, 8, 2),
    (2, ANY, 128): (32, 64, 8, 1),
    (2, ANY, ANY): (32, 32, 8, 1),
    (4, ANY, 128): (32, 32, 8, 1),
    (4, ANY, ANY): (16, 32, 8, 1),
}
COLUMNS = {
    (2, 128, 128): (32, 128, 8, 2),
    (2, 256, 64): (16, 256, 8, 2),
    (2, ANY, 128): (32, 64, 8, 2),
    (2, ANY, ANY): (32, 32, 8, 1),
    (4, ANY, 64): (32, 32, 8, 1),
    (4, ANY, ANY): (16, 16, 8, 1),
}


@triton.jit
def _attention_bwd_rows_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, gate_ptr, count_ptr, dq_ptr, delta_ptr, K, scale,
    H: tl.constexpr, D: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(K, BLOCK_M)
    pid_b = pid // blocks
    offs_m = (pid % blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)  # receivers
    valid = valid_slots(count_ptr, pid_b, K)
    if gate_ptr is not None:
        gate_ptr += pid_b * K
    end = BLOCK_N if ONE_TILE else valid
    if ONE_TILE:
        offs_n = tl.arange(0, BLOCK_N)  # senders
        log_gate = log_gates(gate_ptr, offs_n, valid)
        if bias_ptr is not None:
            bias = tl.trans(bias_tile(bias_ptr + pid_b * K * K, offs_n, offs_m, K))  # (BLOCK_M, BLOCK_N), for all heads
    for head in range(H):
        row = (pid_b * H + head) * K
        lse = tl.load(lse_ptr + row + offs_m, mask=offs_m < valid, other=float("inf"))  # (BLOCK_M,)
        heard = lse != float("inf")  # some sender spoke to this receiver
        out = load_rows(out_ptr + row * D, offs_m, heard, 0, D, BLOCK_D)  # (BLOCK_M, BLOCK_D), as are q, dout and dq
        dout = load_rows(dout_ptr + row * D, offs_m, heard, 0, D, BLOCK_D)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, end, BLOCK_N):
            if not ONE_TILE:
                offs_n = start + tl.arange(0, BLOCK_N)
                log_gate = log_gates(gate_ptr, offs_n, valid)
                if bias_ptr is not None:
                    bias = tl.trans(bias_tile(bias_ptr + pid_b * K * K, offs_n, offs_m, K))
            speaks = log_gate != float("-inf")
            s = row_products(
                q_ptr + row * D, offs_m, heard, k_ptr + row * D, offs_n, speaks, D, CHUNK, PRECISION, BLOCK_M, BLOCK_N
            )
            s = s * (scale * LOG2E) + (log_gate[None, :] - lse[:, None] * LOG2E)
            if bias_ptr is not None:
                s += bias.to(tl.float32) * LOG2E
            dp = row_products(
                dout_ptr + row * D, offs_m, heard, v_ptr + row * D, offs_n, speaks,
                D, CHUNK, PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            ds = tl.where(speaks[None, :], tl.exp2(s) * (dp - delta[:, None]), 0.0)  # rows: masked when stored
            k = load_rows(k_ptr + row * D, offs_n, speaks, 0, D, BLOCK_D)  # (BLOCK_N, BLOCK_D)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        # Writes: each program owns its receivers.
        store_rows(dq_ptr + row * D, tl.where(heard[:, None], dq * scale, 0.0), offs_m, offs_m < K, D, BLOCK_D)
        tl.store(delta_ptr + row + offs_m, delta, mask=offs_m < K)


@triton.jit
def _attention_bwd_columns_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, bias_ptr, gate_ptr, count_ptr,
    dk_ptr, dv_ptr, dbias_ptr, dgate_ptr, K, scale,
    H: tl.constexpr, D: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(K, BLOCK_M)
    pid_b = pid // blocks
    offs_m = (pid % blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)  # senders
    valid = valid_slots(count_ptr, pid_b, K)
    mask_m = offs_m < valid
    if gate_ptr is not None:
        gate_ptr += pid_b * K
    log_gate = log_gates(gate_ptr, offs_m, valid)
    speaks = log_gate != float("-inf")
    log_weight = tl.where(speaks, log_gate, 0.0)  # a silent sender's row holds exp(s - lse), what its dgate needs
    end = BLOCK_N if ONE_TILE else valid
    offs_n = tl.arange(0, BLOCK_N)  # receivers
    dgate = tl.zeros((BLOCK_M,), tl.float32)
    if bias_ptr is not None:
        bias_ptr += pid_b * K * K
        dbias_ptr += pid_b * K * K
        if ONE_TILE:
            bias = bias_tile(bias_ptr, offs_m, offs_n, K)  # (BLOCK_M, BLOCK_N), for all heads
            dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for head in range(H):
        row = (pid_b * H + head) * K
        dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, end, BLOCK_N):
            if not ONE_TILE:
                offs_n = start + tl.arange(0, BLOCK_N)
            lse = tl.load(lse_ptr + row + offs_n, mask=offs_n < valid, other=float("inf"))  # (BLOCK_N,)
            heard = lse != float("inf")
            delta = tl.load(delta_ptr + row + offs_n, mask=heard, other=0.0)
            s = row_products(
                k_ptr + row * D, offs_m, mask_m, q_ptr + row * D, offs_n, heard, D, CHUNK, PRECISION, BLOCK_M, BLOCK_N
            )
            s = s * (scale * LOG2E) + (log_weight[:, None] - lse[None, :] * LOG2E)
            if bias_ptr is not None:
                s += (bias if ONE_TILE else bias_tile(bias_ptr, offs_m, offs_n, K)).to(tl.float32) * LOG2E
            p = tl.where(heard[None, :], tl.exp2(s), 0.0)  # rows of silent or invalid senders: masked when stored
            dp = row_products(
                v_ptr + row * D, offs_m, mask_m, dout_ptr + row * D, offs_n, heard,
                D, CHUNK, PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            ds = tl.where(heard[None, :], p * (dp - delta[None, :]), 0.0)
            if gate_ptr is not None:
                dgate += tl.sum(ds, 1)
            dout = load_rows(dout_ptr + row * D, offs_n, heard, 0, D, BLOCK_D)  # (BLOCK_N, BLOCK_D), as is q
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            q = load_rows(q_ptr + row * D, offs_n, heard, 0, D, BLOCK_D)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            if bias_ptr is not None:
                if ONE_TILE:
                    dbias += ds
                else:
                    pair = offs_m[:, None] * K + offs_n[None, :]
                    inside = speaks[:, None] & (offs_n < K)[None, :]
                    # Writes: this program owns its senders' rows; the barrier orders one head after the other.
                    tl.store(dbias_ptr + pair, tl.load(dbias_ptr + pair, mask=inside, other=0.0) + ds, mask=inside)
                    tl.debug_barrier()
        # Writes: each program owns its senders. Rows of silent senders served their dgate only.
        store_rows(dk_ptr + row * D, tl.where(speaks[:, None], dk * scale, 0.0), offs_m, offs_m < K, D, BLOCK_D)
        store_rows(dv_ptr + row * D, tl.where(speaks[:, None], dv, 0.0), offs_m, offs_m < K, D, BLOCK_D)
    if gate_ptr is not None:
        # Rows of speaking senders hold gate_j times the sum.
        dgate = tl.where(mask_m, dgate * tl.exp2(-log_weight), 0.0)
        tl.store(dgate_ptr + pid_b * K + offs_m, dgate, mask=offs_m < K)
    if bias_ptr is not None and ONE_TILE:
        inside = (offs_m < K)[:, None] & (offs_n < K)[None, :]
        tl.store(dbias_ptr + offs_m[:, None] * K + offs_n[None, :], tl.where(speaks[:, None], dbias, 0.0), mask=inside)


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, idx: Tensor, storage: Storage | None, gate: Tensor | None,
    count: Tensor | None, scale: float, out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dq, dk, dv, dbias (B, K, K) or None without storage, dgate (B, K) or None without gate); 0 in invalid slots."""
    size = q.shape[2]
    rows_grid, rows = launch_shape(ROWS, q)
    columns_grid, columns = launch_shape(COLUMNS, q)
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    bias = gather_pairs(storage, idx, count) if storage is not None else None
    new_dbias = torch.empty if columns["ONE_TILE"] else torch.zeros  # several tiles are summed in place
    dbias = None if storage is None else new_dbias(q.shape[0], size, size, dtype=torch.float32, device=q.device)
    dgate = torch.empty(gate.shape, dtype=torch.float32, device=q.device) if gate is not None else None
    if q.numel() == 0:
        return dq, dk, dv, *(None if x is None else x.zero_() for x in (dbias, dgate))
    common = {
        "dout_ptr": grad_out, "q_ptr": q, "k_ptr": k, "v_ptr": v, "lse_ptr": lse, "delta_ptr": delta, "bias_ptr": bias,
        "gate_ptr": gate, "count_ptr": count, "K": size, "scale": scale,
    }  # fmt: skip
    _attention_bwd_rows_kernel[rows_grid](out_ptr=out, dq_ptr=dq, **common, **rows)
    _attention_bwd_columns_kernel[columns_grid](
        dk_ptr=dk, dv_ptr=dv, dbias_ptr=dbias, dgate_ptr=dgate, **common, **columns
    )
    return dq, dk, dv, dbias, dgate
