"""A short causal convolution along the length, a few taps a channel."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import ops


class ShortConvolution(nnx.Module):
  """y_t = activation(sum_j w_j x_{t-j} + b), each channel by itself (see
  `jaxmix.ops.short_convolution`).

  Args:
    shape: logical name -> size of the channel axes of x, such as {"heads": 8, "key": 64}.
    width: taps W.   activation: None or "silu".   bias: add a bias.
    rngs: gives the taps, uniform within 1 / sqrt(W), as the published layers have it.
  Source: Gu & Dao 2023 (arXiv 2312.00752), section 3.4.
  """

  def __init__(
    self,
    shape: Mapping[str, int],
    *,
    width: int = 4,
    activation: str | None = "silu",
    bias: bool = False,
    rngs: nnx.Rngs,
  ):
    sizes = tuple(shape.values())
    bound = width**-0.5
    taps = jax.random.uniform(rngs.params(), (*sizes, width), minval=-bound, maxval=bound)
    self.weight = nnx.Param(taps, axes=(*shape, "width"), inputs=0)
    self.bias = nnx.Param(jnp.zeros(sizes), axes=tuple(shape), inputs=0) if bias else None
    self.width, self.activation, self.channels = width, activation, math.prod(sizes)

  def __call__(self, x: jax.Array, *, state=None, segment_ids=None):
    """x [B, T, *shape] -> y of its shape and dtype, and the state [B, W - 1, channels]."""
    y, state = ops.short_convolution(
      x.reshape(*x.shape[:2], self.channels),
      self.weight[...].reshape(self.channels, self.width),
      bias=None if self.bias is None else self.bias[...].reshape(self.channels),
      activation=self.activation,
      state=state,
      segment_ids=segment_ids,
    )
    return y.reshape(x.shape), state

  def init_state(self, batch_size: int, dtype) -> jax.Array:
    """Zeros [B, W - 1, channels], the inputs before the first token."""
    return jnp.zeros((batch_size, self.width - 1, self.channels), dtype)

  @property
  def flops_per_token(self) -> int:
    """Floating-point operations of a token, a multiply-add counted as two."""
    return 2 * self.width * self.channels
