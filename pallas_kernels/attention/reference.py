"""Softmax attention by its definition: every query against every key, nothing blocked, nothing
fused."""

from __future__ import annotations

import jax.numpy as jnp


def attention(q, k, v, visible, *, scale: float):
  """Softmax attention over the keys that a mask leaves visible (Vaswani et al. 2017, arXiv
  1706.03762, equation 1).

      y_t = sum_s softmax_s(scale * q_t . k_s) v_s        over the s with visible[t, s]

  Args:
    q: [B, T, H, K].   k: [B, S, G, K].   v: [B, S, G, V]; H is a multiple of G, and query head h
      reads key head h // (H / G).
    visible: [B, T, S] bool. A query that sees no key gives 0.
    scale: multiplies q.
  Returns:
    y: [B, T, H, V] in float32, or in float64 where the inputs are.
  """
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  groups = q.shape[2] // k.shape[2]
  q, k, v = (
    q.astype(dtype),
    jnp.repeat(k.astype(dtype), groups, axis=2),
    jnp.repeat(v.astype(dtype), groups, axis=2),
  )
  logits = scale * jnp.einsum("bthk,bshk->bhts", q, k, precision="highest")
  visible = visible[:, None]
  largest = jnp.max(logits, axis=-1, keepdims=True, where=visible, initial=-1e30)
  weights = jnp.where(visible, jnp.exp(jnp.where(visible, logits - largest, 0)), 0)
  total = weights.sum(-1, keepdims=True)
  weights = weights / jnp.where(total > 0, total, 1)
  return jnp.einsum("bhts,bshv->bthv", weights, v, precision="highest")
