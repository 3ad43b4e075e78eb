"""Named shapes of the long convolution, for the tests and the benchmarks of every
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
    batch, length, channels: B, T, D.
    taps: L of the filters; None means T.
    full: whether there is a filter of later tokens.
    segments: for each row the (id, length) of its documents, 0 being padding; None means one
      document a row.
  """

  # Arrays that are float32 whatever the others are.
  float32: ClassVar[tuple[str, ...]] = ("kernel", "reverse_kernel", "skip")

  name: str
  batch: int
  length: int
  channels: int
  taps: int | None = None
  full: bool = False
  segments: tuple[tuple[tuple[int, int], ...], ...] | None = None

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Of u and both gates [B, T, D], the kernels [D, L] and skip [D]."""
    rows, filters = (
      (self.batch, self.length, self.channels),
      (self.channels, self.taps or self.length),
    )
    shapes = {"u": rows, "kernel": filters, "skip": (self.channels,)}
    shapes |= {"pre_gate": rows, "post_gate": rows}
    return shapes | ({"reverse_kernel": filters} if self.full else {})

  def options(self) -> dict[str, object]:
    """What an op is told beside the arrays: nothing."""
    return {}

  def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of these shapes, standard normal in float64."""
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape) for name, shape in self.shapes().items()}

  def segment_ids(self) -> np.ndarray | None:
    """[B, T] int32, or None."""
    if self.segments is None:
      return None
    return np.array([np.repeat(*zip(*row, strict=True)) for row in self.segments], np.int32)


PACKED = (  # padding in front, inside, between and behind; documents of one token
  ((0, 2), (3, 3), (0, 1), (3, 2), (5, 2), (0, 2), (2, 5), (9, 1), (4, 3), (0, 1)),
  ((1, 15), (2, 7)),
)
LONG_PACKED = tuple(tuple((number, 4 * length) for number, length in row) for row in PACKED)

CASES = (
  Case("one_token", 1, 1, 2, full=True),
  Case("short", 2, 20, 3),
  Case("transform", 2, 200, 3),
  Case("few_taps", 2, 88, 3, taps=5, segments=LONG_PACKED),
  Case("many_taps", 2, 22, 3, taps=40, segments=PACKED),
  Case("packed", 2, 88, 3, segments=LONG_PACKED),
  Case("packed_full", 2, 22, 3, full=True, segments=PACKED),
  Case("long_packed_full", 2, 88, 3, taps=120, full=True, segments=LONG_PACKED),
)

# Of the published table of gated convolutions (arXiv 2311.05908), rows of causal models.
BENCHMARKS = (
  Case("cpu", 4, 4096, 256),
  Case("train_1k", 64, 1024, 768),
  Case("train_4k", 64, 4096, 768),
  Case("train_8k", 64, 8192, 768),
  Case("train_32k", 64, 32768, 768),
)
