"""The SPROUT model: an interaction step (target P1), forward and backward (P2), a step against dense (P4, P7)."""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch
from bio_kernels.testing import TOLERANCE, relative_error
from torch import Tensor

import sprout
from sprout import BrainLikeSprout, SproutConfig, data

from . import measure, memory
from .case import Case, Contestant, Inputs, Spec
from .naive_sprout import dense_fused_operations, fused_operations, naive_operations

BATCH, WINDOW = 4, 64
N, K = 4096, 128
SHAPE: dict[str, Any] = {"n_neurons": N, "d_state": 256, "n_heads": 8, "initial_sparsity": K, "final_sparsity": K}
NAIVE = "gather + einsum model"
PLAIN = {NAIVE: naive_operations, "embedding_bag + SDPA model": fused_operations}
FUSED = "dense with fused attention"
STEP_SLACK = 10  # a normalisation, attention, a GRU and a gate in a row
STEP_LEAVES = ("states", "score", "drift", "key", "value", "signatures", "strength")


def build(seed: int = 0, **changes: Any) -> BrainLikeSprout:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BrainLikeSprout(SproutConfig(**SHAPE | changes))
        torch.nn.init.normal_(connection(model), 0, 0.1)  # zero, where it starts, would hide a wrong one
    return model


def connection(model: BrainLikeSprout) -> Tensor:
    strength = model.pool.connection_strength
    assert isinstance(strength, Tensor)
    return strength


def windows(batch: int, seed: int) -> Tensor:
    return next(data.batches(data.encode(data.corpus()), batch_size=batch, window=WINDOW, seed=seed))


def same_patterns(a: BrainLikeSprout, b: BrainLikeSprout, tokens: Tensor) -> bool:
    """Whether both settle through the same neurons, on the naive operations."""
    with torch.no_grad(), naive_operations():
        pairs = zip(a.settle(tokens).history, b.settle(tokens).history, strict=True)
        return all(torch.equal(x.idx, y.idx) and torch.equal(x.count, y.count) for x, y in pairs)


@lru_cache(maxsize=1)
def model_and_tokens(device: str) -> tuple[BrainLikeSprout, BrainLikeSprout, list[Tensor]]:
    """The model, its float64 twin, and texts on which rounding decides about no neuron: else the twin is no truth."""
    model = build().to(device)
    twin = copy.deepcopy(model).double()
    texts = [windows(BATCH, seed).to(device) for seed in range(8)]
    clear = [text for text in texts if same_patterns(model, twin, text)]
    if len(clear) < 2:
        raise RuntimeError("float32 and float64 choose different neurons on nearly every text")
    return model, twin, clear[:2]


# ------------------------------------------------------------------------------------------------- one step


def take_step(model: BrainLikeSprout, x: Inputs) -> tuple[Tensor, ...]:
    """States, gates and neurons after one interaction step."""
    wiring = sprout.pool.Wiring(x["signatures"], x["strength"], x["strength"])
    stimulus = sprout.interaction.Stimulus(x["score"], x["drift"], x["key"], x["value"], None)
    states, pattern = model.interaction.step(x["states"], x["pattern"], stimulus, wiring)
    return states, pattern.gate, pattern.idx


def step_inputs(model: BrainLikeSprout, tokens: Tensor) -> Inputs:
    """What the first step is given."""
    start = model.encoder(tokens, model.pool)
    generator = torch.Generator().manual_seed(1)
    grad = [torch.randn(t.shape, generator=generator).to(t) for t in (start.states, start.pattern.gate)]
    pool = {"signatures": model.pool.neuron_signatures, "strength": model.pool.connection_strength}
    stimulus = model.interaction.stimulus(start)
    float_inputs = {"states": start.states, "score": start.score, "drift": start.drift}
    float_inputs |= {"key": stimulus.key, "value": stimulus.value} | pool
    moved = {name: t.detach().requires_grad_() for name, t in float_inputs.items()}
    pattern = start.pattern._replace(gate=start.pattern.gate.detach())
    return moved | {"pattern": pattern, "grad": tuple(grad), "cuda": tokens.is_cuda}


def in_double(x: Inputs) -> Inputs:
    moved = {name: x[name].detach().double().requires_grad_() for name in STEP_LEAVES}
    pattern = x["pattern"]._replace(gate=x["pattern"].gate.double())
    return moved | {"pattern": pattern, "grad": tuple(g.double() for g in x["grad"])}


def step_on(operations: Callable[[], AbstractContextManager], model: BrainLikeSprout):
    def run(x: Inputs) -> tuple[Tensor, ...]:
        with operations():
            return take_step(model, x)

    return run


def step_cost(direction: str) -> tuple[int, int]:
    """Bytes and FLOPs of a step, forward; both: three times that (two products backward for one forward).

    Read: qkv, look and GRU weights 10 D D, B K K strengths of the bias, B K rows of N for the drive, B N scores, B R
    rows of D, keys and values of B T tokens; read and write the states three times.
    FLOPs: 20 B K D D of the linear maps, 4 B K (K + T) D of the attentions, 2 B K N of the drive.
    """
    b, n, k, d = BATCH, N, K, SHAPE["d_state"]
    recruits = SproutConfig().recruits_per_step
    values = 10 * d * d + b * k * k + b * k * n + b * n + b * recruits * d + 2 * b * WINDOW * d + 6 * b * k * d
    flops = 20 * b * k * d * d + 4 * b * k * (k + WINDOW) * d + 2 * b * k * n
    return (4 * values, flops) if direction == "forward" else (12 * values, 3 * flops)


def dense_step_seconds(device: str) -> dict[str, float]:
    """Seconds of one sample's step on the dense backend, and with the fused kernel for its N x N attention.

    Each is the median of two, in turn. AssertionError if either step is not ours.
    """
    model, _, texts = model_and_tokens(device)
    x = step_inputs(model, texts[0][:1])
    dense = build(backend="dense").to(device)
    ways = {"dense": nullcontext, FUSED: dense_fused_operations}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        ours = take_step(model, x)
        for name, way in [*ways.items(), *ways.items()]:
            out: list[tuple[Tensor, ...]] = []
            with way():
                taken[name].append(measure.seconds(lambda out=out: out.append(take_step(dense, x)), device == "cuda"))
            error = max(relative_error(a, b) for a, b in zip(ours, out[0], strict=True))
            assert error <= 2 * STEP_SLACK * TOLERANCE[torch.float32], f"ours and {name} differ by {error:.2g}"
    return {name: statistics.median(t) for name, t in taken.items()}


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_interaction_step(direction: str, session, run, check_target) -> None:
    model, twin, texts = model_and_tokens(session.device)
    sets = [step_inputs(model, text) for text in texts]

    def truth() -> tuple[list[Tensor], dict[str, Tensor]]:
        x = in_double(sets[0])
        out = step_on(naive_operations, twin)(x)
        grads = torch.autograd.grad(out[:2], [x[name] for name in STEP_LEAVES], x["grad"])
        return [o.detach() for o in out], dict(zip(STEP_LEAVES, grads, strict=True))

    case = Case(
        "sprout step",
        Spec(BATCH, direction=direction),
        sets,
        Contestant("ours", lambda x: take_step(model, x), STEP_LEAVES, deterministic=True),
        [Contestant(name, step_on(way, model), STEP_LEAVES) for name, way in PLAIN.items()],
        truth,
        *step_cost(direction),
        not_run={"torch.compile": "not tried on a whole step"},
        slack=STEP_SLACK,
    )
    if direction == "forward":
        case.fixed |= {name: seconds * BATCH for name, seconds in dense_step_seconds(session.device).items()}
        case.notes.append("dense: one sample, median of 2 runs apart from the others, times B")
    row = run(case)
    if direction == "forward" and not session.cuda:
        fused = f"(its attention fused by torch: {row['ratios'][FUSED]:.3g}x)"
        check_target("P1", f"interaction step, forward, B=4, against dense {fused}", row["ratios"]["dense"], 400)


# ------------------------------------------------------------------------------------------------- the model


def model_case(session, direction: str) -> Case:
    model, twin, texts = model_and_tokens(session.device)
    names = tuple(name for name, _ in model.named_parameters())
    grad = torch.randn(BATCH, model.config.vocab_size, generator=torch.Generator().manual_seed(2)).to(session.device)
    parameters = dict(model.named_parameters())
    sets = [parameters | {"tokens": text, "grad": (grad,), "cuda": session.cuda} for text in texts]

    def on(operations: Callable[[], AbstractContextManager]):
        def run(x: Inputs) -> tuple[Tensor, ...]:
            with operations():
                return (model(x["tokens"]),)

        return run

    @lru_cache
    def truth() -> tuple[list[Tensor], dict[str, Tensor]]:
        with naive_operations():
            out = twin(texts[0])
        grads = torch.autograd.grad(out, list(twin.parameters()), grad.double())
        return [out.detach()], dict(zip(names, grads, strict=True))

    step_bytes, step_flops = step_cost(direction)
    steps = model.config.n_interaction_steps
    return Case(
        "sprout model",
        Spec(BATCH, direction=direction),
        sets,
        Contestant("ours", lambda x: (model(x["tokens"]),), names, deterministic=True),
        [Contestant(name, on(way), names) for name, way in PLAIN.items()],
        truth,
        steps * step_bytes,
        steps * step_flops,
        not_run={
            "torch.compile": "not tried on the whole model",
            "dense": "not tried: by estimate, 5 steps need tens of GiB",
        },
        notes=[f"{steps} interaction steps, windows of {WINDOW} bytes; bytes and FLOPs are those of the steps"],
        slack=100,  # every step feeds the next
    )


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_model(direction: str, session, run, check_target) -> None:
    row = run(model_case(session, direction))
    if direction == "both" and not session.cuda:
        what = f"SPROUT forward + backward, 5 steps, B=4, against the {NAIVE} (best peer: {row['ratio']:.2f}x)"
        check_target("P2", what, row["ratios"][NAIVE], 1.5)


# ------------------------------------------------------------------------------------------------- memory


def test_training_step_against_dense(benchmark, session, check_target) -> None:
    """Memory: ours with 5 interaction steps at B=4 against less of the dense baseline: 1 step, and the largest batch
    that fits. The ratio is an upper bound: the dense baseline at B=4 with 5 steps needs 20 times one step at B=1.

    Time: both with 1 step and the same batch, the first step of a process each. More steps favour the sparse way more.
    """
    if session.cuda:
        pytest.skip("targets of the CPU path: resident memory of a process")
    if session.short:
        pytest.skip("left out by --short: the dense baseline takes long")
    if not memory.can_watch_resident():
        pytest.skip("needs /proc/self/clear_refs (Linux) to reset the peak of resident memory")
    batch = dense_batch(memory.available_bytes())
    if batch is None:
        pytest.skip("the dense baseline needs 6 GiB of free memory")
    told: dict[str, dict[str, float]] = {}

    def ours() -> None:
        told["ours"] = in_child_step("auto", BATCH, 5)

    told["ours, same as dense"] = in_child_step("auto", batch, 1)
    told["dense"] = in_child_step("dense", batch, 1)
    benchmark.group = "training step against dense"
    benchmark.pedantic(ours, rounds=1)
    rise, seconds = ({name: child[what] for name, child in told.items()} for what in ("rise", "seconds"))
    info = {"op": "training step against dense", "rise_bytes": rise, "seconds": seconds, "dense_batch": batch}
    benchmark.extra_info.update(info)
    same = rise["ours, same as dense"] / rise["dense"]
    what = f"rise of resident memory, ours B=4 5 steps / dense B={batch} 1 step (the same for both: {same:.3g}x)"
    check_target("P4", what, rise["ours"] / rise["dense"], 1 / 20, at_least=False)
    what = f"training step (forward, backward, SGD), B={batch} 1 interaction step, against the dense backend"
    check_target("P7", what, seconds["dense"] / seconds["ours, same as dense"], 50)


def dense_batch(available: int) -> int | None:
    """How many samples of the dense training step fit: each holds about 8 tensors of H N N floats."""
    sample = 8 * 4 * SHAPE["n_heads"] * N**2
    return next((b for b in (2, 1) if available > 1.3 * b * sample), None)


def in_child_step(backend: str, batch: int, steps: int) -> dict[str, float]:
    """rise in bytes, seconds; on all cores, whatever --threads says: the dense step takes long."""
    threads = os.cpu_count() or 1
    return memory.in_child("benchmarks.child_step", backend, str(batch), str(steps), threads=threads, timeout=600)
