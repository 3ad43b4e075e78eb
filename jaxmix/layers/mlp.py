"""The channel mixers: dense and gated MLPs."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from jaxmix.layers.linear import Linear

ACTIVATIONS = {
  "gelu": jax.nn.gelu,  # by tanh
  "exact_gelu": functools.partial(jax.nn.gelu, approximate=False),
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


MLPS = {"dense": DenseMLP, "gated": GatedMLP}
