"""Which mesh, accumulation, rematerialisation and loss chunk of an sft config fit a topology, the fastest first.

`candidates` predicts memory and time of every combination (`predict`), `search` compiles the most promising ones: what
the compiler says of one program corrects what is predicted of the others.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from ivr_jax import sharding
from ivr_jax.compile import predict, programs
from ivr_jax.compile.jobs import Outcome
from ivr_jax.compile.topologies import Topology
from ivr_jax.config import flatten
from ivr_jax.errors import UserError
from ivr_jax.models.backbone_config import BackboneConfig

REMAT = ("full", "output", "attention+output", "attention+output+qkv", "attention+output+qkv+gate+up")
CHUNKS = (65_536, 16_384, 4_096, 2_048)
LOW_PRECISION = {"optimizer.moment_dtype": "bfloat16", "gradient_dtype": "bfloat16"}  # changes what is learnt
MARGIN = 0.94  # share of a chip's memory that a predicted total may take
FIRST_CORRECTION = 1.1  # of a prediction, before anything was compiled
GROUP = ("mesh.data", "mesh.fsdp", "mesh.tensor", "model.fsdp_over_tensor", "model.remat")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is changed of a config ({"grad_accum_steps": 4, …}), and what is predicted of the result."""

    changes: Mapping[str, Any]
    prediction: predict.Prediction

    def flags(self) -> str:
        """The changes as flags of a command, "" for none."""
        return " ".join(f"--config.{key}={value}" for key, value in self.changes.items())

    def apply(self, config: ConfigDict) -> ConfigDict:
        """A copy of `config` with the changes."""
        return _changed(config, self.changes)

    def fits(self, topology: Topology, correction: float) -> bool:
        """Whether the predicted memory, times `correction`, leaves a chip the margin."""
        return self.prediction.corrected(correction).total <= MARGIN * topology.chip.hbm

    @property
    def order(self) -> tuple[float, int, int]:
        """Fastest first; of about equal ones the one that changes fewest keys, then the fewest micro-batches."""
        parts = self.changes.get("grad_accum_steps", 1)
        return round(math.log(self.prediction.seconds) * 100), len(self.changes), parts


def mesh_sizes(config: ConfigDict, count: int) -> dict[str, int]:
    """The sizes of `config.mesh` on `count` chips, with -1 replaced by what is left."""
    sizes = {axis: config.mesh.get(axis, 1) for axis in sharding.MESH_AXES}
    known = math.prod(size for size in sizes.values() if size > 0)
    return {axis: count // known if size == -1 else size for axis, size in sizes.items()}


def predicted(config: ConfigDict, topology: Topology) -> predict.Prediction:
    """Memory and time of the config's sft step.  Raises UserError where shapes do not divide over the mesh."""
    step, resident, flops = _described(config, mesh_sizes(config, topology.count))
    return _prediction(step, resident, flops, topology)


def correction(config: ConfigDict, topology: Topology, measured: Mapping[str, float]) -> float:
    """The factor for `Prediction.corrected`, from bytes a chip by kind that the compiler gave for this config."""
    expected = predicted(config, topology)
    exact = sum(size for kind, size in expected.kinds.items() if kind in predict.EXACT)
    return max(0.5, (sum(measured.values()) - exact) / (expected.total - exact))


def candidates(config: ConfigDict, topology: Topology, low_precision: bool = False) -> Iterator[Candidate]:
    """Every combination of mesh, accumulation, rematerialisation and loss chunk that divides over the topology.

    `low_precision`: with moments and sums of gradients in bfloat16.
    """
    own_sizes = mesh_sizes(config, topology.count)
    own = flatten(config) | {f"mesh.{axis}": size for axis, size in own_sizes.items()}
    remats = dict.fromkeys((config.model.remat, *REMAT))
    chunks = dict.fromkeys((config.loss_chunk_tokens, *(c for c in CHUNKS if c < config.loss_chunk_tokens)))
    for sizes in _meshes(programs.model_of(config), own_sizes, topology.count):
        fixed = {f"mesh.{axis}": size for axis, size in sizes.items()} | (LOW_PRECISION if low_precision else {})
        plain = {"grad_accum_steps": 1, "model.fsdp_over_tensor": False}
        try:
            first, resident, flops = _described(_changed(config, fixed | plain), sizes)
        except UserError:  # a batch or a large array that does not divide over this mesh
            continue
        for over_tensor, parts in itertools.product((False, True), _divisors(config.batch)):
            shards = sizes["data"] * sizes["fsdp"] * (sizes["tensor"] if over_tensor else 1)
            if config.batch // parts % shards or (over_tensor and sizes["tensor"] == 1):
                continue
            for remat, chunk in itertools.product(remats, chunks):
                model = dataclasses.replace(first.model, remat=remat, fsdp_over_tensor=over_tensor)
                step = dataclasses.replace(first, model=model, parts=parts, chunk=chunk)
                wanted = fixed | {"grad_accum_steps": parts, "loss_chunk_tokens": chunk, "model.remat": remat,
                                  "model.fsdp_over_tensor": over_tensor}  # fmt: skip
                changes = {key: value for key, value in wanted.items() if value != own[key]}
                yield Candidate(changes, _prediction(step, resident, flops, topology))


def search(
    config: ConfigDict, topology: Topology, compile_one: Callable[[ConfigDict], Outcome], compilations: int
) -> list[tuple[Candidate, Outcome]]:
    """Compiles the most promising candidates, at most `compilations`; those that fit, fastest first.

    Every program that is compiled differs from the others in mesh or rematerialisation.

    Raises:
      UserError: no candidate is predicted to fit.
    """
    pools = (list(candidates(config, topology)), list(candidates(config, topology, low_precision=True)))
    factor, tried, found = FIRST_CORRECTION, [], []
    for _ in range(compilations):
        best = next((b for pool in pools if (b := _best(pool, topology, factor, tried))), None)
        if best is None:
            break
        outcome = compile_one(best.apply(config))
        tried.append(best)
        if outcome.plan is not None:
            factor = correction(best.apply(config), topology, outcome.plan.kinds)
        if outcome.ok:
            found.append((best, outcome))
    if not tried:
        raise UserError(f"no mesh, accumulation, remat or chunk of this config fits {topology}.",
                        slice_needed(config, topology))
    return sorted(found, key=lambda pair: pair[1].estimate.seconds)


def _best(
    pool: Sequence[Candidate], topology: Topology, factor: float, tried: Sequence[Candidate]
) -> Candidate | None:
    """The fastest candidate that is predicted to fit, of a mesh and rematerialisation that were not tried."""
    seen = [{key: c.changes.get(key) for key in GROUP} for c in tried]
    open_ = (c for c in pool if {key: c.changes.get(key) for key in GROUP} not in seen and c.fits(topology, factor))
    return min(open_, key=lambda c: c.order, default=None)


def slice_needed(config: ConfigDict, topology: Topology) -> str:
    """The smallest slice of this kind, by doubling, in which something is predicted to fit."""
    shape = list(topology.shape)
    while math.prod(shape) < 4096:
        shape[shape.index(min(shape))] *= 2
        larger = Topology(topology.kind, tuple(sorted(shape)))
        if any(c.fits(larger, FIRST_CORRECTION) for low in (False, True) for c in candidates(config, larger, low)):
            return f"Use a larger slice, as --topology={larger} --search."
    return "Use a smaller model or batch."


def _changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    copy = ConfigDict(config.to_dict())
    copy.update_from_flattened_dict(dict(changes))
    return copy.lock()


def _described(config: ConfigDict, sizes: Mapping[str, int]) -> tuple[predict.Step, Mapping[str, int], float]:
    """What the arithmetic needs of a config, the bytes a chip that are exact, and the operations of a step."""
    mesh = AbstractMesh(tuple(sizes[axis] for axis in sharding.MESH_AXES), sharding.MESH_AXES)
    program = programs.sft_step(programs.Setup(config, mesh))
    step = predict.Step(
        model=program.model, mesh=dict(sizes), rows=config.batch,
        length=min(config.data.length, program.model.max_position_embeddings), parts=config.grad_accum_steps,
        chunk=config.loss_chunk_tokens, gradient_bytes=jnp.dtype(config.gradient_dtype).itemsize,
        adapters=bool(config.lora.rank), param_bytes=program.resident["parameters"],
    )  # fmt: skip
    return step, program.resident, program.model_flops


def _prediction(
    step: predict.Step, resident: Mapping[str, int], flops: float, topology: Topology
) -> predict.Prediction:
    return predict.Prediction({**resident, **predict.temporaries(step)}, predict.seconds(step, flops, topology))


def _meshes(model: BackboneConfig, own: Mapping[str, int], count: int) -> Iterator[Mapping[str, int]]:
    yield own
    for data, tensor in itertools.product((1, 2, 4), (1, 2, 4, 8, 16)):
        sizes = {"data": data, "fsdp": count // (data * tensor), "tensor": tensor, "sequence": 1}
        if math.prod(sizes.values()) == count and sizes != own and predict.divides(model, sizes):
            yield sizes


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
