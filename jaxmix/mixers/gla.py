"""Gated linear attention: each row of the state decays by a gate of its own, read from the token.

    S_t = exp(g_t) * S_{t-1} + k_t v_t^T        g_t = log(sigmoid(x_t W_1 W_2 + b)) / 16

Yang et al. 2024 (arXiv 2312.06635), section 4. Sizes and the output follow section 4.4.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxmix import ops
from jaxmix.layers import GatedOutput, HeadMixer, LowRank, head_channels, log_sigmoid_decay


class GLA(HeadMixer):
  """Multi-head gated linear attention.

  Args:
    dim: model width D.
    heads: of the queries.   key_heads: of keys, values and gates, which queries share; None means
      `heads`.
    key_dim, value_dim: channels of a head; None means D / 2 and D over all `heads`.
    gate_rank: channels through which the decay's gate goes.   temperature: divides its logarithm.
    floor: the strongest log-decay of a token; None means none.
    convolution: width of short convolutions of q, k and v; None means none, as in the paper.
    implementation: see `jaxmix.ops.linear_attention`.
  Raises:
    ValueError: sizes do not divide.
  """

  def __init__(
    self,
    dim: int,
    *,
    heads: int = 4,
    key_heads: int | None = None,
    key_dim: int | None = None,
    value_dim: int | None = None,
    gate_rank: int = 16,
    temperature: float = 16.0,
    floor: float | None = None,
    convolution: int | None = None,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    key_dim = head_channels("GLA", key_dim, dim / 2, heads, argument="key_dim")
    value_dim = head_channels("GLA", value_dim, dim, heads, argument="value_dim")
    states = heads if key_heads is None else key_heads
    super().__init__(
      dim,
      heads=(heads, states, states),
      key_dim=key_dim,
      value_dim=value_dim,
      convolution=convolution,
      implementation=implementation,
      rngs=rngs,
    )
    self.decay = LowRank(dim, gate_rank, {"heads": states, "key": key_dim}, bias=True, rngs=rngs)
    self.output = GatedOutput(dim, heads, value_dim, rngs=rngs)
    self.temperature, self.floor = temperature, floor

  def mix(self, x, q, k, v, **options):
    """See `HeadMixer.mix`."""
    g = log_sigmoid_decay(self.decay(x), temperature=self.temperature)
    g = g if self.floor is None else jnp.maximum(g, self.floor)
    return ops.linear_attention(q, k, v, g=g, **options)
