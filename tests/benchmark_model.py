"""A tiny model with the micro tokenizer, saved as a checkpoint; it knows nothing, and its answers have every mode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny_runs
from checkpoints_fixture import random_tree

from ivr_jax.checkpoints import store
from ivr_jax.checkpoints import system as systems
from ivr_jax.models import backbone
from ivr_jax.models.backbone_config import BackboneConfig

SETTINGS = ("--config.text_cap=3", "--config.answer_length=384", "--config.engine.slots=8", "--config.batch=8")


def write_model(folder: Path, kv_heads: int = 1) -> Path:
    """Returns the workdir of the backbone."""
    tiny_runs.prepare(folder)
    image_codec = systems.load_image_codec(folder / "image_tokenizer")
    tokenizer = systems.text_tokenizer(systems.MICRO, image_codec.config.n_embed)
    config = BackboneConfig(
        vocab_size=tokenizer.vocab.size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=kv_heads, head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    params = random_tree(backbone.param_shapes(config), 3)
    scaled = dict(params)
    scaled["lm_head"] = np.asarray(params["lm_head"]) * 0.2
    meta = systems.backbone_meta(config, systems.MICRO, tokenizer, folder / "image_tokenizer", image_codec, {})
    checkpointer = store.Checkpointer(folder / "backbone")
    checkpointer.save(0, {"params": scaled}, None, meta)
    checkpointer.wait()
    checkpointer.close()
    return folder / "backbone"
