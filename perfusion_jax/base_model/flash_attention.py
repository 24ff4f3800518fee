"""Self-attention on TPUs by JAX's own Pallas kernel, splash attention.

The scores never leave the chip's vector memory, and the backward pass computes them anew. Queries, keys and values go
in with the tokens along the lanes: a head is 40 wide in Stable Diffusion 1, and with the heads along the lanes, which
are 128, two thirds of what is read and kept for the gradient would be padding.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    MultiHeadMask,
    QKVLayout,
    SegmentIds,
    make_splash_mha_single_device,
)
from jax.sharding import AxisType, PartitionSpec

LANES = 128
# Tokens of one step of the forward kernel, and of the backward one, which holds more for each query.
QUERIES, QUERIES_BACKWARD, SCORED_KEYS = 512, 256, 512
# Bytes of vector memory, of 16 MiB, for keys, values and their gradients. 4096 tokens of a head up to 64 wide fit
# whole in bfloat16, so that every operand is read from HBM once.
KEYS_BYTES = 10 * 2**20
# Axis of a mesh that the batch may be split over.
BATCH_AXIS = "data"


def flash_attention(query: jax.Array, key: jax.Array, value: jax.Array, interpret: bool = False) -> jax.Array:
    """Multi-head softmax attention; under a mesh (`jax.set_mesh`), each device computes its part of the batch.

    Args:
        query: [batch, queries, heads, width]; the number of queries is a multiple of LANES.
        key: [batch, keys, heads, width].
        value: [batch, keys, heads, width].
        interpret: compute what the kernel says by ordinary operations, on any device.

    Returns:
        [batch, queries, heads, width], the dtype of the query.
    """

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return _attend(query, key, value, interpret)

    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Auto not in mesh.axis_types:
        return attend(query, key, value)
    # XLA cannot split a kernel by itself.
    parts = PartitionSpec(BATCH_AXIS if BATCH_AXIS in mesh.axis_names else None)
    return jax.shard_map(attend, in_specs=parts, out_specs=parts, check_vma=False)(query, key, value)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, interpret: bool) -> jax.Array:
    (queries, heads, width), keys = query.shape[1:], key.shape[1]
    padding = -keys % LANES
    operands = [jnp.moveaxis(tokens, 1, 2) for tokens in (query * width**-0.5, key, value)]
    segments = None
    if padding:
        operands[1:] = (jnp.pad(tokens, ((0, 0), (0, 0), (0, padding), (0, 0))) for tokens in operands[1:])
        # Queries see keys of their own segment alone.
        segments = SegmentIds(jnp.zeros(queries, jnp.int32), (jnp.arange(keys + padding) >= keys).astype(jnp.int32))
    kernel = make_splash_mha_single_device(
        MultiHeadMask([FullMask((queries, keys + padding))] * heads),
        block_sizes=_block_sizes(queries, keys + padding, width, query.dtype.itemsize),
        interpret=interpret,
    )
    return jnp.moveaxis(jax.vmap(lambda *tokens: kernel(*tokens, segment_ids=segments))(*operands), 1, 2)


def _block_sizes(queries: int, keys: int, width: int, itemsize: int) -> BlockSizes:
    padded = -(-width // LANES) * LANES
    # Operands and results are held twice, for the copies to overlap the work; gradients are summed in float32.
    key_bytes = 2 * (2 * width * itemsize + 2 * padded * itemsize) + 2 * padded * 4
    block_kv = _block(keys, KEYS_BYTES // key_bytes)
    scored = _block(block_kv, SCORED_KEYS)
    return BlockSizes(
        block_q=_block(queries, QUERIES),
        block_kv=block_kv,
        block_kv_compute=scored,
        block_q_dkv=_block(queries, QUERIES_BACKWARD),
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=scored,
        # One kernel for all gradients instead of two: the scores are computed once, and operands read once.
        use_fused_bwd_kernel=True,
        q_layout=QKVLayout.SEQ_MINOR,
        k_layout=QKVLayout.SEQ_MINOR,
        v_layout=QKVLayout.SEQ_MINOR,
    )


def _block(tokens: int, most: int) -> int:
    """Returns the largest multiple of LANES that divides `tokens` (a multiple of LANES too) and is at most `most`."""
    return max(size for size in range(LANES, max(most, LANES) + 1, LANES) if tokens % size == 0)
