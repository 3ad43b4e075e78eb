"""Mamba-2: a selective state space whose decay is one number a head and token.

    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T        o_t = S_t^T C_t + D x_t

with x, B, C = silu(convolution(u W)) and dt = softplus(u W_dt + b). Dao & Gu 2024 (arXiv
2405.21060), sections 6 and 7. Queries are C, keys B, values x; groups of heads share B and C.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import ops
from jaxmix.layers import HeadMixer, Linear, RMSNorm, SoftplusDecay, head_channels


class Mamba2(HeadMixer):
  """The mixer of Mamba-2; published models have no MLP beside it.

  Args:
    dim: model width D.
    expand: channels of x over D.   value_dim: of them, those of one head; there are
      expand * D / value_dim heads.
    key_dim: channels of B and C, the size of the state.   groups: heads of B and C.
    convolution: width of the short convolutions.
    implementation: see `jaxmix.ops.linear_attention`.
  Raises:
    ValueError: sizes do not divide.
  """

  def __init__(
    self,
    dim: int,
    *,
    expand: int = 2,
    value_dim: int = 64,
    key_dim: int = 128,
    groups: int = 1,
    convolution: int = 4,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    heads = head_channels("Mamba2", None, expand * dim, value_dim, argument="value_dim")
    if heads % groups:
      raise ValueError(
        f"Mamba2: {heads} heads are not a multiple of groups={groups}; change groups or value_dim"
      )
    super().__init__(
      dim,
      heads=(groups, groups, heads),
      key_dim=key_dim,
      value_dim=value_dim,
      convolution=convolution,
      convolution_bias=True,
      implementation=implementation,
      rngs=rngs,
    )
    self.step = Linear({"embed": dim}, {"heads": heads}, rngs=rngs)
    self.decay = SoftplusDecay({"heads": heads}, rngs=rngs)
    self.skip = nnx.Param(jnp.ones(heads), axes=("heads",), inputs=0)
    self.output = _GatedOutput(dim, heads, value_dim, rngs=rngs)

  def mix(self, x, q, k, v, **options):
    """See `HeadMixer.mix`."""
    raw = self.step(x)
    written = (self.decay.step(raw)[..., None] * v).astype(v.dtype)
    o, memory = ops.linear_attention(q, k, written, g=self.decay(raw), scale=1.0, **options)
    return o + self.skip[...].astype(v.dtype)[:, None] * v, memory


class _GatedOutput(nnx.Module):
  """y = rms_norm(o * silu(x W_g)) W_o, the norm over all heads, behind the gate."""

  def __init__(self, dim: int, heads: int, channels: int, *, rngs: nnx.Rngs):
    shape = {"heads": heads, "value": channels}
    self.gate = Linear({"embed": dim}, shape, rngs=rngs)
    self.norm = RMSNorm(heads * channels, axis="heads", eps=1e-5)
    self.out = Linear(shape, {"embed": dim}, rngs=rngs)
    self.flops_per_token = self.gate.flops_per_token + self.out.flops_per_token

  def __call__(self, x, o):
    gated = o * jax.nn.silu(self.gate(x))
    flat = gated.reshape(*gated.shape[:2], self.norm.scale.size)
    return self.out(self.norm(flat).reshape(gated.shape))
