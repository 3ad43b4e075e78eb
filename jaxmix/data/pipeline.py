"""Text as batches: from a source and a tokenizer to rows for training and evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from jaxmix.data import packing as rows_of
from jaxmix.data.background import Background
from jaxmix.data.batches import (
  Batches,
  check_seed,
  dealt_batches,
  ordered_batches,
  read_options,
  shuffled,
  shuffled_batches,
)
from jaxmix.data.checks import check_integer, check_protocol, check_shard
from jaxmix.data.lanes import IndexLane, Lane, ShardLane
from jaxmix.data.outline import Outline, text_outline
from jaxmix.data.packing import Packing, Purpose, Row, Rows
from jaxmix.data.sources import ShardedSource, Source, check_split
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
    readers: None: the split is tokenised whole, and its rows are shuffled among all. A number: for
      more text than a disk holds, `batches` deals its rows from so many readers, which the hosts
      share. A reader has every readers-th shard of the source and reads one at a time: a host opens
      and tokenises only the shards of its readers, each when it is its turn. The shards come in an
      order of each epoch's own, the rows of a shard in one of each visit's. A reader begins its
      next epoch when it is through with its own shards: these should be of one size, and their
      number a multiple of the readers. The more readers, the better rows are mixed.
    num_threads: threads that read ahead; 0 reads when asked. One suits small machines: more contend
      for the interpreter. With `readers` there is one at most, beside those that open shards.
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
    readers: int | None = None,
    num_threads: int = 1,
    prefetch: int = 16,
  ):
    check_protocol("source", source, Source, example="LocalFiles")
    if readers is not None:
      check_integer("readers", readers, minimum=1)
      check_protocol("with readers, source", source, ShardedSource, example="LocalFiles")
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
    self.readers = readers
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

  def targets(self, split: str) -> int | None:
    """The number of targets of a split: what the weights of `epoch` sum to.

    None for "train" with `readers`: nobody reads all of it.
    """
    if self.readers is not None and split == "train":
      return None
    return rows_of.count_targets(self._store(split), packing=self.packing)

  def bytes_per_target(self, split: str) -> float | None:
    """UTF-8 bytes of the split for each target: bits per byte = nats per target / ln 2 / this.

    None where `targets` is.
    """
    targets = self.targets(split)
    return None if targets is None else self.text_bytes(split) / targets

  def batches(
    self, split: str, *, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1)
  ) -> Batches:
    """Batches for training, without end; every epoch has each row once, in an order of its own.

    The order depends on the seed only, and with `readers` on their number. Of each global batch of
    `batch_size` rows, host `index` of `count` takes the index-th part, so a step covers the same
    rows, in the same order, on any number of hosts; with `readers` every count-th row: the same
    rows on any number of hosts that divides the readers.

    Args:
      batch_size: rows of a global batch.   seed: of the order, 0 to 2**32 - 1.
      shard: (index, count) of this host; it gets batch_size // count rows a batch.
    Raises:
      ValueError: batch_size is no multiple of count or more than the rows of the split, or the text
        does not fit `length`; there are fewer shards than readers, or the hosts cannot share them.
    """
    settings = {"batch_size": batch_size, "shard": shard, "options": self._read_options}
    fingerprint = self._fingerprint(split)
    if self.readers is None:
      return shuffled_batches(
        self._rows(split, "training"),
        seed=seed,
        fingerprint=fingerprint,
        too_few=f"rows of length={self.length}",
        repair=", or a smaller length",
        **settings,
      )
    check_seed(seed)
    self._check_shared(split, check_shard(shard, batch_size)[1])
    background = Background()
    return dealt_batches(
      self._lanes(split, seed, self.readers, background),
      self.readers,
      fingerprint={**fingerprint, "seed": int(seed)},
      background=background,
      **settings,
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
      self._stores[split] = self._tokens(self.source, split)
    return self._stores[split]

  def _tokens(self, source: Source, split: str) -> TokenStore:
    return open_token_store(
      source, split, self.tokenizer, separator=self.separator, cache_dir=self._cache_dir
    )

  def _rows(self, split: str, purpose: Purpose) -> Rows:
    return self._rows_of(self._store(split), purpose, where=f"split {split!r}")

  def _rows_of(self, store: TokenStore, purpose: Purpose, *, where: str) -> Rows:
    try:
      return rows_of.make_rows(store, length=self.length, packing=self.packing, purpose=purpose)
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from None

  def _fingerprint(self, split: str) -> dict[str, Any]:
    """What the rows of training are made from."""
    check_split(self.source, split)
    sharded = self.readers is not None
    return {
      "split": split,
      "length": self.length,
      "packing": self.packing,
      "separator": self.separator,
      "source": self.source.manifest(split) if sharded else self.source.fingerprint(split),
      "tokenizer": self.tokenizer.fingerprint(),
      **({"readers": self.readers} if sharded else {}),
    }

  def _lanes(
    self, split: str, seed: int, count: int, background: Background
  ) -> Callable[[int], Lane]:
    """Number -> the lane of so many; where there are readers, as many."""
    if self.readers is None:
      rows = self._rows(split, "training")
      order = shuffled(rows, seed)
      return lambda number: IndexLane(order, rows=len(rows), index=number, count=count)
    shards = self.source.shards(split)

    def open_shard(number: int) -> Rows:
      name, source = shards[number]
      store = self._tokens(_UntilClosed(source, background), split)
      return self._rows_of(store, "shard", where=f"split {split!r}, shard {name}")

    names = [name for name, _ in shards]
    return lambda number: ShardLane(
      range(number, len(shards), count),
      open_shard,
      names=names,
      seed=seed,
      background=background,
    )

  def _check_shared(self, split: str, hosts: int) -> None:
    """Raises ValueError where there are too few shards, or the hosts cannot share the readers."""
    if self.readers is None:
      return
    shards, readers = len(self.source.shards(split)), self.readers
    if max(hosts, readers) > shards:
      what = f"the {hosts} hosts" if hosts > shards else f"readers={readers}"
      fewer = "" if hosts > shards else f"set readers={shards // hosts * hosts}, or "
      raise ValueError(
        f"split {split!r} has {shards} shards, fewer than {what} — expected at least one for each "
        f"— {fewer}cut the text into more shards: jaxmix.data.prepare_tfds(source, name=..., "
        f"data_dir=..., shards={max(hosts, readers)}) makes them, and TFDS reads them"
      )
    if readers % hosts:
      above, most = -(-readers // hosts) * hosts, shards // hosts * hosts
      raise ValueError(
        f"readers={readers} cannot be shared equally by {hosts} hosts — expected a multiple of the "
        f"hosts — set readers={min(above, most)}, or, for a run that has begun, take a number of "
        f"hosts that divides {readers}"
      )


class _UntilClosed:
  """A source that ends in an error once nobody waits for its documents any more."""

  def __init__(self, source: Source, background: Background):
    self.splits, self.fingerprint = source.splits, source.fingerprint
    self._source, self._background = source, background

  def documents(self, split: str) -> Iterator[str]:
    return self._background.until_closed(self._source.documents(split))
