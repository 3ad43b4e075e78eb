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


def refusal(length: int) -> str | None:
  """Why the kernel cannot run this length, or None."""
  if length < LANES:
    return f"length {length} is shorter than one block of {LANES}"
  return None


def attention(
  q, k, v, documents, *, scale: float, causal: bool, window: int | None, interpret: bool = False
):
  """Softmax attention within a row.

  Args:
    q: [B, T, H, K].   k: [B, T, G, K].   v: [B, T, G, V]; H is a multiple of G.
    documents: [B, T] int32 or None; a query sees the keys of its own document.
    scale: multiplies q.
    causal: see no later key.   window: see only the newest `window` keys; needs causal.
    interpret: run the kernel's program on the CPU.
  Returns:
    y: [B, T, H, V] in the dtype of v.
  Source: jax.experimental.pallas.ops.tpu.splash_attention; any length and head size, by padding.
  """
  length, heads, groups, value_dim = q.shape[1], q.shape[2], k.shape[2], v.shape[-1]
  padded = length + -length % LANES
  if documents is None and padded != length and not causal:
    documents = jnp.ones(q.shape[:2], jnp.int32)
  if documents is not None:
    documents = jnp.pad(documents, ((0, 0), (0, padded - length)), constant_values=-1)

  def lay_out(x):  # [B, T, H, K] -> [B, H, T', K'], whole blocks and whole lanes
    return jnp.moveaxis(
      jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, -x.shape[-1] % LANES))), 2, 1
    )

  shape = (padded, padded)
  if not causal:
    mask = splash.FullMask(shape)
  elif window is None or window >= length:
    mask = splash.CausalMask(shape)
  else:
    mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
  block = next(size for size in (512, 384, 256, LANES) if padded % size == 0)
  kernel = splash.make_splash_mqa_single_device(
    splash.MultiHeadMask([mask] * (heads // groups)),
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
  q = lay_out((q * scale).astype(q.dtype))
  q = q.reshape(q.shape[0], groups, heads // groups, *q.shape[2:])
  one_row = jax.vmap(kernel, in_axes=(0, 0, 0, None))  # over the groups of heads
  ids = None if documents is None else splash.SegmentIds(documents, documents)
  y = jax.vmap(one_row, in_axes=(0, 0, 0, None if ids is None else 0))(
    q, lay_out(k), lay_out(v), ids
  )
  y = y.reshape(y.shape[0], heads, *y.shape[3:])
  return jnp.moveaxis(y, 1, 2)[:, :length, :, :value_dim].astype(v.dtype)
