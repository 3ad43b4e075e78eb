"""Depthwise causal convolution, token by token: the definition that every implementation is held
to."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def short_convolution(x, weight, bias, state, segment_ids, *, activation: str | None):
  """Depthwise causal convolution of W taps.

      z_t = bias + sum_{j=0}^{W-1} weight[:, W-1-j] * x_{t-j}        y_t = activation(z_t)

  Args:
    x: [B, T, D].   weight: [D, W], taps from the oldest token to the newest.   bias: [D].
    state: [B, W - 1, D], the inputs before the first token, oldest first; they belong to the
      document of the first token that is not padding.
    segment_ids: [B, T] int32; a change clears the taps. 0 is padding: it is read by nothing, gives
      0, and is no change.
    activation: None or "silu", z * sigmoid(z).
  Returns:
    y: [B, T, D], and the last W - 1 inputs of the row's last document, [B, W - 1, D], with zeros
    where it has fewer; both in float32, or in float64 where the inputs are.
  """
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  x, weight, bias, state = (array.astype(dtype) for array in (x, weight, bias, state))

  def step(carry, token):
    state, current = carry
    x_t, id_t = token
    live = id_t != 0
    fresh = live & (current != 0) & (id_t != current)
    state = jnp.where(fresh[:, None, None], 0, state)
    window = jnp.concatenate([state, x_t[:, None]], axis=1)
    z = bias + jnp.sum(window * weight.T, axis=1)
    y_t = z if activation is None else z * jax.nn.sigmoid(z)
    state = jnp.where(live[:, None, None], window[:, 1:], state)
    return (state, jnp.where(live, id_t, current)), jnp.where(live[:, None], y_t, 0)

  nothing_seen = jnp.zeros(x.shape[0], jnp.int32)
  tokens = (jnp.moveaxis(x, 1, 0), segment_ids.T)
  (state, _), y = jax.lax.scan(step, (state, nothing_seen), tokens)
  return jnp.moveaxis(y, 0, 1), state
