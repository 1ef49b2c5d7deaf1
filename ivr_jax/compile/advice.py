"""What to change of a config whose program does not fit, from what fills the memory."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from ml_collections import ConfigDict

from ivr_jax.compile import predict, programs, search
from ivr_jax.compile.memory import gib
from ivr_jax.compile.topologies import Topology
from ivr_jax.errors import UserError
from ivr_jax.training.rl_options import rl_options

STATIC = (  # kinds that do not depend on how many answers a pass has; a batch is a part of the rollout's
    "parameters", "moments", "reference", "previous policy", "gradient sum", "gradients", "batch", "rollout", "results",
    "code",
)  # fmt: skip


def advice(program: str, config: ConfigDict, topology: Topology, measured: Mapping[str, float]) -> str:
    """One line with the flags of a config that should fit.

    Args:
      program: its name in `programs.PROGRAMS`.
      measured: bytes a chip by kind that the compiler gave; the total under "all" where it gave no kinds.
    """
    if program == "sft":
        return _sft(config, topology, measured)
    if program == "grpo":
        return _grpo(config, topology, measured)
    return _inference(config, topology, measured)


def _sft(config: ConfigDict, topology: Topology, measured: Mapping[str, float]) -> str:
    """The change that is predicted to fit: one that learns the same before others, few keys, then the least time."""
    try:
        factor = search.correction(config, topology, measured)
    except UserError:
        factor = search.FIRST_CORRECTION
    for low_precision in (False, True):
        pool = search.candidates(config, topology, low_precision)
        fitting = [c for c in pool if c.changes and c.fits(topology, factor)]
        if fitting:
            best = min(fitting, key=lambda c: (len(c.changes), c.order))
            warning = " (moments and sums in bfloat16 change what is learnt)" if low_precision else ""
            return f"Use {best.flags()}: about {gib(best.prediction.corrected(factor).total)} GiB a chip{warning}."
    return f"No mesh, accumulation, remat or chunk fits. {search.slice_needed(config, topology)}"


def _grpo(config: ConfigDict, topology: Topology, measured: Mapping[str, float]) -> str:
    """Fewer answers in a pass, a smaller chunk of the loss, or both; then moments in bfloat16; then more chips."""
    room = search.MARGIN * topology.chip.hbm
    static = sum(size for kind, size in measured.items() if kind in STATIC)
    if static:
        model, sizes = programs.model_of(config), search.mesh_sizes(config, topology.count)
        shards = sizes["data"] * sizes["fsdp"] * (sizes["tensor"] if model.fsdp_over_tensor else 1)
        size = rl_options(config).rows_option
        own = (config[size], config.loss_chunk_tokens)
        counts = range(shards, config[size] + 1, shards)
        chunks = (config.loss_chunk_tokens, *(c for c in search.CHUNKS if c < config.loss_chunk_tokens))

        def moving(answers: int, chunk: int) -> float:
            step = predict.Step(
                model=model, mesh=sizes, rows=answers, length=max(config.buckets), parts=1, chunk=chunk,
                gradient_bytes=4, adapters=bool(config.lora.rank), param_bytes=measured["parameters"],
            )  # fmt: skip
            # Without the gradients, which the compiler's figure holds already.
            return max(found["activations"] + found["temporaries"] for found in predict.phases(step))

        factor = (sum(measured.values()) - static) / moving(*own)
        halved = measured.get("moments", 0) / 2 if config.optimizer.moment_dtype != "bfloat16" else 0
        for saved in (0, halved):
            totals = {pair: static - saved + factor * moving(*pair) for pair in itertools.product(counts, chunks)}
            fitting = [pair for pair, total in totals.items() if total <= room]
            if fitting:
                best = max(fitting, key=lambda pair: (pair[0] == own[0], pair[1] == own[1], pair))
                changes = {size: best[0], "loss_chunk_tokens": best[1]}
                flags = [f"--config.{name}={value}" for name, value in changes.items() if value != config[name]]
                flags += ["--config.optimizer.moment_dtype=bfloat16"] if saved else []
                warning = " (moments in bfloat16 change what is learnt)" if saved else ""
                return f"Use {' '.join(flags)}: about {gib(totals[best])} GiB a chip{warning}."
    return _more_chips(topology, sum(measured.values()))


def _inference(config: ConfigDict, topology: Topology, measured: Mapping[str, float]) -> str:
    """As many slots as there is room for beside the weights."""
    slots = slots_that_fit(config.engine.slots, measured, topology)
    if slots:
        each = gib(measured["cache"] / config.engine.slots)
        return f"Use --config.engine.slots={slots}: the cache of a slot takes {each} GiB a chip."
    return _more_chips(topology, sum(measured.values()))


def slots_that_fit(slots: int, measured: Mapping[str, float], topology: Topology) -> int:
    """How many slots' caches fit beside the rest; `measured`: bytes a chip by kind with `slots` slots."""
    if not measured.get("cache"):
        return 0
    rest = sum(measured.values()) - measured["cache"]
    return max(0, int(slots * (search.MARGIN * topology.chip.hbm - rest) / measured["cache"]))


def _more_chips(topology: Topology, total: float) -> str:
    least = topology.count * total / (search.MARGIN * topology.chip.hbm)
    return f"Use a larger slice of {topology.kind}, of about {-(-least // 1):.0f} chips or more."
