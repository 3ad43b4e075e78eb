"""Causal linear attention, token by token: the definition that every implementation is held to."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def linear_attention(q, k, v, g, state, segment_ids, *, scale: float):
  """Causal linear attention with decay by its recurrence (Yang et al. 2024, arXiv 2312.06635,
  section 2).

      S_t = exp(g_t) * S_{t-1} + k_t v_t^T        y_t = scale * S_t^T q_t

  Args:
    q: [B, T, H of q, K].   k: [B, T, H of k, K].   v: [B, T, H of v, V].   There are H states, the
      more of the heads of k and v; where an array has fewer heads, each serves H / its heads
      neighbours, and where q has more, H of q / H neighbours read one state.
    g: natural log of the decay: [H], [B, T, H], or [B, T, H, K], a decay for each row of S; None is
      no decay.
    state: [B, H, K, V], S_0; it belongs to the document of the first token that is not padding.
    segment_ids: [B, T] int32; a change clears S. 0 is padding: it reads nothing, writes nothing,
      decays nothing, and is no change.
    scale: multiplies q.
  Returns:
    y: [B, T, H, V] (as many heads as q where q has more), and S_T: [B, H, K, V], both in float32,
    or in float64 where the inputs are.
  """

  def update(state, k, v, beta):
    return state + jnp.einsum("bhk,bhv->bhkv", k, v, precision="highest")

  return recur(update, q, k, v, None, g, state, segment_ids, scale=scale)


def recur(update, q, k, v, beta, g, state, segment_ids, *, scale: float):
  """S_t = update(exp(g_t) * S_{t-1}, k_t, v_t, beta_t), y_t = scale * S_t^T q_t; the arguments and
  results of `linear_attention`, beta: [B, T, H] or None."""
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  heads = state.shape[1]

  def step(carry, token):
    state, current = carry
    q_t, k_t, v_t, beta_t, decay_t, id_t = token
    live = id_t != 0
    fresh = live & (current != 0) & (id_t != current)
    state = jnp.where(fresh[:, None, None, None], 0, state)
    after = update(decay_t * state, k_t, v_t, beta_t)
    state = jnp.where(live[:, None, None, None], after, state)
    read = jnp.repeat(state, q_t.shape[1] // heads, axis=1)
    y_t = scale * jnp.einsum("bhk,bhkv->bhv", q_t, read, precision="highest")
    return (state, jnp.where(live, id_t, current)), jnp.where(live[:, None, None], y_t, 0)

  def rows(x):
    """Tokens first, and a head for each state."""
    x = jnp.moveaxis(x.astype(dtype), 1, 0)
    return jnp.repeat(x, max(heads // x.shape[2], 1), axis=2)

  g = jnp.zeros(heads, dtype) if g is None else g.astype(dtype)
  g = jnp.broadcast_to(g, (*q.shape[:2], heads)) if g.ndim == 1 else g
  decay = rows(jnp.exp(g).reshape(*g.shape[:3], -1, 1))  # [T, B, H, K or 1, 1]
  beta = None if beta is None else rows(beta)
  tokens = (rows(q), rows(k), rows(v), beta, decay, segment_ids.T)
  nothing_seen = jnp.zeros(q.shape[0], jnp.int32)
  (state, _), y = jax.lax.scan(step, (state.astype(dtype), nothing_seen), tokens)
  return jnp.moveaxis(y, 0, 1), state
