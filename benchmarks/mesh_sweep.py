"""One step of fine-tuning on eight pretended devices for many meshes, compared with the same step on one device.

    python benchmarks/mesh_sweep.py
    python benchmarks/mesh_sweep.py --every=3     # a third of the meshes

Every data x fsdp x tensor x sequence of eight devices, and those with tensor shards once more with gathered kernels.
Prints for each mesh the relative errors of loss, gradients and decoded hidden states, and into how many shards the
largest parameter and its moment are cut.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

import test_sharding  # noqa: E402

AXES = ("data", "fsdp", "tensor", "sequence")
SIZES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) == 8]
MESHES = [
    {**dict(zip(AXES, sizes, strict=True)), **({"gather": True} if gather else {})}
    for gather in (False, True)
    for sizes in SIZES
    if not gather or sizes[2] > 1
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take every n-th mesh of the list")
    meshes = MESHES[:: parser.parse_args().every]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT),
                   "PYTHONUNBUFFERED": "1"}  # fmt: skip
    command = [sys.executable, "-c", test_sharding.SCRIPT, json.dumps(meshes)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for mesh, line in zip(meshes, process.stdout, strict=False):
            found = json.loads(line)
            shape = " x ".join(str(mesh[axis]) for axis in AXES) + (" gathered" if "gather" in mesh else "")
            print(f"{shape}: loss {found['loss']:.1e}, gradients {found['gradients']:.1e}, "
                  f"decoded {found['decoded']:.1e}, shards {found['shards']}", flush=True)  # fmt: skip
    if process.returncode:
        raise SystemExit(process.returncode)


if __name__ == "__main__":
    main()
