"""Depthwise convolution with filters as long as the row, token by token: the definition that every
implementation is held to."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.short_convolution.reference import short_convolution


def long_convolution(g, kernel, reverse_kernel, memory, segment_ids):
  """Depthwise convolution within documents.

      y_t = sum_{j >= 0} kernel[:, j] * g_{t-j} + sum_{j >= 0} reverse_kernel[:, j] * g_{t+1+j}

  Args:
    g: [B, T, D].   kernel, reverse_kernel: [D, L]; the second may be None.
    memory: [B, L - 1, D], the inputs before the first token, oldest first; they belong to the
      document of the first token that is not padding. With a reverse kernel they are zeros.
    segment_ids: [B, T] int32; no sum reaches into another document. 0 is padding: it is passed
      over, and its output is 0.
  Returns:
    [B, T, D] float32, or float64 where the inputs are.
  """
  nothing = jnp.zeros(g.shape[2], g.dtype)

  def earlier(g, kernel, memory, segment_ids):
    return short_convolution(g, kernel[:, ::-1], nothing, memory, segment_ids, activation=None)[0]

  y = earlier(g, kernel, memory, segment_ids)
  if reverse_kernel is None:
    return y
  later = jnp.pad(reverse_kernel[:, : g.shape[1]], ((0, 0), (1, 0)))  # none of the token itself
  before = jnp.zeros((g.shape[0], later.shape[1] - 1, g.shape[2]), g.dtype)
  return y + earlier(g[:, ::-1], later, before, segment_ids[:, ::-1])[:, ::-1]
