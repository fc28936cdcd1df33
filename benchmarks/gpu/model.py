"""Whole models: SPROUT's training step and inference (T11), BioHama's step, a pool of a million neurons (T7)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sprout import BrainLikeSprout, SproutConfig

from .. import memory
from ..measure import captured, replay_seconds, seconds
from ..naive_sprout import fused_operations, naive_operations
from ..table import amount, duration
from .journal import FAILED, LeftOut, Row
from .races import forget
from .setting import Rows, Setting
from .targets import entry, told
from .timing import REPLAYS, WARM_UP, eager_seconds

WINDOW, ETA = 64, 0.01
MILLION = 1_048_576
LOSS_TOLERANCE = 1e-2  # ours against the naive model: float32 and another choice of a few neurons
Step = Callable[[], Any]


def build(setting: Setting, **changes: Any) -> BrainLikeSprout:
    """A SPROUT of the targets' size on the device, its connections not zero."""
    sizes: dict[str, Any] = {"n_neurons": 4096, "initial_sparsity": 128, "final_sparsity": 128}
    if setting.rehearsal:
        sizes = {"n_neurons": 64, "initial_sparsity": 3, "final_sparsity": 4, "d_state": 16, "n_heads": 2}
        sizes |= {"n_encoder_layers": 1, "n_interaction_steps": 1, "recruits_per_step": 2, "min_active": 2}
        sizes |= {"backend": "triton"}
    torch.manual_seed(0)
    model = BrainLikeSprout(SproutConfig(**sizes | changes)).to(setting.device)
    strength = model.pool.connection_strength
    torch.nn.init.normal_(strength if isinstance(strength, Tensor) else strength.blocks, 0, 0.1)
    return model


def tokens_for(setting: Setting, batch: int) -> Tensor:
    shape = (2, 8) if setting.rehearsal else (batch, WINDOW)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1)).to(setting.device)


def training_step(model: BrainLikeSprout, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Forward, backward and plasticity; the loss. No optimizer takes part."""
    with torch.autocast(tokens.device.type, dtype) if dtype else nullcontext():
        settled = model.settle(tokens)
        loss = F.cross_entropy(model.decoder(settled.states, settled.history[-1]).float(), tokens[:, 0])
    torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    model.plasticity([p._replace(gate=p.gate.detach().float()) for p in settled.history], eta=ETA)
    return loss.detach()


def inference(model: BrainLikeSprout, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
    with torch.no_grad(), torch.autocast(tokens.device.type, dtype) if dtype else nullcontext():
        return model(tokens)


WAYS: dict[str, Callable[[], AbstractContextManager]] = {
    "ours": nullcontext,
    "gather + einsum model": naive_operations,
    "embedding_bag + SDPA model": fused_operations,
}


def one_way(
    setting: Setting, what: Callable[..., Tensor], batch: int, way: str, dtype: torch.dtype | None, mode: str
) -> Row:
    """Seconds of a call eager, and replayed from a CUDA graph; mode: eager, or a mode of torch.compile."""
    model, tokens = build(setting), tokens_for(setting, batch)
    start = copy.deepcopy(model.state_dict())
    job: Step = lambda: what(model, tokens, dtype)  # noqa: E731
    with WAYS[way]():
        if mode != "eager":
            if setting.rehearsal:
                raise LeftOut("nothing is compiled in a rehearsal")
            torch._dynamo.reset()
            job = torch.compile(job, mode=mode)
        first = float(job().float().mean())
        assert math.isfinite(first), f"the result is {first}"
        row: Row = {"result": first, "eager_s": eager_seconds(job, setting.cuda)}
        row["memory_bytes"] = memory.peak_bytes(job, True) if setting.cuda else 0
        if setting.cuda:
            row |= replayed(job, way)
    model.load_state_dict(start)
    return row | {"line": _line(row)}


def replayed(job: Step, name: str) -> Row:
    """Seconds of a replay, or why the call cannot be captured."""
    try:
        graph, _ = captured(job, name)
        for _ in range(WARM_UP):
            graph.replay()
        return {"graph_s": median(replay_seconds(graph) for _ in range(REPLAYS))}
    except Exception as error:  # a peer that waits for the device; the eager time stays
        return {"not_captured": f"{type(error).__name__}: {str(error)[:200]}"}


def _line(row: Row) -> str:
    graph = f", graph {duration(row['graph_s'])}" if "graph_s" in row else ""
    graph += ", not captured" if "not_captured" in row else ""
    return f"eager {duration(row['eager_s'])}{graph}, peak {amount(row['memory_bytes'])}"


def best(row: Row) -> float:
    """Seconds of a call in the faster of the two modes."""
    return min(row["eager_s"], row.get("graph_s", math.inf))


def conclude(rows: dict[str, Row]) -> Row:
    """T11 from the rows of this step: everyone in the mode that is faster for it, and in lines both as eager calls.

    A way whose loss differs from ours takes no part, and fails the conclusion: one of the two is wrong.
    """
    found: list[Row] = []
    lines: list[str] = []
    differ: list[str] = []
    for kind in ("float32", "bfloat16"):
        prefix = f"SPROUT step B=256 {kind} "
        timed = {
            key.removeprefix(prefix): row for key, row in rows.items() if key.startswith(prefix) and "eager_s" in row
        }
        ours = timed.pop("ours eager", None)
        if ours is None:
            continue
        for way, row in list(timed.items()):
            if abs(row["result"] - ours["result"]) > LOSS_TOLERANCE * abs(ours["result"]):
                differ.append(f"{kind}: loss {row['result']:.5g} by {way}, {ours['result']:.5g} by ours")
                del timed[way]
        what = f"SPROUT forward + backward + plasticity, 5 steps, B=256, {kind}"
        for compiled, target in ((True, 3), (False, 8)):
            peers = {way: row for way, row in timed.items() if ("compiled" in way) == compiled}
            if peers:
                way = min(peers, key=lambda way: best(peers[way]))
                found.append(entry("T11", f"{what}, against {way}", best(peers[way]) / best(ours), target))
                eager = min(row["eager_s"] for row in peers.values()) / ours["eager_s"]
                lines.append(f"{found[-1]['what']}: {eager:.2f}x where all are launched from Python")
        single = rows.get(f"SPROUT inference B=1 {kind} ours eager", {})
        if "graph_s" in single:
            what = f"SPROUT inference, B=1, {kind}, CUDA graph"
            found.append(entry("T11", what, single["graph_s"] * 1e6, 150, at_least=False, unit=" us"))
    row = told({"op": "sprout model"}, found)
    failed = {"status": FAILED, "message": "; ".join(differ)} if differ else {}
    return row | {"lines": [*row["lines"], *lines], **failed}


def biohama(setting: Setting, size: str) -> Row:
    """BioHama's training step on the task copy: loss, backward, AdamW."""
    from biohama import BioHamaConfig, BioHamaModel, training_loss
    from biohama.tasks import Batch, make_task

    task = make_task("copy")
    torch.manual_seed(0)
    make = BioHamaConfig.tiny if size == "tiny" or setting.rehearsal else BioHamaConfig
    backend = "reference" if setting.rehearsal else "auto"  # the interpreter would take minutes
    model = BioHamaModel(make(vocab_size=task.vocab_size, backend=backend)).to(setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    number = 2 if setting.rehearsal else 64
    batch = Batch(*task.sample("train", number, torch.Generator().manual_seed(0))).to(setting.device)

    def step() -> Tensor:
        loss, _ = training_loss(model, batch, 0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    losses = [float(step()) for _ in range(2 if setting.rehearsal else 10)]
    assert all(map(math.isfinite, losses)), f"losses {losses}"
    row = {"losses": losses, "batch": number, "length": batch.tokens.shape[1]}
    row |= {
        "eager_s": eager_seconds(step, setting.cuda),
        "memory_bytes": memory.peak_bytes(step, True) if setting.cuda else 0,
    }
    return row | {"line": _line(row)}


def million(setting: Setting, batch: int) -> Row:
    """A training step, AdamW and plasticity included, of a block-sparse pool; peak memory of everything together."""
    sizes: dict[str, Any] = {"connection": "block_sparse", "n_neurons": 256 if setting.rehearsal else MILLION}
    held = 0
    if setting.cuda:
        forget()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    model = build(setting, **sizes)
    optimizer, tokens = torch.optim.AdamW(model.parameters(), lr=1e-4), tokens_for(setting, batch)

    def step() -> Tensor:
        settled = model.settle(tokens)
        loss = F.cross_entropy(model.decoder(settled.states, settled.history[-1]), tokens[:, 0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.plasticity([p._replace(gate=p.gate.detach()) for p in settled.history], eta=ETA)
        return loss.detach()

    losses = [float(step()) for _ in range(1 if setting.rehearsal else 3)]
    assert all(map(math.isfinite, losses)), f"losses {losses}"
    taken = [seconds(step, setting.cuda) for _ in range(1 if setting.rehearsal else 5)]
    row: Row = {"op": "sprout model", "losses": losses, "eager_s": min(taken)}
    row["memory_bytes"] = torch.cuda.max_memory_allocated() - held if setting.cuda else 0
    what = f"training step of {sizes['n_neurons']} neurons, B={batch}, peak memory ({duration(row['eager_s'])})"
    found = entry("T7", what, row["memory_bytes"] / 1e9, 40, at_least=False, unit=" GB")
    return told(row, [found] if setting.cuda else [])


def rows(setting: Setting) -> Rows:
    dtypes = {"float32": None} | ({"bfloat16": torch.bfloat16} if setting.cuda else {})
    for kind, dtype in dtypes.items():
        for what, batch, name in (
            (training_step, 256, "step"),
            (inference, 1, "inference"),
            (training_step, 32, "step"),
        ):
            for way in WAYS:
                yield (
                    f"SPROUT {name} B={batch} {kind} {way} eager",
                    lambda a=(what, batch, way, dtype, "eager"): one_way(setting, *a),
                )
    yield "BioHama step tiny", lambda: biohama(setting, "tiny")
    yield "BioHama step default", lambda: biohama(setting, "default")
    for kind, dtype in reversed(dtypes.items()):  # bfloat16 first: compiling takes a minute or more
        for mode in ("max-autotune-no-cudagraphs", "default"):
            for way in list(WAYS)[1:]:
                yield (
                    f"SPROUT step B=256 {kind} {way} compiled {mode}",
                    lambda a=(training_step, 256, way, dtype, mode): one_way(setting, *a),
                )


def million_rows(setting: Setting) -> Rows:
    for batch in setting.few((1, 32)):
        yield f"million neurons B={batch}", lambda batch=batch: million(setting, batch)
