"""The stage of an rl config: what is loaded, checked and joined before the first step of `grpo.Trainer`."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax import distributed, sharding
from ivr_jax.checkpoints import packed
from ivr_jax.checkpoints import system as systems
from ivr_jax.config import as_dataclass
from ivr_jax.errors import UserError
from ivr_jax.models import backbone, lora
from ivr_jax.protocol import codec
from ivr_jax.sampling.drafts import DraftBuffer
from ivr_jax.sampling.layout import LayoutOptions, RolloutLayout
from ivr_jax.training import grpo
from ivr_jax.training.judge_config import make_judge
from ivr_jax.training.loop import Stage
from ivr_jax.training.monitor import Monitor, MonitorOptions
from ivr_jax.training.optimizer import make_optimizer
from ivr_jax.training.prompts import (
    Prompt,
    PromptIterator,
    SameSize,
    check_lengths,
    image_sizes,
    prompt_source,
)
from ivr_jax.training.rl_options import RLOptions, rl_options
from ivr_jax.training.state import shard_state


def build(
    config: Any, workdir: pathlib.Path, mesh: jax.sharding.Mesh, probes: Sequence[grpo.Probe] = ()
) -> Stage:
    """The stage of an rl config; `probes` measure the policy now and then."""
    if not config.init:
        raise UserError("rl starts from a trained model.", "Give --config.init=WORKDIR of an sft run.")
    options, adapters = rl_options(config), as_dataclass(lora.LoraOptions, config.lora)
    distributed.share(config.prompts_per_step, "config.prompts_per_step")
    rows, rows_name = config[options.rows_option], f"config.{options.rows_option}"
    sharding.check_batch(mesh, rows, rows_name)
    answers = config.prompts_per_step * config.group_size
    sharding.check_batch(mesh, answers, "config.prompts_per_step x config.group_size")
    optimizer = make_optimizer(config.optimizer, options.optimizer_steps)
    monitor = Monitor(as_dataclass(MonitorOptions, config.monitor), options.grammar.modes)
    source = prompt_source(config.prompts, config.prompts.seed)
    judge = make_judge(config.judge, options.reward, source, workdir)
    # full training learns in float32 whatever the checkpoint holds: updates of 1e-6 are lost in bfloat16
    dtype = {} if adapters.rank else {"param_dtype": "float32"}
    text = config.text_tokenizer or None
    system = systems.load(config.init, config.image_tokenizer or None, text_tokenizer_path=text, mesh=mesh, **dtype)
    sharding.check_batch(mesh, rows, rows_name, system.config.fsdp_over_tensor)  # which the checkpoint says
    system = dataclasses.replace(system, area=config.prompts.image_area)
    longest = min(max(options.buckets), system.config.max_position_embeddings)
    factor = system.image_codec.config.factor
    sizes = image_sizes(config.prompts, config.prompts.seed)
    check_lengths(sizes, system.tokenizer, factor, options.answer_length, longest)
    if distributed.is_primary() and (note := length_note(options, system)):
        print(note)
    drafts = None
    if options.grpo.group == "draft" and options.grpo.draft_source == "buffer":
        fingerprint = systems.sharded_fingerprint(system.params, mesh)
        drafts = DraftBuffer(workdir / f"drafts-{jax.process_index()}", fingerprint)
    axes, meta = backbone.param_axes(system.config), _meta(config, system)
    if adapters.rank:
        params, axes = lora.add(system.params, adapters, jax.random.key(config.seed)), lora.axes(axes, adapters)
        system, meta = dataclasses.replace(system, params=None), {**meta, "lora": dataclasses.asdict(adapters)}
    else:
        params = jax.tree.map(jnp.copy, system.params)  # the reference stays; the state is donated
    state, (shards, _) = shard_state(mesh, axes, params, optimizer)
    layout = RolloutLayout(system.config, mesh, as_dataclass(LayoutOptions, config.rollout))
    placement = grpo.Placement(mesh, shards, layout)
    trainer = grpo.Trainer(system, judge, options, optimizer, placement, monitor, workdir / "gallery", drafts, probes)
    batches = SameSize(
        source, config.prompts_per_step, config.seed, functools.partial(_latent_size, system)
    )
    return Stage(
        grpo.OverlapState.begin(state, options.overlap) if options.overlap else state,
        PromptIterator(batches, monitor, options.overlap),
        trainer.step,
        meta,
        zero_gradient=False,
        activity=lambda: trainer.activity,
        close=judge.close,
    )


def _meta(config: Any, system: systems.System) -> dict[str, Any]:
    """Metadata of the run's checkpoints: those of `init`, and the tokenizers, which an import does not record."""
    text = config.text_tokenizer or system.meta["text_tokenizer"]
    images = config.image_tokenizer or packed.folder_of(config.init) or system.meta["image_tokenizer"]
    made = systems.backbone_meta(system.config, text, system.tokenizer, images, system.image_codec, config.to_dict())
    return {**system.meta, **made}


def length_note(options: RLOptions, system: systems.System) -> str:
    """What to say where the longest answers that the grammar allows may be cut; "" where they fit.

    Their images are as large as those of prompts without a source.
    """
    image = len(codec.encode_image(system.tokenizer, np.zeros(system.cells, np.int32)))
    most = codec.longest_answer(system.tokenizer, options.grammar, image)
    if most.tokens <= options.answer_length:
        return ""
    return (
        f"note: an answer may have up to {most.images} images of {image} tokens and {most.texts} texts of up to "
        f"{options.grammar.text_cap} each, {most.tokens:,} tokens in all; config.answer_length is "
        f"{options.answer_length:,}. Longer answers are cut (metric `truncated`)."
    )


def _latent_size(system: systems.System, prompt: Prompt) -> tuple[int, int]:
    """Latent rows and columns of the images that answer a prompt: those of its first source."""
    if not prompt.sample.sources:
        return system.cells
    height, width, _ = prompt.images[prompt.sample.sources[0]].shape
    return height // system.image_codec.config.factor, width // system.image_codec.config.factor
