"""One step of fine-tuning on eight pretended devices for many meshes, compared with the same step on one device.

    python benchmarks/mesh_sweep.py

Prints for each mesh the relative errors of loss, gradients and decoded hidden states, and into how many shards the
largest parameter and its moment are cut.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

import test_sharding  # noqa: E402

AXES = ("data", "fsdp", "tensor", "sequence")
MESHES = [
    dict(zip(AXES, sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=4)
    if sizes[0] * sizes[1] * sizes[2] * sizes[3] == 8
]


def main() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", test_sharding.SCRIPT, json.dumps(MESHES)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for mesh, line in zip(MESHES, process.stdout, strict=False):
            found = json.loads(line)
            shape = " x ".join(str(mesh[axis]) for axis in AXES)
            print(f"{shape}: loss {found['loss']:.1e}, gradients {found['gradients']:.1e}, "
                  f"decoded {found['decoded']:.1e}, shards {found['shards']}", flush=True)  # fmt: skip
    if process.returncode:
        raise SystemExit(process.returncode)


if __name__ == "__main__":
    main()
