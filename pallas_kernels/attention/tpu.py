"""Softmax attention on TPU: JAX's own splash attention behind this project's layout.

Grid (heads, query blocks, key blocks): blocks that a mask empties are not visited, scores stay in
VMEM, and the running maximum and sum stay on chip between key blocks. The baseline that our kernels
are measured against.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128


def refusal(length: int, parts: int = 1) -> str | None:
  """Why the kernel cannot run this length, with its queries in so many parts, or None."""
  if length < LANES:
    return f"length {length} is shorter than one block of {LANES}"
  if parts > 1 and length % (parts * LANES):
    return f"{parts} parts of length {length} are not of whole blocks of {LANES}"
  return None


def attention(
  q,
  k,
  v,
  documents,
  *,
  scale: float,
  causal: bool,
  window: int | None,
  part: tuple[jax.Array, int] | None = None,
  interpret: bool = False,
):
  """Softmax attention within a row.

  Args:
    q: [B, T, H, K], or one of the parts of it, [B, T / count, H, K].
    k: [B, T, G, K].   v: [B, T, G, V]; H is a multiple of G.
    documents: [B, T] int32 or None; a query sees the keys of its own document.
    scale: multiplies q.
    causal: see no later key.   window: see only the newest `window` keys; needs causal.
    part: (index, count) where q is a part; None where it is whole.
    interpret: run the kernel's program on the CPU.
  Returns:
    y: as long as q, [B, T, H, V] in the dtype of v.
  Source: jax.experimental.pallas.ops.tpu.splash_attention; any length and head size, by padding.
  """
  index, count = (0, 1) if part is None else part
  length, heads, groups, value_dim = k.shape[1], q.shape[2], k.shape[2], v.shape[-1]
  padded = length + -length % LANES  # parts are of whole blocks
  if documents is None and padded != length and not causal:
    documents = jnp.ones(q.shape[:2], jnp.int32)
  if documents is not None:
    documents = jnp.pad(documents, ((0, 0), (0, padded - length)), constant_values=-1)

  def lay_out(x):  # [B, T, H, K] -> [B, H, T', K'], whole blocks and whole lanes
    widths = (0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, -x.shape[-1] % LANES)
    return jnp.moveaxis(jnp.pad(x, widths), 2, 1)

  shape, parts = (padded, padded), count
  if not causal:  # all parts are alike
    mask, parts = splash.FullMask((padded // count, padded)), 1
  elif window is None or window >= length:
    mask = splash.CausalMask(shape)
  else:
    mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
  block = next(size for size in (512, 384, 256, LANES) if padded // count % size == 0)
  kernel = splash.make_splash_mqa(
    splash.MultiHeadMask([mask] * (heads // groups)),
    head_shards=1,
    q_seq_shards=parts,
    block_sizes=splash.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_kv_dkv_compute=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    interpret=interpret,
  )
  if parts > 1:
    kernel = _of_part(kernel, index, count)
  of_queries = documents
  if part is not None and documents is not None:
    of_queries = jax.lax.dynamic_slice_in_dim(documents, index * q.shape[1], q.shape[1], axis=1)
  tokens = q.shape[1]
  q = lay_out((q * scale).astype(q.dtype))
  q = q.reshape(q.shape[0], groups, heads // groups, *q.shape[2:])
  one_row = jax.vmap(kernel, in_axes=(0, 0, 0, None))  # over the groups of heads
  ids = None if documents is None else splash.SegmentIds(of_queries, documents)
  y = jax.vmap(one_row, in_axes=(0, 0, 0, None if ids is None else 0))(
    q, lay_out(k), lay_out(v), ids
  )
  y = y.reshape(y.shape[0], heads, *y.shape[3:])
  return jnp.moveaxis(y, 1, 2)[:, :tokens, :, :value_dim].astype(v.dtype)


def _of_part(kernel, index, count: int):
  """The kernel of one part of the queries: its blocks of the tables that say which blocks of keys
  are visited, and how."""

  def cut(x, axis: int):
    size = x.shape[axis] // count
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), index * size, size, axis)

  def of(tables):
    axes = {"data_next": 1, "mask_next": 1, "block_mask": 1, "q_sequence": 0}
    found = {name: getattr(tables, name) for name in axes}
    return tables._replace(
      **{name: None if x is None else cut(x, axes[name]) for name, x in found.items()}
    )

  masks, options = kernel.tree_flatten()
  return kernel.tree_unflatten(options, [None if mask is None else of(mask) for mask in masks])
