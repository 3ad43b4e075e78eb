"""Labelled examples as batches: what a classifier is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from jaxmix.data.batches import Batches, ordered_batches, read_options, shuffled_batches
from jaxmix.data.checks import check_protocol, check_shard
from jaxmix.data.outline import Outline
from jaxmix.data.packing import Row, Rows
from jaxmix.data.sources import check_split


class LabelledSource(Protocol):
  """Labelled examples in named splits.

  splits: the names of the splits, e.g. ("train", "validation", "test").
  sizes: what a model of the examples has to be told, `classes` among it, e.g. {"classes": 10,
    "image_shape": (28, 28)}.
  length: the positions of an example, such as its pixels or tokens.
  rows(split): the examples by index, in an order that never changes: dicts of arrays of the same
    names and shapes, with "label", an int32 scalar from 0 to classes - 1.
  fingerprint(split): a JSON-able dict that changes when what `rows(split)` holds changes.
  """

  @property
  def splits(self) -> tuple[str, ...]: ...

  @property
  def sizes(self) -> Mapping[str, Any]: ...

  @property
  def length(self) -> int: ...

  def rows(self, split: str) -> Rows: ...

  def fingerprint(self, split: str) -> dict[str, Any]: ...


class LabelledDataset:
  """Labelled examples in batches, by the protocol of `TextDataset`.

  A batch is a dict of numpy arrays: those of the source, [B, ...] each, with "label" [B] int32; and
  "weights" [B] float32, which are 0 only in the rows that fill up the last batch of `epoch`.

  Args:
    source: where the examples come from, such as `IDXImages` or `SentencePairs`.
    num_threads, prefetch: as in `TextDataset`.
  """

  def __init__(self, source: LabelledSource, *, num_threads: int = 1, prefetch: int = 16):
    check_protocol("source", source, LabelledSource, example="IDXImages")
    self.source = source
    self._read_options = read_options(num_threads=num_threads, prefetch=prefetch)

  @property
  def outline(self) -> Outline:
    """What its model has to know, and what a row holds."""
    first = self._rows(self.source.splits[0])[0]
    row = {name: (array.shape, array.dtype) for name, array in first.items()}
    return Outline(self.source.sizes, row, self.source.length, "examples")

  def targets(self, split: str) -> int:
    """The number of examples of a split: what the weights of `epoch` sum to."""
    return len(self._rows(split))

  def bytes_per_target(self, split: str) -> None:
    """None: labels are no text, so their loss is not measured in bits per byte."""

  def batches(
    self, split: str, *, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1)
  ) -> Batches:
    """Batches for training, without end; see `TextDataset.batches`."""
    return shuffled_batches(
      self._rows(split),
      batch_size=batch_size,
      seed=seed,
      shard=shard,
      options=self._read_options,
      fingerprint={"split": split, "source": self.source.fingerprint(split)},
      too_few="examples",
    )

  def epoch(self, split: str, *, batch_size: int, shard: tuple[int, int] = (0, 1)) -> Iterator[Row]:
    """The whole split once, in order; see `TextDataset.epoch`."""
    check_shard(shard, batch_size)
    return ordered_batches(self._rows(split), batch_size=batch_size, shard=shard)

  def _rows(self, split: str) -> Rows:
    check_split(self.source, split)
    return _Weighted(self.source.rows(split))


class _Weighted:
  """Rows with a weight of 1."""

  def __init__(self, rows: Rows):
    self._rows = rows

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Row:
    row = {name: np.asarray(array) for name, array in self._rows[index].items()}
    return {**row, "weights": np.ones((), np.float32)}
