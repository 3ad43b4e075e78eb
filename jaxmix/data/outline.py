"""What is known of a data set before a row of it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jaxmix.data.packing import Packing


@dataclasses.dataclass(frozen=True)
class Outline:
  """What a model and a program for the rows of a data set have to know.

  Attributes:
    sizes: what the factory of a model is called with, by name, such as {"vocab_size": 257}.
    row: name -> shape and dtype of each array of a row.
    length: T, the positions of a row, by which a model counts its FLOP.
    unit: what is counted in a figure of speed: "tokens", one a position, or "examples", one a row.
  """

  sizes: Mapping[str, Any]
  row: Mapping[str, tuple[tuple[int, ...], np.dtype]]
  length: int
  unit: Literal["tokens", "examples"]

  @property
  def units_per_row(self) -> int:
    """How many units a row holds."""
    return self.length if self.unit == "tokens" else 1


def text_outline(vocab_size: int, length: int, *, packing: Packing = "documents") -> Outline:
  """That of a `TextDataset` of these settings, also where its text is not at hand."""
  names = ["inputs", "targets", *([] if packing == "blocks" else ["segment_ids", "positions"])]
  row = {name: ((length,), np.dtype(np.int32)) for name in names}
  row["weights"] = ((length,), np.dtype(np.float32))
  return Outline({"vocab_size": vocab_size}, row, length, "tokens")
