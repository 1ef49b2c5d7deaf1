"""Fused causal attention for training: Pallas splash attention on TPU, cuDNN on GPU.

Both take q [B, T, H, h] and k, v [B, T, K, h] with H a multiple of K, and segment ids int [B, T] (a token sees earlier
tokens of its own segment; None: of its row), and return [B, T, H, h]; scores [T, T] are never stored.  `choose` says
which one runs; `layers.attention` calls it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ivr_jax import sharding
from ivr_jax.errors import UserError

LANES = 128  # of a TPU's vector registers: blocks are multiples of it
BLOCK, BLOCK_COMPUTE = 1024, 512
SAVED = "attention"  # checkpoint name of the kernel's results, for remat policies


def platform() -> str:
    """Where the program will run: the platform of the mesh in force, else of JAX's default devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def choose(config: Any, length: int, dropout: float = 0.0) -> str:
    """The kernel for `length` tokens a row: what `config.attention` says, for "auto" the platform's where it fits.

    Fused kernels know no dropout of attention weights.

    Raises:
      UserError: the config names a kernel that cannot do this.
    """
    where, wanted = platform(), config.attention
    splash_fits = length % LANES == 0 and config.head_dim % (LANES // 2) == 0 and not dropout
    cudnn_fits = config.dtype in ("bfloat16", "float16") and config.head_dim <= 128 and not dropout
    if wanted == "auto":
        if where == "tpu" and splash_fits:
            return "splash"
        return "cudnn" if where in ("gpu", "cuda") and cudnn_fits else "plain"
    fits = {"splash": splash_fits, "cudnn": cudnn_fits, "plain": True}[wanted]
    if not fits:
        what = f"attention={wanted!r} cannot do rows of {length} tokens, head_dim {config.head_dim}, {config.dtype}"
        raise UserError(f"{what}{' and dropout' if dropout else ''}.", 'Use config.model.attention="auto".')
    return wanted


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    gathered: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Pallas splash attention, each device on its own rows, heads and (over "sequence") queries.

    `gathered`: on a mesh heads are whole and rows cut further, see `sharding.partition`.  `interpret` runs the kernel's
    program on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and for TPUs alone

    length, heads, dim = q.shape[1:]
    mesh = jax.sharding.get_abstract_mesh()
    tensor = 1 if mesh.empty or gathered else mesh.shape["tensor"]
    queries = 1 if mesh.empty else mesh.shape["sequence"]
    if heads % tensor or k.shape[2] % tensor:
        raise UserError(f"{k.shape[2]} kv heads do not divide over {tensor} tensor shards.",
                        f"Lower mesh.tensor to a divisor of {k.shape[2]}.")
    if length // queries % LANES:
        raise UserError(f"rows of {length} tokens do not divide over {queries} sequence shards.",
                        f"Make the length a multiple of {LANES * queries}.")
    kernel = _splash_kernel(heads, length, tensor, queries, interpret)
    q = q * jnp.asarray(dim**-0.5, q.dtype)
    segments = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)

    def run(kernel, q, k, v, own, all_segments):
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        mixed = jax.vmap(kernel)(q, k, v, splash.SegmentIds(own, all_segments))
        return mixed.transpose(0, 2, 1, 3)

    if mesh.empty:
        return run(kernel, q, k, v, segments, segments)
    own = sharding.partition(("batch", "length", "q_heads", "head_dim"), gathered)
    rows, _, across, _ = own
    everyone = PartitionSpec(rows, None, across, None)
    lies = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(across, "sequence")))
    specs = (lies, own, everyone, everyone, PartitionSpec(rows, "sequence"), PartitionSpec(rows, None))
    mapped = jax.shard_map(run, in_specs=specs, out_specs=own, check_vma=False)
    return mapped(kernel, q, k, v, segments, segments)


def _splash_kernel(heads: int, length: int, head_shards: int, query_shards: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in (BLOCK, 512, 256, LANES) if length // query_shards % size == 0)
    inner = min(block, BLOCK_COMPUTE)
    # The backward kernel writes a share of dq for every block of keys, so these are large.
    keys = next(size for size in (2 * BLOCK, block) if length % size == 0)
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
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, gathered: bool = False
) -> jax.Array:
    """cuDNN's flash attention; packed rows need a mask of one bit a pair of tokens, bool [B, 1, T, T].

    XLA cuts it as its operands lie, `gathered` or not.
    """
    mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


KERNELS = {"splash": splash_attention, "cudnn": cudnn_attention}
