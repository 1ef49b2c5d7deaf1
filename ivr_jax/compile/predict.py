"""Memory and time of a training step by arithmetic, without compiling it: what a search over configs is ordered by.

A compilation takes minutes; this takes milliseconds.  It counts what is live at once in each of three phases of a step:

    loss        activations kept for the backward pass, one chunk of the vocabulary, the output matrix
    layers      those activations, one layer's kernels and intermediate arrays, gradients
    embedding   gradients, and the float32 gradient of the embedding table before it is sharded

Parameters, moments and batch are exact (they come from the sharding table).  The rest was within a fifth of the
compiler's figure for the configs of docs/results/pods-compile.md, so a search corrects it by what the compiler says
(`Prediction.corrected`), and compiles what it proposes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from ivr_jax.compile.topologies import Topology
from ivr_jax.models.backbone_config import BackboneConfig

EFFICIENCY = 0.62  # share of the peak that a step reaches between its waits: what compiled schedules say
EXACT = ("parameters", "moments", "batch")  # kinds of memory that the sharding table gives
WORKING_COPIES = 3  # arrays of one kind that are live at once in the backward pass of a layer or of a chunk


@dataclasses.dataclass(frozen=True)
class Step:
    """What the arithmetic needs to know of a training step.

    Attributes:
      rows, length: of the batch of one optimizer step, or of one micro-batch with `accumulates` False.
      parts: micro-batches that it is divided into.
      chunk: tokens for which the vocabulary exists at a time, over all devices.
      gradient_bytes: bytes a number of the gradients' sum.
      adapters: only adapters have gradients (LoRA).
      param_bytes: of the trained parameters on one chip.
    """

    model: BackboneConfig
    mesh: Mapping[str, int]
    rows: int
    length: int
    parts: int
    chunk: int
    gradient_bytes: int
    adapters: bool
    param_bytes: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Bytes a chip by kind, and seconds of a step; `corrected` by what a compilation found."""

    kinds: Mapping[str, float]
    seconds: float

    @property
    def total(self) -> float:
        """Bytes of one chip."""
        return sum(self.kinds.values())

    def corrected(self, factor: float) -> Prediction:
        """With what is not `EXACT` multiplied by `factor`: the measured size of it over the predicted one."""
        kinds = {kind: size * (1 if kind in EXACT else factor) for kind, size in self.kinds.items()}
        return Prediction(kinds, self.seconds)


def temporaries(step: Step) -> dict[str, float]:
    """Bytes a chip of {"activations", "gradients", "temporaries"} at the phase of the step that needs most."""
    return max(phases(step), key=lambda kinds: sum(kinds.values()))


def phases(step: Step) -> tuple[dict[str, float], ...]:
    """Bytes a chip of {"activations", "gradients", "temporaries"} in the phases of the module's table, in its order."""
    model, mesh = step.model, step.mesh
    tensor, fsdp = mesh["tensor"], mesh["fsdp"]
    batch_shards = mesh["data"] * fsdp * (tensor if model.fsdp_over_tensor else 1)
    split = 1 if model.fsdp_over_tensor else tensor  # shards of heads and MLP
    rows = step.rows / step.parts / batch_shards
    tokens = rows * step.length / mesh["sequence"]  # on one chip
    width, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    query, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    size = jnp.dtype(model.dtype).itemsize
    param = jnp.dtype(model.param_dtype).itemsize
    residual = tokens * width * size / split  # the residual is split by tokens over the tensor shards

    kept = {"residual": residual, "attention": tokens * (query * size + 4 * model.num_attention_heads) / split,
            "output": residual, "qkv": tokens * (query + 2 * kv) * size / split,
            "gate": tokens * inner * size / split, "up": tokens * inner * size / split}  # fmt: skip
    names = {"full": (), "none": kept, "dots": kept}.get(model.remat, model.kept)
    activations = layers * (kept["residual"] + sum(kept[name] for name in names if name != "residual"))

    layer_params = width * (2 * query + 2 * kv + 3 * inner)
    kernels = layer_params * size / split  # of one layer, gathered
    largest = width * inner * size / split  # a kernel's gradient before it is scattered
    intermediate = tokens * (4 * query + 3 * inner) * size / split + 6 * tokens * width * size
    layer = 2 * kernels + 2 * largest + intermediate

    vocabulary = model.padded_vocab_size
    chunk_tokens = min(step.chunk, step.rows / step.parts * step.length) / (mesh["data"] * fsdp * mesh["sequence"])
    logits = chunk_tokens * vocabulary / tensor * 4
    head = width * vocabulary / tensor * size  # gathered
    head_gradient = width * vocabulary / (tensor * fsdp) * 4
    table_gradient = width * vocabulary / tensor * (4 + size)
    loss = WORKING_COPIES * logits + head + head_gradient

    layer_share = layers * layer_params / (layers * layer_params + 2 * width * vocabulary)
    in_place = model.remat == "full" and not step.adapters
    # Where gradients are not added in place, XLA casts the parameters of all layers once, before the loop over them.
    casts = 0 if in_place or param == size else step.param_bytes * layer_share * size / param
    if step.adapters:
        gradients = 0.0  # of adapters: small
    elif step.parts == 1:
        gradients = step.param_bytes
    else:
        total = step.param_bytes / param * step.gradient_bytes
        gradients = total + step.param_bytes * ((1 - layer_share) if in_place else 1)
    before_layers = gradients if step.parts > 1 else 0.0
    kinds = "activations", "gradients", "temporaries"
    needs = (
        (activations, before_layers, casts + loss),
        (activations, gradients, casts + layer),
        (residual, gradients, table_gradient),
    )
    return tuple(dict(zip(kinds, sizes, strict=True)) for sizes in needs)


def seconds(step: Step, flops: float, topology: Topology) -> float:
    """Predicted seconds of a step of `flops` operations (all chips, nothing recomputed): work, and what it waits for.

    Weights travel once a micro-batch in each of the forward, recomputed and backward pass, and overlap with work;
    activations travel between tensor shards four times a layer and pass, and a quarter of that is waited for.
    """
    model, mesh, chip = step.model, step.mesh, topology.chip
    again = {"full": 1.0, "none": 0.0, "dots": 0.3}.get(model.remat)
    if again is None:
        saved = {"qkv": 0.17, "gate": 0.3, "up": 0.3, "attention": 0.13, "output": 0.05}
        again = max(0.0, 1.0 - sum(saved[name] for name in model.kept))
    work = flops * (1 + again / 3) / (topology.count * chip.flops * EFFICIENCY)

    query, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    layer_params = model.hidden_size * (2 * query + 2 * kv + 3 * model.intermediate_size)
    split = 1 if model.fsdp_over_tensor else mesh["tensor"]
    gathered_over = mesh["fsdp"] * (mesh["tensor"] if model.fsdp_over_tensor else 1)
    size = jnp.dtype(model.dtype).itemsize
    passes = 3 if again else 2
    link = chip.link * min(chip.links, 4)
    weights = step.parts * (passes + 1) * model.num_hidden_layers * layer_params * size / split
    weights *= (gathered_over - 1) / gathered_over / link
    moved = 0.0
    if split > 1:
        tokens = step.rows * step.length / (mesh["data"] * mesh["fsdp"] * mesh["sequence"])
        moved = passes * 4 * model.num_hidden_layers * tokens * model.hidden_size * size * (split - 1) / split / link
    return max(work, weights) + moved / 4


def divides(model: BackboneConfig, mesh: Mapping[str, int]) -> bool:
    """Whether shards of the kernels are whole tiles of 8×128 numbers, which XLA:TPU needs to lay them out."""
    both = mesh["tensor"] * mesh["fsdp"]
    rows = (model.num_attention_heads * model.head_dim, model.intermediate_size, model.padded_vocab_size)
    if model.num_key_value_heads % mesh["tensor"] or any(size % both for size in rows):
        return False
    return model.hidden_size % (8 * mesh["fsdp"]) == 0
