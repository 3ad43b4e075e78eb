"""Rotary position encoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotary(x: jax.Array, positions: jax.Array, *, base: float = 10_000.0) -> jax.Array:
  """Turns each pair of channels (i, i + K/2) by the angle position * base^(-2i/K).

  Args:
    x: [B, T, H, K], K even.
    positions: [B, T] int32.
    base: wavelength of the slowest pair, in units of 2 pi tokens.
  Returns:
    [B, T, H, K] in the dtype of x; angles in float32.
  Source: Su et al. 2021 (arXiv 2104.09864), section 3.4.2, with halves in place of neighbours as
    GPT-NeoX and Llama have it.
  """
  half = x.shape[-1] // 2
  frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[..., None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  a, b = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
