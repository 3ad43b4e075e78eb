"""The channel mixers: MLPs, plain and gated, of dense and of block-diagonal maps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix.layers.linear import Linear
from jaxmix.layers.monarch_linear import BlockDiagonalLinear


def _exact_gelu(x):
  """x Phi(x), as published programs compute it: jax.nn.gelu takes erfc, for digits of the smallest
  values, and a TPU three times as long."""
  z = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (z * (0.5 + 0.5 * jax.lax.erf(z * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
  "gelu": jax.nn.gelu,  # by tanh
  "exact_gelu": _exact_gelu,
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
}


def _activation(name: str):
  if name not in ACTIVATIONS:
    raise ValueError(f"activation={name!r} is unknown; expected one of {', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[name]


class DenseMLP(nnx.Module):
  """y = act(x W_up) W_down (Vaswani et al. 2017, arXiv 1706.03762, section 3.3).

  Args:
    dim: model width D.   hidden: width between.
    activation: one of ACTIVATIONS.
    bias: biases on both maps.
  """

  def __init__(
    self, dim: int, hidden: int, *, activation: str = "gelu", bias: bool = False, rngs: nnx.Rngs
  ):
    self.activation = _activation(activation)
    self.up = Linear({"embed": dim}, {"mlp": hidden}, bias=bias, rngs=rngs)
    self.down = Linear({"mlp": hidden}, {"embed": dim}, bias=bias, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T, D]."""
    return self.down(self.activation(self.up(x)))

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass, a multiply-add counted as two."""
    return batch * length * (self.up.flops_per_token + self.down.flops_per_token)


class GatedMLP(nnx.Module):
  """y = (act(x W_gate) * x W_up) W_down (Shazeer 2020, arXiv 2002.05202; SwiGLU with
  activation="silu").

  Args:
    dim: model width D.   hidden: width between.
    activation: one of ACTIVATIONS.
    bias: biases on the three maps.
  """

  def __init__(
    self, dim: int, hidden: int, *, activation: str = "silu", bias: bool = False, rngs: nnx.Rngs
  ):
    self.activation = _activation(activation)
    self.gate = Linear({"embed": dim}, {"mlp": hidden}, bias=bias, rngs=rngs)
    self.up = Linear({"embed": dim}, {"mlp": hidden}, bias=bias, rngs=rngs)
    self.down = Linear({"mlp": hidden}, {"embed": dim}, bias=bias, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T, D]."""
    return self.down(self.activation(self.gate(x)) * self.up(x))

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass, a multiply-add counted as two."""
    return batch * length * sum(part.flops_per_token for part in (self.gate, self.up, self.down))


class BlockDiagonalMLP(nnx.Module):
  """An MLP of block-diagonal maps.

      plain:  y = act(x W_up) W_down + b
      gated:  g, u = halves of x W_up        y = (act(g) * u) W_down + b

  Halves are contiguous: a gate and what it gates come from different blocks, which is what mixes
  them.

  Args:
    dim: model width D.   hidden: width between.
    blocks: of each map; its cost is that of a dense one over `blocks`.
    gated: see above.
    activation: one of ACTIVATIONS.
    bias: a bias behind the last map.
  Raises:
    ValueError: hidden is not a multiple of blocks.
  Source: Fu et al. 2023 (arXiv 2310.12109), section 4.
  """

  def __init__(
    self,
    dim: int,
    hidden: int,
    *,
    blocks: int = 4,
    gated: bool = False,
    activation: str = "gelu",
    bias: bool = False,
    rngs: nnx.Rngs,
  ):
    if hidden % blocks:
      raise ValueError(
        f"BlockDiagonalMLP: hidden={hidden} is not a multiple of blocks={blocks}; try "
        f"hidden={-(-hidden // blocks) * blocks}"
      )
    self.activation, self.gated = _activation(activation), gated
    up = {"mlp": 2 * hidden if gated else hidden}
    self.up = BlockDiagonalLinear({"embed": dim}, up, blocks=blocks, rngs=rngs)
    self.down = BlockDiagonalLinear(
      {"mlp": hidden}, {"embed": dim}, blocks=blocks, bias=bias, rngs=rngs
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T, D]."""
    if not self.gated:
      return self.down.together([self.activation(h) for h in self.up.apart(x)])
    h = self.up.apart(x, 2)  # as many parts of gates, and of what they gate, as `down` has blocks
    gates, h = h[: len(h) // 2], h[len(h) // 2 :]
    return self.down.together([self.activation(gate) * x for gate, x in zip(gates, h, strict=True)])

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass, a multiply-add counted as two."""
    return batch * length * (self.up.flops_per_token + self.down.flops_per_token)


MLPS = {
  "dense": DenseMLP,
  "gated": GatedMLP,
  "block_diagonal": BlockDiagonalMLP,
  "gated_block_diagonal": functools.partial(BlockDiagonalMLP, gated=True),
}
