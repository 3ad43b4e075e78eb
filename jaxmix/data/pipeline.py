"""Batches for training and evaluation: rows shuffled by seed, shared among hosts, resumable.

The only file that imports Grain.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from jaxmix.data import packing as rows_of
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
    _check_protocol("source", source, Source, example="LocalFiles")
    _check_protocol("tokenizer", tokenizer, Tokenizer, example="ByteTokenizer")
    if packing not in rows_of.PACKINGS:
      raise ValueError(
        f"packing={packing!r} is unknown — expected one of {', '.join(rows_of.PACKINGS)}"
      )
    if separator not in ("end", "none"):
      raise ValueError(f"separator={separator!r} is unknown — expected one of end, none")
    _check_integer("length", length, minimum=1)
    _check_integer("num_threads", num_threads, minimum=0)
    _check_integer("prefetch", prefetch, minimum=1)
    self.source = source
    self.tokenizer = tokenizer
    self.length = int(length)
    self.packing = packing
    self.separator = separator
    self._cache_dir = cache_dir
    self._read_options = grain.ReadOptions(
      num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0
    )
    self._stores: dict[str, TokenStore] = {}

  @property
  def vocab_size(self) -> int:
    """The tokenizer's vocab_size."""
    return self.tokenizer.vocab_size

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
    `count` takes every count-th row, so a step covers the same rows on any number of hosts.

    Args:
      batch_size: rows of a global batch.   seed: of the order, 0 to 2**32 - 1.
      shard: (index, count) of this host; it gets batch_size // count rows a batch.
    Raises:
      ValueError: batch_size is no multiple of count or more than the rows of the split, or the text
        does not fit `length`.
    """
    _check_integer("seed", seed, minimum=0, maximum=2**32 - 1)
    index, count = _check_shard(shard, batch_size)
    rows = self._rows(split, "training")
    if len(rows) < batch_size:
      raise ValueError(
        f"split {split!r} has {len(rows)} rows of length={self.length}, fewer than "
        f"batch_size={batch_size} — expected at least one batch — set batch_size={len(rows)} or "
        "less, or a smaller length"
      )
    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    local = order[index::count].batch(batch_size // count, drop_remainder=True)
    return Batches(
      local.to_iter_dataset(self._read_options),
      fingerprint={
        "split": split,
        "seed": int(seed),
        "batch_size": int(batch_size),
        "length": self.length,
        "packing": self.packing,
        "separator": self.separator,
        "source": self.source.fingerprint(split),
        "tokenizer": self.tokenizer.fingerprint(),
      },
      rows=len(rows),
    )

  def epoch(self, split: str, *, batch_size: int, shard: tuple[int, int] = (0, 1)) -> Iterator[Row]:
    """The whole split once, in order; the last batch is filled with rows of weight 0.

    Each target comes exactly once. `batch_size` and `shard` are those of `batches`; all hosts get
    equally many batches.
    """
    index, count = _check_shard(shard, batch_size)
    rows = self._rows(split, "evaluation")
    return _in_order(rows, batch_size, index, count)

  def streams(self, split: str, *, batch_size: int) -> Iterator[Row]:
    """The split once as `batch_size` long streams, for evaluation with a carried state.

    Row b of a batch continues row b of the batch before; keys are those of "blocks". Each token of
    the split but the first is a target exactly once, so with other packings this has more targets
    than `epoch`: also the first token of each document.
    """
    _check_integer("batch_size", batch_size, minimum=1)
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

  Made by `TextDataset.batches`. An iterator of dicts of arrays [B, L]; batches that were read ahead
  but not yet taken do not count for the place.
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
    _check_integer("step", state["step"], minimum=0)
    self._iterator.set_state({"next_index": state["step"]})


def _in_order(rows: Rows, batch_size: int, index: int, count: int) -> Iterator[Row]:
  padding = {key: np.zeros_like(array) for key, array in rows[0].items()}
  for start in range(0, len(rows), batch_size):
    places = range(start + index, start + batch_size, count)
    yield rows_of.stack([rows[place] if place < len(rows) else padding for place in places])


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  """{"source": {"digest": x}} as {"source.digest": x}, values as JSON would give them back."""
  if not isinstance(tree, dict):
    return {prefix: json.loads(json.dumps(tree))}
  leaves = {}
  for key, value in tree.items():
    leaves |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
  return leaves


def _is_whole(value: Any) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_integer(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> None:
  whole = _is_whole(value)
  if not whole or value < minimum or (maximum is not None and value > maximum):
    limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    raise (ValueError if whole else TypeError)(
      f"{name}={value!r} — expected a whole number {limits} — set one"
    )


def _check_shard(shard: Any, batch_size: Any) -> tuple[int, int]:
  _check_integer("batch_size", batch_size, minimum=1)
  pair = isinstance(shard, Sequence) and len(shard) == 2
  if not pair or not all(_is_whole(value) for value in shard) or not 0 <= shard[0] < shard[1]:
    raise ValueError(
      f"shard={shard!r} — expected (index, count) with 0 <= index < count — e.g. "
      "(jax.process_index(), jax.process_count())"
    )
  index, count = shard
  if batch_size % count:
    raise ValueError(
      f"batch_size={batch_size} is no multiple of the {count} hosts — expected equal shares — set "
      f"batch_size={batch_size // count * count or count}"
    )
  return index, count


def _check_protocol(name: str, value: Any, protocol: type, *, example: str) -> None:
  if isinstance(value, type):
    raise TypeError(
      f"{name} is the class {value.__name__} — expected an object — write {value.__name__}(...), "
      f"or @{value.__name__}() in a gin file"
    )
  members = [member for member in vars(protocol) if not member.startswith("_")]
  # Looked up without evaluating: the splits of a TFDS source are read from disk.
  if any(inspect.getattr_static(value, member, None) is None for member in members):
    raise TypeError(
      f"{name}={value!r} of type {type(value).__name__} — expected a {protocol.__name__} such as "
      f"{example}(...)"
    )
