"""The step functions of training and sampling with the shapes and shardings of a config; nothing is allocated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ivr_jax import sharding
from ivr_jax.config import as_dataclass
from ivr_jax.errors import UserError
from ivr_jax.models import backbone, lora
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.protocol import vocabulary
from ivr_jax.protocol.text import PhraseTokenizer
from ivr_jax.training import sft
from ivr_jax.training.optimizer import make_optimizer
from ivr_jax.training.state import TrainState
from ivr_jax.training.throughput import train_flops
from ivr_jax.world.language import PHRASES

PROGRAMS = {"sft": ("sft",), "rl": ("grpo", "prefill", "decode")}
NAMED_PROGRAMS = {"rl": ("generate",)}  # that are compiled only when named
MICRO_CODES = 64  # image codes of the micro-world; a run takes them from its image tokenizer


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function, ready to be traced under its mesh.

    Attributes:
      mesh: what it runs on; trace: traces it, under that mesh.
      model: the decoder; param_shapes: shapes of one chip's shards of its parameters.
      resident: bytes a chip of what is in HBM while it runs, by kind, argument of the program or not.
      model_flops: operations the mathematics needs in one call, all chips together, nothing computed twice.
      tokens: tokens that one call works on.
      one_pass: a call is one pass through the program's loop, whose length is known only at run time.
    """

    name: str
    mesh: Mesh
    trace: Callable[[], Any]
    model: BackboneConfig
    param_shapes: tuple[tuple[int, ...], ...]
    resident: Mapping[str, int]
    model_flops: float
    tokens: int
    one_pass: bool = False


def bytes_a_chip(tree: Any) -> int:
    """Bytes that the arrays of a tree of sharded ShapeDtypeStructs take on each chip."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def model_of(config: Any) -> BackboneConfig:
    """The decoder that a config with a `model` section trains."""
    if "model" not in config:
        raise UserError("this config has no `model` section, so its decoder's size is not known.",
                        "Add --model=CONFIG, the sft config that its `init` is trained with.")
    return BackboneConfig(vocab_size=vocabulary_of(config).size, **config.model)


def vocabulary_of(config: Any) -> vocabulary.Vocabulary:
    """Emu3.5's table, or the micro-world's."""
    micro = config.get("text_tokenizer", "") == "micro"
    return PhraseTokenizer(PHRASES, MICRO_CODES).vocab if micro else vocabulary.emu35()


class StandInTokenizer(PhraseTokenizer):
    """A text tokenizer of a given vocabulary with made-up texts: a plan needs shapes, not words.

    The grammar's tables get about the size that they have with the real tokenizer; no ranks file is needed.
    """

    def __init__(self, model_vocabulary: vocabulary.Vocabulary):
        super().__init__(PHRASES, model_vocabulary.visual_size)
        self.vocab = model_vocabulary

    def is_blank(self, token: int) -> bool:
        """As for text; ids that stand for nothing are not blank."""
        return token < len(self._bytes) + 256 and super().is_blank(token)


class Setup:
    """Shapes and shardings of what the programs of one config take on one mesh; `model` is the config's by default."""

    def __init__(self, config: Any, mesh: Mesh, model: BackboneConfig | None = None):
        self.config = config
        self.mesh = mesh
        self.model = model or model_of(config)
        self.vocabulary = vocabulary_of(config)
        axes, shapes = backbone.param_axes(self.model), backbone.param_shapes(self.model)
        self.params = sharding.abstract_sharded(mesh, axes, shapes)

    def array(self, shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        """An array that is only described, sharded by its logical axes."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding(self.mesh, axes, shape))

    def program(
        self, name: str, trace: Callable[[], Any], resident: Mapping[str, int], flops: float, tokens: int
    ) -> Program:
        """The program `trace` of this model and mesh; `resident`: bytes of a chip by kind, held throughout."""
        shapes = tuple(x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(self.params))
        return Program(name, self.mesh, trace, self.model, shapes, resident, flops, tokens)

    def state(self, optimizer: optax.GradientTransformation) -> TrainState:
        """The training state, with adapters when the config has some, sharded as `training.state.shard_state` does."""
        axes = backbone.param_axes(self.model)
        shapes = backbone.param_shapes(self.model)
        options = as_dataclass(lora.LoraOptions, self.config.lora) if "lora" in self.config else None
        if options is not None and options.rank:
            shapes = jax.eval_shape(lambda: lora.add(jax.tree.map(_zeros, shapes), options, jax.random.key(0)))
            axes = lora.axes(axes, options)
        moments = jax.eval_shape(optimizer.init, lora.split(shapes)[0])
        state = TrainState(shapes, moments)
        return sharding.abstract_sharded(self.mesh, sharding.state_axes(axes, shapes, state), state)


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype)


def sft_step(setup: Setup) -> Program:
    """`training.sft.make_step`: forward, backward, accumulation, clip, optimiser."""
    config, model = setup.config, setup.model
    rows, length = config.batch, min(config.data.length, model.max_position_embeddings)
    if rows % config.grad_accum_steps:
        raise UserError(f"a batch of {rows} does not divide into {config.grad_accum_steps} parts.",
                        "Make config.batch a multiple of config.grad_accum_steps.")
    part = rows // config.grad_accum_steps
    sharding.check_batch(setup.mesh, part, "config.batch / config.grad_accum_steps", model.fsdp_over_tensor)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = setup.state(optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(setup.mesh)
    step = sft.make_step(model, optimizer, config.loss_chunk_tokens, config.grad_accum_steps,
                         setup.vocabulary.visual_start, shardings, config.gradient_dtype)  # fmt: skip
    batch = {name: setup.array((rows, length), dtype, ("batch", "length"))
             for name, dtype in (("tokens", jnp.int32), ("segment_ids", jnp.int32), ("positions", jnp.int32),
                                 ("loss", jnp.uint8))}  # fmt: skip
    resident = {"parameters": bytes_a_chip(state.params), "moments": bytes_a_chip(state.opt_state),
                "batch": bytes_a_chip(batch)}  # fmt: skip
    flops = train_flops(model, rows * length, rows * length * length / 2)
    return setup.program("sft", lambda: step.trace(state, batch), resident, flops, rows * length)
