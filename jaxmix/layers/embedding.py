"""Tables of vectors: one a token of the vocabulary, one a position."""

from __future__ import annotations

import jax
from flax import nnx

from jaxmix import sharding


class Embedding(nnx.Module):
  """A table of vectors, read by index.

  Args:
    size: number of vectors.   dim: model width D.
    axis: logical name of the first axis: "vocab" or "position".
    rngs: gives the table, normal with standard deviation 0.02 (Radford et al. 2019, GPT-2), so that
      a tied output starts near the uniform distribution.
  """

  def __init__(self, size: int, dim: int, *, axis: str = "vocab", rngs: nnx.Rngs):
    self.table = nnx.Param(
      0.02 * jax.random.normal(rngs.params(), (size, dim)), axes=(axis, "embed")
    )
    self.axis = axis

  def __call__(self, indices: jax.Array, dtype) -> jax.Array:
    """[B, T] int32 -> [B, T, D] in dtype; an index past the table reads its last row."""
    table = sharding.constrain(
      self.table[...].astype(dtype), self.axis, None
    )  # whole rows, so that a row is found on one device
    return table.at[indices].get(mode="clip")
