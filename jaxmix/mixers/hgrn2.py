"""HGRN2: a gated linear RNN whose key is what the decay leaves of one.

    S_t = f_t * S_{t-1} + (1 - f_t) i_t^T        f_t = l + (1 - l) sigmoid(x_t W_f)

Qin et al. 2024 (arXiv 2404.07904), section 3. The authors tie the lower bounds l of the layers by a
cumulative softmax over the depth; here each layer learns its own, from where theirs begin: layer n
of N at n / N, so the first has none.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import ops
from jaxmix.layers import GatedOutput, HeadMixer, head_channels

NO_BOUND = -20.0  # sigmoid of it is 2e-9


class HGRN2(HeadMixer):
  """Hierarchically gated linear RNN with state expansion; `k` is the projection of forget gates.

  Args:
    dim: model width D.
    key_dim: forget gates of a head; there are D / key_dim heads.
    value_dim: channels of a head's inputs; None means D over all heads.
    convolution: width of short convolutions of the projections; None means none.
    implementation: see `jaxmix.ops.linear_attention`.
  Raises:
    ValueError: sizes do not divide.
  """

  def __init__(
    self,
    dim: int,
    *,
    key_dim: int = 128,
    value_dim: int | None = None,
    convolution: int | None = None,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    heads = head_channels("HGRN2", None, dim, key_dim, argument="key_dim")
    value_dim = head_channels("HGRN2", value_dim, dim, heads, argument="value_dim")
    super().__init__(
      dim,
      heads=(heads, heads, heads),
      key_dim=key_dim,
      value_dim=value_dim,
      convolution=convolution,
      implementation=implementation,
      rngs=rngs,
    )
    self.output = GatedOutput(dim, heads, value_dim, gate="none", rngs=rngs)
    self.lower_bound = nnx.Param(
      jnp.full((heads, key_dim), NO_BOUND), axes=("heads", "key"), inputs=0
    )

  def place(self, layer: jax.Array, layers: int) -> None:
    """Sets the lower bound at first to layer / layers; the first layer is 0."""
    bound = jnp.maximum(layer / layers, jax.nn.sigmoid(NO_BOUND))
    logit = jnp.log(bound) - jnp.log1p(-bound)
    self.lower_bound[...] = jnp.broadcast_to(logit, self.lower_bound.shape)

  def mix(self, x, q, k, v, **options):
    """See `HeadMixer.mix`; k holds the forget gates before their activation."""
    raw = k.astype(jnp.promote_types(k.dtype, jnp.float32))
    bound = self.lower_bound[...].astype(raw.dtype)
    # log(l + (1 - l) sigmoid(raw)), each term as a logarithm.
    g = jnp.logaddexp(
      jax.nn.log_sigmoid(bound), jax.nn.log_sigmoid(-bound) + jax.nn.log_sigmoid(raw)
    )
    return ops.linear_attention(jax.nn.silu(q), (-jnp.expm1(g)).astype(k.dtype), v, g=g, **options)
