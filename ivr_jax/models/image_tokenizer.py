"""The image tokenizer (IBQ: index backpropagation quantization) of Emu3.5, at any size.

A convolutional encoder makes a grid of latents, each latent takes the code with the largest *dot product*, and a
convolutional decoder makes an image of the codes.  In training every code gets a gradient: the forward pass uses the
hard assignment, the backward pass the softmax over all codes.  Functional use, parameters in a plain nested dict:

    params = init_params(config, key)
    codes = encode(config, params, pixels_to_unit(images))          int32 [B, y, x]
    images = unit_to_pixels(decode(config, params, codes))          uint8 [B, height, width, 3]
    reconstruction, aux = train_forward(config, params, pixels_to_unit(images))

height and width are multiples of `config.factor` (16 for five levels); y = height / factor, x = width / factor.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ivr_jax.config import NotNegative, Range, Section, check_value
from ivr_jax.errors import UserError
from ivr_jax.models import layers
from ivr_jax.models.backbone_config import AboveZero, Dtype, Rate, Size
from ivr_jax.models.image_layers import Downsample, GroupNorm, ResBlock, SpatialAttention, Upsample, conv

Params = dict[str, Any]
CODEBOOK_CHUNK = 8192  # codes scored at a time by `encode`, fewer for many cells
SCORES_AT_A_TIME = 1 << 27  # entries of the [cells, codes] table that are held (training recomputes them backwards)
_MOST = 64  # levels, and blocks of a level, so that a damaged file is an error and not an endless program
_DDCONFIG = ("ch", "out_ch", "ch_mult", "num_res_blocks", "attn_resolutions", "in_channels", "resolution", "z_channels",
             "double_z", "dropout")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ImageTokenizerConfig(Section, name="model"):
    """Sizes of the tokenizer; names are those of the public `config.yaml` (`ddconfig`, `n_embed`, `embed_dim`, `beta`).

    Attributes:
      norm_groups: groups of every group norm (32 in public checkpoints); every channel count must be a multiple.
      attn_resolutions: levels with attention, named by their side when the image has side `resolution`.
      entropy_temperature: of the softmax in the entropy terms.
      dtype, param_dtype: of the convolutions and of the stored parameters.
    """

    ch: Size
    out_ch: Size
    ch_mult: tuple[int, ...]
    num_res_blocks: Annotated[int, Range(1, _MOST)]
    attn_resolutions: tuple[int, ...]
    in_channels: Size
    resolution: Size
    z_channels: Size
    n_embed: Size
    embed_dim: Size
    double_z: bool = False
    dropout: Rate = 0.0
    beta: NotNegative = 0.25
    norm_groups: Size = 32
    entropy_temperature: AboveZero = 0.01
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ch_mult", "attn_resolutions"):
            value = getattr(self, name) or ()
            if not isinstance(value, (list, tuple)) or len(value) > _MOST or not value and name == "ch_mult":
                raise UserError(f"`model.{name}` is {value!r}.", f"Give a list of whole numbers, {_MOST} at most.")
            for one in value:
                check_value(f"model.{name}", one, Size)
            object.__setattr__(self, name, tuple(value))
        for width in (self.ch, *(self.ch * multiple for multiple in self.ch_mult)):
            if width % self.norm_groups:
                raise UserError(f"`model.norm_groups` is {self.norm_groups}.",
                                f"It must divide every width, here {width}.")

    @property
    def factor(self) -> int:
        """Pixels a latent cell, along each side."""
        return 2 ** (len(self.ch_mult) - 1)

    @classmethod
    def describes(cls, fields: Mapping[str, Any]) -> bool:
        """Whether a parsed config file is of an image tokenizer, complete or not."""
        return "ch_mult" in _flat(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], **options: Any) -> ImageTokenizerConfig:
        """From a parsed `config.yaml` or `config.json`, flat, or with `ddconfig` inside, or under model → params or
        model → init_args. `options` sets what such a file does not know (dtypes)."""
        flat = _flat(fields)
        known = {field.name for field in dataclasses.fields(cls)}
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if missing := sorted(required - flat.keys()):
            raise UserError(f"the image tokenizer's config has no {', '.join(missing)}.",
                            "Take the config.yaml or config.json that belongs to the weights.")
        return cls(**{name: value for name, value in flat.items() if name in known}, **options)

    def to_dict(self) -> dict[str, Any]:
        """The mapping to write to `config.json` or `config.yaml`, in the public layout."""
        fields = dataclasses.asdict(self)
        fields["ch_mult"], fields["attn_resolutions"] = list(self.ch_mult), list(self.attn_resolutions)
        ddconfig = {name: fields.pop(name) for name in _DDCONFIG}
        return {"ddconfig": ddconfig, **{name: value for name, value in fields.items() if "dtype" not in name}}


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("model", "params", "init_args"):
        inner = fields.get(key)
        fields = inner if isinstance(inner, Mapping) else fields
    inner = fields.get("ddconfig")
    return {**fields, **(inner if isinstance(inner, Mapping) else {})}


class TokenizerAux(NamedTuple):
    """What training measures beside the reconstruction; means are over all cells of the batch, entropies in nats.

    Attributes:
      quantisation: the loss |z_q − z|² + |sg(z_q2) − z|² + β |z_q2 − sg(z)|², each a mean over cells and channels.
      cell_entropy: mean entropy of a cell's softmax over codes (to be made small: decided cells).
      batch_entropy: entropy of the mean softmax (to be made large: all codes in use).
      code_counts: int32 [N], how many cells took each code.
      codes: int32 [B, y, x].
    """

    quantisation: jax.Array
    cell_entropy: jax.Array
    batch_entropy: jax.Array
    code_counts: jax.Array
    codes: jax.Array


class _Stack(nnx.Module):
    """Children named "0", "1", …, so that parameter paths read as in PyTorch's ModuleList."""

    def __init__(self, children: list[nnx.Module]):
        self.count = len(children)
        for index, child in enumerate(children):
            setattr(self, str(index), child)

    def __iter__(self):
        return (getattr(self, str(index)) for index in range(self.count))


class _Level(nnx.Module):
    """Residual blocks, each followed by attention if the level has it; whoever owns it may add a resampler."""

    downsample: Downsample
    upsample: Upsample

    def __init__(
        self, inputs: int, outputs: int, blocks: int, attends: bool, config: ImageTokenizerConfig, rngs: nnx.Rngs
    ):
        widths = itertools.pairwise([inputs] + [outputs] * blocks)
        self.block = _Stack([ResBlock(a, b, config, rngs) for a, b in widths])
        self.attn = _Stack([SpatialAttention(outputs, config, rngs) for _ in range(blocks if attends else 0)])

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        attention = list(self.attn) or [None] * self.block.count
        for index, (block, attend) in enumerate(zip(self.block, attention, strict=True)):
            x = block(x, _fold(key, index))
            x = attend(x) if attend else x
        return x


class _Middle(nnx.Module):
    def __init__(self, width: int, config: ImageTokenizerConfig, rngs: nnx.Rngs):
        self.block_1 = ResBlock(width, width, config, rngs)
        self.attn_1 = SpatialAttention(width, config, rngs)
        self.block_2 = ResBlock(width, width, config, rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return self.block_2(self.attn_1(self.block_1(x, _fold(key, 0))), _fold(key, 1))


class Encoder(nnx.Module):
    """[B, height, width, in_channels] → [B, y, x, z_channels (twice that with double_z)]."""

    def __init__(self, config: ImageTokenizerConfig, rngs: nnx.Rngs):
        widths = [config.ch * multiple for multiple in (1, *config.ch_mult)]
        last = len(config.ch_mult) - 1
        self.conv_in = conv(config.in_channels, config.ch, 3, config, rngs)
        levels = []
        for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            attends = config.resolution // 2**index in config.attn_resolutions
            level = _Level(inputs, outputs, config.num_res_blocks, attends, config, rngs)
            if index != last:
                level.downsample = Downsample(outputs, config, rngs)
            levels.append(level)
        self.down = _Stack(levels)
        self.mid = _Middle(widths[-1], config, rngs)
        self.norm_out = GroupNorm(widths[-1], config, rngs)
        self.conv_out = conv(widths[-1], config.z_channels * (1 + config.double_z), 3, config, rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        x = self.conv_in(x)
        for index, level in enumerate(self.down):
            x = level(x, _fold(key, index))
            x = level.downsample(x) if index != self.down.count - 1 else x
        x = self.mid(x, _fold(key, self.down.count))
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """[B, y, x, z_channels] → [B, height, width, out_ch]; one residual block a level more than the encoder."""

    def __init__(self, config: ImageTokenizerConfig, rngs: nnx.Rngs):
        widths = [config.ch * multiple for multiple in config.ch_mult]
        self.conv_in = conv(config.z_channels, widths[-1], 3, config, rngs)
        self.mid = _Middle(widths[-1], config, rngs)
        levels = []
        for index, (outputs, inputs) in enumerate(itertools.pairwise([*widths, widths[-1]])):
            attends = config.resolution // 2**index in config.attn_resolutions
            level = _Level(inputs, outputs, config.num_res_blocks + 1, attends, config, rngs)
            if index != 0:
                level.upsample = Upsample(outputs, config, rngs)
            levels.append(level)
        self.up = _Stack(levels)
        self.norm_out = GroupNorm(widths[0], config, rngs)
        self.conv_out = conv(widths[0], config.out_ch, 3, config, rngs)

    def __call__(self, z: jax.Array, key: jax.Array | None = None) -> jax.Array:
        x = self.mid(self.conv_in(z), _fold(key, self.up.count))
        for index, level in reversed(list(enumerate(self.up))):
            x = level(x, _fold(key, index))
            x = level.upsample(x) if index != 0 else x
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class _Embedding(nnx.Module):
    def __init__(self, config: ImageTokenizerConfig, rngs: nnx.Rngs):
        shape, init = (config.n_embed, config.embed_dim), layers.fan_in_normal(config.embed_dim)
        self.weight = layers.param(rngs, shape, ("codes", "code_dim"), init, config.param_dtype)


class _Quantizer(nnx.Module):
    """The codebook, `quantize.embedding.weight` [N, C]."""

    def __init__(self, config: ImageTokenizerConfig, rngs: nnx.Rngs):
        self.embedding = _Embedding(config, rngs)


class ImageTokenizer(nnx.Module):
    """Encoder, codebook and decoder; see the functions below for its functional use."""

    def __init__(self, config: ImageTokenizerConfig, *, rngs: nnx.Rngs):
        self.config = config
        z_channels = config.z_channels
        self.encoder = Encoder(config, rngs)
        self.quant_conv = conv(z_channels * (1 + config.double_z), config.embed_dim, 1, config, rngs)
        self.quantize = _Quantizer(config, rngs)
        self.post_quant_conv = conv(config.embed_dim, z_channels, 1, config, rngs)
        self.decoder = Decoder(config, rngs)

    @property
    def codebook(self) -> jax.Array:
        """float32 [N, C]."""
        return jnp.asarray(self.quantize.embedding.weight[...], jnp.float32)

    def latents(self, pixels: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """pixels [B, height, width, channels] in [−1, 1] → float32 [B, y, x, C]."""
        height, width = pixels.shape[1:3]
        if height % self.config.factor or width % self.config.factor:
            raise UserError(f"an image of {height}×{width} pixels does not divide into cells of {self.config.factor}.",
                            f"Resize it so that both sides are multiples of {self.config.factor}.")
        hidden = self.encoder(pixels.astype(self.config.dtype), _fold(key, 0))
        return self.quant_conv(hidden).astype(jnp.float32)

    def paint(self, latents: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Quantised latents [B, y, x, C] → float32 [B, height, width, out_ch], about [−1, 1], not clipped."""
        hidden = self.post_quant_conv(latents.astype(self.config.dtype))
        return self.decoder(hidden, _fold(key, 1)).astype(jnp.float32)


def _fold(key: jax.Array | None, index: int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, index)


@functools.lru_cache(maxsize=32)
def _abstract(config: ImageTokenizerConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return layers.abstract_module(lambda: ImageTokenizer(config, rngs=nnx.Rngs(0)))


def module(config: ImageTokenizerConfig, params: Params) -> ImageTokenizer:
    """The module that holds these parameters; cheap, meant for use inside `jax.jit`."""
    return nnx.merge(_abstract(config)[0], params)


def init_params(config: ImageTokenizerConfig, key: jax.Array) -> Params:
    """Fresh parameters, a plain nested dict of arrays in `param_dtype`."""
    return nnx.to_pure_dict(nnx.state(ImageTokenizer(config, rngs=nnx.Rngs(key))))


def param_shapes(config: ImageTokenizerConfig) -> Params:
    """The tree of `init_params` as ShapeDtypeStructs; nothing is allocated."""
    held = nnx.to_pure_dict(_abstract(config)[1])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), held)


def param_axes(config: ImageTokenizerConfig) -> Params:
    """The tree of `init_params` with each array's logical axes, a tuple of one name a dimension."""
    return nnx.to_pure_dict(
        _abstract(config)[1], extract_fn=lambda variable: variable.get_metadata("out_sharding")
    )


def with_codebook(params: Params, codebook: jax.Array) -> Params:
    """The parameters with another codebook [N, C]."""
    old = params["quantize"]["embedding"]["weight"]
    if codebook.shape != old.shape:
        raise ValueError(f"a codebook of shape {codebook.shape} for one of shape {old.shape}")
    embedding = {**params["quantize"]["embedding"], "weight": codebook.astype(old.dtype)}
    return {**params, "quantize": {**params["quantize"], "embedding": embedding}}


def nearest_codes(latents: jax.Array, codebook: jax.Array, chunk: int = CODEBOOK_CHUNK) -> jax.Array:
    """Index of the code with the largest dot product (the first of equals).

    latents float32 [..., C], codebook float32 [N, C] → int32 [...]. At most `chunk` codes are scored at a time, and
    `SCORES_AT_A_TIME` pairs of a cell and a code.
    """
    count, width = codebook.shape
    cells = latents.reshape(-1, width)
    chunk = max(1, min(chunk, count, SCORES_AT_A_TIME // max(1, len(cells))))
    chunks = -(-count // chunk)
    codebook = jnp.pad(codebook, ((0, chunks * chunk - count), (0, 0))).reshape(chunks, chunk, width)
    starts = jnp.arange(chunks, dtype=jnp.int32) * chunk

    def score(best, block):
        codes, start = block
        scores = jnp.matmul(cells, codes.T, precision=jax.lax.Precision.HIGHEST)
        scores = jnp.where((start + jnp.arange(chunk) < count)[None, :], scores, -jnp.inf)
        index, value = jnp.argmax(scores, axis=1).astype(jnp.int32), jnp.max(scores, axis=1)
        better = value > best[0]
        return (jnp.where(better, value, best[0]), jnp.where(better, start + index, best[1])), None

    empty = jnp.full(cells.shape[:1], -jnp.inf), jnp.zeros(cells.shape[:1], jnp.int32)
    (_, codes), _ = jax.lax.scan(score, empty, (codebook, starts))
    return codes.reshape(latents.shape[:-1])


def encode(config: ImageTokenizerConfig, params: Params, pixels: jax.Array) -> jax.Array:
    """pixels float [B, height, width, 3] in [−1, 1] → codes int32 [B, y, x]. UserError if a side does not divide."""
    model = module(config, params)
    return nearest_codes(model.latents(pixels), model.codebook)


def decode(config: ImageTokenizerConfig, params: Params, codes: jax.Array) -> jax.Array:
    """codes int [B, y, x] → float32 [B, height, width, 3], about [−1, 1], not clipped.

    Callers use `image_codec.ImageCodec`, which batches.
    """
    model = module(config, params)
    return model.paint(model.codebook[codes])


def _index_backpropagation(
    cells: jax.Array, codebook: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """cells [n, C] → straight-through codes z_q [n, C], indices [n], summed softmax [N] and summed entropy."""
    scores = jnp.matmul(cells, codebook.T, precision=jax.lax.Precision.HIGHEST)
    index = jnp.argmax(scores, axis=1)
    soft = jax.nn.softmax(scores, axis=1)
    one_hot = jax.nn.one_hot(index, codebook.shape[0]) + (soft - jax.lax.stop_gradient(soft))
    log_p = jax.nn.log_softmax(scores / temperature, axis=1)
    p = jnp.exp(log_p)
    return jnp.matmul(one_hot, codebook), index.astype(jnp.int32), jnp.sum(p, axis=0), -jnp.sum(p * log_p)


def quantise(config: ImageTokenizerConfig, codebook: jax.Array, latents: jax.Array) -> tuple[jax.Array, TokenizerAux]:
    """Index backpropagation: latents float32 [B, y, x, C] → straight-through codes [B, y, x, C] and the loss terms.

    The table of cells × codes is held `SCORES_AT_A_TIME` entries at a time and recomputed in the backward pass.
    """
    cells = latents.reshape(-1, latents.shape[-1])
    count, codes = cells.shape[0], codebook.shape[0]
    divisors = (n for n in range(1, count + 1) if count % n == 0)
    parts = next((n for n in divisors if count // n * codes <= SCORES_AT_A_TIME), count)
    assign = functools.partial(_index_backpropagation, codebook=codebook, temperature=config.entropy_temperature)
    if parts == 1:
        z_q, index, p_sum, entropy = assign(cells)
    else:
        z_q, index, p_sum, entropy = jax.lax.map(jax.checkpoint(assign), cells.reshape(parts, count // parts, -1))
        z_q, index, p_sum, entropy = z_q.reshape(cells.shape), index.reshape(count), p_sum.sum(0), entropy.sum()
    hard, fixed = codebook[index], jax.lax.stop_gradient
    loss = jnp.mean(jnp.square(z_q - cells)) + jnp.mean(jnp.square(fixed(hard) - cells))
    loss = loss + config.beta * jnp.mean(jnp.square(hard - fixed(cells)))
    p_mean = p_sum / count
    batch_entropy = -jnp.sum(p_mean * jnp.log(jnp.maximum(p_mean, 1e-30)))
    counts = jnp.zeros(codes, jnp.int32).at[index].add(1)
    aux = TokenizerAux(loss, entropy / count, batch_entropy, counts, index.reshape(latents.shape[:-1]))
    return z_q.reshape(latents.shape), aux


def train_forward(
    config: ImageTokenizerConfig, params: Params, pixels: jax.Array, *, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, TokenizerAux]:
    """pixels float [B, height, width, 3] in [−1, 1] → reconstruction of that shape (not clipped) and `TokenizerAux`."""
    model = module(config, params)
    quantised, aux = quantise(config, model.codebook, model.latents(pixels, dropout_key))
    return model.paint(quantised, dropout_key), aux


def pixels_to_unit(pixels: jax.Array) -> jax.Array:
    """uint8 in 0…255 → float32 in [−1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def unit_to_pixels(unit: jax.Array) -> jax.Array:
    """float in about [−1, 1] → uint8, clipped and rounded."""
    return jnp.round((jnp.clip(unit, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)
