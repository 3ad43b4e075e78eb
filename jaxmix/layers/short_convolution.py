"""A short causal convolution along the length, a few taps a channel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
    bias = None if self.bias is None else self.bias[...]
    return _convolve(x, self.weight[...], bias, self.activation, state, segment_ids)

  def each(self, parts: Sequence[jax.Array], *, state=None, segment_ids=None):
    """x as the parts [B, T, *shape[1:]] of its first channel axis -> those of y, and the state."""
    states = [None] * len(parts) if state is None else jnp.split(state, len(parts), -1)
    biases = [None] * len(parts) if self.bias is None else self.bias[...]
    pairs = [
      _convolve(x, weight, bias, self.activation, before, segment_ids)
      for x, weight, bias, before in zip(parts, self.weight[...], biases, states, strict=True)
    ]
    ys, after = zip(*pairs, strict=True)
    return list(ys), jnp.concatenate(after, -1)

  def init_state(self, batch_size: int, dtype) -> jax.Array:
    """Zeros [B, W - 1, channels], the inputs before the first token."""
    return jnp.zeros((batch_size, self.width - 1, self.channels), dtype)

  @property
  def flops_per_token(self) -> int:
    """Floating-point operations of a token, a multiply-add counted as two."""
    return 2 * self.width * self.channels


def _convolve(x, weight, bias, activation, state, segment_ids):
  """`jaxmix.ops.short_convolution` of x [B, T, *shape]."""
  *shape, width = weight.shape
  y, state = ops.short_convolution(
    x.reshape(*x.shape[:2], math.prod(shape)),
    weight.reshape(-1, width),
    bias=None if bias is None else bias.reshape(-1),
    activation=activation,
    state=state,
    segment_ids=segment_ids,
  )
  return y.reshape(x.shape), state
