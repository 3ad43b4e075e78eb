"""Lightning attention: linear attention with a constant decay a head, weaker the deeper the layer.

    S_t = exp(g_h) S_{t-1} + silu(k_t) silu(v_t)^T        g_h = -(8 / H) h (1 - n / N)

Qin et al. 2024 (arXiv 2401.04658), for head h of H in layer n of N. The activations and the sigmoid
gate of the output are those of the MiniMax-01 report (arXiv 2501.08313), section 2.2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import ops
from jaxmix.layers import GatedOutput, HeadMixer, head_channels


class Lightning(HeadMixer):
  """Multi-head lightning attention.

  Args:
    dim: model width D.
    heads: number of heads.
    key_dim, value_dim: channels of a head; None means D / heads.
    implementation: see `jaxmix.ops.linear_attention`.
  Raises:
    ValueError: sizes do not divide.
  """

  def __init__(
    self,
    dim: int,
    *,
    heads: int = 8,
    key_dim: int | None = None,
    value_dim: int | None = None,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    key_dim = head_channels("Lightning", key_dim, dim, heads, argument="key_dim")
    value_dim = head_channels("Lightning", value_dim, dim, heads, argument="value_dim")
    super().__init__(
      dim,
      heads=(heads, heads, heads),
      key_dim=key_dim,
      value_dim=value_dim,
      convolution=None,
      implementation=implementation,
      rngs=rngs,
    )
    self.output = GatedOutput(dim, heads, value_dim, gate="sigmoid", rngs=rngs)
    self.log_decay = nnx.Param(-8.0 / heads * jnp.arange(heads), axes=("heads",), inputs=0)

  def place(self, layer: jax.Array, layers: int) -> None:
    """Weakens the decay of layer `layer` of `layers`; the first layer is 0."""
    self.log_decay[...] = self.log_decay[...] * (1 - layer / layers)

  def mix(self, x, q, k, v, **options):
    """See `HeadMixer.mix`."""
    g = jax.lax.stop_gradient(self.log_decay[...])  # not learnt
    return ops.linear_attention(*map(jax.nn.silu, (q, k, v)), g=g, **options)
