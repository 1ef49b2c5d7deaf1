"""The decoder's sizes and options, and how they read and write a transformers `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from ivr_jax.config import OneOf, Range, Section
from ivr_jax.errors import UserError

MODEL_TYPES = {"emu3": ("Emu3", "Emu3ForCausalLM"), "qwen3": ("qwen3", "Qwen3ForCausalLM")}
REMAT = ("none", "full", "dots")
KEPT = ("attention", "output", "qkv", "gate", "up")  # what "full" may keep all the same, by its checkpoint name
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_REFUSED = {
    "attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "hidden_act": "silu",
    "partial_rotary_factor": 1.0, "quantization_config": None,
}  # fmt: skip
# Sizes are bounded, so that a damaged file is an error and not an endless program.
Size = Annotated[int, Range(1, 2**31 - 1)]
Layers = Annotated[int, Range(1, 10_000)]
AboveZero = Annotated[float, Range(above=0)]
Rate = Annotated[float, Range(0, below=1)]
Dtype = Annotated[str, OneOf("float32", "bfloat16", "float16", "float64")]
_OTHER_FILE = "Take the config.json that belongs to the weights."
_ONE_OF_TWO = "Find out which of the two belongs to the weights, and remove the other."


@dataclasses.dataclass(frozen=True)
class BackboneConfig(Section, name="model"):
    """Sizes and options of the decoder. Names of the sizes are those of transformers' `config.json`.

    Attributes:
      rope_scaling: None, or (rope_type, factor) with rope_type "linear" or "dynamic"; a mapping is accepted.
      dropout: rate on the output of attention and MLP; attention_dropout: rate on attention weights. Both act only
        when a dropout key is given to the forward pass.
      dtype: of activations and matrix products; param_dtype: of the stored parameters.
      remat: what the backward pass recomputes in a layer: "none", "full" (all), "dots" (all but matrix products and the
        results of fused attention), or all but the named ones of `KEPT`, joined by "+", as "attention+output".
      attention: kernel of the training pass: "auto" (splash on TPU, cuDNN on GPU, plain elsewhere and wherever they do
        not fit), "plain", "splash" or "cudnn".
      weight_dtype: of the layers' kernels in inference: "" (`param_dtype`) or "int8" with scales (`models/int8.py`).
      cache_dtype: of the keys and values in a cache: "" (`dtype`) or "int8" with scales.
      decode_kernel: attention of a few tokens over a cache: "plain" reads all of a row; "pallas" (TPU) the positions
        that are filled, for caches of a multiple of 128.
      unroll: layers that the scan writes out at a time.
      fsdp_over_tensor: in training the tensor shards take rows of the batch of their own and gather the kernels of the
        layers, instead of splitting heads and MLP (`sharding.partition`): less waiting when there is a row for each
        chip.
      vocab_multiple: embedding and output rows are padded inside to a multiple of this, so that they divide over a
        mesh; logits and exports never show the padding.
    """

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    rms_norm_eps: AboveZero = 1e-6
    rope_theta: AboveZero = 1e6
    rope_scaling: Any = None
    max_position_embeddings: Size = 32768
    tie_word_embeddings: bool = False
    attention_dropout: Rate = 0.0
    dropout: Rate = 0.0
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    remat: str = "none"
    attention: Annotated[str, OneOf("auto", "plain", "splash", "cudnn")] = "auto"
    weight_dtype: Annotated[str, OneOf("", "int8")] = ""
    cache_dtype: Annotated[str, OneOf("", "int8")] = ""
    decode_kernel: Annotated[str, OneOf("plain", "pallas")] = "plain"
    unroll: Size = 1
    fsdp_over_tensor: bool = False
    vocab_multiple: Size = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            raise _bad("num_attention_heads", self.num_attention_heads,
                       f"a multiple of num_key_value_heads = {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise _bad("head_dim", self.head_dim, "even, because rotary positions turn pairs")
        if self.weight_dtype == "int8" and self.dtype == "float16":
            # its products are scaled afterwards: until then they reach 127 times the activations
            raise _bad("dtype", self.dtype, "bfloat16 or float32 with int8 weights, whose products overflow float16")
        if self.remat not in REMAT and not set(self.kept) <= set(KEPT):
            raise _bad("remat", self.remat, f"one of {', '.join(REMAT)}, or some of {', '.join(KEPT)} joined by +")
        object.__setattr__(self, "rope_scaling", _rope_scaling(self.rope_scaling, self.head_dim))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding inside the program."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def kept(self) -> tuple[str, ...]:
        """What `remat` names of `KEPT`."""
        return () if self.remat in REMAT else tuple(str(self.remat).split("+"))

    @property
    def scaling(self) -> dict[str, Any] | None:
        """`rope_scaling` as a mapping with keys rope_type and factor."""
        return dict(zip(("rope_type", "factor"), self.rope_scaling, strict=True)) if self.rope_scaling else None

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], **options: Any) -> BackboneConfig:
        """From the mapping in a `config.json`; `options` sets what such a file does not know (dtype, remat, …).

        Dropout rates of the file are not taken over: they are a training option. Raises UserError for a model type that
        is not this decoder, for options it does not have (biases, sliding windows, other activations), missing sizes.
        """
        kind = str(fields.get("model_type", "missing")).lower()
        if kind not in MODEL_TYPES:
            raise UserError(f"model_type {fields.get('model_type')!r} is not a decoder that this program knows.",
                            "Give a checkpoint whose config.json says Emu3 (Emu3.5) or qwen3.")
        for name, only in _REFUSED.items():
            if fields.get(name, only) not in (only, None):
                raise _bad(name, fields[name], f"{only!r} (this decoder has no other form)")
        missing = [name for name in (*_SIZES, "rms_norm_eps") if fields.get(name) is None]
        if missing:
            raise UserError(f"config.json has no {', '.join(missing)}.", _OTHER_FILE)
        rope = fields.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise _bad("rope_parameters", rope, "a mapping, or null")
        tied = fields.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise _bad("tie_word_embeddings", tied, "true or false")
        _check_rope({"rope_scaling": fields.get("rope_scaling"), "rope_parameters": rope}, fields.get("rope_theta"))
        theta, other = fields.get("rope_theta"), rope.get("rope_theta")
        if theta is None and other is None:
            raise UserError("config.json has no rope_theta.", _OTHER_FILE)
        theta = other if theta is None else theta
        if other is not None and other != theta:
            raise UserError(f"config.json gives rope_theta {theta!r}, and {other!r} in rope_parameters.", _ONE_OF_TWO)
        newer = {key: value for key, value in rope.items() if key != "rope_theta"}
        scaling = fields.get("rope_scaling") or newer
        if newer and fields.get("rope_scaling"):
            size = fields["head_dim"] if isinstance(fields["head_dim"], int) else 0
            first, second = (_rope_scaling(value, size) for value in (scaling, newer))
            if first != second:
                raise UserError(f"config.json gives rope_scaling {scaling!r}, and {newer!r} in rope_parameters.",
                                _ONE_OF_TWO)
        return cls(
            **{name: fields[name] for name in _SIZES}, rms_norm_eps=_real("rms_norm_eps", fields["rms_norm_eps"]),
            rope_theta=_real("rope_theta", theta), rope_scaling=scaling or None, tie_word_embeddings=tied, **options,
        )  # fmt: skip

    def to_hf(self, model_type: str = "qwen3") -> dict[str, Any]:
        """The mapping for a `config.json`: "qwen3" loads in stock transformers, "Emu3" in Emu3.5's own code."""
        if model_type.lower() not in MODEL_TYPES:
            raise _bad("model_type", model_type, "Emu3 or qwen3")
        name, architecture = MODEL_TYPES[model_type.lower()]
        rope = self.scaling or {"rope_type": "default"}
        return {
            "model_type": name, "architectures": [architecture], **{size: getattr(self, size) for size in _SIZES},
            "rms_norm_eps": self.rms_norm_eps, "rope_theta": self.rope_theta,
            "rope_scaling": self.scaling, "rope_parameters": {"rope_theta": self.rope_theta, **rope},
            "tie_word_embeddings": self.tie_word_embeddings, "hidden_act": "silu", "attention_bias": False,
            "attention_dropout": max(self.attention_dropout, self.dropout), "use_sliding_window": False,
            "torch_dtype": self.param_dtype, "dtype": self.param_dtype,
        }  # fmt: skip


def _bad(name: str, value: Any, wanted: str) -> UserError:
    return UserError(f"`model.{name}` is {value!r}.", f"It must be {wanted}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _real(name: str, value: Any) -> float:
    if not _is_number(value):
        raise _bad(name, value, "a number")
    return float(value)


def _check_rope(settings: Mapping[str, Any], theta: Any) -> None:
    """Raises UserError for what a mapping of rope settings says twice or cannot be honoured."""
    for name, value in settings.items():
        if not isinstance(value, Mapping):
            continue
        if value.get("partial_rotary_factor", 1.0) not in (1.0, None):
            raise _bad(name, dict(value), "without partial_rotary_factor (this decoder rotates whole heads)")
        kinds = {value[key] for key in ("type", "rope_type") if isinstance(value.get(key), str)}
        if len(kinds) > 1:
            raise UserError(f"config.json gives {' and '.join(sorted(kinds))} as the type in {name}.", _ONE_OF_TWO)
        other = value.get("rope_theta")
        if name == "rope_scaling" and None not in (other, theta) and other != theta:
            raise UserError(f"config.json gives rope_theta {theta!r}, and {other!r} in {name}.", _ONE_OF_TWO)


def _rope_scaling(value: Any, head_dim: int) -> tuple[str, float] | None:
    """Normalise None, a mapping (transformers, old and new keys) or a (type, factor) pair."""
    wanted = 'null, or {"rope_type": "linear" or "dynamic", "factor": a number of at least 1}'
    if value is None:
        return None
    if isinstance(value, Mapping):
        kind, factor = value.get("rope_type", value.get("type")), value.get("factor", 1.0)
    elif isinstance(value, (tuple, list)) and len(value) == 2:
        kind, factor = value
    else:
        raise _bad("rope_scaling", value, wanted)
    if kind == "default":
        return None
    possible = kind == "linear" or (kind == "dynamic" and head_dim > 2)
    if not possible or not _is_number(factor) or factor < 1:
        raise _bad("rope_scaling", value, wanted)
    return kind, float(factor)
