"""Several text data sets as one, by weight."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmix.data.background import Background
from jaxmix.data.batches import (
  Batches,
  check_seed,
  dealt_batches,
  indexed_batches,
  mixed,
  read_options,
  shuffled,
)
from jaxmix.data.checks import check_shard
from jaxmix.data.lanes import Lane, MixedLane
from jaxmix.data.packing import Purpose, Row, Rows
from jaxmix.data.pipeline import TextDataset
from jaxmix.data.schedule import Schedule
from jaxmix.data.token_store import TokenStore


class Mixture(TextDataset):
  """Text data sets whose rows are mixed by weight; each row is from one of them.

      Mixture({"wiki": (TextDataset(...), 0.7), "code": (TextDataset(...), 0.3)})

  Training: the rows of a source come in the order that it has alone, each once in an epoch of this
  source; how many are drawn of each is exact, see `Schedule`. With `readers`, this holds for every
  reader: a reader of the mixture is one of each source.

  Evaluation: "validation" is that of all sources that have one, each row once, evenly interleaved,
  whatever the weights; "wiki/validation" is that of one source, and so with every split.

  Args:
    sources: name -> (data set, weight); the rows of all are alike, and so are their tokenizers and
      their `readers`, of those that have any.
    num_threads, prefetch: as in `TextDataset`; those of the sources are not used.
  Raises:
    TypeError, ValueError: as `TextDataset`; also for weights and sources that do not fit together.
  """

  def __init__(
    self,
    sources: Mapping[str, tuple[TextDataset, float]],
    *,
    num_threads: int = 1,
    prefetch: int = 16,
  ):
    _check_sources(sources)
    self.sources = {name: dataset for name, (dataset, _) in sources.items()}
    self.schedule = Schedule({name: weight for name, (_, weight) in sources.items()})
    _check_alike(self.sources)
    first = next(iter(self.sources.values()))
    self.tokenizer, self.length, self.packing = first.tokenizer, first.length, first.packing
    self.readers = next((each.readers for each in self.sources.values() if each.readers), None)
    self._read_options = read_options(num_threads=num_threads, prefetch=prefetch)

  def text_bytes(self, split: str) -> int:
    """The UTF-8 bytes of the documents of a split."""
    return sum(dataset.text_bytes(part) for dataset, part in self._parts(split))

  def targets(self, split: str) -> int | None:
    """The number of targets of a split: what the weights of `epoch` sum to.

    None where that of a source is.
    """
    each = [dataset.targets(part) for dataset, part in self._parts(split)]
    return None if None in each else sum(each)

  def bytes_per_target(self, split: str) -> float | None:
    """UTF-8 bytes of the split for each target; see `TextDataset`.

    None for "train", whose batches have another share of each source than the split.
    """
    return None if split == "train" else super().bytes_per_target(split)

  def batches(
    self, split: str, *, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1)
  ) -> Batches:
    """Batches for training, without end; see `TextDataset.batches`."""
    if "/" in split:
      ((dataset, part),) = self._parts(split)
      return dataset.batches(part, batch_size=batch_size, seed=seed, shard=shard)
    _, hosts = check_shard(shard, batch_size)
    check_seed(seed)
    settings = {
      "batch_size": batch_size,
      "shard": shard,
      "options": self._read_options,
      "fingerprint": {**self._fingerprint(split), "seed": int(seed)},
    }
    if self.readers is None:
      rows = {name: self.sources[name]._rows(split, "training") for name in self.sources}
      order = mixed([shuffled(each, seed) for each in rows.values()], self.schedule)
      return indexed_batches(order, epochs=functools.partial(self._epochs, rows), **settings)
    self._check_shared(split, hosts)
    background = Background()
    lane = self._lanes(split, seed, self.readers, background)
    return dealt_batches(lane, self.readers, background=background, **settings)

  def _epochs(self, rows: Mapping[str, Rows], drawn: int) -> dict[str, float]:
    of_each = self.schedule.drawn(drawn)
    return {f"epoch_{name}": of_each[name] / len(each) for name, each in rows.items()}

  def _fingerprint(self, split: str) -> dict[str, Any]:
    shares = self.schedule.shares
    each = {
      name: {**dataset._fingerprint(split), "share": shares[name]}
      for name, dataset in self.sources.items()
    }
    readers = {} if self.readers is None else {"readers": self.readers}
    return {"split": split, "sources": each, **readers}

  def _lanes(
    self, split: str, seed: int, count: int, background: Background
  ) -> Callable[[int], Lane]:
    lanes = {
      name: dataset._lanes(split, seed, count, background) for name, dataset in self.sources.items()
    }

    def lane(number: int) -> Lane:
      # Each begins elsewhere in the schedule, so that a batch has its share of every source.
      first = number * self.schedule.period // count
      return MixedLane({name: lanes[name](number) for name in lanes}, self.schedule, first=first)

    return lane

  def _check_shared(self, split: str, hosts: int) -> None:
    for name, dataset in self.sources.items():
      try:
        dataset._check_shared(split, hosts)
      except ValueError as error:
        raise ValueError(f"source {name!r}: {error}") from None

  def _rows(self, split: str, purpose: Purpose) -> Rows:
    return _Interleaved([dataset._rows(part, purpose) for dataset, part in self._parts(split)])

  def _store(self, split: str) -> TokenStore:
    parts = self._parts(split)
    if len(parts) > 1:
      raise ValueError(
        f"split {split!r} of a mixture is not one text — expected a split of one source — name it, "
        f"such as {next(iter(self.sources))}/{split}"
      )
    ((dataset, part),) = parts
    return dataset._store(part)

  def _parts(self, split: str) -> list[tuple[TextDataset, str]]:
    """The data sets that have a split, and what they call it."""
    name, _, part = split.rpartition("/")
    if name in self.sources:
      return [(self.sources[name], part)]
    parts = [(each, split) for each in self.sources.values() if split in each.source.splits]
    if not parts:
      known = {part: None for each in self.sources.values() for part in each.source.splits}
      raise ValueError(
        f"no source of the mixture has a split {split!r} — they have {', '.join(known)}, and the "
        f"mixture these of a source alone: {next(iter(self.sources))}/... — name one of these"
      )
    return parts


class _Interleaved:
  """All rows of several, in the order of how far each is through its own: evenly mixed."""

  def __init__(self, several: Sequence[Rows]):
    self._several = several
    number = np.repeat(np.arange(len(several)), [len(rows) for rows in several])
    index = np.concatenate([np.arange(len(rows)) for rows in several])
    through = np.concatenate([(np.arange(len(rows)) + 0.5) / len(rows) for rows in several])
    order = np.argsort(through, kind="stable")
    self._number, self._index = number[order], index[order]

  def __len__(self) -> int:
    return len(self._index)

  def __getitem__(self, index: int) -> Row:
    return self._several[self._number[index]][int(self._index[index])]


def _check_sources(sources: Any) -> None:
  pairs = isinstance(sources, Mapping) and sources
  if not pairs or not all(
    isinstance(name, str) and isinstance(pair, Sequence) and len(pair) == 2
    for name, pair in sources.items()
  ):
    raise TypeError(
      f"sources={sources!r} — expected {{name: (data set, weight)}} — e.g. "
      '{"wiki": (TextDataset(...), 0.7), "code": (TextDataset(...), 0.3)}'
    )
  for name, (dataset, _) in sources.items():
    if not isinstance(dataset, TextDataset) or isinstance(dataset, Mixture):
      raise TypeError(
        f"source {name!r} is {dataset!r} of type {type(dataset).__name__} — expected a TextDataset "
        "— write TextDataset(...), or @TextDataset() in a gin file"
      )
    if "/" in name:
      raise ValueError(
        f"source {name!r} — expected a name without /, which stands before a split — rename it"
      )


def _check_alike(sources: Mapping[str, TextDataset]) -> None:
  aspects = {
    "length": lambda each: each.length,
    "packing": lambda each: each.packing,
    "tokenizer": lambda each: each.tokenizer.fingerprint(),
    "readers": lambda each: each.readers,
  }
  for aspect, of in aspects.items():
    values = {name: of(each) for name, each in sources.items()}
    if aspect == "readers":  # a source that is read whole serves as many as the others have
      values = {name: readers for name, readers in values.items() if readers is not None}
    if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
      given = ", ".join(f"{name} has {value!r}" for name, value in values.items())
      raise ValueError(
        f"the sources of a mixture differ in {aspect}: {given} — expected one for all — set the "
        "same for each"
      )
