"""Logits of a decoder from its checkpoint on disk, by this program and by transformers, a layer in memory at a time.

Both run the same fixed prompt in float32: what the two disagree by is what a conversion or our mathematics gets wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax.checkpoints.hf import open_weights
from ivr_jax.checkpoints.safetensors_io import row_blocks
from ivr_jax.models import backbone, layers
from ivr_jax.models.backbone_config import BackboneConfig

PROMPT_LENGTH = 32


def prompt(config: BackboneConfig) -> np.ndarray:
    """The fixed prompt: int32 [32], spread over the vocabulary."""
    return (7919 * np.arange(1, PROMPT_LENGTH + 1) % config.vocab_size).astype(np.int32)


def logits(
    config: BackboneConfig, params: Mapping[str, Any], tokens: np.ndarray, update: Callable[[], Any] = lambda: None
) -> np.ndarray:
    """Ours: int32 [T] → float32 [T, V].

    `params` is a tree of arrays or LazyArrays, read a layer at a time; `update` is called after each.
    """
    config = dataclasses.replace(config, dtype="float32")
    positions = np.arange(len(tokens), dtype=np.int32)[None]
    x = jnp.asarray(np.concatenate([params["embed"][token : token + 1] for token in tokens]), jnp.float32)[None]
    for layer in range(config.num_hidden_layers):
        stacked = params["layers"]
        one = jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf[layer : layer + 1])[0], stacked)
        x = backbone.apply_layer(config, one, x, positions)
        update()
    hidden = layers.rms_norm(x, jnp.asarray(params["final_norm"][:]), config.rms_norm_eps)[0]
    tied, found = config.tie_word_embeddings, []
    for bounds in row_blocks((config.vocab_size, config.hidden_size), 4):
        part = slice(*bounds)
        kernel = np.asarray(params["embed"][part]).T if tied else np.asarray(params["lm_head"][:, part])
        found.append(np.asarray(jnp.matmul(hidden, kernel.astype(np.float32))))
    return np.concatenate(found, axis=1)


def transformers_logits(
    config: BackboneConfig, folder: Path, tokens: np.ndarray, update: Callable[[], Any] = lambda: None
) -> np.ndarray | None:
    """Theirs, Qwen3 on the weights in `folder`: float32 [T, V], or None where PyTorch is missing.

    The model is built without memory; each of its layers is given its tensors when it runs, and loses them after
    (`update` is called). The embedding is looked up, and the output matrix applied, in parts.
    """
    try:
        import torch
        import transformers
    except ImportError:
        return None
    stored = open_weights(folder)
    fields = transformers.Qwen3Config(**config.to_hf("qwen3"))
    fields._attn_implementation = "eager"
    with torch.device("meta"):
        model = transformers.Qwen3Model(fields).eval()
    model.rotary_emb = type(model.rotary_emb)(fields)  # its table is computed, not stored

    def tensor(name: str, *index: slice) -> Any:
        return torch.from_numpy(stored[name].read(index).astype(np.float32))

    def fill(prefix: str, module: Any, _: Any) -> None:
        state = {name: tensor(f"{prefix}.{name}") for name, _ in module.named_parameters()}
        module.load_state_dict(state, assign=True)

    def empty(module: Any, inputs: Any, output: Any) -> None:
        module.to("meta")
        update()

    weighted = {f"model.layers.{i}": module for i, module in enumerate(model.layers)} | {"model.norm": model.norm}
    for prefix, module in weighted.items():
        module.register_forward_pre_hook(functools.partial(fill, prefix))
        module.register_forward_hook(empty)
    width, every = slice(0, config.hidden_size), "model.embed_tokens.weight"
    rows = torch.cat([tensor(every, slice(int(token), int(token) + 1), width) for token in tokens])
    head = every if config.tie_word_embeddings else "lm_head.weight"
    with torch.no_grad():
        hidden = model(inputs_embeds=rows[None], use_cache=False).last_hidden_state[0]
        parts = (tensor(head, slice(*bounds), width) for bounds in row_blocks(stored[head].shape, 4))
        return torch.cat([torch.nn.functional.linear(hidden, part) for part in parts], dim=1).numpy()
