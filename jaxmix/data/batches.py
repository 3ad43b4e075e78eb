"""Batches without end that are shuffled by seed, shared among hosts and resumable, and a split once
in order."""

from __future__ import annotations

import abc
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset
from jax.experimental import multihost_utils

from jaxmix.data.background import Background
from jaxmix.data.checks import check_integer, check_shard
from jaxmix.data.lanes import Dealing, Lane
from jaxmix.data.packing import Row, Rows, stack
from jaxmix.data.schedule import Schedule


class Batches(abc.ABC):
  """Batches without end, and the place in them.

  Made by the `batches` of a data set. An iterator of dicts of arrays [B, ...]; batches that were
  read ahead but not yet taken do not count for the place.
  """

  def __init__(self, dataset: grain.IterDataset, *, fingerprint: dict[str, Any]):
    self._iterator = iter(dataset)
    self._fingerprint = fingerprint

  def __iter__(self) -> Batches:
    return self

  def __next__(self) -> Row:
    return next(self._iterator)

  @property
  @abc.abstractmethod
  def step(self) -> int:
    """The number of batches taken."""

  @property
  @abc.abstractmethod
  def epochs(self) -> dict[str, float]:
    """How often the split has been read: {"epoch": 1.5} is in the middle of the second epoch.

    A mixture has a figure for each source, {"epoch_<name>": ...}. Where text is read by shards, it
    is that of the shards of this host.
    """

  def get_state(self) -> dict[str, Any]:
    """The place, JSON-able and equal on all hosts: batches taken, and what they are drawn from.

    All hosts call this at the same step: where text is read by shards, they tell one another where
    they stand.
    """
    return {"step": self.step, "fingerprint": json.loads(json.dumps(self._fingerprint))}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a place from `get_state`, on any number of hosts: the same batches follow.

    Raises:
      ValueError: `state` was drawn from something else (each field that differs is listed), or is
        no such state.
    """
    if not isinstance(state, dict) or not {"step", "fingerprint"} <= set(state):
      raise ValueError(
        f'{state!r} is not a place in batches — expected {{"step": ..., "fingerprint": ...}} as '
        "get_state returns it — take it from a checkpoint of this program"
      )
    saved, now = _flat(state["fingerprint"]), _flat(self._fingerprint)
    differing = [field for field in sorted({*saved, *now}) if saved.get(field) != now.get(field)]
    if differing:
      fields = "; ".join(
        f"{field} was {saved.get(field)!r}, is {now.get(field)!r}" for field in differing
      )
      raise ValueError(
        f"the saved place in the data is of other data: {fields} — expected what the run began "
        "with — restore these settings, or start a new run"
      )
    check_integer("step", state["step"], minimum=0)
    self._go_to(state)

  @abc.abstractmethod
  def _go_to(self, state: dict[str, Any]) -> None:
    """Goes to a place that is of these batches."""


class IndexedBatches(Batches):
  """Batches of rows that are found by their number; `epochs` goes by the rows of all hosts."""

  def __init__(
    self,
    dataset: grain.IterDataset,
    *,
    fingerprint: dict[str, Any],
    epochs: Callable[[int], dict[str, float]],
  ):
    super().__init__(dataset, fingerprint=fingerprint)
    self._epochs = epochs

  @property
  def step(self) -> int:
    """The number of batches taken."""
    return int(self._iterator.get_state()["next_index"])

  @property
  def epochs(self) -> dict[str, float]:
    """See `Batches.epochs`."""
    return self._epochs(self.step * self._fingerprint["batch_size"])

  def _go_to(self, state: dict[str, Any]) -> None:
    self._iterator.set_state({"next_index": state["step"]})


class LaneBatches(Batches):
  """Batches whose rows are dealt from lanes, each with a place of its own."""

  def __init__(
    self,
    lanes: Mapping[int, Lane],
    *,
    rows: int,
    options: grain.ReadOptions,
    fingerprint: dict[str, Any],
    background: Background,
  ):
    batched = Dealing(lanes).batch(rows, drop_remainder=True)
    ahead = ThreadPrefetchIterDataset(batched, prefetch_buffer_size=options.prefetch_buffer_size)
    super().__init__(ahead, fingerprint=fingerprint)
    self._lanes = lanes
    self._rows = rows  # of a batch on this host
    weakref.finalize(self, _close, background, vars(self))  # also when the process ends

  @property
  def step(self) -> int:
    """The number of batches taken."""
    return self._iterator.get_state()["drawn"] // self._rows

  @property
  def epochs(self) -> dict[str, float]:
    """See `Batches.epochs`."""
    places = self._places()
    each = [lane.epochs(places[str(number)]) for number, lane in self._lanes.items()]
    return {name: sum(epochs[name] for epochs in each) / len(each) for name in each[0]}

  def get_state(self) -> dict[str, Any]:
    """See `Batches.get_state`; "lanes" has the place in each lane."""
    return {**super().get_state(), "lanes": _of_all_hosts(self._places())}

  def _go_to(self, state: dict[str, Any]) -> None:
    places = state.get("lanes", {})
    missing = [number for number in self._lanes if str(number) not in places]
    if missing:
      raise ValueError(
        f"the saved place in the data lacks the readers {', '.join(map(str, missing))} — expected "
        "those of all hosts — every host has to call get_state when a checkpoint is saved"
      )
    own = {str(number): places[str(number)] for number in self._lanes}
    self._iterator.set_state({"drawn": state["step"] * self._rows, "lanes": own})

  def _places(self) -> dict[str, Any]:
    return self._iterator.get_state()["lanes"]


def read_options(*, num_threads: int, prefetch: int) -> grain.ReadOptions:
  """How rows are read ahead; see `TextDataset`."""
  check_integer("num_threads", num_threads, minimum=0)
  check_integer("prefetch", prefetch, minimum=1)
  return grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0
  )


def check_seed(seed: int) -> None:
  """Raises TypeError or ValueError where `seed` is no seed of an order."""
  check_integer("seed", seed, minimum=0, maximum=2**32 - 1)


def shuffled_batches(
  rows: Rows,
  *,
  batch_size: int,
  seed: int,
  shard: tuple[int, int],
  options: grain.ReadOptions,
  fingerprint: dict[str, Any],
  too_few: str,
  repair: str = "",
) -> Batches:
  """The rows without end, in an order of its own every epoch; see `TextDataset.batches`.

  Args:
    fingerprint: what the rows are made from, its "split" among them.
    too_few: what rows are, for the error where they do not fill a batch; `repair` ends it.
  """
  check_shard(shard, batch_size)
  if len(rows) < batch_size:
    raise ValueError(
      f"split {fingerprint['split']!r} has {len(rows)} {too_few}, fewer than "
      f"batch_size={batch_size} — expected at least one batch — set batch_size={len(rows)} or "
      f"less{repair}"
    )
  return indexed_batches(
    shuffled(rows, seed),
    batch_size=batch_size,
    shard=shard,
    options=options,
    fingerprint={**fingerprint, "seed": int(seed)},
    epochs=lambda drawn: {"epoch": drawn / len(rows)},
  )


def shuffled(rows: Rows, seed: int) -> grain.MapDataset:
  """The rows by index without end, in an order of its own every epoch."""
  check_seed(seed)
  return grain.MapDataset.source(rows).seed(seed).shuffle().repeat()


def mixed(orders: Sequence[grain.MapDataset], schedule: Schedule) -> grain.MapDataset:
  """The rows of several orders by index, in the turns of a schedule."""
  return grain.MapDataset.select_from_datasets(orders, schedule)


def indexed_batches(
  order: grain.MapDataset,
  *,
  batch_size: int,
  shard: tuple[int, int],
  options: grain.ReadOptions,
  fingerprint: dict[str, Any],
  epochs: Callable[[int], dict[str, float]],
) -> Batches:
  """Batches of what can be indexed: any number of hosts can share it.

  Args:
    order: the rows without end.
    fingerprint: what the rows are made from, and the seed of the order.
    epochs: how often what has been read, by rows taken.
  """
  index, count = check_shard(shard, batch_size)
  local = order.batch(batch_size // count, drop_remainder=True)[index::count]
  return IndexedBatches(
    local.to_iter_dataset(options),
    fingerprint={**fingerprint, "batch_size": int(batch_size)},
    epochs=epochs,
  )


def dealt_batches(
  lane: Callable[[int], Lane],
  lanes: int,
  *,
  batch_size: int,
  shard: tuple[int, int],
  options: grain.ReadOptions,
  fingerprint: dict[str, Any],
  background: Background,
) -> Batches:
  """Batches of what is read one row after the other: the hosts share the lanes, whose number theirs
  divides.

  Args:
    lane: number -> the lane; called for those of this host.
    background: where the lanes work ahead; closed with the batches.
  """
  index, count = check_shard(shard, batch_size)
  return LaneBatches(
    {number: lane(number) for number in range(index, lanes, count)},
    rows=batch_size // count,
    options=options,
    fingerprint={**fingerprint, "batch_size": int(batch_size)},
    background=background,
  )


def ordered_batches(rows: Rows, *, batch_size: int, shard: tuple[int, int]) -> Iterator[Row]:
  """The rows once, in order; the last batch is filled with zeros, and so are its weights."""
  index, count = check_shard(shard, batch_size)
  padding = {key: np.zeros_like(array) for key, array in rows[0].items()}
  share = batch_size // count
  for start in range(index * share, len(rows) + index * share, batch_size):
    places = range(start, start + share)
    yield stack([rows[place] if place < len(rows) else padding for place in places])


def _close(background: Background, attributes: dict[str, Any]) -> None:
  background.close()
  # Taken away: an iterator of Grain that is left to the end of the interpreter closes itself once
  # more, when what it needs for that is gone.
  attributes.pop("_iterator").close()


def _of_all_hosts(places: dict[str, Any]) -> dict[str, Any]:
  """The places in the lanes of every process, of which each gives those that it serves."""
  if jax.process_count() == 1:
    return places
  own = np.frombuffer(json.dumps(places).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(own)))
  texts = multihost_utils.process_allgather(np.pad(own, (0, int(sizes.max()) - len(own))))
  merged: dict[str, Any] = {}
  for text, size in zip(texts, sizes, strict=True):
    merged |= json.loads(text[:size].tobytes())
  return merged


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  """{"source": {"digest": x}} as {"source.digest": x}, values as JSON would give them back."""
  if not isinstance(tree, dict):
    return {prefix: json.loads(json.dumps(tree))}
  leaves = {}
  for key, value in tree.items():
    leaves |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
  return leaves
