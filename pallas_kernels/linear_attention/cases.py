"""Named shapes of causal linear attention, for the tests and the benchmarks of every
implementation."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

DECAYS = (None, "constant", "scalar", "vector")


@dataclasses.dataclass(frozen=True)
class Case:
  """One shape.

  Attributes:
    name: unique.
    batch, length, heads, key_dim, value_dim: B, T, H, K, V.
    segments: for each row the (id, length) of its documents, 0 being padding; None means one
      document a row.
    decay: one of DECAYS: no g, or g [H], [B, T, H] or [B, T, H, K].
    query_heads: where more queries read a state, heads of q; a multiple of H.
    key_heads: where states share keys and queries, heads of q and k; divides H.
    strength: largest decay of a token, in nats; 0.1 of the tokens have none and 0.1 have 100 times
      as much.
  """

  # Arrays that are float32 whatever the others are.
  float32: ClassVar[tuple[str, ...]] = (
    "g",
    "state",
  )

  name: str
  batch: int
  length: int
  heads: int
  key_dim: int
  value_dim: int
  segments: tuple[tuple[tuple[int, int], ...], ...] | None = None
  decay: str | None = None
  query_heads: int | None = None
  key_heads: int | None = None
  strength: float = 0.3

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Of q, k [B, T, H, K], v [B, T, H, V], state [B, H, K, V], and g where there is decay."""
    rows = (self.batch, self.length)
    keys = self.key_heads or self.heads
    shapes = {
      "q": (*rows, self.query_heads or keys, self.key_dim),
      "k": (*rows, keys, self.key_dim),
      "v": (*rows, self.heads, self.value_dim),
      "state": (self.batch, self.heads, self.key_dim, self.value_dim),
    }
    if self.decay is not None:
      kinds = {
        "constant": (self.heads,),
        "scalar": (*rows, self.heads),
        "vector": (*rows, self.heads, self.key_dim),
      }
      shapes["g"] = kinds[self.decay]
    return shapes

  def outputs(self) -> dict[str, tuple[int, ...]]:
    """Shapes of y and state."""
    shapes = self.shapes()
    heads = self.query_heads or self.heads
    return {"y": (self.batch, self.length, heads, self.value_dim), "state": shapes["state"]}

  def options(self) -> dict[str, object]:
    """What an op is told beside the arrays."""
    return {}

  def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of these shapes in float64: standard normal, but g."""
    random = np.random.default_rng(seed)
    arrays = {name: random.normal(size=shape) for name, shape in self.shapes().items()}
    if "g" in arrays:
      arrays["g"] = -random.uniform(0, self.strength, size=arrays["g"].shape)
      if self.decay != "constant":
        arrays["g"] *= random.choice([0.0, 1.0, 100.0], p=[0.1, 0.8, 0.1], size=arrays["g"].shape)
    return arrays

  def segment_ids(self) -> np.ndarray | None:
    """[B, T] int32, or None."""
    if self.segments is None:
      return None
    return np.array([np.repeat(*zip(*row, strict=True)) for row in self.segments], np.int32)


PACKED = (
  # an id that comes back is another document
  ((3, 5), (0, 2), (4, 57), (0, 3), (3, 1), (9, 62)),
  # a chunk of padding, and padding inside a document
  ((0, 64), (1, 1), (1, 40), (0, 9), (1, 10), (2, 6)),
)

CASES = (
  Case("one_token", 2, 1, 2, 8, 8),
  Case("two_tokens", 2, 2, 1, 4, 8, (((1, 1), (2, 1)), ((0, 1), (1, 1)))),
  Case("below_a_chunk", 1, 63, 2, 8, 12),
  Case("one_chunk", 1, 64, 2, 8, 12, (((1, 20), (0, 5), (1, 20), (2, 19)),)),
  Case("above_a_chunk", 2, 65, 1, 8, 4),
  Case("many_documents", 2, 130, 2, 8, 12, PACKED),
  Case("constant", 2, 130, 2, 8, 12, decay="constant"),
  Case("constant_packed", 2, 130, 2, 8, 12, PACKED, decay="constant"),
  Case("scalar", 2, 130, 2, 8, 12, PACKED, decay="scalar"),
  Case("vector", 2, 130, 2, 8, 12, PACKED, decay="vector"),
  Case("more_queries", 1, 70, 2, 8, 12, decay="scalar", query_heads=6),
  Case("shared_keys", 1, 70, 4, 8, 12, decay="vector", key_heads=2),
)  # fmt: skip

BENCHMARKS = (
  Case("cpu", 1, 4096, 8, 64, 64),
  Case("cpu_scalar", 1, 4096, 8, 64, 64, decay="scalar"),
  Case("cpu_vector", 1, 4096, 8, 64, 64, decay="vector"),
  Case("train", 4, 4096, 16, 128, 128),
  Case("train_constant", 4, 4096, 16, 128, 128, decay="constant"),
  Case("train_scalar", 4, 4096, 16, 128, 128, decay="scalar"),
  Case("train_vector", 4, 4096, 16, 128, 128, decay="vector"),
  Case("train_2k", 4, 2048, 16, 128, 128),
  Case("train_2k_scalar", 4, 2048, 16, 128, 128, decay="scalar"),
  Case("train_2k_vector", 4, 2048, 16, 128, 128, decay="vector"),
  Case("train_16k", 1, 16384, 16, 128, 128),
  Case("train_16k_scalar", 1, 16384, 16, 128, 128, decay="scalar"),
  Case("train_16k_vector", 1, 16384, 16, 128, 128, decay="vector"),
)
