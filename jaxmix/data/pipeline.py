"""Batches for training and evaluation: rows shuffled by seed, shared among hosts, resumable.

The only file that imports Grain.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from jaxmix.data import packing as rows_of
from jaxmix.data.checks import check_integer, check_protocol, check_shard
from jaxmix.data.outline import Outline, text_outline
from jaxmix.data.packing import Packing, Row, Rows
from jaxmix.data.sources import Source, check_split
from jaxmix.data.token_store import Separator, TokenStore, open_token_store
from jaxmix.data.tokenizers import Tokenizer


class TextDataset:
  """Text as batches of rows of `length` tokens.

  A batch is a dict of numpy arrays [B, length]: `inputs`, `targets` int32 and `weights` float32 (0
  where there is no target); unless packing is "blocks" also `segment_ids` and `positions` int32.

  Args:
    source: where the text comes from.   tokenizer: how it becomes ids.
    length: L, the inputs of a row.
    packing: "documents": pieces of documents share a row and do not see one another; "blocks": all
      documents are one stream, cut into rows; "none": one document a row.
    separator: "end": the tokenizer's end_id follows each document, where it has one; "none":
      nothing does, as in the literature on WikiText-2.
    cache_dir: where tokens are kept; None is $XDG_CACHE_HOME/jaxmix or ~/.cache/jaxmix.
    num_threads: threads that read ahead; 0 reads when asked. One suits small machines: more contend
      for the interpreter.
    prefetch: batches read ahead.
  Raises:
    TypeError, ValueError: an argument is not what it should be. What is wrong with the text, or
      does not fit it, is raised when a split is first used.
  """

  def __init__(
    self,
    source: Source,
    tokenizer: Tokenizer,
    *,
    length: int,
    packing: Packing = "documents",
    separator: Separator = "end",
    cache_dir: str | os.PathLike | None = None,
    num_threads: int = 1,
    prefetch: int = 16,
  ):
    check_protocol("source", source, Source, example="LocalFiles")
    check_protocol("tokenizer", tokenizer, Tokenizer, example="ByteTokenizer")
    if packing not in rows_of.PACKINGS:
      raise ValueError(
        f"packing={packing!r} is unknown — expected one of {', '.join(rows_of.PACKINGS)}"
      )
    if separator not in ("end", "none"):
      raise ValueError(f"separator={separator!r} is unknown — expected one of end, none")
    check_integer("length", length, minimum=1)
    self.source = source
    self.tokenizer = tokenizer
    self.length = int(length)
    self.packing = packing
    self.separator = separator
    self._cache_dir = cache_dir
    self._read_options = read_options(num_threads=num_threads, prefetch=prefetch)
    self._stores: dict[str, TokenStore] = {}

  @property
  def vocab_size(self) -> int:
    """The tokenizer's vocab_size."""
    return self.tokenizer.vocab_size

  @property
  def outline(self) -> Outline:
    """What its model has to know, and what a row holds."""
    return text_outline(self.vocab_size, self.length, packing=self.packing)

  def text_bytes(self, split: str) -> int:
    """The UTF-8 bytes of the documents of a split."""
    return self._store(split).text_bytes

  def targets(self, split: str) -> int:
    """The number of targets of a split: what the weights of `epoch` sum to."""
    return rows_of.count_targets(self._store(split), packing=self.packing)

  def bytes_per_target(self, split: str) -> float:
    """UTF-8 bytes of the split for each target: bits per byte = nats per target / ln 2 / this."""
    return self.text_bytes(split) / self.targets(split)

  def batches(
    self, split: str, *, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1)
  ) -> Batches:
    """Batches for training, without end; every epoch has each row once, in an order of its own.

    The order depends on the seed only. Of each global batch of `batch_size` rows, host `index` of
    `count` takes the index-th part, so a step covers the same rows, in the same order, on any
    number of hosts.

    Args:
      batch_size: rows of a global batch.   seed: of the order, 0 to 2**32 - 1.
      shard: (index, count) of this host; it gets batch_size // count rows a batch.
    Raises:
      ValueError: batch_size is no multiple of count or more than the rows of the split, or the text
        does not fit `length`.
    """
    return shuffled_batches(
      self._rows(split, "training"),
      batch_size=batch_size,
      seed=seed,
      shard=shard,
      options=self._read_options,
      fingerprint={
        "split": split,
        "length": self.length,
        "packing": self.packing,
        "separator": self.separator,
        "source": self.source.fingerprint(split),
        "tokenizer": self.tokenizer.fingerprint(),
      },
      too_few=f"rows of length={self.length}",
      repair=", or a smaller length",
    )

  def epoch(self, split: str, *, batch_size: int, shard: tuple[int, int] = (0, 1)) -> Iterator[Row]:
    """The whole split once, in order; the last batch is filled with rows of weight 0.

    Each target comes exactly once. `batch_size` and `shard` are those of `batches`; all hosts get
    equally many batches.
    """
    check_shard(shard, batch_size)
    rows = self._rows(split, "evaluation")
    return ordered_batches(rows, batch_size=batch_size, shard=shard)

  def streams(self, split: str, *, batch_size: int) -> Iterator[Row]:
    """The split once as `batch_size` long streams, for evaluation with a carried state.

    Row b of a batch continues row b of the batch before; keys are those of "blocks". Each token of
    the split but the first is a target exactly once, so with other packings this has more targets
    than `epoch`: also the first token of each document.
    """
    check_integer("batch_size", batch_size, minimum=1)
    tokens = self._store(split).tokens
    return rows_of.stream_batches(tokens, length=self.length, batch_size=batch_size)

  def _store(self, split: str) -> TokenStore:
    check_split(self.source, split)
    if split not in self._stores:
      self._stores[split] = open_token_store(
        self.source, split, self.tokenizer, separator=self.separator, cache_dir=self._cache_dir
      )
    return self._stores[split]

  def _rows(self, split: str, purpose: str) -> Rows:
    store = self._store(split)
    try:
      return rows_of.make_rows(store, length=self.length, packing=self.packing, purpose=purpose)
    except ValueError as error:
      raise ValueError(f"split {split!r}: {error}") from None


class Batches:
  """Batches without end, and the place in them.

  Made by the `batches` of a data set. An iterator of dicts of arrays [B, ...]; batches that were
  read ahead but not yet taken do not count for the place.
  """

  def __init__(self, dataset: grain.IterDataset, *, fingerprint: dict[str, Any], rows: int):
    self._iterator = iter(dataset)
    self._fingerprint = fingerprint
    self._rows = rows

  def __iter__(self) -> Batches:
    return self

  def __next__(self) -> Row:
    return next(self._iterator)

  @property
  def step(self) -> int:
    """The number of batches taken."""
    return int(self._iterator.get_state()["next_index"])

  @property
  def epoch(self) -> float:
    """How often the split has been read: 1.5 is in the middle of the second epoch."""
    return self.step * self._fingerprint["batch_size"] / self._rows

  def get_state(self) -> dict[str, Any]:
    """The place, JSON-able and equal on all hosts: batches taken, and what they are drawn from."""
    return {"step": self.step, "fingerprint": json.loads(json.dumps(self._fingerprint))}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a place from `get_state`, on any number of hosts: the same batches follow.

    Raises:
      ValueError: `state` was drawn from something else (each field that differs is listed), or is
        no such state.
    """
    if not isinstance(state, dict) or set(state) != {"step", "fingerprint"}:
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
    self._iterator.set_state({"next_index": state["step"]})


def read_options(*, num_threads: int, prefetch: int) -> grain.ReadOptions:
  """How rows are read ahead; see `TextDataset`."""
  check_integer("num_threads", num_threads, minimum=0)
  check_integer("prefetch", prefetch, minimum=1)
  return grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0
  )


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
  check_integer("seed", seed, minimum=0, maximum=2**32 - 1)
  index, count = check_shard(shard, batch_size)
  if len(rows) < batch_size:
    raise ValueError(
      f"split {fingerprint['split']!r} has {len(rows)} {too_few}, fewer than "
      f"batch_size={batch_size} — expected at least one batch — set batch_size={len(rows)} or "
      f"less{repair}"
    )
  order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
  local = order.batch(batch_size // count, drop_remainder=True)[index::count]
  return Batches(
    local.to_iter_dataset(options),
    fingerprint={**fingerprint, "seed": int(seed), "batch_size": int(batch_size)},
    rows=len(rows),
  )


def ordered_batches(rows: Rows, *, batch_size: int, shard: tuple[int, int]) -> Iterator[Row]:
  """The rows once, in order; the last batch is filled with zeros, and so are its weights."""
  index, count = check_shard(shard, batch_size)
  padding = {key: np.zeros_like(array) for key, array in rows[0].items()}
  share = batch_size // count
  for start in range(index * share, len(rows) + index * share, batch_size):
    places = range(start, start + share)
    yield rows_of.stack([rows[place] if place < len(rows) else padding for place in places])


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  """{"source": {"digest": x}} as {"source.digest": x}, values as JSON would give them back."""
  if not isinstance(tree, dict):
    return {prefix: json.loads(json.dumps(tree))}
  leaves = {}
  for key, value in tree.items():
    leaves |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
  return leaves
