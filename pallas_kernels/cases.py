"""Named shapes: what tests compare, what benchmarks time, what is compiled ahead."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Case:
  """Shapes of queries, keys and values.

  Attributes:
    name: unique within an op.
    batch, length, heads, key_dim, value_dim: B, T, H, K, V.
    key_heads: heads of keys and values; None means `heads`.
    dtype: "float32" or "bfloat16".
    documents: documents packed into each row, of about equal length.
  """

  name: str
  batch: int
  length: int
  heads: int
  key_dim: int
  value_dim: int
  key_heads: int | None = None
  dtype: str = "float32"
  documents: int = 1

  def arrays(self, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """q, k, v from a normal distribution, and segment_ids where there are several documents."""
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = self.key_heads or self.heads
    shapes = ((self.heads, self.key_dim), (heads, self.key_dim), (heads, self.value_dim))
    q, k, v = (
      jax.random.normal(key, (self.batch, self.length, *shape)).astype(self.dtype)
      for key, shape in zip(keys, shapes, strict=True)
    )
    if self.documents == 1:
      return q, k, v, None
    ids = 1 + jnp.arange(self.length) * self.documents // self.length
    return q, k, v, jnp.broadcast_to(ids, (self.batch, self.length)).astype(jnp.int32)
