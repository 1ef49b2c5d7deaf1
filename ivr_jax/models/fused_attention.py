"""Fused causal attention for training: Pallas splash attention on TPU, cuDNN on GPU (untested on a GPU).

Both take q [B, T, H, h] and k, v [B, T, K, h] with H a multiple of K, and segment ids int [B, T] (a token sees earlier
tokens of its own segment; None: of its row), and return [B, T, H, h]; scores [T, T] are never stored.  `choose` says
which one runs; `backbone.Attention` calls it.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ivr_jax import sharding
from ivr_jax.errors import UserError

LANES = 128  # of a TPU's vector registers: blocks are multiples of it
BLOCK, BLOCK_COMPUTE = 1024, 512
SMALL_CHIPS = ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB of vector memory a core: blocks of half the size
SAVED = "attention"  # checkpoint name of the kernel's results, for remat policies


def platform() -> str:
    """Where the program will run: the platform of the mesh in force, else of JAX's default devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def largest_block() -> int:
    """Most queries of a block of splash attention: what the vector memory of the chips of the mesh in force holds."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    return BLOCK // 2 if kind in SMALL_CHIPS else BLOCK


def choose(config: Any, length: int, dropout: float = 0.0) -> str:
    """The kernel for `length` tokens a row: what `config.attention` says, for "auto" the platform's where it fits.

    Fused kernels have no dropout of attention weights.  Where none fits on an accelerator, Python warns that attention
    will store scores [T, T].

    Raises:
      UserError: the config names a kernel that cannot do this.
    """
    where, wanted = platform(), config.attention
    fits = {
        "plain": True,
        "splash": config.head_dim % (LANES // 2) == 0 and not dropout,
        "cudnn": config.dtype in ("bfloat16", "float16") and config.head_dim <= 128 and not dropout,
    }
    case = f"head_dim {config.head_dim}, {config.dtype}, attention_dropout {dropout}"
    if wanted != "auto":
        if not fits[wanted]:
            raise UserError(f"attention={wanted!r} does not support {case}.", 'Use config.model.attention="auto".')
        return wanted
    kernel = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(where, "plain")
    if not fits[kernel]:
        warnings.warn(f"{kernel} attention on {where} does not support {case}: plain attention runs, whose memory and "
                      f"time grow with the square of the row's length ({length} tokens).", stacklevel=2)
        return "plain"
    return kernel


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    fsdp_over_tensor: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Pallas splash attention, each device on its own rows, heads and (over "sequence") queries.

    Rows are padded at their end to what the kernel takes, a multiple of `LANES` tokens for each sequence shard; no
    query of the row sees the padding, because it is later.

    Args:
      fsdp_over_tensor: on a mesh heads are not split, but rows more, see `sharding.partition`.
      interpret: runs the kernel's program on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and for TPUs alone

    length, heads, dim = q.shape[1:]
    mesh = jax.sharding.get_abstract_mesh()
    tensor = 1 if mesh.empty or fsdp_over_tensor else mesh.shape["tensor"]
    queries = 1 if mesh.empty else mesh.shape["sequence"]
    if heads % tensor or k.shape[2] % tensor:
        raise UserError(f"{k.shape[2]} kv heads do not divide over {tensor} tensor shards.",
                        f"Lower mesh.tensor to a divisor of {k.shape[2]}.")
    q = q * jnp.asarray(dim**-0.5, q.dtype)
    segments = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    if padding := -length % (LANES * queries):
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        segments = jnp.pad(segments, ((0, 0), (0, padding)))
    kernel = _splash_kernel(heads, length + padding, tensor, queries, largest_block(), interpret)

    def run(kernel, q, k, v, own_segments, all_segments):
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        mixed = jax.vmap(kernel)(q, k, v, splash.SegmentIds(own_segments, all_segments))
        return mixed.transpose(0, 2, 1, 3)

    if not mesh.empty:
        q_spec = sharding.partition(("batch", "length", "q_heads", "head_dim"), fsdp_over_tensor)
        rows, _, across, _ = q_spec
        kv_spec = PartitionSpec(rows, None, across, None)
        kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(across, "sequence")))
        segment_specs = PartitionSpec(rows, "sequence"), PartitionSpec(rows, None)
        specs = (kernel_spec, q_spec, kv_spec, kv_spec, *segment_specs)
        run = jax.shard_map(run, in_specs=specs, out_specs=q_spec, check_vma=False)
    return run(kernel, q, k, v, segments, segments)[:, :length]


def _splash_kernel(
    heads: int, length: int, head_shards: int, query_shards: int, largest: int, interpret: bool
) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    sizes = (size for size in (BLOCK, 512, 256, LANES) if size <= largest)
    block = next(size for size in sizes if length // query_shards % size == 0)
    inner = min(block, BLOCK_COMPUTE)
    # The backward kernel writes a share of dq for every block of keys, so these are large.
    keys = next(size for size in (2 * largest, block) if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=inner, block_q_dkv=block, block_kv_dkv=keys,
        block_kv_dkv_compute=inner, use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    return splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=head_shards, q_seq_shards=query_shards, residual_checkpoint_name=SAVED,
        interpret=interpret,
    )  # fmt: skip


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    fsdp_over_tensor: bool = False,
    implementation: str = "cudnn",
) -> jax.Array:
    """cuDNN's flash attention; packed rows need a mask of one bit a pair of tokens, bool [B, 1, T, T].

    XLA shards it as its operands are, with `fsdp_over_tensor` or without.  `implementation="xla"` computes the same
    function of the same arguments on any platform, storing scores.
    """
    mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation)


KERNELS = {"splash": splash_attention, "cudnn": cudnn_attention}
