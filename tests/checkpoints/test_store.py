"""Checkpoints: how many stay, that host memory for them is bounded, and that a half-written one is never read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ivr_jax.checkpoints import store
from ivr_jax.checkpoints.store import Checkpointer


def state(value: float) -> dict[str, jax.Array]:
    return {"w": jnp.full((4, 8), value), "count": jnp.int32(value)}


def saved(folder, keep: int, steps: int) -> list[int]:
    checkpointer = Checkpointer(folder, keep)
    for step in range(1, steps + 1):
        checkpointer.save(step, state(step), {"iterator": step}, {"kind": "test"})
    checkpointer.wait()
    checkpointer.close()
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (0, [1, 2, 3, 4])])
def test_the_newest_stay(tmp_path, keep, left):
    assert saved(tmp_path, keep, 4) == left
    found = Checkpointer(tmp_path, keep).restore(jax.eval_shape(lambda: state(0)))
    assert (found.step, found.data, found.meta) == (4, {"iterator": 4}, {"kind": "test"})
    np.testing.assert_array_equal(found.state["w"], np.full((4, 8), 4.0))


def test_metadata_of_an_earlier_version_has_the_names_of_this_one(tmp_path):
    old = {"kind": "backbone", "model": {"gather_tensor": True, "rope_scaling": {"rope_type": "linear"}},
           "run": {"minibatch": 4, "steps": 2}}  # fmt: skip
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state(1), None, old)
    checkpointer.close()
    meta = {"kind": "backbone", "model": {"fsdp_over_tensor": True, "rope_scaling": {"rope_type": "linear"}},
            "run": {"micro_batch": 4, "steps": 2}}  # fmt: skip
    assert store.read_meta(tmp_path) == meta
    assert Checkpointer(tmp_path).restore(jax.eval_shape(lambda: state(0))).meta == meta


def test_what_was_not_committed_is_not_there(tmp_path):
    saved(tmp_path, 0, 2)
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp-7").mkdir()
    assert Checkpointer(tmp_path, 0).restore(jax.eval_shape(lambda: state(0))).step == 2


def test_staging_memory_is_bounded(tmp_path, monkeypatch):
    """Orbax is told the bound, and the checkpoint is the same."""
    told = []
    handler = ocp.PyTreeCheckpointHandler

    def spy(**given):
        told.append(given["save_device_host_concurrent_gb"])
        return handler(**given)

    monkeypatch.setattr(ocp, "PyTreeCheckpointHandler", spy)
    for name, gib in (("bound", 1), ("free", 0)):
        checkpointer = Checkpointer(tmp_path / name, 1, gib)
        checkpointer.save(1, state(5), {}, {})
        checkpointer.wait()
        np.testing.assert_array_equal(checkpointer.restore(state(0)).state["w"], np.full((4, 8), 5.0))
        checkpointer.close()
    assert told == [1, None]


def test_the_newest_whole_step_among_the_objects_of_a_bucket():
    def step(number: int, *more: str) -> list[str]:
        return [f"checkpoints/{number}/{name}" for name in ("meta/metadata", "state/manifest.ocdbt", *more)]

    names = ["metrics.jsonl", *step(2, "commit_success.txt"), *step(10), "checkpoints/12/meta/metadata"]
    assert store._newest_step(names, marked=True) == "checkpoints/2"  # Orbax has not marked the others as complete
    assert store._newest_step(names, marked=False) == "checkpoints/10"  # the twelfth is half there
    assert store._newest_step(["meta/metadata", "state/x"], marked=False) == ""
    assert store._newest_step(["meta/metadata", "state/x"], marked=True) is None
    assert store._newest_step(["metrics.jsonl"], marked=False) is None
