"""Runs compilations, each in a process of its own, and reads memory plans and estimates from what they wrote."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivr_jax.compile import hlo, memory, roofline
from ivr_jax.compile.topologies import Topology, compiler_environment
from ivr_jax.errors import UserError

# On v5p and v6e the sparse cores move weights and gradients while the matrix units work.  Without the first option the
# partitioner turns a weight gradient into a loop of small products, each of them padded.
COMMON = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000", "xla_enable_async_all_gather": "true"}
SPARSE_CORES = {
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true"
    for kind in ("all_gather", "2d_all_gather", "reduce_scatter", "all_reduce")
} | {"xla_tpu_use_tc_device_shape_on_sc": "true"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is known of one program on one topology.

    Attributes:
      plan: memory, or None when the compiler gave none; `advice` says what to do when it does not fit.
      estimate: time, or None when it does not fit.
      flops: operations that the chips together carry out, recomputation included; `model_flops` without it.
      error: why there is no estimate, "" when all went well; `needed`: bytes a chip when that is memory, else 0.
    """

    program: str
    topology: str
    mesh: Mapping[str, int]
    plan: memory.Plan | None
    estimate: roofline.Estimate | None
    flops: float
    model_flops: float
    tokens: int
    compile_seconds: float
    error: str = ""
    advice: str = ""
    needed: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the program was compiled."""
        return not self.error

    def mfu(self, topology: Topology) -> float | None:
        """Predicted share of the chips' peak that the mathematics uses, recomputation not counted."""
        if self.estimate is None or not self.estimate.seconds:
            return None
        return self.model_flops / (topology.count * topology.chip.flops * self.estimate.seconds)


def options_for(topology: Topology) -> dict[str, str]:
    """Compiler options that the plan assumes; docs/how-to/compile.md says how to train with the same ones."""
    return {**COMMON, **(SPARSE_CORES if topology.kind in ("v5p", "v6e") else {})}


def compile_program(config: Mapping[str, Any], topology: Topology, program: str, keep: Path | None = None) -> Outcome:
    """Compiles one program of the config (`programs.PROGRAMS`) in a new process, and reads what the compiler wrote.

    Args:
      config: a config as nested plain values.
      keep: a folder for the compiler's text files; without one they are removed.

    Returns:
      The outcome, with `error` and `advice` where there is no plan: the config and topology do not go together (a mesh
      that does not divide, …), the program does not fit, or the compiler ended its process.
    """
    with tempfile.TemporaryDirectory(prefix="ivr_jax_aot_") as scratch:
        folder = Path(keep or scratch) / f"{topology}-{program}".replace(":", "-")
        folder.mkdir(parents=True, exist_ok=True)
        job, answer = folder / "job.json", folder / "result.json"
        answer.unlink(missing_ok=True)
        job.write_text(json.dumps({"config": config, "topology": str(topology), "program": program,
                                   "options": options_for(topology)}))  # fmt: skip
        command = [sys.executable, "-m", "ivr_jax.compile.worker", str(job), str(answer)]
        done = subprocess.run(command, env=compiler_environment(folder / "hlo"), capture_output=True, text=True)
        if not answer.exists():
            return _aborted(program, topology, config, done)
        result = json.loads(answer.read_text())
        if "what" in result:
            return _failed(program, topology, config, result["what"], result["remedy"])
        return _read(program, topology, config, result, folder / "hlo")


def _aborted(program: str, topology: Topology, config: Mapping, done: subprocess.CompletedProcess[str]) -> Outcome:
    """The compiler ended its process: its last message, and what usually helps."""
    if done.returncode == -signal.SIGKILL:
        return _failed(program, topology, config, "the compiler was killed, as a system does that runs out of memory",
                       "One full-size compilation takes 3 GiB; stop other programs.")  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if re.search("Check fail|FATAL|Error|error", line)]
    if done.returncode == 1:  # an exception of Python, before the compiler
        what = f"the program could not be made: {lines[-1].strip()[:300] if lines else 'no message'}"
        return _failed(program, topology, config, what, "This is a fault of the program, not of the config.")
    last = re.sub(r"^F\d{4} \S+\s+\d+ ", "", (lines or done.stderr.splitlines() or ["no message"])[-1].strip())
    return _failed(
        program, topology, config, f"the compiler ended with status {done.returncode}: {last[:300]}",
        "It cannot lay out every sharding (shards narrower than a tile of 8×128, for instance): lower config.mesh.fsdp "
        "and raise config.mesh.tensor, or change config.model.fsdp_over_tensor.",
    )  # fmt: skip


def _failed(program: str, topology: Topology, config: Mapping, error: str, advice: str) -> Outcome:
    mesh = config.get("mesh", {})
    return Outcome(program, str(topology), mesh, None, None, 0.0, 0.0, 0, 0.0, error.rstrip("."), advice)


def _read(program: str, topology: Topology, config: Mapping, result: dict[str, Any], dump: Path) -> Outcome:
    heap = _largest(dump, "after_optimizations-buffer-assignment.txt")
    plan = None
    if heap is not None:
        plan = memory.Plan(_kinds(result, heap), topology.chip.hbm)
    elif "memory" in result:
        plan = memory.Plan({**result["resident"], "temporaries": result["memory"]["temp"]}, topology.chip.hbm)
    outcome = Outcome(
        program, str(topology), result["mesh"], plan, None, result["flops"], result["model_flops"], result["tokens"],
        result.get("compile_seconds", 0.0),
    )  # fmt: skip
    message = result.get("error", "")
    if wanted := memory.exceeded(message):
        error = f"needs {memory.gib(wanted[0])} GiB a chip, there are {memory.gib(wanted[1])}"
        return dataclasses.replace(outcome, error=error, needed=wanted[0])
    if message:
        advice = "This is a fault of the compiler: try another config.mesh, or change model.fsdp_over_tensor."
        if "memory space vmem" in message:
            advice = "A kernel does not fit the vector memory of a core: --config.model.attention=plain has none."
        return dataclasses.replace(outcome, error=message.strip().splitlines()[0][:300], advice=advice)
    if plan is not None and not plan.fits:
        error = f"needs {memory.gib(plan.total)} GiB a chip with what else is in memory"
        return dataclasses.replace(outcome, error=error, needed=plan.total)
    schedule = _largest(dump, "after_codegen.txt")
    if schedule is None:
        raise UserError(f"the compiler wrote no schedule to {dump}.", "Use the libtpu that belongs to this jax.")
    estimate = roofline.estimate(hlo.read(schedule.read_text()), topology, result["one_pass"])
    return dataclasses.replace(outcome, estimate=estimate)


def _kinds(result: dict[str, Any], heap: Path) -> dict[str, int]:
    size, buffers = memory.read_heap(heap.read_text())
    kinds = {"temporaries": size}
    if "moments" in result["resident"]:  # a program that differentiates
        kinds = memory.divide_heap(size, buffers, [tuple(shape) for shape in result["param_shapes"]], result["layers"])
    extra = {}
    if "memory" in result:
        found = result["memory"]
        extra = {"results": max(0, found["output"] - found["alias"]), "code": found["generated_code"]}
    return {**result["resident"], **kinds, **extra}


def _largest(folder: Path, ending: str) -> Path | None:
    """The dump of the program itself: small modules (conversions of constants) and the host's are dumped as well."""
    found = [path for path in folder.glob(f"*{ending}") if "cpu_" not in path.name]
    return max(found, key=lambda path: path.stat().st_size, default=None)
