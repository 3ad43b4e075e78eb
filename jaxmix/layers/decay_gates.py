"""Log-decays from data: what a gate's raw value becomes before it enters an op."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx


class SoftplusDecay(nnx.Module):
  """g = -exp(log_rate) * softplus(raw + bias), a state space's decay over a step of its own length.

  With `floor`, g = floor * sigmoid(exp(log_rate) * (raw + bias)), which no token can undercut.

  Args:
    shape: logical name -> size of the trailing axes of raw, "heads" first; log_rate is one a head.
    rates: exp(log_rate) is uniform between these at first; all are 1 with a floor.
    floor: the strongest log-decay of a token, below 0; None means none.
    rngs: gives log_rate, and bias such that steps softplus(bias) spread from 0.001 to 0.1 evenly on
      a logarithmic scale.
  Source: Gu & Dao 2023 (arXiv 2312.00752), section 3.6; with a floor Kimi Team 2025 (arXiv
    2510.26692).
  """

  def __init__(
    self,
    shape: Mapping[str, int],
    *,
    rates: tuple[float, float] = (1.0, 16.0),
    floor: float | None = None,
    rngs: nnx.Rngs,
  ):
    heads, *channels = shape.values()
    low, high = rates if floor is None else (1.0, 1.0)
    smallest = 1e-4  # a rate of 0 has no logarithm
    rate = jax.random.uniform(rngs.params(), (heads,), minval=max(low, smallest), maxval=high)
    steps = jnp.exp(
      jax.random.uniform(
        rngs.params(), (heads, *channels), minval=math.log(1e-3), maxval=math.log(1e-1)
      )
    )
    self.log_rate = nnx.Param(jnp.log(rate), axes=("heads",), inputs=0)
    self.bias = nnx.Param(steps + jnp.log(-jnp.expm1(-steps)), axes=tuple(shape), inputs=0)
    self.floor = floor

  def __call__(self, raw: jax.Array) -> jax.Array:
    """[B, T, heads, ...] -> g of the same shape, float32."""
    if self.floor is None:
      return -self._rate(raw.ndim) * self.step(raw)
    return self.floor * jax.nn.sigmoid(self._rate(raw.ndim) * self._biased(raw))

  def step(self, raw: jax.Array) -> jax.Array:
    """softplus(raw + bias), float32."""
    return jax.nn.softplus(self._biased(raw))

  def _biased(self, raw):
    return raw.astype(jnp.promote_types(raw.dtype, jnp.float32)) + self.bias[...]

  def _rate(self, rank: int):
    rate = jnp.exp(self.log_rate[...])
    return rate.reshape(-1, *(1,) * (rank - 3))


def log_sigmoid_decay(raw: jax.Array, *, temperature: float) -> jax.Array:
  """log(sigmoid(raw)) / temperature, float32: a decay sigmoid(raw)^(1 / temperature) for raw [B, T,
  heads, ...]."""
  raw = raw.astype(jnp.promote_types(raw.dtype, jnp.float32))
  return jax.nn.log_sigmoid(raw) / temperature
