"""Named shapes of the short convolution, for the tests and the benchmarks of every
implementation."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
  """One shape.

  Attributes:
    name: unique.
    batch, length, channels, width: B, T, D, W.
    segments: for each row the (id, length) of its documents, 0 being padding; None means one
      document a row.
    activation: None or "silu".
  """

  # Arrays that are float32 whatever the others are.
  float32: ClassVar[tuple[str, ...]] = ()

  name: str
  batch: int
  length: int
  channels: int
  width: int = 4
  segments: tuple[tuple[tuple[int, int], ...], ...] | None = None
  activation: str | None = "silu"

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Of x [B, T, D], weight [D, W], bias [D] and state [B, W - 1, D]."""
    return {
      "x": (self.batch, self.length, self.channels),
      "weight": (self.channels, self.width),
      "bias": (self.channels,),
      "state": (self.batch, self.width - 1, self.channels),
    }

  def options(self) -> dict[str, object]:
    """What an op is told beside the arrays."""
    return {"activation": self.activation}

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
  # an id that comes back is another document; documents shorter than the taps; padding behind
  ((3, 5), (4, 150), (3, 1), (9, 2), (5, 2), (6, 135), (0, 5)),
  # padding between documents
  ((1, 130), (0, 40), (2, 128), (7, 1), (0, 1)),
)
PADDED = (
  # padding before, and inside a document
  ((0, 64), (1, 1), (1, 40), (0, 9), (1, 10), (2, 176)),
  # every other token, and a last document that is shorter than the taps
  ((4, 1), (0, 1), (4, 1), (0, 3), (4, 250), (0, 1), (4, 40), (0, 1), (5, 1), (0, 1)),
)

CASES = (
  Case("one_token", 2, 1, 8),
  Case("below_the_width", 2, 2, 8, segments=(((1, 1), (2, 1)), ((0, 1), (1, 1)))),
  Case("one_block", 1, 128, 12, activation=None),
  Case("above_a_block", 2, 300, 12),
  Case("packed", 2, 300, 12, segments=PACKED),
  Case("packed_identity", 2, 300, 12, segments=PACKED, activation=None),
  Case("padded", 2, 300, 12, segments=PADDED),
  Case("one_tap", 1, 40, 8, width=1),
  Case("two_taps", 2, 300, 8, width=2, segments=PACKED),
  Case("eight_taps", 2, 300, 136, width=8, segments=PACKED),
)

BENCHMARKS = (
  Case("cpu", 1, 4096, 512),
  Case("train", 4, 4096, 2048),
  Case("train_packed", 4, 4096, 2048, segments=(((1, 1000), (2, 1500), (3, 1500), (0, 96)),) * 4),
)
