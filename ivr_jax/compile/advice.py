"""What to change of a config whose program does not fit, from what fills the memory."""

from __future__ import annotations

from collections.abc import Mapping

from ml_collections import ConfigDict

from ivr_jax.compile import search
from ivr_jax.compile.memory import gib
from ivr_jax.compile.topologies import Topology
from ivr_jax.errors import UserError

STATIC = ("parameters", "moments", "reference", "previous policy", "gradient sum", "gradients")


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
    """Fewer answers in a pass, as far as each device keeps one; then moments in bfloat16; then more chips."""
    room = search.MARGIN * topology.chip.hbm
    static = sum(size for kind, size in measured.items() if kind in STATIC)
    moving = sum(measured.values()) - static
    sizes = search.mesh_sizes(config, topology.count)
    shards = sizes["data"] * sizes["fsdp"]
    answers = int(config.micro_batch * max(0.0, room - static) / moving) // shards * shards
    if static and answers >= shards:
        return f"Use --config.micro_batch={answers}: what grows with it takes {gib(moving)} GiB a chip."
    halved = measured.get("moments", 0) / 2
    least = static - halved + moving * shards / config.micro_batch
    if config.optimizer.moment_dtype != "bfloat16" and least <= room:
        return (f"Use --config.optimizer.moment_dtype=bfloat16 --config.micro_batch={shards} (moments in bfloat16 "
                "change what is learnt).")  # fmt: skip
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
