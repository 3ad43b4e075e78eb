"""Causal linear attention, token by token: the definition that every implementation is held to."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def linear_attention(q, k, v, state, segment_ids, *, scale: float):
  """Causal linear attention by its recurrence (Katharopoulos et al. 2020, arXiv 2006.16236, section
  3.3).

      S_t = S_{t-1} + k_t v_t^T        y_t = scale * S_t^T q_t

  Args:
    q, k: [B, T, H, K].   v: [B, T, H, V].
    state: [B, H, K, V], S_0; it belongs to the document of the first token that is not padding.
    segment_ids: [B, T] int32; a change clears S. 0 is padding: it reads nothing, writes nothing,
      and is no change.
    scale: multiplies q.
  Returns:
    y: [B, T, H, V] and S_T: [B, H, K, V], both in float32, or in float64 where the inputs are.
  """
  dtype = jnp.promote_types(q.dtype, jnp.float32)

  def step(carry, token):
    state, current = carry
    q_t, k_t, v_t, id_t = token
    live = id_t != 0
    fresh = live & (current != 0) & (id_t != current)
    state = jnp.where(fresh[:, None, None, None], 0, state)
    update = jnp.einsum("bhk,bhv->bhkv", k_t, v_t, precision="highest")
    state = state + jnp.where(live[:, None, None, None], update, 0)
    y_t = scale * jnp.einsum("bhk,bhkv->bhv", q_t, state, precision="highest")
    return (state, jnp.where(live, id_t, current)), jnp.where(live[:, None, None], y_t, 0)

  tokens = (*(jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v)), segment_ids.T)
  nothing_seen = jnp.zeros(q.shape[0], jnp.int32)
  (state, _), y = jax.lax.scan(step, (state.astype(dtype), nothing_seen), tokens)
  return jnp.moveaxis(y, 0, 1), state
