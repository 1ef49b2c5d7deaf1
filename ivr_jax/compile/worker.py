"""Compiles one program for one topology, in a process of its own:
`python -m ivr_jax.compile.worker JOB.json RESULT.json`.

Some shardings make the compiler end the whole process, which the exit status then says.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ivr_jax.errors import UserError


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles `job["program"]` of `job["config"]` for `job["topology"]`; the result is plain JSON."""
    import jax
    from jax.experimental import topologies

    from ivr_jax import sharding
    from ivr_jax.compile import flops, programs, rl_programs, sampling_programs
    from ivr_jax.compile.topologies import DESCRIPTION, parse_topology

    described = topologies.get_topology_desc(
        job["topology"], platform="tpu", **DESCRIPTION.get(parse_topology(job["topology"]).kind, {})
    )
    config = ConfigDict(job["config"])
    builders = {
        "sft": programs.sft_step,
        "grpo": rl_programs.policy_gradient,
        "prefill": sampling_programs.prefill,
        "decode": sampling_programs.decode,
        "generate": sampling_programs.generate,
    }
    setup = programs.Setup(config, sharding.make_mesh(dict(config.mesh), described.devices))
    program = builders[job["program"]](setup)
    mesh, clock = program.mesh, time.perf_counter()
    with jax.set_mesh(mesh):
        traced = program.trace()
        lowered = traced.lower(lowering_platforms=("tpu",))
    result = {
        "mesh": dict(mesh.shape), "model": dataclasses.asdict(program.model), "layers": program.model.num_hidden_layers,
        "resident": dict(program.resident), "param_shapes": program.param_shapes,
        "flops": flops.count(traced.jaxpr, mesh.size), "model_flops": program.model_flops, "tokens": program.tokens,
        "one_pass": program.one_pass, "trace_seconds": time.perf_counter() - clock,
    }  # fmt: skip
    clock = time.perf_counter()
    try:
        memory = lowered.compile(compiler_options=job["options"] or None).memory_analysis()
    except Exception as error:  # the compiler's errors have no class of their own
        return {**result, "error": str(error)}
    names = ("argument", "output", "alias", "temp", "generated_code")
    return {
        **result, "compile_seconds": time.perf_counter() - clock,
        "memory": {name: getattr(memory, f"{name}_size_in_bytes") for name in names},
    }  # fmt: skip


def main(argv: list[str]) -> int:
    job = json.loads(Path(argv[1]).read_text())
    try:
        result = compile_job(job)
    except UserError as error:
        result = {"what": error.what, "remedy": error.remedy}
    Path(argv[2]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
