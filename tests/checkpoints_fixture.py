"""A small decoder and a small image tokenizer."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from ivr_jax.checkpoints import hf
from ivr_jax.models import backbone
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig

CONFIG = BackboneConfig(
    vocab_size=21, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, vocab_multiple=8,
)  # fmt: skip
IMAGES = ImageTokenizerConfig(
    ch=4, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), in_channels=3, resolution=8, z_channels=5,
    n_embed=11, embed_dim=6, norm_groups=2,
)  # fmt: skip


def random_tree(shapes, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype), shapes)


def decoder_params():
    """The decoder's parameters, with zeros where the vocabulary is padded."""
    tree = random_tree(backbone.param_shapes(CONFIG))
    tree["embed"][21:] = 0
    tree["lm_head"][:, 21:] = 0
    return tree


def export_decoder(folder: Path, params) -> Path:
    hf.export_backbone(CONFIG, params, folder, shard_bytes=1500)  # many shards
    return folder


def assert_trees_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), actual, expected)
