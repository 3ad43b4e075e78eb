"""What mixers put before and behind their op: projections to heads, and the gated output."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix.layers.linear import Linear
from jaxmix.layers.norms import RMSNorm
from jaxmix.layers.short_convolution import ShortConvolution

GATES: dict[str, Callable] = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


def l2_norm(x: jax.Array, *, eps: float = 1e-6) -> jax.Array:
  """x / sqrt(sum of squares over the last axis + eps), in float32 and back in the dtype of x."""
  z = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (z * jax.lax.rsqrt(jnp.sum(z * z, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class HeadProjection(nnx.Module):
  """[B, T, D] -> [B, T, heads, channels], with a short convolution and SiLU behind it on request.

  Args:
    dim: model width D.   heads: number of heads.   channels: of a head.
    axis: logical name of the channels, such as "key".
    convolution: width of the convolution; None means none, and nothing but the map.
    bias: a bias in the convolution.
    rngs: gives the initial parameters.
  """

  def __init__(
    self,
    dim: int,
    heads: int,
    channels: int,
    *,
    axis: str,
    convolution: int | None = None,
    bias: bool = False,
    rngs: nnx.Rngs,
  ):
    shape = {"heads": heads, axis: channels}
    self.linear = Linear({"embed": dim}, shape, rngs=rngs)
    self.convolution = (
      None
      if convolution is None
      else ShortConvolution(shape, width=convolution, bias=bias, rngs=rngs)
    )

  def __call__(self, x: jax.Array, *, state=None, segment_ids=None):
    """[B, T, heads, channels] and the state of the convolution, None where there is none."""
    x = self.linear(x)
    if self.convolution is None:
      return x, None
    return self.convolution(x, state=state, segment_ids=segment_ids)

  def init_state(self, batch_size: int, dtype) -> jax.Array | None:
    """The state before the first token."""
    return None if self.convolution is None else self.convolution.init_state(batch_size, dtype)

  @property
  def flops_per_token(self) -> int:
    """Floating-point operations of a token, a multiply-add counted as two."""
    parts = (self.linear, self.convolution)
    return sum(part.flops_per_token for part in parts if part is not None)


class LowRank(nnx.Module):
  """x W_1 W_2 + b: a map to heads through few channels.

  Args:
    dim: model width D.   rank: channels between.   outputs: logical name -> size of the axes of y.
    bias: add a bias.   rngs: gives the initial parameters.
  """

  def __init__(
    self, dim: int, rank: int, outputs: dict[str, int], *, bias: bool = False, rngs: nnx.Rngs
  ):
    self.down = Linear({"embed": dim}, {"rank": rank}, rngs=rngs)
    self.up = Linear({"rank": rank}, outputs, bias=bias, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T, *outputs]"""
    return self.up(self.down(x))

  @property
  def flops_per_token(self) -> int:
    """Floating-point operations of a token, a multiply-add counted as two."""
    return self.down.flops_per_token + self.up.flops_per_token


class GatedOutput(nnx.Module):
  """y = (rms_norm(o) * gate(x W_g)) W_o, the norm over the channels of each head.

  Args:
    dim: model width D.   heads, channels: of o.
    gate: "silu", "sigmoid", or "none", where y = rms_norm(o) W_o.
    rank: channels through which W_g goes, which then has a bias; None means a full map without one.
    eps: of the norm.   rngs: gives the initial parameters.
  Raises:
    ValueError: the gate is unknown.
  """

  def __init__(
    self,
    dim: int,
    heads: int,
    channels: int,
    *,
    gate: str = "silu",
    rank: int | None = None,
    eps: float = 1e-5,
    rngs: nnx.Rngs,
  ):
    if gate not in (*GATES, "none"):
      raise ValueError(f"gate={gate!r} is unknown; expected one of {', '.join(GATES)}, none")
    shape = {"heads": heads, "value": channels}
    self.norm = RMSNorm(channels, axis="value", eps=eps)
    self.activation = GATES.get(gate)
    if self.activation is None:
      self.gate = None
    elif rank is None:
      self.gate = Linear({"embed": dim}, shape, rngs=rngs)
    else:
      self.gate = LowRank(dim, rank, shape, bias=True, rngs=rngs)
    self.out = Linear(shape, {"embed": dim}, rngs=rngs)

  def __call__(self, x: jax.Array, o: jax.Array) -> jax.Array:
    """x [B, T, D], the input of the mixer, and o [B, T, heads, channels] -> [B, T, D]."""
    o = self.norm(o)
    return self.out(o if self.gate is None else o * self.activation(self.gate(x)))

  @property
  def flops_per_token(self) -> int:
    """Floating-point operations of a token, a multiply-add counted as two."""
    return self.out.flops_per_token + (0 if self.gate is None else self.gate.flops_per_token)
