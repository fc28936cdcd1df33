"""How the figures of a GPU session are judged: who is compared in which mode, what a capture that failed leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bio_kernels.testing import active_neurons

pytest.importorskip("triton")

from benchmarks import inputs, measure
from benchmarks.case import Contestant, Spec
from benchmarks.gpu import journal, model, races, targets
from benchmarks.gpu.setting import Setting


def row(**peers: tuple[float, float | None]) -> dict[str, Any]:
    """Of the seconds, eager and as a CUDA graph, of ours and of each peer."""
    eager = {name: times[0] for name, times in peers.items()}
    graph = {name: times[1] for name, times in peers.items() if times[1] is not None}
    found: dict[str, Any] = {"ours_s": eager["ours"], "roofline": 0.1, "graph_s": graph}
    found["ratios"] = {name: t / eager["ours"] for name, t in eager.items() if name != "ours"}
    return found | races.graph_ratios(found)


def test_targets_compare_cuda_graphs_and_say_where_a_peer_is_none():
    raced = row(ours=(8.0, 2.0), sdpa=(10.0, 6.0), flex=(9.0, None))
    assert targets.ratio_to(raced, "sdpa") == (3.0, "sdpa, CUDA graphs")
    ratio, peer = targets.ratio_to(raced, "flex") or (0.0, "")
    assert ratio == pytest.approx(9 / 2), "its eager time against the graph of ours"
    assert peer == "flex, which could not be captured, launched from Python"
    assert targets.ratio_to(raced) == (3.0, "sdpa, CUDA graphs")
    assert targets.ratio_to(row(ours=(8.0, None), sdpa=(10.0, 6.0))) == (1.25, "sdpa, all launched from Python")
    assert targets.ratio_to(raced, "nobody") is None


def test_memory_is_read_in_sectors():
    """8 float32 values share 32 bytes: neighbours cost one sector, and samples share them."""
    assert targets.sectors(torch.tensor([[0, 1, 7]]), 4096) == 3
    assert targets.sectors(torch.tensor([[0, 1, 8]]), 4096) == 6
    assert targets.sectors(torch.tensor([[0, 8], [1, 9]]), 4096) == 8
    idx = active_neurons(8, 256, 16)
    touched = torch.zeros(256, 32, dtype=torch.bool)
    for sample in idx:
        for i in sample:
            touched[i, sample // 8] = True
    assert targets.sectors(idx, 256) == int(touched.sum())


def step(result: float, eager: float, graph: float | None = None) -> dict[str, Any]:
    return {"result": result, "eager_s": eager} | ({} if graph is None else {"graph_s": graph})


def test_a_step_is_compared_in_the_better_mode_of_everyone():
    prefix = "SPROUT step B=256 bfloat16 "
    rows = {
        f"{prefix}ours eager": step(5.0, 9.0, 1.0),
        f"{prefix}gather eager": step(5.01, 18.0, 12.0),
        f"{prefix}gather compiled default": step(5.0, 6.0, 4.0),
        f"{prefix}fused compiled default": step(7.0, 1e-3),
    }
    found = model.conclude(rows)
    assert [(t["name"], t["measured"], t["reached"]) for t in found["targets"]] == [
        ("T11", 4.0, True),
        ("T11", 12.0, True),
    ]
    assert found["status"] == "failed", "one of the two is wrong"
    assert found["message"] == "bfloat16: loss 7 by fused compiled default, 5 by ours"
    del rows[f"{prefix}fused compiled default"]
    assert "status" not in model.conclude(rows)
    assert any(
        line.endswith("against gather eager: 2.00x where all are launched from Python") for line in found["lines"]
    )


def test_who_waits_and_who_comes_after_a_failed_capture_is_not_captured(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "FAILED_CAPTURES", [])
    case = targets.spread_case(Setting(True, tmp_path), SMALL)
    waits = Contestant("dense", lambda x: (), waits=True)
    captures: list[str] = []

    def capture(contestant: Contestant, *_: Any) -> Any:
        captures.append(contestant.name)
        measure.FAILED_CAPTURES.append(contestant.name)
        raise RuntimeError("operation not permitted\nmore")

    monkeypatch.setattr(measure, "_capture", capture)
    peers = [Contestant(name, lambda x: ()) for name in ("first", "second")]
    assert measure.graph_times([waits, *peers], case) == {}
    assert captures == ["first"]
    told = {name: case.not_run[f"{name} as a CUDA graph"] for name in ("dense", "first", "second")}
    assert told == {
        "dense": "it waits for the GPU",
        "first": "operation not permitted",
        "second": "the capture of first failed before",
    }


def test_after_a_failed_capture_another_process_goes_on(tmp_path):
    def job() -> dict[str, Any]:
        journal.FAILED_CAPTURES.append("a peer")
        return {"ratio": 2.0}

    held = journal.Journal(tmp_path, "targets", rehearsal=False)
    with pytest.raises(journal.DeviceLost, match="the capture of a peer failed"):
        held.run("row", job)
    journal.FAILED_CAPTURES.clear()
    assert held.rows["row"]["status"] == "ok", "what was measured before it is kept"
    assert held.rows["row"]["ratio"] == 2.0


SMALL = races.tiny(Spec(2, direction="forward"), "weighted_rows")


def test_inputs_count_each_tensor_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inputs, "CPU_BYTES", 4 * 1000)
    big = torch.zeros(400)

    def make(spec: Spec, device: str, seed: int) -> dict[str, Any]:
        return {"strength": big, "matrix": big, "csr": torch.zeros(10, 0).to_sparse_csr(), "idx": torch.zeros(100)}

    assert len(inputs.input_sets(SMALL, "cpu", make)) == 2
    monkeypatch.setattr(inputs, "CPU_BYTES", 4 * 1001)
    assert len(inputs.input_sets(SMALL, "cpu", make)) == 3
