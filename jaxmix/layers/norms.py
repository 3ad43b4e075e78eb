"""Normalisation over the last axis, computed in float32 whatever the dtype of x."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
  """y = x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich 2019, arXiv 1910.07467).

  Args:
    dim: length of the last axis of x.
    axis: its logical name.
    eps: added to the mean square.
  """

  def __init__(self, dim: int, *, axis: str = "embed", eps: float = 1e-6):
    self.scale = nnx.Param(jnp.ones(dim), axes=(axis,))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., dim] -> [..., dim], in the dtype of x."""
    z = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    z = z * jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + self.eps)
    return (z * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
  """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias (Ba et al. 2016, arXiv 1607.06450).

  Args:
    dim: length of the last axis of x.
    axis: its logical name.
    eps: added to the variance.
  """

  def __init__(self, dim: int, *, axis: str = "embed", eps: float = 1e-5):
    self.scale = nnx.Param(jnp.ones(dim), axes=(axis,))
    self.bias = nnx.Param(jnp.zeros(dim), axes=(axis,))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., dim] -> [..., dim], in the dtype of x."""
    z = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    z = z - jnp.mean(z, axis=-1, keepdims=True)
    z = z * jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + self.eps)
    return (z * self.scale[...] + self.bias[...]).astype(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
