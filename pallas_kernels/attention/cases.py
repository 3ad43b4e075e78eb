"""Named shapes of softmax attention, for the tests and the benchmarks of every implementation."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
  """One shape.

  Attributes:
    name: unique.
    batch, length, heads, key_heads, key_dim, value_dim: B, T, H, G, K, V.
    causal: see no later key.   window: newest tokens seen; None means all.
    segments: for each row the (id, length) of its documents, 0 being padding; None means one
      document a row.
  """

  # Arrays that are float32 whatever the others are.
  float32: ClassVar[tuple[str, ...]] = ()

  name: str
  batch: int
  length: int
  heads: int
  key_heads: int
  key_dim: int
  value_dim: int
  causal: bool = True
  window: int | None = None
  segments: tuple[tuple[tuple[int, int], ...], ...] | None = None

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Of q [B, T, H, K], k [B, T, G, K] and v [B, T, G, V]."""
    rows = (self.batch, self.length)
    return {
      "q": (*rows, self.heads, self.key_dim),
      "k": (*rows, self.key_heads, self.key_dim),
      "v": (*rows, self.key_heads, self.value_dim),
    }

  def options(self) -> dict[str, object]:
    """What an op is told beside the arrays."""
    return {"visibility": "causal" if self.causal else "full", "window": self.window}

  def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of these shapes, standard normal in float64."""
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape) for name, shape in self.shapes().items()}

  def segment_ids(self) -> np.ndarray | None:
    """[B, T] int32, or None."""
    if self.segments is None:
      return None
    return np.array([np.repeat(*zip(*row, strict=True)) for row in self.segments], np.int32)


CASES = (
  Case("causal", 1, 128, 2, 2, 16, 16),
  Case("odd_length", 1, 200, 2, 2, 16, 24),
  Case("grouped", 2, 130, 4, 2, 8, 8),
  Case("window", 1, 200, 2, 1, 16, 16, window=9),
  Case("window_of_two", 1, 128, 1, 1, 8, 8, window=2),
  Case(
    "packed", 2, 200, 2, 1, 16, 16,
    segments=(
      ((1, 50), (2, 70), (0, 3), (3, 77)),
      ((0, 4), (7, 60), (0, 6), (8, 60), (7, 70)),
    ),
  ),
  Case("packed_window", 1, 200, 2, 2, 16, 16, window=30, segments=(((1, 90), (2, 100), (0, 10)),)),
  Case("full", 1, 200, 2, 2, 16, 16, causal=False),
  Case("full_packed", 1, 200, 2, 1, 16, 16, causal=False, segments=(((1, 90), (2, 100), (0, 10)),)),
)  # fmt: skip

BENCHMARKS = (
  Case("cpu", 1, 4096, 8, 8, 64, 64),
  Case("train", 4, 4096, 16, 16, 128, 128),
)
