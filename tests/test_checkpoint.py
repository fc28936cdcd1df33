"""Checkpoints: what is written is whole or not there, and what is damaged is found."""

import os
import random
import signal

import numpy as np
import pytest
import torch

from sprout import checkpoint as ck
from sprout import disk, runs
from sprout.runs import Checkpoint, CheckpointError, RunFolder
from tests.saved import in_child, names, some


@pytest.fixture
def run(tmp_path):
    with RunFolder.create(tmp_path / "run", {"lr": 1}) as folder:
        yield folder


def test_a_checkpoint_comes_back_as_it_was(run):
    before = some(7, score=0.5)
    found = ck.read(run.save(before))
    assert (found.step, found.score, found.texts) == (7, 0.5, {"config.json": "{}"})
    assert found.weights.keys() == before.weights.keys()
    for name, tensor in before.weights.items():
        assert found.weights[name].dtype == tensor.dtype
        assert torch.equal(found.weights[name], tensor)
    assert found.state["betas"] == (0.9, 0.99)
    assert found.state["x"] is None
    assert list(found.state["state"]) == [0, 1]
    assert torch.equal(found.state["state"][1]["m"], torch.arange(4.0))
    assert found.state["state"][0]["step"].shape == ()


def test_trees_without_a_place_in_json_are_refused():
    with pytest.raises(TypeError, match=r"the state holds a set at /a/1"):
        ck.flatten({"a": [0, {1}]})
    with pytest.raises(TypeError, match=r"the state holds the key 1.5 at its root"):
        ck.flatten({1.5: 0})


def test_nothing_is_pickled(run):
    path = run.save(some(1))
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    assert not [p for p in path.iterdir() if p.read_bytes()[:2] in (b"PK", b"\x80\x04", b"\x80\x02")]


def test_the_newest_two_and_the_best_are_kept(run):
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.5)):
        run.save(some(step, score))
    assert names(run.path) == ["step-00000002", "step-00000004", "step-00000005"]
    run.save(some(5, 0.5))  # the same step again replaces it
    assert names(run.path) == ["step-00000004", "step-00000005"]
    assert ck.read_manifest(run.path / "checkpoints/step-00000005")["score"] == 0.5


DAMAGE = {
    "truncated": (ck.WEIGHTS, lambda data: data[:-3], r"model.safetensors is incomplete \(\d+ bytes of \d+\)"),
    "empty": (ck.STATE, lambda data: b"", r"state.safetensors is incomplete \(0 bytes of \d+\)"),
    "one bit": (
        ck.WEIGHTS,
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "model.safetensors is damaged: its SHA-256",
    ),
    "bit in json": (ck.TREE, lambda data: data.replace(b"0.9", b"0.8", 1), "state.json is damaged: its SHA-256"),
    "bit in manifest": (ck.MANIFEST, lambda data: data.replace(b'"step": 2', b'"step": 3'), "manifest.json is damaged"),
    "empty manifest": (ck.MANIFEST, lambda data: b"", r"manifest.json is damaged \(0 bytes\)"),
    "garbage manifest": (ck.MANIFEST, lambda data: b"[1]", "manifest.json is damaged"),
    "gone": (ck.WEIGHTS, None, "model.safetensors is missing"),
    "gone manifest": (ck.MANIFEST, None, "manifest.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_one_before_is_taken(run, kind, caplog):
    name, change, message = DAMAGE[kind]
    run.save(some(1))
    file = run.save(some(2)) / name
    if change is None:
        file.unlink()
    else:
        before = file.read_bytes()
        file.write_bytes(change(before))
        assert file.read_bytes() != before
    with pytest.raises(CheckpointError, match=message):
        ck.read(file.parent)
    run.log(1, loss=1.0)
    run.log(2, loss=0.5)
    assert run.rewind().step == 1
    assert "step-00000002" in caplog.text
    assert "falling back to step 1" in caplog.text
    assert names(run.path) == ["step-00000001", "step-00000002.broken"]
    assert [record["step"] for record in run.metrics()] == [1]
    run.save(some(2))
    assert run.rewind().step == 2


def test_only_damaged_checkpoints_are_an_error_that_names_them_all(run):
    for step in (1, 2):
        (run.save(some(step)) / ck.WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint that can be read: .*00000002/model.*00000001/model"):
        run.rewind()
    assert names(run.path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("call", range(1, 14))
def test_killed_at_any_point_of_a_save(tmp_path, call):
    """SIGKILL at each write, fsync and rename: afterwards the newest whole checkpoint is 1 or 2, and it loads."""
    with RunFolder.create(tmp_path / "run", {}) as run:
        run.save(some(1))

    def dies():
        left = [call]

        def counted(function):
            def wrapper(*arguments):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)

            return wrapper

        run = RunFolder.resume(tmp_path / "run")
        disk.os.fsync, disk.os.replace = counted(os.fsync), counted(os.replace)
        run.save(some(2))
        os._exit(0)

    status = in_child(dies)
    if status == 0:
        assert call > 8, "a save makes at least five files, one rename and two syncs of folders"
        return
    assert status == -signal.SIGKILL
    with RunFolder.resume(tmp_path / "run") as run:
        found = run.rewind()
        assert torch.equal(found.weights["w"], some(found.step).weights["w"])
        assert found.step in (1, 2)
        assert not list((tmp_path / "run").rglob("*.tmp"))
        run.save(some(3))
        assert run.rewind().step == 3


def test_killed_while_a_checkpoint_is_replaced(tmp_path):
    """Between the two renames of a replacement there is no folder of that name, and the one before it counts."""
    with RunFolder.create(tmp_path / "run", {}) as run:
        run.save(some(1))
        run.save(some(2))

    def dies():
        run, before, renames = RunFolder.resume(tmp_path / "run"), os.replace, []

        def second(*paths):
            renames.append(paths)
            if len(renames) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            before(*paths)

        disk.os.replace = second
        run.save(some(2, scale=5.0))

    assert in_child(dies) == -signal.SIGKILL
    with RunFolder.resume(tmp_path / "run") as run:
        assert run.rewind().step == 1


def test_a_full_disk_is_named_and_the_old_checkpoint_stays(tmp_path):
    """The limit on a file's size is the system's own: writes fail as they do on a full disk."""
    resource = pytest.importorskip("resource")
    with RunFolder.create(tmp_path / "run", {}) as run:
        run.save(some(1))

    def writes():
        run = RunFolder.resume(tmp_path / "run")
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            run.save(Checkpoint(2, {"w": torch.zeros(10_000)}, {}))
        except runs.DiskError as error:
            text = str(error)
            os._exit(0 if "disk full" in text and "step-00000002" in text and "free some space" in text else 2)

    assert in_child(writes) == 0
    with RunFolder.resume(tmp_path / "run") as run:
        assert run.rewind().step == 1
        assert names(run.path) == ["step-00000001"]


def test_leftovers_are_ignored_and_cleaned(run):
    run.save(some(1))
    (run.path / "checkpoints/step-00000009.tmp").mkdir()
    (run.path / "config.json.tmp").write_text("{")
    assert run.rewind().step == 1
    run.close()
    with RunFolder.resume(run.path):
        assert not list(run.path.rglob("*.tmp"))


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def test_random_generators_continue(run):
    runs.seed_everything(5)
    draw()
    run.save(Checkpoint(1, {}, {"random": runs.random_state()}))
    after = draw()
    runs.seed_everything(5)
    assert draw() != after
    runs.set_random_state(run.rewind().state["random"])
    assert draw() == after
