"""Gated linear attention with one gate a head and token.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        g_t = log(sigmoid(x_t W)) / 16

The scalar decay of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060) in the layer of gated linear attention
(Yang et al. 2024, arXiv 2312.06635).
"""

from __future__ import annotations

from flax import nnx

from jaxmix import ops
from jaxmix.layers import GatedOutput, HeadMixer, Linear, head_channels, log_sigmoid_decay


class SimpleGLA(HeadMixer):
  """Multi-head linear attention with a scalar gate.

  Args:
    dim: model width D.
    heads: of the queries.   key_heads: of keys, values and gates, which queries share; None means
      `heads`.
    key_dim, value_dim: channels of a head; None means D / heads.
    temperature: divides the gate's logarithm.
    convolution: width of short convolutions of q, k and v; None means none.
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
    temperature: float = 16.0,
    convolution: int | None = None,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    key_dim = head_channels("SimpleGLA", key_dim, dim, heads, argument="key_dim")
    value_dim = head_channels("SimpleGLA", value_dim, dim, heads, argument="value_dim")
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
    self.decay = Linear({"embed": dim}, {"heads": states}, rngs=rngs)
    self.output = GatedOutput(dim, heads, value_dim, rngs=rngs)
    self.temperature = temperature

  def mix(self, x, q, k, v, **options):
    """See `HeadMixer.mix`."""
    g = log_sigmoid_decay(self.decay(x), temperature=self.temperature)
    return ops.linear_attention(q, k, v, g=g, **options)
