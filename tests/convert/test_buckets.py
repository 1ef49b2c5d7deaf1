"""Weights from a bucket into a bucket, in both directions and both kinds of it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import bucket_servers
import commands
import jax
import numpy as np
import pytest
from checkpoints_fixture import CONFIG, decoder_params

from ivr_jax.checkpoints import store
from ivr_jax.checkpoints import system as systems
from ivr_jax.cloud import inputs
from ivr_jax.cloud.objects import Objects
from ivr_jax.models import backbone


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict]:
    folder, params = tmp_path_factory.mktemp("run"), decoder_params()
    checkpointer = store.Checkpointer(folder)
    meta = {"kind": systems.BACKBONE, "model": dataclasses.asdict(CONFIG)}
    checkpointer.save(0, {"params": params}, None, meta)
    checkpointer.close()
    return folder, params


@pytest.mark.parametrize("scheme", bucket_servers.SCHEMES)
def test_weights_come_back_bit_for_bit(saved, scheme, tmp_path, monkeypatch):
    folder, params = saved
    monkeypatch.setitem(sys.modules, "torch", None)  # logits are compared elsewhere
    monkeypatch.setenv(inputs.CACHE_VARIABLE, str(tmp_path / "cache"))
    with bucket_servers.server(scheme):
        bucket = f"{scheme}://{bucket_servers.BUCKET}"
        files = [file for file in folder.rglob("*") if file.is_file()]
        Objects(f"{bucket}/run").upload({file.relative_to(folder).as_posix(): file for file in files})
        back = ["convert", "--from=hf", f"{bucket}/hf", "--to=orbax", f"{bucket}/again", "--param_dtype=float32",
                "--vocab_multiple=8"]
        commands.succeed("convert", "--from=orbax", f"{bucket}/run", "--to=hf", f"{bucket}/hf")
        commands.succeed(*back)
        read, meta = store.read_params(f"{bucket}/again", systems.BACKBONE, backbone.param_shapes(CONFIG))
        assert meta["kind"] == systems.BACKBONE
        jax.tree.map(np.testing.assert_array_equal, read, params)
        names = Objects(f"{bucket}/again").names()
        assert f"{bucket}/again" in commands.run(*back).complaint  # it is there already, and stays
        assert Objects(f"{bucket}/again").names() == names
        assert f"{bucket}/none" in commands.run("convert", "--from=orbax", f"{bucket}/none", "--to=hf", "x").complaint
