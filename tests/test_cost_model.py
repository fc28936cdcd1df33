"""The cost model of a step: its sizes are those of real models, and what it says grows is what should."""

import json

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import cost_model
from benchmarks.cost_model import Sizes, memory_bytes, training_step
from sprout.sparse_gradients import sparse_tables
from tests.sprout_models import BLOCKS, small, some_tokens

SMALL = Sizes(b=3, n=96, d=16, p=16, r=2, a=2, k=20, s=3, layers=1, v=50)


def run_of(points):
    ceilings = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": {"float32": 1e12}}
    return {"benchmarks": [{"extra_info": {"scaling": points}}], "machine_info": {"roofline": ceilings}}


def test_memory_is_that_of_the_tables_of_a_model():
    model = small(**BLOCKS, active_groups=2)
    tables = sparse_tables(model)
    rows = sum(p.numel() for name, p in model.named_parameters() if name in tables)
    groups = model.pool.group_signatures.numel() + model.pool.group_threshold.numel()
    assert memory_bytes(SMALL) == 12 * rows + 16 * groups


def test_the_page_is_no_smaller_than_a_real_one():
    model, tokens = small(**BLOCKS, active_groups=2), some_tokens(3)
    page = model.encoder(tokens, model.pool).page
    assert 2 * 16 <= len(page.signatures) <= SMALL.page == 96
    assert SMALL.page_blocks == pytest.approx(len(model.pool.connection_strength.blocks))
    large = Sizes(b=1, n=96 * 2**20, d=16, p=16, r=2, a=2)
    assert (large.page, large.page_blocks) == (32, pytest.approx(2, abs=1e-3))


def test_only_the_groups_cost_more_in_a_larger_pool():
    one, four = training_step(Sizes(n=2**20)), training_step(Sizes(n=2**22))
    for part in one:
        growth = four[part].bytes / one[part].bytes
        assert growth == pytest.approx(4 if part == "groups" else 1, rel=5e-3), part
    assert all(cost.bytes > 0 and cost.flops > 0 for cost in one.values())


def test_the_scores_of_the_groups_are_counted():
    """Against torch's own count of the forward and backward products."""
    from torch.utils.flop_counter import FlopCounterMode

    model = small(**BLOCKS, active_groups=2)
    z = torch.randn(3, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model.pool.group_score(z).sum().backward()
    assert training_step(SMALL)["groups"].flops == counter.get_total_flops()


def test_a_recorded_run_beside_the_model(tmp_path, capsys):
    points = [{"n": n, "step_s": s, "peak_bytes": 2**30} for n, s in ((4096, 0.5), (1_048_576, 0.6))]
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run_of(points)))
    cost_model.main([str(file)])
    told = capsys.readouterr().out
    assert "| 1,048,576 |" in told
    assert "+100 ms" in told
    assert "(too much)" in told
    file.write_text(json.dumps(run_of([])))
    with pytest.raises(SystemExit, match=r"no rows of benchmarks/test_scaling\.py"):
        cost_model.main([str(file)])
