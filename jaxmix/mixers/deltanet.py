"""DeltaNet and its gated forms: a memory that is corrected towards each value rather than added to.

    S~  = exp(g_t) * S_{t-1}        S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T        o_t = S_t^T q_t

with q, k, v = silu(convolution(x W)), q and k of length one, beta = sigmoid(x W_beta).

DeltaNet has no decay: Yang et al. 2024 (arXiv 2406.06484). GatedDeltaNet has one a head and token:
Yang et al. 2024 (arXiv 2412.06464). KDA has one a key channel: Kimi Team 2025 (arXiv 2510.26692).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import ops
from jaxmix.layers import (
  GatedOutput,
  HeadMixer,
  Linear,
  LowRank,
  SoftplusDecay,
  head_channels,
  l2_norm,
)


class _DeltaMixer(HeadMixer):
  """What the three share; `decay(x)` is the log-decay, None where there is none."""

  def __init__(self, dim: int, *, heads: tuple[int, int, int], largest_beta: float, **options):
    super().__init__(dim, heads=heads, **options)
    self.beta = Linear({"embed": dim}, {"heads": heads[2]}, rngs=options["rngs"])
    self.largest_beta = largest_beta

  def log_decay(self, x: jax.Array) -> jax.Array | None:
    """[B, T, D] -> g, as `jaxmix.ops.delta_rule` takes it."""
    raise NotImplementedError

  def mix(self, x, q, k, v, **options):
    """See `HeadMixer.mix`."""
    raw = self.beta(x)
    beta = self.largest_beta * jax.nn.sigmoid(raw.astype(jnp.promote_types(raw.dtype, jnp.float32)))
    return ops.delta_rule(l2_norm(q), l2_norm(k), v, beta, g=self.log_decay(x), **options)

  @property
  def mix_flops(self) -> int:
    """See `HeadMixer.mix_flops`; memories are also read at the key, to be corrected."""
    heads, key_dim, value_dim = self.memory_shape
    return super().mix_flops + 2 * heads * key_dim * value_dim


class DeltaNet(_DeltaMixer):
  """Multi-head delta rule without decay.

  Args:
    dim: model width D.
    heads: number of heads.
    key_dim, value_dim: channels of a head; None means D / heads.
    largest_beta: of the write strengths; 2 allows negative eigenvalues (Grazzi et al. 2024, arXiv
      2411.12537).
    gate: of the output: "none", "silu" or "sigmoid".
    convolution: width of the short convolutions; None means none.
    implementation: see `jaxmix.ops.delta_rule`.
  Raises:
    ValueError: sizes do not divide, or a name is unknown.
  """

  def __init__(
    self,
    dim: int,
    *,
    heads: int = 4,
    key_dim: int | None = None,
    value_dim: int | None = None,
    largest_beta: float = 1.0,
    gate: str = "none",
    convolution: int | None = 4,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    key_dim = head_channels("DeltaNet", key_dim, dim, heads, argument="key_dim")
    value_dim = head_channels("DeltaNet", value_dim, dim, heads, argument="value_dim")
    super().__init__(
      dim,
      heads=(heads, heads, heads),
      key_dim=key_dim,
      value_dim=value_dim,
      largest_beta=largest_beta,
      convolution=convolution,
      implementation=implementation,
      rngs=rngs,
    )
    self.output = GatedOutput(dim, heads, value_dim, gate=gate, rngs=rngs)

  def log_decay(self, x: jax.Array) -> None:
    """None."""
    return None


class GatedDeltaNet(_DeltaMixer):
  """Multi-head delta rule with one decay a head and token.

  Args:
    dim: model width D.
    heads: of queries and keys.   value_heads: of values, gates and states, which share them; None
      means `heads`.
    key_dim, value_dim: channels of a head; None means 3/4 D over `heads` and twice that, so that
      the layer has about 6 D^2 parameters as the paper's.
    largest_beta, convolution, implementation: as in DeltaNet.
  Raises:
    ValueError: sizes do not divide.
  """

  def __init__(
    self,
    dim: int,
    *,
    heads: int = 6,
    value_heads: int | None = None,
    key_dim: int | None = None,
    value_dim: int | None = None,
    largest_beta: float = 1.0,
    convolution: int | None = 4,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    key_dim = head_channels("GatedDeltaNet", key_dim, 0.75 * dim, heads, argument="key_dim")
    states = heads if value_heads is None else value_heads
    value_dim = 2 * key_dim if value_dim is None else value_dim
    super().__init__(
      dim,
      heads=(heads, heads, states),
      key_dim=key_dim,
      value_dim=value_dim,
      largest_beta=largest_beta,
      convolution=convolution,
      implementation=implementation,
      rngs=rngs,
    )
    self.step = Linear({"embed": dim}, {"heads": states}, rngs=rngs)
    self.decay = SoftplusDecay({"heads": states}, rates=(0.0, 16.0), rngs=rngs)
    self.output = GatedOutput(dim, states, value_dim, rngs=rngs)

  def log_decay(self, x: jax.Array) -> jax.Array:
    """[B, T, H]"""
    return self.decay(self.step(x))


class KDA(_DeltaMixer):
  """Kimi Delta Attention: the delta rule with one decay a key channel.

  Args:
    dim: model width D.
    heads: of queries and keys.   value_heads: of values, gates and states, which share them; None
      means `heads`.
    key_dim, value_dim: channels of a head; None means D / heads and the same.
    floor: the strongest log-decay of a token, such as -5; None means none.
    largest_beta, convolution, implementation: as in DeltaNet.
  Raises:
    ValueError: sizes do not divide.
  """

  def __init__(
    self,
    dim: int,
    *,
    heads: int = 16,
    value_heads: int | None = None,
    key_dim: int | None = None,
    value_dim: int | None = None,
    floor: float | None = None,
    largest_beta: float = 1.0,
    convolution: int | None = 4,
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    key_dim = head_channels("KDA", key_dim, dim, heads, argument="key_dim")
    states = heads if value_heads is None else value_heads
    value_dim = key_dim if value_dim is None else value_dim
    super().__init__(
      dim,
      heads=(heads, heads, states),
      key_dim=key_dim,
      value_dim=value_dim,
      largest_beta=largest_beta,
      convolution=convolution,
      implementation=implementation,
      rngs=rngs,
    )
    shape = {"heads": states, "key": key_dim}
    self.step = LowRank(dim, value_dim, shape, rngs=rngs)
    self.decay = SoftplusDecay(shape, floor=floor, rngs=rngs)
    self.output = GatedOutput(dim, states, value_dim, gate="sigmoid", rank=value_dim, rngs=rngs)

  def log_decay(self, x: jax.Array) -> jax.Array:
    """[B, T, H, K]"""
    return self.decay(self.step(x))
