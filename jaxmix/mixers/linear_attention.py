"""Causal linear attention: softmax replaced by a feature map, so that the past is one matrix.

    S_t = S_{t-1} + phi(k_t) v_t^T        y_t = phi(q_t) S_t / (phi(q_t) . sum_s phi(k_s))

Katharopoulos et al. 2020 (arXiv 2006.16236). Without the sum of weights, the output is kept in
scale by an RMS norm over each head (Qin et al. 2022, arXiv 2210.10340, section 4).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import ops
from jaxmix.layers import Linear, RMSNorm

FEATURE_MAPS = {
  "elu_plus_one": lambda x: jax.nn.elu(x) + 1,
  "relu": jax.nn.relu,
  "softmax": lambda x: jax.nn.softmax(x, axis=-1),
  "identity": lambda x: x,
}
NORMALIZERS = ("sum", "rms", "none")


class Hedgehog(nnx.Module):
  """phi(x) = [softmax(x W), softmax(-x W)] for each head: a learnt map to positive features.

  Args:
    heads, channels: of x; phi(x) has twice the channels. W is the identity at first.
  Source: Zhang et al. 2024 (arXiv 2402.04347), section 4, with a softmax in place of exp to keep
    features in scale, as its authors do.
  """

  def __init__(self, heads: int, channels: int):
    identity = jnp.broadcast_to(jnp.eye(channels), (heads, channels, channels))
    self.kernel = nnx.Param(identity, axes=("heads", "key", "feature"))
    self.flops_per_token = 2 * heads * channels * channels

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, T, H, K] -> [B, T, H, 2 K]"""
    z = jnp.einsum("bthk,hkf->bthf", x, self.kernel[...].astype(x.dtype))
    return jnp.concatenate([jax.nn.softmax(z, axis=-1), jax.nn.softmax(-z, axis=-1)], axis=-1)


class LinearAttention(nnx.Module):
  """Multi-head causal linear attention; its state is one [K, V] matrix a head, whatever the length.

  Args:
    dim: model width D.
    heads: number of heads.
    key_dim, value_dim: channels of a head's keys and values; None means D / heads.
    feature_map: phi: "elu_plus_one" (the paper's), "relu", "softmax" over the channels, "hedgehog"
      (learnt, with twice the channels), or "identity".
    normalizer: "sum" divides by the sum of weights (the paper's), "rms" normalises each head's
      output, "none" does nothing.
    bias: biases on the four maps.
    implementation: see `jaxmix.ops.linear_attention`.
  Raises:
    ValueError: dim and heads do not divide, or a name is unknown.
  """

  def __init__(
    self,
    dim: int,
    *,
    heads: int = 8,
    key_dim: int | None = None,
    value_dim: int | None = None,
    feature_map: str = "elu_plus_one",
    normalizer: str = "sum",
    bias: bool = False,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    if dim % heads and None in (key_dim, value_dim):
      raise ValueError(
        f"LinearAttention: dim={dim} is not a multiple of heads={heads}; try "
        f"heads={math.gcd(dim, heads)} or set key_dim and value_dim"
      )
    if feature_map not in (*FEATURE_MAPS, "hedgehog"):
      raise ValueError(
        f"LinearAttention: feature_map={feature_map!r} is unknown; expected one of "
        f"{', '.join(FEATURE_MAPS)}, hedgehog"
      )
    if normalizer not in NORMALIZERS:
      raise ValueError(
        f"LinearAttention: normalizer={normalizer!r} is unknown; expected one of "
        f"{', '.join(NORMALIZERS)}"
      )
    if normalizer == "sum" and feature_map == "identity":
      raise ValueError(
        'LinearAttention: normalizer="sum" divides by weights that feature_map="identity" lets be '
        'zero; use normalizer="rms"'
      )
    self.heads, self.key_dim, self.value_dim = (
      heads,
      key_dim or dim // heads,
      value_dim or dim // heads,
    )
    self.q = Linear({"embed": dim}, {"heads": heads, "key": self.key_dim}, bias=bias, rngs=rngs)
    self.k = Linear({"embed": dim}, {"heads": heads, "key": self.key_dim}, bias=bias, rngs=rngs)
    self.v = Linear({"embed": dim}, {"heads": heads, "value": self.value_dim}, bias=bias, rngs=rngs)
    self.out = Linear(
      {"heads": heads, "value": self.value_dim}, {"embed": dim}, bias=bias, rngs=rngs
    )
    self.q_map, self.k_map = (
      [Hedgehog(heads, self.key_dim) for _ in range(2)]
      if feature_map == "hedgehog"
      else [None, None]
    )
    self.norm = RMSNorm(self.value_dim, axis="value") if normalizer == "rms" else None
    self.feature_map, self.normalizer = feature_map, normalizer
    self.implementation = implementation

  def __call__(self, x: jax.Array, *, state=None, segment_ids=None, positions=None):
    """Mixes along the length.

    Args:
      x: [B, T, D].   state: from `init_state` or an earlier call; None means zeros.
      segment_ids: [B, T] int32, 0 is padding.   positions: not used; the order of tokens is in the
        recurrence alone.
    Returns:
      y: [B, T, D] and the state.
    """
    of_q, of_k = self.q_map, self.k_map
    if self.feature_map != "hedgehog":
      of_q = of_k = FEATURE_MAPS[self.feature_map]
    y, state = ops.linear_attention(
      of_q(self.q(x)),
      of_k(self.k(x)),
      self.v(x),
      state=state,
      segment_ids=segment_ids,
      normalize=self.normalizer == "sum",
      implementation=self.implementation,
    )
    return self.out(y if self.norm is None else self.norm(y)), state

  def init_state(self, batch_size: int, *, dtype=jnp.float32) -> jax.Array:
    """Zeros [B, H, K, V], or [B, H, K, V + 1] with the sum of keys; float32 whatever `dtype`, the
    dtype of x."""
    columns = self.value_dim + (self.normalizer == "sum")
    return jnp.zeros(
      (batch_size, self.heads, self._features, columns), jnp.promote_types(dtype, jnp.float32)
    )

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass, a multiply-add counted as two: the recurrence,
    not the chunks."""
    parts = (self.q, self.k, self.v, self.out, self.q_map, self.k_map)
    maps = sum(part.flops_per_token for part in parts if part is not None)
    return batch * length * (maps + 4 * self.heads * self._features * self.value_dim)

  @property
  def _features(self) -> int:
    """Channels of phi(q)."""
    return self.key_dim * (2 if self.feature_map == "hedgehog" else 1)
