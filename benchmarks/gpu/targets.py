"""The targets T1 to T10 of an H200: ratios to the best peer, all replayed from CUDA graphs, in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import bio_kernels
import torch
from torch import Tensor

from .. import test_plasticity, test_weighted_rows
from ..case import Case, Contestant, Inputs, Spec, in_double
from ..table import target_line
from . import large, races
from .journal import LeftOut, Row
from .setting import Rows, Setting

BF16 = torch.bfloat16
SECTOR = 32  # bytes
RECRUITS = 16  # neurons that an interaction step may wake up
PREFIX = "SDPA", "FlexAttention"


def entry(name: str, what: str, measured: float, target: float, *, at_least: bool = True, unit: str = "x") -> Row:
    """A target as report.py reads it."""
    reached = measured >= target if at_least else measured <= target
    told = {"name": name, "what": what, "measured": measured, "target": target}
    return told | {"at_least": at_least, "unit": unit, "reached": reached}


def told(row: Row, entries: list[Row]) -> Row:
    return row | {"targets": entries, "lines": [target_line(e) for e in entries]}


def ratio_to(row: Row, *names: str) -> tuple[float, str] | None:
    """(ratio, peer and how): how much faster ours is than the best peer whose name starts so.

    Everyone as a CUDA graph where ours is one; a peer that could not be captured by its eager time, which is then said.
    """
    graph, eager = row.get("graph_ratios") or {}, row["ratios"]
    chosen = {peer: r for peer, r in eager.items() if not names or peer.startswith(names)}
    launched = "all launched from Python"
    if graph:
        slower = row["ours_s"] / row["graph_s"]["ours"]  # an eager time of a peer, against the graph of ours
        chosen = {peer: graph.get(peer, r * slower) for peer, r in chosen.items()}
    best = min(chosen, key=chosen.__getitem__, default=None)
    if best is None:
        return None
    if graph:
        launched = "CUDA graphs" if best in graph else "which could not be captured, launched from Python"
    return chosen[best], f"{best}, {launched}"


def against(row: Row, name: str, what: str, target: float, *peers: str) -> list[Row]:
    """The target of a ratio; none where no such peer ran."""
    found = ratio_to(row, *peers)
    return [] if found is None else [entry(name, f"{what}, best peer {found[1]}", found[0], target)]


def share(row: Row, name: str, what: str, target: float) -> list[Row]:
    reached = row.get("graph_roofline")
    return [] if reached is None else [entry(name, f"{what}, share of the roofline", reached, target, unit="")]


def raced(setting: Setting, op: str, spec: Spec) -> Row:
    races.forget()
    spec = races.tiny(spec, op) if setting.rehearsal else replace(spec, compiled=True)
    return races.race(setting, races.MODULES[op].case(spec, setting.session()))


def attention(setting: Setting, batch: int, direction: str, target: float) -> Row:
    row = raced(setting, "sparse_attention", Spec(batch, heads=4, dtype=BF16, direction=direction))
    name, what = ("T1", "attention forward") if direction == "forward" else ("T2", "attention forward + backward")
    what = f"{what}, bf16, B={batch} K=128 N=4096 H=4"
    found = against(row, name, what, target, *PREFIX)
    bound = name == "T1" and batch >= 256  # of smaller batches launching is most of it
    return told(row, found + (share(row, name, what, 0.6) if bound else []))


def huge_attention(setting: Setting, flex: bool) -> Row:
    """T3: the gradient of ours is sparse, those of the peers N x N. FlexAttention apart: it may fail at that size."""
    if flex and setting.rehearsal:
        raise LeftOut("FlexAttention is not compiled in a rehearsal")
    races.forget()
    row = races.race(setting, large.attention_case(setting, flex))
    what = f"attention forward + backward, {row['dtype']}, {row['shape']}"
    found = against(row, "T3", what, 20)
    if row["memory_ratio"]:
        found.append(entry("T3", f"{what}, memory / that of the peer", 1 / row["memory_ratio"], 0.05, at_least=False))
    return told(row, found)


def select_and_gather(setting: Setting, batch: int, n: int, width: int, target: float) -> Row:
    row = raced(setting, "topk_gather", Spec(batch, n=n, width=width, direction="forward"))
    among = "" if any(peer.startswith("flashinfer") for peer in row["ratios"]) else " (flashinfer is not installed)"
    return told(row, against(row, "T4", f"top-k and gather, B={batch} N={n} K=128 D={width}{among}", target))


def select(setting: Setting) -> Row:
    """T5 is about flashinfer; a table of one column is as near as the public operation comes to selecting alone."""
    row = raced(setting, "topk_gather", Spec(256, n=4096, width=1, direction="forward"))
    found = against(row, "T5", "select alone, B=256 N=4096 K=128", 1.0, "flashinfer")
    return told(row, found) | ({} if found else {"line": "T5 not decided: flashinfer is not installed"})


def oja(setting: Setting) -> Row:
    row = raced(setting, "update_strength_", Spec(256, direction="update"))
    what = "Oja's rule, dense, B=256 K=128 N=4096"
    found = against(row, "T6", what, 15, "index_put_") + against(row, "T6", what, 2, "decay + rank-B")
    if "graph_s" in row:
        idx = test_plasticity.sets(Spec(256, direction="update").inputs, setting.device)[0]["idx"]
        least = 2 * SECTOR * sectors(idx, 4096) / races.ceiling(setting).copy
        row["sector_roofline"] = least / row["graph_s"]["ours"]
        found.append(
            entry("T6", f"{what}, share of the copy's rate, in sectors", row["sector_roofline"], 0.75, unit="")
        )
    return told(row, found)


def sectors(idx: Tensor, n: int) -> int:
    """How many sectors of a float32 (N, N) hold a pair of neurons of idx (B, K) that were active together.

    Memory is read and written a sector at a time.
    """
    place = (idx[:, :, None] * n + idx[:, None, :]) * 4 // SECTOR
    return place.unique().numel()


def sparse_oja(setting: Setting, n: int) -> Row:
    row = races.race(setting, large.update_case(setting, n))
    return told(row, against(row, "T7", f"Oja's rule, block-sparse, {row['shape']}", 3, "sampled_addmm"))


def decoder(setting: Setting, direction: str, target: float) -> Row:
    row = raced(setting, "weighted_rows", Spec(256, dtype=BF16, width=256, direction=direction))
    return told(row, against(row, "T10", f"decoder {direction}, bf16, B=256 K=128 D=256", target))


def spread_case(setting: Setting, spec: Spec) -> Case:
    """Activation spreads along the connections, and the most excited neurons are found: their drives, highest first."""
    session = setting.session()
    shared = test_weighted_rows.sets(spec, setting.device)
    column = torch.zeros(spec.n, 1, device=setting.device, dtype=spec.dtype)
    recruits = min(RECRUITS, spec.k)

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        drive = bio_kernels.weighted_rows(x["table"], x["idx"], x["weight"])
        return (bio_kernels.topk_gather(drive, column, recruits).gate,)

    def on(spread: Callable[[Inputs], tuple[Tensor, ...]]) -> Callable[[Inputs], tuple[Tensor, ...]]:
        return lambda x: (torch.topk(spread(x)[0], recruits, dim=1).values,)

    def truth() -> tuple[list[Tensor], dict[str, Tensor]]:
        x = {name: in_double(value) for name, value in shared[0].items()}
        drive = bio_kernels.weighted_rows(x["table"], x["idx"], x["weight"], backend="dense").detach()
        return [drive.topk(recruits, dim=1).values], {}

    moved, flops = test_weighted_rows.cost(spec, shared[0]["idx"])
    case = Case(
        "spread and recruit", spec, shared, Contestant("ours", ours, deterministic=True), [], truth, moved, flops
    )
    case.canonical = lambda out: (out[0].sort(dim=1, descending=True).values,)
    found = test_weighted_rows.contestants(spec, session, case)
    case.peers = [Contestant(f"{peer.name} + topk", on(peer.run)) for peer in found]
    return case


def spread(setting: Setting, batch: int) -> Row:
    races.forget()
    spec = Spec(batch, dtype=BF16, width=4096, direction="forward", compiled=True)
    case = spread_case(setting, races.tiny(spec, "weighted_rows") if setting.rehearsal else spec)
    row = races.race(setting, case)
    return told(row, against(row, "T8", f"spread and recruit, bf16, B={batch} K=128 N=4096", 2))


def gru(_setting: Setting) -> Row:
    raise LeftOut("T9 not built: a step uses nn.GRUCell; a fused cell would have to beat it by 1.4x to be kept")


def rows(setting: Setting) -> Rows:
    def row(function: Callable[..., Row], *args: Any) -> Callable[[], Row]:
        return lambda: function(setting, *args)

    for batch, forward in ((256, 2.5), (32, 2.0), (1, 1.5)):
        yield f"T1 attention forward B={batch}", row(attention, batch, "forward", forward)
    yield "T2 attention forward + backward B=256", row(attention, 256, "both", 6.0)
    for batch, n, width, target in ((256, 4096, 256, 2.0), (32, 65_536, 256, 1.5), (32, 1_048_576, 64, 1.2)):
        yield f"T4 top-k and gather B={batch} N={n}", row(select_and_gather, batch, n, width, target)
    yield "T5 select", row(select)
    yield "T6 Oja dense", row(oja)
    yield "T10 decoder forward", row(decoder, "forward", 1.5)
    yield "T10 decoder forward + backward", row(decoder, "both", 3.0)
    for batch in (1, 32, 256):
        yield f"T8 spread and recruit B={batch}", row(spread, batch)
    yield "T3 attention N=65536", row(huge_attention, False)
    for n in (65_536, 1_048_576):
        yield f"T7 Oja block-sparse N={n}", row(sparse_oja, n)
    yield "T9 GRU", row(gru)
    yield "T3 attention N=65536, FlexAttention", row(huge_attention, True)
