"""The delta rule, token by token: the definition that every implementation is held to."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.linear_attention.reference import recur


def delta_rule(q, k, v, beta, g, state, segment_ids, *, scale: float):
  """The gated delta rule by its recurrence (Yang et al. 2024, arXiv 2412.06464, section 3).

      S~  = exp(g_t) * S_{t-1}
      S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T        y_t = scale * S_t^T q_t

  Args:
    q, k: [B, T, H of k, K].   v: [B, T, H, V]; H is a multiple of the heads of k.
    beta: [B, T, H], write strength.
    g, state, segment_ids, scale: as for `linear_attention`.
  Returns:
    y: [B, T, H, V] and S_T: [B, H, K, V], both in float32, or in float64 where the inputs are.
  """

  def update(state, k, v, beta):
    error = v - jnp.einsum("bhk,bhkv->bhv", k, state, precision="highest")
    written = beta[..., None] * error
    return state + jnp.einsum("bhk,bhv->bhkv", k, written, precision="highest")

  return recur(update, q, k, v, beta, g, state, segment_ids, scale=scale)
