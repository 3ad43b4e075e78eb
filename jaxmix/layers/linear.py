"""A linear map between named axes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix import sharding


class Linear(nnx.Module):
  """y = x W + b, contracting the trailing axes of x.

  The kernel declares its logical axes and how many of them are inputs; sharding, weight decay and
  Muon's matrix axes follow from that.

  Args:
    inputs: logical name -> size of the axes of x that are contracted, in order, such as {"embed":
      512}.
    outputs: the same for the axes of y, such as {"heads": 8, "head": 64}.
    bias: add a bias, zero at first.
    std: standard deviation of the kernel at first; None means 1 / sqrt(inputs), so that y has the
      variance of x.
    rngs: gives the kernel, normal.
  Attributes:
    flops_per_token: floating-point operations of one token in one layer, a multiply-add counted as
      two.
  """

  def __init__(
    self,
    inputs: Mapping[str, int],
    outputs: Mapping[str, int],
    *,
    bias: bool = False,
    std: float | None = None,
    rngs: nnx.Rngs,
  ):
    shape = (*inputs.values(), *outputs.values())
    std = math.prod(inputs.values()) ** -0.5 if std is None else std
    kernel = std * jax.random.normal(rngs.params(), shape)
    self.kernel = nnx.Param(kernel, axes=(*inputs, *outputs), inputs=len(inputs), std=std)
    zeros = jnp.zeros(tuple(outputs.values()))
    self.bias = nnx.Param(zeros, axes=tuple(outputs), inputs=0) if bias else None
    self.contracted = len(inputs)
    self.axes = (*inputs, *outputs)
    self.flops_per_token = 2 * math.prod(shape)

  def __call__(self, x: jax.Array, *, dtype=None) -> jax.Array:
    """[..., *inputs] -> [..., *outputs], computed with operands in the dtype of x and returned in
    `dtype`; None means that of x."""
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    y = jnp.tensordot(x, self.weight(x.dtype), axes=self.contracted, preferred_element_type=dtype)
    return y if self.bias is None else y + self.bias[...].astype(dtype)

  def each(self, x: jax.Array) -> list[jax.Array]:
    """[..., *inputs] -> [..., *outputs[1:]] for each place of the first axis of the outputs.

    A product each: of one product XLA would copy the parts out for whoever reads them apart.
    """
    kernel = jnp.moveaxis(self.weight(x.dtype), self.contracted, 0)
    biases = [0] * len(kernel) if self.bias is None else self.bias[...].astype(x.dtype)
    return [
      jnp.tensordot(x, part, axes=self.contracted, preferred_element_type=x.dtype) + bias
      for part, bias in zip(kernel, biases, strict=True)
    ]

  def weight(self, dtype) -> jax.Array:
    """The kernel in `dtype`, for whoever multiplies by it otherwise."""
    # Cut along the model width, a kernel is gathered once, in the dtype of x, before it is used
    # (ZeRO-3). Left to itself the compiler may gather it part by part in the midst of the product,
    # and read x once for each part.
    return sharding.gather(self.kernel[...].astype(dtype), self.axes, whole="embed")
