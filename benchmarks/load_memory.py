"""Peak host memory while 4 GB of bfloat16 weights load onto 8 emulated devices, in the layout of rollouts.

    python benchmarks/load_memory.py [--folder=runs/load_memory] [--layers=21] [--keep]

Writes a random checkpoint of 21 layers (hidden 2560, mlp 9728, vocabulary 32768: 2.07 B parameters), then reads it in a
process with 8 devices as `evaluate` and `construct` do: heads, mlp width and vocabulary are split in 8, each device
reads its own shards.  Emulated devices hold their arrays in the host's memory, so what counts is the peak (VmHWM of the
process, mapped libraries included) without the arrays themselves.  Bound: 1.5 × one device's share + 1.5 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

DEVICES = 8


def write(folder: Path, layers: int) -> None:
    import jax
    import ml_dtypes
    import numpy as np

    from ivr_jax.checkpoints import streaming
    from ivr_jax.checkpoints.lazy import LazyArray
    from ivr_jax.checkpoints.system import BACKBONE
    from ivr_jax.models import backbone

    config = make_config(layers)
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(ml_dtypes.bfloat16)

    def one(leaf):
        def read(index):
            shape = [part.stop - part.start for part in index]
            return np.resize(noise, shape)

        return LazyArray(tuple(leaf.shape), np.dtype(leaf.dtype), read)

    params = jax.tree.map(one, backbone.param_shapes(config))
    streaming.write(folder, params, {"kind": BACKBONE, "model": dataclasses.asdict(config)})


def make_config(layers: int):
    from ivr_jax.models.backbone_config import BackboneConfig

    return BackboneConfig(
        vocab_size=32768, hidden_size=2560, intermediate_size=9728, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, dtype="bfloat16", param_dtype="bfloat16",
    )  # fmt: skip


def load(folder: Path, layers: int) -> None:
    """Prints what was loaded and the peak as one line of JSON."""
    import jax

    from ivr_jax import sharding
    from ivr_jax.checkpoints import store
    from ivr_jax.checkpoints.system import BACKBONE
    from ivr_jax.models import backbone
    from ivr_jax.sampling.layout import RolloutLayout

    config = make_config(layers)
    layout = RolloutLayout(config, sharding.make_mesh({"fsdp": 1, "tensor": DEVICES}))
    like = sharding.abstract_sharded(layout.mesh, backbone.param_axes(config), backbone.param_shapes(config))
    began = time.perf_counter()
    params, _ = store.read_params(folder, BACKBONE, like)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - began
    arrays = [part.data.nbytes for leaf in jax.tree.leaves(params) for part in leaf.addressable_shards]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    held = {"weights": sum(leaf.nbytes for leaf in jax.tree.leaves(params)), "arrays": sum(arrays)}
    peak = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"devices": len(jax.devices()), "seconds": seconds, "peak": peak, **held}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/load_memory"))
    parser.add_argument("--layers", type=int, default=21)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint")
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        load(given.folder, given.layers)
        return
    if not given.folder.exists():
        write(given.folder, given.layers)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    command = [sys.executable, __file__, "--load", f"--folder={given.folder}", f"--layers={given.layers}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    found = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
    share = found["weights"] / DEVICES
    beyond, bound = found["peak"] - found["arrays"], 1.5 * share + 1.5e9
    print(f"{found['weights'] / 1e9:.2f} GB of weights onto {found['devices']} devices in {found['seconds']:.0f} s")
    print(f"peak of the process {found['peak'] / 1e9:.2f} GB, of it on the devices {found['arrays'] / 1e9:.2f} GB")
    print(f"beyond them {beyond / 1e9:.2f} GB; bound 1.5 x {share / 1e9:.2f} GB + 1.5 GB = {bound / 1e9:.2f} GB: "
          f"{'within' if beyond <= bound else 'EXCEEDED'}")
    if not given.keep:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
