"""Rows of a fixed length from a token store: numpy, by index, the same on every machine.

A row has `inputs` [L] int32, `targets` [L] int32 (the token after each input) and `weights` [L]
float32 (1 where there is a target, 0 on padding); rows of documents also have `segment_ids` [L]
int32 (1, 2, ... for the pieces in the row, 0 on padding) and `positions` [L] int32 (from 0 in each
piece). Padding is 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np

from jaxmix.data.token_store import TokenStore

Packing = Literal["documents", "blocks", "none"]
Purpose = Literal["training", "evaluation", "shard"]
Row = dict[str, np.ndarray]

PACKINGS = ("documents", "blocks", "none")


class Rows(Protocol):
  """Rows by index: len(rows), rows[i] for 0 <= i < len(rows)."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Row: ...


class BlockRows:
  """The stream of tokens cut into blocks: row i has the targets tokens[i L + 1 : (i + 1) L + 1].

  Args:
    tokens: [N].   length: L.
    tail: "drop" leaves out what does not fill a row; "pad" keeps it in a last row with weights 0 at
      its end, so that each token but the first is a target exactly once.
  """

  def __init__(self, tokens: np.ndarray, *, length: int, tail: Literal["drop", "pad"]):
    self._tokens = tokens
    self._length = length
    targets = len(tokens) - 1
    self._rows = targets // length if tail == "drop" else -(-targets // length)

  def __len__(self) -> int:
    return self._rows

  def __getitem__(self, index: int) -> Row:
    start = _in_range(index, self._rows) * self._length
    row = _empty_row(self._length)
    _fill(row, 0, self._tokens[start : start + self._length + 1])
    return row


@dataclasses.dataclass(frozen=True)
class RowPlan:
  """Which pieces of documents make up each row.

  starts, sizes: [pieces] int64; piece p has inputs tokens[starts[p] : starts[p] + sizes[p]], and as
    targets the same one token later.
  bounds: [rows + 1] int64; row r holds the pieces bounds[r] to bounds[r + 1].
  """

  starts: np.ndarray
  sizes: np.ndarray
  bounds: np.ndarray


class DocumentRows:
  """Rows of pieces of documents, as a plan says; no piece sees another."""

  def __init__(self, tokens: np.ndarray, plan: RowPlan, *, length: int):
    self._tokens = tokens
    self._plan = plan
    self._length = length

  def __len__(self) -> int:
    return len(self._plan.bounds) - 1

  def __getitem__(self, index: int) -> Row:
    index = _in_range(index, len(self))
    row = _empty_row(self._length)
    row["segment_ids"] = np.zeros(self._length, np.int32)
    row["positions"] = np.zeros(self._length, np.int32)
    plan, place = self._plan, 0
    first, last = plan.bounds[index], plan.bounds[index + 1]
    for segment, piece in enumerate(range(first, last), 1):
      start, size = plan.starts[piece], plan.sizes[piece]
      _fill(row, place, self._tokens[start : start + size + 1])
      row["segment_ids"][place : place + size] = segment
      row["positions"][place : place + size] = np.arange(size)
      place += size
    return row


def make_rows(store: TokenStore, *, length: int, packing: Packing, purpose: Purpose) -> Rows:
  """The rows of a store.

  "blocks": one stream; the tail is dropped in training and padded in evaluation. "documents":
  pieces of documents, several a row. "none": one document a row. Evaluation has each target once,
  and so does training but for the tail of the blocks. A "shard" is a part of what is trained on: it
  may be too short for any row.

  Raises:
    ValueError: in training, blocks longer than the whole split, or with packing="none" a length of
      more than twice the longest document; with packing="none" a document that does not fit a row;
      nothing to predict at all.
  """
  targets = count_targets(store, packing=packing)
  if not targets and purpose != "shard":
    raise ValueError(
      f"packing={packing!r} finds nothing to predict in {len(store.tokens)} tokens of "
      f"{store.documents} documents — expected a document of two tokens — give more text"
    )
  if packing == "blocks":
    if purpose == "training" and targets < length:
      raise ValueError(
        f"length={length} is longer than the whole split: a block needs {length + 1} tokens, there "
        f"are {len(store.tokens)} — expected at least one block — set length={targets} or less, or "
        "give more text"
      )
    tail = "pad" if purpose == "evaluation" else "drop"
    return BlockRows(store.tokens, length=length, tail=tail)
  if packing == "none":
    _check_fit(store, length=length, purpose=purpose)
  starts, sizes = cut_documents(store.offsets, length=length)
  if packing == "documents":
    plan = plan_rows(starts, sizes, length=length)
  else:
    plan = RowPlan(starts, sizes, np.arange(len(sizes) + 1))
  return DocumentRows(store.tokens, plan, length=length)


def count_targets(store: TokenStore, *, packing: Packing) -> int:
  """How many tokens are predicted: all but the first, of the stream or of each document."""
  if packing == "blocks":
    return len(store.tokens) - 1
  return int(np.maximum(np.diff(store.offsets) - 1, 0).sum())


def cut_documents(offsets: np.ndarray, *, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Documents as pieces of at most `length` inputs: (starts, sizes), both [pieces] int64.

  A piece ends with the input whose target begins the next piece, so that a cut loses no target.
  """
  targets = np.maximum(np.diff(offsets) - 1, 0)
  pieces = -(-targets // length)
  document = np.repeat(np.arange(len(targets)), pieces)
  before = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
  starts = offsets[document] + before * length
  sizes = np.minimum(length, targets[document] - before * length)
  return starts, sizes


def plan_rows(starts: np.ndarray, sizes: np.ndarray, *, length: int) -> RowPlan:
  """Pieces packed into few rows of `length`: best fit, the largest first.

  Rows come in the order of their first piece, and the pieces of a row in the order of the text.
  Depends on nothing but the sizes.
  """
  row = _best_fit(sizes, capacity=length)
  pieces = np.arange(len(sizes))
  first_piece = np.full(row.max(initial=-1) + 1, len(sizes))
  np.minimum.at(first_piece, row, pieces)
  order = np.argsort(first_piece[row], kind="stable")
  bounds = np.searchsorted(first_piece[row][order], np.sort(first_piece))
  return RowPlan(starts[order], sizes[order], np.append(bounds, len(sizes)))


def stream_batches(tokens: np.ndarray, *, length: int, batch_size: int) -> Iterator[Row]:
  """One stream as `batch_size` contiguous streams side by side, `length` tokens of each at a time.

  Row b of a batch continues row b of the batch before. Each token but the first is a target exactly
  once; where a stream has ended, weights are 0.
  """
  targets = len(tokens) - 1
  stream_length = -(-targets // batch_size)
  for begin in range(0, stream_length, length):
    rows = []
    for stream in range(batch_size):
      end = min((stream + 1) * stream_length, targets)
      start = min(stream * stream_length + begin, end)
      row = _empty_row(length)
      _fill(row, 0, tokens[start : min(start + length, end) + 1])
      rows.append(row)
    yield stack(rows)


def stack(rows: list[Row]) -> Row:
  """Rows of the same keys as one batch: [B, L] for each key."""
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _best_fit(sizes: np.ndarray, *, capacity: int) -> np.ndarray:
  """The row of each piece; rows_with[r] are the rows with r free places, bit r of `free`: any."""
  rows = np.empty(len(sizes), np.int64)
  rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
  free, opened = 0, 0
  order = np.argsort(-sizes, kind="stable")
  for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
    fitting = free >> size
    if fitting:
      space = size + (fitting & -fitting).bit_length() - 1
      row = rows_with[space].pop()
      if not rows_with[space]:
        free ^= 1 << space
    else:
      row, space = opened, capacity
      opened += 1
    if left := space - size:
      rows_with[left].append(row)
      free |= 1 << left
    rows[piece] = row
  return rows


def _check_fit(store: TokenStore, *, length: int, purpose: Purpose) -> None:
  sizes = np.diff(store.offsets)
  longest = int(sizes.max())
  if longest - 1 > length:
    document = int(np.argmax(sizes - 1 > length))
    raise ValueError(
      f'packing="none" puts one document in a row, and document {document} has {sizes[document]} '
      f"tokens where length={length} holds {length + 1} (the last is a target only) — expected "
      f'every document to fit — set length={longest - 1}, or packing="documents" to cut them'
    )
  if purpose == "training" and 2 * (longest - 1) < length:
    raise ValueError(
      f"length={length} is more than twice as long as any document: the longest has {longest} "
      'tokens — with packing="none" every row would be mostly padding — set '
      f'length={longest - 1}, or packing="documents" to fill the rows'
    )


def _in_range(index: int, rows: int) -> int:
  if not 0 <= index < rows:
    raise IndexError(f"row {index} of {rows} — expected 0 to {rows - 1}")
  return index


def _empty_row(length: int) -> Row:
  return {
    "inputs": np.zeros(length, np.int32),
    "targets": np.zeros(length, np.int32),
    "weights": np.zeros(length, np.float32),
  }


def _fill(row: Row, place: int, window: np.ndarray) -> None:
  size = len(window) - 1
  row["inputs"][place : place + size] = window[:-1]
  row["targets"][place : place + size] = window[1:]
  row["weights"][place : place + size] = 1
