"""Retention: linear attention with a constant decay a head and rotary positions.

    S_t = gamma_h S_{t-1} + k_t v_t^T        gamma_h = 1 - 2^(-5 - h)

Sun et al. 2023 (arXiv 2307.08621), section 2. The group norm over each head's output is an RMS
norm, as in published implementations.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxmix import ops
from jaxmix.layers import GatedOutput, HeadMixer, head_channels


class RetNet(HeadMixer):
  """Multi-scale retention.

  Args:
    dim: model width D.
    heads: of the queries.   key_heads: of keys and values, which queries share; None means `heads`.
    key_dim, value_dim: channels of a head; None means D / heads and twice that. key_dim is even.
    rotary_base: slowest wavelength of the positions.
    implementation: see `jaxmix.ops.linear_attention`.
  Raises:
    ValueError: sizes do not divide.
  """

  def __init__(
    self,
    dim: int,
    *,
    heads: int = 8,
    key_heads: int | None = None,
    key_dim: int | None = None,
    value_dim: int | None = None,
    rotary_base: float = 10_000.0,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    key_dim = head_channels("RetNet", key_dim, dim, heads, argument="key_dim")
    value_dim = head_channels("RetNet", value_dim, 2 * dim, heads, argument="value_dim")
    if key_dim % 2:
      raise ValueError(
        f"RetNet: rotary positions turn pairs of channels, key_dim={key_dim} is odd; use an even "
        "key_dim"
      )
    states = heads if key_heads is None else key_heads
    super().__init__(
      dim,
      heads=(heads, states, states),
      key_dim=key_dim,
      value_dim=value_dim,
      rotary_base=rotary_base,
      implementation=implementation,
      rngs=rngs,
    )
    self.output = GatedOutput(dim, heads, value_dim, rngs=rngs)

  def mix(self, x, q, k, v, **options):
    """See `HeadMixer.mix`."""
    heads = jnp.arange(k.shape[2], dtype=jnp.promote_types(k.dtype, jnp.float32))
    return ops.linear_attention(q, k, v, g=jnp.log1p(-jnp.exp2(-5 - heads)), **options)
