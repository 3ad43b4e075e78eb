"""Named shapes of Grassmann mixing, for the tests and the benchmarks of every implementation."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
  """One shape.

  Attributes:
    name: unique.
    batch, length, rank, channels: B, T, R, D.
    offsets: how many tokens back the partners of a token stand; or such a tuple for each group.
    heads: H, groups of R channels with planes of their own.
    segments: for each row the (id, length) of its documents, 0 being padding; None means one
      document a row.
    normalization: "safe" or "clamp".
  """

  # Arrays that are float32 whatever the others are.
  float32: ClassVar[tuple[str, ...]] = ("z", "state")

  name: str
  batch: int
  length: int
  rank: int
  channels: int
  offsets: tuple = (1, 2, 4, 8, 12, 16)
  heads: int = 1
  segments: tuple[tuple[tuple[int, int], ...], ...] | None = None
  normalization: str = "safe"

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Of z [B, T, H, R], weight [H R (R - 1) / 2, D] and bias [D]."""
    return {
      "z": (self.batch, self.length, self.heads, self.rank),
      "weight": (self.heads * self.rank * (self.rank - 1) // 2, self.channels),
      "bias": (self.channels,),
    }

  def options(self) -> dict[str, object]:
    """What an op is told beside the arrays."""
    return {"offsets": self.offsets, "normalization": self.normalization}

  def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of these shapes, standard normal in float64."""
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape) for name, shape in self.shapes().items()}

  def segment_ids(self) -> np.ndarray | None:
    """[B, T] int32, or None."""
    if self.segments is None:
      return None
    return np.array([np.repeat(*zip(*row, strict=True)) for row in self.segments], np.int32)


PACKED = (
  # an id that comes back is another document; documents shorter than the offsets; padding behind
  ((3, 5), (4, 150), (3, 1), (9, 2), (5, 2), (6, 135), (0, 5)),
  # padding between documents
  ((1, 130), (0, 40), (2, 128), (7, 1), (0, 1)),
)
PADDED = (
  # padding before, and inside a document
  ((0, 64), (1, 1), (1, 40), (0, 9), (1, 10), (2, 176)),
  # every other token, and a last document that is shorter than the offsets
  ((4, 1), (0, 1), (4, 1), (0, 3), (4, 250), (0, 1), (4, 40), (0, 1), (5, 1), (0, 1)),
)

CASES = (
  Case("one_token", 2, 1, 8, 24),
  Case("below_the_offsets", 2, 5, 8, 24),
  Case("one_block", 1, 128, 32, 128),
  Case("above_a_block", 2, 300, 32, 48),
  Case("one_offset", 2, 300, 16, 40, offsets=(3,)),
  Case("repeated_offsets", 2, 140, 8, 24, offsets=(1, 1, 2, 150)),
  Case("packed", 2, 300, 32, 48, segments=PACKED),
  Case("packed_clamp", 2, 300, 32, 48, segments=PACKED, normalization="clamp"),
  Case("padded", 2, 300, 12, 24, segments=PADDED),
  Case("odd_rank", 2, 300, 7, 40),
  Case("groups", 2, 300, 8, 40, heads=3, segments=PACKED),
  Case(
    "offsets_of_groups", 2, 300, 8, 40, heads=3, offsets=((1, 4), (2, 2), (5, 9)), segments=PADDED
  ),
  Case("smallest_rank", 2, 200, 4, 130),
  Case("largest_rank", 1, 150, 128, 136),
)

BENCHMARKS = (
  Case("cpu", 4, 2048, 32, 256),
  Case("train", 8, 4096, 32, 1024),
  Case("train_r64", 8, 4096, 64, 1024),
  Case(
    "train_packed", 8, 4096, 32, 1024, segments=(((1, 1000), (2, 1500), (3, 1500), (0, 96)),) * 8
  ),
)
