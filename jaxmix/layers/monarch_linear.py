"""Linear maps with structured matrices: block diagonal, and Monarch, two block-diagonal factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import ops, sharding


class BlockDiagonalLinear(nnx.Module):
  """Each block of channels by a matrix of its own: y = concat_k(x_k W_k) + b.

  Where blocks do not divide a width, x is padded with zeros, and what y has too much of is left
  out.

  Args:
    inputs, outputs: logical name -> width of x and of y, one axis each, such as {"embed": 768}.
    blocks: number of blocks.
    shuffle: channel i of block k of x is its channel k + blocks * i, so that every block sees a
      part of all blocks of a layer before.
    bias: add a bias.
    rngs: gives the blocks, uniform within 1 / sqrt(inputs of a block), and the bias, within
      1 / sqrt(width of y).
  Attributes:
    flops_per_token: floating-point operations of a token, a multiply-add counted as two.
  Source: the dimension mixer of Fu et al. 2023 (arXiv 2310.12109), section 4.
  """

  def __init__(
    self,
    inputs: Mapping[str, int],
    outputs: Mapping[str, int],
    *,
    blocks: int,
    shuffle: bool = False,
    bias: bool = False,
    rngs: nnx.Rngs,
  ):
    ((before, narrow),), ((after, wide),) = inputs.items(), outputs.items()
    self.blocks, self.shuffle, self.width = blocks, shuffle, wide
    self.kernel = _blocks(blocks, -(-narrow // blocks), -(-wide // blocks), (before, after), rngs)
    self.bias = _bias(wide, after, rngs) if bias else None
    self.axes = ("blocks", before, after)
    self.flops_per_token = 2 * self.kernel.size

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., inputs] -> [..., outputs], in the dtype of x."""
    return self.together(self._blocks_of(x))

  def apart(self, x: jax.Array, parts: int = 1) -> list[jax.Array]:
    """y without a bias, each block of it in so many equal parts.

    A TPU would spend as long on taking blocks out of one array as on the products.
    """
    weight = _weight(self.kernel, self.axes, x.dtype)
    return [
      ops.block_diagonal_multiply(x, part[None])
      for x, matrix in zip(self._blocks_of(x), weight, strict=True)
      for part in jnp.split(matrix, parts)
    ]

  def together(self, x: Sequence[jax.Array]) -> jax.Array:
    """The blocks of x -> y."""
    weight = _weight(self.kernel, self.axes, x[0].dtype)
    y = [ops.block_diagonal_multiply(x, w[None]) for x, w in zip(x, weight, strict=True)]
    return _with_bias(jnp.concatenate(y, -1)[..., : self.width], self.bias)

  def _blocks_of(self, x) -> list[jax.Array]:
    x = _padded(x, self.blocks * self.kernel.shape[1])
    if self.shuffle:
      x = x.reshape(*x.shape[:-1], self.blocks, -1).swapaxes(-1, -2).reshape(x.shape)
    return jnp.split(x, self.blocks, -1)


class MonarchLinear(nnx.Module):
  """A linear map whose matrix is Monarch, see `jaxmix.ops.monarch_multiply`.

  Widths are padded as in `BlockDiagonalLinear`; between the factors there are as many channels as
  in the narrower of x and y.

  Args:
    inputs, outputs, blocks, bias, rngs: as there.
  Source: Dao et al. 2022 (arXiv 2204.00595), section 3.
  """

  def __init__(
    self,
    inputs: Mapping[str, int],
    outputs: Mapping[str, int],
    *,
    blocks: int,
    bias: bool = False,
    rngs: nnx.Rngs,
  ):
    ((before, narrow),), ((after, wide),) = inputs.items(), outputs.items()
    p, q = -(-narrow // blocks), -(-wide // blocks)
    between = min(p, q)
    self.width, self.axes = wide, ("blocks", before, after)
    self.first = _blocks(blocks, p, between, (before, after), rngs)
    self.second = _blocks(blocks, between, q, (before, after), rngs)
    self.bias = _bias(wide, after, rngs) if bias else None
    self.flops_per_token = 2 * (self.first.size + self.second.size)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., inputs] -> [..., outputs], in the dtype of x."""
    blocks, inputs, _ = self.first.shape
    factors = [_weight(factor, self.axes, x.dtype) for factor in (self.first, self.second)]
    y = ops.monarch_multiply(_padded(x, blocks * inputs), factors, leading_permutation=False)
    return _with_bias(y[..., : self.width], self.bias)


def _blocks(blocks: int, inputs: int, outputs: int, names: tuple[str, str], rngs) -> nnx.Param:
  bound = inputs**-0.5
  shape = (blocks, inputs, outputs)
  kernel = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
  return nnx.Param(kernel, axes=("blocks", *names), inputs=1)


def _bias(width: int, axis: str, rngs) -> nnx.Param:
  bound = width**-0.5
  bias = jax.random.uniform(rngs.params(), (width,), minval=-bound, maxval=bound)
  return nnx.Param(bias, axes=(axis,), inputs=0)


def _weight(kernel, axes, dtype):
  """[blocks, outputs, inputs]; see `Linear.weight`."""
  return sharding.gather(kernel[...].astype(dtype), axes, whole="embed").swapaxes(1, 2)


def _padded(x, width: int):
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def _with_bias(y, bias):
  return y if bias is None else y + bias[...].astype(y.dtype)
