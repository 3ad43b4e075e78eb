"""Lanes: streams of rows that a batch is dealt from in turn, so that hosts can share what cannot be
indexed.

Global row n is of lane n mod lanes, whatever the batch size and the number of hosts. Of `count`
hosts, one that divides the lanes, host `index` serves the lanes index::count: exactly the rows of a
batch that are its own, every count-th. Each lane has a place, a small JSON-able dict, from which it
goes on without reading what came before.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import grain
import numpy as np

from jaxmix.data.background import Background
from jaxmix.data.packing import Row, Rows
from jaxmix.data.schedule import Schedule

Place = dict[str, Any]


class Lane(Protocol):
  """Rows without end.

  prepare(): begins, in the background, to make ready what the next row takes.
  __next__(): the next row.
  place(): where it stands, JSON-able.   seek(place): goes there.
  epochs(place): how often what has been read at a place, name -> number.
  """

  def prepare(self) -> None: ...

  def __next__(self) -> Row: ...

  def place(self) -> Place: ...

  def seek(self, place: Place) -> None: ...

  def epochs(self, place: Place) -> dict[str, float]: ...


class IndexLane:
  """Every count-th row of an order that is known to its end: the lane `index` of `count`.

  Args:
    order: the rows without end.   rows: how many of them are an epoch.
  """

  def __init__(self, order: grain.MapDataset, *, rows: int, index: int, count: int):
    self._order, self._rows = order, rows
    self._index, self._count = index, count
    self._drawn = 0

  def prepare(self) -> None:
    pass

  def __next__(self) -> Row:
    row = self._order[self._index + self._drawn * self._count]
    self._drawn += 1
    return row

  def place(self) -> Place:
    return {"drawn": self._drawn}

  def seek(self, place: Place) -> None:
    self._drawn = place["drawn"]

  def epochs(self, place: Place) -> dict[str, float]:
    return {"epoch": place["drawn"] * self._count / self._rows}


class ShardLane:
  """The rows of some shards, one shard after the other: every epoch has the shards in an order of
  its own, and every visit to a shard its rows.

  A shard is opened when it is its turn, in the background once half of the one before is read. A
  shard without a row is passed over.

  Args:
    shards: the numbers of the shards.   names: what errors call each of them.
    open_shard: number -> the rows of the shard.
    seed: of all orders.   background: where shards are opened.
  Raises, when a row is drawn:
    ValueError: none of the shards holds a row, or one has changed since `place` was saved.
  """

  def __init__(
    self,
    shards: Sequence[int],
    open_shard: Callable[[int], Rows],
    *,
    names: Sequence[str],
    seed: int,
    background: Background,
  ):
    self._shards, self._names = list(shards), names
    self._open_shard, self._seed, self._background = open_shard, seed, background
    self._opening: dict[int, Future[Rows]] = {}  # by visit
    self._turn_to(0)

  def prepare(self) -> None:
    self._open(self._visit)

  def __next__(self) -> Row:
    rows = self._current_rows()
    row = rows[self._row]
    self._row += 1
    if 2 * self._row >= self._rows:
      self._open(self._visit + 1)
    if self._row == self._rows:
      self._turn_to(self._visit + 1)
    return row

  def place(self) -> Place:
    epoch, turn = divmod(self._visit, len(self._shards))
    return {"epoch": epoch, "turn": turn, "row": self._row, "rows": self._rows}

  def seek(self, place: Place) -> None:
    self._turn_to(place["epoch"] * len(self._shards) + place["turn"])
    self._row, self._rows = place["row"], place["rows"]

  def epochs(self, place: Place) -> dict[str, float]:
    in_shard = place["row"] / place["rows"] if place["row"] else 0
    return {"epoch": place["epoch"] + (place["turn"] + in_shard) / len(self._shards)}

  def _current_rows(self) -> Rows:
    for _ in range(2 * len(self._shards)):  # every shard comes up, whatever the two orders
      self._open(self._visit)
      rows = self._opening[self._visit].result()
      if self._row and len(rows) != self._rows:
        raise ValueError(
          f"shard {self._names[self._shard(self._visit)]} has {len(rows)} rows, and had "
          f"{self._rows} when the place in the data was saved — expected the same text — bring "
          "back the old shard, or start a new run"
        )
      if len(rows):
        self._rows = len(rows)
        return rows
      self._turn_to(self._visit + 1)
    raise ValueError(
      f"none of the shards {', '.join(self._names[shard] for shard in self._shards)} holds a row — "
      "expected text for one at least — use a smaller length, fewer readers or larger shards"
    )

  def _turn_to(self, visit: int) -> None:
    self._visit, self._row, self._rows = visit, 0, 0  # how many rows is known once it is open
    self._opening = {at: rows for at, rows in self._opening.items() if at == visit}

  def _shard(self, visit: int) -> int:
    epoch, turn = divmod(visit, len(self._shards))
    return self._shards[_permutation(len(self._shards), self._seed, self._shards[0], epoch)[turn]]

  def _open(self, visit: int) -> None:
    if visit not in self._opening:
      self._opening[visit] = self._background.start(functools.partial(self._shuffled, visit))

  def _shuffled(self, visit: int) -> Rows:
    shard = self._shard(visit)
    rows = self._open_shard(shard)
    return _Shuffled(rows, _permutation(len(rows), self._seed, shard, visit))


class MixedLane:
  """Rows of several lanes, in the turns of a schedule from its row `first` on."""

  def __init__(self, lanes: Mapping[str, Lane], schedule: Schedule, *, first: int):
    self._lanes, self._schedule, self._first = lanes, schedule, first
    self._turns = list(lanes.values())
    self._drawn = 0

  def prepare(self) -> None:
    for lane in self._turns:
      lane.prepare()

  def __next__(self) -> Row:
    source, _ = self._schedule[self._first + self._drawn]
    row = next(self._turns[source])
    self._drawn += 1
    return row

  def place(self) -> Place:
    places = {name: lane.place() for name, lane in self._lanes.items()}
    return {"drawn": self._drawn, "sources": places}

  def seek(self, place: Place) -> None:
    self._drawn = place["drawn"]
    for name, lane in self._lanes.items():
      lane.seek(place["sources"][name])

  def epochs(self, place: Place) -> dict[str, float]:
    each = {name: lane.epochs(place["sources"][name]) for name, lane in self._lanes.items()}
    return {f"epoch_{name}": epochs["epoch"] for name, epochs in each.items()}


class Dealing(grain.IterDataset):
  """One row of each lane in turn; its iterator's state is {"drawn": rows, "lanes": places}."""

  def __init__(self, lanes: Mapping[int, Lane]):
    super().__init__()
    self._lanes = lanes

  def __iter__(self) -> grain.DatasetIterator:
    return _DealingIterator(self._lanes)


class _DealingIterator(grain.DatasetIterator):
  def __init__(self, lanes: Mapping[int, Lane]):
    super().__init__()
    self._lanes = lanes
    self._turns = list(lanes.values())
    self._drawn = 0

  def __next__(self) -> Row:
    if not self._drawn:
      self._prepare()
    row = next(self._turns[self._drawn % len(self._turns)])
    self._drawn += 1
    return row

  def get_state(self) -> dict[str, Any]:
    places = {str(number): lane.place() for number, lane in self._lanes.items()}
    return {"drawn": self._drawn, "lanes": places}

  def set_state(self, state: dict[str, Any]) -> None:
    self._drawn = state["drawn"]
    for number, lane in self._lanes.items():
      lane.seek(state["lanes"][str(number)])
    self._prepare()

  def _prepare(self) -> None:
    for lane in self._turns:  # all at once: to open a shard may take minutes
      lane.prepare()


class _Shuffled:
  """Rows in an order of their own."""

  def __init__(self, rows: Rows, order: np.ndarray):
    self._rows, self._order = rows, order

  def __len__(self) -> int:
    return len(self._order)

  def __getitem__(self, index: int) -> Row:
    return self._rows[int(self._order[index])]


def _permutation(count: int, *key: int) -> np.ndarray:
  """The order of `count` things that `key` stands for; the same everywhere."""
  digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
  # RandomState, whose numbers no version of NumPy will change; Generator does not promise that.
  return np.random.RandomState(int.from_bytes(digest, "big")).permutation(count)
