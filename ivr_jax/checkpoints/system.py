"""A model with everything it needs to read and write: backbone, text tokenizer, image tokenizer.

A backbone checkpoint's metadata names its vocabulary and where its tokenizers are, so one path is enough:

    system = load("runs/demo/rl")

A checkpoint that was imported from released weights knows neither, so they are named:

    system = load("runs/emu35", "runs/emu35_images", text_tokenizer_path="Emu3.5-tokenizer")
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax import sharding
from ivr_jax.checkpoints import packed, store
from ivr_jax.cloud import inputs
from ivr_jax.cloud.objects import absolute, is_url
from ivr_jax.errors import UserError
from ivr_jax.images import fitted_size
from ivr_jax.models import backbone, image_tokenizer, int8, lora
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.models.image_codec import ImageCodec
from ivr_jax.protocol.emu_text import RANKS_FILE, VISION_FILE, EmuTokenizer
from ivr_jax.protocol.text import PhraseTokenizer, TextTokenizer
from ivr_jax.world.language import PHRASES

BACKBONE, IMAGE_TOKENIZER = "backbone", "image_tokenizer"
MICRO = "micro"
VOCABULARY = ("embed", "lm_head")  # arrays that `vocab_multiple` pads
MAY_DIFFER = (  # fields of BackboneConfig that say how a model computes, not which one it is
    "dtype", "param_dtype", "weight_dtype", "cache_dtype", "remat", "unroll", "attention", "decode_kernel",
    "fsdp_over_tensor", "dropout", "attention_dropout", "vocab_multiple",
)  # fmt: skip


@dataclasses.dataclass
class System:
    """One model ready for use.

    Attributes:
      params: the backbone's pytree; meta: its checkpoint's metadata.
      tokenizer: of texts; image_codec: the image tokenizer with its weights, from pixels to codes and back.
      mesh: where `params` are sharded; None: on one device.
      area: pixels of an image that no source gives a size; 0: the image tokenizer's training resolution, squared.
    """

    config: BackboneConfig
    params: Any
    tokenizer: TextTokenizer
    image_codec: ImageCodec
    meta: dict[str, Any]
    mesh: jax.sharding.Mesh | None = None
    area: int = 0

    @property
    def cells(self) -> tuple[int, int]:
        """Latent rows and columns of an image that no source gives a size: a square."""
        config = self.image_codec.config
        rows, columns = fitted_size(1, 1, self.area or config.resolution**2, config.factor)
        return rows // config.factor, columns // config.factor

    @property
    def longest_text(self) -> int:
        """The usual limit of one free text, in tokens: room for an observation of the micro-world, or for prose."""
        return 96 if self.meta.get("text_tokenizer") == MICRO else 512

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which programs on `params` run."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def text_tokenizer(kind: str, visual_size: int) -> TextTokenizer:
    """The text tokenizer named in a config or by a flag.

    Args:
      kind: "micro", the micro-world's phrase list, or a folder with an Emu3.5 tokenizer (see `protocol.emu_text`).
      visual_size: codes of the image tokenizer that goes with it.
    """
    if kind == MICRO:
        return PhraseTokenizer(PHRASES, visual_size)
    named, kind = kind, str(inputs.local(kind))
    if not os.path.isdir(kind):
        raise UserError(
            f"unknown text tokenizer {named!r}.", f'Use "micro", or a folder with {RANKS_FILE} and {VISION_FILE}.'
        )
    tokenizer = EmuTokenizer.load(kind)
    if tokenizer.vocab.visual_size != visual_size:
        raise UserError(
            f"the text tokenizer {named!r} has {tokenizer.vocab.visual_size} visual tokens, "
            f"the image tokenizer {visual_size} codes.",
            "Name two that belong together.",
        )
    return tokenizer


def _described(path: str | os.PathLike, kind: str, remedy: str) -> tuple[pathlib.Path | None, dict[str, Any]]:
    """The folder of a packed model, None for a checkpoint, and the metadata of its network of this kind."""
    folder = packed.folder_of(path)
    meta = packed.read_record(folder)[kind] if folder else store.read_meta(path)
    if meta.get("kind") != kind:
        wanted = "a backbone" if kind == BACKBONE else "an image tokenizer"
        raise UserError(f"{str(path)!r} holds a checkpoint of kind {meta.get('kind')!r}, not {wanted}.", remedy)
    return folder, meta


def load_image_codec(path: str | os.PathLike) -> ImageCodec:
    """The image tokenizer trained in workdir `path`."""
    if not path:
        raise UserError(
            "no image tokenizer was named.", "Give --config.image_tokenizer=WORKDIR of an image_tokenizer run."
        )
    folder, meta = _described(path, IMAGE_TOKENIZER, "Name the workdir of an image_tokenizer run.")
    config = image_tokenizer.ImageTokenizerConfig(**_tuples(meta["model"]))
    like = sharding.abstract_sharded(
        sharding.local_mesh(), image_tokenizer.param_axes(config), image_tokenizer.param_shapes(config)
    )
    if folder:
        return ImageCodec(config, packed.read_params(folder, IMAGE_TOKENIZER, like))
    params, _ = store.read_params(path, IMAGE_TOKENIZER, like)
    return ImageCodec(config, params)


def folder_of(path: str | os.PathLike) -> pathlib.Path:
    """The files of the model at `path`: a packed model's folder, or the step folder of a checkpoint."""
    return packed.folder_of(path) or store.resolve(path)


def name_of(path: str | os.PathLike) -> str:
    """What a record calls the model at `path`: a packed model's folder, or `store.name_of`."""
    return str(packed.folder_of(path) or store.name_of(path))


def load(
    path: str | os.PathLike,
    image_tokenizer_path: str | os.PathLike | None = None,
    image_codec: ImageCodec | None = None,
    text_tokenizer_path: str | os.PathLike | None = None,
    mesh: jax.sharding.Mesh | Callable[[BackboneConfig], jax.sharding.Mesh] | None = None,
    **options: Any,
) -> System:
    """The system of the backbone checkpoint at `path` (see `store.resolve`), or of a packed model (see `packed`).

    Args:
      path: a workdir or step folder; a packed folder, or "micro" for the model that the package carries.
      image_tokenizer_path: where its image tokenizer is now, if it was moved or never recorded.
      image_codec: an image tokenizer already loaded.
      text_tokenizer_path: the same of its text tokenizer: a folder, or "micro".
      mesh: where the parameters go, shard by shard, or what says it of the model's config; one device by default.
      options: fields of BackboneConfig.  Those of `MAY_DIFFER` replace the checkpoint's: it computes in `dtype`, its
        parameters are cast to `param_dtype` as they are read, a shard at a time, its kernels then turned to
        `weight_dtype`, one after the other, and `vocab_multiple` pads the vocabulary.  All others must be the
        checkpoint's.
    """
    folder, meta = _described(path, BACKBONE, "Name the workdir of an sft or rl run.")
    text_kind = text_tokenizer_path or meta.get("text_tokenizer")
    image_path = image_tokenizer_path or folder or meta.get("image_tokenizer")
    if not text_kind or not (image_codec or image_path):
        raise UserError(
            f"the checkpoint {str(path)!r} does not say which tokenizers it was trained with.",
            "It was imported: name both with --text_tokenizer=FOLDER --image_tokenizer=WORKDIR (where there are "
            "no such flags, --config.text_tokenizer and --config.image_tokenizer); what it trains knows them.",
        )
    image_codec = image_codec or load_image_codec(image_tokenizer_path or folder or _nearby(path, image_path, "image"))
    recorded = meta.get("image_tokenizer_fingerprint")
    if recorded is not None and recorded != fingerprint(image_codec.params):
        raise UserError(
            f"{str(path)!r} was trained with another image tokenizer.",
            "Name the right one with --image_tokenizer=WORKDIR.",
        )
    if not text_tokenizer_path and text_kind != MICRO:
        text_kind = _nearby(path, text_kind, "text")
    tokenizer = text_tokenizer(str(text_kind), image_codec.config.n_embed)
    config = _config(meta["model"], options, path)
    check_vocabulary(tokenizer, config, meta, path)
    like = backbone.param_shapes(dataclasses.replace(config, weight_dtype=""))
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):  # a mesh itself is callable, too
        mesh = mesh(config)
    if mesh is not None:
        like = sharding.abstract_sharded(mesh, backbone.param_axes(dataclasses.replace(config, weight_dtype="")), like)
    if folder:
        params = packed.read_params(folder, BACKBONE, like, VOCABULARY)
        params = int8.quantise_kernels(params) if config.weight_dtype else params
    elif config.weight_dtype:
        params, meta = _read_quantised(path, like)
    else:
        params, meta = store.read_params(path, BACKBONE, like, VOCABULARY)
    return System(config, params, tokenizer, image_codec, meta, mesh)


def _read_quantised(path: str | os.PathLike, like: Any) -> tuple[Any, dict[str, Any]]:
    """`store.read_params` with kernels as int8, read one by one: one of them at a time is held as it is stored."""
    quantise = jax.jit(int8.quantise_kernel)
    kernels: dict[str, Any] = {}
    rest = {**like, "layers": dict(like["layers"])}
    for name, place in lora.PLACES.items():
        wanted = like["layers"][place][name]
        found, _ = store.read_params(path, BACKBONE, {"layers": {place: {name: wanted}}})
        values, scale = jax.block_until_ready(quantise(found["layers"][place][name]))
        del found  # before the next is read
        kernels.setdefault(place, {}).update({name: values, name + int8.SCALE: scale})
        rest["layers"][place] = {key: x for key, x in rest["layers"][place].items() if key != name}
    rest["layers"] = {place: part for place, part in rest["layers"].items() if part != {}}  # Orbax wants no empty ones
    params, meta = store.read_params(path, BACKBONE, rest, VOCABULARY)
    layers = {place: {**held, **kernels.get(place, {})} if isinstance(held, dict) else held
              for place, held in params["layers"].items()}  # fmt: skip
    return {**params, "layers": {**kernels, **layers}}, meta


def answering_options(mesh: jax.sharding.Mesh | None, dtype: str | None = None, **options: Any) -> dict[str, Any]:
    """Options of `load` for a model that only answers: `options`, its dtype, and a vocabulary padded until it divides
    over a mesh (Emu3.5's 282,926 rows divide by 2 only)."""
    if dtype is not None:
        options = {**options, "dtype": dtype, "param_dtype": dtype}
    return options if mesh is None else {**options, "vocab_multiple": mesh.size}


def _config(model: Mapping[str, Any], options: Mapping[str, Any], path: str | os.PathLike) -> BackboneConfig:
    """The checkpoint's config with `options`.  Raises UserError for an option that its weights do not allow."""
    stored, config = BackboneConfig(**_tuples(model)), BackboneConfig(**_tuples({**model, **options}))
    others = [n for n in options if n not in MAY_DIFFER and getattr(stored, n) != getattr(config, n)]
    if others:
        wanted = ", ".join(f"model.{name}={getattr(stored, name)!r} (not {options[name]!r})" for name in others)
        raise UserError(
            f"the checkpoint {str(path)!r} was made with {wanted}.",
            "Give the checkpoint's values, or start from another checkpoint.",
        )
    return config


def backbone_meta(
    config: BackboneConfig,
    tokenizer_kind: str,
    tokenizer: TextTokenizer,
    image_tokenizer_path: str | os.PathLike,
    image_codec: ImageCodec,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """Metadata of a backbone checkpoint: what `load` needs, and the run's config for the record."""
    return {
        "kind": BACKBONE,
        "model": dataclasses.asdict(config),
        "text_tokenizer": tokenizer_kind if tokenizer_kind == MICRO else absolute(tokenizer_kind),
        "vocabulary": tokenizer.fingerprint,
        "image_tokenizer": absolute(image_tokenizer_path),
        "image_tokenizer_fingerprint": fingerprint(image_codec.params),
        "run": dict(run),
    }


def check_vocabulary(
    tokenizer: TextTokenizer, config: BackboneConfig, meta: Mapping[str, Any], path: str | os.PathLike
) -> None:
    """Raises UserError when the checkpoint's token ids mean something else here, or are more or fewer."""
    if meta.get("vocabulary", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(
            f"the checkpoint {str(path)!r} was made with another vocabulary.",
            "Name its own with --text_tokenizer=FOLDER; where nothing was moved, train it again with this version of "
            "the program.",
        )
    if config.vocab_size != tokenizer.vocab.size:
        raise UserError(
            f"the checkpoint {str(path)!r} has {config.vocab_size} token ids, its tokenizers {tokenizer.vocab.size}.",
            "Name the tokenizers that belong to it.",
        )


def fingerprint(params: Any) -> str:
    """A short hash of a parameter pytree's values, which are all on this process's devices."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def sharded_fingerprint(params: Any, mesh: jax.sharding.Mesh) -> str:
    """A short hash of parameters that may be spread over processes; the same however they are sharded over `mesh`.

    Called by all processes together.  It is another one than `fingerprint`.
    """
    replicated = sharding.replicated(mesh)
    checksums = jax.jit(lambda leaves: jnp.stack([_checksum(x) for x in leaves]), out_shardings=replicated)
    return hashlib.sha256(np.asarray(checksums(jax.tree.leaves(params))).tobytes()).hexdigest()[:16]


def _checksum(x: jax.Array) -> jax.Array:
    """uint32 [2]: sums of the bits of x with weights by place; modulo 2^32, so exact in whatever order."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = (place ^ (place >> 15)) * jnp.uint32(0x2C1B3C6D)
    weights = (2 * place + 1, (mixed ^ (mixed >> 12)) | 1)
    return jnp.stack([(bits * weight).sum(dtype=jnp.uint32) for weight in weights])


def _nearby(path: str | os.PathLike, recorded: str | os.PathLike, which: str) -> str | pathlib.Path:
    """The recorded image or text tokenizer, or the folder of that name beside the run when both were moved together."""
    recorded_path = pathlib.Path(recorded)
    if is_url(recorded):
        return str(recorded)
    if recorded_path.exists():
        return recorded_path
    if is_url(path):
        address = re.sub(rf"/{store.FOLDER}/\d+/?$", "", str(path).rstrip("/"))
        return f"{address.rpartition('/')[0]}/{recorded_path.name}"
    folder = store.resolve(path)
    run = folder.parent.parent if folder.parent.name == store.FOLDER else folder
    beside = run.parent / recorded_path.name
    if beside.exists():
        return beside
    raise UserError(
        f"the {which} tokenizer {recorded!r} of checkpoint {str(path)!r} is not there.",
        f"Name it with --{which}_tokenizer=…",
    )


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
